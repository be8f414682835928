"""Problems of a captioned folder: their reasons, and a collection that counts them.

Three severities. `error`: the folder is not used until a person fixes it. `skipped`: that image is
not used and counts as invalid. `note`: worth knowing; no image is skipped for it, or only on
purpose.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from latentdiff.html import printable

Severity = Literal["error", "skipped", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "skipped", "note")
MAX_EXAMPLES = 10_000  # names stored per reason; the count has no limit


@dataclass(frozen=True)
class Reason:
    """One kind of problem: its severity, its title, and its fix."""

    severity: Severity
    title: str
    fix: str = ""


REASONS: dict[str, Reason] = {
    # the folder
    "no_images": Reason("error", "no image found"),
    "no_captions": Reason(
        "error",
        "no image has a caption",
        'write metadata.jsonl, one {"file_name": "cat.jpg", "text": "a cat"} a line; or put a .txt '
        "file next to each image; or name folders after their subjects and pass "
        "--data.caption_template='a photo of a {label}'; for one subject no captions are needed: "
        "--config dreambooth_mini",
    ),
    "link_leaves": Reason(
        "error",
        "link that leaves the folder",
        "copy the files in, or pass --data.follow_links=true",
    ),
    "link_broken": Reason("skipped", "link to nothing"),
    "link_folder": Reason(
        "note", "link to a folder, not entered", "--data.follow_links=true enters it"
    ),
    "name_not_utf8": Reason("skipped", "file name that is not UTF-8", "rename the file"),
    "unreadable": Reason("skipped", "file that cannot be read", "check the permissions"),
    "unreadable_folder": Reason("error", "folder that cannot be read", "check the permissions"),
    "not_a_file": Reason("skipped", "not a regular file"),
    # shards
    "broken_shard": Reason("error", "truncated or damaged shard", "fetch the shard again"),
    "shard_member": Reason("error", "shard member that is refused", "make the shard anew"),
    "mixed_shards": Reason(
        "error", "images next to tar shards", "keep shards and loose images in two folders"
    ),
    "shard_ignored": Reason("note", "shard members that are neither images nor captions"),
    "archive": Reason(
        "note",
        "archive that is not read",
        "unpack it (as with unzip NAME.zip -d FOLDER), or repack it as an uncompressed .tar",
    ),
    # tables with images
    "broken_table": Reason("error", "truncated or damaged table", "fetch the file again"),
    "table_ignored": Reason(
        "note",
        "table without a column of images, not read",
        "a table of captions is named metadata.parquet",
    ),
    "stray_table": Reason("note", "arrow file that belongs to no data set, not read"),
    "no_image_bytes": Reason(
        "skipped",
        "row without an image in it",
        "write the data set with its images in it: Dataset.save_to_disk or push_to_hub",
    ),
    "large_row_groups": Reason(
        "note",
        "parquet file of large row groups, slow to read out of order",
        "keep --data.cache=true, or write it with row_group_size=100",
    ),
    # images
    "empty_file": Reason("skipped", "empty file (0 bytes)"),
    "not_an_image": Reason(
        "skipped", "not an image", "use JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF"
    ),
    "truncated": Reason("skipped", "truncated or damaged image", "fetch the file again"),
    "unsupported": Reason(
        "skipped", "kind of image that is not supported", "convert it to an 8-bit PNG or JPEG"
    ),
    "too_many_pixels": Reason("skipped", "more than 89 million pixels", "make it smaller"),
    "too_small": Reason("skipped", "smaller than data.min_size", "lower --data.min_size"),
    "aspect_ratio": Reason("skipped", "too long and thin", "crop it, or raise --data.max_aspect"),
    "animated": Reason("note", "animation, only the first frame is used"),
    "wrong_extension": Reason("note", "extension that is not the file's format, used all the same"),
    "turned": Reason("note", "image stored on its side or mirrored, used as its EXIF says"),
    "color_profile": Reason("note", "image whose color profile is not sRGB's, converted to sRGB"),
    "broken_profile": Reason(
        "note",
        "image whose color profile cannot be used, read as sRGB",
        "export the image again in sRGB if its colors look wrong",
    ),
    "by_product": Reason(
        "note",
        "thumbnail, sample or other by-product, not used",
        "to use one, list it in metadata.jsonl or put a caption file next to it",
    ),
    "unread_image": Reason(
        "note",
        "image of a kind that is not read, without a caption or next to a readable copy, not used",
        "convert it to PNG or JPEG to use it",
    ),
    "other_files": Reason("note", "kind of file that is not read"),
    "same_name": Reason(
        "note",
        "names that look the same but are written differently (Unicode NFC and NFD)",
        "rename one",
    ),
    # masks
    "no_mask": Reason(
        "skipped",
        "image without a mask",
        "put NAME.mask.png next to NAME.jpg, or train without --data.mask=file",
    ),
    "broken_mask": Reason("skipped", "mask that cannot be read", "write it anew as a PNG"),
    "mask_size": Reason(
        "skipped", "mask of another size than its image", "make it as large as the image"
    ),
    "stray_mask": Reason("note", "mask without an image"),
    "second_mask": Reason("note", "second mask of an image, not used"),
    "unused_mask": Reason("note", "mask next to an image, not used", "--data.mask=file uses it"),
    # image conditions
    "no_condition": Reason(
        "skipped",
        "image without a condition",
        "name its file in a column condition of the metadata file (--data.condition_column names "
        "another), or put NAME.condition.png next to NAME.jpg",
    ),
    "broken_condition": Reason("skipped", "condition that cannot be read", "write it anew"),
    "condition_size": Reason(
        "skipped", "condition of another size than its image", "make it as large as the image"
    ),
    "condition_aspect": Reason(
        "skipped",
        "condition of another shape than its image",
        "cut it as the image is cut; its size may be another",
    ),
    "stray_condition": Reason("note", "condition without an image"),
    "second_condition": Reason("note", "condition next to an image that has others, not used"),
    "unused_condition": Reason(
        "note", "condition next to an image, not used", "--condition.kind says what it is"
    ),
    "black_condition": Reason(
        "note", "condition that is black all over", "draw it anew, or leave out the pair"
    ),
    "equal_condition": Reason(
        "note",
        "condition that equals its image",
        "the model would learn to copy it: check which of the two files was meant",
    ),
    "no_inpaint_mask": Reason(
        "skipped",
        "image without an inpainting mask",
        "name its file in a column inpaint_mask of the metadata file, put NAME.inpaint_mask.png "
        "next to NAME.jpg, or draw masks at random with --condition.masks=random",
    ),
    "broken_inpaint_mask": Reason(
        "skipped", "inpainting mask that cannot be read", "write it anew as a PNG"
    ),
    "inpaint_mask_size": Reason(
        "skipped",
        "inpainting mask of another size than its image",
        "make it as large as the image",
    ),
    "stray_inpaint_mask": Reason("note", "inpainting mask without an image"),
    "second_inpaint_mask": Reason(
        "note", "inpainting mask next to an image that has others, not used"
    ),
    "unused_inpaint_mask": Reason(
        "note",
        "inpainting mask next to an image, not used",
        "--condition.kind=inpaint --condition.masks=file uses it",
    ),
    "black_inpaint_mask": Reason(
        "note", "inpainting mask that is black all over, which hides nothing", "draw it anew"
    ),
    # captions
    "no_caption": Reason(
        "skipped",
        "image without a caption",
        "add one, or pass --data.missing_caption=empty, file_name or folder_name",
    ),
    "empty_caption": Reason("note", "empty caption"),
    "control_characters": Reason("note", "control characters removed from the caption"),
    "caption_not_utf8": Reason("error", "text that is not UTF-8", "save the file as UTF-8"),
    "caption_type": Reason("error", "caption that is not text", "give a text or a list of texts"),
    "two_captions": Reason("error", "image with two caption files that differ", "keep one"),
    "two_sources": Reason("note", "caption file next to an image that has a row; the row is used"),
    "stray_caption": Reason("note", "caption file without an image"),
    # caption tables
    "metadata_json": Reason(
        "error",
        "metadata.json is not read",
        "write it as metadata.jsonl: one JSON object a line, no list around them",
    ),
    "two_metadata": Reason("error", "two caption tables for the same images", "keep one"),
    "broken_metadata": Reason("error", "broken caption table"),
    "no_column": Reason("error", "caption table without a column"),
    "file_name_type": Reason("error", "file name that is not text"),
    "half_character": Reason(
        "error",
        "file name with half a character (one \\u code of a pair)",
        "write both codes, or the character itself",
    ),
    "outside": Reason(
        "error", "file name that leads out of the folder", "give a path below the table's folder"
    ),
    "windows_path": Reason(
        "error", "file name with backslashes", "write / instead of \\ in the table"
    ),
    "missing_file": Reason(
        "error", "row for a file that is not there", "remove the row or add the file"
    ),
    "listed_twice": Reason(
        "error",
        "image listed more than once",
        "keep one row, or pass --data.duplicate_rows=captions to use the caption of each",
    ),
    "unlisted": Reason("note", "image without a row in the caption table, not used"),
    "zero_repeats": Reason("note", "image of a folder with 0 repeats, not used"),
}


def counted_title(title: str, count: int) -> str:
    """Write a problem's title, and how often it was found where that is more than once."""
    return title if count == 1 else f"{title} ({count:,})"


