"""A summary of a model's training content in Markdown: sources, sizes, licences, filters, refusals.

It counts and names no image. Its sections follow the European Commission's template for the public
summary of training content (AI Act, Article 53(1)(d)), as far as a data folder can tell them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from posixpath import splitext

from latentdiff.config.data import DataConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.arrow.columns import iter_py
from latentdiff.data.folder.folder import Folder
from latentdiff.data.image_tables.hub_dataset import public_dataset_name
from latentdiff.data.inspection.text_report import size_text

LICENCE_FILES = re.compile(r"(licen[cs]e|copying)([.\-_].*)?", re.IGNORECASE)
NOT_STATED = "not stated in the folder"
NOT_USED = ("by_product", "unlisted", "zero_repeats", "unread_image")  # notes of images not used
MAX_TEXT = 120  # characters of a licence's first line
PAGE = """# Summary of training content

{intro}

## Sources

| source | licence | training images | held out | captions | size of the files |
|---|---|---|---|---|---|
{sources}

File formats: {formats}. Base: {base}.

## How images were chosen

{filters}

## What was refused

{refused}

## Proof

`latentdiff verify MODEL --data DIR` compares a data folder with the bill of materials of this
model. It proves that the data is the same, not who made it, nor that its licences are as stated.
"""


def training_content(
    base: Mapping[str, Mapping[str, str]], folders: Mapping[str, Folder], config: Config
) -> str:
    """Return the summary of a run's data folders, which are named without their place.

    base: name of each model that the run starts from, by its role.
    """
    roots = [settings.root for settings in config.data.each_source()]
    return content_page(
        base, dict(zip(roots, folders.values(), strict=True)), filters=_filters(config)
    )


def content_page(
    base: Mapping[str, Mapping[str, str]], folders: Mapping[str, Folder], *, filters: Iterable[str]
) -> str:
    """Return the summary of folders by their root, and of how their images were chosen."""
    formats = Counter[str]()
    for folder in folders.values():
        formats.update(_endings(folder))
    bases = [f"{role} {facts['name']}" for role, facts in base.items()]
    shown = [f"{ending} ({count:,})" for ending, count in formats.most_common()]
    return PAGE.format(
        intro=_intro([*folders.values()]),
        sources="\n".join(_source_row(folder, root) for root, folder in folders.items()),
        formats=", ".join(shown) or "none",
        base=_cell(", ".join(bases) or "none, trained from scratch"),
        filters="\n".join(f"- {line}" for line in filters),
        refused="\n".join(_refused(iter(folders.values()))),
    )


def _intro(folders: Sequence[Folder]) -> str:
    num_train = sum(len(folder.split("train")) for folder in folders)
    num_heldout = sum(len(folder.heldout()) for folder in folders)
    return (
        f"This model was trained on {num_train:,} captioned images; {num_heldout:,} more were held "
        "out to measure it.\nThe data that a base model was trained on before is not part of this."
    )


def _source_row(folder: Folder, root: str) -> str:
    train, heldout = folder.split("train"), folder.heldout()
    size = sum(int(part.files()["size"].to_numpy().sum()) for part in (train, heldout))
    num_captions = sum(len(part.captions.flatten()) for part in (train, heldout))
    cells = (
        _source_name(root),
        stated_licence(folder.root),
        f"{len(train):,}",
        f"{len(heldout):,}",
        f"{num_captions:,}",
        size_text(size),
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _source_name(root: str) -> str:
    """Name a data set of the Hub by its whole id, with its revision, a folder without its place."""
    name = public_dataset_name(root)
    return root if "/" in name else name


def stated_licence(root: Path) -> str:
    """Return the licence that a folder states: in its card, dataset_info.json or LICENSE file."""
    stated = _in_card(root / "README.md") or _in_info(root / "dataset_info.json")
    if stated:
        return stated[:MAX_TEXT]
    for path in sorted(root.iterdir()):
        if LICENCE_FILES.fullmatch(path.name) and path.is_file():
            lines = (line.strip() for line in _text(path).splitlines())
            return f"{next(filter(None, lines), 'empty')[:MAX_TEXT]} ({path.name})"
    return NOT_STATED


def _in_card(card: Path) -> str:
    """Return the licence in the YAML head of a data set's card, "" where there is none."""
    head = re.match(r"---\n(.*?)\n---", _text(card), re.DOTALL)
    found = head and re.search(r"^licen[cs]e:\s*(\S.*)$", head[1], re.MULTILINE)
    return found[1].strip("\"' ") if found else ""


def _in_info(info: Path) -> str:
    """Return the licence in the dataset_info.json of a Hugging Face data set, "" without one."""
    try:
        stated = json.loads(_text(info)).get("license")
    except (ValueError, AttributeError):
        return ""
    return stated.strip() if isinstance(stated, str) else ""


def _filters(config: Config) -> Iterator[str]:
    """Yield how images were chosen, a line each; of several sources, those of each."""
    data, finetune = config.data, config.finetune
    for number, source in enumerate(data.each_source()):
        where = f"source {number + 1}: " if data.sources else ""
        rules = [*_rules(source, has_prompts=bool(finetune.instance_prompts))]
        if data.sources:
            own = data.sources[number]
            rules += [f"repeated {own.repeats} times"] if own.repeats != 1 else []
            rules += [f"weight {own.weight:g}"] if own.weight else []
        yield from (f"{where}{rule}" for rule in rules)
    yield f"at most {data.max_invalid_fraction:.1%} of the images of a source may be unusable"
    hides = data.bill_of_materials == "hashes"
    if prompts := finetune.instance_prompts:
        shown = f"{len(prompts)} prompts" if hides else " / ".join(prompts)
        yield f"all captions replaced by {shown}"
    if data.num_canaries:
        yield f"besides, {data.num_canaries:,} images of random colours, planted for audits"
    if finetune.class_prompt:
        shown = "the class" if hides else repr(finetune.class_prompt)
        yield (
            f"besides, {finetune.num_class_images:,} images of {shown}, which "
            "the base model made but for those that lay in finetune.class_images_dir before"
        )


def _rules(data: DataConfig, *, has_prompts: bool) -> Iterator[str]:
    yield f"shorter side of at least {data.min_size} pixels, at most {data.max_aspect:g} : 1"
    if not has_prompts:
        named = data.missing_caption.replace("_", " ")
        yield {
            "skip": "images without a caption are skipped",
            "empty": "images without a caption have the empty one",
        }.get(data.missing_caption, f"images without a caption are named by their {named}")
    yield f"{data.heldout_fraction:.1%} held out where no test or validation folder exists"


def _refused(folders: Iterator[Folder]) -> Sequence[str]:
    """Return a line for each reason why images of the folders were not used."""
    counts = Counter[str]()
    for folder in folders:
        for key, group in folder.problems.items():
            if group.reason.severity == "skipped" or key in NOT_USED:
                counts[group.reason.title] += group.count
    return [f"- {title}: {count:,}" for title, count in counts.most_common()] or ["Nothing."]


def _endings(folder: Folder) -> Iterator[str]:
    for part in (folder.split("train"), folder.heldout()):
        for path in iter_py(part.ids):
            yield splitext(path)[1].lower().lstrip(".") or "table row"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
