"""All GPU benchmarks in one call of a given length, whatever becomes of a single one.

    python benchmarks/gpu/run_all.py [--budget_s 460] [--parts train,sample,...] [--out gpu-results]

Each part is a process of its own, the most wanted first. It has its share of the seconds that are
left and is ended after them; what it had measured by then is kept. OUT/PART.json is its line,
OUT/PART.log what it wrote, OUT/summary.json all of it. The exit status is 0 where any part has
figures. `--device cpu --tiny` tries every script with a toy model in a minute or two.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
PARTS = {  # the share of the budget, and options, by the name of the script
    "train": (0.30, []),
    "sample": (0.17, []),
    "memory": (0.14, []),
    "resume": (0.11, []),
    "attention": (0.08, []),
    "compile": (0.20, []),
}
TINY = {  # options beside --tiny
    "train": ["--batch_size", "2", "--rounds", "1"],
    "sample": ["--batch_sizes", "1", "--steps", "2", "--rounds", "1"],
    "memory": ["--batch_size", "1"],
    "resume": ["--steps", "4"],
    "attention": ["--batch_size", "1"],
    "compile": ["--batch_size", "1", "--backend", "eager"],
}
GRACE_S = 5  # between asking a process to end and ending it


def run_part(name, args, *, seconds):
    """Run a part for at most so many seconds; return its figures, or why there are none."""
    line, log = args.out / f"{name}.json", args.out / f"{name}.log"
    line.unlink(missing_ok=True)
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(line), *PARTS[name][1]]
    command += ["--device", args.device]
    command += ["--tiny", *TINY[name]] if args.tiny else []
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = _end(process)
    found = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if not line.exists():
        return found | partial_figures(log)
    figures = json.loads(line.read_text(encoding="utf-8"))
    return found | figures if "error" in figures else found | figures | {"status": 0}


def _end(process):
    """End a process and those it has started; return why."""
    for number, wait in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        os.killpg(process.pid, number)
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            continue
    return "out of time"


def partial_figures(log):
    """Return the figures that a part logged before it ended, and the end of what it wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    figures = {}
    for line in lines:
        name, _, value = line.partition(": ")
        try:
            figures[name] = json.loads(value)
        except ValueError:
            continue
    return figures | {"last_lines": lines[-15:]}


def run_parts(args):
    """Run the parts in turn; return their figures by name."""
    names = args.parts.split(",")
    end, results = time.monotonic() + args.budget_s, {}
    for k, name in enumerate(names):
        left = end - time.monotonic()
        wanted = sum(PARTS[other][0] for other in names[k:])
        seconds = left * PARTS[name][0] / wanted
        if seconds < args.min_s:
            results[name] = {"status": "no time left"}
            continue
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        results[name] = run_part(name, args, seconds=seconds)
        print(f"{name}: {json.dumps(results[name])[:1500]}", flush=True)
        summary = json.dumps(results, indent=1) + "\n"
        (args.out / "summary.json").write_text(summary, encoding="utf-8")
    return results


def main():
    """Run the parts and say what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget_s", type=float, default=460, help="seconds of all parts together")
    parser.add_argument("--min_s", type=float, default=15, help="no part begins with less")
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas between")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the scripts")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]}, expected of {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_parts(args)
    for name, found in results.items():
        is_whole = found["status"] == 0
        print(f"{name}: {'done' if is_whole else found.get('error') or found['status']}")
    return 0 if any(found["status"] == 0 for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
