"""Settings files: those that ship, by name, and checks of YAML text before it is built.

The checks are of size, depth, aliases and duplicate keys. YAML itself allows what no settings file
means: a key given twice, of which one is lost in silence, and a few lines of aliases that stand for
millions of values.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
# In a wheel a folder, in a clone a link to its configs/, which a checkout on Windows may lack.
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
GOALS = {  # of a config that ships, as in its header -> what it is for
    "start": "see it work",
    "lora": "a style, a subject or a few: a small file on top of a model",
    "dreambooth": "one subject from a handful of photographs",
    "textual_inversion": "a new word, and nothing else of the model changes",
    "full": "a domain: all of the model",
    "upscale": "small images made larger: super-resolution",
    "inpaint": "holes filled, objects replaced: inpainting",
    "edit": "images edited by instruction",
    "layout": "images that follow a layout of colors: ControlNet",
    "edges": "images that follow edges: ControlNet",
    "few_steps": "any model in fewer sampling steps",
    "scratch": "a model of your own, from noise",
    "parts": "a VAE or a text encoder for one",
}
RENAMED_CONFIGS = {  # old name of a config that ships -> its name; the old one still works
    "dreambooth_lora": "dreambooth_sd15_8gb",
    "finetune_full": "full_sd15_24gb",
    "finetune_lora": "lora_sd15_8gb",
    "finetune_sd15": "full_sd15_40gb",
    "mini": "scratch_mini",
    "textual_inversion": "textual_inversion_sd15_8gb",
}
MAX_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 20, 20_000


def shipped_configs() -> dict[str, Path]:
    """Return the settings files that ship by their names, such as "demo", sorted."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """Return the settings file at a path, or the one that ships under a name; the path wins.

    An old name, also as configs/OLD.yaml, gives the new file, with one warning. Raises
    FileNotFoundError that gives the nearest name.
    """
    path, shipped = Path(name).expanduser(), shipped_configs()
    if path.is_file():
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    old = path.stem if path.suffix == ".yaml" and path.parent.name == "configs" else str(name)
    if old in RENAMED_CONFIGS:
        _warn_of_old_name(old)
        return shipped[RENAMED_CONFIGS[old]]
    near = get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"those that ship: {', '.join(shipped)}"
    raise FileNotFoundError(f"the config file {path} does not exist; {hint}")


@cache
def _warn_of_old_name(name: str) -> None:
    logger.warning("the config %s is now %s; the old name still works", name, RENAMED_CONFIGS[name])


@dataclass(frozen=True)
class ConfigHeader:
    """What the comment at the top of a config that ships says; goal is a key of GOALS.

    summary: its first line. time: of a run, "not measured" where it is a guess.
    """

    summary: str
    goal: str
    data: str
    memory: str
    time: str
    command: str


def read_header(path: Path) -> ConfigHeader:
    """Read the comment at the top of a config that ships: a summary, then a line for each field."""
    lines = [line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines()[:6]]
    given = {key: value for key, _, value in (line.partition(": ") for line in lines[1:])}
    return ConfigHeader(lines[0], **given)


def read_yaml(path: Path) -> str:
    """Read a settings file. Raises ValueError that names the file, and the line of a fault."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes, expected a settings file")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}") from None
    try:
        root = check_yaml(text, where=str(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no settings, expected lines such as 'output_dir: runs/new'")
    return text


def check_yaml(text: str, *, where: str) -> yaml.Node | None:
    """Parse one document. Raises ValueError for text that must not be built, or YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            mark = event.start_mark
            line = mark.line + 1 if mark else "?"
            raise ValueError(f"{where}, line {line}: more than {MAX_DEPTH} levels in each other")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        for count, node in enumerate(_nodes(root, (), where)):
            if count > MAX_NODES:
                raise ValueError(
                    f"{where}: its aliases stand for more than {MAX_NODES:,} values; write the "
                    "values out"
                )
            if isinstance(node, yaml.MappingNode):
                _check_keys(node, where)
    return root


def _nodes(node: yaml.Node, above: tuple[int, ...], where: str) -> Iterator[yaml.Node]:
    """Yield a node and all nodes below it, those behind aliases each time."""
    if id(node) in above:
        line = node.start_mark.line + 1
        raise ValueError(f"{where}, line {line}: an alias that contains itself")
    yield node
    if isinstance(node, yaml.ScalarNode):
        return
    pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
    for child in (child for pair in pairs for child in pair):
        yield from _nodes(child, (*above, id(node)), where)


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where}, line {line}: a key that is no name of a setting")
        if key.value in seen:
            raise ValueError(
                f"{where}, line {line}: {key.value} is given twice, first in line "
                f"{seen[key.value]}; keep one"
            )
        seen[key.value] = line
