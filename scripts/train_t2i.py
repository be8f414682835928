"""Train or fine-tune a text-to-image latent diffusion model on a captioned folder.

accelerate launch scripts/train_t2i.py --config configs/emoji.yaml --data.root=DIR
"""

import logging
import sys

from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, train; exit 0 done, 1 failed numbers or worker, 2 bad input, 143 / 130 stopped."""
    config = parse_arguments(Config, description=(__doc__ or "").splitlines()[0])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    quieten_libraries()
    from latentdiff.training.inputs.workers import DeadWorkerError
    from latentdiff.training.loop import train

    try:
        return train(config)
    except (ValueError, OSError) as error:
        print(f"train_t2i.py: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, DeadWorkerError) as error:
        print(f"train_t2i.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
