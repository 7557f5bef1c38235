import pytest
import torch
from boostdiff.engine import families
from boostdiff.engine.captured import CapturedRunner
from boostdiff.engine.errors import BoostDiffError
from boostdiff.engine.model import Model, load
from boostdiff.engine.runners import TorchRunner


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replayed_predictions_are_those_of_the_denoiser(tiny: Model) -> None:
    model = load(tiny.files, device=torch.device("cuda"))
    eager = TorchRunner(load(tiny.files, device=torch.device("cuda")).denoiser)
    with CapturedRunner(model.denoiser) as runner:
        # Batch sizes take turns, other values come in, and inference mode is on for the first ones alone.
        for mode, batch, seed in ((True, 2, 0), (True, 4, 1), (False, 2, 2), (False, 4, 3)):
            torch.manual_seed(seed)
            inputs = {
                name: torch.randn_like(tensor) if tensor.is_floating_point() and name != "timestep" else tensor
                for name, tensor in model.family.example_inputs(model.pipeline, batch=batch).items()
            }
            with torch.inference_mode(mode), torch.no_grad():
                got, expected = runner.predict(inputs), eager.predict(inputs)
            assert (got - expected).norm() < 1e-2 * expected.norm()
        assert len(runner._recordings) == 2


def test_denoisers_that_make_tensors_of_numbers_are_refused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not families.QwenImage.capturable
    assert not families.Chroma.capturable
    monkeypatch.setattr(type(tiny.family), "capturable", False)
    with pytest.raises(BoostDiffError, match="CUDA graphs can't hold the denoiser of a stable-diffusion model"):
        CapturedRunner(tiny.denoiser)


def test_without_cuda_it_says_what_it_needs(tiny: Model) -> None:
    with pytest.raises(BoostDiffError, match="CUDA graphs need an NVIDIA GPU"):
        CapturedRunner(tiny.denoiser)
