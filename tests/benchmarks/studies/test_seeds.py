from boostdiff.benchmarks.stats import Estimate
from boostdiff.benchmarks.studies.seeds import over_seeds


def test_one_seed_has_no_error() -> None:
    assert over_seeds([158.4], "{:.1f}") == "158.4"


def test_the_error_is_of_the_mean() -> None:
    assert over_seeds([1.0, 2.0, 3.0], "{:+.2f}") == "+2.00 ± 0.58"
    estimates = [Estimate(value=value, low=0, high=2, coverage=0.95) for value in (0.9, 1.1)]
    assert over_seeds(estimates, "{:.0%}") == "100% ± 10%"


def test_a_missing_share_leaves_no_mean() -> None:
    assert over_seeds([1.0, None], "{:.0%}") == "–"
