"""Fine-tune a folder of Stable Diffusion 1.5's shape and random weights for a few steps.

Makes the folder (860 M U-Net, CLIP ViT-L text encoder, AutoencoderKL), trains three steps of batch
1 in bf16 with gradient checkpointing and no EMA, exports, generates an image, and prints one JSON
line with the peak memory. The whole U-Net at 256 px needs about 20 GB of memory, a LoRA at 512 px
far less; 12 GB of disk; on two CPU cores some minutes.

python benchmarks/sd15_size.py [--method full|lora] [--folder DIR]
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from latentdiff import LatentDiffPipeline, load_config
from latentdiff.data.shapes import write_shapes
from latentdiff.models.build import build_text_encoder, make_ddpm_scheduler
from latentdiff.models.open_clip import clip_tokenizer_from_open_clip
from latentdiff.training.text_to_image.train_t2i import train

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = {"full": ("full_sd15_40gb.yaml", 256), "lora": ("lora_sd15_8gb.yaml", 512)}


def make_folder(path: Path) -> None:
    """Save a folder of Stable Diffusion 1.5's shape; weights are random, in bf16."""
    tokenizer = clip_tokenizer_from_open_clip()
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    ).to(torch.bfloat16)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).to(torch.bfloat16)
    text = build_text_encoder(
        tokenizer, width=768, num_layers=12, num_heads=12, hidden_act="quick_gelu"
    ).to(torch.bfloat16)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_ddpm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)


def main() -> int:
    """Build, train, export, generate, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--method", choices=METHODS, default="full", help="the trained weights")
    given = parser.parse_args()
    name, size_px = METHODS[given.method]
    folder = given.folder or Path(tempfile.mkdtemp(prefix="sd15-size-"))
    make_folder(folder / "model")
    write_shapes(folder / "data", num_train=4, num_test=2, size_px=size_px)
    config = load_config(
        CONFIGS / name,
        [
            f"--model.pretrained={folder / 'model'}",
            f"--data.root={folder / 'data'}",
            f"--data.cache_dir={folder / 'cache'}",
            f"--output_dir={folder / 'run'}",
            f"--data.resolution={size_px}",
            "--data.num_workers=0",
            "--train.max_steps=3",
            "--train.batch_size=1",
            "--train.micro_batch_size=1",
            "--train.ema=false",
            "--train.log_every_steps=1",
            "--preview.every_steps=0",
            "--preview.num_steps=1",
            "--preview.prompts=[a red circle]",
            "--eval.num_heldout=2",
        ],
    )
    started = time.perf_counter()
    assert train(config) == 0
    seconds = time.perf_counter() - started
    trained_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    pipeline = LatentDiffPipeline.from_pretrained(
        folder / "run" / "pipeline", torch_dtype=torch.bfloat16
    )
    size = {"height": size_px, "width": size_px}
    image = pipeline("a red circle", num_inference_steps=2, seed=0, **size).images[0]
    image.save(folder / "image.png")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    unet_millions = sum(p.numel() for p in pipeline.unet.parameters()) / 1e6
    print(
        json.dumps(
            {
                "benchmark": "sd15_size",
                "method": given.method,
                "resolution": size_px,
                "unet_millions": round(unet_millions, 1),
                "train_and_export_seconds": round(seconds, 1),
                "training_peak_memory_gb": round(trained_peak, 2),
                "peak_memory_gb": round(peak, 2),
                "image": str(folder / "image.png"),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
