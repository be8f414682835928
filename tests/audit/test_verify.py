"""latentdiff verify: tampering is found each time, and an honest copy never refuted."""

import hashlib
import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import save_image, write_jsonl
from safetensors.numpy import load_file, save_file

from latentdiff.audit import verify as module
from latentdiff.audit.verify import differences, read_bill, verify
from latentdiff.config.data import DataConfig, DataSource
from latentdiff.config.finetune import FinetuneConfig
from latentdiff.config.io import load_stored_config
from latentdiff.config.model import ModelConfig
from latentdiff.config.text_to_image import Config
from latentdiff.pipeline.files.model_info import BILL_KEY
from latentdiff.training.bill.bill import (
    BILL_NAME,
    canonical,
    from_json,
    merkle_root,
    read_header,
    sign_file,
    to_json,
)
from latentdiff.training.bill.materials import Materials, gather_materials
from latentdiff.training.bill.training_content import CONTENT_NAME

CAPTIONS = {f"{kind}/{i}.png": [f"a {kind} {i}", f"café {i}"] for kind in "ab" for i in range(4)}
EXPECTED = {"model": {"same"}, "lora.safetensors": {"same", "not checked"}}  # configs
MACHINE = {"cpu": "one", "device": "cpu", "num_threads": 1, "num_processes": 1}


def write_weights(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"b": rng.normal(size=(3, 4)).astype("f4"), "a": np.ones(2, "f2")}, path)


