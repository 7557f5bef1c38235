"""Medians and their intervals: what every figure of a report carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, t

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: in the unit of whatever is estimated.
        low: lower end of the interval.
        high: upper end.
        coverage: probability that the interval holds the true value: 0.95 or a little more; less where there were
            too few measurements for that.
    """

    value: float
    low: float
    high: float
    coverage: float

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def median_of(values: Sequence[float]) -> Estimate:
    """The median of repeated measurements, with its distribution-free interval (Conover 1999, §3.2).

    The interval lies between the k-th smallest and the k-th largest value, for the largest k whose coverage
    1 − 2 P(Binomial(n, ½) < k) is at least 95%. Below n = 6 there is none, and the range of the values stands in.

    Raises:
        ValueError: there are no values.
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


def jackknifed(value: float, left_out: Sequence[float]) -> Estimate:
    """A statistic with its delete-a-group jackknife interval (Efron & Tibshirani 1993, §11.5).

    The variance is (g − 1) / g · Σ (θ_j − θ̄)² over g groups, the interval Student's with g − 1 degrees of freedom.
    All θ_j come from samples of one size, so a bias that depends on the size alone cancels: the reason to prefer it
    to the bootstrap for Fréchet distances, which repeated samples push up.

    Args:
        value: of the whole sample.
        left_out: the statistic without each group in turn, at least two.

    Raises:
        ValueError: there are fewer than two groups.
    """
    groups = len(left_out)
    if groups < 2:
        raise ValueError("a jackknife needs at least two groups")
    error = float(np.sqrt((groups - 1) * np.var(left_out)))
    half = float(t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * error
    return Estimate(value=value, low=value - half, high=value + half, coverage=CONFIDENCE)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements of a time.

    Attributes:
        median: seconds, as are `p10`, `p90` and `p99`.
        p10: see `median`.
        p90: see `median`.
        p99: see `median`; close to the largest value where there are fewer than 100.
        runs: how many there were.
    """

    median: float
    p10: float
    p90: float
    p99: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From the measurements themselves."""
        p10, median, p90, p99 = np.percentile(values, [10, 50, 90, 99]).tolist()
        return cls(median=median, p10=p10, p90=p90, p99=p99, runs=len(values))
