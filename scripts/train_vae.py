"""Train an AutoencoderKL on folders of images and report its PSNR on held-out ones.

python scripts/train_vae.py --config configs/vae_small.yaml --roots='[images]'
"""

import sys

from latentdiff.config.io import parse_arguments
from latentdiff.config.vae import VaeConfig
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse, train, say where the VAE is; exit 0 done, 2 bad usage or input."""
    config = parse_arguments(VaeConfig, description=(__doc__ or "").splitlines()[0])
    quieten_libraries()
    from latentdiff.training.vae.train_vae import train_vae

    try:
        report = train_vae(config)
    except (ValueError, OSError) as error:
        print(f"train_vae.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {config.output_dir}/vae: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
