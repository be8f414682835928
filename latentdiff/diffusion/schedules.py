"""Noise schedules: the betas of the forward chain, the tables made of them, shorter chains.

Everything is float64; BETA_SCHEDULES names the schedules, as diffusers does where it has them (the
names that a setting may take are in config/choices.py). The chain of a run is the scheduler of
models/build.py, where diffusers computes its own schedules and the zero-SNR rescaling itself. The
straight path of rectified flow is a Schedule too (`rectified_flow`).
Sources: Ho et al. 2020 (linear), J. Song et al. 2021 (quadratic), Rombach et al. 2022 (the same, as
scaled linear), Nichol & Dhariwal 2021 (cosine, re-spacing), Xu et al. 2022 (sigmoid), Lin et al.
2024 (zero terminal SNR), Kingma et al. 2021 (logSNR).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

_MAX_BETA = 0.999  # Nichol & Dhariwal 2021, Sec. 3.2: keeps the last steps of the cosine finite


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return evenly spaced betas (Ho et al. 2020, who use 1e-4 to 0.02)."""
    _check_ends(beta_start, beta_end)
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return betas linear in sqrt(beta): Stable Diffusion's, and DDIM's own "quadratic"."""
    _check_ends(beta_start, beta_end)
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return roots**2


def cosine_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return betas whose alphas_cumprod is a squared cosine (Nichol & Dhariwal 2021, Eq. 17).

    beta_start and beta_end have no part in it.
    """
    s = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=_MAX_BETA)


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return betas along a logistic curve (Xu et al. 2022)."""
    _check_ends(beta_start, beta_end)
    curve = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid()
    return beta_start + (beta_end - beta_start) * curve


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "quadratic": scaled_linear_betas,
    "cosine": cosine_betas,
    "squaredcos_cap_v2": cosine_betas,  # diffusers' name
    "sigmoid": sigmoid_betas,
}


def make_betas(
    name: str,
    num_timesteps: int = 1000,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
) -> Tensor:
    """Return the betas of a schedule named in BETA_SCHEDULES, (T,) float64, each in (0, 1).

    Raises ValueError for an unknown name, fewer than one step, or not 0 < start <= end < 1.
    """
    if name not in BETA_SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(BETA_SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}: a chain needs at least 1 step")
    return BETA_SCHEDULES[name](num_timesteps, beta_start, beta_end)


def _check_ends(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start={beta_start}, beta_end={beta_end}: need 0 < beta_start <= beta_end < 1"
        )


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch a schedule so that its last step is pure noise (Lin et al. 2024, Alg. 1).

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
    """Return log(abar / (1 - abar)) (Kingma et al. 2021, Eq. 2); -inf for pure noise."""
    return torch.logit(alphas_cumprod)


def alphas_cumprod_from_log_snr(log_snr: Tensor) -> Tensor:
    """Return alphas_cumprod = sigmoid(logSNR), the inverse of log_snr."""
    return torch.sigmoid(log_snr)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The chain's coefficients, one a timestep, each (T,), in float64.

    Made by `from_betas`, where signal^2 + noise^2 = 1, or by `from_path`. Of another path betas is
    the variance that a step adds, alphas the square of its factor, and alphas_cumprod that of the
    DDPM chain with the same signal-to-noise ratio.
    """

    betas: Tensor
    alphas: Tensor  # 1 - betas
    alphas_cumprod: Tensor  # the paper's alpha-bar_t, SNR / (SNR + 1)
    sqrt_alphas_cumprod: Tensor  # signal
    sqrt_one_minus_alphas_cumprod: Tensor  # noise
    posterior_mean_x0: Tensor  # Eq. 7, the factor of x0
    posterior_mean_xt: Tensor  # Eq. 7, the factor of xt
    posterior_variance: Tensor  # Eq. 7, beta-tilde_t; 0 at t = 0
    log_variance_small: Tensor  # log beta-tilde_t; at t = 0 that of t = 1, as log 0 is infinite
    log_variance_large: Tensor  # log beta_t
    timesteps: Tensor  # given to the model: 0..T-1 unless the chain was re-spaced

    @classmethod
    def from_betas(cls, betas: Tensor, *, timesteps: Tensor | None = None) -> "Schedule":
        """Compute every table from betas, (T,) in (0, 1); the last may be 1 (zero terminal SNR)."""
        betas = betas.detach().double()
        _check_betas(betas)
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, 0)
        previous = torch.cat([torch.ones_like(betas[:1]), alphas_cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        first = variance[1:2] if len(betas) > 1 else betas
        if timesteps is None:
            timesteps = torch.arange(len(betas), device=betas.device)
        return cls(
            betas=betas,
            alphas=alphas,
            alphas_cumprod=alphas_cumprod,
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
            posterior_mean_x0=betas * previous.sqrt() / (1 - alphas_cumprod),
            posterior_mean_xt=alphas.sqrt() * (1 - previous) / (1 - alphas_cumprod),
            posterior_variance=variance,
            log_variance_small=torch.cat([first, variance[1:]]).log(),
            log_variance_large=betas.log(),
            timesteps=timesteps,
        )

    @classmethod
    def from_path(cls, signal: Tensor, noise: Tensor) -> "Schedule":
        """Compute every table of the path xt = signal x0 + noise eps (Kingma et al. 2021, App. A).

        signal, noise: (T,), of falling signal-to-noise ratio, noise above 0; of a DDPM chain this
        gives the tables of `from_betas`.
        """
        signal, noise = signal.double(), noise.double()
        before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
        noise_before = torch.cat([torch.zeros_like(noise[:1]), noise[:-1]])
        factor = signal / before
        added = noise**2 - (factor * noise_before) ** 2
        variance = added * (noise_before / noise) ** 2
        first = variance[1:2] if len(noise) > 1 else added
        return cls(
            betas=added,
            alphas=factor**2,
            alphas_cumprod=signal**2 / (signal**2 + noise**2),
            sqrt_alphas_cumprod=signal,
            sqrt_one_minus_alphas_cumprod=noise,
            posterior_mean_x0=before * added / noise**2,
            posterior_mean_xt=factor * (noise_before / noise) ** 2,
            posterior_variance=variance,
            log_variance_small=torch.cat([first, variance[1:]]).log(),
            log_variance_large=added.log(),
            timesteps=torch.arange(len(noise), device=noise.device),
        )

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    @property
    def is_flow(self) -> bool:
        """Whether this is the straight path, signal + noise = 1. It waits for the device."""
        total = self.sqrt_alphas_cumprod + self.sqrt_one_minus_alphas_cumprod
        return bool((total - 1).abs().max() < 1e-5)

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> "Schedule":
        """Move the tables to a device.

        dtype: as they are unless the device has no float64 (MPS). float32 saves casts in training.
        """
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "mps" else self.betas.dtype
        tables = {f.name: getattr(self, f.name) for f in fields(self)}
        return Schedule(
            **{
                name: (table.to(dtype) if table.is_floating_point() else table).to(device)
                for name, table in tables.items()
            }
        )


def rectified_flow(num_timesteps: int = 1000) -> Schedule:
    """Return the straight path xt = (1 - sigma) x0 + sigma eps, sigma = (t + 1) / T, in T steps.

    Liu et al. 2023, Eq. 1, with noise at the end of time. Its last step is pure noise. Samplers
    with `use_flow_sigmas` give the network t = floor(sigma T), the step nearest below.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}: a chain needs at least 1 step")
    sigmas = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return Schedule.from_path(1 - sigmas, sigmas)


def respace(schedule: Schedule, kept: Tensor) -> Schedule:
    """Return the shorter chain through some of the steps (Nichol & Dhariwal 2021, Eq. 19).

    kept: (K,) int64, ascending. The model still gets the timesteps it was trained on.
    """
    if schedule.is_flow:
        signal, noise = schedule.sqrt_alphas_cumprod[kept], schedule.sqrt_one_minus_alphas_cumprod
        shorter = Schedule.from_path(signal, noise[kept])
        return replace(shorter, timesteps=schedule.timesteps[kept])
    betas = betas_from_alphas_cumprod(schedule.alphas_cumprod[kept])
    return Schedule.from_betas(betas, timesteps=schedule.timesteps[kept])


def space_timesteps(spec: str, num_timesteps: int) -> Tensor:
    """Return the timesteps that a shorter chain keeps, ascending, (K,) int64 in [0, T).

    spec: "250" keeps 250 evenly spaced steps, first and last among them; "10,15,25" splits the
    chain into equal sections and keeps so many of each, noisiest last (Nichol & Dhariwal 2021);
    "ddim25" keeps 25 at one whole stride from 0 (J. Song et al. 2021, DDIM). Use with `respace`.
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


# --- Coefficients by timestep ---


def extract(table: Tensor, t: Tensor, *, like: Tensor) -> Tensor:
    """Return table[t] as (B, 1, ...), to multiply `like`, in its dtype but at least float32."""
    return table.gather(0, t).to(at_least_float32(like.dtype)).view(-1, *[1] * (like.ndim - 1))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: the given one, or float32 where that is narrower."""
    return torch.promote_types(dtype, torch.float32)


def _check_betas(betas: Tensor) -> None:
    inside = bool(((betas > 0) & (betas <= 1)).all()) and bool((betas[:-1] < 1).all())
    if betas.ndim != 1 or len(betas) == 0 or not inside:
        raise ValueError(
            "betas must be a non-empty 1-D tensor of values in (0, 1), of which only the last may"
            f" be 1; got shape {tuple(betas.shape)}"
            + (f", values in [{betas.min()}, {betas.max()}]" if betas.numel() else "")
        )
