"""The data report: right figures, planted faults by name, text and HTML safe to show."""

import html.parser
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes_data import captioned_folder, noise_image, save_image, write_jsonl
from PIL import ExifTags, Image

from latentdiff.data.buckets import make_buckets
from latentdiff.data.folder.folder import read_folder
from latentdiff.data.inspection.cost_estimate import CacheShape
from latentdiff.data.inspection.html_report import report_as_html, write_report_html
from latentdiff.data.inspection.inspect import DataReport, make_data_report
from latentdiff.data.inspection.near_duplicates import find_near_duplicates
from latentdiff.data.inspection.text_report import report_as_text, size_text, time_text
from latentdiff.models.text import train_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_data.py"
SHARED = Path(os.environ.get("LATENTDIFF_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no {SHARED}/data")


def report_on(root: Path, *, reading: dict | None = None, **settings) -> DataReport:
    folder = read_folder(root, **(reading or {}))
    settings.setdefault("buckets", make_buckets(64, multiple=16, max_aspect=2.0))
    settings.setdefault("batch_size", 4)
    return make_data_report(folder, **settings)


def run(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Run the script in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def test_counts_sizes_and_captions(tmp_path):
    sizes = [(40, 80), (80, 40), (60, 60), (100, 50)]
    rows = []
    for i, (width, height) in enumerate(sizes):
        save_image(tmp_path / f"train/{i}.png", i, width=width, height=height)
        rows.append({"file_name": f"{i}.png", "text": ["a cat", "a dog"] if i else [""]})
    write_jsonl(tmp_path / "train/metadata.jsonl", rows)
    captioned_folder(tmp_path / "test", 2)
    report = report_on(tmp_path)
    assert report.is_usable
    assert report.splits == {"train": 4, "validation": 0, "test": 2}
    assert report.sizes is not None
    assert (report.sizes.num_wide, report.sizes.num_tall, report.sizes.num_square) == (4, 1, 1)
    assert report.sizes.shorter.min == 32
    assert report.sizes.aspect.max == 2.0
    assert report.captions is not None
    assert report.captions.num_captions == 9
    assert report.captions.num_different == 5
    assert report.captions.num_empty == 1
    assert report.captions.max_per_image == 2
    assert sorted(report.captions.repeated) == [("a cat", 3), ("a dog", 3)]


def test_tokens_are_counted_and_the_part_cut_off_is_shown(tmp_path):
    captioned_folder(tmp_path, 3)
    long = "image " + "very " * 30 + "last"
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(["a", long, "b"])]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    tokenizer = train_tokenizer(["image very last a b"] * 9, vocab_size=530, max_length=16)
    tokens = report_on(tmp_path, tokenizer=tokenizer).captions.tokens
    assert tokens.limit == 16
    assert tokens.num_over == 1
    (worst,) = tokens.worst
    assert worst.id == "1.png"
    assert worst.num_tokens > 32
    assert worst.caption.endswith(worst.cut)
    assert worst.cut.endswith("very last")
    assert tokens.lengths.min == 3


def test_bucket_rows_count_images_repeats_enlargements_and_crop_loss(tmp_path):
    sizes = [(64, 64)] * 5 + [(32, 32), (80, 40)]
    captioned_folder(tmp_path, len(sizes))
    for i, (width, height) in enumerate(sizes):
        save_image(tmp_path / f"{i}.png", i, width=width, height=height)
    square, wide = report_on(tmp_path, partial="fill").buckets
    assert (square.width, square.height, square.num_images) == (64, 64, 6)
    assert (square.num_batches, square.last_batch, square.num_repeats) == (2, 4, 2)
    assert (square.num_enlarged, square.mean_crop_loss) == (1, 0.0)
    assert (wide.width, wide.height, wide.worst_id) == (80, 48, "6.png")
    assert wide.max_crop_loss == pytest.approx(1 - (80 / 48) / 2)
    kept = report_on(tmp_path, partial="keep").buckets[0]
    assert (kept.num_batches, kept.last_batch, kept.num_repeats) == (2, 2, 0)


def test_the_cost_counts_steps_and_bytes(tmp_path):
    captioned_folder(tmp_path, 10, width=64, height=64)
    shape = CacheShape(
        latent_factor=8, latent_channels=4, text_tokens=7, text_width=5, value_bytes=2
    )
    calls = []
    report = report_on(tmp_path, cache=shape, encode=lambda pixels: calls.append(pixels.shape))
    cost = report.cost
    assert cost.steps_per_epoch == 3
    assert cost.latent_bytes == 10 * 2 * 4 * 8 * 8 * 2
    assert cost.text_bytes == 11 * 7 * 5 * 2  # ten captions and the null caption
    assert set(calls) == {(1, 3, 64, 64)}
    assert cost.seconds == pytest.approx(10 / cost.load_rate + 10 / cost.encode_rate)
    assert report_on(tmp_path).cost.encode_rate is None


def test_duplicates_and_leaks_are_reported(tmp_path):
    captioned_folder(tmp_path / "train", 3, width=64, height=64)
    captioned_folder(tmp_path / "test", 1, width=64, height=64)  # its 0.png is train's
    noise_image(1, width=64, height=64).save(tmp_path / "train/2.png", compress_level=1)
    folder = read_folder(tmp_path)
    report = report_on(tmp_path, duplicates=find_near_duplicates(folder))
    assert [(g.ids, g.is_exact, g.is_leak) for g in report.duplicates] == [
        (["test/0.png", "train/0.png"], True, True),
        (["train/1.png", "train/2.png"], False, False),
    ]
    text = report_as_text(report)
    assert "equal files, both trained on and held out (1)\n    test/0.png = train/0.png" in text
    assert "nearly equal images (1)" in text
    assert text.endswith(
        "USABLE: training may start.\n"
        "1 image is both trained on and held out: held-out figures flatter\n"
    )


def planted(root: Path) -> dict[str, str]:
    """Plant faults in a copy of a good folder: reason -> the name that the report must show."""
    captioned_folder(root, 40, width=64, height=64)
    lines = (root / "metadata.jsonl").read_text().splitlines()
    planted_names = {}

    def spoil(number: int, reason: str, data: bytes | None = None, **row: object) -> None:
        if data is not None:
            (root / f"{number}.png").write_bytes(data)
        lines[number] = json.dumps({**json.loads(lines[number]), **row})
        planted_names[reason] = f"metadata.jsonl:{number + 1}" if row else f"{number}.png"

    whole = (root / "0.png").read_bytes()
    spoil(0, "truncated", whole[:-40])
    spoil(1, "empty_file", b"")
    spoil(2, "not_an_image", b"<html>not found</html>")
    spoil(3, "empty_caption", text="")
    spoil(4, "control_characters", text="bell\x07 \x1b[31mred")
    spoil(5, "caption_type", text=None)
    spoil(6, "outside", file_name="../../6.png")
    spoil(7, "missing_file", file_name="gone.png")
    save_image(root / "8.png", width=10, height=10)
    save_image(root / "9.png", width=640, height=64)
    planted_names |= {"too_small": "8.png", "aspect_ratio": "9.png"}
    noise_image().save(root / "10.png", "JPEG")
    save_image(root / "extra.png", 77)
    (root / "link.png").symlink_to("/etc/hostname")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    noise_image(12, width=64, height=64).save(root / "12.png", exif=turned)
    planted_names |= {"wrong_extension": "10.png", "turned": "12.png", "unlisted": "extra.png"}
    planted_names["link_leaves"] = "link.png"
    lines += [lines[11], "{broken"]
    planted_names |= {"listed_twice": "11.png", "broken_metadata": "metadata.jsonl:42"}
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return planted_names


def test_planted_faults_are_all_found_by_name(tmp_path, monkeypatch, capsys):
    planted_names = planted(tmp_path)
    code, out, _ = run(monkeypatch, capsys, str(tmp_path), "--json", "--data.min_size=32")
    assert code == 1
    report = json.loads(out)
    assert not report["is_usable"]
    for reason, name in planted_names.items():
        assert name in [e["where"] for e in report["problems"][reason]["examples"]], reason
    assert len(planted_names) == 16
    code, out, _ = run(monkeypatch, capsys, str(tmp_path), "--data.min_size=32")
    assert code == 1
    for name in planted_names.values():
        assert name in out
    assert "NOT USABLE:\n  link that leaves the folder\n" in out
    assert "\x1b" not in out


def test_exit_codes(tmp_path, monkeypatch, capsys):
    good = captioned_folder(tmp_path / "good", 3, width=64, height=64)
    code, out, _ = run(monkeypatch, capsys, str(good), "--data.resolution=64")
    assert code == 0
    assert "USABLE: training may start." in out
    bad = captioned_folder(tmp_path / "bad", 3)
    (bad / "1.png").write_bytes(b"")
    assert run(monkeypatch, capsys, str(bad))[0] == 1
    assert run(monkeypatch, capsys, str(bad), "--data.max_invalid_fraction=0.5")[0] == 0
    for args in (
        ["/no/such/folder"],
        [str(good), "--data.resolution=0"],
        [str(good), "--nonsense"],
    ):
        code, out, err = run(monkeypatch, capsys, *args)
        assert code == 2
        assert err
        assert "Traceback" not in err
    for wrong in ("--full=perhaps", "--data.missing_caption=drop", "--train.batch_size=many"):
        assert run(monkeypatch, capsys, str(good), wrong)[0] == 2


def test_the_fix_a_message_gives_works_as_it_is_printed(tmp_path, monkeypatch, capsys):
    captioned_folder(tmp_path, 2)
    rows = [{"file_name": f"{i}.png", "captions": ["x", "y"]} for i in range(2)]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    code, out, _ = run(monkeypatch, capsys, str(tmp_path))
    assert code == 1
    fix = next(word for word in out.split() if word.startswith("--data.caption_column="))
    assert run(monkeypatch, capsys, str(tmp_path), fix)[0] == 0


def test_quick_skips_the_search_for_duplicates(tmp_path, monkeypatch, capsys):
    captioned_folder(tmp_path, 2)
    _, out, _ = run(monkeypatch, capsys, str(tmp_path), "--quick")
    assert "not searched" in out
    assert "--tokenizer=FOLDER" in out


def test_instance_prompts_stand_for_captions_as_in_training(tmp_path, monkeypatch, capsys):
    for number in range(4):
        save_image(tmp_path / f"{number}.png", number)
    prompts = '--finetune.instance_prompts=["a photo of sks"]'
    code, out, _ = run(monkeypatch, capsys, str(tmp_path), "--quick")
    assert code == 1
    assert "no image has a caption\n" in out
    assert "for one subject no captions are needed: --config dreambooth_mini" in out
    code, out, _ = run(monkeypatch, capsys, str(tmp_path), "--quick", prompts)
    assert code == 0
    assert "aption" not in out


def test_figures_say_what_sizes_they_are_for(tmp_path, monkeypatch, capsys):
    photos, page = captioned_folder(tmp_path / "photos", 3), tmp_path / "report.html"
    note = "buckets and cost are for 512 px and batches of 16; --config lora_mini gives"
    args = [str(photos), "--quick", "--html", str(page)]
    out = run(monkeypatch, capsys, *args)[1]
    assert note in out
    assert note in page.read_text()
    assert out.endswith(f"\nwrote {page}\n")
    out = run(monkeypatch, capsys, *args, "--config", "lora_mini")[1]
    assert "128 x 128" in out
    assert "an epoch in batches of 12" in out
    assert "--config" not in out
    _, out, err = run(monkeypatch, capsys, *args, "--json")
    assert json.loads(out)["sizes_note"].startswith(note)
    assert f"wrote {page}" in err


def test_an_empty_folder_has_a_report_too(tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, str(tmp_path), "--html", str(tmp_path / "r.html"))
    assert code == 1
    assert "no image found" in out


class Page(html.parser.HTMLParser):
    """Collects a page's tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_html_escapes_everything_and_fetches_nothing(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    names = ["a<b>&'\".png", "<img src=x onerror=alert(3)>.png", "c.png"]
    rows = []
    for i, name in enumerate(names):
        save_image(tmp_path / name, i)
        rows.append({"file_name": name, "text": f"{evil} {i}"})
    rows.append({"file_name": f"{evil}.png", "text": "x"})
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    save_image(tmp_path / '"><svg onload=alert(4)>.png', 9)
    folder = read_folder(tmp_path)
    text = report_as_html(
        make_data_report(folder, buckets=make_buckets(64, multiple=16), batch_size=4), folder
    )
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "svg", "link", "iframe"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/jpeg;base64,")
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text


def test_html_is_written_whole_with_thumbnails_of_broken_folders_too(tmp_path):
    planted(tmp_path / "data")
    folder = read_folder(tmp_path / "data", min_size=32)
    duplicates = find_near_duplicates(folder)
    buckets = make_buckets(64, multiple=16)
    report = make_data_report(folder, buckets=buckets, batch_size=4, duplicates=duplicates)
    write_report_html(report, folder, path=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.endswith("</body></html>")
    assert text.count("<img ") > 24
    assert "not usable" in text
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    name = "a\x1b]0;title\x07b.png"
    save_image(tmp_path / name)
    (tmp_path / "c.txt").write_text("x")
    save_image(tmp_path / "c.png", 1)
    report = report_on(tmp_path)
    assert "\x1b" not in report_as_text(report)
    assert "a\\x1b]0;title\\x07b.png" in report_as_text(report)
    with pytest.raises(ValueError, match="cannot be used") as error:
        read_folder(tmp_path).check()
    assert "\x1b" not in str(error.value)


def test_numbers_are_written_for_people():
    assert [size_text(n) for n in (0, 999, 1500, 34_200_000, 5e12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "34.2 MB",
        "5.0 TB",
    ]
    assert [time_text(s) for s in (0.2, 3.2, 120, 7200)] == [
        "less than 1 s",
        "3 s",
        "2 min",
        "2.0 h",
    ]


def test_json_is_plain_data(tmp_path):
    captioned_folder(tmp_path, 3)
    report = report_on(tmp_path)
    assert json.loads(json.dumps(report.to_json())) == json.loads(json.dumps(report.to_json()))
    assert not np.isnan(report.cost.load_rate)


@needs_shared
@pytest.mark.parametrize("name", ["noto-emoji", "flowers", "dreambooth/dog3"])
def test_real_folders_are_usable(name):
    folder = read_folder(SHARED / "data" / name)
    report = make_data_report(folder, buckets=make_buckets(128, multiple=32), batch_size=8)
    assert report.is_usable
    assert report.num_usable == report.num_found > 0
    assert report_as_text(report).endswith("USABLE: training may start.\n")


@needs_shared
def test_a_real_leak_is_found():
    folder = read_folder(SHARED / "data/flowers")
    pair = [
        "test/sunflowers_15072973261_73e2912ef2_n.jpg",
        "train/sunflowers_15069459615_7e0fd61914_n.jpg",
    ]
    ids = folder.ids.to_pylist()
    near = [ids.index(name) for name in pair] + list(range(0, len(ids), 40))
    some = folder.select(np.unique(near))
    groups = find_near_duplicates(some)
    assert [[some[i].id for i in group.indices] for group in groups] == [pair]


def test_the_script_reports_the_buckets_that_training_would_use(tmp_path, monkeypatch, capsys):
    for i, (width, height) in enumerate([(64, 64), (96, 48), (48, 96)]):
        save_image(tmp_path / f"{i}.png", i, width=width, height=height)
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    args = [str(tmp_path), "--quick", "--json", "--data.resolution=64", "--data.bucket_multiple=16"]
    sizes, latent_bytes = [], []
    for more in ([], ["--data.buckets=true", "--data.num_crops=3", "--data.random_flip=true"]):
        report = json.loads(run(monkeypatch, capsys, *args, *more)[1])
        sizes.append([(row["width"], row["height"]) for row in report["buckets"]])
        latent_bytes.append(report["cost"]["latent_bytes"])
    assert sizes == [[(64, 64)], [(48, 80), (64, 64), (80, 48)]]
    assert latent_bytes[1] > 5 * latent_bytes[0]
    report = json.loads(run(monkeypatch, capsys, *args, "--data.cache=false")[1])
    assert report["cost"]["latent_bytes"] == 0
    _, out, _ = run(monkeypatch, capsys, *(arg for arg in args if arg != "--json"))
    assert "--data.buckets=true keeps images nearer" in out
