"""Check that weight files and modules hold every parameter, in the right shape; hash and load them.

Libraries only warn when a file lacks a weight, and leave that parameter empty or random. Nothing
is unpickled here: only safetensors files are read.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Shape = tuple[int, ...]
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
SAFETENSORS_ERRORS = (SafetensorError, OSError, KeyError, TypeError, AttributeError)
OTHER_FORMATS = (  # by their first bytes
    (
        rb"version https://git-lfs",
        "a Git LFS pointer: run git lfs pull, or download the file itself",
    ),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, of a download that failed: download it again"),
    (rb"PK\x03\x04|\x80[\x02-\x05][^\0]", "a pickle, which can run any code: convert it first"),
    (rb"GGUF", "in GGUF format: take the .safetensors file"),
)
WEIGHT_FILE = re.compile(
    r"(diffusion_pytorch_model|model)(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?\.safetensors"
)


def check_weights(module: nn.Module, name: str) -> None:
    """Raise ValueError when a parameter or buffer of `module` holds no data (is on the meta
    device).
    """
    empty = [
        key
        for tensors in (module.named_parameters(), module.named_buffers())
        for key, tensor in tensors
        if tensor.is_meta
    ]
    refuse_bad_weights(name, missing=empty)


def weights_hash(module: nn.Module) -> str:
    """Return the sha256 (hex) of a module's state: names, dtypes, shapes and bytes, in order of
    name.

    Independent of device, memory layout and the order of registration; one tensor at a time is
    copied to the CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def refuse_bad_weights(
    name: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Shape, Shape]] = (),
) -> None:
    """Raise ValueError naming the bad weights; mismatched holds (parameter, shape in the file,
    expected shape).
    """
    problems = []
    if missing := sorted(missing):
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := sorted(unexpected):
        problems.append(f"not part of the model: {_listed(unexpected)}")
    if mismatched := sorted(mismatched):
        shapes = [
            f"{key} is {tuple(found)}, expected {tuple(wanted)}"
            for key, found, wanted in mismatched
        ]
        problems.append(f"of another shape: {_listed(shapes)}")
    if problems:
        raise ValueError(
            f"the weights of {name} do not fit its config: {'; '.join(problems)}. "
            "Take weights and config of one and the same model"
        )


def weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    """Return a component's safetensors files (several when sharded) of one variant, None being
    the plain one.

    FileNotFoundError when there are none, ValueError when a shard is missing or when there are
    pickles only: those are never opened.
    """
    _check_shards(folder, variant)
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := WEIGHT_FILE.fullmatch(path.name):
            found.setdefault(match["variant"], []).append(path)
    if variant in found:
        return found[variant]
    if found:
        raise ValueError(
            f"{folder} has no weights of variant {variant}, expected one of "
            f"{sorted(map(str, found))}"
        )
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds {_listed(pickles)} only, expected safetensors: pickle files can run "
            "code and are not opened; convert them to safetensors first"
        )
    raise FileNotFoundError(
        f"{folder} holds no weights, expected diffusion_pytorch_model.safetensors or "
        "model.safetensors"
    )


def weight_patterns(variant: str | None) -> list[str]:
    """Return patterns of the names of a diffusers model's safetensors files of one variant."""
    name = "diffusion_pytorch_model"
    if variant is None:
        plain = f"{name}.safetensors", f"{name}-[0-9]*-of-*[0-9].safetensors"
        return [*plain, f"{name}.safetensors.index.json"]
    return [f"{name}*.{variant}*.safetensors", f"{name}.safetensors.index.{variant}.json"]


def _check_shards(folder: Path, variant: str | None) -> None:
    """Raise ValueError naming the shard that an index names and the folder lacks, or the index."""
    ending = f".safetensors.index.{variant}.json" if variant else ".safetensors.index.json"
    for index in sorted(folder.glob(f"*{ending}")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is no readable index of shards ({error!r}); copy or download it again"
            ) from error
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise ValueError(
                f"{folder} lacks {_listed(missing)}, which {index.name} names; copy or download "
                "them again"
            )
        return
    for path in sorted(folder.glob("*-of-*.safetensors")):
        match = WEIGHT_FILE.fullmatch(path.name)
        if match and match["variant"] == variant:
            raise ValueError(
                f"{path} is a shard, and {folder} has no {match[1]}{ending} to name the others; "
                "copy or download the folder again"
            )


def stored_shapes(files: Iterable[Path]) -> dict[str, Shape]:
    """Return the shape of every tensor in safetensors files, from their headers alone."""
    shapes: dict[str, Shape] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        except SAFETENSORS_ERRORS as error:
            raise ValueError(damage(path, error)) from error
    return shapes


def damage(path: Path, error: Exception) -> str:
    """Return in a sentence what is wrong with a file that does not open as safetensors."""
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read: {error.strerror}"
    with path.open("rb") as file:
        start = file.read(64)
    for magic, kind in OTHER_FORMATS:
        if re.match(magic, start, re.IGNORECASE):
            return f"{path} is not a safetensors file but {kind}"
    reason = str(error) if start else "it is empty"
    return f"{path} is not a whole safetensors file ({reason}); copy or download it again"


def mismatched_shapes(
    module: nn.Module, stored: Mapping[str, Shape]
) -> list[tuple[str, Shape, Shape]]:
    """Return (name, stored shape, expected shape) of the tensors that both sides have, but
    differently.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return [
        (name, stored[name], shape)
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]


def _listed(names: list[str], *, limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def load_into_meta(empty: Any, weights: Mapping[str, Tensor], *, like: nn.Module) -> Any:
    """Return `empty`, built on the meta device, with these weights, which it then shares.

    like: the module of the weights; buffers that no state holds, such as position ids, are its.
    """
    empty.load_state_dict({name: w.detach() for name, w in weights.items()}, assign=True)
    for name, buffer in like.named_buffers():
        path, _, key = name.rpartition(".")
        empty.get_submodule(path).register_buffer(key, buffer, persistent=False)
    return empty.requires_grad_(False).eval()


def load_diffusers_model(
    cls: Any, folder: Path, where: str, *, torch_dtype: torch.dtype | None, variant: str | None
) -> Any:
    """Load a model of a diffusers class from its folder, ready for evaluation; safetensors only.

    where: how messages name it. ValueError for weights that are missing, unexpected or of another
    shape, which are compared before any is loaded.
    """
    with torch.device("meta"):
        skeleton = cls.from_config(cls.load_config(folder))
    stored = stored_shapes(weight_files(folder, variant=variant))
    refuse_bad_weights(where, mismatched=mismatched_shapes(skeleton, stored))
    module, info = cls.from_pretrained(
        folder,
        torch_dtype=torch_dtype,
        variant=variant,
        use_safetensors=True,
        output_loading_info=True,
    )
    check_loaded(module, info, where)
    return module.eval()


def check_loaded(module: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for what a library's loading info says of a module's weights."""
    refuse_bad_weights(
        where,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        mismatched=info["mismatched_keys"],
    )
    check_weights(module, where)
