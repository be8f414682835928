"""The size of images that a config leaves to the model to fine-tune.

`latentdiff inspect` asks for it before anything heavy is loaded: PyTorch is not imported here.
"""

from dataclasses import replace

from latentdiff.config.data import FROM_SCRATCH_PX
from latentdiff.config.text_to_image import Config
from latentdiff.models.compatibility import latent_factor, sample_size_px
from latentdiff.models.model_path import read_model_configs


def with_resolution(config: Config) -> Config:
    """Return the config with the size of images that it leaves to the model to fine-tune.

    Reads config files only. FileNotFoundError or ValueError for a model that cannot be found.
    """
    if config.data.resolution is not None:
        return config
    size = FROM_SCRATCH_PX
    if config.model.pretrained:
        configs = read_model_configs(config.model.pretrained)
        if "unet" in configs and "vae" in configs:
            size = min(sample_size_px(configs["unet"], factor=latent_factor(configs["vae"])))
    return replace(config, data=replace(config.data, resolution=size))
