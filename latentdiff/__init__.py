"""Text-to-image latent diffusion that a person can read, run and trust.

Names are loaded when first used, so `import latentdiff` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.config.io import load_config
    from latentdiff.config.text_to_image import Config
    from latentdiff.pipeline import LatentDiffPipeline
    from latentdiff.pipeline.png_metadata import read_settings

__version__ = "0.1.0"
__all__ = ["Config", "LatentDiffPipeline", "__version__", "load_config", "read_settings"]

_HOMES = {
    "Config": "latentdiff.config.text_to_image",
    "load_config": "latentdiff.config.io",
    "LatentDiffPipeline": "latentdiff.pipeline",
    "read_settings": "latentdiff.pipeline.png_metadata",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
