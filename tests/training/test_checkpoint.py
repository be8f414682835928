"""A checkpoint comes back bit for bit, and nothing that happens to the disk passes for one."""

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentdiff import atomic
from latentdiff.training import checkpoint
from latentdiff.training.checkpoint import (
    BackgroundSaver,
    CheckpointError,
    branch_at,
    config_hash,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    read_lineage,
    save_checkpoint,
    snapshot,
    validate_checkpoint,
)

Tensors = dict[str, dict[str, torch.Tensor]]


def make_tensors(step: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 4, generator=generator)
    return {
        "unet": {"weight": weight, "half": weight.bfloat16(), "turned": weight.t()},
        "optimizer": {"step": torch.tensor(float(step)), "seen": torch.arange(5)},
        "empty": {},
    }


def save(root: Path, step: int = 1, **changed: object) -> Path:
    state = changed.get("state", {"epoch": 2, "best": 0.1 + 0.2, "names": ["a"], "none": None})
    tensors = changed.get("tensors", make_tensors(step))
    return save_checkpoint(
        root,
        step=step,
        tensors=tensors,
        state=state,
        config_hash="abc",
        world_size=2,
        lineage=changed.get("lineage", ()),
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    loaded = load_checkpoint(path)
    assert path.name == "step-000000012"
    assert (loaded.step, loaded.world_size, loaded.config_hash) == (12, 2, "abc")
    assert loaded.state == {"epoch": 2, "best": 0.1 + 0.2, "names": ["a"], "none": None}
    assert loaded.tensors.keys() == make_tensors().keys()
    for part, named in make_tensors(12).items():
        assert loaded.tensors[part].keys() == named.keys()
        for name, tensor in named.items():
            assert loaded.tensors[part][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[part][name], tensor)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path) -> None:
    table = torch.randn(6, 3)
    tensors = {"m": {"a": table, "b": table, "c": table[2:]}}
    loaded = load_checkpoint(save(tmp_path, tensors=tensors))
    assert all(torch.equal(loaded.tensors["m"][name], tensors["m"][name]) for name in "abc")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(truncate, "truncated"), (empty, "empty"), (flip_a_bit, "changed"), (Path.unlink, "missing")],
)
@pytest.mark.parametrize("file", ["unet.safetensors", "state.json"])
def test_spoilt_file_is_named_and_the_one_before_is_taken(
    tmp_path: Path, file: str, fault: Callable[[Path], None], message: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    fault(newer / file)
    with pytest.raises(CheckpointError, match=rf"{newer.name}: {file} (is|was) {message}"):
        load_checkpoint(newer)
    found, skipped = newest_valid(tmp_path)
    assert found == older
    assert len(skipped) == 1
    assert file in skipped[0]


@pytest.mark.parametrize("fault", [truncate, empty, flip_a_bit, Path.unlink])
def test_spoilt_manifest_is_refused(tmp_path: Path, fault: Callable[[Path], None]) -> None:
    path = save(tmp_path)
    fault(path / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        validate_checkpoint(path)


def test_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 2', '"world_size": 4'))
    with pytest.raises(CheckpointError, match="was changed"):
        validate_checkpoint(path)


def test_renamed_checkpoint_is_refused_for_another_step(tmp_path: Path) -> None:
    path = save(tmp_path, 1).rename(tmp_path / "step-000000009")
    with pytest.raises(CheckpointError, match="renamed: it holds step 1"):
        validate_checkpoint(path)
    copied = path.rename(tmp_path / "the-good-one")
    assert load_checkpoint(copied).step == 1


def test_other_names_are_ignored_and_absent_paths_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (tmp_path / "step-7").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-000000008").write_text("a file")
    assert newest_valid(tmp_path) == (path, [])
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "step-000000099")
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint(tmp_path / "notes.txt")


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, state={"try": 1})
    path = save(tmp_path, 1, state={"try": 2})
    assert load_checkpoint(path).state == {"try": 2}
    assert names(tmp_path) == [path.name]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    replaced = path.rename(path.with_name(path.name + ".replaced"))
    found, skipped = newest_valid(tmp_path)
    assert (found, skipped) == (replaced, [])
    assert load_checkpoint(replaced).step == 5
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-000000005", "step-000000006"]


def test_leftovers_of_dead_saves_are_cleaned_and_live_ones_stay(tmp_path: Path) -> None:
    (tmp_path / ".saving-0123").mkdir()
    (tmp_path / ".saving-0123" / "unet.safetensors").write_text("half")
    with atomic.atomic_folder(tmp_path / "live") as live:
        assert newest_valid(tmp_path) == (None, [])
        path = save(tmp_path)
        assert names(tmp_path) == sorted([live.name, path.name])
        (live / "file").write_text("whole")
    assert (tmp_path / "live" / "file").read_text() == "whole"


