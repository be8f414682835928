"""Loss weights over the timesteps: min-SNR, soft min-SNR and P2.

Each weighting is a function of SNR and gamma, the weight of the epsilon loss; LOSS_WEIGHTINGS names
them, and config/choices.py lists the names that a setting may take. `loss_weights` gives the weight
that means the same for another prediction type.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import parametrization
from latentdiff.diffusion.schedules import Schedule


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Return min(1, gamma / SNR) (Hang et al. 2023, Sec. 3.4)."""
    return (gamma / snr).clamp(max=1)


def soft_min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Return gamma / (SNR + gamma) (Crowson et al. 2024)."""
    return gamma / (snr + gamma)


def p2(snr: Tensor, gamma: float = 1.0) -> Tensor:
    """Return (1 + SNR)^-gamma (Choi et al. 2022, Eq. 8)."""
    return (1 + snr) ** -gamma


LOSS_WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
}


def loss_weights(
    schedule: Schedule,
    t: Tensor,
    *,
    prediction_type: str,
    weighting: str = "none",
    gamma: float | None = None,
) -> Tensor:
    """Return the factor of each sample's loss, (B,) -> (B,) float32, positive and finite.

    weighting: "none" is 1 everywhere; those of LOSS_WEIGHTINGS weigh an error of x0 the same
    whatever is predicted. gamma: the weighting's own default unless given. One unit of x0 error is
    SNR units of epsilon error and SNR + 1 of v. At SNR = 0 this would give v and x0 weight 0 and
    leave the step where sampling begins untrained: there the weight is 1.
    """
    formulas = parametrization(prediction_type)
    if gamma is not None and gamma <= 0:
        raise ValueError(f"gamma is {gamma}: it must be positive")
    if weighting == "none":
        return torch.ones(t.shape, device=t.device)
    if weighting not in LOSS_WEIGHTINGS:
        known = ", ".join(("none", *LOSS_WEIGHTINGS))
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {known}")
    weigh = LOSS_WEIGHTINGS[weighting]
    alphas_cumprod = schedule.alphas_cumprod.gather(0, t)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = weigh(snr) if gamma is None else weigh(snr, gamma)
    weights = weights * formulas.eps_error(alphas_cumprod, snr)
    return torch.where(snr > 0, weights, 1.0).float()
