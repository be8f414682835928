"""What a path says that is meant as a model: a training run, a file, or a name that is misspelt.

Commands take a run for the model that it exported (`model_of_run`), and the name of a model that
ships for its folder (`resolve_model`). Configs are read without loading PyTorch. Does not answer
for: opening a folder's weights (components.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from latentdiff.models.compatibility import CONTROLNET, read_configs, read_json
from latentdiff.program import program

INDEX = "model_index.json"
OFFLINE = (  # in the messages of huggingface_hub and diffusers where there is no network
    *("not fully cached", "outgoing traffic has been disabled", "ConnectError"),
    *("couldn't connect", "Connection error", "offline mode"),
)
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {
    "latentdiff-mini": ASSETS / "mini",
    "latentdiff-vae": ASSETS / "vae",
    "latentdiff-vae-4ch": ASSETS / "vae_4ch",
}
EXPORT = "pipeline"  # folder of a run's exported model
INFO_FILE = "latentdiff.json"  # of how a model was trained


def resolve_model(path_or_id: str | os.PathLike[str]) -> Path:
    """Return the folder of a model that ships, for its name, or of the model that a training run
    exported, for the run's; any other path or hub id as it is.

    Name a folder of your own that has the name of such a model as ./NAME. Raises FileNotFoundError
    where the package was installed without the model.
    """
    if (folder := BUNDLED.get(os.fspath(path_or_id))) is None:
        return Path(model_of_run(Path(path_or_id).expanduser()))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path_or_id} is not in this installation of LatentDiff ({folder} is absent); install "
            "the package again, with its assets"
        )
    return folder


def read_model_configs(path_or_id: str | Path) -> dict[str, dict[str, Any]]:
    """Read the configs of a model's components; of a hub id they alone are fetched."""
    folder = resolve_model(path_or_id)
    refuse_wrong_path(folder, known=BUNDLED)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        patterns = ["*/*config.json"]
        folder = fetched(
            lambda: snapshot_download(str(path_or_id), allow_patterns=patterns), path_or_id
        )
    return read_configs(folder)


def fetched(download: Callable[[], str], path_or_id: str | Path) -> Path:
    """Return the folder that a download gives; FileNotFoundError says what went wrong."""
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(download())
    except (OSError, HFValidationError) as error:
        raise not_fetched(path_or_id, error) from error


def model_of_run(path_or_id: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the folder of the model that a training run exported; any other path as it is."""
    folder = Path(path_or_id).expanduser()
    exported = folder / EXPORT
    is_run = (exported / INDEX).is_file() and not (folder / INDEX).exists()
    return exported if is_run else path_or_id


def refuse_wrong_path(path_or_id: str | os.PathLike[str], *, known: Iterable[str]) -> None:
    """Raise FileNotFoundError or ValueError where a path here, or a name, can be no model.

    known: names of models that ship. A folder with a model_index.json passes, and so does what may
    be the id of a model on the hub.
    """
    name = os.path.expanduser(path_or_id)
    path = Path(name)
    if not name.strip():
        raise ValueError("the model's name is empty; pass a folder, a hub id or a name that ships")
    if path.is_dir():
        _refuse_folder(path)
    elif path.exists():
        _refuse_file(path)
    elif near := get_close_matches(name, known, n=1, cutoff=0.75):
        raise FileNotFoundError(f"{name} is no folder here; did you mean {near[0]}?")
    elif is_local(name):
        hint = near_sibling(path) or "check the spelling"
        raise FileNotFoundError(f"there is no folder {name}; {hint}")


def is_local(name: str) -> bool:
    """Return whether a name can only be a path: no id of the hub, OWNER/NAME, looks like it."""
    has_suffix = name.lower().endswith((".safetensors", ".ckpt", ".bin", ".pt", ".pth"))
    return has_suffix or name[:1] in ("", ".", "~", os.sep) or name.count("/") > 1


def near_sibling(path: Path) -> str:
    """Return "did you mean FOLDER?" for a run or a model next to a path; empty where none is near.

    It may name the folder although the path is the id of a model on the hub: ask there first.
    """
    inside = path.parent.glob(f"*/{INDEX}"), path.parent.glob(f"*/{EXPORT}/{INDEX}")
    names = [found.relative_to(path.parent).parts[0] for paths in inside for found in paths]
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean {path.with_name(near[0])}?" if near else ""


def not_fetched(path_or_id: str | os.PathLike[str], error: Exception) -> FileNotFoundError:
    """Return the error for a name that is no folder here and that the hub did not give."""
    name = os.fspath(path_or_id)
    if hint := near_sibling(Path(name).expanduser()):
        return FileNotFoundError(f"there is no folder {name}; {hint}")
    return FileNotFoundError(
        f"{name!r} is no folder here and could not be fetched from the hub: "
        f"{hub_reason(error)}; check the spelling, or the network"
    )


def hub_reason(error: Exception) -> str:
    """Return why the hub gave nothing, in one line: it was not reached, or what it answered."""
    if any(words in str(error) for words in OFFLINE):
        return "the hub cannot be reached, and nothing was fetched before"
    return str(error).strip().partition("\n")[0]


def controlnet_folder(path: Path) -> Path | None:
    """Return the folder of a ControlNet, for it or for that of its training run; None of others."""
    for folder in (path, path / CONTROLNET):
        if (config := folder / "config.json").is_file():
            return folder if read_json(config).get("_class_name") == "ControlNetModel" else None
    return None


def _refuse_folder(path: Path) -> None:
    if (path / INDEX).is_file():
        return
    if (folder := controlnet_folder(path)) is not None:
        info = folder / INFO_FILE
        base = read_json(info).get("base_model") if info.is_file() else None
        raise FileNotFoundError(
            f"{path} holds a ControlNet, which is loaded next to its base model: {program()} "
            f"sample {base or 'BASE'} PROMPT --controlnet {path} --condition IMAGE"
        )
    if (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{path} is the folder of a training run without {EXPORT}/, which is written when the "
            "run ends; run the same command again to its end"
        )
    raise FileNotFoundError(
        f"{path} has neither {INDEX} nor {EXPORT}/{INDEX}, expected a model's folder in Stable "
        "Diffusion's format or a run's folder"
    )


def _refuse_file(path: Path) -> None:
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is a file, expected a folder in Stable Diffusion's format")
    from latentdiff.models.file_kind import describe
    from latentdiff.models.weights import stored_shapes

    raise ValueError(f"{path} is a file, not a folder: it holds {describe(stored_shapes([path]))}")
