"""The thermodynamic view in the plane (Sohl-Dickstein et al. 2015, Fig. 1 and Sec. 2.5).

Data is a noisy swiss roll, of which density and entropy are known, so that the bound of a small
trained network can be compared with the truth: no model can describe the roll in fewer bits.
Multiplying the roll with a second distribution, "the first coordinate is about y", is sampled by
the gradient of its logarithm along the chain: inpainting in two dimensions.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config.options import RollOptions
from latentdiff.config.validation import check_ranges
from latentdiff.diffusion.bound import Estimate, estimate, evaluate_bound
from latentdiff.diffusion.ddpm import VARIANCE_TYPES, Model, p_sample_loop, p_sample_steps, q_sample
from latentdiff.diffusion.guidance import with_score_guidance
from latentdiff.diffusion.losses import hybrid_loss
from latentdiff.diffusion.schedules import Schedule, make_betas
from latentdiff.diffusion.theory.continuous_time import flow_bits
from latentdiff.diffusion.timesteps import stratify, uniform_timesteps
from latentdiff.evaluation.metrics.vlb import LEARNED, Z_95
from latentdiff.evaluation.report import plots

PREDICTION = "v_prediction"
SHOWN = (0.0, 0.1, 0.3, 1.0)  # times of each chain that are plotted, of T


@dataclass(frozen=True)
class SwissRoll:
    """x = curve(angle) + noise, the angle uniform over one and a half turns; variance about 1."""

    noise: float = 0.07
    first_angle: float = 1.5 * math.pi
    last_angle: float = 4.5 * math.pi
    num_points: int = 1000  # of the curve, where an integral over it is taken

    def curve(self, angle: Tensor) -> Tensor:
        """Return the points (N, 2) at angles (N,)."""
        return torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None] / 7

    def sample(self, num: int, *, generator: torch.Generator) -> Tensor:
        """Sample (num, 2), float32."""
        u = torch.rand(num, generator=generator)
        angle = self.first_angle + (self.last_angle - self.first_angle) * u
        return self.curve(angle) + self.noise * torch.randn(num, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, (N, 2) -> (N,) float64: the mean of Gaussians on the curve."""
        middles = (torch.arange(self.num_points, dtype=torch.float64) + 0.5) / self.num_points
        centres = self.curve(self.first_angle + (self.last_angle - self.first_angle) * middles)
        squared = torch.cdist(x.double(), centres).square()
        log_gauss = -0.5 * squared / self.noise**2 - math.log(2 * math.pi * self.noise**2)
        return log_gauss.logsumexp(1) - math.log(self.num_points)

    def grid(self) -> tuple[Tensor, float]:
        """Return points (N, 2) that cover the roll, half a noise apart, and the area of each."""
        reach, step = self.last_angle / 7 + 6 * self.noise, self.noise / 2
        line = torch.arange(-reach, reach, step, dtype=torch.float64)
        return torch.cartesian_prod(line, line), step**2

    def entropy_bits(self) -> float:
        """Return the differential entropy in bits per dimension, by quadrature over the plane."""
        points, area = self.grid()
        log_p = torch.cat([self.log_prob(part) for part in points.split(4096)])
        return float(-(log_p.exp() * log_p).sum() * area / 2 / math.log(2))


class TinyDenoiser(nn.Module):
    """Three hidden layers that predict v and the variance of a point (B, 2) at a timestep (B,)."""

    def __init__(self, *, num_timesteps: int, width: int = 128) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 4),
        )

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """Return (B, 4): v, then the place between the fixed log-variances."""
        phase = t[:, None].float() / self.num_timesteps * 2.0 ** torch.arange(8) * math.pi / 2
        output: Tensor = self.layers(torch.cat([xt.float(), phase.sin(), phase.cos()], 1))
        return output


