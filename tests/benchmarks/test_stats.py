import numpy as np
import pytest
from boostdiff.benchmarks.stats import Percentiles, Score, Statistic, jackknifed, median_of


def test_percentiles() -> None:
    percentiles = Percentiles.of([float(x) for x in range(11)])
    assert (percentiles.median, percentiles.p10, percentiles.p90, percentiles.runs) == (5, 1, 9, 11)


def test_the_medians_interval_is_the_sign_tests() -> None:
    """Conover 1999, table A3: for n = 9 the 2nd and the 8th of nine, 96.1%."""
    estimate = median_of([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (estimate.value, estimate.low, estimate.high) == (5, 2, 8)
    assert estimate.coverage == pytest.approx(1 - 2 * 10 / 512)
    few = median_of([3.0, 1.0, 2.0])
    assert (few.low, few.high, few.coverage) == (1, 3, 0.75)
    with pytest.raises(ValueError, match="no measurements"):
        median_of([])


def test_the_medians_interval_covers() -> None:
    draws = np.random.default_rng(0).exponential(size=(2000, 15))
    estimates = [median_of(row) for row in draws]
    covered = np.mean([e.low <= np.log(2) <= e.high for e in estimates])
    assert covered == pytest.approx(estimates[0].coverage, abs=0.02)


def test_the_jackknife_of_a_mean_is_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=40)
    replicates = [np.delete(values, i).mean() for i in range(40)]
    estimate = jackknifed(values.mean(), replicates)
    error = values.std(ddof=1) / 40**0.5
    assert estimate.high - estimate.value == pytest.approx(2.0227 * error, rel=1e-4)


@pytest.mark.parametrize("kind", [Statistic, Score])
def test_a_share_of_the_gain_is_given_only_where_guidance_gains(kind: type[Statistic]) -> None:
    def of(*replicates: float) -> Statistic:
        # Lower is better for a distance, higher for a score.
        return kind(value=-kind.better * replicates[0], replicates=tuple(-kind.better * x for x in replicates))

    guided, student = of(10.0, 10.1, 9.9), of(11.0, 11.1, 10.9)
    share = student.gain_recovered(guided=guided, unguided=of(20.0, 20.2, 19.9))
    assert share is not None
    assert share.low < share.value == pytest.approx(0.9)
    assert share.value < share.high < 1
    assert student.gain_recovered(guided=guided, unguided=of(10.5, 9.9, 10.1)) is None
    assert student.gain_recovered(guided=guided, unguided=of(10.1, 25.0, 10.0)) is None
    assert kind(value=1.0).gain_recovered(guided=kind(value=2.0), unguided=kind(value=3.0)) is None


def test_a_score_is_a_mean_with_the_intervals_of_its_groups() -> None:
    values = np.random.default_rng(0).normal(size=200)
    score = Score.of(values)
    assert score.interval is not None
    assert score.value == pytest.approx(values.mean())
    assert score.interval.high - score.value == pytest.approx(2.093 * values.std() / 200**0.5, rel=0.4)
    delta = score.delta_to(Score.of(values - 1))
    assert delta is not None
    assert (delta.low, delta.high) == (pytest.approx(1), pytest.approx(1))
    assert Score.of(values[:3]).interval is None
