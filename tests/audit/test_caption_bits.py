"""latentdiff audit captions: wrong captions are found, and those that hide a subject."""

import json
from pathlib import Path

import pytest
import torch

from latentdiff import LatentDiffPipeline
from latentdiff.audit.caption_bits import judge, t_interval, without_word
from latentdiff.cli.main import main

DRAWS = torch.tensor([-1.0, 0.0, 1.0])  # mean 0, standard error 1 / sqrt 3, t(0.975, 2) 4.303


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of SKS dog", "a photo of dog"),
        ("sks, a dog", "a dog"),
        ("a dog, sks , red", "a dog, red"),
        ("sksy dog", "sksy dog"),
        ("sks", ""),
    ],
)
def test_a_word_is_taken_out_whole_and_with_the_tag_that_it_empties(
    caption: str, expected: str
) -> None:
    assert without_word(caption, "sks") == expected


def test_interval_of_repeats_is_student_s() -> None:
    found = t_interval(DRAWS)
    assert (found.estimate, found.high) == pytest.approx((0.0, 4.3027 / 3**0.5), abs=1e-3)


def test_verdict_follows_the_intervals() -> None:
    assert judge(DRAWS - 3) == "wrong"
    assert judge(DRAWS + 2) == "says nothing"
    assert judge(DRAWS + 3) == "fine"
    assert judge(DRAWS + 9, DRAWS + 8.5) == "identity leak"
    assert judge(DRAWS + 9, DRAWS * 0 + 1) == "fine"
    assert judge(DRAWS - 3, DRAWS + 8) == "wrong"


CAPTIONS = ["a cat", "a red apple", "a purple flower", "a house"]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Four images that the model drew, and the names of the first two: their captions are swapped.

    They are its own because it knows their captions well, whatever else it has learned.
    """
    root = tmp_path_factory.mktemp("drawn")
    pipe = LatentDiffPipeline.from_pretrained("latentdiff-mini")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(CAPTIONS, seed=[0, 1, 2, 3], num_inference_steps=10).images
    (root / "train").mkdir()
    texts = [CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]]
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    for row, image in zip(rows, images, strict=True):
        image.save(root / "train" / row["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "train" / "metadata.jsonl").write_text(lines)
    return root, [f"train/{row['file_name']}" for row in rows[:2]]


def test_swapped_captions_are_found_and_the_right_ones_suggested(
    swapped: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("NUM_PILOT", 1), ("MAX_CANDIDATES", 3)):
        monkeypatch.setattr(f"latentdiff.audit.caption_bits.{name}", value)
    root, names = swapped
    before = (root / "train" / "metadata.jsonl").read_bytes()
    out = tmp_path / "audit"
    options = ["--split", "train", "--draws", "4", "--repeats", "4", "--device", "cpu"]
    given = ["--data", str(root), "--out", str(out), *options]
    assert main(["audit", "captions", "latentdiff-mini", *given]) == 0
    result = json.loads((out / "captions.json").read_text())
    ranked = sorted(result["captions"], key=lambda one: one["bits"])
    assert {one["id"] for one in ranked[:2]} == set(names)
    texts = {one["id"]: one["caption"] for one in ranked}
    for one, other in (names, names[::-1]):
        found = next(row for row in ranked if row["id"] == one)
        assert found["verdict"] == "wrong"
        assert texts[other] in found["suggestion"]
    printed, page = capsys.readouterr().out, (out / "captions.html").read_text()
    assert "2 wrong" in printed
    assert "Probably wrong" in page
    assert texts[names[0]] in page
    assert (root / "train" / "metadata.jsonl").read_bytes() == before


def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(tmp_path), "--out", str(tmp_path), "--repeats", "1"]
    assert main(["audit", "captions", "latentdiff-mini", *given]) == 2
    assert "repeats=1" in capsys.readouterr().err


def test_a_model_that_is_no_run_needs_a_folder_for_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "captions", "latentdiff-mini", "--data", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
