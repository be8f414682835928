"""Changes to the noise of a training step: offset noise and input perturbation.

Random numbers are arguments, so that the caller decides where they come from. Both changes are off
unless the settings `diffusion.offset_noise` and `diffusion.input_perturbation` ask for them.
"""

from torch import Tensor

from latentdiff.diffusion.schedules import Schedule, extract


def offset_noise(eps: Tensor, channel_noise: Tensor, *, strength: float) -> Tensor:
    """Add noise that is constant over an image, so that its mean can change (Guttenberg 2023).

    eps: (B, C, h, w); channel_noise: (B, C, 1, 1), standard normal. The result is also the
    noise that the model must predict.
    """
    return eps + strength * channel_noise


def perturb_input(
    schedule: Schedule, xt: Tensor, t: Tensor, noise: Tensor, *, strength: float
) -> Tensor:
    """Add noise to xt that its target does not have, against exposure bias (Ning et al. 2023).

    xt, noise: (B, ...), noise a second standard normal sample. The paper (Alg. 1) uses strength
    0.1.
    """
    return xt + strength * extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=xt) * noise
