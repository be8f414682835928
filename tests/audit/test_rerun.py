"""Runs write their bill; verify proves them, and a rerun gives the same bits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_finetune import finetuning, world
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.audit import rerun as module
from latentdiff.audit.rerun import learned_distance, rerun
from latentdiff.audit.stored_bill import read_bills
from latentdiff.audit.verify import Given, verify
from latentdiff.cli.main import main
from latentdiff.pipeline.files.adapter_file import stored_metadata
from latentdiff.pipeline.files.model_info import BILL_KEY, BILL_NAME
from latentdiff.sampling.hub_upload import plan_upload
from latentdiff.training.bill.bill import Bill
from latentdiff.training.bill.contents import attach_to_folder
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]
LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def lora(world: Path) -> Path:
    assert train(finetuning(world, world / "lora-run", finetune__method="lora")) == 0
    return world / "lora-run"


def given(world: Path) -> Given:
    return Given([str(world / "data")], {"": str(world / "base" / "pipeline")})


def test_a_run_is_proven_and_its_rerun_has_the_same_bits(
    world: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(world / "base" / "pipeline")
    arguments = ["--data", str(world / "data"), "--base", base]
    assert main(["verify", str(lora), *arguments, "--rerun"]) == 0
    shown = capsys.readouterr()
    for name in ("pipeline", "lora", "lora_kohya.safetensors"):
        assert f"{name} weights same" in shown.out
        assert f"{name} rerun same (equal bit for bit)" in shown.out
    assert shown.out.endswith("proven: nothing that was checked differs\n")
    assert "latentdiff-rerun-" not in shown.err


def test_a_run_from_scratch_is_proven_and_its_rerun_has_the_same_bits(world: Path) -> None:
    arguments = ["--data", str(world / "data"), "--base", str(world / "vae"), "--rerun"]
    assert main(["verify", str(world / "base"), *arguments]) == 0


@pytest.mark.parametrize("method", ["full", "textual_inversion"])
def test_a_fine_tune_is_proven_and_its_rerun_has_the_same_bits(world: Path, method: str) -> None:
    word = {
        "finetune__token": "<dot>",
        "finetune__initializer_token": "circle",
        "finetune__instance_prompts": json.dumps(["a <dot>"]),
    }
    settings = {"finetune__method": method} | (word if method == "textual_inversion" else {})
    run = world / f"{method}-run"
    assert train(finetuning(world, run, **settings)) == 0
    base = str(world / "base" / "pipeline")
    arguments = ["--data", str(world / "data"), "--base", base, "--rerun"]
    assert main(["verify", str(run), *arguments]) == 0


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
    for name in (LORA, "lora_kohya.safetensors"):
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


def test_every_export_of_a_run_is_looked_at(world: Path, lora: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora, tmp_path / "run")
    for name in (LORA, "lora_kohya.safetensors"):
        with (run / name).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x7f")
    found = {one.part: one.answer for one in verify(str(run), given(world)).findings}
    differing = {part for part, answer in found.items() if answer == "differs"}
    assert differing == {"lora weights", "lora_kohya.safetensors weights"}


def test_a_run_that_is_exported_again_over_other_data_says_what_it_was_trained_on(
    world: Path, lora: Path, tmp_path: Path
) -> None:
    """The same command again, which exports a run that has come to its end."""
    run = shutil.copytree(lora, tmp_path / "run")
    before = read_bills(str(run / "lora"))[0].bill.last.data
    changed = sorted((world / "data").rglob("*.png"))[0]
    content = changed.read_bytes()
    changed.write_bytes(content + b"x")
    try:
        assert train(finetuning(world, run, finetune__method="lora")) == 0
        assert not verify(str(run), given(world)).is_proven
    finally:
        changed.write_bytes(content)
    assert read_bills(str(run / "lora"))[0].bill.last.data == before
    assert verify(str(run), given(world)).is_proven


def test_the_bill_names_no_place_of_this_machine_for_a_rerun(lora: Path, tmp_path: Path) -> None:
    """A rerun reads what is given and writes to its own folder, whatever the bill says."""
    bill = read_bills(str(lora / "lora"))[0].bill
    own = Given(["data"], {"": "base"})
    config = module._settings(bill, own, tmp_path)
    assert config.train.report_to == "none"
    assert config.output_dir == str(tmp_path / "run")
    assert (config.data.root, config.model.pretrained) == ("data", "base")
    with pytest.raises(ValueError, match="--rerun needs model base; give --base model=PATH"):
        rerun(str(lora), Given(["data"]))


def test_a_run_resumed_over_other_data_is_not_trained_again(lora: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lora / "lora", tmp_path / "lora")
    bill = read_bills(str(folder))[0].bill
    later = replace(bill.last, from_step=2, data={"images": "another", "num_images": 1})
    attach_to_folder(folder, Bill((*bill.segments, later)), artifact="lora")
    with pytest.raises(ValueError, match="was resumed at step 2 with other settings, data or base"):
        rerun(str(folder), Given(["data"], {"": "base"}))


def test_a_rerun_elsewhere_is_held_to_a_bound(lora: Path, tmp_path: Path) -> None:
    again, base = shutil.copytree(lora / "lora", tmp_path / "run" / "lora"), None
    path = again / Path(LORA).name
    tensors = {name: tensor * 1.01 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=stored_metadata(path))
    (stored,) = read_bills(str(lora / "lora"))
    found = module._compare(stored, again, base=base, bound=0.02)
    assert found.answer == "differs"
    assert "expected equal bits on this machine" in found.details[0]
    code = {**stored.bill.last.code, "machine": {"cpu": "another"}}
    elsewhere = replace(stored.bill, segments=(replace(stored.bill.last, code=code),))
    stored = replace(stored, bill=elsewhere)
    assert module._compare(stored, again, base=base, bound=0.02).answer == "same"
    assert module._compare(stored, again, base=base, bound=0.005).answer == "differs"
    (again / "added.json").write_text("{}")
    assert module._compare(stored, again, base=base, bound=0.02).details == ["changed  added.json"]


def test_on_a_gpu_no_equal_bits_are_asked_for(lora: Path) -> None:
    bill = read_bills(str(lora / "lora"))[0].bill
    code = {**bill.last.code, "machine": {**bill.last.code["machine"], "device": "NVIDIA H200"}}
    on_gpu = replace(bill, segments=(replace(bill.last, code=code),))
    assert module._circumstances(on_gpu, on_gpu) == ["order of sums on an accelerator"]
    assert module._circumstances(bill, bill) == []
    assert "device" in module._circumstances(on_gpu, bill)


def test_the_distance_is_over_what_was_learned(tmp_path: Path) -> None:
    def stored(name: str, *values: float) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        save_file({"a": torch.tensor(values)}, path)
        return path

    files = {"x.safetensors": (stored("before/x", 3, 4), stored("now/x", 3, 4.5))}
    assert learned_distance(files) == pytest.approx(0.1)
    stored("base/x.safetensors", 3, 3)
    assert learned_distance(files, base=tmp_path / "base") == pytest.approx(0.5)
    stored("now/x", 3, float("nan"))
    assert learned_distance(files) == float("inf")
    save_file({"b": torch.ones(2)}, tmp_path / "now" / "x")
    assert learned_distance(files) == float("inf")


def test_an_upload_keeps_the_bill_and_has_a_card_of_its_new_name(lora: Path) -> None:
    card = plan_upload(str(lora), "me/cats").card
    root = json.loads((lora / "pipeline" / BILL_NAME).read_text())["root"]
    assert "# me/cats\n" in card
    assert root in card
    files = plan_upload(str(lora), "me/cats", part="lora").files
    assert {BILL_NAME, "training_content.md", "lora_kohya.safetensors"} <= set(files)


def test_without_a_bill_nothing_is_written(world: Path) -> None:
    run = world / "no-bill"
    assert train(finetuning(world, run, data__bill_of_materials="none")) == 0
    assert not list(run.rglob(BILL_NAME))
    assert main(["verify", str(run)]) == 2
