import pytest
from boostdiff.benchmarks.quality.predictions import error_and_share, trajectory
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner
from tiny import PROMPTS


def test_the_teacher_has_no_error_and_no_student_all_of_it(tiny: Model) -> None:
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    states = trajectory(tiny, text, 3.0)
    runner = TorchRunner(tiny.unet)
    assert error_and_share(GuidedDenoiser(runner, 3.0), states, text) == pytest.approx((0, 1), abs=1e-6)
    assert error_and_share(SinglePassDenoiser(runner), states, text) == pytest.approx((1, 0), abs=1e-6)
    # Half of the guidance leaves a quarter of the squared error.
    assert error_and_share(GuidedDenoiser(runner, 2.0), states, text) == pytest.approx((0.25, 0.5), abs=1e-3)
