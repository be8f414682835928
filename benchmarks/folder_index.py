"""Opening folders of 1e3 to 1e6 captioned images: seconds and memory, by size.

    python benchmarks/folder_index.py [SIZE ...]

Prints one JSON line. The images are hard links to 300 distinct small JPEGs, captioned by one
metadata.jsonl. Each figure is from a process of its own: the first scan, a second start (which
looks at every file's size and time), and a start that trusts the index, as processes after the
first do. Megabytes are resident memory above that after the imports, at the peak and once 1,000
records and all sizes were read; ratio is the second start's seconds, largest size over smallest.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_DISTINCT = 300


def make_folder(root: Path, num: int) -> None:
    import numpy as np
    from common import write_numbered
    from PIL import Image

    rng = np.random.default_rng(0)
    (root / ".pool").mkdir(parents=True)
    for i in range(NUM_DISTINCT):
        width, height = (int(side) for side in rng.integers(64, 160, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(root / f".pool/{i}.jpg", quality=80)

    def link(path: Path, i: int) -> None:
        os.link(root / f".pool/{i % NUM_DISTINCT}.jpg", path)

    write_numbered(root, num, ending="jpg", save=link)


def megabytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(root: str, cache_dir: str, *, trust_index: bool) -> dict[str, float]:
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401  # so that the imports are not counted
    from PIL import Image

    from latentdiff.data.folder.folder import read_folder

    Image.preinit()
    before = megabytes("VmRSS")
    started = time.perf_counter()
    folder = read_folder(root, cache_dir=cache_dir, trust_index=trust_index)
    seconds = time.perf_counter() - started
    places = range(0, len(folder), max(1, len(folder) // 1000))
    started = time.perf_counter()
    for place in places:
        folder[place]
    record_us = (time.perf_counter() - started) / len(places) * 1e6
    used = folder.widths.sum() + folder.heights.sum()
    assert used > 0
    return {
        "seconds": round(seconds, 3),
        "record_us": round(record_us, 1),
        "mb": round(megabytes("VmRSS") - before),
        "peak_mb": round(megabytes("VmHWM") - before),
    }


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:4], trust_index=sys.argv[4] == "trusted")))
        return
    sizes = [int(size) for size in sys.argv[1:]] or [1_000, 10_000, 100_000, 1_000_000]
    results: dict[str, dict[str, dict[str, float]]] = {}
    folder = Path(tempfile.mkdtemp(prefix="folder-index-"))
    try:
        for size in sizes:
            make_folder(folder / f"data-{size}", size)
            for start in ("first", "second", "trusted"):
                command = [sys.executable, __file__, "--measure", str(folder / f"data-{size}")]
                out = subprocess.check_output([*command, str(folder / "cache"), start], text=True)
                results.setdefault(start, {})[str(size)] = json.loads(out)
            shutil.rmtree(folder / f"data-{size}")
    finally:
        shutil.rmtree(folder)
    seconds = [results["second"][str(size)]["seconds"] for size in (sizes[0], sizes[-1])]
    machine = {"machine": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    print(
        json.dumps(
            {"benchmark": "folder_index", "ratio": seconds[1] / seconds[0]} | machine | results
        )
    )


if __name__ == "__main__":
    main()
