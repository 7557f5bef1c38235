"""Make `emoji64` again: `python -m boostdiff.teacher.train all --work DIR`.

Stages, in order: `vae`, `latents`, `diffusion`, `save`, `caption-model`, `reference`, and to evaluate the result
`classifiers`, `evaluate`, `grids`; `all` runs them one after the other. Those that train resume from their checkpoint,
`evaluate` from its last scale. All randomness of a step is drawn from (seed, step), so a resumed run takes the same
steps as an uninterrupted one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from transformers import CLIPTextModel, CLIPTokenizer

from ..distill.checkpoint import load_training_state
from ..distill.order import Share
from ..engine.compiled import has_bfloat16, missing_compiler
from ..engine.embedded import MODEL_DIR
from ..engine.errors import InputError
from ..engine.files import hash_of, staged_folder, write_whole
from ..engine.model import locate, resolve_device
from ..engine.terminal import run
from .architecture import BETAS, TIMESTEPS, make_text_encoder, make_tokenizer, make_unet, make_vae, save_pipeline
from .caption_model import caption_model
from .captions import caption, draw_captions
from .dataset import Artworks, load_artworks
from .evaluate import classifiers, evaluate, grids
from .measure import Batch, Rate, Seed, Steps, Work, held_out_psnr, load_vae, made_by, reference
from .negative_prompts import negatives
from .optimize import optimize, step_generator
from .palette import BACKGROUNDS, PALETTE
from .placement import draw_pictures, to_model_range

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Flow = Annotated[bool, typer.Option("--flow", help="Flow matching: predict the velocity.")]

LATENT_BACKGROUNDS = 6
"""Background colors and placements drawn for each artwork when latents are precomputed."""

TOKENIZER_CAPTIONS = 100_000
"""Captions that the byte-pair vocabulary is learned from."""


def draw_images(artworks: Artworks, random: np.random.Generator, count: int) -> torch.Tensor:
    """`(count, 3, 64, 64)` training images in [-1, 1], half over palette colors, half over any color."""
    colors = np.where(
        random.random((count, 1)) < 0.5,
        PALETTE[random.integers(len(PALETTE), size=count)],
        random.integers(256, size=(count, 3)),
    )
    return to_model_range(draw_pictures(artworks, artworks.draw(random, count), colors, random))


def reconstruction_loss(vae: AutoencoderKL, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """L1 + half the L1 of the image gradients (crisp edges) + 1e-3 KL; `noise` samples the posterior."""
    posterior = vae.encode(images).latent_dist
    recovered = vae.decode(posterior.mean + posterior.std * noise.to(images)).sample
    edges = sum((recovered.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return (recovered - images).abs().mean() + 0.5 * edges + 1e-3 * posterior.kl().mean() / noise[0].numel()


@app.command()
def vae(
    work: Work = Path("teacher-work"),
    steps: Steps = 9000,
    batch: Batch = 32,
    learning_rate: Rate = 2e-3,
    seed: Seed = 0,
) -> None:
    """Train the autoencoder and report its PSNR on held-out artworks."""
    artworks = load_artworks(work)
    torch.manual_seed(seed)
    where = resolve_device("auto")
    model = make_vae().to(where, memory_format=torch.channels_last)

    def loss_of(step: int) -> torch.Tensor:
        images = draw_images(artworks, np.random.default_rng([seed, step]), batch)
        images = images.to(where, memory_format=torch.channels_last)
        noise = torch.randn(batch, 4, 16, 16, generator=step_generator(seed, step))
        return reconstruction_loss(model, images, noise.to(where))

    optimize(
        name="vae",
        modules={"vae": model},
        loss_of=loss_of,
        checkpoint=work / "vae.checkpoint.safetensors",
        steps=steps,
        learning_rate=learning_rate,
        header={"seed": seed, "batch": batch},
    )
    model.eval()
    psnr = held_out_psnr(model, artworks)
    print(f"vae: held-out PSNR {psnr:.2f} dB over {artworks.held_out.sum()} artworks")
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(work / "vae.safetensors", safetensors_bytes(weights))


@app.command()
def latents(work: Work = Path("teacher-work"), seed: Seed = 0) -> None:
    """Encode every training artwork over a few backgrounds, each placed anew; choose the latents' scale."""
    where = resolve_device("auto")
    model = load_vae(work).to(where, memory_format=torch.channels_last)
    artworks = load_artworks(work)
    random = np.random.default_rng([seed, 1])
    training = np.flatnonzero(~artworks.held_out & (artworks.weights > 0))
    chosen = random.permuted(np.tile(np.arange(len(PALETTE)), (len(training), 1)), axis=1)[:, :LATENT_BACKGROUNDS]
    pairs = np.stack([np.repeat(training, LATENT_BACKGROUNDS), chosen.ravel()], axis=1)
    encoded = []
    with torch.inference_mode():
        for chunk in np.array_split(pairs, math.ceil(len(pairs) / 200)):
            images = to_model_range(draw_pictures(artworks, chunk[:, 0], PALETTE[chunk[:, 1]], random))
            moments = model.encode(images.to(where, memory_format=torch.channels_last))
            encoded.append(moments.latent_dist.mean.half().cpu())
    everything = torch.cat(encoded)
    scale = 1 / everything.float().std()
    tensors = {"latents": everything.contiguous(), "pairs": torch.from_numpy(pairs), "scale": scale}
    write_whole(work / "latents.safetensors", safetensors_bytes(tensors))
    print(f"latents: {len(everything)} of {tuple(everything.shape[1:])}, scaling_factor {scale:.4f}")


