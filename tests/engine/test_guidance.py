import pytest
import torch
from boostdiff.engine.conditions import TextEmbeddings
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser, combine, guidance_embedding
from boostdiff.engine.guidance_input import add_guidance_embedding
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner


@pytest.mark.parametrize("w", [1.0, 3.0, 7.5])
def test_combine_is_equation_3(w: float) -> None:
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    expected = (1 - w) * unconditional + w * conditional
    torch.testing.assert_close(combine(unconditional, conditional, w), expected)


def test_guided_denoiser_equals_two_separate_passes(tiny: Model) -> None:
    runner = TorchRunner(tiny.denoiser)
    text = tiny.family.encode(tiny.pipeline, ["a red cat", "a blue dog on a hill"])
    z_t, t = torch.randn(2, *tiny.latent_shape), torch.tensor([10, 700])
    with torch.no_grad():
        conditional = SinglePassDenoiser(runner)(z_t, t, text)
        empty = TextEmbeddings(conditional=text.unconditional.expand(len(text)), unconditional=text.unconditional)
        unconditional = SinglePassDenoiser(runner)(z_t, t, empty)
        guided = GuidedDenoiser(runner, 3.0)(z_t, t, text)
    assert (conditional - unconditional).abs().max() > 1e-4
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-5, rtol=1e-4)


def test_one_scales_embedding_is_made_once_a_batch(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def embedded(scale: torch.Tensor, width: int) -> torch.Tensor:
        made.append(len(scale))
        return guidance_embedding(scale, width)

    monkeypatch.setattr("boostdiff.engine.guidance.guidance_embedding", embedded)
    add_guidance_embedding(tiny.denoiser, 8)
    text = tiny.family.encode(tiny.pipeline, ["a red cat", "a blue dog on a hill"])
    one, each = (SinglePassDenoiser(TorchRunner(tiny.denoiser), scale) for scale in (4.0, torch.tensor([4.0, 4.0])))
    z_t = torch.randn(2, *tiny.latent_shape)
    with torch.no_grad():
        first = [one(z_t, torch.tensor(t), text) for t in (500, 10)]
        one(z_t[:1], torch.tensor(10), text[:1])
        assert made == [2, 1]
        for got, t in zip(first, (500, 10), strict=True):
            torch.testing.assert_close(got, each(z_t, torch.tensor(t), text), atol=0, rtol=0)
