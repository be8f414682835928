"""Each benchmark documents its options, and its smallest run prints one JSON line."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes_faults import fork, run_command
from fakes_pipeline import pipeline_of, tiny_pipeline

from latentdiff.data.folder.folder import read_folder
from latentdiff.data.shape_pairs import write_shape_pairs
from latentdiff.models.unet.controlnet import make_controlnet

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = (
    *("train_throughput", "train_step_overhead", "heldout_race", "scaling"),
    *("conditions", "vae", "startup", "memory", "keyed_randomness", "open_in_transformers4"),
    *("objectives", "second_start", "wide_canvas"),
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a benchmark's main() with its module's constants changed; return its output."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *arguments, **constants):
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_options(name, benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark(name, "--help")
    assert end.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def figures_of(printed: str) -> dict:
    (line,) = [line for line in printed.splitlines() if line.startswith("{")]
    return json.loads(line)


def shrink(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let modules build a U-Net and a text encoder of a few thousand parameters."""
    monkeypatch.syspath_prepend(str(FOLDER))
    small = {"WIDTHS": (32, 32), "TEXT_WIDTH": 32, "TEXT_LAYERS": 1, "HEAD_DIM": 16}
    for name in modules:
        module = importlib.import_module(name)
        for constant, value in small.items():
            monkeypatch.setattr(module, constant, value)


class SameProcess:
    """Stands for common.OwnProcess in the test's own process."""

    def __init__(self, make, *arguments, **named) -> None:
        self.made = make(*arguments, **named)

    def call(self, method, *arguments):
        return getattr(self.made, method)(*arguments)

    def close(self) -> None:
        pass


def test_training_loops_are_compared(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "train_throughput")
    printed = benchmark(
        "train_throughput",
        *("--rounds", "1", "--batch_size", "2"),
        RESOLUTION=32,
        VAE_WIDTHS=(32, 32, 32, 32),
        OwnProcess=SameProcess,
        peak_tflops=lambda: 1.0,
    )
    figures = figures_of(printed)
    assert figures["ratio_to_baseline_best"] > 0
    assert "share_of_peak" in figures


def test_the_race_measures_both_sides_on_equal_terms(
    benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, "heldout_race")
    sizes = {"minutes": 0.02, "steps": 30, "decay": "both", "px": 32, "batch_size": 4}
    sizes |= {"num_train": 16, "num_heldout": 8}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    figures = figures_of(benchmark("heldout_race", *options, TURNS=2, OwnProcess=SameProcess))
    curves = figures["curves"]
    (_, steps, first), *_ = curves["baseline"]
    assert (steps, first) == (0, pytest.approx(curves["latentdiff"][0][2], abs=0.02))
    assert figures["share_of_time"] is None or figures["share_of_time"] > 0
    assert curves["latentdiff"][0][0] > 0  # reading and caching are on its clock
    assert curves["baseline"][-1][1] > 0
    assert curves["latentdiff"][-1][1] <= 30


def test_the_overhead_of_a_training_step_is_split_into_its_parts(tmp_path: Path) -> None:
    """In a fork: it wraps functions of training and turns logging off."""
    options = ["--small", "--steps", "2", "--batch_size", "2"]
    script = FOLDER / "train_step_overhead.py"
    child = fork(lambda: run_command(script, options), tmp_path / "log")
    assert child.wait() == 0, child.output()
    figures = figures_of(child.output())
    parts = figures["parts"]
    assert sum(parts.values()) == pytest.approx(figures["overhead"], abs=1e-3)
    assert parts["random_numbers"] > 0
    assert parts["train_data"] > 0


def test_the_cost_of_keyed_random_numbers_is_measured(benchmark) -> None:
    sizes = ("--latent_size", "8", "--workers", "1")
    figures = figures_of(benchmark("keyed_randomness", *sizes, NUM_BATCHES=2))
    assert figures["sample_us"] > figures["noise_us"] > 0


def test_growth_with_the_batch_is_measured(benchmark) -> None:
    cases = {"batch": [(2, 4)], "latent_size": []}
    (row,) = figures_of(benchmark("scaling", "--rounds", "1", CASES=cases))["rows"]
    assert (row["batch"], row["latent_size"]) == (2, 4)


def test_growth_with_the_processes_is_measured_in_whole_runs(benchmark, tmp_path: Path) -> None:
    def run(command: list[str], **_: object) -> None:
        assert command[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "1"]
        child = fork(lambda: run_command(Path(command[5]), command[6:]), tmp_path / "log")
        assert child.wait() == 0, child.output()

    sizes = {"RUN_STEPS": 5, "NUM_TRAIN": 64, "NUM_TEST": 8, "OPTIMIZERS": ["adamw"]}
    forked = SimpleNamespace(run=run)
    printed = benchmark("scaling", "--processes", "[1]", **sizes, subprocess=forked)
    (row,) = figures_of(printed)["rows"]
    assert (row["processes"], row["optimizer"]) == (1, "adamw")
    assert row["images_per_second"] > 0


def test_a_vae_is_measured_by_dtype_and_layout(benchmark) -> None:
    sizes = ("--resolution", "32", "--batch_size", "1", "--rounds", "1")
    ratios = figures_of(benchmark("vae", *sizes))["ratios"]
    assert ratios["encode float32"] == ratios["decode float32"] == 1