def the_tokenizer(work: Path, artworks: Artworks) -> CLIPTokenizer:
    """The tokenizer of this work folder, made when it is first needed.

    It must not be made twice: equal captions give token numbers that differ from process to process, as the trainer
    breaks ties by a hash table's order, and a model that goes on with another tokenizer reads other words.
    """
    folder = work / "tokenizer"
    if not folder.exists():
        captions = draw_captions(artworks, held_out=False, count=TOKENIZER_CAPTIONS, seed=0)
        made = make_tokenizer(caption.text for caption in captions)
        with staged_folder(folder, replaces="tokenizer_config.json") as staged:
            made.save_pretrained(staged)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@app.command()
def diffusion(
    work: Work = Path("teacher-work"),
    steps: Steps = 20000,
    batch: Batch = 64,
    learning_rate: Rate = 8e-4,
    seed: Seed = 0,
    empty_captions: Annotated[float, typer.Option(help="Share of captions replaced by the empty one.")] = 0.1,
    wrong_captions: Annotated[float, typer.Option(help="Share of captions that are another picture's.")] = 0.05,
    min_snr: Annotated[float, typer.Option(help="Gamma of the loss weights; inf for none.")] = 5.0,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Pipeline folder whose text encoder and UNet to go on from.", show_default="none"),
    ] = None,
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Train through torch.compile, which starts minutes later.")
    ] = True,
    flow: Flow = False,
) -> None:
    """Train text encoder and UNet together on the precomputed latents.

    Several processes share each batch, on a CPU one per core, of one thread each: `OMP_NUM_THREADS=1
    torchrun --standalone --nproc-per-node 2 -m boostdiff.teacher.train diffusion …`.
    In bf16 autocast where the device multiplies in bfloat16. Each time a latent is met, its caption is drawn anew.
    Noise prediction by default, losses weighted by min(SNR, gamma) / SNR (Hang et al. 2023, eq. 8): unweighted, most of
    the gradient is of the finest detail. With `--flow` z_t = (1 - sigma) z_0 + sigma noise, sigma logit-normal, and an
    unweighted loss of the velocity noise - z_0 (Esser et al. 2024, "Scaling Rectified Flow Transformers").
    """
    accelerator = Accelerator(cpu=resolve_device("auto").type == "cpu")
    where, count = accelerator.device, accelerator.num_processes
    if batch % count:
        raise InputError(f"--batch {batch} can't be shared out evenly among {count} processes")
    members = Share(batch_size=batch, rank=accelerator.process_index, world_size=count).members
    share = slice(members.start, members.stop)
    stored = load_file(made_by("latents", work / "latents.safetensors"))
    artworks = load_artworks(work)
    with accelerator.main_process_first():
        tokenizer = the_tokenizer(work, artworks)
    torch.manual_seed(seed)
    text_encoder, unet = make_text_encoder(tokenizer).to(where), make_unet().to(where)
    header: dict[str, Any] = {"seed": seed, "batch": batch, "flow": flow}
    if start_from:
        parts = locate(str(start_from))
        header["start_from"] = hash_of([parts.denoiser_sha256(), parts.other_sha256()["text_encoder"]])
        text_encoder = CLIPTextModel.from_pretrained(start_from / "text_encoder", dtype=torch.float32).to(where)
        unet = UNet2DConditionModel.from_pretrained(start_from / "unet").to(where)
        text_encoder.train(), unet.train()
    # On a CPU, flash attention's backward pass takes longer than plain matrix products at these sizes.
    unet.set_attn_processor(AttnProcessor())
    train_scheduler = DDPMScheduler(**BETAS)
    latents, pairs = stored["latents"], stored["pairs"].numpy()
    scale = stored["scale"]
    names = list(BACKGROUNDS)
    weights = artworks.weights[pairs[:, 0]]
    weights /= weights.sum()

    def token_ids(random: np.random.Generator, chosen: np.ndarray) -> torch.Tensor:
        described = np.where(random.random(len(chosen)) < wrong_captions, random.permutation(chosen), chosen)
        texts = [caption(artworks, int(a), names[b], random).text for a, b in pairs[described]]
        texts = [text if random.random() >= empty_captions else "" for text in texts]
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    snr = compute_snr(train_scheduler, torch.arange(TIMESTEPS))
    loss_weights = snr.clamp(max=min_snr) / snr

    def weighted_loss(
        z_t: torch.Tensor, target: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=has_bfloat16(where)):
            text = text_encoder(ids).last_hidden_state
            prediction = unet(z_t, t, text, return_dict=False)[0]
        squared_error = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
        return (weight * squared_error).mean()

    if compiles and missing_compiler(where) is None:
        unet.to(memory_format=torch.channels_last)
        weighted_loss = torch.compile(weighted_loss, dynamic=False)

    def loss_of(step: int) -> torch.Tensor:
        random = np.random.default_rng([seed, step])
        generator = step_generator(seed, step)
        chosen = random.choice(len(latents), batch, p=weights)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        ids = token_ids(random, chosen)
        z_0 = latents[chosen].float() * scale
        if flow:
            sigma = compute_density_for_timestep_sampling("logit_normal", batch, 0.0, 1.0, generator=generator)
            t, weight, target = sigma * TIMESTEPS, torch.ones(batch), noise - z_0
            z_t = z_0.lerp(noise, sigma[:, None, None, None])
        else:
            t = torch.randint(TIMESTEPS, (batch,), generator=generator)
            weight, target = loss_weights[t], noise
            z_t = train_scheduler.add_noise(z_0, noise, t)
        return weighted_loss(*(tensor[share].to(where) for tensor in (z_t, target, t, ids, weight)))

    optimize(
        name="diffusion",
        modules={"text_encoder": text_encoder, "unet": unet},
        loss_of=loss_of,
        checkpoint=work / "diffusion.checkpoint.safetensors",
        steps=steps,
        learning_rate=learning_rate,
        accelerator=accelerator,
        header=header,
    )


