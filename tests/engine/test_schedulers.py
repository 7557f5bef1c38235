"""A name of a sampler stands for one sampler, whatever scheduler a model's folder has."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine.errors import InputError
from boostdiff.engine.schedulers import (
    NOISE_SCHEDULE,
    SAMPLERS,
    SPACINGS,
    TIMESTEP_SETTINGS,
    check_schedule,
    check_spacing,
    check_steps,
    completed,
    make_scheduler,
    shift_of_size,
)
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

FOLDER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
PLAIN = DDIMScheduler(**FOLDER).config
OTHERS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"final_sigmas_type": "sigma_min"},
    {"interpolation_type": "log_linear"},
    {"solver_type": "heun"},
    {"solver_type": "bh1"},
    {"solver_order": 3},
    {"algorithm_type": "sde-dpmsolver++"},
    {"lower_order_final": False},
    {"euler_at_final": True},
    {"lambda_min_clipped": -2.0},
    {"disable_corrector": [0, 1]},
    {"predict_x0": False},
    {"clip_sample": True, "thresholding": True, "sample_max_value": 2.0},
    {"sigma_min": 0.5, "sigma_max": 4.0},
]


def drawn(name: str, config: Any, steps: int = 6) -> torch.Tensor:
    """The last latents of a denoiser that leads to smaller ones."""
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(steps)
    z_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        z_t = scheduler.step(scheduler.scale_model_input(z_t, t).sin(), t, z_t, return_dict=False)[0]
    return z_t


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_what_is_a_samplers_own_is_not_taken_from_a_folder(other: dict[str, Any]) -> None:
    for name in SAMPLERS:
        assert torch.equal(drawn(name, {**PLAIN, **other}), drawn(name, PLAIN)), name


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_folders_noise_schedule_is_taken(name: str) -> None:
    for other in ({"prediction_type": "v_prediction"}, {"beta_end": 0.02}, {"rescale_betas_zero_snr": True}):
        assert not torch.equal(drawn(name, {**PLAIN, "timestep_spacing": "trailing", **other}), drawn(name, PLAIN))


def test_the_defaults_are_those_of_the_folders_own_class() -> None:
    """Heun's betas begin at 0.00085, those of all samplers at 0.0001."""
    silent = HeunDiscreteScheduler().config
    for name in SAMPLERS:
        assert make_scheduler(name, silent).config.beta_start == 0.00085


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_silent_folder_leaves_the_spacing_to_the_sampler(name: str) -> None:
    """As stock diffusers has it."""
    spacing = make_scheduler(name, PNDMScheduler().config).config.timestep_spacing
    assert spacing == ("leading" if name == "ddim" else "linspace")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_folders_spacing_is_taken_but_for_ddims_linspace(name: str, spacing: str) -> None:
    """On purpose: it says where sampling begins, which zero terminal SNR decides, and stock diffusers does so."""
    for offset in (0, 3):
        config = {**FOLDER, "timestep_spacing": spacing, "steps_offset": offset}
        ours, (kind, own) = make_scheduler(name, config), SAMPLERS[name]
        expected = {**config, "timestep_spacing": "leading"} if (name, spacing) == ("ddim", "linspace") else config
        stock = kind.from_config(expected, **own)
        for scheduler in (ours, stock):
            scheduler.set_timesteps(7)
        assert torch.equal(ours.timesteps, stock.timesteps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_parameter_of_a_sampler_is_decided(name: str) -> None:
    """A diffusers with a new one fails here: is it the folder's or the sampler's own?"""
    scheduler_class, own = SAMPLERS[name]
    known = {*NOISE_SCHEDULE, *TIMESTEP_SETTINGS, *own, *(key for other in OTHERS for key in other)}
    known |= {"dynamic_thresholding_ratio", "clip_sample_range", "variance_type", "timestep_type", "solver_p"}
    known |= {"use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"}
    assert set(inspect.signature(scheduler_class.__init__).parameters) - {"self"} <= known


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 10, 49, 500, 501, 999])
def test_ddims_moves_meet_its_timesteps(spacing: str, steps: int) -> None:
    """Of a network that knows the noise exactly, each state is that of the next timestep."""
    scheduler = make_scheduler("ddim", {**PLAIN, "timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    x, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    z_t = scheduler.add_noise(x, noise, scheduler.timesteps[:1])
    for index, t in enumerate(scheduler.timesteps):
        z_t = scheduler.step(noise, t, z_t).prev_sample
        if index + 1 < steps:
            expected = scheduler.add_noise(x, noise, scheduler.timesteps[index + 1, None])
            torch.testing.assert_close(z_t, expected, atol=1e-5, rtol=1e-5)
    end = scheduler.final_alpha_cumprod.double()
    torch.testing.assert_close(z_t, end.sqrt() * x + (1 - end).sqrt() * noise, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_own_where_that_meets_its_timesteps(prediction_type: str) -> None:
    config = {**FOLDER, "prediction_type": prediction_type, "timestep_spacing": "leading"}
    ours, stock = make_scheduler("ddim", config), DDIMScheduler(**config, clip_sample=False)
    z_t, prediction = torch.randn(2, 1, 4, 8, 8)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(7)
    for t in stock.timesteps:
        torch.testing.assert_close(
            ours.step(prediction, t, z_t, return_dict=False), stock.step(prediction, t, z_t, return_dict=False)
        )
    with pytest.raises(TypeError, match="eta"):
        ours.step(prediction, t, z_t, eta=1.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_that_the_schedule_has_no_timesteps_for(name: str) -> None:
    most = 998 if name in ("dpm++", "unipc") else 999
    config = {**FOLDER, "timestep_spacing": "leading"}
    check_steps(config, [name], [1, 20, most])
    with pytest.raises(InputError, match=rf"--steps 1001 can't be used with .* of 1000 timesteps: pass {most}"):
        check_steps(config, [name], [20, 1001])
    with pytest.raises(InputError, match="--steps 0"):
        check_steps(config, [name], [0])


@pytest.mark.parametrize("key", ["timestep_spacing", "steps_offset"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_null_counts_as_absent(name: str, key: str) -> None:
    absent = {other: value for other, value in FOLDER.items() if other != key}
    config = {**absent, key: None}
    check_schedule("DDIMScheduler", completed("DDIMScheduler", config))
    check_steps(config, [name], [20])
    assert torch.equal(drawn(name, config), drawn(name, absent))


@pytest.mark.parametrize("null", [{"base_shift": None}, {"max_shift": None, "max_image_seq_len": None}])
def test_null_counts_as_absent_where_the_size_shifts(null: dict[str, None]) -> None:
    assert shift_of_size({"use_dynamic_shifting": True, **null}, 64) == shift_of_size(
        {"use_dynamic_shifting": True}, 64
    )


@pytest.mark.parametrize("class_name", [["custom", "Scheduler"], {"name": "Scheduler"}, 3, None])
def test_a_class_name_that_is_no_text(class_name: object) -> None:
    config = {**FlowMatchEulerDiscreteScheduler(shift=3.0).config, "_class_name": class_name}
    assert make_scheduler("euler", config).config.shift == 3.0


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_shift_that_another_class_left_in_the_file_is_not_taken(kind: type[SchedulerMixin], tmp_path: Path) -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for shift in (5.0, 1.0):
        kind.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config, flow_shift=shift, **flow).save_pretrained(
            tmp_path
        )
        stock = kind.from_pretrained(tmp_path)
        assert stock.config["shift"] == 3.0
        ours = make_scheduler("dpm++" if kind is DPMSolverMultistepScheduler else "unipc", stock.config)
        euler = make_scheduler("euler", stock.config)
        for scheduler in (stock, ours):
            scheduler.set_timesteps(4)
        assert torch.equal(ours.sigmas, stock.sigmas)
        assert euler.config.shift == shift


def test_flow_settings_that_multistep_solvers_do_not_have() -> None:
    beta = dict(FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True).config)
    for name in ("dpm++", "unipc"):
        with pytest.raises(InputError, match="can't draw with this model's use_beta_sigmas: pass euler"):
            check_steps(beta, [name], [4])
    linear = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear").config)
    with pytest.raises(InputError, match="can't draw with this model's time_shift_type linear: pass euler"):
        check_steps(linear, ["dpm++"], [4])
    check_steps(beta, ["ddim", "euler"], [4])
    check_steps(linear, ["ddim", "euler"], [4])


def test_one_step_can_not_be_stretched_to_a_last_sigma() -> None:
    config = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02).config)
    check_steps(config, ["euler"], [2, 1000])
    with pytest.raises(InputError, match=r"--steps 1 can't be used with euler .* pass 2$"):
        check_steps(config, ["euler"], [20, 1])
    check_steps({**config, "shift_terminal": None}, ["euler"], [1])


def test_zero_terminal_snr_needs_another_prediction_than_the_noise() -> None:
    zero = completed("DDIMScheduler", {**FOLDER, "rescale_betas_zero_snr": True})
    with pytest.raises(InputError, match="no signal at the last timestep"):
        check_schedule("DDIMScheduler", zero)
    for prediction_type in ("v_prediction", "sample"):
        config = {**zero, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
        check_schedule("DDIMScheduler", config)
        for name in SAMPLERS:
            assert drawn(name, config).isfinite().all()


def test_flow_matching_has_no_timestep_spacing() -> None:
    flow = FlowMatchEulerDiscreteScheduler().config
    check_spacing(flow, None)
    check_spacing(PLAIN, "trailing")
    with pytest.raises(InputError, match="--timestep-spacing is not for flow matching"):
        check_spacing(flow, "trailing")
