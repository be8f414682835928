"""Commands that make images: from prompts on the command line, or in a web UI."""

import json
import sys
from collections.abc import Sequence
from functools import partial

from jsonargparse import ArgumentParser

from latentdiff.cli.command import quieten_libraries, take_options
from latentdiff.config.sampling import SampleOptions, WebUIOptions

RENAMED = {"--sampler": "--scheduler"}  # old name of an option -> its name; the old one still works


def sample_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Make images from prompts: a labelled sheet, or a folder of images that can be resumed."""
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("prompts", type=str, nargs="*", help="one or several, each in quotes")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each file")
    parser.add_class_arguments(SampleOptions)
    arguments = _current_names(arguments)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries()
    from latentdiff.sampling.sample import options_from_image, sample

    if (source := values["settings_from"]) is not None:
        prompts, defaults = options_from_image(source, has_image=values["image"] is not None)
        parser.set_defaults(defaults)
        values = parser.parse_args(arguments).as_dict()
        if not values["prompts"] and values["prompt_file"] is None:
            values["prompts"] = prompts
    log = partial(print, file=sys.stderr, flush=True)
    options = take_options(SampleOptions, values)
    for record in sample(values["model"], values["prompts"], options, log=log):
        line = f"wrote {record['kind']} {record['path']}"
        print(json.dumps(record) if values["json"] else line, flush=True)
    return 0


def app_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Serve a web UI that makes images with a model, at http://127.0.0.1:7860, until Ctrl-C."""
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_class_arguments(WebUIOptions)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries()
    from latentdiff.app.web_ui import serve

    try:
        serve(values["model"], take_options(WebUIOptions, values))
    except ImportError as error:
        raise ValueError(f'{error}; pip install "latentdiff[ui]"') from error
    except KeyboardInterrupt:
        pass  # the usual way to stop a server
    return 0


def _current_names(arguments: Sequence[str]) -> list[str]:
    """Rename options that are given under their old names."""
    parts = [argument.partition("=") for argument in arguments]
    return ["".join((RENAMED.get(option, option), *rest)) for option, *rest in parts]
