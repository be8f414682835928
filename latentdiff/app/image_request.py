"""What the page asks for: the settings of an image, checked one by one, and read from PNG files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image, ImageOps

from latentdiff.app.library import NO_CONTROLNET, NO_LORA
from latentdiff.app.model_facts import OWN_SCHEDULER, OWN_VAE, TINY, ModelFacts
from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.canvas import WindowInputs
from latentdiff.pipeline.conditioning.prompt import parse_prompt
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.png_metadata import TINY_VAE
from latentdiff.pipeline.schedulers import scheduler_name

MAX_STEPS, MAX_IMAGES, MAX_CHARACTERS = 150, 4, 2000
TEXT, IMAGE, INPAINT, CONDITION = "text", "image", "inpaint", "condition"  # the page's tabs
MAXIMA = {"num_images_per_prompt": MAX_IMAGES, "num_inference_steps": MAX_STEPS}
RANGES = {  # of numbers: the lowest and highest
    "guidance_scale": (0.0, 30.0),
    "guidance_rescale": (0.0, 1.0),
    "lora_scale": (-2.0, 2.0),
    "strength": (0.05, 1.0),
    "window_overlap": (0.0, 0.95),
}
CONTROL_SCALE = "controlnet_conditioning_scale"
CONDITION_RANGES = {
    "image_guidance_scale": (1.0, 10.0),
    "noise_level": (0, 350),
    CONTROL_SCALE: (0.0, 2.0),
}
LONG_PROMPTS = ("truncate", "chunks")
SECOND_TEXTS = ("prompt_2", "negative_prompt_2")
SIZES = tuple(field.name for field in fields(SizeInputs))
OF_SDXL = (*SECOND_TEXTS, *SIZES)
PAIR = re.compile(r"\s*(\d{1,8})\s*[x×,]\s*(\d{1,8})\s*", re.ASCII)


@dataclass(frozen=True)
class ImageRequest:
    """Settings of one call, under the names of the pipeline's arguments.

    model, lora, controlnet: names in the library. kind: TEXT, IMAGE, INPAINT or CONDITION. seed: as
    typed, "" for a random one. windows: the image is made in windows of the trained size. strength
    to controlnet_conditioning_scale: None where the kind has no use for them; keep_unmasked: of an
    image, all but the painted part stays. The last eight are read by SDXL alone, the sizes as
    typed, "width x height"; "" for the default.
    """

    model: str = ""
    kind: str = TEXT
    prompt: str = ""
    negative_prompt: str = ""
    seed: str = ""
    num_images_per_prompt: int = 1
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    width: int = 512
    height: int = 512
    scheduler: str = OWN_SCHEDULER
    vae: str = OWN_VAE
    lora: str = NO_LORA
    lora_scale: float = 1.0
    clip_skip: int = 0
    long_prompts: str = "truncate"
    prompt_weighting: bool = True
    windows: bool = False
    window_overlap: float = WindowInputs.window_overlap
    strength: float | None = None
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    keep_unmasked: bool | None = None
    condition: Image.Image | None = None
    image_guidance_scale: float | None = None
    noise_level: int | None = None
    controlnet: str = NO_CONTROLNET
    controlnet_conditioning_scale: float | None = None
    prompt_2: str = ""
    negative_prompt_2: str = ""
    original_size: str = ""
    crops_coords_top_left: str = ""
    target_size: str = ""
    negative_original_size: str = ""
    negative_crops_coords_top_left: str = ""
    negative_target_size: str = ""

    def arguments(self, facts: ModelFacts) -> dict[str, Any]:
        """Return the arguments of a model's call; images are cropped to the size."""
        own = {"model", "kind", "scheduler", "vae", "lora", "controlnet", "seed", *OF_SDXL}
        own |= {"windows", "window_overlap", "keep_unmasked"}
        others = own | {"image", "mask_image", "strength", "condition", *CONDITION_RANGES}
        call = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        call["negative_prompt"] = self.negative_prompt or None
        call["clip_skip"] = None if self.clip_skip == facts.clip_skip else self.clip_skip
        call["lora_scale"] = None if self.lora == NO_LORA else self.lora_scale
        call["seed"] = int(self.seed) if self.seed.strip() else None
        size = self.width, self.height
        if self.image is not None:
            call["image"] = _fitted(self.image, size)
            call["strength"] = self.strength
            if self.mask_image is not None:
                nearest = Image.Resampling.NEAREST
                call["mask_image"] = ImageOps.fit(self.mask_image, size, nearest)
                call["padding_mask_crop"] = max(size) if self.keep_unmasked else None
                call["keep_unmasked"] = bool(self.keep_unmasked)
        call |= self._of_condition(facts)
        if self.windows and max(call["width"], call["height"]) > facts.window_px:
            call |= {"window_size": facts.window_px, "window_overlap": self.window_overlap}
        return call | (self._of_sdxl() if facts.is_sdxl else {})

    @property
    def has_controlnet(self) -> bool:
        """Whether a ControlNet is asked for."""
        return self.kind == CONDITION and self.controlnet != NO_CONTROLNET

    def _of_condition(self, facts: ModelFacts) -> dict[str, Any]:
        """Return the condition and its arguments; an upscaler's is enlarged as it is."""
        call: dict[str, Any] = {}
        if self.condition is not None and facts.condition_kind == "upscale":
            low_res = ImageOps.exif_transpose(self.condition)
            call = {name: getattr(low_res, name) * facts.multiple for name in ("width", "height")}
            call["condition"] = low_res
        elif self.condition is not None:
            call["condition"] = _fitted(self.condition, (self.width, self.height))
        if facts.condition_kind == "instruct_pix2pix":
            call["image_guidance_scale"] = self.image_guidance_scale
        if facts.condition_kind == "upscale":
            call["noise_level"] = self.noise_level
        if self.has_controlnet:
            call[CONTROL_SCALE] = self.controlnet_conditioning_scale
        return call

    def _of_sdxl(self) -> dict[str, Any]:
        """Return the arguments of SDXL; a second negative prompt needs a first one, if empty."""
        call: dict[str, Any] = {name: getattr(self, name) or None for name in SECOND_TEXTS}
        if self.negative_prompt_2:
            call["negative_prompt"] = self.negative_prompt
        return call | {name: read_pair(getattr(self, name)) for name in SIZES}


