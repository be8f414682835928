"""The demo: what the small model that ships draws, and how it learns shapes with a face.

python scripts/demo.py        (or: make demo, which installs first)

Options of training, such as --train.max_steps=100, are handed on.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.terminal import quieten_libraries

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
STYLE = "smiling"
KNOWN = (  # emoji, flowers and shapes, as its training captions call them
    *("a red apple", "a cat face", "a slice of pizza", "a smiling face with sunglasses"),
    *("a green heart", "a sunflower", "a snow-capped mountain", "a full moon"),
    *("a photo of a sunflower", "a close-up photo of a rose", "a photograph of daisies"),
    *("an image of tulips outdoors", "a large red star on a pink background"),
    *("a large blue circle on a white background", "a small yellow square on a black background"),
    "a large green triangle on a gray background",
)
UNRELATED = ("a red apple", "a cat face", "a photo of a sunflower", KNOWN[13])
NUM_NEW, NUM_STEPS, GUIDANCE = 8, 25, 3.0


def main() -> int:
    """Draw, write the images, fine-tune, draw again, say what was done; exit 0, or why not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="latentdiff-mini", help="the model to start from")
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="the folder to write")
    parser.add_argument("--num_train", type=int, default=1000, help="images to learn from")
    args, settings = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quieten_libraries()
    try:
        return demo(args.model, args.out, num_train=args.num_train, settings=settings)
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2


def demo(model: str, out: Path, *, num_train: int, settings: Sequence[str] = ()) -> int:
    """Fine-tune `model` on shapes with a face in out/model, with sheets of before and after.

    settings: of training, beside those of configs/demo.yaml. Returns training's exit status.
    """
    from latentdiff.data.shapes import in_style, split_scenes, write_shapes
    from latentdiff.training.distributed import launch

    clock = _Clock()
    unseen = in_style(split_scenes()[1], STYLE)
    prompts = [scene.caption for scene in unseen[:: len(unseen) // NUM_NEW][:NUM_NEW]]
    prompts += UNRELATED
    known, before = draw(model, KNOWN), draw(model, prompts)
    save_sheet(known, KNOWN, out / "before.png")
    clock.say(f"{out / 'before.png'}: {len(KNOWN)} images of {model}, and {len(prompts)} more")
    root = write_shapes(out / STYLE, num_train=num_train, num_test=64, style=STYLE)
    paths = {"output_dir": out / "model", "data.root": root, "data.cache_dir": out / "cache"}
    options = ["--config", str(CONFIG), f"--model.pretrained={model}"]
    options += [*(f"--{name}={path}" for name, path in paths.items()), *settings]
    if status := launch(ROOT / "scripts" / "train_t2i.py", options):
        return status
    clock.say(f"fine-tuned on {num_train} images of {root / 'train'}")
    tuned = out / "model" / "pipeline"
    after = draw(str(tuned), prompts)
    pairs = [image for pair in zip(before, after, strict=True) for image in pair]
    labels = [label for prompt in prompts for label in (f"before: {prompt}", "after")]
    save_sheet(pairs, labels, out / "sheet.png")
    clock.say(f"{out / 'sheet.png'}: {len(prompts)} prompts, before and after, from the same seeds")
    say_what_next(tuned, out, num_new=NUM_NEW)
    return 0


def draw(model: str, prompts: Sequence[str]) -> list[Any]:
    """Draw each prompt once, from the seed that is its place."""
    from latentdiff.sampling.open_pipeline import open_pipeline

    pipe = open_pipeline(model)
    pipe.set_progress_bar_config(leave=False)
    seeds = list(range(len(prompts)))
    made = pipe(list(prompts), seed=seeds, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE)
    images: list[Any] = made.images
    return images


def save_sheet(images: Sequence[Any], labels: Sequence[str], path: Path) -> None:
    """Write a sheet of eight images a row."""
    from latentdiff.image_grid import draw_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(images, labels, columns=8).save(path)


def say_what_next(tuned: Path, out: Path, *, num_new: int) -> None:
    """Say what the sheets show and what to try."""
    print(
        f"\nThe first {num_new} prompts of {out / 'sheet.png'} ask for shapes with a face whose "
        "combination of kind, colour and background was in no training image;\n"
        f"the last {len(UNRELATED)} for what the model knew before.\n"
        f'Another image:    .venv/bin/python scripts/sample.py {tuned} "a smiling large red '
        'circle on a pink background" --guidance_scale 3 --out circle.png\n'
        f'The model as it is: .venv/bin/python scripts/sample.py latentdiff-mini "a cat" '
        "--guidance_scale 3 --out cat.png\n"
        "Your own images:  .venv/bin/python scripts/inspect_data.py DIR\n"
        "                    .venv/bin/python scripts/train_t2i.py --config configs/demo.yaml "
        "--data.root=DIR --output_dir=runs/mine\n"
        "All from scratch:   make demo-scratch"
    )


class _Clock:
    """Says how long each part took."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def say(self, what: str) -> None:
        now = time.monotonic()
        print(f"[{now - self.last:4.0f} s, {now - self.start:4.0f} s in all] {what}", flush=True)
        self.last = now


if __name__ == "__main__":
    sys.exit(main())
