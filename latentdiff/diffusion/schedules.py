"""Noise schedules: the betas of the forward chain, their logSNR, and shorter chains.

Everything is float64. Names are those of diffusers where it has them. Sources: Ho et al. 2020
(linear), Song et al. 2021 (quadratic), Rombach et al. 2022 (the same, as scaled linear), Nichol &
Dhariwal 2021 (cosine, re-spacing), Xu et al. 2022 (sigmoid), Lin et al. 2023 (zero terminal SNR),
Kingma et al. 2021 (logSNR).
"""

import math

import torch
from torch import Tensor

SCHEDULE_NAMES = (
    "linear",
    "scaled_linear",
    "quadratic",
    "squaredcos_cap_v2",
    "cosine",
    "sigmoid",
)

_MAX_BETA = 0.999  # Nichol & Dhariwal 2021, Sec. 3.2: keeps the last steps of the cosine finite


def make_betas(
    name: str,
    num_timesteps: int = 1000,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
) -> Tensor:
    """Return the betas of a named schedule, (T,) float64, each in (0, 1).

    "linear" is that of Ho et al. 2020, who use 1e-4 to 0.02. "scaled_linear" is linear in
    sqrt(beta): Stable Diffusion's, and the same as DDPM's and DDIM's own "quadratic". "sigmoid"
    runs along a logistic curve. "squaredcos_cap_v2", plainly "cosine", has no beta_start and
    beta_end.

    Raises ValueError for an unknown name, fewer than one step, or not 0 < start <= end < 1.
    """
    if name not in SCHEDULE_NAMES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULE_NAMES)}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}: a chain needs at least 1 step")
    if name in ("squaredcos_cap_v2", "cosine"):
        return _cosine_betas(num_timesteps)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start={beta_start}, beta_end={beta_end}: need 0 < beta_start <= beta_end < 1"
        )
    if name == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    if name == "sigmoid":
        curve = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid()
        return beta_start + (beta_end - beta_start) * curve
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return roots**2


def _cosine_betas(num_timesteps: int) -> Tensor:
    """Return betas whose alphas_cumprod is a squared cosine (Nichol & Dhariwal 2021, Eq. 17)."""
    s = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=_MAX_BETA)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch a schedule so that its last step is pure noise (Lin et al. 2023, Alg. 1).

    betas: (T,), T >= 2. Returns (T,) float64 whose last beta is exactly 1; the first one is
    unchanged.
    """
    if betas.numel() < 2:
        raise ValueError(f"zero terminal SNR needs at least 2 steps, got {betas.numel()}")
    roots = torch.cumprod(1 - betas.double(), 0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    return betas_from_alphas_cumprod(roots**2)


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """Return the betas whose running product of (1 - beta) is given. (T,) -> (T,) float64."""
    alphas_cumprod = alphas_cumprod.double()
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


def log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return log(abar / (1 - abar)) (Kingma et al. 2021, Eq. 1); -inf for pure noise."""
    return torch.logit(alphas_cumprod)


def alphas_cumprod_from_log_snr(log_snr: Tensor) -> Tensor:
    """Return alphas_cumprod = sigmoid(logSNR), the inverse of log_snr."""
    return torch.sigmoid(log_snr)


def space_timesteps(spec: str, num_timesteps: int) -> Tensor:
    """Return the timesteps that a shorter chain keeps, ascending, (K,) int64 in [0, T).

    spec: "250" keeps 250 evenly spaced steps, first and last among them; "10,15,25" splits the
    chain into equal sections and keeps so many of each, noisiest last (Nichol & Dhariwal 2021);
    "ddim25" keeps 25 at one whole stride from 0 (Song et al. 2021). Use with `ddpm.respace`.
    Raises ValueError for a spec that cannot be read or asks for more steps than there are.
    """
    counts = spec.removeprefix("ddim").split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise ValueError(f'steps {spec!r} cannot be read: write "250", "10,15,25" or "ddim25"')
    if spec.startswith("ddim"):
        return _whole_stride(int(counts[0]), num_timesteps)
    edges = [i * num_timesteps // len(counts) for i in range(len(counts) + 1)]
    sections = [
        _evenly_spaced(start, end, int(count))
        for start, end, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return torch.cat(sections)


def _whole_stride(count: int, num_timesteps: int) -> Tensor:
    for stride in range(1, num_timesteps + 1):
        steps = torch.arange(0, num_timesteps, stride)
        if len(steps) == count:
            return steps
    raise ValueError(f"no whole stride through {num_timesteps} timesteps gives {count} steps")


def _evenly_spaced(start: int, end: int, count: int) -> Tensor:
    if count > end - start:
        raise ValueError(
            f"cannot keep {count} steps of the {end - start} from {start} to {end - 1}"
        )
    if count == 1:
        return torch.tensor([start])
    return torch.linspace(start, end - 1, count, dtype=torch.float64).round().long()
