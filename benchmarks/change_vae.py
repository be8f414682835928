"""Put another VAE below a trained model, for training on or for a better decoder.

    python benchmarks/change_vae.py PIPELINE VAE OUT [--scaling_factor S]
    python benchmarks/change_vae.py PIPELINE VAE OUT --checkpoint RUN/checkpoints/step-NNN

VAE is a folder with the same latents or ones that are near, such as a later state of the same
training. With a checkpoint, the weights are those of the run at that step, not averaged (--ema:
averaged); PIPELINE then only says what the networks look like, and brings the tokenizer and the
scheduler. The scaling factor stays as it is unless given.
"""

import argparse
from pathlib import Path

from common import load_checkpoint

from latentdiff import LatentDiffPipeline
from latentdiff.models.components import load_vae


def main():
    """Write the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("pipeline", help="the trained model")
    parser.add_argument("vae", help="the VAE's folder")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--checkpoint", type=Path, help="of a run: whose weights to take")
    parser.add_argument("--ema", action="store_true", help="its averaged weights")
    parser.add_argument("--scaling_factor", type=float, help="of the latents; default: unchanged")
    args = parser.parse_args()
    pipe = LatentDiffPipeline.from_pretrained(args.pipeline)
    if args.checkpoint:
        kind = "ema" if args.ema else "model"
        load_checkpoint(pipe, args.checkpoint / f"{kind}.safetensors")
    config = pipe.vae.config
    vae = load_vae(args.vae)
    vae.register_to_config(
        scaling_factor=args.scaling_factor or config["scaling_factor"],
        sample_size=config["sample_size"],
    )
    pipe.register_modules(vae=vae)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
