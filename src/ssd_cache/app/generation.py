"""Two images of one prompt and seed, generated in turn row by row: with a full cache and with a policy's cache.

After every row there is a `Frame`: the image so far, the bytes held and the speed. The full cache is transformers'
`DynamicCache`, which is as fast as any other full cache here as long as nothing is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import Cache, DynamicCache

from ssd_cache.analysis.retention import read_retention
from ssd_cache.app.drawing import held_shares, hide_rows
from ssd_cache.app.request import Request
from ssd_cache.app.stepping import PausedGeneration
from ssd_cache.bench.running import held_bytes
from ssd_cache.cache.cache import SSDCache

FULL = "full cache"
"""Name of the image with the full cache; the other image has the name of its policy."""

PREVIEW_RATIO = 2.0
"""Seconds of decoding unfinished images per second of generating. If decoding is slow, several rows appear at once."""


@dataclass(frozen=True)
class Frame:
    """One of the two images after a row.

    Attributes:
        name: `FULL`, or the policy.
        num_tokens: visual tokens generated.
        nbytes: bytes of K and V held.
        tokens_per_second: speed of this row, without decoding the image; None after the prompt and in a partial row.
        image: the image so far, with rows to come in grey; None before the first row.
        held: shares of the heads that hold each token, as `held_shares` returns them; None for the full cache, and
            after the prompt.
    """

    name: str
    num_tokens: int
    nbytes: int
    tokens_per_second: float | None
    image: Image.Image | None
    held: torch.Tensor | None


def generate_side_by_side(request: Request, is_stopped: Callable[[], bool]) -> Iterator[Frame]:
    """Generate both images, and yield a frame of one image after every row, in turn.

    When the iterator ends or is closed, both generations have ended and their caches are released.

    Args:
        request: the checked settings.
        is_stopped: called at every token. Both images end when it returns True.
    """
    with ExitStack() as stack:
        sides = []
        for name, make_cache in ((FULL, DynamicCache), (request.policy, request.make_cache)):
            sides.append(_Side(request, name, make_cache(), is_stopped))
            stack.callback(sides[-1].generation.close)
        while unfinished := [side for side in sides if not side.generation.has_ended]:
            for side in unfinished:
                yield side.next_frame()


class _Side:
    """One of the two images, its newest preview, and the seconds spent on tokens and on previews."""

    def __init__(self, request: Request, name: str, cache: Cache, is_stopped: Callable[[], bool]):
        self.name, self.generator = name, request.model.generator
        self.generation = PausedGeneration(self.generator, request.prompt, cache, request.seed, is_stopped)
        self.seconds = self.preview_seconds = 0.0
        self.image: Image.Image | None = None

    def next_frame(self) -> Frame:
        """Generate the next row."""
        generation, num_before = self.generation, len(self.generation.tokens)
        generation.step()
        self.seconds += generation.seconds
        tokens, cache, columns = generation.tokens, generation.cache, self.generator.checkpoint.grid[1]
        if generation.has_ended or self.preview_seconds <= PREVIEW_RATIO * self.seconds:
            started = time.perf_counter()
            self.image = self._preview(tokens[: len(tokens) // columns * columns])
            self.preview_seconds += time.perf_counter() - started
        is_whole_row = len(tokens) == num_before + columns
        held = None
        if isinstance(cache, SSDCache) and len(tokens) > 0:
            held = held_shares(read_retention(cache, row=generation.row))
        return Frame(
            name=self.name,
            num_tokens=len(tokens),
            nbytes=held_bytes(cache)[0],
            tokens_per_second=columns / generation.seconds if is_whole_row else None,
            image=self.image,
            held=held,
        )

    def _preview(self, tokens: torch.Tensor) -> Image.Image | None:
        """Decode whole rows, `[tokens]`. The newest row, repeated, fills the grid; these rows are hidden."""
        rows, columns = self.generator.checkpoint.grid
        num_rows = len(tokens) // columns
        if num_rows == 0:
            return None
        filled = torch.cat([tokens, tokens[-columns:].repeat(rows - num_rows)])
        return hide_rows(self.generator.to_images(filled[None])[0], num_rows / rows)
