from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.quality.distances import frechet_distance, kernel_distance, paired_feature_distance
from boostdiff.benchmarks.quality.features import NUM_FEATURES, EfficientNetLite0Features, features_of
from boostdiff.benchmarks.quality.reference import Reference, reference_from_folder, reference_of
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from PIL import Image


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Two correlated clouds that differ in mean and spread; D must be what the network gives."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(NUM_FEATURES, NUM_FEATURES, generator=generator) / NUM_FEATURES**0.5
    real = torch.randn(1500, NUM_FEATURES, generator=generator) @ mix
    return real, 1.3 * torch.randn(1400, NUM_FEATURES, generator=generator) @ mix + 0.1


def test_kernel_distance_tells_clouds_apart(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    reference = Reference.of(features[0], features[0][:700])
    same, spread = kernel_distance(reference, features[0][700:1400])
    other, _ = kernel_distance(reference, features[1])
    assert spread is not None
    assert abs(same) < spread
    assert other > same + spread
    assert kernel_distance(reference, features[1]) == kernel_distance(reference, features[1])
    # Every subset of 200 holds all of 200 images.
    assert kernel_distance(reference, features[1][:200])[1] is None


def test_a_reference_survives_the_disk(features: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    reference = Reference.of(*features)
    reference.save(tmp_path / "r.safetensors")
    loaded = Reference.load(tmp_path / "r.safetensors")
    torch.testing.assert_close(loaded.covariance, reference.covariance, rtol=1e-5, atol=1e-6)
    assert torch.equal(loaded.covariance, loaded.covariance.T)
    assert loaded.count == 1500
    (tmp_path / "r.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="can't read the reference"):
        Reference.load(tmp_path / "r.safetensors")


def test_the_shipped_reference_describes_real_images() -> None:
    reference = Reference.load(embedded.REFERENCE)
    assert reference.count > 9000
    assert reference.features.shape == (1000, NUM_FEATURES)
    floor = frechet_distance(reference, reference.features)
    shifted = frechet_distance(reference, reference.features + 0.1)
    assert floor < shifted
    assert floor < 0.5 * frechet_distance(reference, torch.zeros(50, NUM_FEATURES))


def test_features_see_images() -> None:
    network = EfficientNetLite0Features()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features = features_of(network, images, batch_size=2)
    assert features.shape == (3, NUM_FEATURES)
    assert paired_feature_distance(features, features) < 1e-6
    assert paired_feature_distance(features, features.roll(1, 0)) > 1e-3


def test_images_are_kept_apart_throughout_a_folder(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        """The gray of an image as its only feature."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(1, 2, 3)).detach()[:, None]

    for i in range(45):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    reference = reference_from_folder(tmp_path, Mean())
    assert reference.features.flatten().tolist() == [9, 19, 29, 39]
    assert reference.count == 41
    assert not reference.notes


def test_what_a_reference_folder_holds_besides_is_said(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (16, 16), (i * 12, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("of images")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.GIF", save_all=True, append_images=frames[1:])
    animated, other = reference_from_folder(tmp_path, EfficientNetLite0Features()).notes
    assert animated.startswith("1 reference images with several frames")
    assert other.startswith("1 files in")


def test_a_reference_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't read the reference"):
        reference_of(tmp_path / "missing", torch.nn.Identity())
    for i in range(19):
        Image.new("RGB", (16, 16), (i * 12, 0, 0)).save(tmp_path / f"{i}.png")
    network = EfficientNetLite0Features()
    with pytest.raises(InputError, match="holds 19 images"):
        reference_from_folder(tmp_path, network)
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    assert reference_from_folder(tmp_path, network).count == 18
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(InputError, match="can't decode the reference image"):
        reference_from_folder(tmp_path, network)