def read_pair(text: str) -> tuple[int, int] | None:
    """Return (height, width) of "width x height" as people type it, None of nothing.

    Of a corner (top, left) of "left x top". ValueError for another text.
    """
    if not text.strip():
        return None
    if (found := PAIR.fullmatch(text)) is None:
        raise ValueError(f"expected two numbers of pixels such as 1024 x 768, got {text.strip()!r}")
    return int(found[2]), int(found[1])


def _pair_text(value: object) -> object:
    """Return [height, width] as it is typed; any other value as it is."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[1]} x {value[0]}"
    return value


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image upright, cropped and resized to (width, height)."""
    is_multiple = image.width % size[0] == image.height % size[1] == 0
    method = Image.Resampling.BOX if is_multiple else Image.Resampling.LANCZOS
    return ImageOps.fit(ImageOps.exif_transpose(image), size, method)


def find_problems(request: ImageRequest, facts: ModelFacts) -> dict[str, str]:
    """Return what is wrong with a request by field, in words for the person who typed it."""
    found = _size_problems(request) if facts.is_sdxl else {}
    for name in ("prompt", "negative_prompt", *(SECOND_TEXTS if facts.is_sdxl else ())):
        if message := _prompt_problem(getattr(request, name), weighted=request.prompt_weighting):
            found[name] = message
    if not request.prompt.strip() and request.kind not in (INPAINT, CONDITION):
        found["prompt"] = "say what to draw, or choose an example"
    seed = request.seed.strip()
    if seed and not (seed.isdecimal() and seed.isascii() and int(seed) <= checks.MAX_SEED):
        found["seed"] = f"expected a whole number from 0, or nothing for a random one; got {seed!r}"
    for name in ("width", "height"):
        side, multiple = getattr(request, name), facts.multiple
        maximum = facts.max_side(in_windows=request.windows)
        if side % multiple or not multiple <= side <= maximum:
            expected = f"a multiple of {multiple} up to {maximum}"
            found[name] = f"expected {expected}, got {side:g}"
    if request.vae not in facts.vaes:
        found["vae"] = f"{facts.name} carries no {request.vae} one"
    counts = {name: (1, maximum) for name, maximum in MAXIMA.items()}
    ranges = RANGES | CONDITION_RANGES | {"noise_level": (0, facts.max_noise_level)}
    if facts.image_guidance_scale == 1:
        ranges["image_guidance_scale"] = 1, 1
    for name, (low, high) in (ranges | counts | {"clip_skip": (0, facts.max_clip_skip)}).items():
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            found[name] = f"expected {low:g} to {high:g}, got {value:g}"
    return found | _image_problem(request, facts)


