"""Seconds until something happens: the import, each script's --help.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--rounds 3]

Each is a new process; prints one JSON line with medians. The first round is not counted: it reads
the libraries from the disk.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import machine, medians, take_turns

ROOT = Path(__file__).parents[1]
SCRIPTS = ("sample", "train_t2i", "inspect_data", "evaluate")


def run(*arguments):
    """Run Python with arguments, quietly."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    works = {"import": lambda: run("-c", "import latentdiff"), "python": lambda: run("-c", "")}
    for name in SCRIPTS:
        works[f"{name} --help"] = lambda name=name: run(f"scripts/{name}.py", "--help")
    seconds = medians(take_turns(works, rounds=args.rounds))
    print(json.dumps({"benchmark": "startup", "seconds": seconds} | machine()))


if __name__ == "__main__":
    main()
