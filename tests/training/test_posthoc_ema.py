"""The files of power_ema/: written whole, read when asked for, dropped with an abandoned past."""

from pathlib import Path

import pytest
import torch

from latentdiff.training.optim.posthoc_ema import (
    SNAPSHOT_FOLDER,
    Snapshot,
    drop_snapshots_after,
    gamma_of,
    read_snapshot,
    read_snapshots,
    save_snapshot,
    snapshot_path,
)


def store(run: Path, step: int, sigma_rel: float = 0.1) -> Path:
    snapshot = Snapshot(step, gamma_of(sigma_rel), {"weight": torch.full((3, 2), float(step))})
    path = snapshot_path(run, step, sigma_rel)
    save_snapshot(snapshot, path)
    return path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / SNAPSHOT_FOLDER).iterdir())


def test_snapshot_comes_back_bitwise_with_step_and_width(tmp_path: Path) -> None:
    path = store(tmp_path, 7, 0.05)
    again = read_snapshot(path)
    assert (again.step, again.gamma) == (7, gamma_of(0.05))
    assert list(again.tensors) == ["weight"]
    assert torch.equal(again.tensors["weight"], torch.full((3, 2), 7.0))
    with pytest.raises(KeyError):
        again.tensors["bias"]
    assert names(tmp_path) == ["step-000000007-width-0.05.safetensors"]


def test_snapshots_are_read_in_order_and_other_names_ignored(tmp_path: Path) -> None:
    for step in (20, 10):
        store(tmp_path, step)
    (tmp_path / SNAPSHOT_FOLDER / "notes.txt").write_text("mine")
    assert [snapshot.step for snapshot in read_snapshots(tmp_path)] == [10, 20]


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="posthoc_ema"):
        read_snapshots(tmp_path)
    path = store(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"step-000000001-width-0\.1\.safetensors is damaged"):
        read_snapshot(path)


def test_dropping_spares_what_lies_before_and_what_is_not_ours(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        store(tmp_path, step)
    (tmp_path / SNAPSHOT_FOLDER / ".step-000000040-width-0.1.safetensors.ab.tmp").write_text("half")
    (tmp_path / SNAPSHOT_FOLDER / "notes.txt").write_text("mine")
    drop_snapshots_after(tmp_path, 20)
    assert names(tmp_path) == [
        "notes.txt",
        "step-000000010-width-0.1.safetensors",
        "step-000000020-width-0.1.safetensors",
    ]
    drop_snapshots_after(tmp_path / "nowhere", 0)


def test_failing_disk_is_an_oserror_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from latentdiff.training.optim import posthoc_ema

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(posthoc_ema, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path, 1)
    assert names(tmp_path) == []
