"""Images of the demo: rows to come in grey, and the tokens that the heads hold over the image.

Drawn with Pillow alone. The positions are those of `analysis/retention.py`, and the plot of labels is that of
`head_map/card.py`.
"""

from __future__ import annotations

import torch
from PIL import Image

from ssd_cache.analysis.retention import Retention

HEADS = ("all heads", "spatial heads", "semantic heads")
"""Which heads a map of held tokens is of, in the order of `held_shares`."""

TO_COME = (207, 207, 207)
"""Colour of rows that are not generated yet."""

DARKEST = 0.12
"""Brightness of a part of the image whose token no head holds."""


def hide_rows(image: Image.Image, share: float) -> Image.Image:
    """The image with its lower part in grey; `share` of its height stays."""
    shown = round(share * image.height)
    image.paste(TO_COME, (0, shown, image.width, image.height))
    return image


def held_shares(retention: Retention) -> torch.Tensor:
    """Shares of heads that hold each visual token, `[all heads, spatial heads, semantic heads; cells]`.

    A kind without heads has zeros.
    """
    held, is_spatial = retention.held.half(), retention.is_spatial
    of_kinds = held.flatten(0, 1), held[is_spatial], held[~is_spatial]
    return torch.stack([each.mean(0) if len(each) else held.new_zeros(held.shape[-1]) for each in of_kinds])


def draw_held(image: Image.Image, grid: tuple[int, int], shares: torch.Tensor) -> Image.Image:
    """The image, as bright in each place as the share of the heads that hold the token of that place.

    Args:
        image: the generated image.
        grid: rows and columns of visual tokens. Columns without pixels, such as Emu3's ends of lines, are left out.
        shares: `[cells]`, from 0 to 1.
    """
    rows, columns = grid
    columns = min(columns, round(image.width / image.height * rows))
    brightness = DARKEST + (1 - DARKEST) * shares.float().view(grid)[:, :columns]
    mask = Image.fromarray((255 * brightness).byte().numpy()).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), mask)
