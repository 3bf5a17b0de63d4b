"""Readers for untrusted files: JSON and safetensors, checked before a value is used.

Each check raises a ValueError that describes the problem without the file's name; callers add the name in their own
error. This module does not interpret the contents.
"""

from __future__ import annotations

import io
import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open

from ssd_cache.io.showing import ReadableError, first_line, shown

MAX_DEPTH = 16
"""Maximum nesting depth of lists and objects in JSON."""

MAX_NAME = 4096
"""Maximum number of characters of a name or path, the limit of Linux."""

MAX_FILE = 1 << 30
"""Maximum number of bytes of a file that is read whole; a file with holes takes no room on the disk that it came on."""

MAX_INT = 10**300
"""Bound of the absolute value of integers in JSON, so that each can be converted to float."""


class WrongFileError(ReadableError):
    """A file that a run cannot resume from: it belongs to a run with other settings, or is of another kind."""


def parse_json(content: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text: UTF-8, finite numbers of at most `MAX_INT`, nested at most `max_depth` levels.

    Raises:
        ValueError: anything else; also half of a surrogate pair in a text, since no file could hold it.
    """
    try:
        value = json.loads(content.decode() if isinstance(content, bytes) else content)
        _check_parsed(value, max_depth)
    except ReadableError:
        raise
    except ValueError as error:  # raised by decode, by json, or by int for thousands of digits
        raise ReadableError(error) from error
    except RecursionError as error:
        raise ReadableError(f"it nests deeper than {max_depth} levels") from error
    return value


def _check_parsed(value: Any, levels: int) -> None:
    if isinstance(value, dict | list):
        if levels == 0:
            raise RecursionError
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_parsed(child, levels - 1)
    elif isinstance(value, str) and not is_unicode(value):
        raise ReadableError(f"the text {shown(value)} holds half of a surrogate pair")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ReadableError(f"the number {value} is not finite")
    elif isinstance(value, int) and abs(value) > MAX_INT:
        raise ReadableError(f"the number {shown(value)} is too large")


def read_json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its place: the file and the line number. Skips blank lines.

    Raises:
        ValueError: a line is not a JSON object, or the file is larger than `MAX_FILE`; the message names the place.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):  # a prompt may hold other line separators
        if line.strip():
            try:
                found.append((f"{path}, line {number}", checked(dict, parse_json(line))))
            except ValueError as error:
                raise ReadableError(f"{path}, line {number}: not a JSON object ({error})") from error
    return found


def read_bytes(path: Path, limit: int = MAX_FILE) -> bytes:
    """The content of a file, or of a pipe or device, of at most `limit` bytes.

    Raises:
        ValueError: there are more bytes; the message names the file.
        OSError: the file cannot be read.
    """
    parts, size = [], path.stat().st_size  # 0 for pipes and devices
    if size <= limit:
        with path.open("rb") as file:
            size = 0
            while size <= limit and (part := file.read(1 << 20)):
                parts.append(part)
                size += len(part)
    if size > limit:
        raise ReadableError(f"{path}: more than {limit} bytes, the limit of this file; give a smaller one")
    return b"".join(parts)


def read_text(path: Path, newline: str | None = None) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; `newline` is as for `open`.

    Raises:
        ValueError: the file is not in UTF-8, or larger than `MAX_FILE`; the message names it.
        OSError: the file cannot be read.
    """
    try:
        return io.TextIOWrapper(io.BytesIO(read_bytes(path)), "utf-8-sig", newline=newline).read()
    except UnicodeDecodeError as error:
        raise ReadableError(f"{path}: not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded in UTF-8; a text with half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_problem(name: str) -> str:
    """Why a text cannot be the name of a file, folder, revision or repository; "" if it can."""
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters, the limit is {MAX_NAME}"
    if "\0" in name:
        return "it holds a NUL character"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "it holds half of a surrogate pair"
    return ""


def checked(kind: Any, value: Any, name: str = "it") -> Any:
    """Check a JSON value against a type hint and convert objects to dataclasses; an integer is also a valid float.

    Supported hints are None, bool, int, float, str, Any, dict, list, tuple, Literal, unions of these, and dataclasses.
    Fields of a dataclass may be missing if they have a default.

    Raises:
        ValueError: another type, or an object with missing or unknown fields; the message gives `name` as the place.
    """
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    matching = [one for one in options if _matches(one, value)]
    if not matching:
        raise ReadableError(f"{name}={shown(value)}, expected {' or '.join(dict.fromkeys(map(_described, options)))}")
    kind = type(value) if type(value) in matching else matching[0]
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(origin):
        return _checked_object(origin, value, name)
    if origin in (list, tuple) and arguments:
        kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ReadableError(f"{name} holds {len(value)} values, expected {len(kinds)}")
        return origin(
            checked(one, entry, f"{name}[{i}]") for i, (one, entry) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict and arguments:
        return {key: checked(arguments[1], entry, f"{name}[{shown(key, 40)}]") for key, entry in value.items()}
    return value


def checked_fields(kinds: Mapping[str, Any], value: Any, name: str = "it") -> dict[str, Any]:
    """Check that an object has these fields with these types; other fields are allowed. Raises ValueError."""
    checked(dict, value, name)
    prefix = "" if name == "it" else f"{name}."
    for field, kind in kinds.items():
        if field not in value:
            raise ReadableError(f"{prefix + field!r} is missing")
        checked(kind, value[field], prefix + field)
    return value


def _checked_object(kind: Any, value: dict[str, Any], name: str) -> Any:
    hints, made = get_type_hints(kind), [field for field in fields(kind) if field.init]
    known = {field.name for field in made}
    needed = {field.name for field in made if field.default is MISSING and field.default_factory is MISSING}
    prefix = "" if name == "it" else f"{name}."
    if missing := [field.name for field in made if field.name in needed - value.keys()]:
        raise ReadableError(f"{prefix + missing[0]!r} is missing")
    if unknown := sorted(value.keys() - known):
        raise ReadableError(f"{name} has {shown(unknown[0])}, which means nothing here")
    return kind(**{field: checked(hints[field], entry, prefix + field) for field, entry in value.items()})


def _matches(kind: Any, value: Any) -> bool:
    """Whether the type of a JSON value matches a hint; the contents of lists and objects are not checked."""
    if get_origin(kind) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(kind))
    wanted = _json_type(kind)
    return wanted is Any or type(value) is wanted or (wanted is float and type(value) is int)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return "None" if kind is type(None) else _json_type(kind).__name__


def _json_type(kind: Any) -> Any:
    """The type of the JSON values that a hint accepts."""
    origin = get_origin(kind) or kind
    return dict if is_dataclass(origin) else {tuple: list, None: type(None)}.get(origin, origin)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata strings and the tensors of a safetensors file; all values must be finite.

    Raises:
        ValueError: not a safetensors file, a damaged one, or one with NaN or infinite values.
        OSError: the file cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, since it is not a dict
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ReadableError(f"the tensor {shown(name)} holds NaN or infinite numbers")
    except (OSError, ReadableError):
        raise
    except Exception as error:  # the parser raises SafetensorError, KeyError, RuntimeError and others
        kind = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        raise ReadableError(f"not a whole safetensors file: {kind}{first_line(error)}") from error
    return header, tensors


def check_like(tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose names, shapes or dtypes differ from those of `like`; raises ValueError."""
    if missing := sorted(like.keys() - tensors.keys()):
        raise ReadableError(f"the tensor {shown(missing[0])} is missing")
    if unknown := sorted(tensors.keys() - like.keys()):
        raise ReadableError(f"the tensor {shown(unknown[0])} means nothing here")
    for name, wanted in like.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise ReadableError(
                f"the tensor {name} is {found.dtype} {shown(list(found.shape))}, expected {wanted.dtype} "
                f"{list(wanted.shape)}"
            )
