"""The report of runs: what a folder holds is on the page, alone or next to other runs."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.cli.main import main
from latentdiff.config.io import load_config, to_yaml
from latentdiff.config.text_to_image import Config
from latentdiff.image_grid import BOXES, TILES, draw_grid
from latentdiff.training.report.curves import Curve, chart, smooth, ticks
from latentdiff.training.report.report import run_report_html, write_run_report
from latentdiff.training.report.run_record import read_runs
from latentdiff.training.run_log import RunLog, read_log

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPTS = ("a red star", "<b>a blue</b> star")
PLAN = {
    "data": {
        "splits": {"train": 40, "held out": 4},
        "subfolders": {"train/new": 30, "train/old": 10},
        "problems": [
            {
                "severity": "skipped",
                "title": "truncated image",
                "count": 1,
                "fix": "copy it again",
                "examples": [["train/new/9.png", "ends early"]],
            }
        ],
    },
    "steps": {"max_steps": 40, "steps_per_epoch": 10, "images_per_step": 4.0},
    "memory": {"weights": 4_000_000, "activations": None},
    "parameters": ["U-Net 1.0 M trained"],
    "device": "cpu",
}


def make_run(
    folder: Path, *, prompts: Sequence[str] = PROMPTS, color: int = 0, **settings: Any
) -> Path:
    """Write the folder of a run of 40 steps: what training would have, without training."""
    (folder / "samples").mkdir(parents=True)
    (folder / "pipeline").mkdir()
    options = {"train.max_steps": 40, "train.batch_size": 4, "data.root": "photos"} | {
        name.replace("__", "."): value for name, value in settings.items()
    }
    (folder / "empty.yaml").write_text("train: {}\n")
    config: Config = load_config(
        folder / "empty.yaml", [f"--{name}={value}" for name, value in options.items()]
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = [{"step": 0, "heldout_loss": 1.0, "heldout_se": 0.1}]
    for step in range(10, 50, 10):
        speed = {"images_per_second": 8.0, "data_wait": 0.25, "memory_gb": 1.5}
        rows.append({"step": step, "loss": 1 / step, "loss/t0-249": 0.5, "extra": step} | speed)
    rows.append({"step": 40, "heldout_loss": 0.5, "heldout_se": 0.05, "grad_norm": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plan.json").write_text(json.dumps(PLAN))
    for step in (0, 40):
        tiles = [Image.new("RGB", (64, 64), (color, step, 0))] * len(prompts)
        sheet, text = draw_grid(tiles, prompts, columns=2), PngInfo()
        places = zip(prompts, sheet.info[BOXES], strict=True)
        found = [{"label": label, "box": box, "is_nearest": False} for label, box in places]
        text.add_text(TILES, json.dumps(found))
        sheet.save(folder / "samples" / f"step-{step:09d}.png", pnginfo=text)
    return folder


def log_lines(folder: Path, *messages: str, level: int = logging.WARNING) -> None:
    with RunLog(folder) as log:
        log.begin()
        for message in messages:
            logging.getLogger("latentdiff.training").log(level, message)


def test_sources_are_listed_with_their_share_of_an_epoch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    counts = {"train": 30, "held out": 2, "samples_per_epoch": 90}
    others = {"train": 10, "held out": 0, "samples_per_epoch": 10}
    sources = [{"root": "photos/cats", **counts}, {"root": "photos/dogs", **others}]
    data = {**PLAN["data"], "sources": sources}  # type: ignore[dict-item]
    (run / "plan.json").write_text(json.dumps(PLAN | {"data": data}))
    text = run_report_html(read_runs([str(run)]))
    row = text[text.index("photos/cats") :].partition("</tr>")[0]
    assert re.findall(r">([\d%]+)<", row) == ["30", "2", "90", "90%"]
    assert "2 sources" in text


def test_the_page_of_a_run_shows_all_that_its_folder_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", train__learning_rate=0.5)
    log_lines(run, "slow <disk>", "slow <disk>", "other")
    html = run_report_html(read_runs([str(run)]))
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts["status"] == "finished"
    assert facts["steps"] == "40 of 40"
    assert facts["held-out loss"] == "0.5000 ± 0.0980"
    assert facts["training time"] == "20 s"  # 40 steps of 4 images, 8 a second
    assert facts["mean speed"] == "8 images/s"
    assert html.count("<svg") == 7  # loss, held-out, by timestep, speed, memory, two more
    assert "2 more figures" in html
    assert html.count('type="radio"') == 2
    assert "&lt;b&gt;a blue&lt;/b&gt; star" in html
    assert "<td>epochs</td><td>4</td><td>4</td>" in html
    assert "40 train, 4 held out" in html
    assert "30 in train/new, 10 in train/old" in html
    assert "truncated image" in html
    assert "ends early" in html
    assert 'warning, 2 times</td><td class="w">slow &lt;disk&gt;' in html
    html = html.replace("<wbr>", "")
    assert "<td>train.learning_rate</td><td>0.5</td><td>0.0001</td>" in html
    assert not re.search(r"<script|https?://|src=\"(?!data:)", html)


def test_before_and_after_come_first_side_by_side(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    html = run_report_html(read_runs([str(run)]))
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles[:2] == ["Before and after", "Samples"]
    part = html.partition("<h2>Before and after")[2].partition("<h2>")[0]
    labels = re.findall(r"<figcaption>(before|step 40)", part)
    assert labels == ["before", "step 40"] * len(PROMPTS)
    (run / "samples" / "step-000000000.png").unlink()
    assert "<h2>Before and after" not in run_report_html(read_runs([str(run)]))


def test_several_runs_share_curves_and_prompts_and_list_what_differs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", train__learning_rate=0.5)
    second = make_run(tmp_path / "b", prompts=("a red star", "else"), train__learning_rate=0.25)
    out = write_run_report([str(first), f"{second / 'pipeline'}"])
    html = out.read_text()
    assert out == first / "comparison.html"
    differing = html.partition("Settings that differ")[2].partition("<h2>")[0]
    differing = differing.replace("<wbr>", "")
    assert re.findall(r"<td>([\w.]+)</td>", differing) == [
        "train.learning_rate",
        "0.5",
        "0.25",
    ]
    assert re.findall(r'<div><p>(.*?)</p><div class="row"', html) == ["a red star"]
    for label in ("a, before", "a, step 40", "b, step 40"):
        assert f"<figcaption>{label}" in html
    curves = html.partition("<h2>Curves")[2].partition("<h2>")[0]
    assert curves.partition("</figure>")[0].count("<polyline") == 2


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("plan.json", "samples/step-000000000.png", "samples/step-000000040.png"):
        (run / name).unlink()
    (run / "pipeline").rmdir()
    (run / ".lock").write_text("process 1 on here\n")
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    html = run_report_html(read_runs([str(run)]))
    assert "running" in html
    assert "3 of 40" in html
    assert "<h2>Samples" not in html
    assert "This run has no log.txt." in html


def test_a_sheet_of_an_earlier_version_is_shown_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run / "samples").iterdir():
        Image.new("RGB", (50, 30)).save(path)
    assert run_report_html(read_runs([str(run)])).count('<img class="sheet"') == 2


def test_a_failed_run_says_so_with_its_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(FloatingPointError):
        fail_in(run)
    html = run_report_html(read_runs([str(run)]))
    assert "<dd>failed</dd>" in html
    assert "the loss was NaN" in html


def fail_in(run: Path) -> None:
    with RunLog(run) as log:
        log.begin()
        raise FloatingPointError("the loss was NaN")


def test_what_is_no_run_folder_is_named_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} is no run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    run = str(make_run(tmp_path / "run"))
    assert main(["report", run, run]) == 2
    assert "given twice" in capsys.readouterr().err


def test_the_command_writes_the_page_where_it_is_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages" / "run.html"
    assert main(["report", str(make_run(tmp_path / "run")), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_text().startswith("<!doctype html>")


def test_log_lines_come_back_with_their_sessions(tmp_path: Path) -> None:
    log_lines(tmp_path, "written:\n  a\n  b", "next")
    log_lines(tmp_path, "resumed")
    found = [(entry.level, entry.message, entry.session) for entry in read_log(tmp_path)]
    assert found == [
        ("WARNING", "written:\n  a\n  b", 0),
        ("WARNING", "next", 0),
        ("WARNING", "resumed", 1),
    ]
    assert read_log(tmp_path / "absent") == []


def test_a_refused_run_writes_no_log_and_one_that_begins_writes_all_of_it(tmp_path: Path) -> None:
    with RunLog(tmp_path):
        logging.getLogger("latentdiff").warning("refused")
    assert read_log(tmp_path) == []
    with RunLog(tmp_path) as log:
        logging.getLogger("latentdiff").warning("before")
        log.begin()
    assert [entry.message for entry in read_log(tmp_path)] == ["before"]


def test_smoothing_keeps_a_constant_and_reaches_back_over_a_share() -> None:
    assert smooth([2.0] * 200) == pytest.approx([2.0] * 200)
    assert smooth([1.0, 5.0, 3.0]) == [1, 5, 3]  # too few to smooth
    falling = smooth([1.0] * 100 + [0.0] * 100)
    assert 0.3 < falling[110] < 0.4  # 10 lines are one time constant
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 150, [0, 50, 100, 150]),
        (0.41, 0.79, [0.5, 0.6, 0.7]),
        (0, 0.00125, [0, 0.00025, 0.0005, 0.00075, 0.001, 0.00125]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_has_nothing_of_curves_without_points_and_thins_long_ones() -> None:
    assert chart("empty", [Curve("none", [], [])]) == ""
    steps = list(range(100_000))
    text = chart("long", [Curve("y", steps, [float(step) for step in steps])])
    assert len(text) < 10_000


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_of_two_runs_has_no_horizontal_scrolling(tmp_path: Path, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's client")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium browser")
    names = ("a" * 60, "b_" * 30)
    runs = [make_run(tmp_path / name, data__root=f"/{name}/photos") for name in names]
    log_lines(runs[0], "x" * 200)
    page_path = write_run_report([str(run) for run in runs])
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(page_path.as_uri())
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        shown = page.locator(".slider").first.locator(".panels > div")
        assert [shown.nth(k).is_visible() for k in range(2)] == [False, True]
        page.locator(".slider label").first.click()
        assert [shown.nth(k).is_visible() for k in range(2)] == [True, False]
        browser.close()
