"""Convert emoji from npm packages to the visual tokens that emoji-janus is trained on.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat   # unpack each archive
    pip install resvg_py
    python examples/prepare_emoji_data.py noto/package fluent/package --output emoji-data

Writes to OUTPUT: `icons.npz` (codebook and tokens, as in `ssd_cache.emoji`), `icons_144.npy` (the icons at the
resolution that the VQ decoder is trained on), `icons.png` and `tokens.png` (contact sheets of the icons and of their
tokens), and `SOURCES.md` (packages, versions and licences). An icon that is missing or does not render is named and
counted; the data set needs all of them, so then nothing is written.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image

from ssd_cache.emoji.captions import BACKGROUNDS, STYLES, SUBJECTS
from ssd_cache.emoji.icons import CELL, CLEAR, ICON_SIDE

ICON_NAMES = {
    "coffee": "hot-beverage",
    "beer": "beer-mug",
    "cat": "cat-face",
    "dog": "dog-face",
    "pig": "pig-face",
    "rabbit": "rabbit-face",
    "tiger": "tiger-face",
    "monkey": "monkey-face",
    "ladybug": "lady-beetle",
    "fish": "tropical-fish",
    "tree": "evergreen-tree",
    "car": "automobile",
    "sun": "sun-with-face",
    "moon": "crescent-moon",
    "gift": "wrapped-gift",
    "heart": "red-heart",
    "pumpkin": "jack-o-lantern",
    "diamond": "gem-stone",
}
"""Names of icons in the packages that differ from the names in captions."""

PACKAGES = {"noto": "@iconify-json/noto", "fluent": "@iconify-json/fluent-emoji-flat"}

SIDE = 8 * ICON_SIDE
"""Side of an icon in pixels in `icons_144.npy`: 8 x 8 pixels a cell, an image of 192 x 192."""

NUM_CODES = 1016

MIN_ALPHA = 0.02
"""A cell whose pixels are all more transparent than this is clear."""


class DataError(RuntimeError):
    """The data cannot be prepared; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class IconSet:
    """The icons of an npm package of Iconify: SVG bodies by name, their default size, and licence."""

    package: str
    version: str
    licence: str
    icons: dict[str, dict]
    width: float
    height: float

    def svg(self, name: str, side: int) -> str:
        """The SVG document of an icon, `side` pixels wide and high."""
        icon = self.icons[name]
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", self.width), icon.get("height", self.height))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, box))}" width="{side}" height="{side}">{icon["body"]}</svg>'
        )


