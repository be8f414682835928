"""latentdiff audit: a run with canaries, audited against held-out images and their twins."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copyfile, copytree

import pytest
import torch
from fakes_training import make_config, make_world, read_metrics

from latentdiff.audit.privacy import image_losses
from latentdiff.audit.verify import Given, verify
from latentdiff.cli.main import main
from latentdiff.config.options import EvalModelOptions
from latentdiff.data.shapes import write_shapes
from latentdiff.evaluation.eval_set import open_eval_model
from latentdiff.training.inputs.canaries import write_canaries
from latentdiff.training.report.report import run_report_html
from latentdiff.training.report.run_record import read_runs
from latentdiff.training.text_to_image.train_t2i import train

NUM = 6  # canaries


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ of ten training images, other/ of six held out, and run/ with canaries."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_shapes(folder / "shapes", num_train=1, num_test=6, size_px=32, seed=5)
    copytree(folder / "shapes/test", folder / "other")
    quick = {"preview__num_nearest": 0, "eval__num_heldout": 1, "data__num_canaries": NUM}
    assert train(make_config(folder, folder / "run", **quick, train__max_epochs=2)) == 0
    return folder


def audit(world: Path, out: Path, *options: str) -> int:
    given = ["--data", str(world / "data"), "--heldout", str(world / "other"), "--out", str(out)]
    quick = ["--draws", "4", "--num_images", "0", "--device", "cpu"]
    return main(["audit", str(world / "run"), *given, *quick, *options])


def test_canaries_are_trained_on_and_their_twins_are_not(world: Path) -> None:
    assert max(read_metrics(world / "run")) == 8  # (10 + 6) / 4 steps an epoch
    shown, twins = (
        sorted((world / "run" / name / "train").glob("*.png"))
        for name in ("canaries", "canary_twins")
    )
    assert len(shown) == len(twins) == NUM
    assert len({path.read_bytes() for path in (*shown, *twins)}) == 2 * NUM


def test_canaries_are_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_canaries(tmp_path / name, 2, size_px=32, seed=seed)
    a, b, c = ((tmp_path / name / "canaries/train/0001.png").read_bytes() for name in "abc")
    assert a == b != c


def test_data_of_a_run_with_canaries_is_proven_without_them(world: Path) -> None:
    verdict = verify(str(world / "run"), Given(data=[str(world / "data")]))
    assert verdict.is_proven
    content = (world / "run/pipeline/training_content.md").read_text()
    assert f"{NUM} images of random colours" in content


def test_receipt_is_written_printed_and_one_line_of_the_card(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(world, tmp_path, "--card", "true") == 0
    assert audit(world, tmp_path, "--card", "true") == 0
    figures = json.loads((tmp_path / "privacy.json").read_text())
    assert figures["members"]["auc"]["num_samples"] == 10 + 6
    assert figures["canaries"]["auc"]["num_samples"] == 2 * NUM
    assert len(figures["most_exposed"]) == 10
    assert "canaries          AUC" in capsys.readouterr().out
    assert "Most exposed images" in (tmp_path / "privacy.html").read_text()
    card = (world / "run/pipeline/README.md").read_text()
    assert card.count("| Membership inference | AUC ") == 1
    assert verify(str(world / "run")).is_proven


def test_copies_are_looked_for_and_the_base_is_taken_off(world: Path, tmp_path: Path) -> None:
    base = ["--base", str(world / "run"), "--num_images", "3"]
    assert audit(world, tmp_path, *base) == 0
    figures = json.loads((tmp_path / "privacy.json").read_text())
    assert figures["members"]["auc"]["estimate"] == 0.5  # the base is the model itself
    assert figures["base"]["auc"]["num_samples"] == 16
    assert figures["copies"]["copies"]["num_samples"] == 3


def test_losses_of_an_image_do_not_depend_on_the_others(world: Path) -> None:
    options = EvalModelOptions(str(world / "other"), split="all", device="cpu", batch_size=2)
    whole = open_eval_model(str(world / "run"), options)
    losses = image_losses(whole, draws=3)
    part = replace(whole, latents=whole.latents.select([4, 1]))
    assert torch.allclose(image_losses(part, draws=3), losses[[4, 1]], rtol=1e-5)


def test_a_training_image_among_the_held_out_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copytree(world / "other", tmp_path / "other")
    trained = next((world / "data/train").glob("*.png"))
    copyfile(trained, tmp_path / "other/again.png")
    (tmp_path / "other/again.txt").write_text("a shape")
    (tmp_path / "other/metadata.jsonl").unlink()
    for path in (tmp_path / "other").glob("*.png"):
        path.with_suffix(".txt").write_text("a shape")
    out = ["--heldout", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    assert main(["audit", str(world / "run"), "--data", str(world / "data"), *out]) == 2
    message = capsys.readouterr().err
    assert "1 held-out images are training images too" in message
    assert "again.png" in message


def test_too_few_held_out_images_name_the_option(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(world / "data"), "--out", str(tmp_path)]
    assert main(["audit", str(world / "run"), *given]) == 2
    assert "--heldout" in capsys.readouterr().err


def test_results_go_into_the_run_and_its_report(world: Path) -> None:
    given = ["--data", str(world / "data"), "--heldout", str(world / "other"), "--device", "cpu"]
    assert main(["audit", str(world / "run"), *given, "--draws", "2", "--num_images", "0"]) == 0
    assert (world / "run/audit/privacy.html").is_file()
    page = run_report_html(read_runs([str(world / "run")]))
    assert "membership inference" in page
    assert "found at 1% false positives" in page