@app.command()
def save(
    work: Work = Path("teacher-work"),
    output: Annotated[Path, typer.Option(help="Pipeline folder to write.")] = MODEL_DIR,
    flow: Flow = False,
) -> None:
    """Write the pipeline folder from the newest diffusion checkpoint's EMA weights."""
    state = load_training_state(made_by("diffusion", work / "diffusion.checkpoint.safetensors"))
    scale = load_file(made_by("latents", work / "latents.safetensors"))["scale"]
    tokenizer = the_tokenizer(work, load_artworks(work))
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    for key, module in {"text_encoder": text_encoder, "unet": unet}.items():
        prefix = f"ema.{key}."
        weights = {name.removeprefix(prefix): w for name, w in state.weights.items() if name.startswith(prefix)}
        module.load_state_dict(weights)
    vae = load_vae(work)
    vae.register_to_config(scaling_factor=float(scale))
    save_pipeline(output, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, flow=flow)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"save: step {state.step}, {size / 1e6:.1f} MB in {output}")


for stage in (caption_model, reference, classifiers, evaluate, grids, negatives):
    app.command()(stage)


@app.command(name="all")
def everything(work: Work = Path("teacher-work"), seed: Seed = 0) -> None:
    """Run every stage with its defaults, `reference` included."""
    vae(work, seed=seed)
    latents(work, seed=seed)
    diffusion(work, seed=seed)
    save(work)
    caption_model(work, seed=seed)
    reference(work, seed=seed)
    classifiers(work, seed=seed)
    evaluate(work)
    grids(work)


if __name__ == "__main__":
    run(app)
