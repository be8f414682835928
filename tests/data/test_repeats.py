"""How often an epoch shows an image: folders such as 10_dog, and exact shares of sources."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes_data import save_image

from latentdiff.data.epoch_draws import EpochDraws, make_draws
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.folder.folder_names import count_repeats, repeat_folder
from latentdiff.data.inspection.html_report import report_as_html
from latentdiff.data.inspection.inspect import inspect_folder
from latentdiff.data.inspection.text_report import report_as_text


def kohya_folder(root: Path) -> Path:
    """Two images of 3_red_dog, one of 1_cat, one beside them; a caption file for one only."""
    for i, name in enumerate(("3_red_dog/a.png", "3_red_dog/b.png", "1_cat/c.png", "d.png")):
        save_image(root / name, i)
    (root / "3_red_dog/a.txt").write_text("a dog that runs")
    (root / "d.txt").write_text("a bird")
    return root


def repeats(folder: Folder) -> dict[str, int]:
    return dict(zip(folder.ids.to_pylist(), folder.repeats.tolist(), strict=True))


def test_the_innermost_folder_names_repeats_and_class_and_no_file_does() -> None:
    assert repeat_folder("train/10_sks dog") == (10, "sks dog")
    assert repeat_folder("10_dog/5_close/ups") == (5, "close")
    for folder in ("", "dog", "dog_10", "10_", "10_dog.tar", "7_x.parquet", "20240131_trip"):
        assert repeat_folder(folder) is None
    paths = ["10_dog/3_a.png", "x.png", "4_b/s.tar/2_c/i.png", "4_b/s.tar/i.png", "5_t.arrow/00"]
    assert count_repeats(pa.array(paths, pa.large_string())).tolist() == [10, 1, 2, 4, 1]


def test_repeat_folders_count_only_when_asked(tmp_path):
    root, cache = kohya_folder(tmp_path / "data"), tmp_path / "cache"
    asked = {"missing_caption": "empty", "cache_dir": cache}
    for wanted in (False, True, False):
        folder = read_folder(root, repeat_folders=wanted, **asked)
        three = 3 if wanted else 1
        assert repeats(folder) == {
            "1_cat/c.png": 1,
            "3_red_dog/a.png": three,
            "3_red_dog/b.png": three,
            "d.png": 1,
        }
        assert (make_draws(folder, np.zeros(4, np.int16)) is None) != wanted


def test_the_class_of_a_folder_is_the_caption_of_images_without_one(tmp_path):
    root = kohya_folder(tmp_path)
    found = {}
    for on in (False, True):
        folder = read_folder(root, missing_caption="folder_name", repeat_folders=on)
        found[on] = {record.id: record.captions for record in folder}
    assert found[True] == {
        "1_cat/c.png": ("cat",),
        "3_red_dog/a.png": ("a dog that runs",),
        "3_red_dog/b.png": ("red dog",),
        "d.png": ("a bird",),
    }
    assert found[False]["3_red_dog/b.png"] == ("3 red dog",)
    labelled = read_folder(root, caption_template="a photo of a {label}", repeat_folders=True)
    assert labelled[2].captions == ("a photo of a red dog",)
    (root / "d.txt").unlink()
    assert "no_caption" in read_folder(root, missing_caption="folder_name").problems


def test_a_folder_of_no_repeats_is_not_used_and_named(tmp_path):
    save_image(kohya_folder(tmp_path) / "0_off/x.png")
    folder = read_folder(tmp_path, missing_caption="folder_name", repeat_folders=True)
    assert folder.problems["zero_repeats"].examples == [("0_off/x.png", "")]
    assert len(folder) == 4
    assert len(read_folder(tmp_path, missing_caption="folder_name")) == 5


def test_members_of_shards_take_the_repeats_of_the_folders_around_them(tmp_path):
    image = save_image(tmp_path / "image.png").read_bytes()
    (tmp_path / "data/10_dog").mkdir(parents=True)
    with tarfile.open(tmp_path / "data/10_dog/00_a.tar", "w") as tar:
        for name, content in (("x.png", image), ("x.txt", b"a dog")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    folder = read_folder(tmp_path / "data", repeat_folders=True)
    assert repeats(folder) == {"10_dog/00_a.tar/x.png": 10}


def test_the_held_out_split_takes_images_not_repeats(tmp_path):
    for i in range(30):
        save_image(tmp_path / f"5_dog/{i:02d}.png", i)
    asked = {"missing_caption": "folder_name", "heldout_fraction": 0.3}
    plain, repeated = (read_folder(tmp_path, repeat_folders=on, **asked) for on in (False, True))
    assert plain.heldout().ids == repeated.heldout().ids
    assert 0 < len(repeated.heldout()) < 30
    assert len(repeated.heldout()) + len(repeated.split("train")) == 30


def identity(source: int, bucket: int, num: int) -> np.ndarray:
    return np.arange(num)


def test_an_epoch_shows_each_record_as_often_as_its_repeats_say() -> None:
    counts, buckets = np.array([3, 1, 2, 5]), np.array([0, 1, 0, 1])
    draws = EpochDraws(counts, buckets)
    assert np.bincount(draws.records(identity)).tolist() == [3, 1, 2, 5]
    assert len(draws) == 11
    assert draws.bucket_counts == {0: 5, 1: 6}


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 7.5), (0.2, 0.2)])
def test_weights_give_exact_shares_of_every_epoch_and_every_image_at_least_once(weights) -> None:
    rng = np.random.default_rng(0)
    sources = np.repeat([0, 1], [40, 9])
    buckets, counts = rng.integers(0, 4, 49), rng.integers(1, 4, 49)
    draws = EpochDraws(counts, buckets, sources=sources, weights=weights)
    drawn = [
        draws.records(lambda source, bucket, num, epoch=epoch: epoch.permutation(num))
        for epoch in (np.random.default_rng(1), np.random.default_rng(2))
    ]
    total = sum(draws.source_counts.values())
    for k, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(draws.source_counts[k] - share * total) <= 1, "to one sample"
    for records in drawn:
        assert len(records) == len(draws) == total
        assert (np.bincount(records, minlength=49) >= counts).all()
        at = np.bincount(sources[records])
        assert at.tolist() == list(draws.source_counts.values())
        in_bucket = np.bincount(buckets[records])
        assert in_bucket.tolist() == [draws.bucket_counts[b] for b in range(4)]


def test_the_report_counts_the_samples_of_each_folder(tmp_path):
    root = kohya_folder(tmp_path / "data")
    folder = read_folder(root, missing_caption="folder_name", repeat_folders=True)
    report = inspect_folder(folder, resolution=32, batch_size=2, quick=True)
    rows = {row.name: (row.num_images, row.num_samples) for row in report.samples}
    assert rows == {"1_cat": (1, 1), "3_red_dog": (2, 6), ".": (1, 1)}
    assert report.cost.steps_per_epoch == 4
    text = report_as_text(report)
    assert "SAMPLES of an epoch" in text
    assert "x 3          6   75.0%  3_red_dog" in text
    assert "Samples of an epoch" in report_as_html(report, folder)
    plain = inspect_folder(read_folder(root, missing_caption="empty"), batch_size=2, quick=True)
    assert "SAMPLES" not in report_as_text(plain)
