"""Reads and writes the two files of a head map, `config.json` and `head_map.safetensors`.

Files may come from anyone. The size on disk is checked before a byte is read, the path must not leave the folder, and
the formats (JSON and safetensors) run no code. One `sha256` in the config covers both files, so damaged or half-written
files never load. The meaning of labels and scores is defined in `head_map.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import safetensors.torch
import torch

from ssd_cache.head_map.checks import HeadMapError
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.io.showing import first_line, shown
from ssd_cache.io.untrusted import name_problem, parse_json
from ssd_cache.io.writing import write_files

FORMAT_VERSION = 1
CONFIG_NAME, TENSORS_NAME = "config.json", "head_map.safetensors"
SCORE_PREFIX, LEARNED_PREFIX = "scores.", "learned."
BOTH = f"a head map is a folder with {CONFIG_NAME} and {TENSORS_NAME}"
AGAIN = "save the map again with save_pretrained, or download it again with force_download=True"

MAX_CONFIG_BYTES, MAX_TENSORS_BYTES, MAX_HEADER_BYTES = 1 << 20, 64 << 20, 64 << 10

FACTS = frozenset({"grid", "model_id", "revision", "model_type", "method", "threshold", "budget", "profile"})
RANKS_ALL = "learned_ranks_all"
OPTIONAL = frozenset({"previews", RANKS_ALL})
"""Facts that few maps have. They are omitted when absent, so older versions can read all other maps."""
CONFIG_FIELDS = FACTS | {"format_version", "num_layers", "num_kv_heads", "sha256"}


def encode(
    facts: dict[str, Any], is_spatial: torch.Tensor, scores: dict[str, torch.Tensor], learned: LearnedScore | None
) -> dict[str, bytes]:
    """File name -> content, the tensors first. `facts`: fields of the config except `format_version` and `sha256`."""
    tensors = {"is_spatial": is_spatial} | {SCORE_PREFIX + name: score for name, score in scores.items()}
    if learned is not None:
        tensors |= {LEARNED_PREFIX + name: tensor for name, tensor in learned.tensors().items()}
    tensor_bytes = safetensors.torch.save(tensors, metadata={"format": "pt"})
    if len(tensor_bytes) > MAX_TENSORS_BYTES:
        raise HeadMapError(
            f"the tensors of this head map take {len(tensor_bytes)} bytes, a file may hold {MAX_TENSORS_BYTES}; "
            "keep fewer scores"
        )
    config = {"format_version": FORMAT_VERSION, **facts}
    if learned is not None and learned.ranks_all:
        config[RANKS_ALL] = True
    config["sha256"] = _sha256(config, tensor_bytes)
    return {TENSORS_NAME: tensor_bytes, CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n"}


def decode(config_bytes: bytes, tensor_bytes: bytes, place: str) -> dict[str, Any]:
    """The arguments of `HeadMap` in a pair of files; raises HeadMapError, which names `place`, if they are damaged."""
    config = _parse_config(config_bytes, f"{place}/{CONFIG_NAME}")
    if _sha256(config, tensor_bytes) != config["sha256"]:
        raise HeadMapError(
            f"{place}: {CONFIG_NAME} and {TENSORS_NAME} do not belong together (their sha256 differs): half-written, "
            f"damaged or edited by hand; {AGAIN}"
        )
    tensors = _parse_tensors(tensor_bytes, f"{place}/{TENSORS_NAME}")
    stated, shape = [config["num_layers"], config["num_kv_heads"]], list(tensors["is_spatial"].shape)
    if stated != shape:
        raise HeadMapError(
            f"{place}: {CONFIG_NAME} states {shown(stated[0])} layers and {shown(stated[1])} KV heads, "
            f"is_spatial in {TENSORS_NAME} has shape {shape}; {AGAIN}"
        )
    if RANKS_ALL in config:
        if tensors["learned"] is None:
            raise HeadMapError(f"{place}: {CONFIG_NAME} has {RANKS_ALL}, and there is no learned score; {AGAIN}")
        tensors["learned"] = replace(tensors["learned"], ranks_all=config[RANKS_ALL])
    return tensors | {name: config[name] for name in FACTS | (OPTIONAL & config.keys()) - {RANKS_ALL}}


def find_local(source: str | os.PathLike[str]) -> Path | None:
    """The folder `source`, or the folder of `source` if it is one of the two files; None for a repository id."""
    if not source or not isinstance(source, (str, os.PathLike)) or not isinstance(os.fspath(source), str):
        raise HeadMapError(f"source={shown(source)}: give a folder, a file, or a repository id like 'user/name'")
    check_name("source", os.fspath(source))
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        if path.name in (CONFIG_NAME, TENSORS_NAME):
            return path.parent
        raise HeadMapError(f"{path}: neither a folder nor a {CONFIG_NAME} or {TENSORS_NAME}; give the map's folder")
    could_be_id = isinstance(source, str) and re.fullmatch(r"[^\\/.~][^\\/]*(/[^\\/]+)?", source)
    if not could_be_id or path.suffix in (".json", ".safetensors"):
        raise HeadMapError(f"{path}: no such folder or file; check the path, or give a repository id like 'user/name'")
    return None


def read_file(path: Path, limit: int, root: Path | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes; after following links it must be inside `root`."""
    try:
        real = path.resolve(strict=True)
        if root is not None and not _is_inside(real, root):
            raise HeadMapError(
                f"{path}: a link that leaves the folder {root}, to {real}; put the file itself there, or load a map of "
                "the Hub by its repository id"
            )
        if not real.is_file():
            raise HeadMapError(f"{path}: not a regular file; {BOTH}")
        size = real.stat().st_size
        if size <= limit:
            with real.open("rb") as file:
                content = file.read(limit + 1)
            size = len(content)
    except FileNotFoundError as error:
        raise HeadMapError(f"{path}: no such file; {BOTH}") from error
    except (OSError, RuntimeError) as error:  # before Python 3.13, a loop of links raises RuntimeError
        raise HeadMapError(f"{path}: cannot be read ({error}); check the file and its permissions") from error
    if size > limit:
        raise HeadMapError(f"{path}: holds more than {limit} bytes, the limit of this file; it is not a head map")
    return content


