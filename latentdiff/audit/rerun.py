"""Train a model again from its bill of materials, and compare the weights.

On the same processor, threads and versions they are equal bit for bit; elsewhere sums are rounded
in another order, and training enlarges that.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

from latentdiff.audit.verify import Answer, Finding, StoredBill, config_of, read_bill
from latentdiff.training.bill.bill import Bill, tensors_digest, weight_files_below
from latentdiff.training.bill.materials import code_facts, machine_facts
from latentdiff.training.text_to_image.train_t2i import train

RERUN_BOUND = 0.01  # of the distance over the norm, where equal bits cannot be expected


class RerunStoppedError(RuntimeError):
    """A rerun that did not come to its end; status: its exit code."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the rerun was stopped (exit code {status})")
        self.status = status


def rerun(
    model: str, *, data: Sequence[str], base: str | None = None, bound: float = RERUN_BOUND
) -> Finding:
    """Train again with the bill's settings, and compare the weights with the model's.

    data, base: as of `verify`; a base model that the bill names by a hub id or as one that ships
    need not be given. bound: of the distance of all weights from the model's, over their norm,
    which counts where the processor, threads, code or versions are others. The rerun lives in a
    temporary folder. Raises RerunStoppedError after a signal, and what `train` raises.
    """
    stored = read_bill(model)
    with TemporaryDirectory(prefix="latentdiff-rerun-") as scratch:
        config = config_of(stored.bill, data=data, base=base, folder=Path(scratch))
        if (status := train(config)) != 0:
            raise RerunStoppedError(status)
        again = Path(config.output_dir) / stored.bill.artifact
        return _compare(stored, again, bound=bound)


def _compare(stored: StoredBill, again: Path, *, bound: float) -> Finding:
    files, root = _files(again)
    if tensors_digest(files, root=root) == stored.bill.weights:
        return Finding("rerun", "same", ["equal bit for bit"])
    own_files, own_root = _files(stored.place)
    distance = relative_distance(_tensors(own_files, own_root), _tensors(files, root))
    others = differing_circumstances(stored.bill)
    text = f"the weights' distance is {distance:.2g} of their norm"
    if not others:
        return Finding("rerun", "differs", [f"{text}, expected equal bits on this machine"])
    answer: Answer = "same" if distance <= bound else "differs"
    return Finding("rerun", answer, [f"{text}, allowed {bound:g} with another {', '.join(others)}"])


def differing_circumstances(bill: Bill) -> list[str]:
    """Return what equal bits depend on and is another now than when the model was trained."""
    machine = bill.code["machine"]
    now = code_facts() | {
        "machine": machine_facts(
            device=_device(),
            num_threads=torch.get_num_threads(),
            num_processes=1,
        )
    }
    code = [name for name in ("source", "python", "libraries") if now[name] != bill.code[name]]
    found = now["machine"].items()
    return code + [name.replace("num_", "number of ") for name, v in found if machine[name] != v]


def _device() -> str:
    from accelerate import PartialState

    return str(PartialState().device.type)


def relative_distance(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> float:
    """Return the Euclidean distance of two models' weights over the norm of the first; inf where
    their tensors have other names or shapes.
    """
    shapes = [{name: one.shape for name, one in weights.items()} for weights in (before, now)]
    if shapes[0] != shapes[1]:
        return math.inf
    squares = [
        ((one.double() - now[name].double()).square().sum(), one.double().square().sum())
        for name, one in before.items()
    ]
    apart, norm = (float(sum(part)) for part in zip(*squares, strict=True))
    return math.sqrt(apart / norm) if norm else (0.0 if not apart else math.inf)


def _files(place: Path) -> tuple[list[Path], Path]:
    return (weight_files_below(place), place) if place.is_dir() else ([place], place.parent)


def _tensors(files: Sequence[Path], root: Path) -> dict[str, Any]:
    found = {}
    for path in files:
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no dict
                found[f"{path.parent.relative_to(root)}/{name}"] = opened.get_tensor(name)
    return found
