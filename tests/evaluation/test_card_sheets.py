"""The sheets of a model's card: random prompts, small files, and a test that gives nothing away."""

import json
from pathlib import Path
from typing import Any

import pytest
from fakes_data import save_image, write_jsonl
from fakes_pipeline import tiny_pipeline
from fakes_scripts import run_script
from PIL import Image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def make_folder(root: Path, word: str) -> Path:
    """Twelve training captions, and three test captions of which one is a training caption too."""
    for split, captions in (
        ("train", [f"{word} {n}" for n in range(12)]),
        ("test", [f"{word} 3", f"new {word} 1", f"new {word} 2"]),
    ):
        rows = []
        for number, caption in enumerate(captions):
            name = f"{number:02d}.png"
            save_image(root / split / name, number, width=32, height=32)
            rows.append({"file_name": name, "text": caption})
        write_jsonl(root / split / "metadata.jsonl", rows)
    return root


def run(*arguments: object) -> Any:
    return run_script("card_sheets.py", *arguments)


def test_sheets_and_questions_follow_from_the_seed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_folder(tmp_path / word, word) for word in ("cat", "dog")]
    counts = ("--seen", 3, 2, "--unseen", 2, 1, "--questions", 2, 1, "--steps", 1)
    for name, data in (("a", folders), ("b", folders)):
        assert run(model, "--data", *data, *counts, "--out", tmp_path / name) == 0
    out = tmp_path / "a"
    settings = json.loads((out / "prompts.json").read_text())
    assert [prompt.split()[0] for prompt in settings["seen"]] == ["cat"] * 3 + ["dog"] * 2
    assert all(prompt.startswith("new ") for prompt in settings["unseen"])
    assert sum((out / f"{name}.jpg").stat().st_size for name in ("seen", "unseen")) < 1_000_000
    key = json.loads((out / "key.json").read_text())
    assert sorted(key) == ["q01", "q02", "q03"]
    shown = (out / "reader" / "questions.md").read_text()
    assert sorted(path.name for path in (out / "reader").iterdir()) == [
        *(f"{name}.png" for name in key),
        "questions.md",
    ]
    for part in shown.split("## ")[1:]:
        choices = [line.split(". ")[1] for line in part.splitlines() if line[:1].isdigit()]
        assert len(set(choices)) == 8
        assert len({choice.split()[0] for choice in choices}) == 1
        assert choices[key[part[:3]] - 1] in choices
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(out)).read_bytes()
    assert Image.open(out / "reader" / "q01.png").width > 3 * 128
    capsys.readouterr()
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(key | {"q01": key["q01"] % 8 + 1}))
    assert run("--score", out / "key.json", answers) == 0
    assert capsys.readouterr().out.startswith("66.7% of 3 right")
    answers.write_text("{}")
    assert run("--score", out / "key.json", answers) == 2
    assert "no answer to q01, q02, q03" in capsys.readouterr().err


def test_bad_usage_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "cat", "cat")
    for arguments, message in (
        (["--data", folder, "--unseen", 3], "3 captions wanted (cat, unseen) and there are 2"),
        (["--data", folder, "--seen", 1, 2], "one number a folder"),
        ([], "expected a model, --data"),
    ):
        assert run(model, *arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
