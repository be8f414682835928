"""A run as the page shows it: whether it is at work, how far, and that nothing is written to it."""

import os
import socket
import subprocess
import sys

from fakes_app import add_metrics_line, write_run

from latentdiff.app.run_view import fingerprint, is_held, progress_of, run_html
from latentdiff.training.report.run_record import read_run


def hold(folder, process, host=None):
    (folder / ".lock").write_text(f"process {process} on {host or socket.gethostname()}\n")


def dead_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_is_at_work_while_the_process_that_holds_it_lives(tmp_path):
    assert not is_held(tmp_path)
    hold(tmp_path, os.getpid())
    assert is_held(tmp_path)
    hold(tmp_path, dead_process())
    assert not is_held(tmp_path)
    hold(tmp_path, dead_process(), "elsewhere")
    assert is_held(tmp_path)
    (tmp_path / ".lock").write_text("")
    assert not is_held(tmp_path)


def test_a_running_run_tells_the_time_left_and_a_killed_one_how_to_go_on(tmp_path):
    folder = write_run(tmp_path / "run", {10: 0.9, 20: 0.7})
    hold(folder, os.getpid())
    run = read_run(folder, "run")
    progress = progress_of(run)
    assert progress.is_running
    left = (run.max_steps - 20) * run.images_per_step / 5.0
    assert progress.seconds_left == left
    assert f"Running: step 20 of {run.max_steps:,}, about" in progress.text
    assert 'role="progressbar"' in run_html(folder, "run")
    hold(folder, dead_process())
    assert "Ended by a kill after step 20" in progress_of(run).text
    (folder / ".lock").unlink()
    assert progress_of(read_run(folder, "run")).text.startswith("Stopped after step 20")


def test_looking_at_a_run_changes_nothing_in_it_and_sees_what_it_writes(tmp_path):
    folder = write_run(tmp_path / "run", {10: 0.9})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    html = run_html(folder, "run")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    for part in ("0.9000", "Training loss", "data:image/jpeg"):
        assert part in html
    seen = fingerprint(folder)
    os.utime(folder / "metrics.jsonl", (1, 1))
    add_metrics_line(folder, 20, 0.8)
    assert fingerprint(folder) != seen
    assert "0.8000" in run_html(folder, "run")


def test_a_folder_that_is_no_run_yet_is_a_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    html = run_html(tmp_path, "<b>run</b>")
    assert 'role="alert"' in html
    assert "<b>" not in html
