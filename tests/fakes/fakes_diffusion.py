"""A closed-form world: mixtures of Gaussians, of which the best denoiser is known exactly."""

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import Model
from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.theory.continuous_time import angle_at


class Mixture:
    """x0 ~ sum_k weights_k N(means_k, diag variances_k). weights: (K,); the others (K, D)."""

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        self.weights, self.means, self.variances = (x.double() for x in (weights, means, variances))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k].sqrt() * noise

    def _joint(self, xt: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """log weights_k N(xt; ...) (B, K), and the mean of x0 in each component (B, K, D)."""
        abar = abar.view(-1, 1, 1)
        gap = xt[:, None] - abar.sqrt() * self.means
        variance = abar * self.variances + 1 - abar
        log_joint = self.weights.log() - 0.5 * (
            (gap.square() / variance + (2 * torch.pi * variance).log()).sum(-1)
        )
        return log_joint, self.means + abar.sqrt() * self.variances / variance * gap

    def log_prob(self, xt: Tensor, abar: Tensor) -> Tensor:
        """log q(xt) in nats where alphas_cumprod is abar, (B, D), (B,) -> (B,)."""
        return self._joint(xt, abar)[0].logsumexp(1)

    def denoise(self, xt: Tensor, abar: Tensor) -> Tensor:
        """E[x0 | xt], (B, D)."""
        log_joint, means = self._joint(xt, abar)
        return (log_joint.softmax(1)[..., None] * means).sum(1)

    def model(self, schedule: Schedule, prediction_type: str) -> Model:
        """The best denoiser as a model of a schedule, at whole and at real timesteps."""

        def model(xt: Tensor, t: Tensor) -> Tensor:
            phi = angle_at(schedule, t.double())
            signal, noise = phi.cos()[:, None], phi.sin()[:, None]
            total = signal + noise
            abar = torch.where(phi < torch.pi / 2 - 1e-12, phi.cos().square(), 0.0)
            if prediction_type == "flow_prediction":
                return (xt - self.denoise(xt.double() * total, abar)) * total / noise
            x0 = self.denoise(xt.double(), abar)
            if prediction_type == "sample":
                return x0
            eps = (xt - signal * x0) / noise
            return eps if prediction_type == "epsilon" else signal * eps - noise * x0

        return model


def gaussian(mean: list[float], variance: list[float]) -> Mixture:
    """One Gaussian of diagonal covariance."""
    return Mixture(torch.ones(1), torch.tensor([mean]), torch.tensor([variance]))


def three_blobs() -> Mixture:
    """Three blobs in the plane, no two alike."""
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[-1.0, 0.2], [0.9, 0.9], [0.6, -1.1]]),
        torch.tensor([[0.05, 0.2], [0.1, 0.04], [0.15, 0.15]]),
    )


def quadrature(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """E f(a, b) over independent standard normals, exact for quadratic f. f: (9, 1) x 2 -> (9,)."""
    nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    a, b = (x.reshape(9, 1) for x in torch.meshgrid(nodes, nodes, indexing="ij"))
    return (f(a, b) * torch.outer(weights, weights).reshape(9)).sum()
