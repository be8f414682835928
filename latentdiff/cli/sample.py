"""Commands that make images: from prompts on the command line, or in a web UI."""

import json
import sys
from collections.abc import Sequence
from functools import partial

from jsonargparse import ArgumentError, ArgumentParser

from latentdiff.cli.command import add_model, quieten_libraries, take_options
from latentdiff.config.options import SampleOptions, WebUIOptions


def sample_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Make images from prompts: a labelled sheet, or a folder of images that can be resumed."""
    add_model(parser)
    parser.add_argument("prompts", type=str, nargs="*", help="one or several, each in quotes")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each file")
    parser.add_class_arguments(SampleOptions)
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        if not str(error).strip().endswith("are required: out"):
            raise
        raise ValueError(
            "no file or folder for the images is given; add --out sheet.png"
        ) from error
    quieten_libraries("sampling.sample")
    from latentdiff.sampling.sample import options_from_image, sample

    if (source := values["settings_from"]) is not None:
        given = {f"has_{name}": values[name] is not None for name in ("image", "condition")}
        prompts, defaults = options_from_image(source, **given)
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
    """Serve a web UI that makes images and shows training runs, at http://127.0.0.1:7860.

    Ctrl-C ends it. Without a model it opens latentdiff-mini.
    """
    add_model(parser, "models", nargs="*")
    parser.add_class_arguments(WebUIOptions)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries("pipeline.pipeline")
    try:
        from latentdiff.app.web_ui import serve

        serve(
            values["models"],
            take_options(WebUIOptions, values),
            on_ready=lambda url: print(f"the page is at {url}; Ctrl-C ends it", flush=True),
        )
    except ImportError as error:
        raise ValueError(f'{error}; pip install "latentdiff[ui]"') from error
    except KeyboardInterrupt:
        pass  # the usual way to stop a server
    return 0
