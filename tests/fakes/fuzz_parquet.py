"""Random data sets with images in tables: parquet and arrow files, good, odd and damaged.

The value of a case is what training would read: (captions, the image's bytes) of every record.
"""

import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fakes_data import noise_image
from fuzz_inputs import FuzzCase

from latentdiff.data.folder.folder import read_folder

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LARGE = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
WORDS = ("a cat", "ein café", "日本語", "x" * 300, "(12:30)", 'a "b", c', "e\u0301", "👍")
Value = list[tuple[tuple[str, ...], bytes]]


@cache
def image_bytes(seed: int, kind: str) -> bytes:
    file = io.BytesIO()
    noise_image(seed, width=40, height=33).save(file, kind)
    return file.getvalue()


def read(root: Path, **settings: Any) -> Value:
    folder = read_folder(root, **settings)
    folder.check(max_invalid_fraction=0.999)
    return [(record.captions, folder.read_bytes(i)) for i, record in enumerate(folder)]


def rows_of(generator: random.Random, *, with_bad: bool) -> tuple[list[Any], list[Any], Value]:
    """Images, captions and the right value; with_bad: some rows cannot be used."""
    images: list[Any] = []
    captions: list[Any] = []
    right: Value = []
    for i in range(generator.randint(1, 8)):
        data = image_bytes(generator.randrange(6), generator.choice(("PNG", "JPEG", "WEBP")))
        caption: Any = generator.choice(WORDS)
        bad = generator.randrange(8) if with_bad and i else 7
        path = generator.choice((None, "x.png", "../../etc/passwd", "/root/a.png"))
        image: Any = {"bytes": data, "path": path}
        if bad == 0:
            image = None
        elif bad == 1:
            image["bytes"] = None
        elif bad == 2:
            image["bytes"] = generator.randbytes(generator.randrange(30))
        elif bad == 3:
            image["bytes"] = data[: len(data) // 3]
        elif bad == 4:
            caption = None
        else:
            right.append(((caption,), data))
        images.append(image)
        captions.append(caption)
    return images, captions, right


def write_table(path: Path, table: pa.Table, generator: random.Random) -> Path:
    """Write a table in a random form of the file's kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        compression = generator.choice(("snappy", "none", "zstd", "gzip"))
        size = generator.choice((1, 3, 1000))
        version = generator.choice(("1.0", "2.0"))
        use_dictionary = generator.random() < 0.5
        pq.write_table(
            table,
            path,
            compression=compression,
            row_group_size=size,
            data_page_version=version,
            use_dictionary=use_dictionary,
        )
        return path
    make = generator.choice((pa.ipc.new_stream, pa.ipc.new_file))
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as out:
        out.write_table(table, max_chunksize=generator.choice((1, 3, 1000)))
    if generator.random() < 0.5:
        state = {"_data_files": [{"filename": path.name}]}
        (path.parent / "state.json").write_text(json.dumps(state))
    return path


def name_of(generator: random.Random) -> str:
    kind = generator.choice(("parquet", "arrow"))
    stem = generator.choice(("train-00000-of-00001", "data/train-0", "a/b/0000", "é", "a.tar/x"))
    return f"{stem}.{kind}"


def valid_case(generator: random.Random) -> FuzzCase:
    """A table with good rows, and some that are skipped."""
    images, captions, right = rows_of(generator, with_bad=generator.random() < 0.5)
    kind = generator.choice((STRUCT, LARGE, pa.binary(), pa.large_binary()))
    if not pa.types.is_struct(kind):
        images = [image and image["bytes"] for image in images]
    column = generator.choice(("image", "jpg", "picture" if pa.types.is_struct(kind) else "img"))
    texts = pa.array(captions, generator.choice((pa.string(), pa.large_string())))
    form = generator.randrange(3)
    if form == 1:
        texts = pa.array([caption and [caption, "b"] for caption in captions])
        right = [((*caption, "b"), data) for caption, data in right]
    elif form == 2:
        texts = texts.dictionary_encode()
    columns = {column: pa.array(images, kind), "text": texts, "n": range(len(images))}
    table = pa.table({n: columns[n] for n in generator.sample(sorted(columns), 3)})
    name, seed = name_of(generator), generator.random()

    def load(folder: Path) -> Value:
        write_table(folder / name, table, random.Random(seed))
        return read(folder)

    return FuzzCase(f"valid {name} {kind} {form}", load, lambda value: value == right)


def damaged_case(generator: random.Random) -> FuzzCase:
    """A file cut off anywhere, or of another kind under its name."""
    images, captions, _ = rows_of(generator, with_bad=False)
    table = pa.table({"image": pa.array(images, STRUCT), "text": captions})
    name, seed, how = name_of(generator), generator.random(), generator.randrange(4)
    share = generator.random()

    def load(folder: Path) -> Value:
        path = write_table(folder / name, table, random.Random(seed))
        data = path.read_bytes()
        if how == 0:  # a stream ends with 8 bytes that say so, which need not be there
            data = data[: int(share * (len(data) - 12))]
        elif how == 1:
            data = b""
        elif how == 2:
            data = image_bytes(0, "PNG")
        else:
            data = random.Random(seed).randbytes(int(share * 300))
        path.write_bytes(data)
        return read(folder)

    return FuzzCase(f"damaged {how} {name}", load, named=(Path(name).name,))


def flipped_case(generator: random.Random) -> FuzzCase:
    """Bytes changed at random: refused by name, or read; never anything else."""
    images, captions, _ = rows_of(generator, with_bad=False)
    table = pa.table({"image": pa.array(images, STRUCT), "text": captions})
    name, seed, where = name_of(generator), generator.random(), generator.random()

    def load(folder: Path) -> Value:
        path = write_table(folder / name, table, random.Random(seed))
        data = bytearray(path.read_bytes())
        for _ in range(3):
            place = int(where * (len(data) - 60)) + random.Random(seed).randrange(60)
            data[place] ^= 1 << random.Random(seed).randrange(8)
        path.write_bytes(data)
        try:
            return read(folder)
        except (ValueError, OSError) as error:
            if Path(name).name not in str(error):
                raise
            return []

    return FuzzCase(f"flipped {name}", load, lambda value: isinstance(value, list))


def refused_table(generator: random.Random) -> tuple[str, pa.Table]:
    """A whole table that cannot be used, and what is wrong with it."""
    images, captions, _ = rows_of(generator, with_bad=False)
    num = len(images)
    image = pa.array(images, STRUCT)
    makers: dict[str, Callable[[], pa.Table]] = {
        "no caption column": lambda: pa.table({"image": image, "prompt": captions}),
        "no image column": lambda: pa.table({"url": captions, "text": captions}),
        "caption twice": lambda: pa.Table.from_arrays(
            [image, pa.array(captions), pa.array(captions)], ["image", "text", "text"]
        ),
        "image twice": lambda: pa.Table.from_arrays(
            [image, image, pa.array(captions)], ["image", "image", "text"]
        ),
        "numbers": lambda: pa.table({"image": image, "text": range(num)}),
        "nested captions": lambda: pa.table(
            {"image": image, "text": [{"en": caption} for caption in captions]}
        ),
        "bytes as captions": lambda: pa.table(
            {"image": image, "text": pa.array([b"\xff"] * num, pa.binary())}
        ),
        "lists of images": lambda: pa.table({"image": [[b"x"]] * num, "text": captions}),
        "texts as images": lambda: pa.table({"image": captions, "text": captions}),
        "no rows": lambda: pa.table({"image": image, "text": captions})[:0],
        "all null": lambda: pa.table({"image": pa.nulls(num, STRUCT), "text": captions}),
        "two columns of images": lambda: pa.table({"a": image, "b": image, "text": captions}),
        "a null in a list": lambda: pa.table(
            {"image": image, "text": [[caption, None] for caption in captions]}
        ),
    }
    what = generator.choice(sorted(makers))
    return what, makers[what]()


def refused_case(generator: random.Random) -> FuzzCase:
    """A table without what training needs, or with it twice or of another type."""
    what, table = refused_table(generator)
    name, seed = name_of(generator), generator.random()
    there = "no image found" if what == "no rows" else Path(name).name

    def load(folder: Path) -> Value:
        write_table(folder / name, table, random.Random(seed))
        return read(folder)

    return FuzzCase(f"{what} {name}", load, named=(there,))


def make_case(generator: random.Random) -> FuzzCase:
    kinds = (valid_case, valid_case, damaged_case, flipped_case, refused_case)
    return generator.choice(kinds)(generator)
