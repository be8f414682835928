"""Which kind of weights a file holds, and for which model family, by names and shapes alone.

For messages: a file of the wrong kind is named as what it is, with the function that opens it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from latentdiff.models.weights import Shape

# by names, the first that fits; Stable Diffusion 1 and 2 have the names that are left
FAMILIES = (
    ("Flux", r"(double|single)_blocks[._]\d|single_transformer_blocks"),
    (
        "Stable Diffusion 3",
        r"joint_(transformer_)?blocks|te3_|text_encoder_3|diffusion_model\.x_emb",
    ),
    (
        "a diffusion transformer",
        r"(^|[._])transformer\.(transformer_)?blocks|unet_blocks_\d|l\.blocks\.",
    ),
    (
        "Stable Diffusion XL",
        r"te2_|text_encoder_2|clip_g|conditioner\.embed|label_emb|add_embedding"
        r"|transformer_blocks[._][1-9]",
    ),
)
WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "Stable Diffusion XL",  # of its second text encoder alone
    2048: "Stable Diffusion XL",
}


@dataclass(frozen=True)
class FileKind:
    """A kind of weights: its noun, and how such a file is opened."""

    noun: str
    opening: str


LORA = FileKind("a LoRA", "open it with pipe.load_lora_weights")
EMBEDDING = FileKind(
    "an embedding of textual inversion", "open it with pipe.load_textual_inversion"
)
WHOLE = FileKind("a whole model", "open it with LatentDiffPipeline.from_single_file")
OTHER = FileKind("no model that is known here", "check which program it is for")
IN_FOLDER = "open the folder that it belongs to with LatentDiffPipeline.from_pretrained"
CONTROL = FileKind("a ControlNet", "ControlNets are not supported here")
KINDS = (
    (LORA, r"lora|\.hada_|\.lokr_|\.oft_|\.dora_scale$"),
    (CONTROL, r"control_model|control_?net|zero_conv"),
    (EMBEDDING, r"^emb_params$|^clip_[lg]$|^string_to_param$|^<.*>$"),
    (WHOLE, r"^model\.diffusion_model\.|^(double|joint)_blocks\."),
    (FileKind("a U-Net alone", IN_FOLDER), r"^(down_blocks|mid_block|up_blocks)\."),
    (
        FileKind("a VAE alone", IN_FOLDER),
        r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid)",
    ),
    (FileKind("a text encoder alone", IN_FOLDER), r"text_model\.|^transformer\.resblocks"),
)


def kind_of(names: Iterable[str]) -> FileKind:
    """Return the kind of a file with tensors of these names."""
    every = list(names)
    for kind, pattern in KINDS:
        if any(re.search(pattern, name) for name in every):
            return kind
    return EMBEDDING if len(every) == 1 else OTHER


def family_of(shapes: Mapping[str, Shape]) -> str | None:
    """Return the family of models that tensors of these names and shapes are for, if it shows."""
    for family, pattern in FAMILIES:
        if any(re.search(pattern, name) for name in shapes):
            return family
    keys = r"attn2[._]to_[kv](_lora)?\.(lora_A|lora_down|down|weight)"  # the prompt comes in there
    for name, shape in shapes.items():
        if re.search(keys, name) and len(shape) > 1 and shape[1] in WIDTHS:
            return WIDTHS[shape[1]]
    return None


def describe(shapes: Mapping[str, Shape]) -> str:
    """Return what a file holds and how it is opened, such as "a LoRA for Flux; open it ..."."""
    kind, family = kind_of(shapes), family_of(shapes)
    noun = f"{kind.noun} for {family}" if family and kind is not OTHER else kind.noun
    return f"{noun}: {kind.opening}"
