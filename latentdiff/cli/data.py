"""Commands on captioned folders: inspect one, cache its encodings, merge several."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from latentdiff.cli.command import quieten_libraries
from latentdiff.config.io import load_config, parse_settings
from latentdiff.config.text_to_image import Config

if TYPE_CHECKING:
    from latentdiff.data.folder.folder import Folder
    from latentdiff.data.inspection.inspect import DataReport


def inspect_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Report a captioned folder's content and its problems; exit code 1 where it is not usable."""
    _add_inspect_options(parser)
    config, options = parse_settings(parser, Config, arguments)
    if options["tokenizer"] or options["vae"]:  # nothing else here loads PyTorch
        quieten_libraries()
    report, folder = _inspect(config, options)
    from latentdiff.data.inspection.html_report import write_report_html
    from latentdiff.data.inspection.text_report import report_as_text

    print(json.dumps(report.to_json(), indent=2) if options["json"] else report_as_text(report))
    if options["html"]:
        write_report_html(report, folder, path=options["html"])
        print(f"wrote {options['html']}", file=sys.stderr if options["json"] else sys.stdout)
    return 0 if report.is_usable else 1


def _add_inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "root",
        type=expanduser,
        nargs="?",
        metavar="FOLDER",
        help="folder or Hugging Face data set to report on; by default data.root or data.sources",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", type=expanduser, help="also write the report to this file")
    parser.add_argument("--full", action="store_true", help="decode every image, known or not")
    parser.add_argument("--quick", action="store_true", help="skip the search for near-duplicates")
    parser.add_argument(
        "--tokenizer",
        type=expanduser,
        default="",
        help="folder of a tokenizer, to count the tokens of captions",
    )
    parser.add_argument(
        "--vae",
        type=expanduser,
        default="",
        help="folder of a VAE, to time its encoder and estimate the caching",
    )


def _inspect(config: Config, options: dict[str, Any]) -> tuple[DataReport, Folder]:
    """Return the report on the data of a config and of the command's options, and the data."""
    from latentdiff.data.inspection import inspect
    from latentdiff.training.inputs.sources import join_sources, read_sources, source_weights

    names_size = bool(config.model.pretrained) or config.data.resolution is not None
    if config.model.pretrained:  # its size is that of data.resolution
        from latentdiff.training.text_to_image.resolution import with_resolution

        config = with_resolution(config)
    data = config.data
    if options["root"]:
        data = replace(data, root=options["root"], sources=())
    needs_captions = not config.finetune.instance_prompts  # which stand for captions
    folders = read_sources(
        data,
        condition=config.condition_files,
        inpaint_masks=config.condition.reads_mask_files,
        needs_captions=needs_captions,
        full=options["full"],
        progress=inspect.progress_bar(),
    )
    folder = join_sources(data, folders)
    settings = {**vars(config.train), **vars(data), "resolution": data.side_px, **options}
    settings["conditions_may_equal"] = config.condition.kind == "upscale"
    settings |= {"sources": folders if data.sources else None, "weights": source_weights(data)}
    settings = inspect.matching_settings(settings, inspect.inspect_folder)
    report = inspect.inspect_folder(folder, **settings, progress=inspect.progress_bar())
    if not needs_captions:
        report = inspect.without_captions(report)
    if not names_size:
        note = inspect.default_sizes_note(
            resolution=data.side_px, batch_size=config.train.batch_size
        )
        report = replace(report, sizes_note=note)
    return report, folder


def cache_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Build, verify or prune the cache of a config's encoded images and captions.

    verify: exit code 1 where cached latents differ from the VAE's.
    """
    actions = ("build", "verify", "prune")
    parser.add_argument(
        "action", nargs="?", choices=actions, default="build", help="what to do with the cache"
    )
    parser.add_argument(
        "--also",
        type=expanduser,
        nargs="+",
        default=[],
        help="prune: other configs in use, whose cached files are kept",
    )
    parser.add_argument("--delete", action="store_true", help="prune: delete, not only list")
    config, options = parse_settings(parser, Config, arguments)
    quieten_libraries()
    from latentdiff.training.inputs import cache_commands

    if options["action"] == "build":
        from latentdiff.training.distributed import start_accelerator

        accelerator = start_accelerator(config)
        for built in cache_commands.build_caches(config, accelerator=accelerator):
            print(built, flush=True)
    elif options["action"] == "verify":
        is_valid = True
        for verified in cache_commands.verify_caches(config):
            print(verified, flush=True)
            is_valid &= verified.is_valid
        return 0 if is_valid else 1
    else:
        configs = [config, *map(load_config, options["also"])]
        found = cache_commands.prune_caches(configs, delete=options["delete"])
        print(*cache_commands.describe_pruned(found, deleted=options["delete"]), sep="\n")
    return 0


def merge_folders_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Merge captioned folders into one, each with train/ and test/ and a metadata.jsonl in them."""
    parser.add_argument(
        "folders",
        type=expanduser,
        nargs="+",
        metavar="DIR",
        help="captioned folders; without --out the first is the new one",
    )
    parser.add_argument("--out", type=expanduser, help="the new folder")
    args = parser.parse_args(arguments)
    out, *folders = [args.out, *args.folders] if args.out else args.folders
    if not folders:
        raise ValueError("expected --out and the captioned folders to merge")
    from latentdiff.data.merge_folders import merge_folders

    for name, splits in merge_folders(out, folders).items():
        print(f"{name}: " + ", ".join(f"{count:,} {split}" for split, count in splits.items()))
    print(f"wrote {out}; train on all of its captions with --data.caption_column=captions")
    return 0
