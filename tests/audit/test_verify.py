"""latentdiff verify: tampering is found each time, and an honest copy never refuted."""

import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_bill import (
    CAPTIONS,
    answers,
    config_of_origin,
    copy,
    details,
    materials_of,
    origin,
    write_rows,
    write_weights,
)
from fakes_data import save_image, write_jsonl
from safetensors.numpy import load_file, save_file

from latentdiff.audit import verify as module
from latentdiff.audit.stored_bill import read_bills
from latentdiff.audit.verify import Given, differences, verify
from latentdiff.config.data import DataSource
from latentdiff.config.finetune import FinetuneConfig
from latentdiff.config.io import load_stored_config, to_yaml
from latentdiff.config.model import ModelConfig
from latentdiff.config.text_to_image import Config
from latentdiff.pipeline.files.model_info import BILL_NAME, CONTENT_NAME
from latentdiff.training.bill.bill import from_text
from latentdiff.training.bill.contents import add_to_header, read_header

__all__ = ["copy", "origin"]


@pytest.fixture(scope="module", autouse=True)
def settings_read_once() -> Iterator[None]:
    """Parse equal settings once: two thirds of the time of verifying eight small images."""
    known: dict[str, Config] = {}

    def load(path: Path, kind: type[Config]) -> Config:
        text = path.read_text()
        if text not in known:
            known[text] = load_stored_config(path, kind)
        return known[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_stored_config", load)
        yield


# ---- tampering ----


def flip_byte(path: Path, rng: random.Random, *, first: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def tamper_image(copy: Path, rng: random.Random) -> str:
    name = rng.choice(list(CAPTIONS))
    path = copy / "data" / name
    times = path.stat()
    # past the header, so that the image still counts; as a forger does, with size and time kept
    flip_byte(path, rng, first=path.stat().st_size - 12)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return "data"


def tamper_caption(copy: Path, rng: random.Random) -> str:
    captions = {name: list(texts) for name, texts in CAPTIONS.items()}
    texts = captions[rng.choice(list(CAPTIONS))]
    at = rng.randrange(len(texts[0]))
    texts[0] = texts[0][:at] + "~" + texts[0][at:]
    write_rows(copy / "data", captions)
    return "data"


def tamper_add(copy: Path, rng: random.Random) -> str:
    name = f"{rng.choice('abc')}/new{rng.randrange(99)}.png"
    save_image(copy / "data" / name, 50 + rng.randrange(9))
    write_rows(copy / "data", CAPTIONS | {name: ["new"]})
    return "data"


def tamper_remove(copy: Path, rng: random.Random) -> str:
    name = rng.choice(list(CAPTIONS))
    (copy / "data" / name).unlink()
    rest = {one: texts for one, texts in CAPTIONS.items() if one != name}
    write_rows(copy / "data", rest if rng.random() < 0.5 else CAPTIONS)
    return "data"


def tamper_config(copy: Path, rng: random.Random) -> str:
    path = copy / "model" / BILL_NAME
    entries = json.loads(path.read_text())
    config = entries["segments"][0]["config"]
    section = rng.choice(["train", "diffusion", "data", "finetune"])
    config[section][rng.choice(sorted(config[section]))] = f"forged {rng.random()}"
    if rng.random() < 0.5:  # a forger who computes the root of the sidecar again
        bill, _ = from_text(json.dumps(entries), where="it")
        entries["root"] = bill.root
    path.write_text(json.dumps(entries))
    return "root"


def tamper_weights(copy: Path, rng: random.Random) -> str:
    path = rng.choice(sorted((copy / "model").rglob("*.safetensors")))
    flip_byte(path, rng, first=read_header(path)[0])
    return "weights"


def tamper_base(copy: Path, rng: random.Random) -> str:
    path = rng.choice(sorted((copy / "base").rglob("*.safetensors")))
    flip_byte(path, rng, first=read_header(path)[0])
    return "base model"


TAMPERING = [
    *(tamper_image, tamper_caption, tamper_add, tamper_remove),
    *(tamper_config, tamper_weights, tamper_base),
]


@pytest.mark.parametrize("tamper", TAMPERING)
def test_tampering_is_found_each_time_in_its_part(
    origin: Path, tmp_path: Path, tamper: Callable[[Path, random.Random], str]
) -> None:
    for seed in range(15):  # 105 in all
        copy = tmp_path / str(seed)
        shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("cache"))
        part = tamper(copy, random.Random(seed))
        assert answers(copy)[part] == "differs", (seed, part)


def forge(path: Path) -> None:
    """Replace the numbers of a file of weights, and keep a copy of them."""
    tensors = load_file(path)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("copied", ["a.safetensors", "zz.safetensors", "model.safetensors", None])
@pytest.mark.parametrize(("folder", "part"), [("model", "weights"), ("base", "base model")])
def test_a_copy_of_the_weights_next_to_forged_ones_hides_nothing(
    copy: Path, folder: str, part: str, copied: str | None
) -> None:
    path = copy / folder / "unet" / "diffusion_pytorch_model.safetensors"
    if copied:
        shutil.copy(path, path.with_name(copied))
    forge(path)
    assert answers(copy)[part] == "differs"


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        *("unet/diffusion_pytorch_model.bin", "tokenizer/added_tokens.json", "pipeline.py"),
    ],
)
def test_every_file_that_was_added_is_named(copy: Path, name: str) -> None:
    path = copy / "model" / name
    path.write_bytes(b"{}")
    if name.endswith(".safetensors"):  # with the bill of another export of the run
        shutil.copy(copy / "lora_kohya.safetensors", path)
    found = details(copy, "weights") + details(copy, "files")
    assert f"added    {name}" in found


