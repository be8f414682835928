"""Encode a folder's pictures ahead of training, so that the first step comes at once.

python scripts/cache_latents.py --config configs/emoji.yaml --data.root=DIR --model.vae=DIR
"""

import sys

from latentdiff.config import Config
from latentdiff.config_file import parse_arguments


def main() -> int:
    """Parse, encode what the cache lacks, say how many; exit 0 done, 2 bad usage or input."""
    config = parse_arguments(Config, description=(__doc__ or "").splitlines()[0])
    from latentdiff.training.components import check_parts, load_vae_of
    from latentdiff.training.loop import start_accelerator
    from latentdiff.training.supply import cache_latents, read_data

    try:
        check_parts(config)
        accelerator = start_accelerator(config)
        vae = load_vae_of(config)
        for folder in read_data(config.data):
            if len(folder):
                cache = cache_latents(folder, vae, config.data, accelerator=accelerator)
                print(f"{len(cache)} pictures, {cache.encoded} encoded now", flush=True)
    except (ValueError, OSError) as error:
        print(f"cache_latents.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
