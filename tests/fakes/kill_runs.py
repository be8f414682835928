"""Kill trainings at random moments, most of them while they save, and see that nothing is lost.

    python tests/fakes/kill_runs.py 100 [SEED]

After each kill the newest checkpoint must be valid and no older than one that was there before; the
resumed run must end in the state of a run that nothing stopped, bit for bit. Prints one JSON line.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from fakes_faults import Child, assert_same_state, sheet, start
from fakes_training import make_world

from latentdiff.training.checkpoint import newest_valid
from latentdiff.training.text_to_image import train_t2i as text_to_image  # noqa: F401 - imported once, for every fork

SETTINGS = {"train__checkpoint_every_steps": 1, "train__keep_checkpoints": 2}
FSYNC = os.fsync
SHARE_IN_SAVES = 0.6  # of the kills that are aimed at a save


def kill_text_to_image_runs(
    num_kills: int, folder: Path, *, seed: int = 0, num_steps: int = 40
) -> dict[str, float]:
    """Kill text-to-image trainings, as `kill_runs`; their sample sheets must be equal too."""
    world, settings = make_world(folder), SETTINGS | {"train__max_steps": num_steps}
    starter = partial(start, world, **settings)
    figures = kill_runs(starter, num_kills, folder, seed=seed, num_steps=num_steps)
    for run in folder.glob("run*[0-9]"):
        assert sheet(run, num_steps) == sheet(folder / "whole", num_steps)
    return figures


@contextmanager
def _waiting_for_the_disk() -> Iterator[None]:
    """Let saves take as long as a user's, also in tests, which otherwise flush nothing."""
    flush, os.fsync = os.fsync, FSYNC
    try:
        yield
    finally:
        os.fsync = flush


@_waiting_for_the_disk()
def kill_runs(
    start: Callable[[Path], Child],
    num_kills: int,
    folder: Path,
    *,
    seed: int = 0,
    num_steps: int,
) -> dict[str, float]:
    """Kill trainings in `folder` num_kills times over as many runs as that takes; return figures.

    start: starts or resumes the training of a run folder, of num_steps. AssertionError when a
    checkpoint is lost, or a resumed run ends in another state.
    """
    rng, started = random.Random(seed), time.monotonic()
    whole = start(folder / "whole")
    assert whole.wait() == 0, whole.output()
    kills, in_saves, runs, starts = 0, 0, 0, 0
    while kills < num_kills:
        run = folder / f"run{runs}"
        while True:
            known = _newest_step(run)
            child = start(run)
            starts += 1
            if kills == num_kills or not _kill(child, run, rng):
                break
            kills += 1
            in_saves += any((run / "checkpoints").glob(".saving-*"))
            assert _newest_step(run) >= known, f"lost step {known} of {run}"
        assert child.wait() == 0, child.output()
        assert_same_state(run, folder / "whole", step=num_steps)
        runs += 1
    return {
        "kills": kills,
        "kills_in_a_save": in_saves,
        "runs": runs,
        "starts": starts,
        "lost_checkpoints": 0,  # else an AssertionError
        "other_final_states": 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def _kill(child: Child, run: Path, rng: random.Random) -> bool:
    """Kill a trainer at a moment of chance; False when it came to its end before."""
    aimed, wait_s = rng.random() < SHARE_IN_SAVES, rng.uniform(0.2, 2.5)
    for _ in range(rng.randint(1, 6) if aimed else 0):
        if not _see_a_new_save(child, run):
            return False
    time.sleep(rng.uniform(0, 0.03) if aimed else wait_s)
    return child.kill()


def _see_a_new_save(child: Child, run: Path) -> bool:
    """Return as soon as a save begins; False when the trainer ends instead."""
    before = set((run / "checkpoints").glob(".saving-*"))
    while set((run / "checkpoints").glob(".saving-*")) <= before:
        if child.ended():
            return False
        time.sleep(0.0005)
    return True


def _newest_step(run: Path) -> int:
    """Return the step of the newest valid checkpoint, 0 for none; none may be there but broken."""
    found, skipped = newest_valid(run / "checkpoints")
    assert not skipped, skipped
    return 0 if found is None else int(found.name.removeprefix("step-").split(".")[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(json.dumps(kill_text_to_image_runs(int(sys.argv[1]), Path(temporary), seed=seed)))
