"""The bill of materials: its tree, its text, and what it says of a run that was resumed."""

import hashlib
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from fakes_bill import (
    CAPTIONS,
    MACHINE,
    answers,
    config_of_origin,
    copy,
    details,
    materials_of,
    origin,
    write_rows,
)
from fakes_data import save_image, write_jsonl
from fakes_key_lists import check_keys, key_list
from safetensors.numpy import load_file, save_file

from latentdiff.audit.rerun import rerun
from latentdiff.audit.stored_bill import read_bills
from latentdiff.audit.verify import Given
from latentdiff.config.finetune import FinetuneConfig
from latentdiff.config.io import to_yaml
from latentdiff.data.folder.folder import read_folder
from latentdiff.data.folder.folder_names import assign_splits
from latentdiff.pipeline.files.model_info import BILL_KEY, BILL_NAME, CONTENT_NAME
from latentdiff.training.bill.bill import (
    Bill,
    Segment,
    canonical,
    canonical_texts,
    from_text,
    merkle_root,
    to_text,
)
from latentdiff.training.bill.contents import attach_again, attach_to_file, read_header

__all__ = ["copy", "origin"]


def test_the_tree_is_that_of_certificate_transparency() -> None:
    """Against the definition of RFC 6962, section 2.1, by recursion."""

    def root(entries: list[bytes]) -> bytes:
        if not entries:
            return hashlib.sha256(b"").digest()
        if len(entries) == 1:
            return hashlib.sha256(b"\0" + entries[0]).digest()
        k = 1 << (len(entries) - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + root(entries[:k]) + root(entries[k:])).digest()

    for num in range(20):
        entries = [bytes([i]) for i in range(num)]
        assert merkle_root(entries) == root(entries).hex()


def test_a_list_of_texts_has_one_canonical_form() -> None:
    texts = ["", 'a "b" \\', "\n\t\x00\x7f", "é ﬃ 日本 🙂", "\ud800", "</script>"]
    assert canonical_texts(iter(texts)) == canonical(texts)
    assert canonical_texts([]) == canonical([])


def test_without_names_no_prompt_is_told_and_the_data_is_proven(copy: Path) -> None:
    prompts = FinetuneConfig(
        instance_prompts=("a photo of Anna",), class_prompt="a woman", num_class_images=1
    )
    secret = {"trigger_word": "annaface", "caption_prefix": "at home, "}
    materials = materials_of(copy, finetune=prompts, bill_of_materials="hashes", **secret)
    materials.attach_to_folder(copy / "model", artifact="pipeline")
    for path in (copy / "model" / BILL_NAME, copy / "model" / CONTENT_NAME):
        text = path.read_text()
        assert not any(word in text for word in ("Anna", "woman", "annaface", "at home"))
    run = copy / "run"
    shutil.copytree(copy / "model", run / "pipeline")
    own = config_of_origin(copy, finetune=prompts, bill_of_materials="hashes", **secret)
    (run / "config.yaml").write_text(to_yaml(own))
    assert set(answers(copy, "run").values()) == {"same"}
    other = to_yaml(own).replace("annaface", "other")
    (run / "config.yaml").write_text(other)
    assert answers(copy, "run")["config"] == "differs"
    with pytest.raises(ValueError, match="needs the run's folder"):
        rerun(str(run), Given([str(copy / "data")], {"": str(copy / "base")}))
    (copy / "data" / "a/0.png").unlink()
    assert answers(copy)["data"] == "differs"


def test_without_names_the_root_is_the_same_and_no_name_is_told(copy: Path) -> None:
    named = materials_of(copy)
    hashed = materials_of(copy, bill_of_materials="hashes")
    assert hashed.segments == named.segments
    hashed.attach_to_folder(copy / "model", artifact="pipeline")
    assert "a/0.png" not in (copy / "model" / BILL_NAME).read_text()
    assert set(answers(copy).values()) == {"same"}
    save_image(copy / "data" / "a/0.png", 77)
    (copy / "data" / "b/3.png").unlink()
    key = hashlib.sha256(b"b/3.png").hexdigest()
    assert details(copy, "data") == [
        f"removed  the image whose name has the sha256 {key}",
        "changed  a/0.png: image",
    ]


