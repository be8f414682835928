"""Which images of a folder are made already: those whose stored settings are the ones asked for.

Also writes the folder's metadata.jsonl, with which it is a captioned folder for training, and for
`datasets.load_dataset("imagefolder")`.

Answers for: every setting that an image depends on, compared with the settings in its PNG file:
those of the call, the scheduler, the model with its LoRA, the image and mask to start from. Does
not answer for: what changes an image by rounding alone (batch size, the CPU's fast path, versions).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.canvas import WindowInputs, canvas_size
from latentdiff.pipeline.conditioning.image_condition import ConditionInputs, read_condition
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.files.model_info import image_guidance
from latentdiff.pipeline.image_inputs import ImageInputs, read_image_inputs
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import (
    model_metadata,
    read_image_settings,
    scheduler_metadata,
)
from latentdiff.sampling.prompt_list import ImageJob

TABLE = "metadata.jsonl"

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {  # of what a PNG file leaves out, as not given or older than it
    "negative_prompt": "",
    "guidance_rescale": 0.0,
    "guidance_interval": [0.0, 1.0],
    "strength": None,
    "padding_mask_crop": None,
    "keep_unmasked": False,
    "eta": 0.0,
    "long_prompts": "truncate",
    "prompt_weighting": True,
    "clip_skip": None,
    "lora_scale": None,
    "image_guidance_scale": 1.0,
    "noise_level": None,
    "controlnet_conditioning_scale": None,
    "window_size": None,
    "window_overlap": None,
    "prompt_2": None,
    "negative_prompt_2": None,
    **SizeInputs().settings(),
}


@dataclass(frozen=True)
class ResumeFolder:
    """The settings that the images of a folder share; arguments: of the pipeline's call."""

    pipe: LatentDiffPipeline
    arguments: Mapping[str, Any]

    def is_done(self, path: Path, job: ImageJob) -> bool:
        """Return whether a job's image is there; ValueError where another one has its name."""
        if not path.exists():
            return False
        settings = read_image_settings(path)
        null = {"negative_prompt": self._negative(None)}
        found, wanted = DEFAULTS | null | settings["call"], self._call(job)
        if found["long_prompts"] == checks.OLD_TRUNCATE:
            found["long_prompts"] = "truncate"
        different = [key for key in sorted(wanted) if not _is_same(found.get(key), wanted[key])]
        different += self._other_inputs(settings)
        if not _is_same(settings.get("scheduler"), self._scheduler):
            different.append("scheduler")
        different += _other_model(settings.get("model"), self._model)
        if different:
            raise ValueError(
                f"{path} is an image of another {', '.join(different)}; it is not written over, "
                "choose another folder"
            )
        return True

    def _call(self, job: ImageJob) -> dict[str, Any]:
        return self._shared | {
            "prompt": job.prompt,
            "negative_prompt": self._negative(job.negative_prompt),
            "prompt_2": None if job.prompt_2 == job.prompt else job.prompt_2,
            "negative_prompt_2": (
                None if job.negative_prompt_2 == job.negative_prompt else job.negative_prompt_2
            ),
            **job.sizes.settings(),
            "seed": job.seed,
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
        }

    def _negative(self, text: str | None) -> str | None:
        """Return a negative prompt as it is compared: to SDXL none is not the empty one."""
        return text if self.pipe.is_sdxl else text or ""

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """The settings of every image as a PNG file states them, defaults filled in."""
        given, factor = self.arguments, self.pipe.vae_scale_factor
        asked = given["height"], given["width"]
        height, width = canvas_size(
            asked, self._images, self._condition, unet=self.pipe.unet, factor=factor
        )
        interval = checks.interval("guidance_interval", given["guidance_interval"])
        return DEFAULTS | {
            "height": height,
            "width": width,
            "strength": self._images.strength,
            "padding_mask_crop": self._images.padding_mask_crop,
            "keep_unmasked": self._images.keep_unmasked,
            "guidance_rescale": given["guidance_rescale"],
            "guidance_interval": list(interval),
            "long_prompts": checks.long_prompts(given["long_prompts"]),
            "prompt_weighting": given["prompt_weighting"],
            "clip_skip": given["clip_skip"],
            "lora_scale": given["lora_scale"],
            "image_guidance_scale": self._image_guidance,
            **self._condition.settings(),
            **WindowInputs(given["window_size"], given["window_overlap"]).settings(),
        }

    @property
    def _image_guidance(self) -> float:
        given = self.arguments["image_guidance_scale"]
        if self.pipe.condition_kind != "instruct_pix2pix":
            return 1.0
        return image_guidance(self.pipe.model_info, given)

    @cached_property
    def _condition(self) -> ConditionInputs:
        return read_condition(
            self.arguments["condition"],
            kind=self.pipe.condition_kind,
            info=self.pipe.model_info,
            num_controlnets=len(self.pipe.controlnets),
            noise_level=self.arguments["noise_level"],
            scale=self.arguments["controlnet_conditioning_scale"],
            num_prompts=1,
            num_images=1,
            has_image=self.arguments["image"] is not None,
        )

    @cached_property
    def _images(self) -> ImageInputs:
        return read_image_inputs(
            self.arguments["image"],
            self.arguments["mask_image"],
            strength=self.arguments["strength"],
            num_prompts=1,
            num_images=1,
            needs_mask=self.pipe.condition_kind == "inpaint",
            padding_mask_crop=self.arguments["padding_mask_crop"],
            keep_unmasked=self.arguments["keep_unmasked"],
        )

    @cached_property
    def _inputs(self) -> dict[str, str]:
        given = self._images.digests() | self._condition.digests()
        return {name: digests[0] for name, digests in given.items()}

    @cached_property
    def _scheduler(self) -> Any:
        return json.loads(json.dumps(scheduler_metadata(self.pipe.scheduler), default=str))

    @cached_property
    def _model(self) -> dict[str, Any]:
        return model_metadata(self.pipe)

    def _other_inputs(self, settings: Mapping[str, Any]) -> list[str]:
        """Name the images to start from that are not the ones of before."""
        known = settings.get("inputs")
        found = known if isinstance(known, dict) else {}
        return [
            name
            for name in sorted({"image", "mask_image", *found, *self._inputs})
            if not _is_same(found.get(name), self._inputs.get(name))
        ]


def _other_model(found: Any, model: Mapping[str, Any]) -> list[str]:
    """Name what differs of the model; a number format, by the option that gives it."""
    known = found if isinstance(found, dict) else {}
    if "fingerprint" in known and known["fingerprint"] == model["fingerprint"]:
        return []
    if known.get("vae") != model.get("vae"):
        return ["VAE, --vae"]
    has, takes = (str(one.get("dtype")).removeprefix("torch.") for one in (known, model))
    return ["model"] if has == takes else [f"dtype, --dtype {has}"]


def _is_same(found: Any, wanted: Any) -> bool:
    """Compare JSON values, where true is not 1."""
    return bool(found == wanted) and isinstance(found, bool) == isinstance(wanted, bool)


def write_image_table(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a folder's metadata.jsonl: a row for each image, with its file_name and text.

    Rows of other images that are still there are kept. A table that is not one of ours is left as
    it is, with a warning.
    """
    path = folder / TABLE
    given = {str(row["file_name"]): dict(row) for row in rows}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        known = {str(row["file_name"]): row for row in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is no table of images by file_name, it is left as it is", path)
        return
    kept = {name: row for name, row in known.items() if (folder / name).is_file()} | given
    texts = (json.dumps(kept[name], ensure_ascii=False) + "\n" for name in sorted(kept))
    write_text(path, "".join(texts))