def test_settings_in_a_header_are_part_of_the_model(copy: Path) -> None:
    path = copy / "lora_kohya.safetensors"
    add_to_header(path, {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 400}'})
    assert answers(copy, path.name)["files"] == "differs"
    path = copy / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    add_to_header(path, {"usage_hint": "another"})
    assert "changed  vae/diffusion_pytorch_model.safetensors: the header" in details(copy, "files")


def test_the_summary_is_part_of_the_model(copy: Path) -> None:
    (copy / "model" / CONTENT_NAME).write_text("nothing")
    assert details(copy, "files") == [f"changed  {CONTENT_NAME}"]


@pytest.mark.parametrize("change", [{"artifact": "lora"}, {"num_images": 9}])
def test_no_field_of_a_bill_can_be_changed(copy: Path, change: dict[str, object]) -> None:
    root = read_bills(str(copy / "model"))[0].bill.root
    path = copy / "model" / BILL_NAME
    entries = json.loads(path.read_text())
    target = entries if "artifact" in change else entries["segments"][0]["data"]
    target |= change
    path.write_text(json.dumps(entries))
    assert answers(copy, root=root)["root"] == "differs"
    path.write_text(json.dumps(entries | {"artifact": "/proc/self/cwd/forged"}))
    with pytest.raises(ValueError, match="artifact must be one of pipeline"):
        verify(str(copy / "model"))
    path.write_text(json.dumps(entries | {"images": [["short"]]}))
    with pytest.raises(ValueError, match="is no bill of materials"):
        verify(str(copy / "model"))


def test_the_order_of_an_images_captions_counts(copy: Path) -> None:
    write_rows(copy / "data", CAPTIONS | {"b/2.png": CAPTIONS["b/2.png"][::-1]})
    assert details(copy, "data") == ["changed  b/2.png: captions"]


def test_the_settings_of_a_base_are_part_of_it(copy: Path) -> None:
    (copy / "base" / "scheduler" / "scheduler_config.json").write_text('{"a": 2}')
    assert answers(copy)["base model"] == "differs"


def test_each_base_is_checked_by_its_role(copy: Path) -> None:
    vae, text = copy / "base" / "vae", copy / "base" / "text_encoder"
    write_weights(text / "model.safetensors", 8)
    materials = materials_of(copy, model=ModelConfig(vae=str(vae), text_encoder=str(text.parent)))
    materials.attach_to_folder(copy / "model", artifact="pipeline")
    bases = {"vae": str(vae), "text_encoder": str(text.parent)}
    assert answers(copy, bases={"": str(vae)})["base text_encoder"] == "not checked"
    assert set(answers(copy, bases=bases).values()) == {"same"}
    forge(text / "model.safetensors")
    found = answers(copy, bases=bases)
    assert (found["base vae"], found["base text_encoder"]) == ("same", "differs")
    with pytest.raises(ValueError, match="no role"):
        Given(bases={"venv": "x"})


def test_a_base_without_safetensors_is_not_checked(copy: Path) -> None:
    for path in (copy / "base").rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    materials_of(copy).attach_to_folder(copy / "model", artifact="pipeline")
    assert answers(copy)["base model"] == "not checked"


def test_what_was_added_changed_and_removed_is_named(copy: Path) -> None:
    (copy / "data" / "a/0.png").unlink()
    save_image(copy / "data" / "a/1.png", 77)
    save_image(copy / "data" / "b/9.png", 78)
    changed = {name: texts for name, texts in CAPTIONS.items() if name != "a/0.png"}
    write_rows(copy / "data", changed | {"b/2.png": ["other"], "b/9.png": ["nine"]})
    assert details(copy, "data") == [
        "removed  a/0.png",
        "changed  a/1.png: image",
        "changed  b/2.png: captions",
        "added    b/9.png",
    ]


def test_a_config_of_the_model_that_changed_is_named(copy: Path) -> None:
    scheduler = copy / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"prediction_type": "v_prediction"}')
    assert details(copy, "files") == ["changed  scheduler/scheduler_config.json"]
    scheduler.unlink()
    assert details(copy, "files") == ["removed  scheduler/scheduler_config.json"]


