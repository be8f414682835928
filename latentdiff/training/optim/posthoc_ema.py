"""Averages of power-function form, and any such average after the fact.

Karras et al. 2024 (EDM2), section 3: the weight of step s in the average at step t grows as
s^gamma, so that the width is a fixed share sigma_rel of the training so far. Averages of two
widths, stored now and then, are enough to rebuild one of nearly any width later: the stored ones
are added up with the weights that bring their profiles closest to the wanted one (least squares).
The files they are stored in are snapshots.py's business.

The folder power_ema/ of a run: averages of power-function form as they were now and then.

    power_ema/step-000001000-width-0.05.safetensors

One file for each step and width, in float32: rebuilding a width adds snapshots up with weights of
both signs whose magnitudes sum to about 2, for narrow widths to 10 and more, and would enlarge half
precision's rounding, which is as large as what a fine-tune at a low rate moves the weights by.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.atomic import TEMPORARY, atomic_file
from latentdiff.training.optim.ema import Averages

MAX_SIGMA_REL = 12**-0.5  # gamma = 0, the plain mean
MAX_PROFILE_ERROR = 0.1  # of a rebuilt average


class PosthocEma(Averages):
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

    Exact where a snapshot has that gamma and step. ValueError where the closest profile is off by
    more than MAX_PROFILE_ERROR: another width or step is needed, or more snapshots.
    """
    weights, error = reconstruction_weights(snapshots, gamma=gamma, step=step)
    if error > MAX_PROFILE_ERROR:
        raise ValueError(_too_far(snapshots, gamma=gamma, step=step, error=error))
    names = set(snapshots[0].tensors)
    if odd := [s.step for s in snapshots if set(s.tensors) != names]:
        raise ValueError(f"the snapshot of step {odd[0]} has other parameters than the first one")
    rebuilt = {}
    for name, first in snapshots[0].tensors.items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for weight, snapshot in zip(weights.tolist(), snapshots, strict=True):
            total.add_(snapshot.tensors[name].double(), alpha=weight)
        rebuilt[name] = total.float()
    return rebuilt


def reconstruction_weights(
    snapshots: Sequence[Snapshot], *, gamma: float, step: int | None = None
) -> tuple[np.ndarray, float]:
    """Return the weight of each snapshot (Alg. 3), (N,) float64, and the error of their profile.

    Unlike the paper's, the weights add up to 1: its networks do not feel a factor on their weights,
    others do. The error is the L2 norm of the difference of the rebuilt and the wanted profile, as
    a share of the wanted one's. Where weights jitter independently from step to step, that is how
    far the rebuilt weights are from the wanted ones, in units of the jitter those have left.
    """
    if not snapshots:
        raise ValueError("there is no snapshot to rebuild an average from")
    steps = np.array([float(snapshot.step) for snapshot in snapshots])
    gammas = np.array([snapshot.gamma for snapshot in snapshots])
    last = steps.max()
    wanted = last if step is None else float(step)
    if steps.min() < 1 or not 1 <= wanted <= last:
        raise ValueError(
            f"step is {step}, expected 1 to {last:.0f}, the last snapshot's (skipped updates do "
            "not count)"
        )
    at, of = np.array(wanted), np.array(gamma)
    products = _product(steps[:, None], gammas[:, None], steps, gammas)  # (N, N)
    target = _product(steps, gammas, at, of)  # (N,)
    weights = _constrained_least_squares(products, target)
    square = float(_product(at, of, at, of))
    distance = square - 2 * weights @ target + weights @ products @ weights
    return weights, math.sqrt(max(0.0, distance) / square)


