"""Hostile files from good ones, by a seed: bytes changed, JSON values replaced, tensors with other shapes and numbers.

It does not judge how a reader takes them.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

DEEP = "a list nested deeper than any parser goes"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**70, -(10**400), 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 900_000, "\ud800", "a\0b", "\x1b[31mred", "one\ntwo", "../..", DEEP),
    *([], {}, [[]], {"": None}, [float("nan")], ["\udfff"]),
)


def json_mutant(text: str, chance: random.Random) -> str:
    """A JSON text with one of its values replaced, taken out, or put under another name."""
    root = [json.loads(text)]
    places: list[tuple[Any, Any]] = []
    todo: list[Any] = [root]
    while todo:
        part = todo.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part))
        places += [(part, key) for key in keys]
        todo += [part[key] for key in keys if isinstance(part[key], (dict, list))]
    holder, key = chance.choice(places)
    action = chance.randrange(6)
    if action == 0 and holder is not root:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[chance.choice(["", "other", "\ud800", "x" * 5000])] = holder.pop(key)
    else:
        holder[key] = chance.choice(VALUES)
    return _text(root[0] if root else None)


def _text(value: Any) -> str:
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def byte_mutant(content: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, cut off, put in or taken out."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 9))
            case _:
                del changed[at : at + 9]
    return bytes(changed)


def safetensors_mutant(content: bytes, chance: random.Random) -> bytes:
    """A changed header, JSON that the header's texts hold changed, or numbers replaced."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    texts, names = header.get("__metadata__", {}), [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    match chance.randrange(6):
        case 0 | 1 if texts:
            key = chance.choice(list(texts))
            is_json = texts[key][:1] in "{["
            other = ["", "-1", "1e9", "9" * 5000, "nan", "x" * 900_000, "[]", "null", "[" * 100_000]
            texts[key] = json_mutant(texts[key], chance) if is_json and chance.random() < 0.8 else chance.choice(other)
        case 2:
            shape = header[name]["shape"]
            header[name]["shape"] = chance.choice([[1, *shape], shape[::-1], shape[:-1], [], [-1], [2**62, 2**62]])
        case 3:
            header[name]["dtype"] = chance.choice(["F32", "F64", "BOOL", "I64", "F8_E4M3", "C64", "none"])
        case 4:
            header[chance.choice(["x", "x" * 5000])] = header.pop(name)
        case _:
            start, end = header[name]["data_offsets"]
            number = chance.choice([float("nan"), float("inf"), -1.0, 3e38, -0.5, 1e30])
            one = struct.pack("<f" if header[name]["dtype"] == "F32" else "<d", number)
            body = body[:start] + (one * (end - start))[: end - start] + body[end:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutants(content: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Hostile versions of a file: JSON, lines of JSON, or safetensors."""
    chance = random.Random(seed)
    kinds: list[Callable[[], bytes]] = [lambda: byte_mutant(content, chance)]
    if content[:1] not in (b"{", b"["):
        kinds += [lambda: safetensors_mutant(content, chance)] * 3
    elif content.count(b"\n") < 2 or not content.split(b"\n")[0].endswith(b"}"):
        kinds += [lambda: json_mutant(content.decode(), chance).encode()] * 3
    else:
        lines = content.decode().splitlines()

        def changed_line() -> bytes:
            at = chance.randrange(len(lines))
            changed = [*lines[:at], json_mutant(lines[at], chance), *lines[at + 1 :]]
            return "".join(line + "\n" for line in changed).encode()

        kinds += [changed_line] * 3
    for _ in range(number):
        yield chance.choice(kinds)()
