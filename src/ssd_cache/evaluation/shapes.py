"""The exact benchmark: shapes-janus draws captions of six kinds, the judge reads the pictures back.

Scored as GenEval is: the share of correct pictures of each kind, and the mean of the six kinds. It draws and counts;
what counts as correct is `ssd_cache.shapes.judge`'s decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import Cache

from ssd_cache.models import Generator
from ssd_cache.shapes import KINDS, judge


@dataclass(frozen=True)
class ShapesScore:
    """Verdicts of one policy, `correct[kind]` a list of one bool a picture, in the order of the prompts."""

    correct: dict[str, list[bool]]

    def kind(self, kind: str) -> float:
        """Share of correct pictures of one kind."""
        return sum(self.correct[kind]) / len(self.correct[kind])

    @property
    def overall(self) -> float:
        """Mean over the kinds, each of equal weight."""
        return sum(map(self.kind, self.correct)) / len(self.correct)

    @property
    def standard_error(self) -> float:
        """Of `overall`, for independent pictures: the root of the summed binomial variances, over the kinds."""
        variances = [self.kind(kind) * (1 - self.kind(kind)) / len(verdicts) for kind, verdicts in self.correct.items()]
        return math.sqrt(sum(variances)) / len(variances)


def score_shapes(
    generator: Generator,
    prompts: Sequence[tuple[str, str]],
    make_cache: Callable[[], Cache],
    *,
    batch_size: int = 50,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    on_tokens: Callable[[int], object] | None = None,
) -> ShapesScore:
    """Draw every prompt once and judge it.

    Args:
        generator: shapes-janus, or a model that draws the same world.
        prompts: (kind, caption), as `ssd_cache.shapes.make_prompts` makes them.
        make_cache: called for a fresh cache for every batch.
        batch_size: pictures drawn at once. Batch `i` is drawn with `seed + i`, so the same prompts, batch size and
            seed give every policy the same draws of chance.
        guidance_scale, temperature: the checkpoint's own when not given.
        on_tokens: called with the number of visual tokens drawn at each step.
    """
    correct: dict[str, list[bool]] = {kind: [] for kind in KINDS if any(kind == other for other, _ in prompts)}
    for batch, start in enumerate(range(0, len(prompts), batch_size)):
        part = prompts[start : start + batch_size]
        tokens = generator.generate(
            [caption for _, caption in part],
            make_cache(),
            guidance_scale=guidance_scale,
            temperature=temperature,
            seed=seed + batch,
            on_tokens=on_tokens,
        )
        for (kind, caption), picture in zip(part, tokens.cpu().numpy(), strict=True):
            correct[kind].append(judge(picture, caption).correct)
    return ShapesScore(correct)