def test_the_wait_for_a_first_step_is_measured(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    seconds = {"python": 1.0, "models": 2.0, "first step": 3.0, "second step": 0.5}
    monkeypatch.setattr("startup.run", lambda *arguments: json.dumps(seconds))
    figures = figures_of(benchmark("startup", "--rounds", "1", "--num_train", "8", SCRIPTS=("a",)))
    assert figures["train"] == seconds
    assert "a --help" in figures["seconds"]


def test_second_starts_are_measured_by_the_size_of_the_folder(
    benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    phases = importlib.import_module("second_start").PHASES
    assert all(hasattr(importlib.import_module(place), name) for place, name in phases.values())
    starts: list[str] = []

    def start(folder: Path, run: Path, *, kind: str = "--probe") -> dict[str, dict[str, float]]:
        starts.append(kind)
        assert len(read_folder(folder / "data")) == 3
        return {kind: {"after models": len(starts)} for kind in ("seconds", "cpu_seconds")}

    printed = benchmark("second_start", "3", "--rounds", "2", start=start)
    found = figures_of(printed)["images"]["3"]
    assert found["seconds"] == {"after models": 2.5}  # of the second and third
    assert starts == ["--fill", "--probe", "--probe"]


def test_objectives_are_compared_by_training_seed_and_by_image(benchmark, tmp_path: Path) -> None:
    yes = {"v_zero_snr": [2, 3], "flow": [3, 4]}  # of four captions, by seed

    def arm(args, *, objective, seed):
        shown = [k < yes[objective][seed] for k in range(4)]
        return {"cpu_s": 7, "answers": {"own_25": shown, "unipc_8": [True] * 4}}

    options = ["--out", str(tmp_path), "--num_seeds", "2", "--objectives", *yes]
    printed = benchmark("objectives", *options, arm=arm, write_shapes=lambda *_, **__: None)
    figures = figures_of(printed)
    assert figures["training_cpu_s"] == {"v_zero_snr": [7, 7], "flow": [7, 7]}
    own = figures["own_25"]
    assert (own["flow"]["by_seed"], own["flow"]["all"]) == ([0.75, 1.0], 0.875)
    assert own["flow - v_zero_snr"]["difference"] == 0.25
    assert own["flow - v_zero_snr"]["over_seeds_95"] == [0.25, 0.25]
    low, high = own["flow - v_zero_snr"]["over_images_95"]
    assert 0 <= low < 0.25 < high
    assert figures["unipc_8"]["flow - v_zero_snr"]["over_images_95"] == [0.0, 0.0]


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that read an image, and pairs of shapes as large as theirs."""
    root = tmp_path_factory.mktemp("conditioned")
    for kind in ("instruct_pix2pix", "inpaint", "upscale"):
        pipeline_of(kind).save_pretrained(root / kind)
    pipe = tiny_pipeline()
    pipe.save_pretrained(root / "text")
    make_controlnet(pipe.unet, factor=4, seed=0).save_pretrained(root / "run" / "controlnet")
    for kind in ("layout", "edit"):
        write_shape_pairs(root / kind, kind, num_train=1, num_test=4, size_px=32)
    rows = [
        {"step": step, "condition_use": use, "condition_use_se": 0.1}
        for step, use in ((0, 0.0), (2, 0.3), (4, 0.1), (6, 0.4), (8, 0.5))
    ]
    log = "\n".join(map(json.dumps, [{"step": 1, "loss": 1.0}, *rows]))
    (root / "run" / "metrics.jsonl").write_text(log)
    return root


@pytest.mark.parametrize(
    ("command", "model", "folder", "keys"),
    [
        ("layout", "run", "layout", {"own_condition", "another_images_condition", "caption_alone"}),
        ("edges", "run", "layout", {"own_condition", "another_images_condition", "caption_alone"}),
        ("edit", "instruct_pix2pix", "edit", {"edited", "as_it_was"}),
        ("inpaint", "inpaint", "layout", {"inpainted", "copy_paste", "mean_color", "judge"}),
        ("upscale", "upscale", "layout", {"upscaled", "bicubic", "nearer_than"}),
    ],
)
def test_what_a_condition_does_is_measured_next_to_its_baselines(
    benchmark,
    conditioned: Path,
    tmp_path: Path,
    *,
    command: str,
    model: str,
    folder: str,
    keys: set,
) -> None:
    options = ["--num", "4", "--steps", "1", "--sheet", str(tmp_path / "sheet.png")]
    options += ["--base", str(conditioned / "text")] if model == "run" else []
    places = (str(conditioned / model), str(conditioned / folder / "test"))
    figures = figures_of(benchmark("conditions", command, *places, *options))
    assert keys | {"vae"} <= figures.keys()
    assert (tmp_path / "sheet.png").is_file()
    use = figures["condition_use"]
    if model == "run":
        assert [step for step, *_ in use["curve"]] == [0, 2, 4, 6, 8]
        assert use["above_0_from_step"] == 6
    if command in ("layout", "edit"):
        estimate, low, high = figures["vae"]["all_images"]["all"]
        assert 0 <= low <= estimate <= high <= 1


def test_a_wide_canvas_is_made_at_once_and_in_windows(
    benchmark, conditioned: Path, tmp_path: Path
) -> None:
    size = ["--height", "32", "--width", "96", "--steps", "1", "--sheet", str(tmp_path / "w.jpg")]
    figures = figures_of(benchmark("wide_canvas", str(conditioned / "text"), "a cat", *size))
    assert [way["windows"] for way in figures["ways"].values()] == [1, 3, 5, 9]
    assert (tmp_path / "w.jpg").is_file()
