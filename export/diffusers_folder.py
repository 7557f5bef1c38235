"""The merged student as a whole diffusers pipeline folder, for stock pipelines and servers that take such folders.

A stock pipeline makes two passes a step at any `guidance_scale` above 1, which for a student is guidance upon
guidance. So the UNet gets a guidance input whose weights are zeros: to stock diffusers it is a model that takes its
guidance scale as an input (`time_cond_proj_dim`), of which it makes one pass, and the zeros add nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DDIMScheduler, UNet2DConditionModel

from ..engine import embedded
from ..engine.files import read_json, read_text, write_json
from ..engine.guidance_input import add_guidance_embedding
from ..engine.model import Model
from ..engine.schedulers import is_flow
from ..engine.student import Distilled

FOLDER = "diffusers"
"""Its place in an engine's folder."""

GUARD_WIDTH = 4
"""Width of a guidance input that does nothing; stock pipelines can embed a scale in four numbers, not in two."""

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

CARD = """---
{licence}library_name: diffusers
pipeline_tag: text-to-image
tags: [boostdiff, guidance-distillation]
---

# {name}, distilled to one pass

A student of {name} that boostdiff distilled from classifier-free guidance {guidance}: each sampling step is one
pass of the denoiser, where {name} with guidance makes two.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe("a lighthouse at dusk", num_inference_steps={steps}{call}).images[0]
```

- **Guidance scale.** {scale}
- **Negative prompts** are not looked at: stock diffusers ignores them, without a word, where it makes one pass.
  {negative}
- **Scheduler.** {scheduler}
- The weights are in float32; `torch_dtype=torch.float16` loads them in half precision.
- It is not a base for further distillation: boostdiff refuses it as a `--model`.
"""

GUARDED = (
    "Any value gives the same image: the guidance is in the weights. The UNet's configuration names a guidance input "
    f"(`time_cond_proj_dim` {GUARD_WIDTH}) whose weights are zeros, so that stock diffusers makes one pass a step at "
    "its default scale, too. A server that ignores `time_cond_proj_dim` must be given `guidance_scale=1.0`: above it, "
    "it would make two passes and burn the image."
)
CONDITIONED = (
    "Pass any from {low:g} to {high:g}: the student takes it as an input, in one pass. Stock diffusers' default may "
    "lie outside of it."
)


def write_diffusers_folder(model: Model, distilled: Distilled, folder: Path) -> list[str]:
    """Write the model, whose denoiser is the merged student in float32, with its card; gives the weights' paths in it.

    The model is changed only while this runs.
    """
    pipeline = model.pipeline
    scheduler = pipeline.scheduler
    # The same noise schedule and timesteps under the class that stock diffusers has.
    settings = model.make_scheduler("ddim", spacing=distilled.timestep_spacing).config
    try:
        # Of flow matching it is the class that stock diffusers has already.
        pipeline.scheduler = scheduler if is_flow(scheduler.config) else DDIMScheduler.from_config(settings)
        with one_pass(model.denoiser):
            pipeline.save_pretrained(folder, safe_serialization=True)
    finally:
        pipeline.scheduler = scheduler
    for path in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        # The folder that the model was loaded from.
        write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})
    size = model.files.denoiser_config.get("sample_size")
    if size is not None and not isinstance(model.denoiser, UNet2DConditionModel):
        # Of a transformer, position embeddings are made from the size that it was trained at.
        path = folder / model.family.denoiser / "config.json"
        write_json(path, read_json(path) | {"sample_size": size})
    for pattern in LICENCES:
        for path in model.files.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(_card(model, distilled), encoding="utf-8")
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors"))]


@contextmanager
def one_pass(unet: UNet2DConditionModel) -> Iterator[None]:
    """Let stock pipelines make one pass a step of this UNet at any scale; one that takes the scale is left as it is."""
    if not isinstance(unet, UNet2DConditionModel) or unet.config.time_cond_proj_dim is not None:
        yield
        return
    add_guidance_embedding(unet, GUARD_WIDTH)
    try:
        yield
    finally:
        unet.time_embedding.cond_proj = None
        unet.register_to_config(time_cond_proj_dim=None)


def _card(model: Model, distilled: Distilled) -> str:
    base = model.files.folder / "README.md"
    licence = re.findall(r"^license(?:_\w+)?:.*\n", _front_matter(base), re.MULTILINE)
    if model.files.name == embedded.MODEL_NAME:
        licence = ["license: apache-2.0\n"]
    low_high = distilled.guidance_range
    trained = f"with the negative prompt {distilled.negative_prompt!r}" if distilled.negative_prompt else "with none"
    return CARD.format(
        licence="".join(licence),
        name=re.split(r"[/\\]", model.files.name.rstrip("/\\"))[-1],
        guidance="{:g} to {:g}".format(*low_high) if low_high else f"{distilled.guidance:g}",
        steps=distilled.steps or 20,
        scheduler=_scheduler(model, distilled),
        call=f", guidance_scale={distilled.guidance:g}" if low_high else "",
        scale=_scale(model, low_high),
        negative=f"This student was distilled {trained}.",
    )


def _scale(model: Model, low_high: tuple[float, float] | None) -> str:
    if low_high:
        return CONDITIONED.format(low=low_high[0], high=low_high[1])
    if model.family.denoiser == "unet":
        return GUARDED
    one = ", ".join(f"`{name}={value!r}`" for name, value in model.family.stock_guidance(1.0).items())
    return f"Pass {one}: the guidance is in the weights, and with more the pipeline would make two passes and burn it."


def _scheduler(model: Model, distilled: Distilled) -> str:
    if distilled.steps:
        return f"DDIM in {distilled.steps} steps of {distilled.timestep_spacing} spacing: the student knows no others."
    if is_flow(model.pipeline.scheduler.config):
        return "The model's own."
    return (
        "DDIM, on which the export compares the student's images. Others of the same noise schedule can be put in its "
        "place, such as `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`."
    )


def _front_matter(card: Path) -> str:
    """The YAML at the head of a model card; "" where there is none."""
    found = re.match(r"---\r?\n(.*?\n)---", read_text(card), re.DOTALL) if card.is_file() else None
    return found[1] if found else ""
