"""Commands that convert models: single files, merged LoRAs, small folders, EMAs, open_clip."""

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.cli.command import quieten_libraries


def export_single_file_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write a Stable Diffusion 1.x folder as one .safetensors file for ComfyUI and A1111."""
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--out", type=expanduser, required=True, help="the file to write")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, float16 or bfloat16")
    args = parser.parse_args(arguments)
    quieten_libraries()
    from latentdiff.sampling.conversion import export_single_file

    print(f"wrote {export_single_file(args.model, Path(args.out), dtype=args.dtype)}")
    return 0


def merge_lora_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Merge one or several LoRA files into a model's folder."""
    parser.add_argument("base", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument(
        "loras", type=expanduser, nargs="+", help="LoRA files or folders, diffusers' or kohya's"
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="one a LoRA; 1 each")
    parser.add_argument("--safety_checker", type=bool, default=True, help="false leaves it out")
    parser.add_argument("--out", type=expanduser, required=True, help="the folder to write")
    args = parser.parse_args(arguments)
    quieten_libraries()
    from latentdiff.sampling.conversion import merge_loras

    options = {"weights": args.weights, "safety_checker": args.safety_checker}
    print(f"wrote {merge_loras(args.base, args.loras, Path(args.out), **options)}")
    return 0


def pack_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write a model small: in half precision, in shards, without a path of this machine."""
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_argument("--out", type=expanduser, required=True, help="the folder to write")
    parser.add_argument("--dtype", type=str, default="float16", help="float16, bfloat16 or float32")
    parser.add_argument("--max_file_mb", type=float, default=14.0, help="of any one file")
    parser.add_argument("--max_total_mb", type=float, default=45.0, help="of all files together")
    parser.add_argument("--guidance_scale", type=float, help="the model's default from then on")
    parser.add_argument(
        "--card", type=expanduser, help="its README.md; by default made of its settings"
    )
    parser.add_argument("--safety_checker", type=bool, default=True, help="false leaves it out")
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries()
    from latentdiff.sampling.release import MB, pack_model

    out = Path(values.pop("out"))
    card = values.pop("card")
    sizes = pack_model(values.pop("model"), out, card=card and Path(card), **values)
    for name, size in sizes.items():
        print(f"{size / MB:8.2f} MB  {name}")
    print(f"{sum(sizes.values()) / MB:8.2f} MB  {out}")
    return 0


def reconstruct_ema_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write a run's model with the weights' EMA of any width, from the snapshots in power_ema/."""
    parser.add_argument(
        "run", type=expanduser, help="the folder of a run with train.posthoc_ema_sigma_rel"
    )
    parser.add_argument("--width", type=float, required=True, help="sigma_rel, such as 0.08")
    parser.add_argument("--step", type=int, help="a snapshot's step; by default the last")
    parser.add_argument("--out", type=expanduser, required=True, help="the folder to write")
    args = parser.parse_args(arguments)
    quieten_libraries()
    from latentdiff.training.text_to_image.export import export_reconstructed

    export_reconstructed(Path(args.run), Path(args.out), width=args.width, step=args.step)
    print(f"wrote {args.out} with the average of width {args.width}")
    return 0


def convert_open_clip_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Convert the text encoder of an open_clip model to a text_encoder and a tokenizer folder."""
    parser.add_argument("name", type=str, help="the model's name in open_clip, such as ViT-H-14")
    parser.add_argument("weights", type=expanduser, help="its weights, a .safetensors file")
    parser.add_argument("out", type=expanduser, help="folder for text_encoder/ and tokenizer/")
    args = parser.parse_args(arguments)
    quieten_libraries()
    from latentdiff.atomic import atomic_files
    from latentdiff.models.open_clip import load_open_clip
    from latentdiff.models.save import save_component

    text_encoder, tokenizer = load_open_clip(args.name, Path(args.weights))
    for part, name in ((text_encoder, "text_encoder"), (tokenizer, "tokenizer")):
        with atomic_files(Path(args.out) / name) as folder:
            save_component(part, folder)
    print(f"wrote {args.out}/text_encoder (width {text_encoder.config.hidden_size}) and tokenizer")
    return 0
