"""Commands that trace what a model learned to its training images: a run's twin, attribution."""

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.cli.command import log_to_terminal, quieten_libraries, take_options
from latentdiff.config.options import ExplainOptions


def explain_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Rank the training images behind a generated image, on a page and in a JSON file.

    Type: latentdiff explain runs/mine image.png

    What is explained is the run's loss of the image under its caption, the prompt that the PNG
    file holds. docs/attribution.md says how far each method is to be trusted.
    """
    parser.add_argument("run", type=expanduser, help="the run's folder")
    parser.add_argument("image", type=expanduser, help="an image that its model generated")
    parser.add_class_arguments(ExplainOptions)
    values = parser.parse_args(arguments).as_dict()
    options, run = take_options(ExplainOptions, values), Path(values["run"])
    quieten_libraries("audit.attribution.explain")
    from latentdiff.audit.attribution.explain import explain
    from latentdiff.audit.attribution.explain_report import summary_lines, write_explanation
    from latentdiff.training.report.run_record import AUDIT

    found = explain(run, Path(values["image"]), options)
    facts = {
        "run": str(run),
        "image": values["image"],
        "prompt": found.prompt,
        "method": options.method,
        "training images": f"{len(found.folder):,} ranked",
        "measured": f"{options.draws} timesteps an image, seed {options.seed}",
    }
    out = Path(expanduser(options.out)) if options.out else run / AUDIT
    report = write_explanation(found, out, facts=facts, num_shown=options.num_shown)
    print("\n".join(summary_lines(found)))
    print(f"wrote {report.with_name('explain.json')} and {report}", flush=True)
    return 0


def twin_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Repeat a run's training with the loss of some images weighing 0, and nothing else different.

    Type: latentdiff twin runs/mine --without cats/tom.png

    Order, noise, timesteps and captions are those of the run, so what differs between the two is
    what these images taught. The same command continues a twin that was stopped.
    """
    parser.add_argument("run", type=expanduser, help="the run's folder")
    parser.add_argument(
        "--without",
        nargs="*",
        required=True,
        metavar="NAME",
        help="names of training images as in the folder, or a .txt file with one a line; none: the "
        "run again",
    )
    parser.add_argument(
        "--out", type=expanduser, default="", help="the twin's folder; by default in RUN/twins/"
    )
    args = parser.parse_args(arguments)
    run, names = Path(args.run), _names(args.without)
    log_to_terminal()
    quieten_libraries("audit.twin")
    from latentdiff.audit.twin import compare_losses, default_folder, train_twin

    out = Path(args.out) if args.out else default_folder(run, names)
    if status := train_twin(run, names, out):
        return status
    for line in compare_losses(run, out).lines():
        print(line)
    print(f"wrote {out}", flush=True)
    return 0


def _names(given: Sequence[str]) -> list[str]:
    """Return names, and those in files of them; a line of a file may be empty."""
    names: list[str] = []
    for one in given:
        path = Path(one).expanduser()
        is_list = path.suffix == ".txt"
        if is_list and not path.is_file():
            raise FileNotFoundError(f"--without={one} does not exist, expected a file of names")
        names += path.read_text(encoding="utf-8").splitlines() if is_list else [one]
    return list(dict.fromkeys(filter(None, map(str.strip, names))))
