from boostdiff.benchmarks.studies.seeds import over_seeds, recovered


def test_one_seed_has_no_error() -> None:
    assert over_seeds([158.4], ".1f") == "158.4"


def test_the_error_is_of_the_mean() -> None:
    assert over_seeds([1.0, 2.0, 3.0], ".2f") == "2.00 ± 0.58"
    assert over_seeds([0.9, 1.1], ".0%") == "100% ± 10%"


def test_a_share_needs_a_gain_beyond_noise() -> None:
    share = {"guided": 150.0, "unguided": 160.0}
    assert recovered([151.0, 149.0], gains=[10.0, 10.2, 9.8], **share) == "100% ± 10%"
    assert recovered([151.0, 149.0], gains=[10.0, 18.0, 2.0], **share) == "–"
    assert recovered([151.0, 149.0], gains=[1.0, -0.1, 1.0], **share) == "–"
