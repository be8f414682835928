"""Free naming: does a reader who sees only the images name what was asked for?

    python benchmarks/naming.py draw MODEL benchmarks/prompts/nouns.txt --out DIR
    python benchmarks/naming.py score DIR ANSWERS

`draw` generates each prompt with seeds 1 to 3 in one run and writes sheets DIR/sheet-1.png, ... of
numbered rows in an order shuffled by the prompts' hash; DIR/key.json says which is which and is not
read before the answers are written. ANSWERS: a text file, "NUMBER WORD[, WORD]" a line. `score`
prints every answer beside its prompt, whether a word of it is in the prompt, and the share with its
95 % interval (Wilson); rows judged by hand otherwise go in --right and --wrong.
"""

import argparse
import hashlib
import json
from pathlib import Path

from latentdiff import LatentDiffPipeline
from latentdiff.evaluation.metrics.bootstrap import proportion
from latentdiff.image_grid import draw_grid
from latentdiff.sampling.batch_sampler import generate_images

ROWS = 12  # prompts of one sheet


def draw(args):
    """Write the sheets and the key."""
    prompts = [line for line in args.prompts.read_text().splitlines() if line]
    order = sorted(prompts, key=lambda one: hashlib.sha256(f"naming:{one}".encode()).hexdigest())
    pipe = LatentDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    asked = [prompt for prompt in order for _ in args.seeds]
    images = [
        image
        for _, image in generate_images(
            pipe,
            asked,
            seeds=args.seeds * len(order),
            batch_size=24,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
        )
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    width = len(args.seeds)
    for sheet, first in enumerate(range(0, len(order), ROWS), start=1):
        numbers = range(first + 1, min(first + ROWS, len(order)) + 1)
        labels = [str(number) for number in numbers for _ in args.seeds]
        some = images[first * width : (first + ROWS) * width]
        draw_grid(some, labels, columns=4 * width).save(args.out / f"sheet-{sheet}.png")
    key = {"prompts": order, "model": Path(args.model).name, "seeds": args.seeds}
    (args.out / "key.json").write_text(json.dumps(key))


def score(args):
    """Print the answers beside the prompts, and the share that is right."""
    prompts = json.loads((args.folder / "key.json").read_text())["prompts"]
    lines = [line.split(maxsplit=1) for line in args.answers.read_text().splitlines() if line]
    answers = {int(number): rest.lower() for number, rest in lines}
    num_right = 0
    for number, prompt in enumerate(prompts, start=1):
        answer = answers.get(number, "")
        named = {word.strip() for word in answer.split(",")} - {""}
        right = any(f" {word} " in f" {prompt.replace(',', ' ')} " for word in named)
        right = (right or number in args.right) and number not in args.wrong
        num_right += right
        print(f"{number:3d} {'right' if right else 'WRONG'}  {prompt!r}: {answer}")
    share = proportion(num_right, len(prompts))
    print(
        f"{num_right} of {len(prompts)}: {share.estimate:.1%} [{share.low:.1%}, {share.high:.1%}]"
    )


def main():
    """Draw or score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("draw")
    one.add_argument("model")
    one.add_argument("prompts", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    one.add_argument("--steps", type=int, default=25)
    one.add_argument("--guidance_scale", type=float, default=3.0)
    one.set_defaults(run=draw)
    two = commands.add_parser("score")
    two.add_argument("folder", type=Path)
    two.add_argument("answers", type=Path)
    two.add_argument(
        "--right", type=int, nargs="*", default=[], help="numbers judged right by hand"
    )
    two.add_argument("--wrong", type=int, nargs="*", default=[])
    two.set_defaults(run=score)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
