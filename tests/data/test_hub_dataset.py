"""Data sets of the Hugging Face Hub by their id: local copies of them, opened by `datasets`."""

import builtins
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import captioned_folder, noise_image, save_image, write_jsonl

from latentdiff.cli.main import main
from latentdiff.config.data import DataConfig, DataSource
from latentdiff.data.folder.folder import Folder, Record, read_folder
from latentdiff.data.image_tables.hub_dataset import HubId, parse_hub_id, public_dataset_name
from latentdiff.training.inputs.sources import read_data

Cache = pytest.importorskip("datasets.packaged_modules.cache.cache").Cache
datasets = pytest.importorskip("datasets", reason="pip install datasets to run this")
HUB_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class FakeHub:
    """Repositories in a folder, opened by the real `datasets` under the ids owner/NAME."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.open = root, [], datasets.load_dataset_builder

    def __call__(self, name: str, config: str | None, *, revision: str | None) -> Any:
        self.asked.append((name, config, revision))
        if datasets.config.HF_HUB_OFFLINE:
            raise ConnectionError(f"Couldn't reach {name} on the Hub (OfflineModeIsEnabled)")
        folder = self.root / name.partition("/")[2]
        if not folder.exists():
            message = f"Dataset '{name}' doesn't exist on the Hub or cannot be accessed."
            raise datasets.exceptions.DatasetNotFoundError(message)
        return self.open(str(folder), config)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(datasets, "load_dataset_builder", fake)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    datasets.disable_progress_bars()
    return fake


def table(num: int, *, column: str = "text", first: int = 0, **columns: Any) -> pa.Table:
    names = [f"{first + i}.png" for i in range(num)]
    data = [png(first + i) for i in range(num)]
    rows = [{"bytes": one, "path": name} for one, name in zip(data, names, strict=True)]
    captions = [f"image {first + i}" for i in range(num)]
    return pa.table({"image": pa.array(rows, HUB_IMAGE), column: captions, **columns})


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed).save(file, "PNG")
    return file.getvalue()


def parquet_repository(hub: FakeHub, name: str = "tables", **splits: pa.Table) -> None:
    (hub.root / name / "data").mkdir(parents=True)
    for split, rows in splits.items():
        pq.write_table(
            with_features(rows), hub.root / name / f"data/{split}-00000-of-00001.parquet"
        )


def with_features(rows: pa.Table) -> pa.Table:
    """The table with the metadata by which `datasets` knows a column of images."""
    others = {name: {"dtype": "string", "_type": "Value"} for name in rows.column_names[1:]}
    info = {"info": {"features": {"image": {"_type": "Image"}, **others}}}
    return rows.replace_schema_metadata({"huggingface": json.dumps(info)})


def read(root: str, **settings: Any) -> Folder:
    folder = read_folder(root, min_size=8, **settings)
    folder.check()
    return folder


def captions(folder: Folder) -> list[str]:
    return folder.captions.flatten().to_pylist()


def test_splits_of_a_parquet_repository_are_its_folders_and_its_files_are_linked(
    hub: FakeHub,
) -> None:
    parquet_repository(hub, train=table(5), test=table(2, first=5))
    folder = read("owner/tables", heldout_fraction=0.5)
    assert captions(folder.split("train")) == [f"image {i}" for i in range(5)]
    assert captions(folder.heldout()) == ["image 5", "image 6"]
    assert [folder.read_bytes(i) for i in range(7)] == [png(seed_of(r)) for r in folder]
    assert not list(folder.problems.values())
    files = list(folder.root.rglob("*.arrow"))
    assert len(files) == 2
    assert all(path.stat().st_nlink == 2 for path in files)


def seed_of(record: Record) -> int:
    return int(record.captions[0].removeprefix("image "))


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        (",split=test", [5, 6]),
        (",split=train[:2]", [0, 1]),
        (",split=train[4:]+test", [4, 5, 6]),
        ("@main,split=test[1:]", [6]),
    ],
)
def test_the_split_asked_for_is_all_that_is_read(
    hub: FakeHub, suffix: str, expected: list[int]
) -> None:
    parquet_repository(hub, train=table(5), test=table(2, first=5))
    folder = read(f"owner/tables{suffix}").split("train")
    assert captions(folder) == [f"image {i}" for i in expected]
    for place, seed in enumerate(expected):
        assert folder.read_bytes(place) == png(seed)
    assert hub.asked[0][2] == ("main" if "@" in suffix else None)


def test_images_of_an_imagefolder_repository_are_embedded(hub: FakeHub) -> None:
    folder = captioned_folder(hub.root / "files", 3)
    expected = {r.captions[0]: read_folder(folder).read_bytes_of(r.id) for r in read_folder(folder)}
    found = read("owner/files")
    assert {r.captions[0]: found.read_bytes_of(r.id) for r in found} == expected
    assert not list(found.problems.values())


def test_the_hub_is_asked_once_a_start_and_downloaded_from_once(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_repository(hub, train=table(3))
    root = read("owner/tables").root
    other = read("owner/tables", trust_index=True)
    assert len(hub.asked) == 1
    prepare = "datasets.builder.DatasetBuilder.download_and_prepare"
    monkeypatch.setattr(prepare, lambda *_: pytest.fail("downloaded again"))
    assert read("owner/tables").root == root == other.root
    assert len(hub.asked) == 2
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    shutil.rmtree(hub.root)
    assert captions(read("owner/tables")) == ["image 0", "image 1", "image 2"]
    assert len(hub.asked) == 2


def test_a_changed_repository_is_read_anew(hub: FakeHub) -> None:
    parquet_repository(hub, train=table(3))
    first = read("owner/tables").root
    shutil.rmtree(hub.root)
    parquet_repository(hub, train=table(4))
    again = read("owner/tables")
    assert len(again) == 4
    assert again.root != first


def test_another_revision_in_the_cache_of_the_library_is_not_taken(hub: FakeHub) -> None:
    parquet_repository(hub, train=table(3))
    hub.open = lambda folder, _: Cache(dataset_name="tables", version="1.0.0", hash="0")
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        read("owner/tables@v2")


@pytest.mark.parametrize(
    ("column", "others", "settings", "expected"),
    [
        ("caption", {"url": ["u"] * 2}, {}, "image 0"),
        ("en_text", {"__key__": ["k"] * 2}, {}, "image 0"),
        ("caption", {"prompt": ["p"] * 2}, {"caption_column": "prompt"}, "p"),
        ("en_text", {"url": ["u"] * 2}, {"missing_caption": "empty"}, ""),
    ],
)
def test_caption_column_is_found_or_asked_for(
    hub: FakeHub, column: str, others: Any, settings: Any, expected: str
) -> None:
    parquet_repository(hub, train=table(2, column=column, **others))
    assert captions(read("owner/tables", **settings))[0] == expected


def wrong_columns(hub: FakeHub) -> str:
    parquet_repository(hub, train=table(2, column="prompt", caption=["c"] * 2))
    return "owner/tables"


def text_files(hub: FakeHub) -> str:
    save_image(hub.root / "files/b.png", 2)
    save_image(hub.root / "files/a.png", 1).with_suffix(".txt").write_text("a caption")
    return "owner/files"


def no_images(hub: FakeHub) -> str:
    write_jsonl(hub.root / "texts/train.jsonl", [{"text": "a"}])
    return "owner/texts"


def several_configs(hub: FakeHub) -> str:
    for name in ("cats", "dogs"):
        save_image(hub.root / "several" / name / "a.png", 1)
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}/*.png\n" for name in ("cats", "dogs")
    )
    (hub.root / "several/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return "owner/several"


def unknown_split(hub: FakeHub) -> str:
    parquet_repository(hub, train=table(2))
    return "owner/tables,split=dev"


def gated(hub: FakeHub) -> str:
    def refuse(name: str, *_: Any, **__: Any) -> None:
        message = f"Dataset '{name}' is a gated dataset on the Hub. You must be authenticated."
        raise datasets.exceptions.DatasetNotFoundError(message)

    datasets.load_dataset_builder = refuse  # the fixture undoes it
    return "owner/gated"


def offline(hub: FakeHub) -> str:
    datasets.config.HF_HUB_OFFLINE = True
    return "owner/tables"


def offline_revision(hub: FakeHub) -> str:
    datasets.config.HF_HUB_OFFLINE = True
    return "owner/tables@v2"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wrong_columns, ['no column "text"', "prompt", "--data.caption_column="]),
        (text_files, ['no column "text"', "hf download owner/files", "--data.root=DIR"]),
        (no_images, ["no column of images", "text"]),
        (several_configs, ["cats", "dogs", ",config=NAME"]),
        (unknown_split, ["dev", "train"]),
        (lambda hub: "owner/missing", ["owner/missing", "doesn't exist on the Hub", "hf auth"]),
        (gated, ["gated", "hf auth login"]),
        (offline, ["neither a folder here", "HF_HUB_OFFLINE"]),
        (offline_revision, ["owner/tables@v2", "HF_HUB_OFFLINE"]),
        (lambda hub: "owner/tables,shard=3", ["unknown option shard", ",split=NAME"]),
    ],
)
def test_what_cannot_be_read_is_one_message_with_its_fix(
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[FakeHub], str],
    words: list[str],
) -> None:
    root = make(hub)
    assert main(["inspect", root, "--quick"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) <= 2


def test_columns_are_checked_before_the_download_where_the_hub_lists_them(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_repository(hub, train=table(2, column="prompt", caption=["c"] * 2))
    builder = hub("owner/tables", None, revision=None)
    builder.info.features = datasets.Features({"url": datasets.Value("string")})
    monkeypatch.setattr(builder, "download_and_prepare", lambda: pytest.fail("downloaded"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(ValueError, match=r"no column of images; its columns are: url"):
        read("owner/tables")


def test_without_the_library_the_message_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileNotFoundError, match=r"pip install 'latentdiff\[datasets\]'"):
        read_folder("owner/name")


def test_a_folder_of_that_name_goes_first_and_its_mistyped_path_is_no_id(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parquet_repository(hub, train=table(3))
    captioned_folder(tmp_path / "owner/tables", 1)
    assert len(read("owner/tables")) == 1
    shutil.rmtree(tmp_path / "owner/tables")
    with pytest.raises(FileNotFoundError, match="hf://datasets/owner/tables"):
        read("owner/tables")
    assert hub.asked == []
    assert len(read("hf://datasets/owner/tables")) == 3


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("a/b", HubId("a/b")),
        ("a/b@refs/convert/parquet", HubId("a/b", "refs/convert/parquet")),
        ("a/b,config=en", HubId("a/b", config="en")),
        ("a/b@v1,split=train[:10%],config=en", HubId("a/b", "v1", "en", "train[:10%]")),
        ("https://huggingface.co/datasets/a/b", HubId("a/b")),
        (Path("hf://datasets/a/b"), HubId("a/b")),
        ("photos", None),
        ("./a/b", None),
        ("../a", None),
        ("/a/b", None),
        ("~/a", None),
        ("a/b/c", None),
    ],
)
def test_an_id_is_told_from_a_path(root: str | Path, expected: HubId | None) -> None:
    assert parse_hub_id(root) == expected


def test_cards_name_the_id_and_no_place_on_this_machine(tmp_path: Path) -> None:
    assert public_dataset_name("owner/tables@v1,split=train") == "owner/tables"
    assert public_dataset_name(str(tmp_path / "photos")) == "photos"


def test_an_id_is_a_source_next_to_folders(hub: FakeHub, tmp_path: Path) -> None:
    parquet_repository(hub, train=table(3, column="caption"))
    sources = (
        DataSource(str(captioned_folder(tmp_path / "own", 2))),
        DataSource("owner/tables", repeats=2),
    )
    cache = str(tmp_path / "scans")
    data = DataConfig(sources=sources, min_size=8, heldout_fraction=0.0, cache_dir=cache)
    train, _ = read_data(data)
    assert train.sources.tolist().count(1) == 3
    assert sorted(train.repeats.tolist()) == [1, 1, 2, 2, 2]


def test_inspect_reports_an_id(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    parquet_repository(hub, train=table(3), test=table(2, first=3))
    assert main(["inspect", "owner/tables", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["root"] == "owner/tables"
    assert report["splits"] == {"train": 3, "validation": 0, "test": 2}


def test_a_refused_data_set_is_called_by_its_id(hub: FakeHub) -> None:
    parquet_repository(hub, train=table(2))
    with pytest.raises(ValueError, match="data folder owner/tables cannot") as error:
        read_folder("owner/tables", min_size=1000).check()
    assert str(hub.root) not in str(error.value)
    assert "inspect owner/tables shows everything" in str(error.value)