def test_a_mask_or_condition_that_changed_is_named(copy: Path) -> None:
    for name in CAPTIONS:
        for number, kind in enumerate(("mask", "condition")):
            save_image((copy / "data" / name).with_suffix(f".{kind}.png"), number)
    materials = materials_of(copy, mask="file", finetune=FinetuneConfig(method="controlnet"))
    materials.attach_to_folder(copy / "model", artifact="controlnet")
    assert answers(copy)["data"] == "same"
    for number, kind in enumerate(("mask", "condition")):
        save_image(copy / "data" / "b" / f"{number}.{kind}.png", 77)
    assert details(copy, "data") == [
        "changed  b/0.png: mask or condition",
        "changed  b/1.png: mask or condition",
    ]


def test_several_sources_are_compared_in_their_order(copy: Path) -> None:
    roots = [copy / "data" / kind for kind in "ab"]
    (copy / "data" / "metadata.jsonl").unlink()
    for root, kind in zip(roots, "ab", strict=True):
        write_rows(root, {f"{i}.png": [f"{kind} {i}"] for i in range(4)})
    sources = tuple(DataSource(root=str(root)) for root in roots)
    materials = materials_of(copy, root="", sources=sources)
    materials.attach_to_folder(copy / "model", artifact="pipeline")
    assert answers(copy, data=list(map(str, roots)))["data"] == "same"
    assert answers(copy, data=list(map(str, roots[::-1])))["data"] == "differs"
    save_image(roots[1] / "2.png", 77)
    verdict = verify(str(copy / "model"), Given(list(map(str, roots))))
    assert ["changed  1/2.png: image"] in [list(one.details) for one in verdict.findings]


def test_an_image_that_changed_its_split_is_named(copy: Path) -> None:
    leaves = read_bills(str(copy / "model"))[0].bill.leaves
    moved = [leaf._replace(split="train") for leaf in leaves]
    heldout = [leaf.name for leaf in leaves if leaf.split == "heldout"]
    assert heldout
    assert [*differences(leaves, moved)] == [
        f"changed  {name}: now train, was heldout" for name in sorted(heldout)
    ]


# ---- honest copies ----


def other_form(copy: Path, rng: random.Random) -> None:
    """Write the data in another of the forms that training reads, in another order."""
    names = list(CAPTIONS)
    rng.shuffle(names)
    normal = rng.choice(["NFC", "NFD"])
    texts = {
        unicodedata.normalize(normal, name): [
            unicodedata.normalize(normal, text) for text in CAPTIONS[name]
        ]
        for name in names
    }
    for name, other in zip(names, texts, strict=True):
        (copy / "data" / name).rename(copy / "data" / other)
    names = list(texts)
    form = rng.choice(["jsonl", "parquet", "columns", "rows by folder"])
    (copy / "data" / "metadata.jsonl").unlink()
    if form == "parquet":
        table = pa.table({"text": list(texts.values()), "file_name": names})
        pq.write_table(table, copy / "data" / "metadata.parquet")
    elif form == "rows by folder":
        for kind in "ab":
            own = {name[2:]: texts[name] for name in names if name[0] == kind}
            write_rows(copy / "data" / kind, own)
    else:
        rows = [{"note": 1, "text": texts[name], "file_name": name} for name in names]
        write_jsonl(copy / "data" / "metadata.jsonl", rows)
    for path in (copy / "data").rglob("*.png"):  # another time
        path.touch()


def other_model(copy: Path, rng: random.Random) -> None:
    """Write the model as git on Windows, a download or a person who adds a card leaves it."""
    config = copy / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=rng.choice([None, 4])))
    merges = copy / "model" / "tokenizer" / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", rng.choice([b"\n", b"\r\n"])))
    for name in rng.sample(["README.md", "LICENSE", ".gitattributes", "sample.png"], 2):
        (copy / "model" / name).write_text("written later")
    (copy / "lora_kohya.safetensors").rename(copy / "my lora.safetensors")


def test_an_honest_copy_is_never_refuted(origin: Path, tmp_path: Path) -> None:
    for seed in range(100):
        copy, rng = tmp_path / f"place {seed}", random.Random(seed)
        shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("cache", "base"))
        other_form(copy, rng)
        other_model(copy, rng)
        model = ("model", "my lora.safetensors")[seed % 2]
        found = answers(copy, model, bases={"": str(origin / "base")})
        allowed = {"same"} if model == "model" else {"same", "not checked"}
        assert set(found.values()) <= allowed, seed