def train_denoiser(
    roll: SwissRoll,
    schedule: Schedule,
    *,
    num_steps: int,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> TinyDenoiser:
    """Train on fresh samples by the hybrid loss (Nichol & Dhariwal 2021, Eq. 16)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    num_timesteps = schedule.num_timesteps
    model = TinyDenoiser(num_timesteps=num_timesteps)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    places = torch.arange(batch_size)
    for _ in range(num_steps):
        x0 = roll.sample(batch_size, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        u = stratify(torch.rand(batch_size, generator=generator), places, num_strata=batch_size)
        t = uniform_timesteps(u, num_timesteps)
        xt = q_sample(schedule, x0, t, eps)
        losses = hybrid_loss(schedule, model(xt, t), x0, xt, t, eps=eps, prediction_type=PREDICTION)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        decay.step()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Clouds:
    """The point clouds of the plot, (N, 2) each."""

    times: list[int]  # in [0, T]: how many steps from the data
    forward: list[Tensor]
    reverse: list[Tensor]  # at the same times
    posterior: Tensor  # sampled by the guided chain
    posterior_exact: Tensor  # the roll, resampled by the second distribution
    known: float  # mean of the second distribution over the first coordinate


def swiss_roll(options: RollOptions) -> tuple[dict[str, Any], Clouds]:
    """Train, bound and sample; return the figures as JSON values, and the clouds.

    ValueError for options out of range.
    """
    check_ranges(options)
    roll = SwissRoll()
    schedule = Schedule.from_betas(make_betas("cosine", options.num_timesteps))
    model = train_denoiser(roll, schedule, num_steps=options.max_steps, seed=options.seed)
    clouds = sample_clouds(roll, schedule, model, options)
    distance, chance = posterior_distance(clouds, roll, options)
    figures = bounds(roll, schedule, model, options) | {
        "posterior_distance": distance,
        "distance_without_guidance": chance,
        "options": vars(options),
    }
    return figures, clouds


def bounds(
    roll: SwissRoll, schedule: Schedule, model: Model, options: RollOptions
) -> dict[str, Any]:
    """Return the entropy and each bound on it in bits per dimension, with standard errors."""
    x0 = roll.sample(options.num_points, generator=torch.Generator().manual_seed(options.seed + 1))
    own = -roll.log_prob(x0) / 2 / math.log(2)  # of these points, so that their noise cancels
    figures: dict[str, Any] = {
        "entropy": roll.entropy_bits(),
        "gaussian": 0.5 * math.log2(2 * math.pi * math.e) + 0.25 * math.log2(x0.T.cov().det()),
    }
    for variance_type in VARIANCE_TYPES:
        total = evaluate_bound(
            schedule,
            _with_outputs(model, variance_type),
            x0,
            generator=torch.Generator().manual_seed(options.seed + 2),
            prediction_type=PREDICTION,
            variance_type=variance_type,
        ).total()
        figures[variance_type] = _figures(estimate(total), estimate(total - own[:, None]))
    few = x0[: max(100, options.num_points // 8)]
    flow = flow_bits(
        schedule,
        _with_outputs(model, "fixed_small"),
        few,
        generator=torch.Generator().manual_seed(options.seed + 3),
        prediction_type=PREDICTION,
    ).double()
    figures["flow"] = _figures(estimate(flow), estimate(flow - own[: len(few), None]))
    return figures


def _figures(total: Estimate, gap: Estimate) -> dict[str, float]:
    return {
        "bits_per_dim": total.mean,
        "se": total.se_images,
        "above_entropy": gap.mean,
        "above_entropy_se": gap.se_images,
    }


def _with_outputs(model: Model, variance_type: str) -> Model:
    """Return the model with the outputs that a variance type reads."""
    num_outputs = 4 if variance_type == LEARNED else 2
    return lambda xt, t: model(xt, t)[:, :num_outputs]


def sample_clouds(
    roll: SwissRoll, schedule: Schedule, model: Model, options: RollOptions
) -> Clouds:
    """Sample the chain forward, in reverse, and in reverse guided to the known coordinate."""
    generator = torch.Generator().manual_seed(options.seed + 4)
    num, last = options.num_points, schedule.num_timesteps
    times = [round(part * last) for part in SHOWN]
    x0 = roll.sample(num, generator=generator)
    forward = [
        q_sample(schedule, x0, torch.full((num,), k - 1), torch.randn(num, 2, generator=generator))
        if k
        else x0
        for k in times
    ]
    reverse = {last: torch.randn(num, 2, generator=generator)}
    for step in p_sample_steps(
        schedule,
        model,
        reverse[last],
        generator=generator,
        prediction_type=PREDICTION,
        variance_type=LEARNED,
    ):
        reverse[step.t] = step.sample.float()  # x_t is t steps from the data
    posterior = sample_posterior(schedule, model, options, generator=generator)
    many = roll.sample(100 * num, generator=generator)
    weights = (-0.5 * ((many[:, 0] - options.known) / options.tolerance) ** 2).exp()
    exact = many[torch.multinomial(weights, num, replacement=True, generator=generator)]
    return Clouds(times, forward, [reverse[k] for k in times], posterior, exact, options.known)


def sample_posterior(
    schedule: Schedule, model: Model, options: RollOptions, *, generator: torch.Generator
) -> Tensor:
    """Sample p(x0) r(x0) / Z, r = N(first coordinate; known, tolerance^2), (N, 2).

    The score at t is that of r widened by the variance of x0 given xt, 1 - alphas_cumprod for data
    of unit variance (J. Song et al. 2023, Pseudoinverse-guided diffusion, Eq. 7).
    """

    def log_r(x0: Tensor, t: Tensor) -> Tensor:
        variance = options.tolerance**2 + (1 - schedule.alphas_cumprod[t])
        return -0.5 * (x0[:, 0] - options.known).square() / variance

    guided = with_score_guidance(
        schedule, model, log_r, scale=1.0, prediction_type=PREDICTION, variance_type=LEARNED
    )
    return p_sample_loop(
        schedule,
        guided,
        torch.randn(options.num_points, 2, generator=generator),
        generator=generator,
        prediction_type=PREDICTION,
        variance_type=LEARNED,
    ).float()


def posterior_distance(
    clouds: Clouds, roll: SwissRoll, options: RollOptions
) -> tuple[float, float]:
    """Return the total variation of the second coordinate to the exact posterior's.

    Of the guided samples and, to compare, of unguided ones; in [0, 1], over bins of width 3 noise.
    """
    points, area = roll.grid()
    log_r = -0.5 * ((points[:, 0] - options.known) / options.tolerance) ** 2
    log_p = torch.cat([roll.log_prob(part) for part in points.split(4096)])
    mass = (log_p + log_r).exp() * area
    reach = float(points.max())
    edges = torch.arange(-reach, reach, 3 * roll.noise, dtype=torch.float64)
    exact = _shares(points[:, 1].contiguous(), edges, weights=mass / mass.sum())
    return tuple(  # type: ignore[return-value]  # two of them
        float((_shares(cloud[:, 1].double(), edges) - exact).abs().sum() / 2)
        for cloud in (clouds.posterior, clouds.reverse[0])
    )


def _shares(values: Tensor, edges: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the share of values by bin; values outside count in the end bins."""
    weights = torch.full_like(values, 1 / len(values)) if weights is None else weights
    sums = torch.zeros(len(edges) + 1, dtype=torch.float64)
    return sums.index_add_(0, torch.bucketize(values.contiguous(), edges), weights)


def plot_clouds(clouds: Clouds, figures: dict[str, Any], path: Path) -> Path:
    """Plot the chains, the posterior and the bounds; figures: of `swiss_roll`."""
    figure, axes = plots.new_figure(rows=3, columns=len(clouds.times), panel=(3.0, 3.0))
    rows = (
        ("forward, t = {}", clouds.forward, plots.BLUE),
        ("reverse, t = {}", clouds.reverse, plots.ORANGE),
    )
    for row, (title, shown, colour) in zip(axes, rows, strict=False):
        for axis, time, cloud in zip(row, clouds.times, shown, strict=True):
            _cloud(axis, cloud, title.format(time), colour=colour)
    exact, sampled, marginal, bars = axes[2]
    for axis, cloud, title, colour in (
        (exact, clouds.posterior_exact, "roll times second distribution", plots.BLUE),
        (sampled, clouds.posterior, "sampled by its gradient", plots.ORANGE),
    ):
        _cloud(axis, cloud, title, colour=colour)
        axis.axvline(clouds.known, color=plots.GREEN, linewidth=0.8)
    for cloud, label, colour in (
        (clouds.posterior_exact, "exact", plots.BLUE),
        (clouds.posterior, "sampled", plots.ORANGE),
    ):
        marginal.hist(
            cloud[:, 1].numpy(), bins=40, density=True, histtype="step", color=colour, label=label
        )
    marginal.set(title="second coordinate", yticks=[])
    marginal.legend(frameon=False, fontsize="small")
    _bars(bars, figures)
    return plots.save(figure, path)


def _cloud(axis: Any, cloud: Any, title: str, *, colour: str) -> None:
    axis.scatter(cloud[:, 0], cloud[:, 1], s=1, color=colour, alpha=0.4, linewidths=0)
    axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")


def _bars(axis: Any, figures: dict[str, Any]) -> None:
    """Plot each bound next to the entropy, which is its minimum."""
    names = ("learned_range", "fixed_small", "fixed_large", "flow")
    bits = [figures[name]["bits_per_dim"] for name in names]
    error = [Z_95 * figures[name]["se"] for name in names]
    axis.bar([name.replace("_", "\n") for name in names], bits, yerr=error, color=plots.BLUE)
    axis.axhline(figures["entropy"], color=plots.GREEN, label="entropy")
    axis.axhline(figures["gaussian"], color=plots.INK, linestyle=":", label="one Gaussian")
    axis.set(title="bits per dimension")
    axis.tick_params(axis="x", labelsize="x-small")
    axis.legend(frameon=False, fontsize="small")
