"""FID's own features: Inception-v3 as torch-fidelity and torchmetrics have it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...engine.errors import BoostDiffError, InputError, one_line
from ...engine.files import sha256_of
from .features import FeatureNetwork


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors, or from a `.pt` or `.pth` file of nothing but tensors.

    Raises:
        InputError: it is missing, damaged, or holds other objects, which would run code when read.
    """
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
        """Build from a weights file, such as torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.

        Raises:
            InputError: the file can't be used.
            BoostDiffError: torch-fidelity is not installed.
        """
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
                "--inception-weights needs torch-fidelity, and a torchvision that fits this torch: "
                "pip install 'boostdiff[fid]'"
            ) from None
        except RuntimeError as error:
            raise InputError(f"{path} holds no Inception weights of torch-fidelity: {one_line(error)}") from None
        self.sha256 = sha256_of(path)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images `(N, 3, H, W)` to features `(N, 2048)` float32."""
        return self.network(images).float()
