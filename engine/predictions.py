"""The clean latents and the noise that a network's prediction says.

Legend: z_t latents (B, C, H, W), α and σ the noise schedule at t, numbers or (B, 1, 1, 1), x̂ a predicted clean latent.
"""

from __future__ import annotations

import torch


def x_from_prediction(
    prediction: torch.Tensor,
    z_t: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """x̂ from what the network predicts (Salimans & Ho 2022, §4 and appendix D).

    The prediction type is a diffusers scheduler's: "epsilon", "v_prediction", "sample" or "flow_prediction".

    Raises:
        ValueError: the prediction type is unknown.
    """
    match prediction_type:
        case "epsilon":
            return (z_t - sigma * prediction) / alpha
        case "v_prediction":
            return alpha * z_t - sigma * prediction
        case "sample":
            return prediction
        case "flow_prediction":
            return z_t - sigma * prediction
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def noise_from_prediction(
    prediction: torch.Tensor,
    z_t: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """ε̂ likewise, without the detour by x̂: its division by a small σ loses bits in half precision.

    Raises:
        ValueError: the prediction type is unknown.
    """
    match prediction_type:
        case "epsilon":
            return prediction
        case "v_prediction":
            return alpha * prediction + sigma * z_t
        case "sample":
            return (z_t - alpha * prediction) / sigma
        case "flow_prediction":
            return z_t + alpha * prediction
    raise ValueError(f"unknown prediction type {prediction_type!r}")
