"""A classifier of styles: which emoji set does an image come from? Trained on real images alone, never shipped.

Pooled EfficientNet-Lite0 features know objects better than drawing styles (a logistic regression on them names 85% of
held-out images), so this is a small network on pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from ..engine.files import write_whole
from .dataset import STYLES, Artworks
from .placement import draw_training_pictures, to_model_range

STYLE_FILE = "style.safetensors"
STEPS = 1200
BATCH = 64
PEAK_RATE = 5e-3


class StyleNetwork(nn.Module):
    """Logits of `STYLES` for images: five convolutions, then mean and maximum over the image."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
        self.trunk = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o, stride in widths
            )
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * 128, len(STYLES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(N, 3, H, W)` in [-1, 1] to `(N, len(STYLES))`."""
        maps = self.trunk(images)
        return self.head(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))


def _blurred(images: torch.Tensor) -> torch.Tensor:
    """A 3 by 3 binomial blur of `(N, 3, H, W)`."""
    taps = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _training_images(artworks: Artworks, random: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(count, 3, 64, 64)` and the indices of their styles; half the batches a little blurred and noisy.

    An autoencoder blurs, and what is classified went through one.
    """
    pictures, chosen, _ = draw_training_pictures(artworks, random, count)
    images = to_model_range(pictures)
    if random.random() < 0.5:
        images = torch.lerp(images, _blurred(images), random.random())
        noise = torch.from_numpy(random.standard_normal(images.shape, dtype=np.float32))
        images = (images + 0.08 * random.random() * noise).clamp(-1, 1)
    return images, torch.tensor([STYLES.index(artworks.styles[i]) for i in chosen])


def train_style(artworks: Artworks, *, seed: int = 0, steps: int = STEPS, batch: int = BATCH) -> StyleNetwork:
    """Train the classifier on the artworks that are not held out, on the CPU: AdamW under a one-cycle schedule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StyleNetwork()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
        for step in range(steps):
            images, styles = _training_images(artworks, np.random.default_rng([seed, step]), batch)
            loss = F.cross_entropy(network(images.to(memory_format=torch.channels_last)), styles)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def style_network(work: Path, artworks: Artworks, *, seed: int = 0, steps: int = STEPS) -> StyleNetwork:
    """The classifier that `work` holds; trained and put there if it holds none."""
    path = work / STYLE_FILE
    if not path.exists():
        weights = train_style(artworks, seed=seed, steps=steps).state_dict()
        write_whole(path, save({name: tensor.contiguous() for name, tensor in weights.items()}))
    network = StyleNetwork()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def style_of(network: StyleNetwork, images: torch.Tensor) -> list[str]:
    """Name the style of uint8 images `(N, 3, H, W)`, each seen twice: as it is and mirrored."""
    found = []
    for chunk in images.split(200):
        pixels = to_model_range(chunk).contiguous(memory_format=torch.channels_last)
        scores = network(pixels).softmax(dim=1) + network(pixels.flip(3)).softmax(dim=1)
        found += [STYLES[i] for i in scores.argmax(dim=1).tolist()]
    return found