def read_icon_set(folder: Path, package: str) -> IconSet:
    """Read an unpacked npm package.

    Raises:
        DataError: the folder is not the package.
    """
    try:
        about, icons = (json.loads((folder / name).read_text("utf-8")) for name in ("package.json", "icons.json"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"{folder} is not the unpacked npm package {package} ({error}): run `npm pack {package}`, unpack the "
            "archive, and give the path of its folder `package`"
        ) from None
    if about.get("name") != package:
        raise DataError(f"{folder} holds the npm package {about.get('name')}; expected {package}")
    size = icons.get("width", 16), icons.get("height", 16)
    return IconSet(package, about["version"], about["license"], icons["icons"], *size)


def rasterize(svg: str, side: int) -> np.ndarray:
    """Render an SVG with resvg, crop it to what is drawn, and fit it centred into a square.

    Returns:
        Premultiplied RGBA, float32 in [0, 1], `[side, side, 4]`.

    Raises:
        DataError: resvg_py is not installed.
        ValueError: the SVG does not render, or draws nothing.
    """
    try:
        import resvg_py
    except ImportError:
        raise DataError("resvg_py is missing, which renders SVG: pip install resvg_py") from None
    fine = 4 * side
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=fine, height=fine))))
    image = image.convert("RGBA")
    if (box := image.getbbox()) is None:
        raise ValueError("it draws nothing")
    pixels = np.asarray(image.crop(box), dtype=np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    height, width = (max(1, round(extent * side / max(pixels.shape[:2]))) for extent in pixels.shape[:2])
    small = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BOX))
        for plane in np.moveaxis(pixels, -1, 0)
    ]
    result = np.zeros((side, side, 4), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    result[top : top + height, left : left + width] = np.stack(small, -1)
    return result


def render_icons(sets: dict[str, IconSet]) -> np.ndarray:
    """Render every subject in every style; returns premultiplied RGBA, uint8 `[subjects, styles, 144, 144, 4]`.

    Raises:
        DataError: icons are missing or do not render; all of them are named.
    """
    icons, failed = np.zeros((len(SUBJECTS), len(STYLES), SIDE, SIDE, 4), dtype=np.uint8), []
    for row, subject in enumerate(SUBJECTS):
        name = ICON_NAMES.get(subject, subject.replace(" ", "-"))
        for column, style in enumerate(STYLES):
            if name not in sets[style].icons:
                failed.append(f"{sets[style].package} has no icon {name}")
                continue
            try:
                pixels = rasterize(sets[style].svg(name, 4 * SIDE), SIDE)
            except ValueError as error:  # resvg_py's errors are ValueErrors
                failed.append(f"{name} of {sets[style].package} does not render: {error}")
                continue
            icons[row, column] = (pixels * 255).round()
    if failed:
        raise DataError(
            f"{len(failed)} of {len(SUBJECTS) * len(STYLES)} icons failed: {'; '.join(failed)}. The subjects of "
            "emoji-janus need all of them: take the versions of the packages that its model card names"
        )
    return icons


def to_cells(icons: np.ndarray) -> torch.Tensor:
    """Cells of the icons and of their mirror images, float32 `[subjects, styles, 2, 18, 18, 4, 4, 4]`."""
    pixels = torch.from_numpy(icons).float() / 255
    step = SIDE // (ICON_SIDE * CELL)
    pixels = pixels.unflatten(3, (-1, step)).unflatten(2, (-1, step)).mean((3, 5))  # [subjects, styles, 72, 72, 4]
    pixels = torch.stack([pixels, pixels.flip(3)], 2)
    return pixels.unflatten(4, (-1, CELL)).unflatten(3, (-1, CELL)).transpose(4, 5)


def nearest(points: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code of every point."""
    return torch.cat([torch.cdist(part, codes).argmin(1) for part in points.split(16384)])


def fit_codes(points: torch.Tensor, num_codes: int, seed: int = 0, rounds: int = 25) -> torch.Tensor:
    """A k-means codebook of `points` `[points, values]`, started by k-means++ on 20,000 of them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [points[torch.randint(len(points), (1,), generator=generator)]]
    sample = points[torch.randperm(len(points), generator=generator)[:20000]]
    distance = (sample - chosen[0]).square().sum(1)
    while len(chosen) < num_codes:
        chosen.append(sample[torch.multinomial(distance, 1, generator=generator)])
        distance = torch.minimum(distance, (sample - chosen[-1]).square().sum(1))
    codes = torch.cat(chosen)
    for _ in range(rounds):
        members = nearest(points, codes)
        counts = torch.bincount(members, minlength=num_codes)[:, None]
        means = torch.zeros_like(codes).index_add_(0, members, points) / counts.clamp(min=1)
        codes = torch.where(counts > 0, means, codes)
    return codes


def tokenize(cells: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Tokens of cells, `[subjects, styles, 2, 18, 18]`; a cell that is nearer to clear than to any code is clear."""
    points = cells.flatten(5).flatten(0, 4)
    members = nearest(points, torch.cat([torch.zeros_like(codes[:1]), codes]))
    members[points[:, 3::4].amax(1) < MIN_ALPHA] = 0
    return torch.where(members == 0, CLEAR, members - 1 + len(BACKGROUNDS)).view(cells.shape[:5])


def contact_sheet(icons: np.ndarray) -> Image.Image:
    """Premultiplied RGBA icons `[icons, side, side, 4]` in [0, 1] on blue, 20 a row."""
    columns, side = 20, icons.shape[1]
    rows = -(-len(icons) // columns)
    blue = np.array(BACKGROUNDS["blue"], dtype=np.float32) / 255
    pixels = np.concatenate([icons, np.zeros((rows * columns - len(icons), side, side, 4), dtype=np.float32)])
    pixels = pixels[..., :3] + blue * (1 - pixels[..., 3:])
    pixels = pixels.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def write(path: Path, save) -> None:
    """Write through a temporary name of the same suffix; an interrupted run leaves no part of a file."""
    temporary = path.with_name(f".part-{path.name}")
    save(temporary)
    os.replace(temporary, path)


def main(
    noto: Path, fluent: Path, output: Path = Path("emoji-data"), num_codes: int = NUM_CODES, seed: int = 0
) -> None:
    """Render the icons of NOTO and FLUENT, fit the codebook, and write the data set to OUTPUT."""
    sets = {style: read_icon_set(folder, PACKAGES[style]) for style, folder in (("noto", noto), ("fluent", fluent))}
    icons = render_icons(sets)
    cells = to_cells(icons)
    points = cells.flatten(5).flatten(0, 4)
    points = points[points[:, 3::4].amax(1) >= MIN_ALPHA]
    codes = fit_codes(points, num_codes, seed)
    grids = tokenize(cells, codes)
    error = (codes[nearest(points, codes)] - points).square().mean()
    used = len(grids[grids != CLEAR].unique()) / num_codes

    output.mkdir(parents=True, exist_ok=True)
    stored = (codes.clamp(0, 1) * 255).round().to(torch.uint8).view(-1, CELL, CELL, 4).numpy()
    arrays = {"codes": stored, "grids": grids.numpy().astype(np.int16)}
    write(output / "icons.npz", lambda path: np.savez_compressed(path, **arrays))
    write(output / "icons_144.npy", lambda path: np.save(path, icons))
    shown = icons.reshape(-1, SIDE, SIDE, 4).astype(np.float32) / 255
    write(output / "icons.png", lambda path: contact_sheet(shown[:, ::2, ::2]).save(path))
    table = torch.cat([torch.zeros_like(codes[:1]), codes]).view(-1, CELL, CELL, 4)
    plain = torch.where(grids == CLEAR, 0, grids - len(BACKGROUNDS) + 1)[:, :, 0].flatten(0, 1)
    decoded = table[plain].transpose(2, 3).reshape(len(plain), ICON_SIDE * CELL, ICON_SIDE * CELL, 4).numpy()
    write(output / "tokens.png", lambda path: contact_sheet(decoded).save(path))
    sources = [f"- {each.package} {each.version}: {each.licence}, {len(SUBJECTS)} icons" for each in sets.values()]
    text = "Icons of emoji-janus, rendered and reduced to a codebook of cells:\n\n" + "\n".join(sources) + "\n"
    write(output / "SOURCES.md", lambda path: path.write_text(text, "utf-8"))
    typer.echo(
        f"wrote {output}: {len(shown)} icons, {num_codes} codes, {used:.0%} in use, PSNR of cells "
        f"{-10 * error.log10().item():.1f} dB"
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
