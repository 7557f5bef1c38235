"""How sure a Fréchet distance is, and how much of the real images' variety is covered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..stats import Estimate, jackknifed
from .features import Reference

GROUPS = 20
"""Groups of the jackknife: as many distances are computed again for an interval."""

NEIGHBOURS = 3
"""k of precision and recall, as in their paper."""


def matrix_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric root `(D, D)` of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def left_out_distances(reference: Reference, features: torch.Tensor, *, groups: int = GROUPS) -> list[float]:
    """Fréchet distances of the images without each group in turn; image i is in group i mod `groups`.

    ‖μ − μ_r‖² + tr Σ + tr Σ_r − 2 tr (Σ Σ_r)^½ (Heusel et al. 2017, eq. 6). The last trace sums the roots of the
    eigenvalues of Σ Σ_r, which are those of X Σ_r Xᵀ / (n − 1) too, X being the n centred features: a matrix of n × n
    where there are fewer images than features, else of D × D.

    Args:
        reference: real images; taken as they are.
        features: `(N, D)`.
        groups: at least two; no more than N / 2 are made.

    Raises:
        ValueError: there are fewer than four images, so that no group can be left out.
    """
    groups = min(groups, len(features) // 2)
    if groups < 2:
        raise ValueError("an interval needs at least four images")
    x = features.double() - reference.mean
    member = torch.arange(len(x)) % groups
    small = len(x) <= x.shape[1]
    gram = x @ reference.covariance @ x.T if small else None
    root = None if small else matrix_root(reference.covariance)
    distances = []
    for group in range(groups):
        kept = member != group
        part = x[kept]
        mean = part.mean(dim=0)
        if gram is not None:
            block = gram[kept][:, kept]
            block = block - block.mean(dim=0) - block.mean(dim=1, keepdim=True) + block.mean()
            product = block / (len(part) - 1)
        else:
            assert root is not None
            product = root @ torch.cov(part.T) @ root
        roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
        traces = part.var(dim=0).sum() + reference.covariance.trace()
        distances.append((mean.square().sum() + traces - 2 * roots).item())
    return distances


def is_resolved(gains: Sequence[float]) -> bool:
    """Whether what guidance gains is beyond noise; a ratio to it means nothing otherwise.

    Args:
        gains: the unguided teacher's distance less the guided one's, without each group in turn, at least two.
    """
    return min(gains) > 0 and jackknifed(sum(gains) / len(gains), gains).low > 0


def recovered_interval(
    value: float, guided: Sequence[float], unguided: Sequence[float], student: Sequence[float]
) -> Estimate | None:
    """Interval of (unguided − student) / (unguided − guided), by a jackknife that leaves the same prompts out of all.

    Args:
        value: of all images.
        guided: `left_out_distances` of the guided teacher.
        unguided: of the unguided.
        student: of the student.

    Returns:
        None where guidance's own gain is not resolved.
    """
    gains = [u - g for u, g in zip(unguided, guided, strict=True)]
    if not is_resolved(gains):
        return None
    return jackknifed(value, [(u - s) / gain for u, s, gain in zip(unguided, student, gains, strict=True)])


def _radii(features: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance `(N,)` of each point to its k-th nearest neighbour."""
    chunks = features.split(1000)
    # The nearest of all is the point itself.
    return torch.cat([torch.cdist(chunk, features).kthvalue(neighbours + 1, dim=1).values for chunk in chunks])


def _covered(points: torch.Tensor, by: torch.Tensor, radii: torch.Tensor) -> float:
    """Share of points that lie in a ball around any point of another set."""
    inside = [(torch.cdist(chunk, by) <= radii).any(dim=1) for chunk in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float] | None:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1-3): fidelity, and diversity.

    Precision is the share of generated images inside the real ones' manifold, recall the share of real images inside
    the generated ones'. A manifold is the union of balls around its points, each up to the k-th nearest neighbour.

    Args:
        real: `(M, D)` features.
        generated: `(N, D)` features; both sets are cut to the smaller one's size, as the paper has them equal.
        neighbours: k.

    Returns:
        None where there are not more than k images of each.
    """
    size = min(len(real), len(generated))
    if size <= neighbours:
        return None
    real, generated = real[:size].double(), generated[:size].double()
    precision = _covered(generated, real, _radii(real, neighbours))
    return precision, _covered(real, generated, _radii(generated, neighbours))