@pytest.mark.parametrize(
    "state", [{"a": float("nan")}, {1: "a"}, {"a": {"b": torch.ones(1)}}, {"a": [Path("x")]}]
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: object) -> None:
    with pytest.raises(ValueError, match=r"JSON"):
        save(tmp_path, state=state)
    assert not tmp_path.exists() or names(tmp_path) == []


def test_part_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part"):
        save(tmp_path, tensors={"../unet": {}})


def in_child(task: Callable[[], None]) -> int:
    """Run a task in a forked child; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_full_disk_raises_and_keeps_what_was_there(tmp_path: Path) -> None:
    older = save(tmp_path, 1)

    def save_on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match=r"."):
            save(tmp_path, 2, tensors={"unet": {"weight": torch.zeros(100_000)}})

    assert in_child(save_on_a_full_disk) == 0
    assert newest_valid(tmp_path) == (older, [])
    assert names(tmp_path) == [older.name]


def test_failing_flush_raises_and_keeps_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, state={"try": 1})

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1, state={"try": 2})
    assert load_checkpoint(path).state == {"try": 1}
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("delay_ms", [0, 1, 2, 4, 7, 11, 16, 23])
def test_sigkill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path, delay_ms: int) -> None:
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        for step in range(2, 10_000):
            save(tmp_path, step)
            save(tmp_path, step, state={"again": step})
            prune_checkpoints(tmp_path, keep_last=1)
    while not any(path.name > "step-000000001" for path in tmp_path.glob("step-*")):
        time.sleep(0.001)
    time.sleep(delay_ms / 1000)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found, skipped = newest_valid(tmp_path)
    assert found is not None
    assert skipped == []
    loaded = load_checkpoint(found)
    assert torch.equal(
        loaded.tensors["unet"]["weight"], make_tensors(loaded.step)["unet"]["weight"]
    )
    path = save(tmp_path, loaded.step + 1)
    prune_checkpoints(tmp_path, keep_last=1)
    assert names(tmp_path) == [path.name]


def test_prune_keeps_the_last_the_regular_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step)
    losses = {2: 0.3, 3: 0.2, 5: 0.2, 7: 0.4, 99: 0.1}  # step 99 was never saved
    removed = prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=4, losses=losses)
    assert [int(name[-9:]) for name in names(tmp_path)] == [3, 4, 8, 9, 10]
    assert len(removed) == 5
    with pytest.raises(ValueError, match="keep_last is 0"):
        prune_checkpoints(tmp_path, keep_last=0)


def test_prune_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    truncate(save(tmp_path, 2) / "unet.safetensors")
    assert prune_checkpoints(tmp_path, keep_last=1) == []
    assert newest_valid(tmp_path)[0] == good


def test_prune_neither_counts_nor_touches_another_branch(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    lineage = branch_at(tmp_path / "step-000000002")
    for step in (4, 5):
        save(tmp_path, step, lineage=lineage)
    save(tmp_path, 6, lineage=((1, "another"),))
    removed = prune_checkpoints(tmp_path, keep_last=1, lineage=lineage)
    assert [path.name[-1] for path in removed] == ["1", "4"]
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "5", "6"]
    assert read_lineage(tmp_path / "step-000000005") == lineage


def test_config_hash_ignores_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": {"c": 2}}) == config_hash({"b": {"c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_background_save_runs_beside_and_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    tensors = make_tensors(1)
    copies = snapshot(tensors)
    may_go_on = threading.Event()
    saver = BackgroundSaver()

    def task() -> None:
        may_go_on.wait()
        save(tmp_path, 1, tensors=copies)

    saver.submit(task)
    assert saver.busy
    tensors["unet"]["weight"].zero_()
    may_go_on.set()
    saver.wait()
    assert not saver.busy
    assert saver.check() is None
    loaded = load_checkpoint(tmp_path / "step-000000001")
    assert torch.equal(loaded.tensors["unet"]["weight"], make_tensors(1)["unet"]["weight"])


def test_background_failure_is_told_once_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = BackgroundSaver()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail)
        saver.submit(lambda: save(tmp_path, 1))
        saver.wait()
    failure = saver.check()
    assert isinstance(failure, OSError)
    assert saver.check() is None
    saver.submit(lambda: save(tmp_path, 2))
    saver.wait()
    assert saver.check() is None
    assert names(tmp_path) == ["step-000000002"]


def test_whole_checkpoint_can_be_copied_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path / "a", 4)
    copied = shutil.copytree(path, tmp_path / "b" / path.name)
    assert newest_valid(tmp_path / "b") == (copied, [])
