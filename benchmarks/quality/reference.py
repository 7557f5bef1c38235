"""Real images: the statistics of a folder of them, and the file that keeps these."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...engine.errors import InputError
from ...engine.files import give_modes
from ...engine.pictures import PICTURE_TYPES, PictureError, files_in, read_picture
from .features import FeatureNetwork, features_of

BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, unbiased.
        count: images behind both.
        features: `(M, D)` float32 of real images that are not among them: for KID and the real-vs-real distance.
        notes: what of a folder was not used, in words; not saved.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int
    features: torch.Tensor
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, features: torch.Tensor, held_out: torch.Tensor) -> Reference:
        """From the features `(N, D)` of the reference set and `(M, D)` of other real images."""
        x = features.double()
        return cls(mean=x.mean(dim=0), covariance=torch.cov(x.T), count=len(x), features=held_out.float())

    @property
    def sha256(self) -> str:
        """Of the statistics, to tell references apart."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.covariance.numpy().tobytes()).hexdigest()

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
        give_modes(path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote."""
        try:
            tensors = load_file(path)
            mean = tensors["mean"].double()
            upper = torch.triu_indices(len(mean), len(mean))
            covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
            covariance[upper[0], upper[1]] = covariance[upper[1], upper[0]] = tensors["covariance"].double()
            count, features = int(tensors["count"]), tensors["features"].float()
            return cls(mean=mean, covariance=covariance, count=count, features=features)
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"can't read the reference {path}: {error}") from None


def reference_of(path: Path, network: FeatureNetwork, *, size: int | None = None) -> Reference:
    """The reference in a file of `Reference.save`, or of a folder of images, see `reference_from_folder`."""
    if path.is_dir():
        return reference_from_folder(path, network, size=size)
    reference = Reference.load(path)
    if len(reference.mean) != network.num_features:
        raise InputError(
            f"the reference {path} holds {len(reference.mean)} features per image, and {network.distance_name} needs "
            f"{network.num_features}: pass --reference with the folder of images"
        )
    return reference


def reference_from_folder(folder: Path, network: FeatureNetwork, *, size: int | None = None) -> Reference:
    """Statistics of a folder of real images; every tenth is kept apart for KID and the real-vs-real distance.

    Args:
        folder: picture files, at any depth, taken in the order of their names; of animations the first frame.
        size: side in pixels of the centered square that every image is cut and resized to; None takes the images as
            they are, which must all have one size.

    Raises:
        InputError: there are fewer than 20 readable images, or they differ in size.
    """
    files = files_in(folder)
    paths = [path for path in files if path.suffix[1:].lower() in PICTURE_TYPES]
    if len(paths) < 20:
        raise InputError(f"the reference folder {folder} holds {len(paths)} images: at least 20 are needed")
    notes: Counter[str] = Counter()
    features, first = [], _pixels(paths[0], size, Counter()).shape
    for start in range(0, len(paths), BATCH):
        batch = []
        for path in paths[start : start + BATCH]:
            pixels = _pixels(path, size, notes)
            if pixels.shape != first:
                raise InputError(
                    f"the reference folder {folder} mixes image sizes ({first[1]}x{first[0]}, and {path.name} has "
                    f"{pixels.shape[1]}x{pixels.shape[0]}): pass --reference-size to cut all to one square"
                )
            batch.append(torch.from_numpy(pixels).permute(2, 0, 1))
        features.append(features_of(network, torch.stack(batch), batch_size=BATCH))
    rows = torch.cat(features)
    # Not the last tenth: a folder may be sorted by what is shown.
    apart = torch.arange(len(rows)) % 10 == 9
    said = [f"{count} reference images {note}" for note, count in notes.items()]
    if others := len(files) - len(paths):
        said.append(f"{others} files in {folder} are no pictures and are not used")
    return replace(Reference.of(rows[~apart], rows[apart]), notes=tuple(said))


def _pixels(path: Path, size: int | None, notes: Counter[str]) -> np.ndarray:
    """uint8 `(H, W, 3)`; `notes` counts what of the file is not used."""
    try:
        rgb, unused = read_picture(path)
    except PictureError as error:
        raise InputError(f"can't decode the reference image {path}: {error}") from None
    notes.update(unused)
    return np.array(rgb if size is None else ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS))
