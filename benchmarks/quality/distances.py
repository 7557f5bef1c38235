"""Distances between sets of features: Fréchet with its interval, KID, paired feature distance."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from ..stats import Statistic, leave_one_group_out
from .reference import Reference

KID_SUBSETS, KID_SUBSET = 50, 200
"""Number of random subsets of KID, and images of each set per subset."""


class Distance(Statistic):
    """A Fréchet distance to real images; its interval takes the reference as it is."""

    @classmethod
    def of(cls, reference: Reference, features: torch.Tensor) -> Distance:
        """Of the features `(N, D)` of the images, N ≥ 2; from N = 4 on with an interval."""
        masks = [np.ones(len(features), dtype=bool), *leave_one_group_out(len(features))]
        value, *replicates = frechet_distances(reference, features, [torch.from_numpy(mask) for mask in masks])
        return cls(value=value, replicates=tuple(replicates))


def matrix_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric root `(D, D)` of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(reference: Reference, features: torch.Tensor) -> float:
    """The Fréchet distance to a reference of the images with features `(N, D)`, N ≥ 2."""
    return frechet_distances(reference, features, [torch.ones(len(features), dtype=torch.bool)])[0]


def frechet_distances(reference: Reference, features: torch.Tensor, kept: Sequence[torch.Tensor]) -> list[float]:
    """Fréchet distances of several choices among the same images to real ones.

    ‖μ − μ_r‖² + tr Σ + tr Σ_r − 2 tr (Σ Σ_r)^½ (Heusel et al. 2017, eq. 6). The last trace sums the roots of the
    eigenvalues of Σ Σ_r, which are those of X Σ_r Xᵀ / (n − 1) too, X being the n centered features: a matrix of n × n
    where there are fewer images than features, else of D × D. The choices are masks `(N,)`, of two images or more.
    """
    x = features.double() - reference.mean
    small = len(x) <= x.shape[1]
    matrix = x @ reference.covariance @ x.T if small else matrix_root(reference.covariance)
    distances = []
    for mask in kept:
        part = x[mask]
        if small:
            block = matrix[mask][:, mask]
            block = block - block.mean(dim=0) - block.mean(dim=1, keepdim=True) + block.mean()
            product = block / (len(part) - 1)
        else:
            product = matrix @ torch.cov(part.T) @ matrix
        roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
        traces = part.var(dim=0).sum() + reference.covariance.trace()
        distances.append((part.mean(dim=0).square().sum() + traces - 2 * roots).item())
    return distances


def kernel_distance(reference: Reference, features: torch.Tensor) -> tuple[float, float | None]:
    """KID (Bińkowski et al. 2018) by torchmetrics: the mean over random subsets, and their standard deviation.

    The latter is the scatter of subsets of `KID_SUBSET` images, not the error of the mean, as subsets share images;
    None where a subset holds all images of a set. `features` is `(N, D)`, N ≥ 2.
    """
    smaller = min(len(features), len(reference.features))
    size = min(KID_SUBSET, smaller)
    # It warns that it keeps all features; they are in memory anyway.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        # One process has all features: the metric must not wait for others that were launched.
        metric = KernelInceptionDistance(
            feature=torch.nn.Identity(), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
    metric.update(reference.features, real=True)
    metric.update(features, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, spread = metric.compute()
    return mean.item(), spread.item() if size < smaller else None


def paired_feature_distance(features: torch.Tensor, to: torch.Tensor) -> float:
    """Mean cosine distance between features of the same seed: 0 where the images are equal."""
    return (1 - torch.cosine_similarity(features.double(), to.double())).mean().abs().item()
