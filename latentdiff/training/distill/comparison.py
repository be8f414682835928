"""Stages of a distillation, and the comparison of their students with the first teacher.

The teacher's images are generated once. A report that is there already, of the same options and of
the student that is there now, is not measured again. Does not answer for: the scores
(evaluation/compare_student.py), or what follows from them (stages.py).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from latentdiff.atomic import atomic_file, write_text
from latentdiff.config.options import DistillOptions, EvalModelOptions, EvaluationOptions
from latentdiff.config.text_to_image import Config
from latentdiff.device import choose_device
from latentdiff.evaluation.compare_student import StudentReport, compare_student, generate_and_save
from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metric_nets import MetricNets, load_metric_nets
from latentdiff.image_grid import draw_grid
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.model_path import read_model_configs, resolve_model
from latentdiff.pipeline.files.model_info import default_guidance, read_model_info
from latentdiff.sampling.open_pipeline import open_pipeline
from latentdiff.training.distill.teacher_images import generate_teacher_images
from latentdiff.training.inputs.encode import caption_transform, unique_captions
from latentdiff.training.inputs.sources import read_data

logger = logging.getLogger(__name__)
REPORT, SHEET = "report.json", "comparison.png"
SHEET_IMAGES = 8  # of the teacher and of each student


@dataclass(frozen=True)
class Stage:
    """A stage by the name of its folder, and the run that it is."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def model(self) -> Path:
        """The folder of its student."""
        return self.folder / "pipeline"


class StudentComparison:
    """Compares students with the first teacher; its images are generated once."""

    def __init__(self, template: Config, options: DistillOptions) -> None:
        self.template, self.options = template, options
        self.out = Path(template.output_dir).expanduser()
        distill = template.distill
        unet = read_model_configs(template.model.pretrained).get("unet", {})
        info = read_model_info(resolve_model(template.model.pretrained))
        own = default_guidance(info, is_sdxl=reads_time_ids(unet))
        within = min(max(own, distill.min_guidance), distill.max_guidance)
        self.scale = within if options.guidance_scale is None else options.guidance_scale
        self._teacher: GeneratedImages | None = None
        self._nets: MetricNets | None = None

    def report(self, stage: Stage, accelerator: Accelerator) -> dict[str, Any]:
        """Return a stage's report, which is measured where no earlier one is of these options.

        All processes call it; the main one measures.
        """
        path = stage.folder / REPORT
        options = asdict(self.options) | {"guidance_scale": self.scale}
        if accelerator.is_main_process and not _is_of(path, options, stage):
            report = self.measure(stage)
            write_text(path, json.dumps({"options": options} | report.to_json(), indent=2) + "\n")
        accelerator.wait_for_everyone()
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if accelerator.is_main_process:
            for line in found["text"]:
                logger.info("stage %s, %s", stage.name, line)
        return found

    def measure(self, stage: Stage) -> StudentReport:
        """Generate images with teacher and student, and compare them."""
        options, model = self.options, self.template.model.pretrained
        if self._teacher is None:
            self._teacher = self._generate(model, self.out / "teacher", options.teacher_num_steps)
            scoring = EvaluationOptions(
                clip=options.clip, clip_weights=options.clip_weights, features=options.features
            )
            self._nets = load_metric_nets(scoring, EvalModelOptions(""))
        assert self._nets is not None
        student = self._generate(
            str(stage.model), stage.folder / "images", stage.config.distill.num_steps
        )
        return compare_student(
            self._teacher,
            student,
            nets=self._nets,
            max_accuracy_loss=options.max_accuracy_loss,
            max_clip_loss=options.max_clip_loss,
            max_distance=options.max_distance,
            batch_size=options.measure_batch_size,
            device=choose_device(),
        )

    def _generate(self, model: str, folder: Path, num_steps: int) -> GeneratedImages:
        pipe = open_pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        scale = 1.0 if pipe.model_info.is_guided else self.scale
        return generate_and_save(
            pipe,
            self.captions,
            folder,
            num_inference_steps=num_steps,
            guidance_scale=scale,
            batch_size=self.options.measure_batch_size,
        )

    def generate_teacher_images(self, accelerator: Accelerator) -> None:
        """Generate the teacher's images to train on, by the main process."""
        if accelerator.is_main_process:
            generate_teacher_images(
                self.template,
                self._known_captions[1] or self._known_captions[0],
                num=self.options.teacher_images,
                num_steps=self.options.teacher_num_steps,
                guidance_scale=self.scale,
                batch_size=self.options.measure_batch_size,
            )
        accelerator.wait_for_everyone()

    @cached_property
    def _known_captions(self) -> tuple[list[str], list[str]]:
        """Different captions of the held-out images, and of the others."""
        data, prompts = self.template.data, self.template.finetune.instance_prompts
        train_folder, heldout = read_data(data, prompts=prompts, trust_index=True)
        transform = caption_transform(data)
        first, second = (unique_captions([one], transform) for one in (heldout, train_folder))
        return list(dict.fromkeys(first)), list(dict.fromkeys(second))

    @cached_property
    def captions(self) -> list[str]:
        """Captions of the images, evenly spaced over the held-out ones, then over the others."""
        chosen: list[str] = []
        for known in self._known_captions:
            texts = [text for text in known if text not in chosen]
            num = min(self.options.num_images - len(chosen), len(texts))
            chosen += [texts[len(texts) * k // num] for k in range(num)]
        while len(chosen) < self.options.num_images:  # few captions get several seeds each
            chosen += chosen[: self.options.num_images - len(chosen)]
        return chosen

    def write_sheet(self, stages: Sequence[Stage]) -> None:
        """Write comparison.png: a row of the teacher's images, and one of each student's."""
        num = min(SHEET_IMAGES, len(self.captions))
        places = [len(self.captions) * k // num for k in range(num)]
        rows = [(self.out / "teacher", f"teacher, {self.options.teacher_num_steps} steps")]
        for stage in stages:
            num_steps = stage.config.distill.num_steps
            rows.append((stage.folder / "images", f"{stage.name}, {num_steps} steps"))
        images, labels = [], []
        for folder, label in rows:
            for k in places:
                with Image.open(folder / f"{k:04d}-0.png") as image:
                    images.append(image.convert("RGB"))
                labels.append(f"{label}: {self.captions[k]}")
        with atomic_file(self.out / SHEET) as temporary:
            draw_grid(images, labels, columns=num).save(temporary, format="PNG")


def _is_of(path: Path, options: dict[str, Any], stage: Stage) -> bool:
    """Tell whether a report is of these options and of the student that is there now."""
    if not path.is_file():
        return False
    if path.stat().st_mtime < (stage.model / "model_index.json").stat().st_mtime:
        return False
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["options"]
    return found == options
