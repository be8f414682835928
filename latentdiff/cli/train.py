"""Commands that train text-to-image models, autoencoders and CLIPs, and list their configs."""

import logging
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from latentdiff.cli.command import quieten_libraries
from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import parse_settings
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.config.yaml_file import CONFIGS, first_line, shipped_configs


def train_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train or fine-tune a text-to-image latent diffusion model on a captioned folder."""
    config, _ = parse_settings(parser, Config, arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    quieten_libraries()
    from latentdiff.training.text_to_image.train_t2i import train

    return train(config)


def train_vae_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train an AutoencoderKL on folders of images and report its PSNR on held-out ones."""
    config, _ = parse_settings(parser, VaeConfig, arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    quieten_libraries()
    from latentdiff.training.vae.train_vae import train_vae

    return train_vae(config)


def train_clip_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train a small CLIP on captioned folders and report its recall on held-out pairs."""
    config, _ = parse_settings(parser, ClipConfig, arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    quieten_libraries()
    from latentdiff.training.clip.train_clip import train_clip

    return train_clip(config)


def configs_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """List the configs that ship, each of which --config takes by its name."""
    parser.parse_args(arguments)
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name:{width}}  {first_line(path)}")
    print(f"\nThe files, to read or to copy, are in {CONFIGS.resolve()}")
    return 0