def _size_problems(request: ImageRequest) -> dict[str, str]:
    """Return what is wrong with the sizes that SDXL is told, by field."""
    found = {}
    for name in SIZES:
        try:
            SizeInputs(**{name: read_pair(getattr(request, name))}).checked(is_sdxl=True)
        except ValueError as error:
            found[name] = str(error)
    return found


def _image_problem(request: ImageRequest, facts: ModelFacts) -> dict[str, str]:
    reads_condition = facts.condition_kind not in ("none", "inpaint")
    if request.kind == CONDITION:
        return _condition_problem(request, facts, reads_condition=reads_condition)
    if reads_condition or (facts.condition_kind == "inpaint" and request.kind != INPAINT):
        reads = CONDITION_KINDS[facts.condition_kind].reads
        tab = "Condition" if reads_condition else "Inpaint"
        return {"prompt": f"{facts.name} reads {reads} too: go to the tab {tab}"}
    if request.kind != TEXT and request.image is None:
        return {"image": "upload an image to start from"}
    if request.kind == INPAINT and request.mask_image is None:
        return {"image": "paint over the part to be replaced"}
    return {}


def _condition_problem(
    request: ImageRequest, facts: ModelFacts, *, reads_condition: bool
) -> dict[str, str]:
    condition = request.condition
    if request.has_controlnet and facts.condition_kind != "none":
        reads = CONDITION_KINDS[facts.condition_kind].reads
        return {
            "controlnet": f"{facts.name} reads {reads}, and a ControlNet steers models of text "
            f"alone: choose {NO_CONTROLNET}"
        }
    if not reads_condition and not request.has_controlnet:
        other = "" if facts.condition_kind == "inpaint" else " a ControlNet or"
        return {"condition": f"{facts.name} reads no such image; choose{other} a model that does"}
    if condition is None:
        return {"condition": "upload the image to read"}
    side = facts.max_side(in_windows=request.windows) // facts.multiple
    if facts.condition_kind != "upscale" or max(condition.size) <= side:
        return {}
    width, height = condition.size
    return {
        "condition": f"{width} x {height} pixels are too large to be enlarged {facts.multiple} "
        f"times here, expected at most {side} a side"
        f"{'' if request.windows else ', or more in windows'}"
    }


def _prompt_problem(text: str, *, weighted: bool) -> str:
    if len(text) > MAX_CHARACTERS:
        return f"{len(text)} characters are too many, at most {MAX_CHARACTERS}"
    try:
        parse_prompt(text, weighting=weighted)
    except ValueError as error:
        return str(error)
    return ""


