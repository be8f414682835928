"""Post-hoc EMA: averages of power-function form, and any such average after the fact.

Karras et al. 2024 (EDM2), section 3: the weight of step s in the average at step t grows as
s^gamma, so that its standard deviation is a fixed share sigma_rel of the training so far. Snapshots
of averages of two sigma_rel are enough to reconstruct one of nearly any sigma_rel later: the sum
whose profile is closest to the target's (least squares). Ours, as EDM2's reference code is no
package and its licence excludes commercial use.

The folder power_ema/ of a run holds the snapshots, one file for each step and sigma_rel:

    power_ema/step-000001000-width-0.05.safetensors

They are float32: a reconstruction sums snapshots with weights of both signs whose magnitudes sum to
about 2, for a small sigma_rel to 10 and more, and would enlarge half precision's rounding, which is
as large as the change of the weights in a fine-tune at a low learning rate.
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
MAX_PROFILE_ERROR = 0.1  # of a reconstructed average
SNAPSHOT_FOLDER = "power_ema"
METADATA_KEY = "power_ema"  # one, as safetensors writes several in no fixed order
SNAPSHOT_NAME = re.compile(r"step-(?P<step>\d{9,})-width-[0-9.e+-]+\.safetensors")


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
        """Average the weights in after an optimiser step (Eq. 3), unless `ok` (0-dim) is 0.

        At update t the average keeps (1 - 1/t)^(gamma + 1) of itself: nothing at the first.
        """
        t = self.num_updates.float() + 1
        self.lerp_(-torch.expm1((self.gamma + 1) * torch.log1p(-1 / t)), ok)


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its number of updates, gamma, and the tensors by parameter name."""

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
    """Return the standard deviation of a profile as a share of the training so far (Eq. 126)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def reconstruct(
    snapshots: Sequence[Snapshot], *, gamma: float, step: int | None = None
) -> dict[str, Tensor]:
    """Return the float32 average of `gamma` at `step`, by default that of the last snapshot.

    Exact where a snapshot has that gamma and step. ValueError where the closest profile is off by
    more than MAX_PROFILE_ERROR: another gamma or step is needed, or more snapshots.
    """
    weights, error = reconstruction_weights(snapshots, gamma=gamma, step=step)
    if error > MAX_PROFILE_ERROR:
        raise ValueError(_too_far(snapshots, gamma=gamma, step=step, error=error))
    names = set(snapshots[0].tensors)
    if odd := [s.step for s in snapshots if set(s.tensors) != names]:
        raise ValueError(f"the snapshot of step {odd[0]} has other parameters than the first one")
    reconstructed = {}
    for name, first in snapshots[0].tensors.items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for weight, snapshot in zip(weights.tolist(), snapshots, strict=True):
            total.add_(snapshot.tensors[name].double(), alpha=weight)
        reconstructed[name] = total.float()
    return reconstructed


def reconstruction_weights(
    snapshots: Sequence[Snapshot], *, gamma: float, step: int | None = None
) -> tuple[np.ndarray, float]:
    """Return the weight of each snapshot (Alg. 3), (N,) float64, and the error of their profile.

    Unlike the paper's, the weights add up to 1: its networks do not depend on the scale of their
    weights, others do. The error is the L2 norm of the difference of the reconstructed and the
    target profile, as a share of the target's. Where weights jitter independently from step to
    step, it is the distance of the reconstructed weights from the target's, in units of the jitter
    that the target has left.
    """
    if not snapshots:
        raise ValueError("there is no snapshot to reconstruct an average from")
    steps = np.array([float(snapshot.step) for snapshot in snapshots])
    gammas = np.array([snapshot.gamma for snapshot in snapshots])
    last = steps.max()
    target_step = last if step is None else float(step)
    if steps.min() < 1 or not 1 <= target_step <= last:
        raise ValueError(
            f"step is {step}, expected 1 to {last:.0f}, the last snapshot's (skipped updates do "
            "not count)"
        )
    at, of = np.array(target_step), np.array(gamma)
    products = _product(steps[:, None], gammas[:, None], steps, gammas)  # (N, N)
    target = _product(steps, gammas, at, of)  # (N,)
    weights = _constrained_least_squares(products, target)
    square = float(_product(at, of, at, of))
    distance = square - 2 * weights @ target + weights @ products @ weights
    return weights, math.sqrt(max(0.0, distance) / square)


def _constrained_least_squares(products: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the x (N,) of sum 1 that minimises x' products x - 2 target' x."""
    # Unit norms first: products of early and late profiles differ by orders of magnitude.
    norms = np.sqrt(np.diag(products))
    smallest = norms.min()
    ones = smallest / norms  # the constraint, in the same units
    matrix = np.zeros((len(norms) + 1, len(norms) + 1))  # with a Lagrange multiplier
    matrix[:-1, :-1] = products / (norms[:, None] * norms)
    matrix[:-1, -1] = matrix[-1, :-1] = ones
    right = np.append(target / norms, smallest)
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
    sigmas = sorted({f"{sigma_rel_of(snapshot.gamma):.3g}" for snapshot in snapshots})
    shown = [*steps[:4], "...", steps[-1]] if len(steps) > 6 else steps
    return (
        f"sigma_rel {sigma_rel_of(gamma):.3g} at step {step or steps[-1]} cannot be reconstructed: "
        f"the closest sum of the snapshots is off by {error:.0%}, expected at most "
        f"{MAX_PROFILE_ERROR:.0%}. There are sigma_rel {', '.join(sigmas)} at steps "
        f"{', '.join(map(str, shown))}; choose one of these steps and a sigma_rel nearer to these, "
        "or take snapshots more often"
    )


def snapshot_path(run_folder: Path, step: int, sigma_rel: float) -> Path:
    """Return the file of the average of a sigma_rel after optimiser step `step`."""
    return run_folder / SNAPSHOT_FOLDER / f"step-{step:09d}-width-{sigma_rel:g}.safetensors"


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
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(facts)})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_snapshot(path: Path) -> Snapshot:
    """Open a file of `save_snapshot`; its tensors are read at each access.

    ValueError when the file is another or damaged.
    """
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
    metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is no snapshot of a post-hoc EMA")
    facts = json.loads(metadata[METADATA_KEY])
    return Snapshot(facts["step"], facts["gamma"], _Tensors(file))


def read_snapshots(run_folder: Path) -> list[Snapshot]:
    """Open all snapshots of a run, by step and sigma_rel. FileNotFoundError when it has none."""
    paths = sorted(path for path, _ in _stored(run_folder))
    if not paths:
        raise FileNotFoundError(
            f"{run_folder / SNAPSHOT_FOLDER} holds no snapshot: the run needs "
            "train.posthoc_ema_every_steps and train.posthoc_ema_sigma_rel, for example "
            "--train.posthoc_ema_sigma_rel='[0.05, 0.1]'"
        )
    return [read_snapshot(path) for path in paths]


def drop_snapshots_after(run_folder: Path, step: int) -> None:
    """Delete the snapshots after the step that a run resumes from, and unfinished files."""
    for path, at in list(_stored(run_folder)):
        if at > step:
            path.unlink()
    for path in (run_folder / SNAPSHOT_FOLDER).glob(TEMPORARY):
        path.unlink()


def _stored(run_folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the snapshots' files and steps; other names in the folder are ignored."""
    folder = run_folder / SNAPSHOT_FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := SNAPSHOT_NAME.fullmatch(path.name):
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
