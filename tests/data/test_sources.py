"""Several sources as one: their records, held-out images and problems, and the rules of each."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import captioned_folder, save_image, write_jsonl
from fakes_scripts import run_script

from latentdiff.config.data import DataConfig, DataSource
from latentdiff.config.io import flat, load_config, to_yaml
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.content_hash import image_hashes
from latentdiff.data.folder.folder import join_folders, read_folder
from latentdiff.training.inputs.encode import caption_transform, unique_captions
from latentdiff.training.inputs.sources import read_data


def shard_folder(root: Path, image: bytes) -> Path:
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, content in (("x.png", image), ("x.txt", b"from a shard")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return root


def parquet_folder(root: Path, image: bytes) -> Path:
    root.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": image, "path": None}] * 2, kind)
    pq.write_table(pa.table({"image": images, "text": ["row 0", "row 1"]}), root / "t.parquet")
    return root


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A folder of four, a folder with a shard of one, and one with a parquet file of two."""
    image = save_image(tmp_path / "other.png", 9).read_bytes()
    return [
        captioned_folder(tmp_path / "z loose", 4),
        shard_folder(tmp_path / "shards", image),
        parquet_folder(tmp_path / "tables", image),
    ]


def settings(tmp_path: Path, *sources: DataSource, **others: Any) -> DataConfig:
    given = {"cache_dir": str(tmp_path / "cache"), "min_size": 8, "heldout_fraction": 0.0}
    return DataConfig(sources=sources, **given | others)


@pytest.mark.parametrize("has_cache", [False, True])
def test_every_kind_of_folder_joins_in_the_order_of_the_list(
    tmp_path: Path, three: list[Path], has_cache: bool
) -> None:
    cache = tmp_path / "cache" if has_cache else None
    folders = [read_folder(root, cache_dir=cache) for root in three]
    joined = join_folders(folders, repeats=[1, 5, 2], cache_dir=cache)
    names = [f"z loose/{i}.png" for i in range(4)]
    names += ["shards/a.tar/x.png", "tables/t.parquet/00000000", "tables/t.parquet/00000001"]
    assert joined.ids.to_pylist() == names
    assert joined.sources.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert joined.repeats.tolist() == [1, 1, 1, 1, 5, 2, 2]
    assert [r.captions[0] for r in joined][3:] == ["image 3", "from a shard", "row 0", "row 1"]
    own = [folder.read_bytes(i) for folder in folders for i in range(len(folder))]
    for copy in (joined, pickle.loads(pickle.dumps(joined))):
        assert [copy.read_bytes(i) for i in range(7)] == own
    assert joined.read_bytes_of("shards/a.tar/x.png") == own[4]
    hashes = np.concatenate([image_hashes(folder) for folder in folders])
    np.testing.assert_array_equal(image_hashes(joined), hashes)
    if has_cache:
        assert list(join_folders(folders, repeats=[1, 5, 2], cache_dir=cache)) == list(joined)
        assert join_folders(folders, repeats=[1, 1, 1], cache_dir=cache).repeats.sum() == 7


def test_a_source_holds_out_what_it_holds_out_alone(tmp_path: Path) -> None:
    captioned_folder(tmp_path / "hashed", 40)
    captioned_folder(tmp_path / "named/train", 3)
    captioned_folder(tmp_path / "named/test", 2)
    data = settings(
        tmp_path,
        DataSource(f"{tmp_path}/named"),
        DataSource(f"{tmp_path}/hashed", repeats=3),
        heldout_fraction=0.2,
    )
    train, heldout = read_data(data)
    alone = read_folder(tmp_path / "hashed", heldout_fraction=0.2)
    held = [name.removeprefix("hashed/") for name in heldout.ids.to_pylist() if "hashed" in name]
    assert held == alone.heldout().ids.to_pylist()
    assert held
    assert [name for name in heldout.ids.to_pylist() if "named" in name] == [
        "named/test/0.png",
        "named/test/1.png",
    ]
    assert len(train) + len(heldout) == 45
    assert train.repeats[train.sources == 1].tolist() == [3] * (40 - len(held))