def request_from_settings(
    settings: Mapping[str, Any],
    now: ImageRequest,
    *,
    facts: ModelFacts,
    loras: Collection[str],
) -> tuple[ImageRequest, list[str]]:
    """Return the request that a PNG file's settings state, and sentences on what is not taken.

    now: the request on the page, whose other settings stay. The kind becomes TEXT, as a file has
    no image to start from.
    """
    call = settings.get("call")
    given = call if isinstance(call, dict) else {}
    taken: dict[str, Any] = {"kind": TEXT, "num_images_per_prompt": 1, "negative_prompt": ""}
    taken["windows"] = given.get("window_size") == facts.window_px  # before the sizes they allow
    for name in (*MAXIMA, *RANGES, "prompt", "negative_prompt", "width", "height", "clip_skip"):
        if name in given and name != "strength":
            taken[name] = given[name]
    taken["seed"] = str(given.get("seed", ""))
    for name in ("guidance_rescale", "long_prompts", "prompt_weighting", "window_overlap"):
        taken[name] = given.get(name, getattr(DEFAULTS, name))
    taken["clip_skip"] = given.get("clip_skip", facts.clip_skip)
    notes = _take_of_sdxl(given, taken, facts=facts)
    notes += _take_scheduler(settings.get("scheduler"), taken, facts=facts)
    model = settings.get("model")
    is_tiny = isinstance(model, dict) and model.get("vae") == TINY_VAE
    taken["vae"] = TINY if is_tiny else OWN_VAE
    notes += _take_loras(settings.get("loras"), taken, loras=loras)
    others = [*CONDITION_RANGES, *([] if taken["windows"] else ["window_size"])]
    if conditional := [
        f"{name.replace('_', ' ')} {given[name]}" for name in others if name in given
    ]:
        notes.append(f"made with {', '.join(conditional)}, which are not taken")
    if settings.get("inputs") or "strength" in given:
        notes.append("the image it was made from is not in the file")
    return _fitting(now, taken, facts=facts, notes=notes), notes


def _take_of_sdxl(
    given: Mapping[str, Any], taken: dict[str, Any], *, facts: ModelFacts
) -> list[str]:
    names = [name for name in OF_SDXL if name in given]
    if facts.is_sdxl:
        taken |= dict.fromkeys(OF_SDXL, "")
        taken |= {name: _pair_text(given[name]) for name in names}
    elif names:
        return [f"{', '.join(names).replace('_', ' ')}: {facts.name}, which is not SDXL, has none"]
    return []


def _take_scheduler(value: object, taken: dict[str, Any], *, facts: ModelFacts) -> list[str]:
    taken["scheduler"] = OWN_SCHEDULER
    if not isinstance(value, dict):
        return []
    name = scheduler_name(value)
    if name in facts.schedulers:
        taken["scheduler"] = name
        return []
    label = name or value.get("name") or value.get("class")
    return [f"scheduler {label} is not available for this model; its own is taken"]


def _take_loras(value: object, taken: dict[str, Any], *, loras: Collection[str]) -> list[str]:
    taken["lora"] = NO_LORA
    names = list(value) if isinstance(value, Mapping) else []
    if not names:
        return []
    assert isinstance(value, Mapping)
    if len(names) == 1 and names[0] in loras:
        taken |= {"lora": names[0], "lora_scale": value[names[0]]}
        return []
    return [f"LoRA {', '.join(map(str, names))} is not in the list"]


def _fitting(
    now: ImageRequest, taken: dict[str, Any], *, facts: ModelFacts, notes: list[str]
) -> ImageRequest:
    """Return the request with those values that the page can hold; note the others."""
    request = now
    for name, value in taken.items():
        if not _is_of_type(value, getattr(DEFAULTS, name)):
            notes.append(f"{name.replace('_', ' ')}: {value!r:.40} is no value of it")
            continue
        tried = replace(request, **{name: value})
        problem = find_problems(tried, facts).get(name)
        if problem and not (name == "prompt" and value == ""):
            notes.append(f"{name.replace('_', ' ')}: {problem}")
        else:
            request = tried
    return request


def _is_of_type(value: object, default: object) -> bool:
    if default in LONG_PROMPTS:
        return value in LONG_PROMPTS
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


DEFAULTS = ImageRequest()
