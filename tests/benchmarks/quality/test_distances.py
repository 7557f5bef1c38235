import numpy as np
import pytest
import torch
from boostdiff.benchmarks.quality.distances import left_out_distances, precision_recall
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
    found = left_out_distances(reference, fake, groups=5)
    kept = [fake[torch.arange(count) % 5 != group].numpy() for group in range(5)]
    # scipy's root of a singular product is itself good to some 1e-6 only.
    assert found == pytest.approx(
        [scipys_distance(real.numpy(), part) for part in kept], rel=1e-6 if count > 50 else 1e-4
    )
    with pytest.raises(ValueError, match="at least four"):
        left_out_distances(reference, fake[:3])


def test_the_interval_of_a_distance_is_as_wide_as_its_scatter() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = Reference.of(torch.randn(5000, 8, generator=generator), torch.zeros(4, 8))
    errors, values = [], []
    for _ in range(60):
        fake = torch.randn(200, 8, generator=generator) * 1.1 + 0.2
        left_out = left_out_distances(reference, fake)
        values.append(np.mean(left_out))
        interval = jackknifed(values[-1], left_out)
        errors.append((interval.high - interval.low) / 2 / 2.093)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_precision_and_recall_see_a_lost_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randn(200, 4, generator=generator) + 20 * sign for sign in (-1, 1))
    real = torch.stack([low, high], dim=1).flatten(0, 1)
    precision, recall = precision_recall(real, torch.randn(400, 4, generator=generator) - 20)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real[:3]) is None


def test_precision_and_recall_equal_a_direct_count() -> None:
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(30, 3, generator=generator, dtype=torch.float64) + shift for shift in (0, 1))

    def inside(point: torch.Tensor, cloud: torch.Tensor) -> bool:
        radii = [sorted((cloud - one).norm(dim=1).tolist())[3] for one in cloud]
        return any((point - one).norm() <= radius for one, radius in zip(cloud, radii, strict=True))

    expected = (np.mean([inside(f, real) for f in fake]), np.mean([inside(r, fake) for r in real]))
    assert precision_recall(real, fake) == pytest.approx(expected)
