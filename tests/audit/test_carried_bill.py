"""What is made of an export carries its bill, under a root of its own that names the other's."""

import shutil
from pathlib import Path

import pytest
from fakes_bill import answers, copy, origin, write_weights

from latentdiff.audit.carried_bill import carry_bill
from latentdiff.audit.rerun import rerun
from latentdiff.audit.stored_bill import read_bills
from latentdiff.audit.verify import Given, verify
from latentdiff.pipeline.files.model_info import BILL_NAME

__all__ = ["copy", "origin"]


def made_from(copy: Path, model: str) -> str:
    """Return the root that the bill of an export names as its origin's."""
    return read_bills(str(copy / model))[0].bill.made_from["root"]


def test_a_single_file_is_proven_with_the_data_and_base_of_its_model(copy: Path) -> None:
    file = copy / "one.safetensors"
    write_weights(file, 3)
    root = carry_bill(str(copy / "model"), file, artifact="single_file")
    assert made_from(copy, file.name) == read_bills(str(copy / "model"))[0].bill.root != root
    found = answers(copy, file.name, root=root)
    assert found.pop("made from") == "not checked"
    assert set(found.values()) == {"same"}
    with pytest.raises(ValueError, match="this was made of an export, pipeline of root"):
        rerun(str(file), Given([str(copy / "data")], {"": str(copy / "base")}))
    (copy / "data" / "a/0.png").unlink()
    assert answers(copy, file.name)["data"] == "differs"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert answers(copy, file.name)["weights"] == "differs"


@pytest.mark.parametrize("artifact", ["packed", "averaged"])
def test_a_folder_that_is_made_of_a_model_lists_its_images(copy: Path, artifact: str) -> None:
    write_weights(copy / "half" / "unet" / "diffusion_pytorch_model.safetensors", 3)
    root = carry_bill(str(copy / "model"), copy / "half", artifact=artifact)
    found = answers(copy, "half", root=root)
    assert found.pop("made from") == "not checked"
    assert set(found.values()) == {"same"}
    (copy / "data" / "b/2.png").unlink()
    verdict = verify(str(copy / "half"), Given([str(copy / "data")]))
    assert ["removed  b/2.png"] in [list(one.details) for one in verdict.findings]


def test_a_loras_file_in_other_names_carries_the_loras_bill(copy: Path) -> None:
    file = copy / "other.safetensors"
    write_weights(file, 3)
    assert carry_bill(str(copy / "lora_kohya.safetensors"), file, artifact="converted_lora")
    assert made_from(copy, file.name) == made_of_file(copy)


def made_of_file(copy: Path) -> str:
    return read_bills(str(copy / "lora_kohya.safetensors"))[0].bill.root


def test_a_model_that_was_changed_passes_on_no_bill(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = copy / "one.safetensors"
    write_weights(file, 3)
    (copy / "model" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert carry_bill(str(copy / "model"), file, artifact="single_file") == ""
    assert "that of" in caplog.text
    with pytest.raises(ValueError, match="has no bill of materials"):
        read_bills(str(file))


def test_a_model_without_a_bill_passes_on_none(copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    write_weights(file, 3)
    for source in (str(copy / "base"), "owner/name", "latentdiff-mini"):
        assert carry_bill(source, file, artifact="single_file") == ""
    assert carry_bill(str(copy / "model"), file, artifact="converted_lora") == ""


def test_how_an_export_was_made_is_part_of_its_root(copy: Path) -> None:
    half = copy / "half"
    write_weights(half / "unet" / "diffusion_pytorch_model.safetensors", 3)
    carry_bill(str(copy / "model"), half, artifact="packed")
    bill = half / BILL_NAME
    bill.write_text(bill.read_text().replace('"packed"', '"averaged"'))
    assert answers(copy, "half")["root"] == "differs"
    shutil.copy(copy / "model" / BILL_NAME, bill)
    assert answers(copy, "half")["root"] == "differs"
