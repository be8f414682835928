"""Random input files of many kinds, a third of them valid: the right value or a clear refusal.

    python tests/fakes/fuzz_inputs.py 5000 [SEED]

Each kind of input is a module fuzz_KIND.py of this folder with a function `make_case`. Prints one
JSON line a kind: how many inputs, how many of them valid, how many wrong and the first of those.
"""

import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS: tuple[str, ...] = (
    "config",
    "embedding",
    "lora",
    "parquet",
    "png_settings",
    "prompt_files",
)  # one name for each fuzz_KIND.py
REFUSALS = (ValueError, TypeError, FileNotFoundError)


@dataclass(frozen=True)
class FuzzCase:
    """One input: `load` writes it into a fresh folder, loads it and returns its value.

    A valid case gives a value for which `is_right` holds. Any other case is refused with an error
    of REFUSALS whose message contains one of `named` (a file's name, an argument, a setting).
    """

    what: str
    load: Callable[[Path], Any]
    is_right: Callable[[Any], bool] | None = None  # None: the input must be refused
    named: tuple[str, ...] = ()


def fault_of(case: FuzzCase) -> str | None:
    """Load one case in a fresh folder; what is wrong with the answer, None if it is right."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            value = case.load(Path(folder))
        except REFUSALS as error:
            if case.is_right is not None:
                return f"{case.what}: valid, but refused: {error!r}"
            if len(str(error)) > 2000 or not any(name in str(error) for name in case.named):
                return f"{case.what}: the error names none of {case.named}: {error!r}"
            return None
        except BaseException as error:  # anything else is a fault, which is reported
            return f"{case.what}: {type(error).__name__}: {error}"
    if case.is_right is None:
        return f"{case.what}: must be refused, gave {value!r:.200}"
    return None if case.is_right(value) else f"{case.what}: wrong value {value!r:.200}"


def fuzz(kind: str, num_inputs: int, seed: int = 0) -> dict[str, Any]:
    """Try inputs of one kind; counts, and the first faults in words."""
    make_case = importlib.import_module(f"fuzz_{kind}").make_case
    start = time.monotonic()
    cases = [make_case(random.Random(f"{kind} {seed} {index}")) for index in range(num_inputs)]
    faults = [fault for fault in map(fault_of, cases) if fault]
    return {
        "kind": kind,
        "inputs": num_inputs,
        "valid": sum(case.is_right is not None for case in cases),
        "faults": len(faults),
        "first": faults[:5],
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    total, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    results = [fuzz(kind, -(-total // len(KINDS)), seed) for kind in KINDS]
    print(*map(json.dumps, results), sep="\n")
    sys.exit(any(result["faults"] for result in results))
