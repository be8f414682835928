"""Print the table of speeds in README and docs from the JSON in benchmarks/results.

    python benchmarks/table.py [--readme] [--results DIR]

One table a machine, headed by what it is; the results of further machines are in folders of
benchmarks/results. --readme leaves out the rows that docs/performance.md alone has. A row whose
benchmark has no JSON is listed at the end as not measured.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]  # the JSON of a benchmark


@dataclass(frozen=True)
class Row:
    """A row of the table: where its figure is, and how it reads.

    pick: returns the figure of the file's lines. in_readme: whether README has the row too.
    """

    label: str
    file: str
    pick: Callable[[list[Line]], str]
    aim: str
    in_readme: bool = True


def times(key: str) -> Callable[[list[Line]], str]:
    """Read a ratio of the first line; a peer that was not there has none."""
    return lambda lines: "skipped" if lines[0][key] is None else f"{lines[0][key]:.2f}x"


def share(key: str, of: str) -> Callable[[list[Line]], str]:
    """Read a share of the first line, of what it is a share of."""
    return lambda lines: f"{lines[0][key]:.2f} of {of}"


def by_batch(key: str, model: str) -> Callable[[list[Line]], str]:
    """Read the ratios of a model's lines, one a batch size."""
    return lambda lines: " / ".join(
        f"{line[key]:.2f}x" for line in lines if line["model"].startswith(model)
    )


def by_size(key: str) -> Callable[[list[Line]], str]:
    """Read the ratios of a line that has a part for each batch size."""
    return lambda lines: " / ".join(
        f"{part[key]:.2f}x" for name, part in lines[0].items() if name.startswith("batch_")
    )


ROWS = [
    Row(
        "training, 17 M U-Net, 128 px, batch 16, bf16, against a loop that encodes at every step",
        "train_throughput",
        times("ratio_to_baseline"),
        "3x",
    ),
    Row(
        "the same against that loop in its best settings",
        "train_throughput",
        times("ratio_to_baseline_best"),
        "3x",
    ),
    Row(
        "the same, with our malloc setting given to that loop too",
        "train_throughput",
        times("ratio_to_baseline_best_kept"),
        "",
        in_readme=False,
    ),
    Row(
        "its step against the plain autocast step, inputs ready",
        "train_throughput",
        times("ratio_inner"),
        "2x",
    ),
    Row(
        "its arithmetic, of the measured peak",
        "train_throughput",
        share("share_of_peak", "it"),
        "",
        in_readme=False,
    ),
    Row(
        "from noise to the held-out loss that loop reaches in 20 minutes, cache building counted",
        "heldout_race",
        share("share_of_time", "its time"),
        "0.33",
    ),
    Row(
        "the same where that loop's learning rate decays too",
        "heldout_race_both",
        share("share_of_time", "its time"),
        "",
        in_readme=False,
    ),
    Row(
        "whole run of diffusers' train_text_to_image.py, same folder and model, cache building "
        "counted",
        "whole_run",
        times("ratio"),
        "3x",
    ),
    Row(
        "20 steps, emoji model, batch 1 / 16, against diffusers' default (float32)",
        "sample_latency",
        by_batch("ratio_to_default", "emoji"),
        "2x",
    ),
    Row(
        "the same against diffusers' best settings there (bf16)",
        "sample_latency",
        by_batch("ratio_to_best", "emoji"),
        "1.3x",
    ),
    Row(
        "20 steps, bundled model, batch 1 / 16, against diffusers' best settings there",
        "sample_latency",
        by_batch("ratio_to_best", "latentdiff-mini"),
        "1.3x",
        in_readme=False,
    ),
    Row(
        "20 steps, Stable Diffusion 1.5's size, 512 px, bf16, against diffusers in channels_last",
        "sample_sd15",
        times("ratio_to_channels_last"),
        "1.15x",
    ),
    Row(
        "the same against OpenVINO in bf16",
        "sample_sd15",
        times("ratio_to_openvino"),
        "1x",
    ),
    Row(
        "training, Stable Diffusion 1.5's size, 512 px, bf16, one GPU, against diffusers' step",
        "gpu/train",
        times("ratio_to_example"),
        "2.5x",
    ),
    Row(
        "the same against that step in its best settings",
        "gpu/train",
        times("ratio_to_example_best"),
        "",
    ),
    Row("its arithmetic, of the GPU's peak", "gpu/train", share("share_of_peak", "it"), "0.45"),
    Row(
        "20 steps, the same size, one GPU, batch 1 / 8, against diffusers in channels_last",
        "gpu/sample",
        by_size("ratio_to_channels_last"),
        "",
    ),
]


def read_lines(path: Path) -> list[Line]:
    """Return the JSON lines of a benchmark's results."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def machine_of(line: Line) -> str:
    """Describe the machine that a line was measured on."""
    cores = f"{line['cores_usable']} core{'s' * (line['cores_usable'] != 1)}"
    bf16 = f", bf16 by {line['bf16']}" if line.get("bf16") else ""
    what = line["gpu"] or f"{line['processor']}, {cores}{bf16}"
    torch, diffusers = line["torch"].partition("+")[0], line["diffusers"]
    return f"{what}; torch {torch}, diffusers {diffusers}; {line['date']}"


def tables(results: Path, *, readme: bool) -> str:
    """Return the tables of all machines, and the rows that are not measured."""
    by_machine: dict[str, list[str]] = defaultdict(list)
    missing = []
    for row in ROWS:
        if readme and not row.in_readme:
            continue
        name = f"{row.file}.json"
        found = [path for path in (results / name, *results.glob(f"*/{name}")) if path.is_file()]
        for lines in map(read_lines, found):
            text = f"| {row.label} | {row.pick(lines)} | {row.aim} |"
            by_machine[machine_of(lines[0])].append(text)
        if not found:
            missing.append(f"- {row.label} ({row.file})")
    head = ["| | ratio | aim |", "|---|---|---|"]
    parts = ["\n".join([f"{name}:", "", *head, *rows]) for name, rows in by_machine.items()]
    if missing:
        parts.append("\n".join(["Not measured:", "", *missing]))
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", action="store_true", help="only the rows of README")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(tables(args.results, readme=args.readme))


if __name__ == "__main__":
    main()
