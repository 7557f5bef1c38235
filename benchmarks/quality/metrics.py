"""How quality is measured: the networks and the real images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engine.errors import BoostDiffError, InputError
from ..fastest import SAMPLING_BATCH
from .clip_score import ClipScorer
from .features import EfficientNetLite0Features, FeatureNetwork, InceptionFeatures
from .reference import Reference, reference_of


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What images are judged by.

    Attributes:
        reference: a folder of real images, or a file of their statistics; None leaves the distances out.
        reference_size: side in pixels of the square that the reference's images are cut and resized to; None takes them
            as they are.
        inception_weights: for FID; None takes the features of EfficientNet-Lite0.
        clip: folder or hub id of a CLIP model, for CLIP scores; None leaves them out.
    """

    reference: Path | None = None
    reference_size: int | None = None
    inception_weights: Path | None = None
    clip: str | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        if self.reference is not None and not self.reference.exists():
            raise InputError(f"there is no reference folder {self.reference}")
        if self.reference_size is not None and self.reference_size < 8:
            raise InputError("--reference-size must be at least 8 pixels")
        if self.inception_weights is not None and not self.inception_weights.is_file():
            raise InputError(f"there is no file of Inception weights {self.inception_weights}")
        if self.inception_weights is not None and self.reference is None:
            raise InputError("FID is a distance to real images: pass --reference DIR with --inception-weights")

    def network(self, device: torch.device) -> FeatureNetwork:
        """The feature network, loaded.

        Raises:
            InputError: its weights can't be used.
            BoostDiffError: its package is not installed.
        """
        if self.inception_weights is not None:
            return InceptionFeatures(self.inception_weights).to(device)
        return EfficientNetLite0Features().to(device)

    def scorer(self, device: torch.device) -> ClipScorer | None:
        """The CLIP model, loaded, where one is named.

        Raises:
            InputError: it can't be used.
        """
        return None if self.clip is None else ClipScorer(self.clip, device=device)

    def reference_for(self, network: FeatureNetwork) -> Reference | None:
        """The real images' statistics.

        Raises:
            InputError: they can't be read.
        """
        return None if self.reference is None else reference_of(self.reference, network, size=self.reference_size)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Says what to do where memory does not suffice.

    Raises:
        BoostDiffError: it did not.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise BoostDiffError(
            f"out of memory while sampling {SAMPLING_BATCH} images together: stop what else uses the device, or pass "
            "another --device"
        ) from None