def test_the_bill_and_the_summary_name_no_place(origin: Path) -> None:
    for path in (origin / "model" / BILL_NAME, origin / "model" / CONTENT_NAME):
        assert str(origin) not in path.read_text()
        assert origin.name not in path.read_text()


def test_a_bill_is_read_as_it_was_written(copy: Path) -> None:
    bill = read_bills(str(copy / "model"))[0].bill
    again, root = from_text(to_text(bill, with_images=True), where="it")
    assert again.leaves is not None
    assert (again.root, sorted(again.leaves)) == (bill.root, sorted(bill.leaves))
    assert root == bill.root
    with pytest.raises(ValueError, match="it is no bill of materials"):
        from_text('{"version": 2}', where="it")
    with pytest.raises(ValueError, match="of version 1, expected 2"):
        from_text('{"version": 1}', where="it")


def test_data_that_changed_while_training_is_not_listed(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    materials = materials_of(copy)
    save_image(copy / "data" / "a/0.png", 77)
    root = materials.attach_to_folder(copy / "model", artifact="pipeline")
    assert "they have changed since they were trained on" in caplog.text
    assert read_bills(str(copy / "model"))[0].bill.leaves is None
    assert read_bills(str(copy / "model"))[0].bill.root == root
    assert answers(copy)["data"] == "differs"  # what the model was not trained on
    shutil.rmtree(copy / "data")
    materials.attach_to_folder(copy / "model", artifact="pipeline")
    assert "cannot be read any more" in caplog.text


def test_a_signed_file_keeps_its_tensors_and_metadata(tmp_path: Path, origin: Path) -> None:
    path = tmp_path / "lora_kohya.safetensors"
    save_file({"a": np.arange(6, dtype="f4")}, path, metadata={"ss_network_dim": "4"})
    root = attach_to_file(path, Bill(materials_of(origin).segments)).root
    assert load_file(path)["a"].tolist() == [0, 1, 2, 3, 4, 5]
    metadata = read_header(path)[1]["__metadata__"]
    assert metadata["ss_network_dim"] == "4"
    assert json.loads(metadata[BILL_KEY])["root"] == root
    assert read_header(path)[0] % 8 == 0


@pytest.mark.parametrize("kind", ["lora", "single_file"])
def test_a_bill_leaves_every_name_and_shape_that_comfyui_and_kohya_read(
    tmp_path: Path, origin: Path, kind: str
) -> None:
    expected = key_list(kind)
    if kind == "single_file":  # of gigabytes
        expected = dict.fromkeys(expected, (0,))
    path = tmp_path / "file.safetensors"
    tensors = {name: np.zeros(shape, "f2") for name, shape in expected.items()}
    told = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "ss_network_dim": "4"}
    save_file(tensors, path, metadata=told)
    attach_to_file(path, Bill(materials_of(origin).segments), artifact="single_file")
    check_keys({name: one.shape for name, one in load_file(path).items()}, expected)
    metadata = read_header(path)[1]["__metadata__"]
    assert metadata.pop(BILL_KEY)
    assert metadata == told


