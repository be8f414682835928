"""The recipe of the model of 128 px: what its data calls an image, another VAE below a model."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from fakes_models import make_unet, make_vae
from fakes_pipeline import tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from latentdiff import LatentDiffPipeline
from latentdiff.models.weights import weights_hash

FOLDER = Path(__file__).parents[2] / "benchmarks"
NOUNS = {"cat", "dog", "apple", "car", "heart", "flower", "ball", "glasses"}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch):
    """Import a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize(
    ("subject", "noun"),
    [
        *(("a cat", "cat"), ("a cat face", "cat"), ("a guide dog", "dog"), ("a rose", "flower")),
        *(("a red apple", "apple"), ("a police car", "car"), ("a pair of glasses", "glasses")),
        *(("a hot dog", None), ("a light heart", None), ("a rice ball", None)),
        ("a caterpillar", None),
    ],
)
def test_a_subject_is_called_by_its_everyday_noun(recipe, subject, noun) -> None:
    assert recipe("mini_data").noun_of({"subject": subject}, NOUNS) == noun


def write_source(data: Path, source: str, folder: str, rows: list[dict]) -> None:
    (data / source / folder).mkdir(parents=True)
    for row in rows:
        Image.new("RGB", (16, 16), "red").save(data / source / folder / row["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / source / folder / "metadata.jsonl").write_text(lines)


def test_nouns_are_half_of_the_captions_and_colourless_images_never_plain(recipe, tmp_path) -> None:
    rows = [
        {"file_name": "1.png", "text": "a cat face, 3d style", "subject": "a cat face"},
        {"file_name": "2.png", "text": "a cat, black and white style", "subject": "a cat"},
        {"file_name": "3.png", "text": "an idea, 3d style", "subject": "an idea"},
    ]
    for row, style in zip(rows, ("3d style", "black and white style", "3d style"), strict=True):
        row["style_text"] = style
    mini_data = recipe("mini_data")
    for source, folders in mini_data.SPLITS.items():
        for folder in folders.values():
            is_emoji = source == "emoji-styles" and folder == "train"
            write_source(tmp_path / "data", source, folder, rows if is_emoji else [])
    found = list(mini_data.rows(tmp_path / "data", "emoji-styles", "train"))
    assert [one["captions"] for one in found] == [
        ["a cat face, 3d style", "a cat face"],
        ["a cat, black and white style"],
        ["an idea, 3d style", "an idea"],
    ]
    mini_data.stage_nouns(tmp_path / "data", tmp_path / "out", NOUNS)
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["emoji-styles"]
    table = (tmp_path / "out/emoji-styles/train/metadata.jsonl").read_text().splitlines()
    (row,) = map(json.loads, table)
    assert (row["file_name"], row["subject"]) == ("1.png", "a cat")
    texts = ["a cat, 3d style", "a cat face, 3d style", "a cat face"]
    assert row["captions"] == texts + ["a cat"] * 3


def test_another_vae_comes_below_a_checkpoints_weights(recipe, tmp_path, monkeypatch) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    unet, vae = make_unet(), make_vae()
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "step").mkdir()
    weights = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    save_file(weights, tmp_path / "step" / "model.safetensors")
    paths = [str(tmp_path / name) for name in ("model", "vae", "out")]
    given = ["--checkpoint", str(tmp_path / "step"), "--scaling_factor", "0.5"]
    monkeypatch.setattr(sys, "argv", ["change_vae.py", *paths, *given])
    recipe("change_vae").main()
    found = LatentDiffPipeline.from_pretrained(tmp_path / "out")
    assert weights_hash(found.unet) == weights_hash(unet)
    assert weights_hash(found.vae) == weights_hash(vae)
    assert weights_hash(found.text_encoder) == weights_hash(pipe.text_encoder)
    assert found.vae.config["scaling_factor"] == 0.5
    save_file({"unet.conv_in.bias": unet.conv_in.bias}, tmp_path / "step" / "model.safetensors")
    with pytest.raises(SystemExit, match=r"lacks .* of the unet"):
        recipe("change_vae").main()