def read_folder(folder: Path, subfolder: str | None = None) -> tuple[bytes, bytes]:
    """The bytes of both files in `folder`/`subfolder`; a link may point anywhere inside `folder`."""
    root, inside = folder.resolve(), folder / (subfolder or "")
    config = read_file(inside / CONFIG_NAME, MAX_CONFIG_BYTES, root)
    return config, read_file(inside / TENSORS_NAME, MAX_TENSORS_BYTES, root)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write each file under a temporary name, then rename them in order, so a reader sees only whole files."""
    check_name("folder", str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files({folder / name: content for name, content in files.items()})
    except OSError as error:
        raise HeadMapError(f"{folder}: the head map cannot be written ({error}); give another folder") from error


def check_name(what: str, name: str | None) -> None:
    """Refuse a text that cannot be the name of a file or repository."""
    if name is not None and (problem := name_problem(name)):
        raise HeadMapError(f"{what}={shown(name)}: {problem}; give the name of a folder, or of a repository of the Hub")


def check_subfolder(subfolder: str | None) -> None:
    """Refuse a subfolder that could leave its folder or repository, under POSIX or Windows rules."""
    check_name("subfolder", subfolder)
    paths = PurePosixPath(subfolder or ""), PureWindowsPath(subfolder or "")
    if "\\" in (subfolder or "") or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
        raise HeadMapError(f"subfolder={shown(subfolder)} leaves the folder; give a relative path like 'maps/tau-0.5'")


def _is_inside(real: Path, root: Path) -> bool:
    # In huggingface_hub's cache, the files of snapshots/<commit>/ are links into the blobs/ folder next to snapshots/.
    blobs = next((up.parent / "blobs" for up in (root, *root.parents) if up.name == "snapshots"), root)
    return real.is_relative_to(root) or real.is_relative_to(blobs)


def _sha256(config: dict[str, Any], tensor_bytes: bytes) -> str:
    covered = {name: value for name, value in config.items() if name != "sha256"}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode() + tensor_bytes).hexdigest()


def _parse_config(content: bytes, place: str) -> dict[str, Any]:
    try:
        config = parse_json(content)
    except ValueError as error:
        raise HeadMapError(f"{place}: not the JSON of a head map ({error}); {AGAIN}") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise HeadMapError(
            f"{place}: has no format_version, so it is not a head map (a model's own folder, perhaps?); "
            "make one with profile_heads and save_pretrained"
        )
    version = config["format_version"]
    if version != FORMAT_VERSION or isinstance(version, (bool, float)):
        raise HeadMapError(
            f"{place}: format_version {shown(version)}, this ssd-cache reads {FORMAT_VERSION}; upgrade it"
        )
    if config.keys() - OPTIONAL != CONFIG_FIELDS:
        raise HeadMapError(
            f"{place}: missing fields {shown(sorted(CONFIG_FIELDS - config.keys()), 300)}, unknown fields "
            f"{shown(sorted(config.keys() - CONFIG_FIELDS - OPTIONAL), 300)}; save the map again, or upgrade ssd-cache"
        )
    return config


def _parse_tensors(content: bytes, place: str) -> dict[str, Any]:
    """The labels, the named scores and the learned score, as arguments of `HeadMap`."""
    header_size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header_size > min(MAX_HEADER_BYTES, len(content) - 8):
        raise HeadMapError(f"{place}: not a safetensors file, or a truncated one; {AGAIN}")
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # the parser raises SafetensorError, KeyError, RuntimeError and others
        raise HeadMapError(f"{place}: not a whole safetensors file ({first_line(error)}); {AGAIN}") from error
    is_spatial = tensors.pop("is_spatial", None)
    if is_spatial is None:
        raise HeadMapError(f"{place}: has no tensor is_spatial; a head map needs it: {AGAIN}")
    if is_spatial.dtype != torch.bool or (is_spatial.view(torch.uint8) > 1).any():
        raise HeadMapError(f"{place}: is_spatial is {is_spatial.dtype} and must be bool, bytes 0 and 1; {AGAIN}")
    found: dict[str, dict[str, torch.Tensor]] = {SCORE_PREFIX: {}, LEARNED_PREFIX: {}}
    for name, tensor in sorted(tensors.items()):  # the parser's own order changes from process to process
        prefix = name[: name.find(".") + 1]
        if prefix not in found or tensor.dtype != torch.float32:
            raise HeadMapError(
                f"{place}: holds {shown(name)} of {tensor.dtype}; beside is_spatial only float32 tensors named "
                f"'{SCORE_PREFIX}<name>' or '{LEARNED_PREFIX}<name>' may stand: save the map again, or "
                "upgrade ssd-cache"
            )
        found[prefix][name.removeprefix(prefix)] = tensor
    parts = found[LEARNED_PREFIX]
    if parts and parts.keys() != LearnedScore.NAMES:
        raise HeadMapError(
            f"{place}: a learned score of {shown(sorted(parts), 300)}, and it has {sorted(LearnedScore.NAMES)}: save "
            "the map again, or upgrade ssd-cache"
        )
    learned = LearnedScore.of(parts) if parts else None
    return {"is_spatial": is_spatial, "scores": found[SCORE_PREFIX], "learned": learned}
