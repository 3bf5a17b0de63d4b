"""The trained models that come with the package: their folders, the captions that they know, and their checksums.

A new one is an entry of `BUNDLED_MODELS` and its folder. `find.py` and `checkpoint.py` treat all of them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssd_cache.emoji.captions import parse_caption
from ssd_cache.io.showing import first_line, first_names, shown
from ssd_cache.io.untrusted import read_text
from ssd_cache.models.settings import GeneratorError

CHECKSUMS = "SHA256SUMS"
"""File of a bundled checkpoint with the checksum of each file of weights, in the format of `sha256sum`."""

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class BundledModel:
    """A trained model that comes with the package.

    Attributes:
        folder: its checkpoint.
        parse_caption: raises ValueError for a caption that the model cannot generate; None for a model that ignores
            unknown words.
    """

    folder: Path
    parse_caption: Callable[[str], object] | None = None


BUNDLED = "shapes-janus"
"""Name of the default model, one of `BUNDLED_MODELS`."""

BUNDLED_MODELS = {
    BUNDLED: BundledModel(_PACKAGE / "shapes" / "checkpoint"),
    "emoji-janus": BundledModel(_PACKAGE / "emoji" / "checkpoint", parse_caption),
}
"""The bundled models by name."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint's weights into its folder."""
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / CHECKSUMS).write_text("".join(lines), "utf-8")


def check_checksums(name: str, folder: Path) -> None:
    """Refuse a bundled model whose weights are not those that were published.

    Raises:
        GeneratorError: a file of weights has no checksum, is missing, or has another checksum.
    """
    try:
        lines = read_text(folder / CHECKSUMS).splitlines()
        expected = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
        weights = {path.name for path in folder.glob("*.safetensors")}
        if not expected or weights - expected.keys():
            raise ValueError(f"{CHECKSUMS} lists no checksum of {first_names(sorted(weights)) or 'weights'}")
        for file, checksum in expected.items():
            if file not in weights:
                raise ValueError(f"No such file of weights: {shown(file)}")
            if (found := _sha256(folder / file)) != checksum:
                raise ValueError(f"{file} has the SHA-256 checksum {found[:12]}..., expected {checksum[:12]}...")
    except (OSError, ValueError) as error:
        raise GeneratorError(
            f"the weights of {name} in {folder} are damaged or incomplete: {first_line(error)}; install ssd-cache again"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
