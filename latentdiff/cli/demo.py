"""The two demos: fine-tune the bundled model on a new style, and train a model from scratch."""

import logging
import time
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from latentdiff.cli.command import quieten_libraries
from latentdiff.config.io import load_config
from latentdiff.config.options import SampleOptions
from latentdiff.config.text_to_image import Config
from latentdiff.program import program

CONFIG, CONFIG_SCRATCH = "demo", "demo_scratch"
FOLDER_SCRATCH = Path("demo-scratch-run")
STYLE = "smiling"
PLAIN_FRACTION = 0.3  # of the training images have no face: the word means it, not the shapes
KNOWN = (  # what the bundled model draws: everyday things, styles, colours, counts, shapes
    *("a cat", "a dog", "a house", "a car", "a cake", "a tree", "a cat, blob style"),
    *("an apple, flat style", "a blue car", "a red apple", "two apples", "a cat next to a dog"),
    *("a photo of a rose", "a photo of a sunflower", "a large red star on a pink background"),
    "a large blue circle on a white background",
)
UNRELATED = ("a red apple", "a cat", "a photo of a sunflower", KNOWN[-1])
NUM_NEW, NUM_STEPS, GUIDANCE = 8, 25, 5.0


def demo_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Fine-tune the bundled model on shapes with a face; write images of before and after.

    Settings of training, such as --train.max_steps=100, are passed on to it.
    """
    parser.add_argument("--model", type=str, default="latentdiff-mini", help="the base model")
    parser.add_argument("--out", type=expanduser, default="demo-run", help="the folder to write")
    parser.add_argument("--num_train", type=int, default=1000, help="number of training images")
    settings = [text for text in arguments if "." in text.partition("=")[0] and text[:2] == "--"]
    args = parser.parse_args([text for text in arguments if text not in settings])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quieten_libraries()
    return demo(args.model, Path(args.out), num_train=args.num_train, settings=settings)


def demo(model: str, out: Path, *, num_train: int, settings: Sequence[str] = ()) -> int:
    """Fine-tune `model` on shapes with a face in out/model, with sheets of before and after.

    settings: of training, besides those of configs/demo.yaml. Returns training's exit code.
    """
    from latentdiff.data.shapes import in_style, split_scenes, write_shapes

    root = out / STYLE
    paths = {"output_dir": out / "model", "data.root": root, "data.cache_dir": out / "cache"}
    options = [f"--model.pretrained={model}", *(f"--{name}={path}" for name, path in paths.items())]
    config: Config = load_config(CONFIG, [*options, *settings])  # refuses bad settings at once
    clock = _Clock()
    unseen = in_style(split_scenes()[1], STYLE)
    prompts = [scene.caption for scene in unseen[:: len(unseen) // NUM_NEW][:NUM_NEW]]
    prompts += UNRELATED
    pipe = _opened(model)
    before_all, before = _generate(pipe, KNOWN), _generate(pipe, prompts)
    del pipe  # training needs its memory
    _save_sheet(before_all, KNOWN, out / "before.png")
    clock.print(f"{out / 'before.png'}: {len(KNOWN)} images of {model}, and {len(prompts)} more")
    write_shapes(
        root,
        num_train=num_train,
        num_test=64,
        size_px=config.data.resolution or 128,
        style=STYLE,
        plain_fraction=PLAIN_FRACTION,
    )
    if status := _train(CONFIG, [*options, *settings]):
        return status
    clock.print(f"fine-tuned on {num_train} images of {root / 'train'}")
    tuned = out / "model" / "pipeline"
    after = _generate(_opened(str(tuned)), prompts)
    pairs = [image for pair in zip(before, after, strict=True) for image in pair]
    labels = [label for prompt in prompts for label in (f"before: {prompt}", "after")]
    _save_sheet(pairs, labels, out / "sheet.png")
    clock.print(f"{out / 'sheet.png'}: {len(prompts)} prompts before and after, seeds equal")
    new = _distance(before[:NUM_NEW], after[:NUM_NEW])
    known = _distance(before[NUM_NEW:], after[NUM_NEW:])
    print(
        f"Drift: images of what was new changed by {new:.0f} of 255 gray levels in the mean, those "
        f"of {len(UNRELATED)} unrelated prompts by {known:.0f}"
    )
    print(_next_steps(tuned, out))
    return 0


def _next_steps(tuned: Path, out: Path) -> str:
    """Explain the sheets and list commands to try."""
    command = program()
    return (
        f"\nThe first {NUM_NEW} prompts of {out / 'sheet.png'} ask for shapes with a face whose "
        "combination of kind, colour and background was in no training image;\n"
        f"the last {len(UNRELATED)} for subjects that the model knew before.\n"
        f'Another image:      {command} sample {tuned} "a smiling large red circle on a pink '
        'background" --out circle.png\n'
        f'The model as it is: {command} sample latentdiff-mini "a cat" --out cat.png\n'
        f"Your own images:    {command} inspect DIR\n"
        f"                    {command} train --config demo --data.root=DIR "
        "--output_dir=runs/mine\n"
        f"All from scratch:   {command} demo scratch"
    )


def demo_scratch_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Train a model from scratch on coloured shapes; sample captions that it was never shown."""
    parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quieten_libraries()
    from latentdiff.data.shapes import split_scenes, write_shapes
    from latentdiff.sampling.sample import sample

    root = write_shapes(FOLDER_SCRATCH / "shapes", num_train=3000, num_test=100)
    if status := _train(CONFIG_SCRATCH, []):
        return status
    prompts = [scene.caption for scene in split_scenes()[1]][::3][:16]
    sheet = FOLDER_SCRATCH / "sheet.png"
    options = SampleOptions(
        out=str(sheet),
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        seed=0,
        prompt_weighting=False,
    )
    model = Path(load_config(CONFIG_SCRATCH).output_dir) / "pipeline"
    for record in sample(str(model), prompts, options):
        print(f"wrote {record['kind']} {record['path']}")
    command = program()
    print(
        f"\n{sheet} shows {len(prompts)} captions whose combination was never in {root}/train.\n"
        f'Another image:     {command} sample {model} "a large red star on a pink background" '
        "--out star.png\n"
        f"Your own folder:   {command} inspect DIR\n"
        f"                   {command} train --config emoji --data.root=DIR "
        "--model.vae=latentdiff-vae"
    )
    return 0


