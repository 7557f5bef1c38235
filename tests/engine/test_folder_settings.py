"""Folders that differ in one setting each: drawn as by stock diffusers, or refused; docs/models.md has the table."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.model import load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import generate, to_uint8
from boostdiff.engine.schedulers import SAMPLERS, make_scheduler
from diffusers import AutoencoderTiny, DiffusionPipeline
from tiny import CPU, PROMPTS, make_pipeline, make_xl_pipeline

DOCS = Path(__file__).parents[2] / "docs/models.md"
STEPS = 4
ALL = tuple(SAMPLERS)

STOCK: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"use_karras_sigmas": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": False}),
}
"""What a sampler is in stock diffusers: `CLASS.from_config(pipe.scheduler.config, **settings)`."""


def remade(part: str, **changes: Any) -> Callable[[DiffusionPipeline], None]:
    """Another of a pipeline's networks in place of its own, its configuration changed."""

    def change(pipeline: DiffusionPipeline) -> None:
        torch.manual_seed(7)
        own = getattr(pipeline, part)
        if hasattr(own, "from_config"):
            known = {key: value for key, value in own.config.items() if not key.startswith("_")}
            made = type(own).from_config(known | changes)
        else:
            made = type(own)(type(own.config)(**own.config.to_dict() | changes))
        setattr(pipeline, part, made)

    return change