def _constrained_least_squares(products: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the x (N,) of sum 1 with the least x' products x - 2 target' x."""
    # Unit norms first: products of early and late profiles differ by orders of magnitude.
    norms = np.sqrt(np.diag(products))
    least = norms.min()
    ones = least / norms  # the constraint, in the same units
    matrix = np.zeros((len(norms) + 1, len(norms) + 1))  # with a Lagrange multiplier
    matrix[:-1, :-1] = products / (norms[:, None] * norms)
    matrix[:-1, -1] = matrix[-1, :-1] = ones
    right = np.append(target / norms, least)
    solution: np.ndarray = np.linalg.lstsq(matrix, right, rcond=1e-12)[0]
    return solution[:-1] / norms


def _product(ta: np.ndarray, ga: np.ndarray, tb: np.ndarray, gb: np.ndarray) -> np.ndarray:
    """Integrate the product of two profiles over time (Alg. 3), in closed form.

    Of s^ga / ta^(ga + 1) and s^gb / tb^(gb + 1), both up to the earlier of ta and tb.
    """
    earlier, later = np.minimum(ta, tb), np.maximum(ta, tb)
    gamma_later = np.where(ta < tb, gb, ga)
    ratio = (earlier / later) ** gamma_later
    product: np.ndarray = (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * later)
    return product


def _too_far(snapshots: Sequence[Snapshot], *, gamma: float, step: int | None, error: float) -> str:
    steps = sorted({snapshot.step for snapshot in snapshots})
    widths = sorted({f"{sigma_rel_of(snapshot.gamma):.3g}" for snapshot in snapshots})
    shown = [*steps[:4], "...", steps[-1]] if len(steps) > 6 else steps
    return (
        f"width {sigma_rel_of(gamma):.3g} at step {step or steps[-1]} cannot be rebuilt: the "
        f"closest mixture of the snapshots is off by {error:.0%}, expected {MAX_PROFILE_ERROR:.0%} "
        f"at the most. There are widths {', '.join(widths)} at steps {', '.join(map(str, shown))}; "
        "choose a step among these and a width nearer to these, or train with snapshots more often"
    )


SNAPSHOT_FOLDER = "power_ema"
KEY = "power_ema"  # one, as safetensors writes several in no fixed order
NAME = re.compile(r"step-(?P<step>\d{9,})-width-[0-9.e+-]+\.safetensors")


def snapshot_path(run_folder: Path, step: int, width: float) -> Path:
    """Return where the average of a width goes after optimiser step `step`."""
    return run_folder / SNAPSHOT_FOLDER / f"step-{step:09d}-width-{width:g}.safetensors"


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot as one safetensors file, whole or not at all. OSError when it cannot be."""
    facts = {
        "step": snapshot.step,
        "gamma": snapshot.gamma,
        "sigma_rel": round(sigma_rel_of(snapshot.gamma), 6),
    }
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: json.dumps(facts)})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_snapshot(path: Path) -> Snapshot:
    """Open what `save_snapshot` wrote; a tensor is read when it is asked for.

    ValueError when it is something else or damaged.
    """
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
    metadata = file.metadata() or {}
    if KEY not in metadata:
        raise ValueError(f"{path} is no snapshot of a power-function average")
    facts = json.loads(metadata[KEY])
    return Snapshot(facts["step"], facts["gamma"], _Tensors(file))


def read_snapshots(run_folder: Path) -> list[Snapshot]:
    """Open all snapshots of a run, by step and width. FileNotFoundError when it has none."""
    paths = sorted(path for path, _ in _stored(run_folder))
    if not paths:
        raise FileNotFoundError(
            f"{run_folder / SNAPSHOT_FOLDER} holds no snapshot: the run needs "
            "train.posthoc_ema_every_steps and train.posthoc_ema_sigma_rel, for example "
            "--train.posthoc_ema_sigma_rel='[0.05, 0.1]'"
        )
    return [read_snapshot(path) for path in paths]


def drop_snapshots_after(run_folder: Path, step: int) -> None:
    """Delete what a run stored after the step that it now goes on from, and what it left half."""
    for path, at in list(_stored(run_folder)):
        if at > step:
            path.unlink()
    for path in (run_folder / SNAPSHOT_FOLDER).glob(TEMPORARY):
        path.unlink()


def _stored(run_folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the snapshots' files and steps; other names in the folder are ignored."""
    folder = run_folder / SNAPSHOT_FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            yield path, int(match["step"])


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file by name, each read at every access."""

    def __init__(self, file: safe_open) -> None:
        self._file, self._names = file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
