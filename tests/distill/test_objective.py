from typing import Any

import pytest
import torch
from boostdiff.distill.objective import (
    LOSS_WEIGHTS,
    NoiseSchedule,
    ddim_step,
    distillation_loss,
    dpm_solver_2m,
    has_zero_terminal_snr,
)
from boostdiff.engine.predictions import x_from_prediction
from boostdiff.engine.schedulers import make_scheduler
from diffusers import DDIMScheduler

SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
)
T = torch.tensor([3, 200, 500, 999])


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.of(SCHEDULER, torch.device("cpu"))


def test_alpha_and_sigma_are_the_schedulers(schedule: NoiseSchedule) -> None:
    alphas_cumprod = SCHEDULER.alphas_cumprod[T].double()[:, None, None, None]
    alpha, sigma = schedule.at(T)
    torch.testing.assert_close(alpha.double(), alphas_cumprod.sqrt(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sigma.double(), (1 - alphas_cumprod).sqrt(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
def test_loss_equals_a_float64_reference(schedule: NoiseSchedule, weight: str) -> None:
    student, teacher = torch.randn(2, 4, 4, 8, 8)
    alpha, sigma = schedule.at(T)
    total = 0.0
    for i in range(4):
        snr = (alpha[i].double() / sigma[i].double()).item() ** 2
        omega = {
            "constant": 1.0,
            "snr": snr,
            "truncated-snr": max(snr, 1.0),
            "clamped-snr": min(max(snr, 0.02), 1.0),
            "snr+1": snr + 1,
            "min-snr": min(snr, 5.0),
            "flow": (1 + snr**0.5) ** 2,
        }[weight]
        total += omega * ((student[i].double() - teacher[i].double()) ** 2).mean().item() / 4
    assert distillation_loss(student, teacher, alpha, sigma, weight).mean().item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("weight", "prediction_type"), [("snr", "epsilon"), ("snr+1", "v_prediction")])
def test_weights_that_are_the_error_of_what_is_predicted(
    schedule: NoiseSchedule, weight: str, prediction_type: str
) -> None:
    z_t, student, teacher = torch.randn(3, 4, 4, 8, 8)
    alpha, sigma = schedule.at(T)
    in_x = [x_from_prediction(predicted, z_t, alpha, sigma, prediction_type) for predicted in (student, teacher)]
    expected = torch.nn.functional.mse_loss(student, teacher)
    torch.testing.assert_close(distillation_loss(*in_x, alpha, sigma, weight).mean(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prediction_type": "epsilon"}, False),
        ({"prediction_type": "v_prediction"}, False),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, True),
        ({"prediction_type": "sample", "trained_betas": [0.1] * 19 + [1.0], "num_train_timesteps": 20}, True),
        ({"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}, True),
        ({"prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2"}, False),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, True),
    ],
)
def test_schedules_without_signal_at_the_end(settings: dict[str, Any], expected: bool) -> None:
    assert has_zero_terminal_snr(dict(SCHEDULER.config) | settings) is expected


def test_ddim_step_is_that_of_diffusers(schedule: NoiseSchedule) -> None:
    scheduler = make_scheduler("ddim", SCHEDULER.config)
    scheduler.set_timesteps(20)
    z_t, noise = torch.randn(2, 1, 4, 8, 8)
    for t, t_next in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        alpha, sigma = schedule.at(t[None])
        x = x_from_prediction(noise, z_t, alpha, sigma, "epsilon")
        got = ddim_step(z_t, x, alpha, sigma, *schedule.at(t_next[None]))
        torch.testing.assert_close(got, scheduler.step(noise, t, z_t).prev_sample, atol=1e-4, rtol=1e-4)


def test_a_ddim_step_with_the_two_step_estimate_is_dpm_solver_2m(schedule: NoiseSchedule) -> None:
    """Against diffusers' own solver, over a whole run on predictions drawn at random."""
    scheduler = make_scheduler("dpm++", SCHEDULER.config)
    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps
    z_t, x_previous = torch.randn(1, 4, 8, 8), None
    for before, t, after in zip([None, *timesteps[:-2]], timesteps[:-1], timesteps[1:], strict=True):
        noise = torch.randn_like(z_t)
        alpha, sigma = schedule.at(t[None])
        x = x_from_prediction(noise, z_t, alpha, sigma, "epsilon")
        estimate = x
        if before is not None and x_previous is not None:
            estimate = dpm_solver_2m(x, x_previous, *schedule.half_log_snr(before[None], t[None], after[None]))
        expected = scheduler.step(noise, t, z_t).prev_sample
        got = ddim_step(z_t, estimate, alpha, sigma, *schedule.at(after[None]))
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
        z_t, x_previous = expected, x


def test_the_last_step_gives_x(schedule: NoiseSchedule) -> None:
    z_t, x = torch.randn(2, 1, 4, 8, 8)
    alpha, sigma = schedule.at(torch.tensor([20]))
    torch.testing.assert_close(ddim_step(z_t, x, alpha, sigma, *schedule.at(torch.tensor([-1]))), x)
