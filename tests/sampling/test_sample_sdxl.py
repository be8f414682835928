"""The sample command with SDXL: second prompts and sizes, as options and in prompt files."""

import json

import numpy as np
import pytest
from fakes_pipeline import tiny_pipeline
from fakes_scripts import run_script
from fakes_sdxl import sdxl_pipeline
from PIL import Image

from latentdiff.pipeline.png_metadata import read_settings

SIZES = {"original_size": [40, 24], "crops_coords_top_left": [3, 5], "target_size": [32, 16]}
LINES = [
    {"prompt": "a cat", "prompt_2": "a dog", "negative_original_size": [8, 8]},
    {"prompt": "a red heart", "negative_prompt": "", "seed": 40} | SIZES,
    {"prompt": "a cat", "seed": 7},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny SDXL, a tiny model of text, and a file of prompts."""
    folder = tmp_path_factory.mktemp("sdxl")
    sdxl_pipeline().save_pretrained(folder / "sdxl")
    tiny_pipeline().save_pretrained(folder / "sd1")
    lines = "\n".join(json.dumps(line) for line in LINES)
    (folder / "prompts.jsonl").write_text(lines)
    return folder


def run(*arguments):
    return run_script("sample.py", *arguments, "--steps", 1, "--dtype", "float32")


def test_lines_of_a_file_have_their_own_second_prompts_and_sizes(model, tmp_path, capsys):
    arguments = [model / "sdxl", "--prompt_file", model / "prompts.jsonl", "--out", tmp_path]
    arguments += ["--target_size", "[24,24]", "--json"]
    assert run(*arguments) == 0
    pipe = sdxl_pipeline()
    for number, line in enumerate(LINES):
        path = tmp_path / f"{number:06d}.png"
        call = {"seed": number, "target_size": [24, 24]} | line
        stated = read_settings(path)["call"]
        assert {name: stated[name] for name in call} == call
        assert stated.keys() & SIZES.keys() == call.keys() & SIZES.keys()
        expected = np.asarray(pipe(**call, num_inference_steps=1).images[0], dtype=int)
        assert np.abs(np.asarray(Image.open(path), dtype=int) - expected).max() <= 1
    capsys.readouterr()
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["--original_size", "[9,8]"], "original_size"),
        (["--prompt_2", "a dog"], "prompt_2"),
        (["--negative_prompt", ""], "negative_prompt"),
    ],
)
def test_an_image_of_other_conditioning_is_not_taken_for_done(
    model, tmp_path, capsys, changes, name
):
    arguments = [model / "sdxl", "a cat", "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    assert run(*arguments, *changes) == 2
    assert f"an image of another {name};" in capsys.readouterr().err


def test_settings_of_a_file_make_its_image_again(model, tmp_path):
    given = ["a cat", "--prompt_2", "a dog", "--negative_prompt", "b", "--negative_prompt_2", "c"]
    given += ["--original_size", "[64,8]", "--negative_target_size", "[8,8]"]
    assert run(model / "sdxl", *given, "--out", tmp_path / "first.png") == 0
    again = ["--settings_from", tmp_path / "first.png", "--out", tmp_path / "again.png"]
    assert run(model / "sdxl", *again) == 0
    first, second = (read_settings(tmp_path / name)[0] for name in ("first.png", "again.png"))
    assert first == second
    images = [np.asarray(Image.open(tmp_path / name)) for name in ("first.png", "again.png")]
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sd1", "a", "--prompt_2", "b"], "prompt_2 is read by SDXL alone"),
        (["sd1", "a", "--target_size", "[8,8]"], "target_size is read by SDXL alone"),
        (["sdxl", "a", "--original_size", "[8]"], "original_size must be two ints, each in 1.."),
        (["sdxl", "a", "--crops_coords_top_left", "[-1,0]"], "must be two ints, each in 0.."),
        (["sdxl", "a", "--negative_prompt_2", "b"], "negative_prompt_2 needs negative_prompt"),
        (["sdxl", "--prompt_file", '{"prompt": "a", "target_size": 8}'], "line 1 has target_size"),
        (["sdxl", "--prompt_file", '{"prompt": "a", "prompt_2": 8}'], "line 1 has prompt_2=8"),
        (["sdxl", "--prompt_file", '{"prompt": "a", "sizes": {}}'], "unknown entries ['sizes']"),
    ],
)
def test_bad_input_is_one_line_and_status_two(model, tmp_path, capsys, given, message):
    name, *rest = given
    if rest[0] == "--prompt_file":
        (tmp_path / "lines.jsonl").write_text(rest[1])
        rest[1] = tmp_path / "lines.jsonl"
    assert run(model / name, *rest, "--out", tmp_path / "sheet.png") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
