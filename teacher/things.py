"""A classifier of things: to which group of emoji ("food drink", "animals nature") does what an image shows belong?

A linear layer on the features of EfficientNet-Lite0 that the distances are made of, fitted to real images and to what
the autoencoder makes of them. It isn't shipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save

from ..benchmarks.quality.features import features_of
from ..engine.files import write_whole
from .dataset import Artworks
from .measure import reconstructed
from .placement import draw_training_pictures

THINGS_FILE = "things.safetensors"
IMAGES = 6000
STEPS = 1500
PEAK_RATE = 2e-3
"""Adam's, under a one-cycle schedule."""


def group_labels(artworks: Artworks, indices: np.ndarray) -> torch.Tensor:
    """`(n,)` int64: the position of each artwork's group in `Artworks.groups`."""
    return torch.tensor([artworks.groups.index(artworks.things[i].group) for i in indices])


def fit_groups(features: torch.Tensor, labels: torch.Tensor, groups: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Multinomial logistic regression of labels `(N,)` on standardized features `(N, D)`, with dropout."""
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-3)
    x = (features - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(x.shape[1], groups)
        optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=STEPS)
        for _ in range(STEPS):
            chosen = torch.randint(len(x), (min(256, len(x)),))
            loss = F.cross_entropy(layer(F.dropout(x[chosen], 0.5)), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    weight = layer.weight.detach() / scale
    return {"weight": weight.contiguous(), "bias": (layer.bias.detach() - weight @ mean).contiguous()}


def things_classifier(
    work: Path,
    artworks: Artworks,
    network: torch.nn.Module,
    vae: AutoencoderKL,
    *,
    seed: int = 0,
    images: int = IMAGES,
) -> dict[str, torch.Tensor]:
    """The classifier that `work` holds; fitted to training pictures and put there if it holds none.

    `network` gives features of `(N, 3, 64, 64)` uint8. Every second picture has gone through the autoencoder.
    """
    path = work / THINGS_FILE
    if not path.exists():
        pictures, chosen, _ = draw_training_pictures(artworks, np.random.default_rng([seed, 8]), images)
        pictures[::2] = reconstructed(vae, pictures[::2])
        fitted = fit_groups(
            features_of(network, pictures), group_labels(artworks, chosen), len(artworks.groups), seed=seed
        )
        write_whole(path, save(fitted))
    return load_file(path)


def groups_of(classifier: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """`(N,)` int64: the group that each image's features `(N, D)` speak for."""
    return F.linear(features, classifier["weight"], classifier["bias"]).argmax(dim=1)
