from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.distill.captioned_images import CaptionedImages
from boostdiff.distill.image_files import open_images
from boostdiff.distill.images import pixels_of
from boostdiff.distill.objective import NoiseSchedule
from boostdiff.distill.order import Share, epoch_order
from boostdiff.distill.trajectories import Trajectories
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.model import Model
from boostdiff.engine.predictions import x_from_prediction
from boostdiff.engine.runners import TorchRunner
from PIL import Image
from tiny import CPU, PROMPTS, save_images


@pytest.fixture
def schedule(tiny: Model) -> NoiseSchedule:
    return NoiseSchedule.of(tiny.pipeline.scheduler, CPU)


@torch.no_grad()
def run(source: Trajectories, schedule: NoiseSchedule, updates: range) -> list[torch.Tensor]:
    """Advance a pool by its teacher; the timesteps of each update."""
    teacher = GuidedDenoiser(TorchRunner(source.model.denoiser), 3.0)
    seen = []
    for update in updates:
        batch = source.batch(update)
        prediction = teacher(batch.z_t, batch.t, batch.text)
        source.advance(x_from_prediction(prediction, batch.z_t, *schedule.at(batch.t), "epsilon"))
        seen.append(source.t.clone())
    return seen


def test_trajectories_descend_and_start_again(tiny: Model, schedule: NoiseSchedule) -> None:
    source = Trajectories(tiny, list(PROMPTS), schedule, share=Share(batch_size=6), seed=0, guidance=(3, 3))
    timesteps = torch.stack(run(source, schedule, range(60)))
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert (timesteps[0] >= 749).all()
    falls = timesteps.diff(dim=0) < 0
    assert falls.float().mean() > 0.75
    # 6 members, each refilled after at most 16 steps; the shortest live 4.
    assert 24 <= source.started <= 96
    spread = timesteps.float().flatten().histc(4, 0, 1000) / timesteps.numel()
    assert spread.min() > 0.1


def test_a_trajectory_is_the_teachers_own_sampling(tiny: Model, schedule: NoiseSchedule) -> None:
    """Followed alone with diffusers' arithmetic in float64, a member visits the same latents."""
    source = Trajectories(tiny, list(PROMPTS), schedule, share=Share(batch_size=1), seed=4, guidance=(3, 3))
    source.multistep[:] = False
    teacher = GuidedDenoiser(TorchRunner(tiny.denoiser), 3.0)
    z = source.z_t.double().clone()
    alphas_cumprod = tiny.pipeline.scheduler.alphas_cumprod.double()
    for update in range(6):
        batch = source.batch(update)
        torch.testing.assert_close(batch.z_t.double(), z, atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            noise = teacher(batch.z_t, batch.t, batch.text)
        a = alphas_cumprod[batch.t[0]]
        x = (z - (1 - a).sqrt() * noise.double()) / a.sqrt()
        source.advance(x_from_prediction(noise, batch.z_t, *schedule.at(batch.t), "epsilon"))
        a_next = alphas_cumprod[source.position.round().long()[0]]
        z = a_next.sqrt() * x + (1 - a_next).sqrt() * noise.double()


def test_a_restored_pool_goes_on_identically(tiny: Model, schedule: NoiseSchedule) -> None:
    source = Trajectories(tiny, list(PROMPTS), schedule, share=Share(batch_size=3), seed=0, guidance=(3, 3))
    run(source, schedule, range(15))
    state = {name: tensor.clone() for name, tensor in source.state().items()}
    expected = run(source, schedule, range(15, 40))
    other = Trajectories(tiny, list(PROMPTS), schedule, share=Share(batch_size=3), seed=0, guidance=(3, 3))
    other.restore(state, Counter())
    assert all(map(torch.equal, run(other, schedule, range(15, 40)), expected))
    assert torch.equal(other.z_t, source.z_t)


def test_noise_depends_on_seed_and_number(tiny: Model, schedule: NoiseSchedule, tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    rows = open_images(str(tmp_path / "images"))
    common = {"share": Share(batch_size=2), "guidance": (3, 3)}
    for make in (
        lambda seed: Trajectories(tiny, list(PROMPTS), schedule, seed=seed, **common),
        lambda seed: CaptionedImages(tiny, rows, schedule, seed=seed, **common),
    ):
        # The last differ in the upper 32 bits alone.
        batches = [make(seed).batch(0).z_t for seed in (0, 0, 1, 2**32)]
        assert torch.equal(batches[0], batches[1])
        states = torch.cat([batches[0], *batches[2:]]).flatten(1)
        assert torch.corrcoef(states).fill_diagonal_(0).abs().max() < 0.3


def test_large_images_are_encoded_a_few_at_a_time(
    tiny: Model, schedule: NoiseSchedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(tmp_path / "images", count=6)

    def source() -> CaptionedImages:
        rows = open_images(str(tmp_path / "images"))
        return CaptionedImages(tiny, rows, schedule, share=Share(batch_size=5), seed=0, guidance=(3, 3))

    whole = source().batch(0).z_t
    sizes = []
    encode = tiny.pipeline.vae.encode
    monkeypatch.setattr(tiny.pipeline.vae, "encode", lambda images: (sizes.append(len(images)), encode(images))[1])
    monkeypatch.setattr("boostdiff.distill.captioned_images.ENCODED_PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(source().batch(0).z_t, whole)
    assert sizes == [2, 2, 1]


def test_every_prompt_comes_once_an_epoch() -> None:
    assert sorted(epoch_order(7, 0, 0)) == list(range(7))
    assert not np.array_equal(epoch_order(50, 0, 0), epoch_order(50, 0, 1))


def test_captioned_images_are_encoded_and_diffused(tiny: Model, schedule: NoiseSchedule, tmp_path: Path) -> None:
    save_images(tmp_path)

    def source() -> CaptionedImages:
        return CaptionedImages(
            tiny, open_images(str(tmp_path)), schedule, share=Share(batch_size=3), seed=0, guidance=(3, 3)
        )

    first, again = source(), source()
    batch = first.batch(0)
    assert batch.z_t.shape == (3, *tiny.latent_shape)
    assert torch.equal(batch.z_t, again.batch(0).z_t)
    assert not torch.equal(batch.t, first.batch(1).t)
    restored = source()
    restored.restore(first.state(), Counter())
    assert torch.equal(restored.batch(2).z_t, first.batch(2).z_t)
    assert len(batch.text) == 3


def test_pixels_are_cropped_to_the_centre() -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    pixels = pixels_of(image, 10, 10)
    assert pixels.shape == (3, 10, 10)
    assert pixels.mean() > 0.9
