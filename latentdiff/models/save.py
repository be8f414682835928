"""Write components so that others read them: transformers 4 and 5, and who must not see our paths.

Answers for: the names of CLIP's text weights, which begin with "text_model." in Stable Diffusion's
format; both forms of a tokenizer, tokenizer.json and vocab.json with merges.txt, without traces of
its last call; one default dtype, float32, for components of both libraries; and configs that do not
say where a component was loaded from. Does not answer for whole pipelines (pipeline/files/).
"""

import json
from pathlib import Path
from typing import Any

from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from latentdiff.atomic import write_text
from latentdiff.models.compatibility import read_json
from latentdiff.models.open_clip import clip_text_model
from latentdiff.models.weights import stored_shapes, weight_files

TEXT_PREFIX = "text_model."  # of a CLIPTextModel's weights in files
ORIGIN = "_name_or_path"  # the libraries' note of where a component was loaded from
# what a tokenizer's config gains by being loaded, and by being called before it was saved
TRACES = (
    *("is_local", "local_files_only", "max_length", "stride", "truncation_strategy"),
    *("pad_to_multiple_of", "pad_token_type_id"),
)
SIDES = ("truncation_side", "padding_side")
CONFIGS = ("config.json", "model_index.json", "scheduler_config.json")


def save_component(component: Any, folder: Path) -> None:
    """Write a model or a tokenizer of diffusers or transformers to a folder."""
    component.save_pretrained(folder)
    complete_component(component, folder)


def complete_component(
    component: Any,
    folder: Path,
    *,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Correct what a component's own save_pretrained, with the same arguments, left in a folder."""
    if isinstance(component, CLIPTokenizer):
        _remove_traces(folder)
        _write_older_form(component, folder)
    if isinstance(component, CLIPTextModel) and not _has_prefix(folder, variant=variant):
        for path in weight_files(folder, variant=variant):
            path.unlink()
        named = clip_text_model(component.config, component.state_dict())
        named.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size or "50GB")
    if isinstance(component, PreTrainedModel):
        _open_as_float32(folder)
    remove_origin(folder)


def remove_origin(folder: Path) -> None:
    """Remove the note of where a component was loaded from, which may be a path of this machine."""
    for name in CONFIGS:
        path = folder / name
        if path.is_file() and (entries := read_json(path)).pop(ORIGIN, None) is not None:
            write_text(path, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def _open_as_float32(folder: Path) -> None:
    """Make float32 the dtype that transformers opens a stored component in by default.

    That is how diffusers opens its own components, whatever is stored.
    """
    path = folder / "config.json"
    _write_json(path, read_json(path) | {"dtype": "float32"})


def _write_older_form(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add the files that the tokenizer of transformers 4 and earlier reads next to tokenizer.json.

    Words added to the vocabulary are in a file of their own, as these versions expect.
    """
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    _write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)
    known = tokenizer.vocab_size
    added = {word: index for word, index in tokenizer.get_added_vocab().items() if index >= known}
    if added:
        _write_json(folder / "added_tokens.json", added)


def _remove_traces(folder: Path) -> None:
    """Make a saved tokenizer depend on its vocabulary and length alone, whatever it did before.

    Every call leaves its padding and truncation in tokenizer.json, and loading that file leaves
    them in the config; a call of the tokenizer sets both anew.
    """
    vocabulary, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    _write_json(vocabulary, read_json(vocabulary) | {"truncation": None, "padding": None})
    kept = {name: value for name, value in read_json(config).items() if name not in TRACES}
    for side in SIDES:
        if kept.get(side) == "right":  # the default
            del kept[side]
    _write_json(config, kept)


def _has_prefix(folder: Path, *, variant: str | None) -> bool:
    names = stored_shapes(weight_files(folder, variant=variant))
    return all(name.startswith(TEXT_PREFIX) for name in names)


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    write_text(path, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