@dataclass
class ProblemGroup:
    """All problems of one reason: how many, and (where, detail) of the first ten thousand."""

    key: str
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def reason(self) -> Reason:
        return REASONS[self.key]

    @property
    def headline(self) -> str:
        """Title, and count where it is more than one."""
        return counted_title(self.reason.title, self.count)

    def line(self, *, max_names: int = 3) -> str:
        """Describe the group in a line: title, count, first names with details, and the fix."""
        shown = [f"{where}: {detail}" if detail else where for where, detail in self.examples]
        names = printable("; ".join(shown[:max_names]))
        rest = self.count - min(max_names, len(shown))
        more = f"; and {rest:,} more" if rest else ""
        fix = f". Fix: {self.reason.fix}" if self.reason.fix else ""
        return f"{self.headline}: {names}{more}{fix}"


class Problems(Mapping[str, ProblemGroup]):
    """Problems by reason, errors first. `problems["truncated"].count`."""

    def __init__(self) -> None:
        self._groups: dict[str, ProblemGroup] = {}

    def add(self, key: str, where: str, detail: str = "") -> None:
        """Count one problem. `where` names a file (and row); `detail` describes the finding."""
        if key not in REASONS:
            raise KeyError(key)
        group = self._groups.setdefault(key, ProblemGroup(key))
        group.count += 1
        if len(group.examples) < MAX_EXAMPLES:
            group.examples.append((where, detail))

    def add_all(self, others: "Problems", *, prefix: str) -> None:
        """Add the problems of a folder, whose names get a prefix."""
        for key, group in others.items():
            own = self._groups.setdefault(key, ProblemGroup(key))
            own.count += group.count
            room = MAX_EXAMPLES - len(own.examples)
            own.examples += [(prefix + where, detail) for where, detail in group.examples[:room]]

    def count(self, severity: Severity) -> int:
        return sum(group.count for group in self.groups(severity))

    def groups(self, severity: Severity) -> list[ProblemGroup]:
        """The groups of one severity, in the order of REASONS."""
        return [self[key] for key in self if REASONS[key].severity == severity]

    def __getitem__(self, key: str) -> ProblemGroup:
        return self._groups[key]

    def __iter__(self) -> Iterator[str]:
        order = list(REASONS)
        return iter(
            sorted(
                self._groups,
                key=lambda key: (SEVERITIES.index(REASONS[key].severity), order.index(key)),
            )
        )

    def __len__(self) -> int:
        return len(self._groups)

    def to_json(self) -> dict[str, Any]:
        """A plain form that `from_json` reads back."""
        return {key: {"count": g.count, "examples": g.examples} for key, g in self.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Problems":
        problems = cls()
        for key, group in data.items():
            if key not in REASONS:
                raise KeyError(key)
            examples = [(str(where), str(detail)) for where, detail in group["examples"]]
            problems._groups[key] = ProblemGroup(key, int(group["count"]), examples)
        return problems
