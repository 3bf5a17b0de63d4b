"""Shares of correct images, their standard errors, and a paired bootstrap over prompts for differences.

It works on numbers only, without policies or files. All samples of a prompt stay together, since they are not
independent, and every kind has the same weight. The bootstrap is Efron's, with percentile intervals (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000

MIN_PAIRS = 6
"""Minimum number of pairs for a two-sided test at 5%: by chance, all n agree with probability 2^(1-n)."""

Verdicts = Mapping[str, Mapping[int, Mapping[int, bool]]]
"""Kind -> prompt -> seed -> whether the image is correct."""


@dataclass(frozen=True)
class Score:
    """Score of one policy at one budget; a kind without images is NaN, and `overall` is NaN too.

    Attributes:
        kinds: share of correct images of each kind: the mean over prompts of the mean over their samples.
        overall: mean of the kinds.
        standard_error: of `overall`, from the spread between prompts within kinds; NaN if a kind has one prompt.
        num_pictures: number of judged images.
    """

    kinds: dict[str, float]
    overall: float
    standard_error: float
    num_pictures: int


@dataclass(frozen=True)
class Difference:
    """Difference of `overall` between two policies, over the images that both have.

    `low`, `high` and `p` are NaN if there are too few pairs: fewer than `MIN_PAIRS`, or only one in a kind.

    Attributes:
        difference: mean of the differences of the kinds.
        low: lower end of the 95% interval, a percentile of the bootstrap.
        high: its upper end.
        p: two-sided p value: twice the smaller share of resamples on the other side of zero, at most 1. It is at least
            2^(1-k) if k pairs differ, the smallest p that any paired test can give.
        num_pictures: number of image pairs.
    """

    difference: float
    low: float
    high: float
    p: float
    num_pictures: int


def score(verdicts: Verdicts, kinds: Sequence[str]) -> Score:
    """Shares of correct images, with the standard error of their mean.

    Example: two kinds, two prompts each, one sample.

        >>> verdicts = {"a": {0: {0: True}, 1: {0: True}}, "b": {2: {0: True}, 3: {0: False}}}
        >>> score(verdicts, ["a", "b"])
        Score(kinds={'a': 1.0, 'b': 0.5}, overall=0.75, standard_error=0.1767766952966369, num_pictures=4)
    """
    means = {kind: np.array([_mean(samples) for samples in verdicts.get(kind, {}).values()]) for kind in kinds}
    shares = {kind: float(values.mean()) if values.size else math.nan for kind, values in means.items()}
    variance = sum(float(values.var()) / values.size if values.size > 1 else math.nan for values in means.values())
    return Score(
        kinds=shares,
        overall=sum(shares.values()) / len(shares),
        standard_error=math.sqrt(variance) / len(shares),
        num_pictures=sum(len(samples) for prompts in verdicts.values() for samples in prompts.values()),
    )


def compare(
    first: Verdicts, second: Verdicts, kinds: Sequence[str], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """`first` minus `second`, by paired bootstrap: prompts are resampled within each kind, with replacement.

    Images that one of the two lacks are left out.

    Example: six prompts of one kind, and `first` better at all of them; p is 2^-5.

        >>> right, wrong = ({prompt: {0: correct} for prompt in range(6)} for correct in (True, False))
        >>> compare({"a": right}, {"a": wrong}, ["a"])
        Difference(difference=1.0, low=1.0, high=1.0, p=0.03125, num_pictures=6)
    """
    strata: list[list[float]] = []
    num_pictures = 0
    for kind in kinds:
        of_prompts, pairs = _differences(first.get(kind, {}), second.get(kind, {}))
        strata.append(of_prompts)
        num_pictures += pairs
    return bootstrap_difference(strata, num_pictures, num_resamples=num_resamples, seed=seed)


def bootstrap_difference(
    strata: Sequence[Sequence[float]], num_pictures: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Mean, 95% interval and p of the prompts' differences, given as `strata[stratum][prompt]`.

    All are NaN if a stratum is empty or a difference is not finite. Interval and p are NaN if there are too few
    prompts. Strata have equal weight, and so have the prompts of a stratum. `num_pictures` is copied to the result.
    """
    nan, sizes = math.nan, [len(of_prompts) for of_prompts in strata]
    if not all(sizes) or not all(np.isfinite(of_prompts).all() for of_prompts in strata):
        return Difference(nan, nan, nan, nan, num_pictures)
    if min(sizes) < 2 or sum(sizes) < MIN_PAIRS:
        return Difference(stratified_mean(strata), nan, nan, nan, num_pictures)
    resampled = _resample(strata, num_resamples, seed)
    low, high = np.quantile(resampled, [0.025, 0.975])
    tiny = 1e-12  # rounding error of sums that are exactly zero
    below, above = int((resampled <= tiny).sum()), int((resampled >= -tiny).sum())
    num_unequal = sum(int((np.abs(of_prompts) > tiny).sum()) for of_prompts in strata)
    p = min(1.0, max(2 * (min(below, above) + 1) / (num_resamples + 1), 2.0 ** (1 - num_unequal)))
    return Difference(stratified_mean(strata), float(low), float(high), p, num_pictures)


def bootstrap_error(strata: Sequence[Sequence[float]], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> float:
    """Standard error of `stratified_mean`: the standard deviation of the resampled means.

    With n prompts it is sqrt((n - 1) / n) of the usual estimate, as always with the bootstrap. It is NaN if a stratum
    has one prompt, which shows no spread.
    """
    if min(map(len, strata)) < 2:
        return math.nan
    return float(_resample(strata, num_resamples, seed).std())


def stratified_mean(strata: Sequence[Sequence[float]]) -> float:
    """Mean over strata of the mean over their prompts."""
    return sum(float(np.mean(of_prompts)) / len(strata) for of_prompts in strata)


def _resample(strata: Sequence[Sequence[float]], num_resamples: int, seed: int) -> np.ndarray:
    """Stratified mean of every resample, `[resamples]`: prompts are resampled within each stratum.

    Prompts have few distinct values, so the code samples how often each value occurs. The distribution is the same as
    if prompts were sampled one by one.
    """
    rng = np.random.default_rng(seed)
    resampled = np.zeros(num_resamples)
    for of_prompts in strata:
        values, counts = np.unique(of_prompts, return_counts=True)
        number = len(of_prompts)
        drawn = rng.multinomial(number, counts / number, size=num_resamples)  # [resamples, values]
        resampled += drawn @ values / number / len(strata)
    return resampled


def _mean(samples: Mapping[int, bool]) -> float:
    return sum(samples.values()) / len(samples)


def _differences(
    first: Mapping[int, Mapping[int, bool]], second: Mapping[int, Mapping[int, bool]]
) -> tuple[list[float], int]:
    """Difference of each prompt that both have, over the samples that both have; and the number of samples."""
    differences, pairs = [], 0
    for prompt, samples in first.items():
        others = second.get(prompt, {})
        shared = [seed for seed in samples if seed in others]
        if shared:
            differences.append(sum(samples[seed] - others[seed] for seed in shared) / len(shared))
            pairs += len(shared)
    return differences, pairs
