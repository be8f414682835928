"""Distillation from top to bottom: plan, train each stage, measure it, export.

A stage is an ordinary text-to-image run in stages/NAME, which `latentdiff train --config
stages/NAME/config.yaml` continues alone; its EMA teaches the next. What is done is not done again,
so a run that was stopped anywhere continues, bit for bit. Does not answer for: what a student
learns (objective.py), how it is compared with the first teacher (comparison.py).
"""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.atomic import atomic_file, atomic_folder, write_text
from latentdiff.config.io import load_stored_config
from latentdiff.config.options import STUDENT_STEPS, DistillOptions
from latentdiff.config.text_to_image import Config
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_card import class_of_folder, folder_title, model_card
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info, write_model_info
from latentdiff.training.bill.contents import attach_again
from latentdiff.training.distill.comparison import REPORT, Stage, StudentComparison
from latentdiff.training.distill.teacher_images import data_of_teacher
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.text_to_image.components import check_components
from latentdiff.training.text_to_image.resolution import with_resolution
from latentdiff.training.text_to_image.train_t2i import train

logger = logging.getLogger(__name__)
GUIDED_SHARE = 5 / 32  # of the images of the teacher's last training
HALVING_SHARES = dict(zip(STUDENT_STEPS, (1 / 32, 2 / 32, 3 / 32, 4 / 32, 6 / 32), strict=True))
COST = 5 / 3  # forward units of an image, next to plain training: the teacher predicts twice
LCM_COST = 6 / 3  # the target is one more
ADAPTERS = ("lora", "lora_kohya.safetensors")  # of an LCM-LoRA


def distill(template: Config, options: DistillOptions) -> int:
    """Distil template.model.pretrained to options.steps; return the exit status.

    0: done; 1: a stage was worse than the teacher, and the one before is exported, if any; 143 or
    130: stopped, all state saved. Writes stages/, teacher/ (images), report.json, comparison.png
    and pipeline/ into template.output_dir. ValueError or FileNotFoundError for bad input, before
    heavy work.
    """
    options.check()
    stages = plan_stages(template, options)
    check_components(stages[0].config)
    accelerator = start_accelerator(template)
    is_main = accelerator.is_main_process
    if is_main:
        for line in plan_lines(stages, _info(template)):
            logger.info("%s", line)
    comparison = StudentComparison(template, options)
    if options.teacher_images:
        comparison.generate_teacher_images(accelerator)
    kept: Stage | None = None
    reports: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        before = stages[number - 1] if number else None
        if not is_done(stage, after=before) and (status := train(stage.config)):
            return status
        reports[stage.name] = report = comparison.report(stage, accelerator)
        if report["is_worse"]:
            break
        kept = stage
    is_whole = kept is stages[-1]
    if is_main:
        _write_result(template, kept, reports, asked=options.steps)
        comparison.write_sheet(stages[: len(reports)])
    accelerator.wait_for_everyone()
    return 0 if is_whole else 1


def plan_stages(template: Config, options: DistillOptions) -> list[Stage]:
    """Return the stages: guidance first, then halvings from 16 steps to those asked for.

    lcm_lora has one stage, its adapter. ValueError where the teacher does not say how long it was
    trained and no steps are given.
    """
    template = with_resolution(template)
    out = Path(template.output_dir).expanduser()
    if options.teacher_images:
        template = replace(template, data=data_of_teacher(template.data, out))
    if options.method == "lcm_lora":
        return [_lora_stage(template, options)]
    lengths = _lengths(template, options)
    teacher = str(resolve_model(template.model.pretrained))
    stages: list[Stage] = []
    for number, (count, max_steps) in enumerate(lengths.items()):
        name = f"{number}-{count}" if number else "0-guided"
        distill = replace(
            template.distill, method="progressive" if number else "guided", num_steps=count
        )
        config = replace(
            template,
            output_dir=str(out / "stages" / name),
            model=replace(template.model, pretrained=teacher),
            distill=distill,
            train=replace(template.train, max_steps=max_steps, seed=template.train.seed + number),
            preview=replace(template.preview, num_steps=count),
        )
        stages.append(Stage(name, config))
        teacher = str(stages[-1].model)
    return stages


def _lengths(template: Config, options: DistillOptions) -> dict[int, int]:
    """Return the optimiser steps of each stage by its student's sampling steps, first to last."""
    guided, halving, teacher = options.guided_steps, options.halving_steps, _info(template)
    if not (guided and halving) and not teacher.steps:
        raise ValueError(
            f"{template.model.pretrained} does not say how many steps it was trained for, of which "
            "a stage takes a share; give --guided_steps and --halving_steps, such as 2000 and 1000"
        )
    batch_size = template.train.batch_size
    known = (teacher.steps or 0) * (teacher.batch_size or batch_size) / batch_size
    lengths = {2 * STUDENT_STEPS[0]: guided or max(1, int(known * GUIDED_SHARE))}
    for count in STUDENT_STEPS:
        if count >= options.steps:
            lengths[count] = halving or max(1, int(known * HALVING_SHARES[count]))
    return lengths


