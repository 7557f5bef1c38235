import numpy as np
import pytest
import torch
from boostdiff.benchmarks.quality.distances import Distance
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.stats import jackknifed
from scipy.linalg import sqrtm


def scipys_distance(real: np.ndarray, fake: np.ndarray) -> float:
    c_real, c_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = sqrtm(c_real @ c_fake).real
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(c_real + c_fake - 2 * root)


@pytest.mark.parametrize("count", [30, 400], ids=["fewer images than features", "more"])
def test_distances_without_a_group_equal_scipys(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    real = torch.randn(600, 50, generator=generator, dtype=torch.float64) @ mix
    fake = torch.randn(count, 50, generator=generator, dtype=torch.float64) @ mix * 1.2 + 0.3
    reference = Reference.of(real, real[:10])
    found = Distance.of(reference, fake)
    groups = min(20, count // 2)
    kept = [fake[torch.arange(count) % groups != group].numpy() for group in range(groups)]
    # scipy's root of a singular product is itself good to some 1e-6 only.
    assert found.replicates == pytest.approx(
        [scipys_distance(real.numpy(), part) for part in kept], rel=1e-6 if count > 50 else 1e-4
    )
    assert Distance.of(reference, fake[:3]).interval is None


def test_the_interval_of_a_distance_is_as_wide_as_its_scatter() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = Reference.of(torch.randn(5000, 8, generator=generator), torch.zeros(4, 8))
    errors, values = [], []
    for _ in range(60):
        fake = torch.randn(200, 8, generator=generator) * 1.1 + 0.2
        replicates = Distance.of(reference, fake).replicates
        values.append(np.mean(replicates))
        interval = jackknifed(values[-1], replicates)
        errors.append((interval.high - interval.low) / 2 / 2.093)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)