def test_the_summary_tells_sources_licences_filters_and_refusals(copy: Path) -> None:
    (copy / "data" / "LICENSE.txt").write_text("\nCC-BY | 4.0\nmore\n")
    save_image(copy / "data" / "tiny.png", 3, width=8, height=8)
    write_rows(copy / "data", CAPTIONS | {"tiny.png": ["tiny"]})
    text = materials_of(copy).segments[-1].content
    assert "| data | CC-BY \\| 4.0 (LICENSE.txt) |" in text
    assert "smaller than data.min_size: 1" in text
    assert "- shorter side of at least 32 pixels" in text
    assert "tiny.png" not in text
    (copy / "data" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    assert "| data | cc0-1.0 |" in materials_of(copy).segments[-1].content


# ---- a run that was resumed ----


def resumed(copy: Path, **how: object) -> dict[str, str]:
    """Return what verify answers of a run that was resumed from the checkpoint of the first."""
    recorded = [Segment(**json.loads(json.dumps(one.to_json()))) for one in how.pop("recorded")]
    given = {"recorded": recorded, "from_step": 5} | how
    materials_of(copy, how=given).attach_to_folder(copy / "model", artifact="pipeline")
    return answers(copy)


def test_a_run_that_was_resumed_with_the_same_has_the_bill_of_one_that_was_not(copy: Path) -> None:
    root = read_bills(str(copy / "model"))[0].bill.root
    first = materials_of(copy).segments
    assert set(resumed(copy, recorded=first).values()) == {"same"}
    assert read_bills(str(copy / "model"))[0].bill.root == root


def test_an_export_that_is_repeated_over_other_data_states_what_was_trained_on(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = materials_of(copy).segments
    before = read_bills(str(copy / "model"))[0].bill.root
    save_image(copy / "data" / "a/0.png", 77)
    assert resumed(copy, recorded=first, trains=False)["data"] == "differs"
    assert "they have changed since they were trained on" in caplog.text
    assert read_bills(str(copy / "model"))[0].bill.root == before


def test_a_run_that_was_resumed_over_other_data_is_of_neither(copy: Path) -> None:
    first = materials_of(copy).segments
    shutil.copytree(copy / "data", copy / "first")
    save_image(copy / "data" / "a/0.png", 77)
    assert resumed(copy, recorded=first)["data"] == "differs"
    assert details(copy, "data") == ["steps from 0 on had other images"]
    assert answers(copy, data=[str(copy / "first")])["data"] == "differs"


def test_steps_that_no_checkpoint_tells_of_are_not_claimed(copy: Path) -> None:
    assert resumed(copy, recorded=())["data"] == "differs"
    assert details(copy, "data") == ["steps from 0 on are not recorded"]
    assert "Not recorded." in (copy / "model" / CONTENT_NAME).read_text()
    assert resumed(copy, recorded=(), trains=False)["data"] == "differs"


def test_another_machine_is_stated_and_refutes_nothing(copy: Path) -> None:
    first = materials_of(copy).segments
    other = MACHINE | {"num_threads": 8}
    assert set(resumed(copy, recorded=first, machine=other).values()) == {"same"}
    segments = read_bills(str(copy / "model"))[0].bill.segments
    assert [one.code["machine"]["num_threads"] for one in segments] == [1, 8]


def test_class_images_are_part_of_the_data(copy: Path) -> None:
    folder = copy / "class" / "key"
    save_image(folder / "00000.png", 1)
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "00000.png", "text": "a dog"}])
    materials = materials_of(
        copy,
        finetune=FinetuneConfig(class_prompt="a dog", num_class_images=1),
        how={"class_images": read_folder(folder)},
    )
    materials.attach_to_folder(copy / "model", artifact="pipeline")
    assert answers(copy)["class images"] == "not checked"
    given = {"class_images": str(copy / "class")}
    assert set(answers(copy, **given).values()) == {"same"}
    save_image(folder / "00000.png", 2)
    assert answers(copy, **given)["class images"] == "differs"


def test_a_folder_whose_facts_were_changed_by_us_gets_its_bill_again(copy: Path) -> None:
    (copy / "model" / "latentdiff.json").write_text("{}")
    assert details(copy, "files") == ["added    latentdiff.json"]
    root = attach_again(copy / "model")
    assert set(answers(copy, root=root).values()) == {"same"}
    assert attach_again(copy / "base") == ""


def test_a_disk_that_does_not_take_the_bill_costs_no_model(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentdiff.training.bill.contents.add_to_header", full)
    assert materials_of(copy).attach_to_folder(copy / "model", artifact="pipeline") == ""
    assert "No space left on device" in caplog.text


def test_a_name_has_the_same_split_in_each_form_of_unicode() -> None:
    names = [f"café {i}.png" for i in range(200)]
    others = [unicodedata.normalize("NFD", name) for name in names]
    splits = [assign_splits(some, 0.2, num=200).tolist() for some in (names, others)]
    assert splits[0] == splits[1]
    assert 0 < sum(splits[0]) < 200
