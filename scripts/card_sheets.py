"""Draw the sheets of a model's card and a test for readers; prompts are drawn at random.

python scripts/card_sheets.py MODEL --data DIR DIR --seen 40 8 --unseen 20 4 --questions 18 6 \
    --out sheets
python scripts/card_sheets.py --score sheets/key.json answers.json
"""

import argparse
import sys
from pathlib import Path

from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, draw or score; exit 0 done, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--data", nargs="+", default=[], help="captioned folders")
    for name, what in (
        ("seen", "captions of training images on the first sheet, by folder"),
        ("unseen", "captions of held-out images alone on the second sheet, by folder"),
        ("questions", "training captions that readers are asked for, by folder"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[], help=what)
    parser.add_argument("--out", type=Path, default=Path("sheets"), help="the folder to write")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of the lots and of the images")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--score", nargs=2, type=Path, metavar=("KEY", "ANSWERS"))
    args = parser.parse_args()
    quieten_libraries()
    try:
        return score(*args.score) if args.score else draw(args)
    except (ValueError, OSError) as error:
        print(f"card_sheets.py: {error}", file=sys.stderr)
        return 2


def draw(args: argparse.Namespace) -> int:
    """Draw the sheets and the readers' test."""
    from latentdiff.evaluation.card_sheets import Lots, Sampling, write_card_sheets

    counts = [args.seen, args.unseen, args.questions]
    counts = [numbers or [0] * len(args.data) for numbers in counts]
    if not args.model or not args.data or any(len(one) != len(args.data) for one in counts):
        raise ValueError("expected a model, --data, and one number a folder in each of the others")
    lots = [Lots(*row) for row in zip(args.data, *counts, strict=True)]
    sampling = Sampling(args.steps, args.guidance_scale, args.seed)
    write_card_sheets(
        args.model, lots, args.out, sampling=sampling, caption_column=args.caption_column
    )
    print(f"wrote {args.out}; show readers {args.out / 'reader'} and nothing else")
    return 0


def score(key: Path, answers: Path) -> int:
    """Print how many answers are right."""
    from latentdiff.evaluation.card_sheets import NUM_CHOICES, score_answers

    share = score_answers(key, answers)
    print(
        f"{share.estimate:.1%} of {share.num_samples} right "
        f"[{share.low:.1%}, {share.high:.1%}], chance {1 / NUM_CHOICES:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