def scheduled(name: str, **changes: Any) -> Callable[[DiffusionPipeline], None]:
    """A scheduler of another class, with the betas of the pipeline's own."""

    def change(pipeline: DiffusionPipeline) -> None:
        betas = {key: pipeline.scheduler.config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
        pipeline.scheduler = getattr(diffusers, name)(**betas, **changes)

    return change


def small_vae(pipeline: DiffusionPipeline) -> None:
    torch.manual_seed(7)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipeline.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One setting.

    Attributes:
        setting: in words, for the docs.
        xl: whether it is of Stable Diffusion XL.
        change: what is done to the pipeline before it is saved.
        files: what is changed in JSON files, by path; None deletes a key.
        samplers: those that are tried.
        refused: whether it must be.
        plain: whether the picture is that of the unchanged folder.
        note: what the docs add.
    """

    setting: str
    xl: bool = False
    change: Callable[[DiffusionPipeline], None] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    samplers: tuple[str, ...] = ALL
    refused: bool = False
    plain: bool = False
    note: str = ""


SCHEDULER, VAE, WORDS = "scheduler/scheduler_config.json", "vae/config.json", "tokenizer/tokenizer_config.json"
ONE = ("ddim",)
FLOW = ("dpm++", "unipc")
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def betas(**changes: Any) -> dict[str, dict[str, Any]]:
    return {SCHEDULER: changes}


FOLDERS = [
    Folder(setting="scheduler `DDIMScheduler`", plain=True),
    Folder(setting="scheduler `PNDMScheduler`", change=scheduled("PNDMScheduler", steps_offset=1), plain=True),
    Folder(setting="scheduler `EulerDiscreteScheduler`", change=scheduled("EulerDiscreteScheduler")),
    Folder(setting="scheduler `DPMSolverMultistepScheduler`", change=scheduled("DPMSolverMultistepScheduler")),
    Folder(setting="scheduler `UniPCMultistepScheduler`", change=scheduled("UniPCMultistepScheduler")),
    Folder(setting="scheduler `HeunDiscreteScheduler`", change=scheduled("HeunDiscreteScheduler")),
    Folder(setting="scheduler `FlowMatchEulerDiscreteScheduler`", refused=True, note="the stock pipeline can't use it",
           files={"model_index.json": {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}}),
    Folder(setting="scheduler `EDMEulerScheduler`", refused=True,
           files={"model_index.json": {"scheduler": ["diffusers", "EDMEulerScheduler"]},
                  SCHEDULER: {"beta_start": None}}),
    Folder(setting="scheduler `LCMScheduler`", refused=True,
           files={"model_index.json": {"scheduler": ["diffusers", "LCMScheduler"]}}),
    Folder(setting="`timestep_spacing` trailing", files=betas(timestep_spacing="trailing")),
    Folder(setting="`timestep_spacing` linspace", files=betas(timestep_spacing="linspace"),
           note="`ddim` keeps to `leading`"),
    Folder(setting="`steps_offset` 0", files=betas(steps_offset=0), plain=True, note="the stock pipeline sets 1"),
    Folder(setting="`set_alpha_to_one` true", files=betas(set_alpha_to_one=True), samplers=ONE),
    Folder(setting="`prediction_type` v_prediction", files=betas(prediction_type="v_prediction")),
    Folder(setting="`prediction_type` sample", files=betas(prediction_type="sample")),
    Folder(setting="`prediction_type` flow_prediction", files=betas(prediction_type="flow_prediction"), refused=True),
    Folder(setting="`shift` beside betas", files=betas(shift=3.0), plain=True, note="no setting of these schedulers"),
    Folder(setting="flow matching, `DPMSolverMultistepScheduler`", samplers=FLOW,
           change=scheduled("DPMSolverMultistepScheduler", **FLOW_SIGMAS)),
    Folder(setting="flow matching, `UniPCMultistepScheduler`, `flow_shift` 3", samplers=FLOW, xl=True,
           change=scheduled("UniPCMultistepScheduler", **FLOW_SIGMAS, flow_shift=3.0)),
    Folder(setting="flow matching, `use_dynamic_shifting`", refused=True,
           change=scheduled("DPMSolverMultistepScheduler", **FLOW_SIGMAS, use_dynamic_shifting=True)),
    Folder(setting="flow matching, a class without `use_flow_sigmas`", refused=True, files=betas(**FLOW_SIGMAS)),
    Folder(setting="`rescale_betas_zero_snr` with v_prediction",
           files=betas(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")),
    Folder(setting="`rescale_betas_zero_snr` with epsilon", files=betas(rescale_betas_zero_snr=True), refused=True),
    Folder(setting="`beta_schedule` linear", files=betas(beta_schedule="linear")),
    Folder(setting="`beta_schedule` squaredcos_cap_v2", files=betas(beta_schedule="squaredcos_cap_v2")),
    Folder(setting="`trained_betas`", files=betas(trained_betas=torch.linspace(0.002, 0.01, 1000).tolist())),
    Folder(setting="`num_train_timesteps` 500", files=betas(num_train_timesteps=500)),
    Folder(setting="`use_karras_sigmas` true", files=betas(use_karras_sigmas=True), plain=True,
           note="the sampler decides on its sigmas"),
    Folder(setting="`clip_sample` true", files=betas(clip_sample=True), plain=True, note="latents are never clipped"),
    Folder(setting="VAE `scaling_factor` 0.5", files={VAE: {"scaling_factor": 0.5}}, samplers=ONE),
    Folder(setting="VAE `shift_factor` 0.1", files={VAE: {"shift_factor": 0.1}}, refused=True),
    Folder(setting="VAE `latents_mean`, `latents_std`", refused=True,
           files={VAE: {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}}),
    Folder(setting="VAE without `quant_conv`s", samplers=ONE,
           change=remade("vae", use_quant_conv=False, use_post_quant_conv=False)),
    Folder(setting="VAE `AutoencoderTiny`", change=small_vae, samplers=ONE),
    Folder(setting="VAE of 8 latent channels", change=remade("vae", latent_channels=8), refused=True),
    Folder(setting="tokenizer's `model_max_length` 12", files={WORDS: {"model_max_length": 12}}, samplers=ONE),
    Folder(setting="tokenizer without `model_max_length`", files={WORDS: {"model_max_length": None}}, refused=True),
    Folder(setting="tokenizer's `pad_token`", files={WORDS: {"pad_token": "!"}}, samplers=ONE),
    Folder(setting="text encoder of one layer (as for clip skip)", samplers=ONE,
           change=remade("text_encoder", num_hidden_layers=1)),
    Folder(setting="text encoder `use_attention_mask`", samplers=ONE,
           files={"text_encoder/config.json": {"use_attention_mask": True}}, note="engines can't: `export` refuses it"),
    Folder(setting="UNet `sample_size` [8, 12]", files={"unet/config.json": {"sample_size": [8, 12]}}, samplers=ONE),
    Folder(setting="UNet without `sample_size`", files={"unet/config.json": {"sample_size": None}}, refused=True),
    Folder(setting="UNet `addition_embed_type` text", samplers=ONE,
           change=remade("unet", addition_embed_type="text", addition_embed_type_num_heads=2)),
    Folder(setting="UNet `num_class_embeds`", change=remade("unet", num_class_embeds=10), refused=True),
    Folder(setting="UNet `time_cond_proj_dim`", change=remade("unet", time_cond_proj_dim=16), refused=True),
    Folder(setting="UNet of 9 input channels", change=remade("unet", in_channels=9), refused=True),
    Folder(setting="scheduler `EulerDiscreteScheduler`", xl=True, plain=True),
    Folder(setting="scheduler `DDIMScheduler`", xl=True,
           change=scheduled("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
    Folder(setting="`timestep_spacing` trailing", xl=True, files=betas(timestep_spacing="trailing")),
    Folder(setting="`steps_offset` 3, leading", xl=True, files=betas(steps_offset=3, timestep_spacing="leading")),
    Folder(setting="`prediction_type` v_prediction", xl=True, files=betas(prediction_type="v_prediction")),
    Folder(setting="`rescale_betas_zero_snr` with v_prediction", xl=True,
           files=betas(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")),
    Folder(setting="`timestep_type` continuous", xl=True, files=betas(timestep_type="continuous"), refused=True),
    Folder(setting="VAE `latents_mean`, `latents_std`", xl=True, samplers=ONE,
           files={VAE: {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 0.5, 1.0, 1.5]}}),
    Folder(setting="VAE `latents_mean` alone", xl=True, files={VAE: {"latents_mean": [0.1] * 4}}, refused=True),
    Folder(setting="VAE `force_upcast` false", xl=True, files={VAE: {"force_upcast": False}}, samplers=ONE, plain=True),
    Folder(setting="`force_zeros_for_empty_prompt` false", xl=True, samplers=ONE,
           files={"model_index.json": {"force_zeros_for_empty_prompt": False}}),
    Folder(setting="second tokenizer's `pad_token`", xl=True, samplers=ONE,
           files={"tokenizer_2/tokenizer_config.json": {"pad_token": "!"}}),
    Folder(setting="without the first text encoder", xl=True, refused=True,
           files={"model_index.json": {"text_encoder": [None, None], "tokenizer": [None, None]}}),
    Folder(setting="UNet of five numbers of size", xl=True, refused=True,
           change=remade("unet", projection_class_embeddings_input_dim=24 + 5 * 8)),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The plain folder of each family: training a tokenizer again could number its words otherwise."""
    root = tmp_path_factory.mktemp("bases")
    for xl, make in ((False, make_pipeline), (True, make_xl_pipeline)):
        pipeline = make()
        with torch.no_grad():
            # Else pictures are so pale that nothing shows.
            pipeline.vae.decoder.conv_out.weight *= 4
            pipeline.unet.conv_out.weight *= 3
        pipeline.save_pretrained(root / str(xl))
    return {xl: root / str(xl) for xl in (False, True)}


def saved(folder: Folder, bases: dict[bool, Path], root: Path) -> Path:
    shutil.copytree(bases[folder.xl], root)
    if folder.change:
        pipeline = DiffusionPipeline.from_pretrained(root, safety_checker=None)
        folder.change(pipeline)
        pipeline.save_pretrained(root)
    for name, changes in folder.files.items():
        values = read_json(root / name) | changes
        write_json(root / name, {key: value for key, value in values.items() if value is not None})
    return root


def by_stock(root: Path, samplers: tuple[str, ...]) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(root, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    config, images = pipeline.scheduler.config, {}
    for sampler in samplers:
        scheduler, settings = STOCK[sampler]
        if sampler == "ddim" and config.get("timestep_spacing") == "linspace":
            settings = settings | {"timestep_spacing": "leading"}
        pipeline.scheduler = scheduler.from_config(config, **settings)
        generator = torch.Generator().manual_seed(3)
        result = pipeline(PROMPTS[1], guidance_scale=3.0, num_inference_steps=STEPS, generator=generator)
        images[sampler] = np.asarray(result.images[0]).astype(int)
    return images


def by_us(root: Path, samplers: tuple[str, ...]) -> dict[str, np.ndarray]:
    model = load(locate(str(root)), device=CPU)
    draw = partial(
        generate,
        model,
        GuidedDenoiser(TorchRunner(model.denoiser), 3.0),
        text=model.family.encode(model.pipeline, PROMPTS[1:2]),
        steps=STEPS,
        seed=3,
    )
    images = {}
    for sampler in samplers:
        image = draw(make_scheduler=partial(make_scheduler, sampler, model.pipeline.scheduler.config))[0]
        images[sampler] = to_uint8(image).permute(1, 2, 0).numpy().astype(int)
    return images


def row(folder: Folder) -> str:
    family = "XL" if folder.xl else "SD"
    only = "" if folder.samplers == ALL else f" ({', '.join(f'`{name}`' for name in folder.samplers)})"
    result = "refused" if folder.refused else f"as stock diffusers{only}"
    return f"| {family} | {folder.setting} | {result}{f'; {folder.note}' if folder.note else ''} |"


@pytest.fixture(scope="module")
def unchanged(bases: dict[bool, Path]) -> dict[bool, dict[str, np.ndarray]]:
    return {xl: by_us(folder, ALL) for xl, folder in bases.items()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{'xl' if folder.xl else 'sd'}: {folder.setting}")
def test_a_folder_is_drawn_as_by_stock_diffusers_or_refused(
    folder: Folder, tmp_path: Path, bases: dict[bool, Path], unchanged: dict[bool, dict[str, np.ndarray]]
) -> None:
    root = saved(folder, bases, tmp_path / "model")
    if folder.refused:
        for path in root.rglob("*.safetensors"):
            path.unlink()
        with pytest.raises(InputError) as error:
            locate(str(root), weights=False)
        assert "\n" not in str(error.value)
        return
    got, expected = by_us(root, folder.samplers), by_stock(root, folder.samplers)
    differences = {name: np.abs(got[name] - expected[name]).max() for name in got}
    assert max(differences.values()) <= 1, differences
    # A setting that shows nowhere would prove nothing.
    own = unchanged[folder.xl]
    shown = [name for name in got if got[name].shape != own[name].shape or np.abs(got[name] - own[name]).max() > 1]
    assert bool(shown) != folder.plain, shown


def test_the_table_in_the_docs_is_this_one() -> None:
    written = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(("| SD |", "| XL |"))]
    assert written == [row(folder) for folder in FOLDERS]


def test_ddim_keeps_to_leading_where_the_folder_says_linspace(
    tmp_path: Path, bases: dict[bool, Path], unchanged: dict[bool, dict[str, np.ndarray]]
) -> None:
    root = saved(Folder(setting="", files=betas(timestep_spacing="linspace")), bases, tmp_path / "model")
    assert np.abs(by_us(root, ONE)["ddim"] - unchanged[False]["ddim"]).max() == 0
