"""Averages of power-function form, and any such average after the fact.

Karras et al. 2024 (EDM2), section 3: the weight of step s in the average at step t grows as
s^gamma, so that the width is a fixed share sigma_rel of the training so far. Averages of two
widths, stored now and then, are enough to rebuild one of nearly any width later: the stored ones
are added up with the weights that bring their profiles closest to the wanted one (least squares).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.training.ema import COUNT, Averages

MAX_SIGMA_REL = 12**-0.5  # gamma = 0, the plain mean


class PowerEma(Averages):
    """The average whose profile at step t is p(s) = (gamma + 1) s^gamma / t^(gamma + 1) (Eq. 2)."""

    def __init__(
        self, module: nn.Module, *, gamma: float, device: torch.device | str | None = None
    ) -> None:
        if not gamma >= 0:
            raise ValueError(f"gamma is {gamma}, expected gamma >= 0")
        super().__init__(module, device=device)
        self.gamma = gamma

    def update(self, ok: Tensor | None = None) -> None:
        """Take in the weights after an optimiser step (Eq. 3), unless `ok` (0-dim) is 0.

        At update t the average keeps (1 - 1/t)^(gamma + 1) of itself: nothing at the first.
        """
        t = self.num_updates.float() + 1
        self.move(-torch.expm1((self.gamma + 1) * torch.log1p(-1 / t)), ok)

    def snapshot(self) -> "Snapshot":
        """Return copies on the CPU, for `reconstruct`; waits for the device."""
        tensors = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()
        }
        return Snapshot(step=int(self.num_updates), gamma=self.gamma, tensors=tensors)


@dataclass(frozen=True)
class Snapshot:
    """A stored average: updates taken in so far, gamma, and the tensors by parameter name."""

    step: int
    gamma: float
    tensors: Mapping[str, Tensor]


def gamma_of(sigma_rel: float) -> float:
    """Return the gamma whose profile has the standard deviation sigma_rel t (Alg. 2).

    sigma_rel: in (0, 12^-0.5], 0.05 to 0.15 as a rule.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL * (1 + 1e-12):
        raise ValueError(f"sigma_rel is {sigma_rel}, expected 0 < sigma_rel <= {MAX_SIGMA_REL:.4f}")
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return max(0.0, float(roots.real.max()))


def sigma_rel_of(gamma: float) -> float:
    """Return the width of a profile as a share of the training so far (Eq. 126)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def reconstruct(
    snapshots: Sequence[Snapshot], *, gamma: float, step: int | None = None
) -> dict[str, Tensor]:
    """Return the float32 average of width `gamma` at `step`, by default that of the last snapshot.

    Exact where a snapshot has that gamma and step, close to it where snapshots lie on both sides.
    """
    weights = reconstruction_weights(snapshots, gamma=gamma, step=step)
    names = set(snapshots[0].tensors)
    if odd := [s.step for s in snapshots if set(s.tensors) != names]:
        raise ValueError(f"the snapshot of step {odd[0]} has other parameters than the first one")
    used = [(w, s) for w, s in zip(weights.tolist(), snapshots, strict=True) if w != 0]
    rebuilt = {}
    for name, first in snapshots[0].tensors.items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for weight, snapshot in used:
            total.add_(snapshot.tensors[name].double(), alpha=weight)
        rebuilt[name] = total.float()
    return rebuilt


def reconstruction_weights(
    snapshots: Sequence[Snapshot], *, gamma: float, step: int | None = None
) -> np.ndarray:
    """Return the weight of each snapshot (Alg. 3), (N,) float64."""
    if not snapshots:
        raise ValueError("there is no snapshot to rebuild an average from")
    steps = np.array([float(snapshot.step) for snapshot in snapshots])
    gammas = np.array([snapshot.gamma for snapshot in snapshots])
    last = steps.max()
    wanted = last if step is None else float(step)
    if steps.min() < 1 or not 1 <= wanted <= last:
        raise ValueError(f"step is {step}, expected 1 to {last:.0f}, the last snapshot's")
    products = _product(steps[:, None], gammas[:, None], steps, gammas)  # (N, N)
    target = _product(steps, gammas, np.array(wanted), np.array(gamma))  # (N,)
    # Unit norms first: products of early and late profiles differ by orders of magnitude.
    norms = np.sqrt(np.diag(products))
    scaled = products / (norms[:, None] * norms)
    solution: np.ndarray = np.linalg.lstsq(scaled, target / norms, rcond=1e-12)[0]
    return solution / norms


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot as one safetensors file; a kill leaves none of that name."""
    temporary = path.with_name(f".{path.name}.saving")
    metadata = {"step": str(snapshot.step), "gamma": repr(snapshot.gamma)}
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def read_snapshot(path: Path) -> Snapshot:
    """Read what `save_snapshot` wrote. ValueError when it is something else."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if not {"step", "gamma"} <= set(metadata):
            raise ValueError(f"{path} is no snapshot of a power-function average")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    tensors.pop(COUNT, None)
    return Snapshot(int(metadata["step"]), float(metadata["gamma"]), tensors)


def _product(ta: np.ndarray, ga: np.ndarray, tb: np.ndarray, gb: np.ndarray) -> np.ndarray:
    """Integrate the product of two profiles over time (Alg. 3), in closed form.

    Of s^ga / ta^(ga + 1) and s^gb / tb^(gb + 1), both up to the earlier of ta and tb.
    """
    earlier, later = np.minimum(ta, tb), np.maximum(ta, tb)
    gamma_later = np.where(ta < tb, gb, ga)
    ratio = (earlier / later) ** gamma_later
    product: np.ndarray = (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * later)
    return product
