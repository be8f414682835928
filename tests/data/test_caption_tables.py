"""Caption tables as other programs write them: each fault by file, line and a fix that helps."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import save_image

from latentdiff.data.folder.folder import read_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_image(tmp_path / "images" / "0.png")
    return tmp_path


TWICE = 'the column "text" is there twice. Fix: remove or rename one'
FAULTS = {
    "a column twice": ("csv", "file_name,text,text\nimages/0.png,a,b\n", "metadata.csv:1", TWICE),
    "a key twice": (
        "jsonl",
        '{"file_name": "images/0.png", "text": "a"}\n'
        '{"file_name": "images/0.png", "text": "a", "text": "b"}\n',
        "metadata.jsonl:2",
        TWICE,
    ),
    "semicolons": (
        "csv",
        "file_name;text\nimages/0.png;a\n",
        "metadata.csv:1",
        "cells are separated by semicolons. Fix: write it anew with commas",
    ),
    "tabs": (
        "csv",
        "file_name\ttext\nimages/0.png\ta\n",
        "metadata.csv:1",
        "cells are separated by tabs. Fix: write it anew with commas",
    ),
    "backslashes": (
        "csv",
        "file_name,text\nimages\\0.png,a\n",
        "metadata.csv:2",
        "images\\0.png; there is images/0.png. Fix: write / instead of \\",
    ),
    "a drive": (
        "csv",
        "file_name,text\nC:\\photos\\0.png,a\n",
        "metadata.csv:2",
        "C:\\\\photos",
    ),
    "half a character": (
        "jsonl",
        '{"file_name": "images/\\ud83d.png", "text": "a"}\n',
        "metadata.jsonl:1",
        "Fix: write both codes, or the character itself",
    ),
    "deep nesting": ("jsonl", "[" * 100_000, "metadata.jsonl:1", "not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_caption_table_is_named_with_its_line_and_fix(root: Path, fault: str) -> None:
    kind, text, where, expected = FAULTS[fault]
    (root / f"metadata.{kind}").write_text(text)
    with pytest.raises(ValueError, match=where) as caught:
        read_folder(root).check()
    assert expected in str(caught.value)


def test_a_parquet_column_twice_is_named(root: Path) -> None:
    columns = [["images/0.png"], ["a"], ["b"]]
    table = pa.table([pa.array(c) for c in columns], names=["file_name", "text", "text"])
    pq.write_table(table, root / "metadata.parquet")
    with pytest.raises(ValueError, match=r'metadata\.parquet:1: the column "text" is there twice'):
        read_folder(root).check()


def test_another_column_twice_does_no_harm(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,text,tag,tag\nimages/0.png,a,b,c\n")
    assert read_folder(root)[0].captions == ("a",)


def test_a_sidecars_key_twice_is_named(root: Path) -> None:
    (root / "images" / "0.json").write_text('{"text": "a", "text": "b"}')
    with pytest.raises(ValueError, match=r'images/0\.json: the column "text" is there twice'):
        read_folder(root).check()


def test_a_name_with_a_backslash_of_its_own_is_a_name(root: Path) -> None:
    save_image(root / "a\\b.png")
    (root / "metadata.csv").write_text("file_name,text\na\\b.png,x\n")
    assert [record.id for record in read_folder(root)] == ["a\\b.png"]
