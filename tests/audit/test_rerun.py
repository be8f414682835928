"""Runs write their bill; verify proves them, and a rerun gives the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_finetune import finetuning, world
from safetensors import safe_open

from latentdiff.audit import rerun as module
from latentdiff.audit.rerun import relative_distance
from latentdiff.cli.main import main
from latentdiff.pipeline.files.adapter_file import stored_metadata
from latentdiff.pipeline.files.model_info import BILL_KEY
from latentdiff.training.bill.bill import BILL_NAME
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]


@pytest.fixture(scope="module")
def lora(world: Path) -> Path:
    assert train(finetuning(world, world / "lora-run", finetune__method="lora")) == 0
    return world / "lora-run"


def test_a_run_is_proven_and_its_rerun_has_the_same_bits(
    world: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(world / "base" / "pipeline")
    arguments = ["--data", str(world / "data"), "--base", base]
    assert main(["verify", str(lora / "lora_kohya.safetensors"), *arguments, "--rerun"]) == 0
    shown = capsys.readouterr().out
    assert "rerun     same (equal bit for bit)" in shown
    assert shown.endswith("proven: nothing that was checked differs\n")


def test_a_run_from_scratch_is_proven_and_its_rerun_has_the_same_bits(world: Path) -> None:
    arguments = ["--data", str(world / "data"), "--base", str(world / "vae"), "--rerun"]
    assert main(["verify", str(world / "base"), *arguments]) == 0


def test_every_export_carries_the_root(lora: Path) -> None:
    for folder in ("pipeline", "lora"):
        entries = json.loads((lora / folder / BILL_NAME).read_text())
        (path,) = [
            path
            for path in (lora / folder).rglob("*.safetensors")
            if BILL_KEY in stored_metadata(path)
        ]
        assert json.loads(stored_metadata(path)[BILL_KEY])["root"] == entries["root"]
        assert entries["artifact"] == folder
    card = (lora / "pipeline" / "README.md").read_text()
    root = json.loads((lora / "pipeline" / BILL_NAME).read_text())["root"]
    assert f"| Root of its bill of materials | {root} |" in card
    metadata = stored_metadata(lora / "lora_kohya.safetensors")
    assert {"ss_network_dim", "modelspec.title", "sshs_model_hash", BILL_KEY} <= set(metadata)


def test_stock_diffusers_opens_files_with_a_bill(lora: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(lora / "pipeline")
    for name in ("lora/pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        pipe.load_lora_weights(lora / name)
        pipe.unload_lora_weights()
    path = lora / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        for name, tensor in pipe.unet.state_dict().items():
            assert torch.equal(tensor, file.get_tensor(name)), name


def test_a_changed_image_is_named_and_refuted(
    world: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(world / "data", tmp_path / "data")
    changed = sorted(data.rglob("*.png"))[0]
    changed.write_bytes(changed.read_bytes() + b"x")
    assert main(["verify", str(lora), "--data", str(data), "--rerun"]) == 1
    shown = capsys.readouterr().out
    assert f"changed  {changed.relative_to(data).as_posix()}: image" in shown
    assert shown.endswith("refuted\n")


def test_a_rerun_elsewhere_is_held_to_a_bound(
    lora: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again = tmp_path / "run" / "lora"
    shutil.copytree(lora / "lora", again)
    stored = module.read_bill(str(lora / "lora"))
    forged = stored.bill.__class__(**{**vars(stored.bill), "weights": "another"})
    stored = stored.__class__(**{**vars(stored), "bill": forged})
    assert module._compare(stored, again, bound=0.01).answer == "differs"
    monkeypatch.setattr(module, "differing_circumstances", lambda bill: ["cpu"])
    assert module._compare(stored, again, bound=0.01).answer == "same"


def test_the_distance_is_over_the_norm() -> None:
    before = {"a": torch.tensor([3.0, 4.0])}
    assert relative_distance(before, {"a": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)
    assert relative_distance(before, {"b": before["a"]}) == float("inf")


def test_without_a_bill_nothing_is_written(world: Path) -> None:
    run = world / "no-bill"
    assert train(finetuning(world, run, data__bill_of_materials="none")) == 0
    assert not list(run.rglob(BILL_NAME))
    assert main(["verify", str(run)]) == 2
