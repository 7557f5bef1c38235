"""Medians and their intervals: what every figure of a report carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import binom, t

CONFIDENCE = 0.95

GROUPS = 20
"""Groups of the jackknife: as many figures are computed again for an interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its interval.

    Attributes:
        coverage: probability that the interval holds the true value: 0.95 or a little more; less after too few
            measurements.
    """

    value: float
    low: float
    high: float
    coverage: float

    def __format__(self, spec: str) -> str:
        """The value with its interval, "1.8x [1.7, 1.9]" by the spec ".1fx"; the unit may be left out."""
        value, low, high = (format(each, spec.rstrip("x")) for each in (self.value, self.low, self.high))
        return f"{value}{'x' * spec.endswith('x')} [{low}, {high}]"

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def median_of(values: Sequence[float]) -> Estimate:
    """The median of repeated measurements, with its distribution-free interval (Conover 1999, §3.2).

    The interval lies between the k-th smallest and the k-th largest value, for the largest k whose coverage
    1 − 2 P(Binomial(n, ½) < k) is at least 95%. Below n = 6 there is none, and the range of the values stands in.
    """
    if not len(values):
        raise ValueError("no measurements")
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    k = max(1, int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)))
    return Estimate(
        value=float(np.median(ordered)),
        low=float(ordered[k - 1]),
        high=float(ordered[n - k]),
        coverage=float(1 - 2 * binom.cdf(k - 1, n, 0.5)),
    )


def jackknifed(value: float, replicates: Sequence[float]) -> Estimate:
    """A statistic with its delete-a-group jackknife interval (Efron & Tibshirani 1993, §11.5).

    The variance is (g − 1) / g · Σ (θ_j − θ̄)² over g groups, the interval Student's with g − 1 degrees of freedom.
    All θ_j come from samples of one size, so a bias that depends on the size alone cancels: the reason to prefer it
    to the bootstrap for Fréchet distances, which repeated samples push up.
    """
    groups = len(replicates)
    error = float(np.sqrt((groups - 1) * np.var(replicates)))
    half = float(t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * error
    return Estimate(value=value, low=value - half, high=value + half, coverage=CONFIDENCE)


def leave_one_group_out(count: int) -> list[np.ndarray]:
    """Masks `(count,)` without each group in turn, item i being in group i mod `GROUPS`; none of fewer than 4 items."""
    groups = min(GROUPS, count // 2)
    return [np.arange(count) % groups != group for group in range(groups)] if groups > 1 else []


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A figure of a row of images, comparable with other rows' on the same prompts.

    Attributes:
        value: of all images.
        replicates: the jackknife's, without each group of prompts in turn; empty with too few images for an interval.
    """

    value: float
    replicates: tuple[float, ...] = ()

    better: ClassVar[int] = -1
    """Sign of an improvement: -1 where lower is better."""

    @property
    def interval(self) -> Estimate | None:
        """Over prompts and noise."""
        return jackknifed(self.value, self.replicates) if self.replicates else None

    def delta_to(self, other: Statistic | None) -> Estimate | None:
        """This less another, with the interval of the paired difference; None for itself, or without intervals."""
        if other is None or other is self or not self.replicates:
            return None
        return jackknifed(
            self.value - other.value, [a - b for a, b in zip(self.replicates, other.replicates, strict=True)]
        )

    def gain_recovered(self, *, guided: Statistic, unguided: Statistic) -> Estimate | None:
        """The share of the guidance gain recovered: (this − unguided) / (guided − unguided).

        None where the gain of guidance is not beyond noise: a ratio to it means nothing then.
        """
        gains = [self.better * (g - u) for g, u in zip(guided.replicates, unguided.replicates, strict=True)]
        if not gains or min(gains) <= 0 or jackknifed(sum(gains) / len(gains), gains).low <= 0:
            return None
        shares = [
            self.better * (x - u) / gain for x, u, gain in zip(self.replicates, unguided.replicates, gains, strict=True)
        ]
        return jackknifed((self.value - unguided.value) / (guided.value - unguided.value), shares)


class Score(Statistic):
    """A mean over images; higher is better."""

    better = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Of one value per image."""
        x = np.asarray(values, dtype=np.float64)
        return cls(
            value=float(x.mean()), replicates=tuple(float(x[mask].mean()) for mask in leave_one_group_out(len(x)))
        )


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of repeated measurements of a time, in seconds."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """From the measurements themselves."""
        p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
        return cls(median=median, p10=p10, p90=p90, runs=len(values))