def _lora_stage(template: Config, options: DistillOptions) -> Stage:
    out, teacher = Path(template.output_dir).expanduser(), template.model.pretrained
    config = replace(
        template,
        output_dir=str(out / "stages" / "lcm-lora"),
        model=replace(template.model, pretrained=str(resolve_model(teacher))),
        distill=replace(template.distill, method="lcm_lora", num_steps=options.steps),
        train=replace(template.train, max_steps=options.lora_steps),
        preview=replace(template.preview, num_steps=options.steps, guidance_scale=1.0),
    )
    return Stage("lcm-lora", config)


def plan_lines(stages: list[Stage], teacher: ModelInfo) -> list[str]:
    """Return the plan for a person: what each stage takes, and the cost of all."""
    lines, total = ["stages, each measured against the first teacher:"], 0
    batch_size = stages[0].config.train.batch_size
    unit = LCM_COST if stages[0].config.distill.method == "lcm_lora" else COST
    for stage in stages:
        train, distill = stage.config.train, stage.config.distill
        total += train.max_steps
        lines.append(
            f"  {stage.name:9} {train.max_steps:,} steps, learning rate {train.learning_rate:.2g}: "
            f"a student of {distill.num_steps} sampling steps"
        )
    cost = f"in all {total:,} steps of {batch_size} images, as costly as {round(unit * total):,}"
    cost += " of plain training"
    if teacher.steps:
        cost += f"; the teacher's last training had {teacher.steps:,}"
        cost += f" of {teacher.batch_size} images" if teacher.batch_size else ""
    return [*lines, cost]


def is_done(stage: Stage, *, after: Stage | None) -> bool:
    """Tell whether a stage has come to its end, with these settings and after its teacher's."""
    index, stored = stage.model / "model_index.json", stage.folder / "config.yaml"
    if not index.is_file() or not stored.is_file():
        return False
    if after is not None:
        taught = (after.model / "model_index.json").stat().st_mtime
        if index.stat().st_mtime < taught:
            return False
    found = load_stored_config(stored, Config)
    return replace(found, train=replace(found.train, resume=stage.config.train.resume)) == (
        stage.config
    )


def _write_result(
    template: Config, kept: Stage | None, reports: dict[str, Any], *, asked: int
) -> None:
    """Write report.json, and pipeline/ from the stage that is kept; log the verdict."""
    out = Path(template.output_dir).expanduser()
    num_steps = None if kept is None else kept.config.distill.num_steps
    result = {"num_steps": num_steps, "asked": asked, "stages": reports}
    write_text(out / REPORT, json.dumps(result, indent=2) + "\n")
    worse = [name for name, report in reports.items() if report["is_worse"]]
    if kept is None:
        logger.error("stage %s is worse than the teacher: no model is written", worse[0])
        return
    _export(template, kept)
    if worse:
        logger.error(
            "stage %s is worse than the teacher, so the one before is kept: %s has %d sampling "
            "steps. More --halving_steps may fix it, or a larger margin allow it",
            *(worse[0], out / "pipeline", num_steps),
        )
    else:
        logger.info("written: %s, which samples in %d steps", out / "pipeline", num_steps)


def _export(template: Config, kept: Stage) -> None:
    """Copy a stage's model to pipeline/, with what is known of the whole distillation."""
    out = Path(template.output_dir).expanduser()
    base, own = _info(template), read_model_info(kept.model)
    facts = replace(
        own,
        base_model=template.model.pretrained,
        base_caption_dropout=base.null_caption_dropout,
        guidance_scale=base.guidance_scale,
    )
    with atomic_folder(out / "pipeline") as temporary:
        shutil.copytree(kept.model, temporary, dirs_exist_ok=True)
        write_model_info(temporary, facts)
        root, stock = attach_again(temporary), class_of_folder(temporary)
        title = folder_title(out / "pipeline")
        card = model_card(facts, name=title, stock=stock, bill_root=root)
        write_text(temporary / "README.md", card)
    for name in ADAPTERS:
        if (source := kept.folder / name).is_dir():
            with atomic_folder(out / name) as temporary:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
        elif source.is_file():
            with atomic_file(out / name) as path:
                shutil.copyfile(source, path)


def _info(template: Config) -> ModelInfo:
    return read_model_info(resolve_model(template.model.pretrained))
