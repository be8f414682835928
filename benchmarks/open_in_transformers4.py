"""Open exports with transformers 4, as kohya's scripts and most user interfaces do, and compare.

    python benchmarks/open_in_transformers4.py [FOLDER ...] [--venv DIR]

Makes an environment with transformers 4.57 and diffusers 0.36 (from PyPI; torch is this one's),
opens each folder there with the stock pipeline, and compares token ids, prompt embeddings and an
image with those of LatentDiffPipeline here. Without folders it makes them first, by a few steps
from the bundled model: full, a LoRA with the text encoder, its merge, and textual inversion. One
JSON line a folder; exit 1 where one differs.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch

PACKAGES = ("transformers==4.57.*", "diffusers==0.36.*", "tokenizers<0.23", "huggingface_hub<1.0")
CAPTIONS = [
    "",
    "a small red circle on a blue background",
    "A Photo of <toy>,  don't STOP!!  2 x 3.14",
    "naïve café \u2014 ½ price, 数字 7 🎈",
    "one of many words " * 30,
]
STEPS = {
    "full": ["--train.train_text_encoder=true"],
    "lora": ["--finetune.method=lora", "--train.train_text_encoder=true"],
    "word": [
        "--finetune.method=textual_inversion",
        "--finetune.token=<toy>",
        "--finetune.initializer_token=circle",
        '--finetune.instance_prompts=["a photo of <toy>"]',
    ],
}
TOLERANCE = 1e-3  # of images in [0, 1]; the two versions order some float operations otherwise


def figures(folder, pipeline_class, tokenizer_class):
    """Return token ids, prompt embeddings and an image of a folder; runs in either environment."""
    pipe = pipeline_class.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    length = pipe.tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    plain = pipe.tokenizer(CAPTIONS, **options).input_ids
    fast = tokenizer_class.from_pretrained(folder, subfolder="tokenizer")(CAPTIONS, **options)
    with torch.no_grad():
        embeds = pipe.text_encoder(torch.tensor(plain)).last_hidden_state
    side = pipe.unet.config.sample_size
    channels = pipe.vae.config.latent_channels
    latents = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    image = pipe(
        CAPTIONS[1], latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np"
    ).images[0]
    return {"ids": plain, "fast_ids": fast.input_ids, "embeds": embeds.numpy(), "image": image}


def read_there(folder, out):
    """Write the figures of a folder to a file, by stock classes; run by the other environment."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizerFast

    np.savez(out, **figures(folder, StableDiffusionPipeline, CLIPTokenizerFast))


def compare(folder, python, scratch):
    """Return how a folder's figures differ between the two environments."""
    from transformers import CLIPTokenizer

    from latentdiff import LatentDiffPipeline

    out = scratch / "figures.npz"
    command = [python, __file__, "--read", folder, out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"folder": str(folder), "equal": False, "error": done.stderr.splitlines()[-1]}
    ours, theirs = figures(folder, LatentDiffPipeline, CLIPTokenizer), np.load(out)
    errors = {
        name: float(np.abs(np.asarray(ours[name], float) - theirs[name]).max())
        for name in ("ids", "fast_ids", "embeds", "image")
    }
    is_equal = errors["ids"] == errors["fast_ids"] == 0 and errors["image"] < TOLERANCE
    return {"folder": str(folder), "equal": is_equal} | errors


def make_environment(folder):
    """Make an environment with the older libraries and the rest of this one; return its python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
    subprocess.run(install, check=True)
    return python


def make_exports(scratch):
    """Train from the bundled model for two steps by each method; return the folders."""
    from latentdiff.config.io import parse_arguments
    from latentdiff.config.text_to_image import Config
    from latentdiff.data.shapes import write_shapes
    from latentdiff.models.model_path import resolve_model
    from latentdiff.sampling.conversion import merge_loras
    from latentdiff.training.text_to_image.train_t2i import train

    data = scratch / "data"
    write_shapes(data, num_train=24, num_test=8)
    base = [
        "--model.pretrained=latentdiff-mini",
        f"--data.root={data / 'train'}",
        "--data.resolution=64",
        "--data.num_workers=0",
        "--train.max_steps=2",
        "--train.batch_size=4",
        "--train.micro_batch_size=4",
        "--train.learning_rate=0.01",
        "--eval.every_steps=0",
        "--preview.every_steps=0",
    ]
    folders = [resolve_model("latentdiff-mini")]
    for name, more in STEPS.items():
        train(parse_arguments(Config, [*base, *more, f"--output_dir={scratch / name}"]))
        folders.append(scratch / name / "pipeline")
    folders.append(merge_loras("latentdiff-mini", [scratch / "lora" / "lora"], scratch / "merged"))
    return folders


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="exports; by default some are made")
    parser.add_argument("--venv", type=Path, help="keep the environment here, or use the one here")
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_there(*args.read)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        python = (args.venv or scratch / "venv") / "bin" / "python"
        if not python.exists():
            python = make_environment(python.parents[1])
        results = [compare(one, python, scratch) for one in args.folders or make_exports(scratch)]
    for result in results:
        print(json.dumps(result))
    return 0 if all(result["equal"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