def write_rows(root: Path, captions: dict[str, list[str]]) -> None:
    rows = [{"file_name": name, "text": texts} for name, texts in captions.items()]
    write_jsonl(root / "metadata.jsonl", rows)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, base/, and model/ and lora.safetensors with the bill of a run on them."""
    origin = tmp_path_factory.mktemp("origin")
    for seed, name in enumerate(CAPTIONS):
        save_image(origin / "data" / name, seed)
    write_rows(origin / "data", CAPTIONS)
    for part, seed in (("unet", 1), ("vae", 2)):
        write_weights(origin / "base" / part / "diffusion_pytorch_model.safetensors", seed)
        write_weights(origin / "model" / part / "diffusion_pytorch_model.safetensors", seed + 5)
    (origin / "model" / "scheduler").mkdir()
    (origin / "model" / "scheduler" / "scheduler_config.json").write_text("{}")
    write_weights(origin / "lora.safetensors", 9)
    materials = materials_of(origin)
    materials.sign_folder(origin / "model", artifact="pipeline")
    materials.sign_file(origin / "lora.safetensors")
    return origin


def materials_of(
    origin: Path, *, finetune: FinetuneConfig | None = None, **changes: object
) -> Materials:
    data = DataConfig(
        root=str(origin / "data"), cache_dir=str(origin / "cache"), heldout_fraction=0.3
    )
    config = Config(
        data=replace(data, **changes),
        model=ModelConfig(pretrained=str(origin / "base")),
        finetune=finetune or FinetuneConfig(),
    )
    return gather_materials(config, machine=MACHINE)


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


@pytest.fixture
def copy(origin: Path, tmp_path: Path) -> Path:
    return shutil.copytree(origin, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cache"))


def answers(copy: Path, model: str = "model", **options: object) -> dict[str, str]:
    given = {"data": [str(copy / "data")], "base": str(copy / "base")} | options
    verdict = verify(str(copy / model), **given)
    assert verdict.is_proven == ("differs" not in {one.answer for one in verdict.findings})
    return {one.part: one.answer for one in verdict.findings}


def details(copy: Path, part: str) -> list[str]:
    verdict = verify(str(copy / "model"), data=[str(copy / "data")], base=str(copy / "base"))
    return [line for one in verdict.findings if one.part == part for line in one.details]


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
    section = rng.choice(["train", "diffusion", "data", "finetune"])
    name = rng.choice(sorted(entries["config"][section]))
    entries["config"][section][name] = f"forged {rng.random()}"
    part = "config"
    if rng.random() < 0.5:  # a forger who knows how the hash is taken
        config = entries["config"] | {"output_dir": "x"}
        entries["config"] = config
        entries["sections"]["config"] = hashlib.sha256(canonical(config)).hexdigest()
        part = "root"
    path.write_text(json.dumps(entries))
    return part


def tamper_weights(copy: Path, rng: random.Random) -> str:
    path = rng.choice(sorted((copy / "model").rglob("*.safetensors")))
    flip_byte(path, rng, first=read_header(path)[0])
    return "weights"


def tamper_base(copy: Path, rng: random.Random) -> str:
    path = rng.choice(sorted((copy / "base").rglob("*.safetensors")))
    flip_byte(path, rng, first=read_header(path)[0])
    return "base"


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
    materials.sign_folder(copy / "model", artifact="controlnet")
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
    materials.sign_folder(copy / "model", artifact="pipeline")
    assert answers(copy, data=list(map(str, roots)))["data"] == "same"
    assert answers(copy, data=list(map(str, roots[::-1])))["data"] == "differs"
    save_image(roots[1] / "2.png", 77)
    verdict = verify(str(copy / "model"), data=list(map(str, roots)))
    assert ["changed  1/2.png: image"] in [list(one.details) for one in verdict.findings]


def test_an_image_that_changed_its_split_is_named(copy: Path) -> None:
    leaves = read_bill(str(copy / "model")).bill.leaves
    moved = [leaf._replace(split="train") for leaf in leaves]
    heldout = [leaf.name for leaf in leaves if leaf.split == "heldout"]
    assert heldout
    assert [*differences(leaves, moved)] == [
        f"changed  {name}: now train, was heldout" for name in sorted(heldout)
    ]


# ---- honest copies ----


def other_form(copy: Path, rng: random.Random) -> None:
    """Write the captions in another of the forms that training reads, in another order."""
    names = list(CAPTIONS)
    rng.shuffle(names)
    normal = rng.choice(["NFC", "NFD"])
    texts = {
        name: [unicodedata.normalize(normal, text) for text in rng.sample(CAPTIONS[name], 2)]
        for name in names
    }
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


def test_an_honest_copy_is_never_refuted(origin: Path, tmp_path: Path) -> None:
    for seed in range(100):
        data = tmp_path / f"place {seed}" / "data"
        shutil.copytree(origin / "data", data)
        other_form(data.parent, random.Random(seed))
        model = ("model", "lora.safetensors")[seed % 2]
        found = answers(origin, model, data=[str(data)])
        assert set(found.values()) <= EXPECTED[model], seed


def test_text_files_next_to_the_images_are_the_same_captions(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save_image(tmp_path / "data" / name, len(name))
    write_rows(tmp_path / "data", {"one.png": ["one"], "two.png": ["two"]})
    write_weights(tmp_path / "base" / "unet" / "model.safetensors", 0)
    before = materials_of(tmp_path).bill.images
    (tmp_path / "data" / "metadata.jsonl").unlink()
    for name in ("one", "two"):
        (tmp_path / "data" / f"{name}.txt").write_text(f"{name}\n")
    assert materials_of(tmp_path).bill.images == before


def test_weights_in_other_shards_and_with_other_metadata_are_the_same(copy: Path) -> None:
    path = copy / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    for number, name in enumerate(tensors):
        shard = path.with_name(f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors")
        save_file({name: tensors[name]}, shard, metadata={"format": "pt"})
    assert set(answers(copy).values()) == {"same"}


# ---- a lone file, and what is not there ----


def test_a_lone_file_answers_yes_or_no(copy: Path) -> None:
    found = answers(copy, "lora.safetensors")
    assert found.pop("files") == "not checked"
    assert set(found.values()) == {"same"}
    (copy / "data" / "a/0.png").unlink()
    verdict = verify(str(copy / "lora.safetensors"), data=[str(copy / "data")])
    (data,) = (one for one in verdict.findings if one.part == "data")
    assert data.answer == "differs"
    assert data.details[0].startswith("7 images, expected 8")


def test_parts_that_are_not_given_are_not_checked(copy: Path) -> None:
    found = {one.part: one.answer for one in verify(str(copy / "model")).findings}
    assert (found.pop("data"), found.pop("base")) == ("not checked", "not checked")
    assert set(found.values()) == {"same"}


def test_a_published_root_is_compared(copy: Path) -> None:
    root = read_bill(str(copy / "model")).bill.root
    assert answers(copy, root=root)["root"] == "same"
    assert answers(copy, root="0" * 64)["root"] == "differs"


def test_a_bill_of_another_model_is_refuted_by_the_header(copy: Path) -> None:
    shutil.copytree(copy / "model", copy / "second")
    materials_of(copy, min_size=40).sign_folder(copy / "second", artifact="pipeline")
    shutil.copy(copy / "second" / BILL_NAME, copy / "model" / BILL_NAME)
    assert answers(copy)["root"] == "differs"


def test_a_model_without_a_bill_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match="has no bill of materials"):
        verify(str(copy / "base"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verify(str(copy / "nowhere"))
    with pytest.raises(ValueError, match="names 2 folders, expected 1"):
        answers(copy, data=[str(copy), str(copy)])


# ---- the bill itself ----


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


def test_without_names_the_root_is_the_same_and_no_name_is_told(copy: Path) -> None:
    named = materials_of(copy)
    hashed = materials_of(copy, bill_of_materials="hashes")
    assert hashed.bill.images == named.bill.images
    hashed.sign_folder(copy / "model", artifact="pipeline")
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
    bill = read_bill(str(copy / "model")).bill
    again = from_json(json.loads(json.dumps(to_json(bill, with_images=True))), where="it")
    assert (again.root, again.leaves) == (bill.root, bill.leaves)
    with pytest.raises(ValueError, match="it is no bill of materials"):
        from_json({"version": 1}, where="it")


def test_data_that_changed_while_training_is_not_listed(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    materials = materials_of(copy)
    save_image(copy / "data" / "a/0.png", 77)
    root = materials.sign_folder(copy / "model", artifact="pipeline")
    assert "they have changed since training began" in caplog.text
    assert read_bill(str(copy / "model")).bill.leaves is None
    assert read_bill(str(copy / "model")).bill.root == root
    assert answers(copy)["data"] == "differs"  # what the model was not trained on
    shutil.rmtree(copy / "data")
    materials.sign_folder(copy / "model", artifact="pipeline")
    assert "cannot be read any more" in caplog.text


def test_a_signed_file_keeps_its_tensors_and_metadata(tmp_path: Path, origin: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": np.arange(6, dtype="f4")}, path, metadata={"ss_network_dim": "4"})
    root = sign_file(path, materials_of(origin).bill).root
    assert load_file(path)["a"].tolist() == [0, 1, 2, 3, 4, 5]
    metadata = read_header(path)[1]["__metadata__"]
    assert metadata["ss_network_dim"] == "4"
    assert json.loads(metadata[BILL_KEY])["root"] == root
    assert read_header(path)[0] % 8 == 0


def test_the_summary_tells_sources_licences_filters_and_refusals(copy: Path) -> None:
    (copy / "data" / "LICENSE.txt").write_text("\nCC-BY | 4.0\nmore\n")
    save_image(copy / "data" / "tiny.png", 3, width=8, height=8)
    write_rows(copy / "data", CAPTIONS | {"tiny.png": ["tiny"]})
    text = materials_of(copy).content
    assert "| data | CC-BY \\| 4.0 (LICENSE.txt) |" in text
    assert "smaller than data.min_size: 1" in text
    assert "shorter side of at least 32 pixels" in text
    assert "tiny.png" not in text
    (copy / "data" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    assert "| data | cc0-1.0 |" in materials_of(copy).content
