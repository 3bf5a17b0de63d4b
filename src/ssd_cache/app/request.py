"""What a visitor asks for, checked before anything is generated.

The checks are those of the library, plus the limits of the demo. Warnings become notes that the page shows as text.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from ssd_cache.app.limits import Limits
from ssd_cache.app.models import DemoModel
from ssd_cache.cache.cache import SSDCache
from ssd_cache.io.showing import first_line, shown
from ssd_cache.models.settings import check_texts


@dataclass(frozen=True)
class Request:
    """Checked settings of a run, and notes for the visitor."""

    model: DemoModel
    prompt: str
    policy: str
    budget: float
    seed: int
    notes: tuple[str, ...]

    def make_cache(self) -> SSDCache:
        """A fresh cache of the policy."""
        return self.model.make_cache(self.policy, self.budget)


def check_request(
    model: DemoModel, limits: Limits, *, prompt: object, policy: object, budget: object, seed: object
) -> Request:
    """Check the settings of a visitor, which may be of any type and value.

    Args:
        model: the chosen model.
        limits: the limits of the demo.
        prompt: the text of both images.
        policy: one of `model.policies`.
        budget: fraction of the grid's visual tokens that a head may hold.
        seed: seed of both images.

    Raises:
        ValueError: a setting is out of range, or the model cannot generate the prompt.
    """
    generator = model.generator
    text = limits.check_prompt(prompt)
    check_texts([text])
    if isinstance(seed, float) and seed.is_integer():  # a number from a browser
        seed = int(seed)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed={shown(seed)} is out of range: give a whole number from 0 up")
    generator.sampling(seed=seed)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.make_cache(policy, budget)  # takes no memory yet
        generator.prepare([text])  # refuses or warns of words that the model does not know
    notes = dict.fromkeys(first_line(warning.message) for warning in found if isinstance(warning.message, Warning))
    return Request(model, text, str(policy), float(budget), seed, tuple(notes))  # type: ignore[arg-type]
