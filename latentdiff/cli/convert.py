"""Commands that convert what other programs wrote into folders: single files, VAEs, open_clip."""

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from jsonargparse import ArgumentParser

from latentdiff.cli.command import DTYPE_HELP, quieten_libraries
from latentdiff.program import program


def convert_single_file_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write a whole Stable Diffusion 1.x, 2.x or XL model of one .safetensors file as a folder.

    For checkpoints of ComfyUI, A1111, kohya's scripts and CivitAI. Nothing is fetched.
    """
    parser.add_argument("file", type=expanduser, help="the .safetensors file")
    parser.add_argument("--out", type=expanduser, required=True, help="the folder to write")
    parser.add_argument(
        "--base", type=str, help="a model of the same layout, where the family's is another"
    )
    parser.add_argument("--vae", type=str, help="a VAE's folder or file, in place of its own")
    parser.add_argument(
        "--prediction_type",
        type=str,
        help="where the file does not state it: epsilon for Stable Diffusion 2's 512 px base "
        "models, v_prediction for models of XL that look washed out",
    )
    parser.add_argument(
        "--zero_terminal_snr", type=bool, help="as the file states it by default; most v models"
    )
    parser.add_argument("--dtype", type=str, help=DTYPE_HELP)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries()
    from latentdiff.sampling.single_files import folder_of_single_file

    file, out = values.pop("file"), Path(values.pop("out"))
    scheduler = folder_of_single_file(file, out, **values).scheduler.config
    zero = " with zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    print(f"wrote {out}, which predicts {scheduler['prediction_type']}{zero}")
    print(f"next: {program()} sample {out} 'a prompt' --out sheet.png")
    return 0


def convert_vae_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Write the VAE of a .safetensors file, alone or of a whole model, as a folder."""
    parser.add_argument("file", type=expanduser, help="the .safetensors file")
    parser.add_argument("--out", type=expanduser, required=True, help="the folder to write")
    parser.add_argument("--base", type=str, help="a model with a VAE of the same layout")
    parser.add_argument(
        "--family",
        type=str,
        help="sd1, sd2 or sdxl, which have VAEs of the same shapes and other scaling factors; "
        "by default a whole model's own, sd1 for a VAE alone",
    )
    parser.add_argument("--scaling_factor", type=float, help="of its latents; the base's (0.18215)")
    parser.add_argument("--dtype", type=str, help=DTYPE_HELP)
    values = parser.parse_args(arguments).as_dict()
    quieten_libraries()
    from latentdiff.sampling.single_files import folder_of_vae

    out = folder_of_vae(values.pop("file"), Path(values.pop("out")), **values)
    print(f"wrote {out}\nnext: {program()} train ... --model.vae={out}")
    return 0


def convert_open_clip_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Convert the text encoder of an open_clip model to a text_encoder and a tokenizer folder."""
    parser.add_argument("name", type=str, help="the model's name in open_clip, such as ViT-H-14")
    parser.add_argument("weights", type=expanduser, help="its weights, a .safetensors file")
    parser.add_argument(
        "place", type=expanduser, nargs="?", metavar="OUT", help="the same as --out"
    )
    parser.add_argument("--out", type=expanduser, help="folder for text_encoder/ and tokenizer/")
    args = parser.parse_args(arguments)
    if not (place := args.out or args.place):
        raise ValueError("expected --out, the folder for text_encoder/ and tokenizer/")
    quieten_libraries()
    from latentdiff.atomic import atomic_files
    from latentdiff.models.open_clip import load_open_clip
    from latentdiff.models.save import save_component

    text_encoder, tokenizer = load_open_clip(args.name, Path(args.weights))
    for part, name in ((text_encoder, "text_encoder"), (tokenizer, "tokenizer")):
        with atomic_files(Path(place) / name) as folder:
            save_component(part, folder)
    print(f"wrote {place}/text_encoder (width {text_encoder.config.hidden_size}) and tokenizer")
    return 0