def test_each_source_has_its_own_caption_rules(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a/metadata.jsonl", [{"file_name": "0.png", "short": "a cat"}])
    for name in ("a/0.png", "b/10_red dog/0.png", "c/0.png"):
        save_image(tmp_path / name)
    (tmp_path / "c/0.txt").write_text("a bird")
    data = settings(
        tmp_path,
        DataSource(f"{tmp_path}/a", caption_column="short", caption_prefix="a photo of "),
        DataSource(f"{tmp_path}/b", missing_caption="folder_name", trigger_word="sks"),
        DataSource(f"{tmp_path}/c"),
        repeat_folders=True,
        caption_suffix=", outdoors",
    )
    train, _ = read_data(data)
    assert train.repeats.tolist() == [1, 10, 1]
    transform = caption_transform(data)
    shown = ["a photo of a cat, outdoors", "sks, red dog, outdoors", "a bird, outdoors"]
    assert [transform.first(record) for record in train] == shown
    assert list(unique_captions((train,), transform)) == shown
    assert not transform.edits_randomly
    shuffled = settings(tmp_path, DataSource("a"), DataSource("b", shuffle_tags=True))
    assert caption_transform(shuffled).edits_randomly


def test_instance_prompts_stand_for_the_captions_of_all_sources(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png"):
        save_image(tmp_path / name)
    sources = [DataSource(f"{tmp_path}/{name}", missing_caption="skip") for name in "ab"]
    train, _ = read_data(settings(tmp_path, *sources), prompts=["a photo of sks"])
    assert [record.captions for record in train] == [("a photo of sks",)] * 2


def test_a_faulty_source_is_named_with_its_problem(tmp_path: Path) -> None:
    captioned_folder(tmp_path / "good", 3)
    captioned_folder(tmp_path / "bad", 3)
    (tmp_path / "bad/1.png").write_bytes(b"")
    good, bad = (DataSource(f"{tmp_path}/{name}") for name in ("good", "bad"))
    with pytest.raises(ValueError, match=r"the data folder .*/bad cannot be used(.|\n)*1\.png"):
        read_data(settings(tmp_path, good, bad))
    with pytest.raises(FileNotFoundError, match="none"):
        read_data(settings(tmp_path, good, DataSource(f"{tmp_path}/none")))
    captioned_folder(tmp_path / "held/test", 3)
    with pytest.raises(ValueError, match="held has no image in its training split"):
        read_data(settings(tmp_path, good, DataSource(f"{tmp_path}/held")))
    inside = DataSource(f"{tmp_path}/good/../held/test")
    with pytest.raises(ValueError, match="lies in another source"):
        read_data(settings(tmp_path, DataSource(f"{tmp_path}/held/test/"), good, inside))


FAULTS: list[tuple[Callable[[Path], str], str]] = [
    (lambda path: "[{root: a}, {root: a}]", "names a twice"),
    (lambda path: "[{root: a, repeatz: 2}]", "unknown setting repeatz of a source; did you mean"),
    (lambda path: "[{repeats: 2}]", "a source has no root"),
    (lambda path: "[{root: a, repeats: many}]", "repeats=many, expected a whole number"),
    (lambda path: "[{root: a, repeats: 0}]", r"data\.sources\[0\]\.repeats=0, expected"),
    (lambda path: "[{root: a, tag_dropout: 2}]", r"data\.sources\[0\]\.tag_dropout=2"),
    (lambda path: "[{root: a, weight: 1}, {root: b}]", r"sources\[1\] \(b\) has no weight"),
    (lambda path: "[{root: a, weight: 1, repeats: 2}]", "leave out one of the two"),
    (lambda path: "[a, b]", "expected a list of sources, such as"),
    (lambda path: "cats", "expected a list of sources, such as"),
]


@pytest.mark.parametrize(("given", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_wrong_list_of_sources_is_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Callable[[Path], str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    captioned_folder(tmp_path / "a", 1)
    (tmp_path / "c.yaml").write_text("data: {resolution: 64}\n")
    with pytest.raises(ValueError, match=message):
        read_data(load_config(tmp_path / "c.yaml", [f"--data.sources={given(tmp_path)}"]).data)


def test_a_folder_and_sources_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"data\.root=c and data\.sources exclude each other"):
        Config(data=DataConfig(root="c", sources=(DataSource("a"),)))


def test_sources_go_through_yaml_and_stand_in_the_flat_settings(tmp_path: Path) -> None:
    given = DataSource("a", repeats=3, caption_prefix="x "), DataSource("b")
    config = Config(data=DataConfig(sources=given))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert json.dumps(flat(config)["data.sources"]).count('"root"') == 2
    assert flat(Config())["data.sources"] == ()


def test_inspect_reports_each_source_of_a_config(
    tmp_path: Path, three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    sources = [{"root": str(root), "weight": w} for root, w in zip(three, (1, 2, 1), strict=True)]
    data = {"sources": sources, "cache_dir": str(tmp_path / "cache"), "heldout_fraction": 0.0}
    config.write_text(json.dumps({"data": data | {"resolution": 32}, "train": {"batch_size": 4}}))
    page = tmp_path / "report.html"
    assert run_script("inspect_data.py", "--config", config, "--html", page, "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[-1]: line.split()[:6] for line in lines if "%" in line}
    assert rows[str(three[0])] == ["4", "0", "x", "1", "4", "25.0%"]
    assert rows[str(three[1])] == ["1", "0", "x", "8", "8", "50.0%"]
    assert rows[str(three[2])] == ["2", "0", "x", "2", "4", "25.0%"]
    assert all(str(root) in page.read_text() for root in three)
    (three[0] / "0.png").write_bytes(b"")
    assert run_script("inspect_data.py", "--config", config, "--json", "--quick") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["why_not"][0].startswith(f"{three[0]}: 1 of 4 images (25.0%) are skipped")
    assert report["problems"]["empty_file"]["examples"][0]["where"] == "z loose/0.png"
    assert run_script("inspect_data.py", three[2], "--config", config, "--quick") == 0
    assert "SAMPLES" not in capsys.readouterr().out
