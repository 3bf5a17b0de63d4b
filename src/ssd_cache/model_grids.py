"""The grids of a model's images, by the `model_type` of its configuration.

This module imports nothing from transformers' model files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ssd_cache.layout import Grid, ImageLayout


@dataclass(frozen=True)
class ModelGrid:
    """Grids of one family.

    Attributes:
        grid_of: rows and columns of an image, from the configuration; for a resizable family those of its usual size.
        is_resizable: whether the caller chooses the size of an image.
        draft_grid_of: the draft grid that is generated before an image of this grid; None for families without one.
    """

    grid_of: Callable[[Any], Grid]
    is_resizable: bool = False
    draft_grid_of: Callable[[Grid], Grid] | None = None

    def layout(self, config, grid: Grid | None = None) -> ImageLayout:
        """Layout of an image of the usual size, or of a size that the caller chose."""
        layout = ImageLayout(self.grid_of(config) if grid is None else grid)
        return layout if self.draft_grid_of is None else replace(layout, draft_grids=(self.draft_grid_of(layout.grid),))


def _janus_grid(config) -> Grid:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def _glm_draft_grid(grid: Grid) -> Grid:
    """One draft grid of about 16 x 16 cells in the image's proportions, as the processor computes it."""
    ratio = grid[0] / grid[1]
    return int(math.sqrt(ratio) * 16), int(math.sqrt(1 / ratio) * 16)


GRIDS: Mapping[str, ModelGrid] = MappingProxyType(
    {
        # 90 rows of 90 visual tokens and an end-of-line token, for 720 x 720 pixels
        "emu3": ModelGrid(lambda config: (90, 91), is_resizable=True),
        # for the processor's own 1152 x 768 pixels
        "glm_image": ModelGrid(lambda config: (36, 24), is_resizable=True, draft_grid_of=_glm_draft_grid),
        "janus": ModelGrid(_janus_grid),
        # 384 pixels in patches of 16; the package's configuration does not contain these numbers
        "multi_modality": ModelGrid(lambda config: (24, 24)),
    }
)


def layout_of_model(config, grid: Grid | None = None) -> ImageLayout:
    """Layout of a model's images, from its configuration and the grid that the caller chose.

    Raises:
        ValueError: no grid was given, and the family is unknown or has several image sizes.
    """
    facts = GRIDS.get(getattr(config, "model_type", ""))
    if facts is None:
        if grid is None:
            raise ValueError(
                f"the grid of a model of type {config.model_type!r} is unknown: give grid=(rows, columns) of its "
                "visual tokens"
            )
        return ImageLayout(grid)
    if grid is None and facts.is_resizable:
        raise ValueError(
            f"a model of type {config.model_type!r} generates images of several sizes: give grid=(rows, columns) of "
            f"its visual tokens, such as grid={facts.grid_of(config)}"
        )
    return facts.layout(config, grid)
