from boostdiff.benchmarks.quality.distances import Distance
from boostdiff.benchmarks.studies.seeds import over_seeds, recovered


def test_one_seed_has_no_error() -> None:
    assert over_seeds([158.4], ".1f") == "158.4"


def test_the_error_is_of_the_mean() -> None:
    assert over_seeds([1.0, 2.0, 3.0], ".2f") == "2.00 ± 0.58"
    assert over_seeds([0.9, 1.1], ".0%") == "100% ± 10%"


def test_a_share_needs_a_gain_beyond_noise() -> None:
    def shown(*gains: float) -> str:
        students = [Distance(value=value, left_out=(value,) * 3) for value in (151.0, 149.0)]
        guided = Distance(value=150.0, left_out=(150.0,) * 3)
        unguided = Distance(value=160.0, left_out=tuple(150.0 + gain for gain in gains))
        return recovered(students, guided=guided, unguided=unguided)

    assert shown(10.0, 10.2, 9.8) == "100% ± 10%"
    assert shown(10.0, 18.0, 2.0) == "–"
    assert shown(1.0, -0.1, 1.0) == "–"