def test_text_files_next_to_the_images_are_the_same_captions(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save_image(tmp_path / "data" / name, len(name))
    write_rows(tmp_path / "data", {"one.png": ["one"], "two.png": ["two"]})
    write_weights(tmp_path / "base" / "unet" / "model.safetensors", 0)
    before = materials_of(tmp_path).segments[0].data
    (tmp_path / "data" / "metadata.jsonl").unlink()
    for name in ("one", "two"):
        (tmp_path / "data" / f"{name}.txt").write_text(f"{name}\n")
    assert materials_of(tmp_path).segments[0].data == before


# ---- a lone file, and what is not there ----


def test_a_lone_file_answers_yes_or_no(copy: Path) -> None:
    assert set(answers(copy, "lora_kohya.safetensors").values()) == {"same"}
    (copy / "data" / "a/0.png").unlink()
    verdict = verify(str(copy / "lora_kohya.safetensors"), Given([str(copy / "data")]))
    (data,) = (one for one in verdict.findings if one.part == "data")
    assert data.answer == "differs"
    assert data.details[0].startswith("7 images, expected 8")


def test_parts_that_are_not_given_are_not_checked(copy: Path) -> None:
    found = {one.part: one.answer for one in verify(str(copy / "model")).findings}
    assert (found.pop("data"), found.pop("base model")) == ("not checked", "not checked")
    assert set(found.values()) == {"same"}


def test_a_published_root_is_compared(copy: Path) -> None:
    root = read_bills(str(copy / "model"))[0].bill.root
    assert answers(copy, root=root)["root"] == "same"
    assert answers(copy, root=f" 0x{root.upper()}\n")["root"] == "same"
    assert answers(copy, root="0" * 64)["root"] == "differs"
    with pytest.raises(ValueError, match="expected 64 hex digits"):
        answers(copy, root=root[:40])


def test_a_file_of_a_folder_is_proven_alone(copy: Path) -> None:
    path = copy / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    lone = shutil.copy(path, copy / "my control.safetensors")
    found = answers(copy, lone.name)
    assert found.pop("files") == "not checked"
    assert set(found.values()) == {"same"}
    content = lone.read_bytes()
    lone.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert answers(copy, lone.name)["weights"] == "differs"


def test_each_file_with_a_bill_of_its_own_is_proven_next_to_a_folders(copy: Path) -> None:
    """As a LoRA in two namings lies on the Hub."""
    path = Path(shutil.copy(copy / "lora_kohya.safetensors", copy / "model"))
    assert set(answers(copy).values()) == {"same"}
    (copy / "model" / BILL_NAME).unlink()
    assert set(answers(copy).values()) == {"same"}
    forge(path)
    assert details(copy, "weights") == ["added    lora_kohya.safetensors"]
    materials_of(copy, min_size=40).attach_to_file(path)  # of another run
    assert answers(copy)["lora_kohya.safetensors root"] == "differs"


def test_all_that_a_run_exported_is_proven(copy: Path) -> None:
    run = copy / "run"
    shutil.copytree(copy / "model", run / "pipeline")
    shutil.move(copy / "lora_kohya.safetensors", run)
    write_weights(run / "checkpoints" / "step-000000001" / "model.safetensors", 3)
    (run / "config.yaml").write_text(to_yaml(config_of_origin(copy)))
    assert set(answers(copy, "run").values()) == {"same"}
    with pytest.raises(ValueError, match="give one of pipeline, lora_kohya"):
        answers(copy, "run", root="0" * 64)
    (run / "config.yaml").write_text(to_yaml(config_of_origin(copy)).replace("seed: 0", "seed: 9"))
    assert answers(copy, "run")["config"] == "differs"
    forge(run / "lora_kohya.safetensors")
    with pytest.raises(ValueError, match=r"lora_kohya.safetensors has no bill of materials"):
        verify(str(run))


def test_a_bill_of_another_model_is_refuted_by_the_header(copy: Path) -> None:
    shutil.copytree(copy / "model", copy / "second")
    materials_of(copy, min_size=40).attach_to_folder(copy / "second", artifact="pipeline")
    shutil.copy(copy / "second" / BILL_NAME, copy / "model" / BILL_NAME)
    assert answers(copy)["root"] == "differs"


def test_a_model_without_a_bill_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match="has no bill of materials"):
        verify(str(copy / "base"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verify(str(copy / "nowhere"))
    with pytest.raises(ValueError, match="names 2 folders, expected 1"):
        answers(copy, data=[str(copy), str(copy)])
