"""Commands that train text-to-image models, autoencoders and CLIPs, and list their configs."""

import argparse
from collections.abc import Sequence

import yaml
from jsonargparse import ArgumentParser

from latentdiff.cli.command import log_to_terminal, quieten_libraries, take_options
from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import parse_settings
from latentdiff.config.options import DistillOptions
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.config.yaml_file import CONFIGS, GOALS, find_config, read_header, shipped_configs
from latentdiff.program import program


def train_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train or fine-tune a text-to-image latent diffusion model on a captioned folder.

    Example: latentdiff train --config lora_mini --data.root=photos
    """
    config, _ = parse_settings(parser, Config, arguments)
    if not arguments:
        raise ValueError(
            f"no settings are given; begin with a preset: {program()} train --config lora_mini "
            f"--data.root=photos; {program()} configs lists them"
        )
    log_to_terminal()
    _check_folders(config)
    quieten_libraries("training.text_to_image.train_t2i")
    from latentdiff.training.text_to_image.train_t2i import train

    return train(config)


def _check_folders(config: Config) -> None:
    """Raise for a data folder that is not there, before libraries are loaded for seconds."""
    from latentdiff.data.folder.folder import checked_root
    from latentdiff.data.image_tables.hub_dataset import parse_hub_id

    for source in config.data.each_source():
        if source.root and parse_hub_id(source.root) is None:
            checked_root(source.root)


def train_vae_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train an AutoencoderKL on folders of images, or a tiny VAE that decodes a model's latents.

    Reports its PSNR on held-out images.
    """
    config, _ = parse_settings(parser, VaeConfig, arguments)
    log_to_terminal()
    quieten_libraries("training.vae.train_vae")
    from latentdiff.training.vae.train_vae import train_vae

    return train_vae(config)


def train_clip_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train a small CLIP on captioned folders and report its recall on held-out pairs."""
    config, _ = parse_settings(parser, ClipConfig, arguments)
    log_to_terminal()
    quieten_libraries("training.clip.train_clip")
    from latentdiff.training.clip.train_clip import train_clip

    return train_clip(config)


def distill_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Distil a model into one that samples in 4, 2 or 1 steps, of one pass each.

    Type: latentdiff distill MODEL --data DIR --steps 4 --out OUT

    A student first learns the guided prediction, then one step for two of its teacher's, stage by
    stage; each stage is measured against the model. Exit code 1: a stage is worse than the margins
    allow, and the one before it is kept. With --method lcm_lora a LoRA learns it instead, for other
    programs too. Without --config the settings are those of distill or distill_lcm_lora.
    """
    parser.add_argument("teacher", type=str, help="the model: its folder, a run's, or a hub id")
    parser.add_class_arguments(DistillOptions)
    given = [*arguments]
    is_lora = _is_lcm_lora(given)
    if not any(one.partition("=")[0] == "--config" for one in given):
        preset = "distill_lcm_lora" if is_lora else "distill"
        given = ["--config", preset, *given]  # first, so that options win
    if arguments and not arguments[0].startswith("-"):
        method = "lcm_lora" if is_lora else "guided"
        given += [f"--model.pretrained={arguments[0]}", f"--distill.method={method}"]
        given += ["--method=lcm_lora"] if is_lora else []
    config, options = parse_settings(parser, Config, given)
    log_to_terminal()
    quieten_libraries("training.distill.stages")
    from latentdiff.training.distill.stages import distill

    return distill(config, take_options(DistillOptions, options))


def _is_lcm_lora(arguments: Sequence[str]) -> bool:
    """Return whether --method asks for an LCM-LoRA or, without it, the config that is named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", nargs="?")
    parser.add_argument("--config", nargs="?")
    given, _ = parser.parse_known_args([*arguments])
    if given.method or not given.config:
        return bool(given.method == "lcm_lora")
    try:
        settings = yaml.safe_load(find_config(given.config).read_text(encoding="utf-8"))
        return bool(settings["distill"]["method"] == "lcm_lora")
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False  # it names no method, or is refused when it is parsed


def configs_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """List the configs that --config takes, by goal, with memory and time; or print one of them.

    A config is a file of settings: print one to read it, or write it to a file and change that.
    """
    parser.add_argument("name", type=str, nargs="?", help="a config, to print its file")
    name = parser.parse_args(arguments).name
    print(config_table() if name is None else find_config(name).read_text(encoding="utf-8"), end="")
    return 0


def config_table() -> str:
    """Return the configs that ship, a line each under their goals."""
    headers = {name: read_header(path) for name, path in shipped_configs().items()}
    width, lines = max(map(len, headers)), []
    for goal, meaning in GOALS.items():
        lines += ["", f"{goal}: {meaning}"]
        for name, header in headers.items():
            if header.goal == goal:
                lines.append(f"  {name:{width}}  {header.memory}; {header.time}")
                lines.append(f"  {'':{width}}  {header.data}")
    lines += [
        "",
        f"Start:  {program()} train --config NAME --data.root=DIR",
        f"Read:   {program()} configs NAME     (what it does, and its own command)",
        f"Files:  {CONFIGS.resolve()}",
    ]
    return "\n".join(lines[1:]) + "\n"
