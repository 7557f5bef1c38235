"""The training objective of the BoostDiff paper, equations (3) and (4), in x-space.

Legend: z_t latents (B, C, H, W), α and σ the noise schedule at t as (B, 1, 1, 1), x̂ a predicted clean latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..engine.schedulers import is_flow, make_scheduler

MIN_SNR_GAMMA = 5.0
"""γ of min-SNR-γ (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy")."""

CLAMP = (1 / 50, 1.0)
"""Bounds of "clamped-snr"; the lower one is for the first step, whose SNR is 0 in zero-terminal-SNR schedules."""

LOSS_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "constant": torch.ones_like,
    "snr": lambda snr: snr,
    "truncated-snr": lambda snr: snr.clamp(min=1),
    "snr+1": lambda snr: snr + 1,
    "min-snr": lambda snr: snr.clamp(max=MIN_SNR_GAMMA),
    "clamped-snr": lambda snr: snr.clamp(*CLAMP),
    "flow": lambda snr: (1 + snr.sqrt()).square(),
}
"""ω(λ) as a function of the SNR e^λ = α²/σ², for an x-space loss (Salimans & Ho 2022, §4).

"constant" is the paper's; "snr" equals a mean squared error between noise predictions, "snr+1" one between
v-predictions (1/σ² where α² + σ² = 1), "flow" one between the velocities of flow matching (1/σ² = (1 + α/σ)² where
α = 1 − σ).
"""


LEAST_ALPHA_SQUARED = 1e-6
"""Below it there is no signal. Stable Diffusion's last timestep has 5e-3, one of `squaredcos_cap_v2` 2e-9."""


def has_zero_terminal_snr(config: Mapping[str, Any]) -> bool:
    """Whether a model predicts from noise alone at the last timestep (Lin et al. 2023, arXiv 2305.08891).

    Always of flow matching; never where the noise is predicted, as "snr" then weights all timesteps alike.

    Args:
        config: configuration of the model's scheduler, with the defaults of its class.
    """
    if is_flow(config):
        return True
    scheduler = make_scheduler("ddim", config)
    return scheduler.config.prediction_type != "epsilon" and bool(scheduler.alphas_cumprod[-1] < LEAST_ALPHA_SQUARED)


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """α and σ of T timesteps, from the image's end to the noise's; a timestep is meant by its index t.

    Attributes:
        alphas: `(T,)` float32.
        sigmas: `(T,)` float32.
        timesteps: `(T,)`, as the denoiser takes them.
        prediction_type: see `engine.predictions.x_from_prediction`.
        end: α and σ at t = −1, where the last step ends.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    prediction_type: str
    end: tuple[float, float] = (1.0, 0.0)

    @classmethod
    def of(cls, scheduler: SchedulerMixin, device: torch.device) -> NoiseSchedule:
        """From a diffusers scheduler.

        Variance preserving (α² + σ² = 1) by its `alphas_cumprod`, which is α²; of flow matching (α = 1 − σ) by the
        noise levels of as many steps as it has training timesteps, shifted as it shifts them.
        """
        if is_flow(scheduler.config):
            scheduler.set_timesteps(scheduler.config.num_train_timesteps)
            sigmas, timesteps = scheduler.sigmas[:-1].flip(0), scheduler.timesteps.flip(0)
            return cls(
                alphas=(1 - sigmas).to(device),
                sigmas=sigmas.to(device),
                timesteps=timesteps.to(device),
                prediction_type="flow_prediction",
            )
        alphas_cumprod = scheduler.alphas_cumprod.double()
        # Of many models the last step of a sampler ends at a little noise (`set_alpha_to_one`).
        end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        return cls(
            alphas=alphas_cumprod.sqrt().float().to(device),
            sigmas=(1 - alphas_cumprod).sqrt().float().to(device),
            timesteps=torch.arange(len(alphas_cumprod), device=device),
            prediction_type=scheduler.config.prediction_type,
            end=(end**0.5, (1 - end) ** 0.5),
        )

    def __len__(self) -> int:
        return len(self.alphas)

    def at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ at timesteps `(B,)`, each `(B, 1, 1, 1)`; at t = −1 those of `end`."""
        clean = (t < 0)[:, None, None, None]
        alpha, sigma = self.alphas[t.clamp(min=0)], self.sigmas[t.clamp(min=0)]
        return (
            torch.where(clean, self.end[0], alpha[:, None, None, None]),
            torch.where(clean, self.end[1], sigma[:, None, None, None]),
        )

    def half_log_snr(self, *timesteps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Half of λ, log(α / σ), at each of several timesteps `(B,)`, as `(B, 1, 1, 1)`."""
        return tuple((alpha / sigma).log() for alpha, sigma in (self.at(t.clamp(min=0)) for t in timesteps))

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z_t = α x + σ ε."""
        alpha, sigma = self.at(t)
        return alpha * x + sigma * noise


def guidance_weight(guidance: torch.Tensor) -> torch.Tensor:
    """1 / (w − 1)² for scales `(B,)`: what the student must learn, x̂_w − x̂_1, grows as w − 1.

    w − 1 is taken to be at least 0.5, or the weight of a range's lower end would explode.
    """
    return (guidance - 1).clamp(min=0.5).square().reciprocal()


def distillation_loss(
    student_x: torch.Tensor, teacher_x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, weight: str
) -> torch.Tensor:
    """Equation (4) for each sample: ω(λ_t) ‖x̂_{θ+Δθ}(z_t, c) − x̂_w(z_t)‖², the norm as a mean over elements, `(B,)`.

    The teacher's x̂ is that of equation (3); `weight` is a key of `LOSS_WEIGHTS`.
    """
    snr = (alpha / sigma).square()
    squared = (student_x - teacher_x).square().mean(dim=(1, 2, 3), keepdim=True)
    return (LOSS_WEIGHTS[weight](snr) * squared)[:, 0, 0, 0]


def ddim_step(
    z_t: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    alpha_next: torch.Tensor,
    sigma_next: torch.Tensor,
) -> torch.Tensor:
    """One deterministic DDIM step (Song et al. 2021, eq. 12 with η = 0), each sample between its own timesteps.

    Returns:
        z at the next timestep: α' x̂ + σ' ε̂ with ε̂ = (z_t − α x̂) / σ.
    """
    return alpha_next * x + sigma_next * (z_t - alpha * x) / sigma


def x_from_ddim_step(
    z_t: torch.Tensor,
    z_next: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    alpha_next: torch.Tensor,
    sigma_next: torch.Tensor,
) -> torch.Tensor:
    """The x̂ with which one `ddim_step` leads from z_t to z_next.

    x̃ = (z'' − (σ''/σ) z) / (α'' − (σ''/σ) α): the target of progressive distillation (Salimans & Ho 2022, algorithm 2),
    where z'' is two steps of the teacher away.
    """
    ratio = sigma_next / sigma
    return (z_next - ratio * z_t) / (alpha_next - ratio * alpha)


def dpm_solver_2m(
    x: torch.Tensor,
    x_previous: torch.Tensor,
    half_log_snr_previous: torch.Tensor,
    half_log_snr: torch.Tensor,
    half_log_snr_next: torch.Tensor,
) -> torch.Tensor:
    """DPM-Solver++(2M)'s estimate of x̂ over the coming step (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    A DDIM step with it in place of x̂ is a step of the second-order multistep solver. Half of log SNR is log(α / σ).
    """
    ratio = (half_log_snr - half_log_snr_previous) / (half_log_snr_next - half_log_snr)
    return x + (x - x_previous) / (2 * ratio)
