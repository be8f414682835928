"""Each setting of a dataclass as text: its description, type, default and range.

Descriptions are the docstrings under the fields, ranges those declared by validation.py. The help
of the commands and commented settings files are made of them.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

NOUNS = {int: "INT", float: "FLOAT", str: "TEXT"}
OTHER_TOOLS = {  # option of diffusers' scripts, kohya's, OneTrainer or ai-toolkit -> our last name
    "cache_latents": "cache",
    "caption_dropout_rate": "caption_dropout",
    "center_crop": "num_crops",
    "cfg": "guidance_scale",
    "checkpointing_steps": "checkpoint_every_steps",
    "checkpoints_total_limit": "keep_checkpoints",
    "dataset_name": "root",
    "enable_bucket": "buckets",
    "gradient_accumulation_steps": "micro_batch_size",
    "instance_data_dir": "root",
    "instance_prompt": "instance_prompts",
    "keep_tokens": "keep_tags",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "max_train_steps": "max_steps",
    "min_snr_gamma": "snr_gamma",
    "network_alpha": "lora_alpha",
    "network_dim": "lora_rank",
    "network_dropout": "lora_dropout",
    "num_repeats": "repeat_folders",
    "noise_offset": "offset_noise",
    "optimizer_type": "optimizer",
    "placeholder_token": "token",
    "pretrained_model_name_or_path": "pretrained",
    "reg_data_dir": "class_images_dir",
    "resume_from_checkpoint": "resume",
    "sampler": "scheduler",
    "sample_every_n_steps": "every_steps",
    "sample_prompts": "prompts",
    "save_every_n_steps": "checkpoint_every_steps",
    "shuffle_caption": "shuffle_tags",
    "steps": "num_inference_steps",
    "text_encoder_lr": "text_learning_rate",
    "train_batch_size": "batch_size",
    "train_data_dir": "root",
    "use_8bit_adam": "optimizer",
    "use_ema": "ema",
    "v_parameterization": "prediction_type",
    "validation_prompts": "prompts",
    "with_prior_preservation": "class_prompt",
    "xformers": "attention",
}


def names_meant(word: str, names: Iterable[str]) -> list[str]:
    """Return the settings that have a word as last name, here or in another tool."""
    last = word.rpartition(".")[2]
    wanted = (last, OTHER_TOOLS.get(last))
    return [name for name in names if name.rpartition(".")[2] in wanted]


@dataclass(frozen=True)
class Setting:
    """A setting.

    name: dotted, such as "train.seed". form: of its value, such as "INT" or "{true,false}".
    default: its text; None where a value is required. expected: its range, or "".
    section: the summary of its dataclass.
    """

    name: str
    form: str
    description: str
    default: str | None
    expected: str
    section: str


@cache
def settings_of(kind: Any, prefix: str = "") -> tuple[Setting, ...]:
    """Return every setting of a dataclass and of those in it, in order."""
    return tuple(_settings(kind, prefix))


def _settings(kind: Any, prefix: str) -> Iterator[Setting]:
    descriptions, hints = _descriptions(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings_of(hints[field.name], f"{prefix}{field.name}.")
            continue
        yield Setting(
            name=prefix + field.name,
            form=form_of(hints[field.name]),
            description=descriptions.get(field.name, ""),
            default=_default(field),
            expected=field.metadata.get("expected", ""),
            section=section_summary(kind),
        )


def section_summary(kind: Any) -> str:
    """Return the first paragraph of a dataclass's docstring, in one line."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _descriptions(kind: Any) -> dict[str, str]:
    """Return the docstrings under the fields of a class and its bases, each in one line."""
    found = {}
    owners: list[Any] = [one for one in reversed(kind.__mro__) if dataclasses.is_dataclass(one)]
    for owner in owners:
        [tree] = ast.parse(inspect.getsource(owner)).body
        for node, below in pairwise(getattr(tree, "body", [])):
            match node, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def _default(field: Any) -> str | None:
    if field.default_factory is not MISSING:
        return value_text(field.default_factory())
    return None if field.default is MISSING else value_text(field.default)


def form_of(annotation: Any) -> str:
    """Return the form of a type's values, such as "INT", "{true,false,auto}" or "[FLOAT,...]"."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "{true,false}"
    if origin is Literal:
        return "{" + ",".join(str(part) or "empty" for part in parts) + "}"
    if origin in (Union, types.UnionType):
        forms = [form_of(part) for part in parts if part is not type(None)]
        if all(form.startswith("{") for form in forms):
            return "{" + ",".join(form.strip("{}") for form in forms) + "}"
        return " or ".join(forms)
    if origin in (list, tuple):
        is_open = origin is list or parts[-1] is Ellipsis
        return f"[{form_of(parts[0])},...]" if is_open else f"[{','.join(map(form_of, parts))}]"
    return NOUNS.get(annotation) or _entry_form(annotation)


def _entry_form(annotation: Any) -> str:
    """Return the form of a dataclass in a list, by its first field: "{root: TEXT, ...}"."""
    if not dataclasses.is_dataclass(annotation):
        return "VALUE"
    first = dataclasses.fields(annotation)[0].name
    return f"{{{first}: {form_of(get_type_hints(annotation)[first])}, ...}}"


def value_text(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line; empty text as "empty"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(value_text(part) for part in value)}]"
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e6 else str(value)
    return "null" if value is None else str(value) or "empty"


def plain_value(value: Any) -> Any:
    """Return a setting, or a dataclass of them, as the values of YAML; a list's without nulls."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain_value(getattr(value, name)) for name in names}
    if not isinstance(value, tuple):
        return value
    return [_without_nulls(plain_value(entry)) for entry in value]


def _without_nulls(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {name: value for name, value in entry.items() if value is not None}


def commented_yaml(config: Any, kind: Any) -> str:
    """Return a YAML text that reads back to an equal config, each setting below its description.

    config: of the dataclass `kind`, or anything with the same attributes.
    """
    settings = {one.name: one for one in settings_of(kind)}
    return "\n".join(_commented(config, kind, "", settings)) + "\n"


def _commented(config: Any, kind: Any, prefix: str, settings: dict[str, Setting]) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from (
                "",
                *_comment(section_summary(type(value)), indent),
                f"{indent}{field.name}:",
            )
            inner = f"{prefix}{field.name}."
            yield from _commented(value, type(value), inner, settings)
            continue
        one = settings[prefix + field.name]
        notes = [one.form, f"default {one.default}", one.expected]
        yield from _comment(f"{one.description} ({'; '.join(filter(None, notes))})", indent)
        plain = [plain_value(value)]
        text = yaml.safe_dump(
            plain, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False
        )
        yield f"{indent}{field.name}: {text.strip()[1:-1]}"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=start, **options)