def _train(config: str, settings: Sequence[str]) -> int:
    """Train in processes of its own; return the exit code."""
    from latentdiff.training.distributed import launch

    return launch("train", ["--config", config, *settings])


def _opened(model: str) -> Any:
    """Open a model's pipeline."""
    from latentdiff.sampling.open_pipeline import open_pipeline

    pipe = open_pipeline(model)
    pipe.set_progress_bar_config(leave=False)
    return pipe


def _generate(pipe: Any, prompts: Sequence[str]) -> list[Any]:
    """Generate an image of each prompt; its seed is its index."""
    seeds = list(range(len(prompts)))
    settings: dict[str, Any] = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE}
    output: Any = pipe(list(prompts), seed=seeds, prompt_weighting=False, **settings)
    return list(output.images)


def _distance(before: Sequence[Any], after: Sequence[Any]) -> float:
    """Return the mean absolute difference of images, pair by pair, in gray levels."""
    import numpy as np

    pairs = zip(before, after, strict=True)
    return float(np.mean([np.abs(np.int16(one) - np.int16(other)).mean() for one, other in pairs]))


def _save_sheet(images: Sequence[Any], labels: Sequence[str], path: Path) -> None:
    """Write a sheet of eight images a row."""
    from latentdiff.image_grid import draw_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(images, labels, columns=8).save(path)


class _Clock:
    """Prints lines with the seconds since the line before and since the start."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def print(self, message: str) -> None:
        now = time.monotonic()
        print(f"[{now - self.last:4.0f} s, {now - self.start:4.0f} s in all] {message}", flush=True)
        self.last = now
