"""The models that ship with the package, by name: small, and there without a network.

Whatever takes a model's folder takes these names too. Does not answer for opening them (models.py).
"""

import os
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {
    "latentdiff-mini": ASSETS / "mini",
    "latentdiff-vae": ASSETS / "vae",
}


def resolve_model(path_or_id: str | os.PathLike[str]) -> Path:
    """Return the folder of a model that ships, for its name; any other path or hub id as it is.

    A folder of your own that is called as one of them is meant by ./NAME. Raises FileNotFoundError
    where the package was installed without the model.
    """
    if (folder := BUNDLED.get(os.fspath(path_or_id))) is None:
        return Path(path_or_id)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path_or_id} is not in this installation of LatentDiff ({folder} is absent); install "
            "the package again, with its assets"
        )
    return folder
