"""Data sets with the images in a table: parquet of the Hub, and arrow files of `datasets`."""

import hashlib
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import captioned_folder, noise_image, save_image
from fakes_training import make_config, make_world, read_metrics

from latentdiff.data.folder.content_hash import image_hashes
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.inspection.inspect import inspect_folder
from latentdiff.evaluation.eval_set import read_real_images
from latentdiff.training.text_to_image.train_t2i import train

HUB_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed: int, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    noise_image(seed, **kwargs).save(file, "PNG")
    return file.getvalue()


def hub_table(num: int = 6, *, first: int = 0, **columns: Any) -> pa.Table:
    seeds = range(first, first + num)
    images = pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in seeds], HUB_IMAGE)
    return pa.table({"image": images, "text": [f"image {i}" for i in seeds], **columns})


def write_parquet(path: Path, table: pa.Table, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **settings)
    return path.parent


def save_to_disk(folder: Path, table: pa.Table, *, name: str = "data-00000-of-00001.arrow") -> Path:
    """What datasets.Dataset.save_to_disk writes: arrow streams and a list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": name}], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def write_file(path: Path, table: pa.Table, **settings: Any) -> None:
    """An arrow file, which unlike a stream ends with a list of its batches."""
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, table.schema, **settings) as out,
    ):
        out.write_table(table, max_chunksize=4)


def contents(folder: Folder) -> list[tuple[tuple[str, ...], bytes]]:
    return [(record.captions, folder.read_bytes(i)) for i, record in enumerate(folder)]


def by_reason(folder: Folder) -> dict[str, list[str]]:
    return {key: [name for name, _ in group.examples] for key, group in folder.problems.items()}


def refused(root: Path, match: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=match):
        read_folder(root, **settings).check()


EXPECTED = [((f"image {i}",), png(i)) for i in range(6)]


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_parquet_of_the_hub_is_a_folder_of_its_rows(
    tmp_path: Path, compression: str, rows: int
) -> None:
    name = "train-00000-of-00001.parquet"
    table = hub_table()
    write_parquet(tmp_path / "data" / name, table, compression=compression, row_group_size=rows)
    folder = read_folder(tmp_path)
    folder.check()
    assert [record.id for record in folder] == [f"data/{name}/{row:08d}" for row in range(6)]
    assert contents(folder) == EXPECTED
    assert [(r.width, r.height) for r in folder] == [(40, 32)] * 6
    assert not folder.problems
    for i in (5, 0, 3, 3, 4, 1):  # out of order
        assert folder.read_bytes(i) == png(i)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_is_a_folder_of_its_rows(tmp_path: Path, kind: str) -> None:
    if kind == "stream":
        save_to_disk(tmp_path, hub_table())
    else:
        write_file(tmp_path / "a.arrow", hub_table())
    folder = read_folder(tmp_path)
    folder.check()
    assert contents(folder) == EXPECTED


@pytest.mark.parametrize(
    ("column", "kind"), [("jpg", pa.binary()), ("image", pa.large_binary()), ("photo", pa.binary())]
)
def test_plain_bytes_are_images_by_their_columns_name(
    tmp_path: Path, column: str, kind: pa.DataType
) -> None:
    table = pa.table({column: pa.array([png(i) for i in range(6)], kind), "text": [None] * 6})
    texts = [[f"image {i}", "a thing"] for i in range(6)]
    table = table.set_column(1, "text", [texts]).append_column("hash", [[b"x"] * 6])
    write_parquet(tmp_path / "a.parquet", table)
    folder = read_folder(tmp_path, file_column="photo" if column == "photo" else "file_name")
    folder.check()
    assert [record.captions for record in folder] == [(f"image {i}", "a thing") for i in range(6)]
    assert folder.read_bytes(2) == png(2)


def test_splits_come_from_the_names_of_files_and_folders(tmp_path: Path) -> None:
    for k, name in enumerate(
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
    ):
        write_parquet(tmp_path / "a" / name, hub_table(2, first=2 * k))
    write_parquet(tmp_path / "b" / "default" / "validation" / "0000.parquet", hub_table(2))
    save_to_disk(tmp_path / "c" / "test", hub_table(2))
    save_to_disk(tmp_path / "c" / "train", hub_table(3))
    splits = {k: [r.split for r in read_folder(tmp_path / k)] for k in "abc"}
    assert splits == {
        "a": ["test"] * 2 + ["train"] * 2,
        "b": ["validation"] * 2,
        "c": ["test"] * 2 + ["train"] * 3,
    }


def test_tables_and_shards_are_no_classes_of_an_evaluation(tmp_path: Path) -> None:
    for k in range(2):
        write_parquet(tmp_path / f"test-{k}.parquet", hub_table(2, first=2 * k))
    images = read_real_images(read_folder(tmp_path), size=(16, 16))
    assert images.classes == ("",) * 4
    assert images.captions == tuple(f"image {i}" for i in range(4))


def test_bad_rows_are_skipped_by_reason_and_bad_columns_named(tmp_path: Path) -> None:
    images = [
        {"bytes": png(0), "path": None},
        {"bytes": None, "path": "/home/someone/1.png"},
        None,
        {"bytes": b"", "path": "3.png"},
        {"bytes": b"no image", "path": "4.png"},
        {"bytes": png(5)[:200], "path": "5.png"},
        {"bytes": png(6), "path": "6.png"},
    ]
    texts = ["zero", "one", "two", "three", "four", "five", None]
    table = pa.table({"image": pa.array(images, HUB_IMAGE), "text": texts})
    write_parquet(tmp_path / "p" / "a.parquet", table)
    save_to_disk(tmp_path / "s", table, name="a.arrow")
    for root, name in ((tmp_path / "p", "a.parquet"), (tmp_path / "s", "a.arrow")):
        folder = read_folder(root)
        assert contents(folder) == [(("zero",), png(0))]
        assert by_reason(folder) == {
            "no_image_bytes": [f"{name}/00000001", f"{name}/00000002"],
            "empty_file": [f"{name}/00000003"],
            "not_an_image": [f"{name}/00000004"],
            "truncated": [f"{name}/00000005"],
            "no_caption": [f"{name}/00000006"],
        }
        assert folder.num_found == 7
        assert read_folder(root, missing_caption="empty")[-1].captions == ("",)
    refused(
        tmp_path / "p", 'no column "caption".*--data.caption_column=text', caption_column="caption"
    )
    empty = read_folder(tmp_path / "p", caption_column="caption", missing_caption="empty")
    assert [record.captions for record in empty] == [("",), ("",)]


def test_columns_that_do_not_decide_are_named(tmp_path: Path) -> None:
    two = pa.table({"a": hub_table()["image"], "b": hub_table()["image"], "text": ["x"] * 6})
    root = write_parquet(tmp_path / "two" / "a.parquet", two)
    refused(root, r"a\.parquet: images are in the columns a, b.*--data\.file_column=a")
    assert len(read_folder(root, file_column="b")) == 6
    twice = hub_table().append_column("text", [["y"] * 6])
    refused(write_parquet(tmp_path / "twice" / "a.parquet", twice), '"text" is there twice')
    numbers = pa.table({"image": hub_table()["image"], "text": list(range(6))})
    root = write_parquet(tmp_path / "numbers" / "a.parquet", numbers)
    refused(root, r'caption that is not text.*a\.parquet: "text" is of type int64')
    features = {"text": {"_type": "ClassLabel", "names": ["cat", "dog", "cow", "owl", "ape"]}}
    schema = numbers.schema.with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    write_parquet(tmp_path / "labels" / "a.parquet", numbers.cast(schema))
    labels = read_folder(tmp_path / "labels")
    assert [r.captions[0] for r in labels] == ["cat", "dog", "cow", "owl", "ape"]
    assert by_reason(labels) == {"no_caption": ["a.parquet/00000005"]}


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole" / "a.parquet", hub_table()) / "a.parquet"
    arrow = save_to_disk(tmp_path / "arrow", hub_table()) / "data-00000-of-00001.arrow"
    for path in (whole, arrow):
        data = path.read_bytes()
        other_kind = data[:-4] + b"PNG\0" if path == whole else b"\x89PNG" + data[4:]
        for part in (data[: len(data) // 2], data[:10], b"", other_kind):
            path.write_bytes(part)
            refused(path.parent, rf"truncated or damaged table.*{path.name}: after \d+ good rows")
    (arrow.parent / arrow.name).unlink()
    refused(arrow.parent, r"state\.json: names data-00000-of-00001\.arrow, which is not there")
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    write_file(compressed / "a.arrow", hub_table(), options=options)
    refused(compressed, "compressed arrow file. Fix: write it without compression")


def test_what_lies_next_to_tables_is_named_and_not_read(tmp_path: Path) -> None:
    save_to_disk(tmp_path, hub_table())
    (tmp_path / "cache-0123.arrow").write_bytes(
        (tmp_path / "data-00000-of-00001.arrow").read_bytes()
    )
    save_image(tmp_path / "banner.png")
    pq.write_table(pa.table({"url": ["x"], "key": [1]}), tmp_path / "urls.parquet")
    captioned_folder(tmp_path / "more", 2)
    folder = read_folder(tmp_path)
    folder.check()
    assert [record.id for record in folder][-2:] == ["more/0.png", "more/1.png"]
    assert contents(folder)[:6] == EXPECTED
    assert by_reason(folder) == {
        "stray_table": ["cache-0123.arrow"],
        "table_ignored": ["urls.parquet"],
        "by_product": ["banner.png"],
    }


def test_a_folder_without_images_says_what_is_there_instead(tmp_path: Path) -> None:
    for name in ("zip", "table"):
        (tmp_path / name).mkdir()
    (tmp_path / "zip" / "photos.zip").write_bytes(b"PK")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "table" / "a.parquet")
    refused(tmp_path / "zip", r"no image found.*photos\.zip. Fix: unpack it \(as with unzip")
    refused(tmp_path / "table", r"no image found.*a\.parquet: its columns: url")
    for name, fix in (("zip/photos.zip", "unpack it"), ("table/a.parquet", "give its folder")):
        with pytest.raises(NotADirectoryError, match=fix):
            read_folder(tmp_path / name)


def test_an_index_knows_a_table_until_it_changes(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_parquet(root / "a.parquet", hub_table())
    first = read_folder(root, cache_dir=cache)
    again = read_folder(root, cache_dir=cache)
    assert contents(first) == contents(again) == EXPECTED
    write_parquet(root / "a.parquet", hub_table(3, first=7))
    changed = read_folder(root, cache_dir=cache)
    assert contents(changed) == [((f"image {i}",), png(i)) for i in (7, 8, 9)]
    with pytest.raises(OSError, match=r"a\.parquet"):
        first.read_bytes(5)


def test_threads_read_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", hub_table(40), row_group_size=16)
    folder = read_folder(tmp_path)
    num_threads = threading.active_count()  # of other libraries too
    with ThreadPoolExecutor(4) as threads:
        order = [(7 * i) % 40 for i in range(80)]
        assert list(threads.map(folder.read_bytes, order)) == [png(i) for i in order]
    digests = image_hashes(folder)
    assert [d.tobytes() for d in digests] == [hashlib.sha256(png(i)).digest() for i in range(40)]
    assert threading.active_count() < num_threads + 12


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_on_a_table_is_the_run_on_its_files(tmp_path: Path, cache: bool) -> None:
    """Training on the rows of a table gives the losses of the same images as files."""
    world = make_world(tmp_path)
    folder = read_folder(world / "data")
    rows = [{"bytes": folder.read_bytes(i), "path": None} for i in range(len(folder))]
    captions = [list(record.captions) for record in folder]
    table = pa.table({"image": pa.array(rows, HUB_IMAGE), "text": captions})
    for split in ("train", "test"):
        kept = pa.array([record.split == split for record in folder])
        write_parquet(tmp_path / "table" / "data" / f"{split}-0.parquet", table.filter(kept))
    losses = []
    for root in (world / "data", tmp_path / "table"):
        run = tmp_path / f"{root.name}-run"
        settings = {"data.root": root, "data.cache": cache, "train.max_steps": 2}
        overrides = {name.replace(".", "__"): value for name, value in settings.items()}
        assert train(make_config(world, run, **overrides)) == 0
        losses.append(read_metrics(run))
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    report = inspect_folder(read_folder(tmp_path / "table"), batch_size=4)
    assert report.is_usable
