"""Commands that write models for others: single files, LoRAs, merged, packed, on the Hub."""

from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.cli.command import DTYPE_HELP, add_model, quieten_libraries


def export_single_file_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write a Stable Diffusion 1.x or XL model as one .safetensors file for ComfyUI and A1111."""
    add_model(parser)
    parser.add_argument("--out", type=expanduser, required=True, help="the file to write")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, float16 or bfloat16")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="of a distilled model, fixed in the file; by default the model's own",
    )
    args = parser.parse_args(arguments)
    quieten_libraries()
    from latentdiff.pipeline.files.single_file import stored_usage_hint
    from latentdiff.sampling.conversion import export_single_file

    options = {"dtype": args.dtype, "guidance_scale": args.guidance_scale}
    path = export_single_file(args.model, Path(args.out), **options)
    print(f"wrote {path}")
    _carry_bill(args.model, path, artifact="single_file")
    if hint := stored_usage_hint(path):
        print(f"sample with {hint}")
    print("ComfyUI looks for it in models/checkpoints, A1111 in models/Stable-diffusion")
    return 0


def merge_lora_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Merge one or several LoRA files into a model's folder."""
    add_model(parser, "base")
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
    add_model(parser)
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
    from latentdiff.sampling.release import pack_model

    out = Path(values.pop("out"))
    card = values.pop("card")
    model = values.pop("model")
    sizes = pack_model(model, out, card=card and Path(card), **values)
    _print_sizes(sizes, str(out))
    _carry_bill(model, out, artifact="packed")
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
    _carry_bill(args.run, Path(args.out), artifact="averaged")
    return 0


def lora_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write a LoRA in the names of kohya (ComfyUI, A1111) or of diffusers, from either.

    Reads kohya's, diffusers' and peft's files, DoRA too; each layer acts as strongly as before.
    """
    parser.add_argument("lora", type=expanduser, help="a LoRA file or folder, or a run's folder")
    parser.add_argument("--out", type=expanduser, required=True, help="the .safetensors file")
    parser.add_argument(
        "--format", type=str, default="kohya", help="kohya or diffusers: whose names to write"
    )
    parser.add_argument(
        "--base", type=str, help="the model it was trained for, if it does not tell"
    )
    parser.add_argument("--dtype", type=str, help=DTYPE_HELP)
    args = parser.parse_args(arguments)
    quieten_libraries()
    from latentdiff.sampling.lora_conversion import convert_lora

    options = {"naming": args.format, "base": args.base, "dtype": args.dtype}
    written = convert_lora(args.lora, Path(args.out), **options)
    print(
        f"wrote {written.path}: {written.num_layers} layers in the names of {args.format}, "
        f"for {written.base}"
    )
    _carry_bill(args.lora, written.path, artifact="converted_lora")
    if args.format == "kohya" and (unknown := written.unknown_to_kohya):
        print(f"kohya's own scripts leave out {len(unknown)} of them: {', '.join(unknown)}")
    return 0


def push_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Upload a model, a LoRA or an embedding to the Hugging Face Hub, with its card.

    A README.md that you wrote is its card; otherwise one is made of what the run recorded.
    """
    parser.add_argument("source", type=str, help="a run's folder, a model's, or a LoRA file")
    parser.add_argument("repo_id", type=str, help="OWNER/NAME on the Hub, made if it is not there")
    parser.add_argument("--part", type=str, default="model", help="model, lora or embedding")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, no more")
    parser.add_argument("--image", type=expanduser, help="an image for the top of the card")
    parser.add_argument(
        "--message", type=str, default="Upload with LatentDiff", help="of the commit"
    )
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    args = parser.parse_args(arguments)
    if args.part not in (parts := ("model", "lora", "embedding")):
        raise ValueError(f"--part={args.part}, expected one of {', '.join(parts)}")
    quieten_libraries()
    from latentdiff.sampling import hub_upload

    image = Path(args.image) if args.image else None
    upload = hub_upload.plan_upload(args.source, args.repo_id, part=args.part, image=image)
    sizes = upload.sizes()
    _print_sizes(sizes, f"for {args.repo_id}")
    if args.dry_run:
        print(f"\nnothing is sent; {hub_upload.CARD} would be:\n\n{upload.card}")
        return 0
    options = {"private": args.private or None, "message": args.message}
    print(f"sent: {hub_upload.send(upload, create_pr=args.create_pr, **options)}")
    return 0


def _carry_bill(source: str, out: Path, *, artifact: str) -> None:
    """Write the bill of the source into what was made of it, and print its root."""
    from latentdiff.audit.carried_bill import carry_bill

    if root := carry_bill(source, out, artifact=artifact):
        print(f"root of its bill of materials: {root}")


def _print_sizes(sizes: Mapping[str, int], label: str) -> None:
    """Print the size of each file and, with the label, of all."""
    from latentdiff.sampling.release import MB

    for name, size in sizes.items():
        print(f"{size / MB:8.2f} MB  {name}")
    print(f"{sum(sizes.values()) / MB:8.2f} MB  {label}", flush=True)
