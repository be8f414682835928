"""Encode a config's images and captions ahead of training, look the cache over, or clear it.

python scripts/cache_latents.py [build] --config configs/emoji.yaml --data.root=DIR --model.vae=DIR
python scripts/cache_latents.py verify --config runs/emoji/config.yaml
python scripts/cache_latents.py prune --config A.yaml [--also B.yaml C.yaml] [--delete]
"""

import argparse
import sys

from latentdiff.config.io import load_config, parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, do one thing, say it; exit 0 done, 1 the cache is not sound, 2 bad usage or input."""
    given = sys.argv[1:]
    action = given.pop(0) if given and given[0] in ("build", "verify", "prune") else "build"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--also", nargs="+", default=[])  # other configs in use
    parser.add_argument("--delete", action="store_true")
    args, others = parser.parse_known_args(given)
    config = parse_arguments(Config, others, description=__doc__)
    quieten_libraries()
    from latentdiff.training.inputs import cache_commands as upkeep

    is_sound = True
    try:
        if action == "build":
            from latentdiff.training.setup import start_accelerator

            for built in upkeep.build_caches(config, accelerator=start_accelerator(config)):
                print(built, flush=True)
        elif action == "verify":
            for verified in upkeep.verify_caches(config):
                print(verified, flush=True)
                is_sound &= verified.is_sound
        else:
            configs = [config, *(load_config(path) for path in args.also)]
            found = upkeep.prune_caches(configs, delete=args.delete)
            print(*upkeep.describe_pruned(found, deleted=args.delete), sep="\n")
    except (ValueError, OSError) as error:
        print(f"cache_latents.py: {error}", file=sys.stderr)
        return 2
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
