"""Bills of VAEs and CLIPs: what their folders held, and training again gives the same bits."""

import json
import shutil
from pathlib import Path

import pytest
from fakes_bill import CAPTIONS, MACHINE, write_rows, write_weights
from fakes_data import save_image

from latentdiff.audit.stored_bill import read_bills
from latentdiff.audit.verify import Given, verify
from latentdiff.cli.main import main
from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import to_yaml
from latentdiff.config.model import ModelConfig
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.pipeline.files.model_info import BILL_NAME, CONTENT_NAME
from latentdiff.training.bill.base import base_hash, base_hashes
from latentdiff.training.bill.bill import Segment
from latentdiff.training.bill.folder_runs import (
    FolderConfig,
    gather_folder_materials,
    read_roots,
)
from latentdiff.training.clip.train_clip import train_clip
from latentdiff.training.vae.train_vae import train_vae

CONFIGS = {"vae": VaeConfig, "clip": ClipConfig}
EXPORTS = {"vae": ("vae",), "clip": ("clip", "text_encoder", "tokenizer")}
SMALL = {
    **{"max_steps": 2, "batch_size": 2, "mixed_precision": "fp32", "num_workers": 0},
    **{"report_to": "none", "lr_warmup_steps": 0},
}
SMALL_VAE = {"resolution": 16, "block_out_channels": (8, 16), "norm_num_groups": 4}
SMALL_CLIP = {
    **{"resolution": 16, "width": 32, "text_width": 32, "embed_dim": 16, "num_layers": 1},
    **{"text_num_layers": 1, "vocab_size": 520, "max_tokens": 8},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, name in enumerate(CAPTIONS):
        save_image(tmp_path / "data" / name, seed)
    write_rows(tmp_path / "data", CAPTIONS)
    return tmp_path / "data"


def config_of(kind: str, data: Path, **changes: object) -> FolderConfig:
    return CONFIGS[kind](roots=(str(data),), output_dir=str(data.parent / "run"), **changes)


def exported(kind: str, data: Path, **changes: object) -> Path:
    """Return the folder of a run with the bill of what it was trained on, and few weights."""
    config, run = config_of(kind, data, **changes), data.parent / "run"
    folders = read_roots(type(config), config.roots)
    materials = gather_folder_materials(config, folders, machine=MACHINE)
    for name in EXPORTS[kind]:
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
        if name != "tokenizer":
            write_weights(run / name / "model.safetensors", 1)
        materials.attach_to_folder(run / name, artifact=name, lists_images=name == EXPORTS[kind][0])
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def found(run: Path, *data: Path) -> dict[str, list[str]]:
    """Return the details of each part that differs."""
    verdict = verify(str(run), Given([str(one) for one in data]))
    return {one.part: list(one.details) for one in verdict.findings if one.answer == "differs"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vae_and_a_clip_are_proven_and_tampering_is_named(kind: str, data: Path) -> None:
    run = exported(kind, data)
    assert found(run, data) == {}
    with pytest.raises(ValueError, match="names 2 folders, expected 1"):
        found(run, data, data)
    assert str(data.parent) not in (run / kind / BILL_NAME).read_text()
    save_image(data / "a/0.png", 99)
    (data / "b/3.png").unlink()
    assert found(run, data) == {"data": ["changed  a/0.png: image", "removed  b/3.png"]}
    (run / kind / "config.json").write_text("[]")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("learning_rate: 0.001", "learning_rate: 0.1"))
    parts = {name.split()[-1] for name in found(run)}
    assert parts == {"files", "config"}


def test_captions_count_for_a_clip_and_not_for_a_vae(data: Path, tmp_path: Path) -> None:
    clip = exported("clip", data)
    clip = clip.rename(tmp_path / "clip run")
    vae = exported("vae", data)
    write_rows(data, CAPTIONS | {"a/1.png": ["other"]})
    assert found(clip, data) == {"data": ["changed  a/1.png: captions"]}
    assert found(vae, data) == {}
    assert "captions are not read" in (vae / "vae" / CONTENT_NAME).read_text()


def test_names_are_left_out_where_hashes_are_asked_for(data: Path) -> None:
    run = exported("vae", data, bill_of_materials="hashes")
    assert "b/3.png" not in (run / "vae" / BILL_NAME).read_text()
    assert found(run, data) == {}


def test_a_run_resumed_over_other_images_is_of_neither(data: Path) -> None:
    config = config_of("vae", data)
    first = gather_folder_materials(config, read_roots(VaeConfig, config.roots), machine=MACHINE)
    recorded = [Segment(**json.loads(json.dumps(one))) for one in first.to_json()]
    again = {"machine": MACHINE, "recorded": recorded, "from_step": 5}
    same = gather_folder_materials(config, read_roots(VaeConfig, config.roots), **again)
    assert same.segments == first.segments
    save_image(data / "a/0.png", 99)
    folders = read_roots(VaeConfig, config.roots)
    assert [
        one.from_step for one in gather_folder_materials(config, folders, **again).segments
    ] == [
        0,
        5,
    ]
    repeated = gather_folder_materials(config, folders, trains=False, **again)
    assert repeated.segments == first.segments


def test_a_bill_next_to_a_vae_is_no_part_of_what_a_run_begins_with(data: Path) -> None:
    run = exported("vae", data)
    plain = shutil.copytree(run / "vae", data.parent / "plain")
    for name in (BILL_NAME, CONTENT_NAME):
        (plain / name).unlink()
    assert base_hash(str(plain), role="vae") == base_hash(str(run / "vae"), role="vae")
    root = read_bills(str(run))[0].bill.root
    for place in (run, run / "vae"):
        config = Config(model=ModelConfig(vae=str(place)))
        assert base_hashes(config)["vae"]["bill"] == root


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_again_gives_the_same_bits(
    kind: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SMALL | (SMALL_VAE if kind == "vae" else SMALL_CLIP)
    config = config_of(kind, data, **settings)
    assert (train_vae if kind == "vae" else train_clip)(config) == 0
    run = Path(config.output_dir)
    assert [one.bill.artifact for one in read_bills(str(run))] == [*EXPORTS[kind]]
    assert main(["verify", str(run), "--data", str(data), "--rerun"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("same (equal bit for bit)") == len(EXPORTS[kind])
    assert shown.endswith("proven: nothing that was checked differs\n")
