"""The GPU benchmarks are tried on the CPU with toy models; the table is what the results say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes_faults import fork, run_command

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
QUICK = {
    "train": ["--batch_size", "2", "--rounds", "1"],
    "sample": ["--batch_sizes", "1", "--steps", "2", "--rounds", "1"],
    "attention": ["--batch_size", "1"],
}


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (FOLDER, FOLDER / "gpu"):
        monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def run_all() -> ModuleType:
    return importlib.import_module("run_all")


@pytest.mark.parametrize("name", QUICK)
def test_a_script_runs_with_a_toy_model(name: str, tmp_path: Path) -> None:
    out = tmp_path / "line.json"
    options = ["--device", "cpu", "--tiny", "--out", str(out), *QUICK[name]]
    child = fork(lambda: run_command(FOLDER / "gpu" / f"{name}.py", options), tmp_path / "log")
    assert child.wait() == 0, child.output()
    figures = json.loads(out.read_text())
    assert "error" not in figures
    if name == "train":
        assert figures["ratio_to_example"] > 0
    if name == "attention":
        assert figures["plain"]["error"] < 0.05
        assert "needs a GPU" in figures["xformers"]["skipped"]


def test_a_peer_is_skipped_visibly_and_a_wrong_script_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole_run = importlib.import_module("whole_run")
    monkeypatch.setattr(whole_run, "write_world", lambda folder, *, num_train: None)
    monkeypatch.setattr(whole_run, "timed", lambda command, log: (2.0, 1.0))
    monkeypatch.setattr(sys, "argv", ["whole_run.py"])
    whole_run.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] is None
    assert "--script PATH" in figures["skipped"]
    assert figures["seconds"] == {"latentdiff": 2.0}
    monkeypatch.setattr(sys, "argv", ["whole_run.py", "--script", str(tmp_path / "none.py")])
    with pytest.raises(SystemExit) as end:
        whole_run.main()
    assert end.value.code == 2
    assert "is no file: pass --script PATH" in capsys.readouterr().err


def parts_of(folder: Path, **sources: str) -> dict[str, tuple[float, list[str]]]:
    """Write scripts of these sources; return their shares of the time."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(f"import sys, time, json\n{source}\n")
    return {name: (1.0, []) for name in sources}


def run_main(run_all: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(out), *options])
    status = run_all.main()
    return status, json.loads((out / "summary.json").read_text())


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(
        tmp_path,
        broken="print('kept: 3', flush=True); raise SystemExit('no memory')",
        slow="print('kept: 4', flush=True); time.sleep(60)",
        good="open(sys.argv[sys.argv.index('--out') + 1], 'w').write(json.dumps({'s': 5}))",
    )
    monkeypatch.setattr(run_all, "PARTS", parts)
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    options = ("--parts", "broken,slow,good", "--budget_s", "3", "--min_s", "0.1")
    status, summary = run_main(run_all, monkeypatch, tmp_path / "out", *options)
    assert status == 0
    assert (summary["broken"]["status"], summary["broken"]["kept"]) == (1, 3)
    assert "no memory" in summary["broken"]["last_lines"][-1]
    assert (summary["slow"]["status"], summary["slow"]["kept"]) == ("out of time", 4)
    assert (summary["good"]["status"], summary["good"]["s"]) == (0, 5)


def test_every_part_has_a_script_and_a_toy_size(run_all: ModuleType) -> None:
    scripts = {path.stem for path in (FOLDER / "gpu").glob("*.py")} - {"run_all", "sd15"}
    assert scripts == set(run_all.PARTS) == set(run_all.TINY)
    assert sum(share for share, _ in run_all.PARTS.values()) == pytest.approx(1)


def test_tables_of_readme_and_docs_are_what_the_command_prints() -> None:
    table = importlib.import_module("table")
    pages = {True: "README.md", False: "docs/performance.md"}
    for readme, page in pages.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        printed = table.tables(table.RESULTS, readme=readme)
        rows = [line for line in printed.splitlines() if line.startswith("| ")]
        assert len(rows) > 6
        assert [row for row in rows if row not in text] == []


def test_a_table_names_each_machine_and_what_is_missing(tmp_path: Path) -> None:
    table = importlib.import_module("table")
    line = json.loads((table.RESULTS / "train_throughput.json").read_text())
    other = line | {"processor": "Xeon", "bf16": "AMX", "cores_usable": 2, "ratio_inner": 9.87}
    (tmp_path / "amx").mkdir()
    (tmp_path / "train_throughput.json").write_text(json.dumps(line) + "\n")
    (tmp_path / "whole_run.json").write_text(json.dumps(line | {"ratio": None}) + "\n")
    (tmp_path / "amx" / "train_throughput.json").write_text(json.dumps(other) + "\n")
    first, second, missing = table.tables(tmp_path, readme=True).split("\n\n| | ratio")
    assert "cache building counted | skipped | 3x |" in second
    assert first.startswith("AMD EPYC, 1 core, bf16 by AVX-512; torch ")
    assert "Xeon, 2 cores, bf16 by AMX; torch " in second
    assert "9.87x" in missing
    assert "(sample_sd15)" in missing
