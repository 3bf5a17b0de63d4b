"""Means of results over prompts, their standard errors, and a paired bootstrap for differences.

All samples of a prompt stay together, since they are not independent. The bootstrap is Efron's, with percentile
intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000

MIN_PAIRS = 6
"""Minimum number of pairs for a two-sided test at 5%: by chance, all n agree with probability 2^(1-n)."""

TOO_FEW = f"- where there are fewer than {MIN_PAIRS} prompts, or one in a kind: too few to tell"
"""Explanation in tables of a missing interval and p."""

Results = Mapping[str, Mapping[Any, float]]
"""Stratum (a kind or tag) -> prompt -> result, the mean over the prompt's samples. Strata have equal weight."""


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of prompts, its 95% interval, and p, two-sided; NaN where it is unknown."""

    difference: float
    low: float
    high: float
    p: float
    num_prompts: int

    def cells(self, digits: int) -> tuple[str, str, str]:
        """Difference, interval and p for a table; "-" where there are too few pairs."""
        interval = "-" if math.isnan(self.low) else f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"
        return cell(self.difference, digits, signed=True), interval, cell(self.p, 4)


def mean(results: Results) -> float:
    """Mean over strata of the mean over their prompts; NaN if a stratum is empty."""
    means = [float(np.mean(list(prompts.values()))) if prompts else math.nan for prompts in results.values()]
    return sum(means) / len(means)


def standard_error(results: Results) -> float:
    """Standard error of `mean`, as by a bootstrap over prompts with many resamples; NaN if a stratum has one prompt.

    With n prompts it is sqrt((n - 1) / n) of the usual estimate.

        >>> standard_error({"a": {0: 1.0, 1: 1.0}, "b": {2: 1.0, 3: 0.0}})
        0.1767766952966369
    """
    values = [list(prompts.values()) for prompts in results.values()]
    variance = sum(float(np.var(part)) / len(part) if len(part) > 1 else math.nan for part in values)
    return math.sqrt(variance) / len(values)


def compare(first: Results, second: Results) -> Difference:
    """`first` minus `second`, by paired bootstrap over the prompts that both have, within each stratum.

    p is twice the smaller share of resamples on the other side of zero, at most 1. It is at least 2^(1-k) if k pairs
    differ, the smallest p that any paired test can give. Interval and p are NaN if there are fewer than `MIN_PAIRS`
    prompts, or one in a stratum. All are NaN if a stratum has no prompt or a result is not finite.

    Example: six prompts of one kind, and `first` better at all of them; p is 2^-5.

        >>> compare({"a": dict.fromkeys(range(6), 1.0)}, {"a": dict.fromkeys(range(6), 0.0)})
        Difference(difference=1.0, low=1.0, high=1.0, p=0.03125, num_prompts=6)
    """
    strata = [
        [result - second[stratum][prompt] for prompt, result in prompts.items() if prompt in second.get(stratum, {})]
        for stratum, prompts in first.items()
    ]
    sizes, nan = [len(pairs) for pairs in strata], math.nan
    if not all(sizes) or not all(np.isfinite(pairs).all() for pairs in strata):
        return Difference(nan, nan, nan, nan, sum(sizes))
    difference = sum(float(np.mean(pairs)) for pairs in strata) / len(strata)
    if min(sizes) < 2 or sum(sizes) < MIN_PAIRS:
        return Difference(difference, nan, nan, nan, sum(sizes))
    resampled = _resample(strata)
    low, high = np.quantile(resampled, [0.025, 0.975])
    tiny = 1e-12  # rounding error of sums that are exactly zero
    below, above = int((resampled <= tiny).sum()), int((resampled >= -tiny).sum())
    num_unequal = sum(abs(pair) > tiny for pairs in strata for pair in pairs)
    p = min(1.0, max(2 * (min(below, above) + 1) / (NUM_RESAMPLES + 1), 2.0 ** (1 - num_unequal)))
    return Difference(difference, float(low), float(high), p, sum(sizes))


def _resample(strata: list[list[float]]) -> np.ndarray:
    """Stratified mean of every resample, `[resamples]`: prompts are resampled within each stratum.

    Prompts have few distinct values, so the code samples how often each value occurs. The distribution is the same as
    if prompts were sampled one by one.
    """
    rng = np.random.default_rng(0)
    resampled = np.zeros(NUM_RESAMPLES)
    for pairs in strata:
        values, counts = np.unique(pairs, return_counts=True)
        times = rng.multinomial(len(pairs), counts / len(pairs), size=NUM_RESAMPLES)  # [resamples, values]
        resampled += times @ values / len(pairs) / len(strata)
    return resampled


def cell(value: float, digits: int, *, signed: bool = False) -> str:
    """A number for a table; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:{'+' if signed else ''}.{digits}f}"


def to_json(value: Any) -> Any:
    """Dataclasses as objects, and NaN, which JSON does not have, as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: to_json(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
