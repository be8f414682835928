"""`evaluate.py`: everything that can be measured of a model with what is given, in one report."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from latentdiff.config.evaluation import (
    BoundOptions,
    EvalModelOptions,
    EvaluationOptions,
    SweepOptions,
)
from latentdiff.evaluation.eval_set import open_eval_model
from latentdiff.evaluation.report.comparison import against_section
from latentdiff.evaluation.report.heldout_loss import comparable
from latentdiff.evaluation.report.html_report import write_evaluation_report
from latentdiff.evaluation.report.json_sections import (
    bound_section,
    guidance_section,
    steps_section,
)
from latentdiff.evaluation.report.section import Section
from latentdiff.evaluation.report.sweeps import step_report, sweep_report
from latentdiff.evaluation.report.vlb import bound_report, write_metrics
from latentdiff.evaluation.run import (
    EvalResult,
    EvalRun,
    check_options,
    load_metric_nets,
    run_evaluation,
)
from latentdiff.models.bundled import resolve_model
from latentdiff.models.weights import weights_hash
from latentdiff.pipeline.files.model_info import default_guidance, read_model_info


def evaluate(
    model: str,
    out: Path,
    *,
    data: EvalModelOptions,
    options: EvaluationOptions,
    bound: BoundOptions | None,
    sweep: SweepOptions,
) -> Path:
    """Measure a model, write out/metrics.json and out/report.html; return the latter.

    bound: None leaves the bound out. ValueError or OSError says before any image is drawn what
    cannot be done; FloatingPointError is a model whose numbers are none.
    """
    check_options(options, sweep)
    scale = options.guidance_scale
    if scale is None:
        scale = default_guidance(read_model_info(resolve_model(model)))
    judges = load_metric_nets(options, data)
    exam = EvalRun(open_eval_model(model, data), judges, out / "images", data, options, scale)
    other = None
    if options.compare is not None:
        subject = open_eval_model(options.compare, data)
        other = replace(exam, subject=subject, folder=out / "images-other")
    of_chain = _chain_sections(exam, out, bound=bound, sweep=sweep)
    measured = run_evaluation(exam)
    sections = measured.sections + of_chain
    if other is not None:
        place = 0 if measured.drawn is None else 1
        sections.insert(place, _against(str(options.compare), (exam, measured), other))
    facts = _facts(exam, measured)
    left_out = measured.left_out | _not_asked_for(options, bound=bound, sweep=sweep)
    figures = {section.name: section.figures for section in sections if section.figures}
    metrics = {"model": model, "data": data.data, "settings": facts, "left_out": left_out}
    write_metrics(out, metrics | figures)
    return write_evaluation_report(
        out / "report.html",
        title=f"Evaluation of {model}",
        facts=_told(facts),
        sections=sections,
        left_out=left_out,
    )


def _chain_sections(
    exam: EvalRun, out: Path, *, bound: BoundOptions | None, sweep: SweepOptions
) -> list[Section]:
    """Measure what was asked for of the chain itself."""
    subject, clip, sections = exam.subject, exam.judges.clip, []
    if bound is not None:
        sections.append(bound_section(bound_report(subject, out, bound), out))
    if sweep.guidance_sweep:
        sections.append(guidance_section(sweep_report(subject, out, sweep, clip=clip), out))
    if exam.options.step_sweep:
        scale, steps = exam.guidance_scale, exam.options.step_sweep
        figures = step_report(subject, out, steps, options=sweep, guidance_scale=scale, clip=clip)
        sections.append(steps_section(figures, out))
    return sections


def _against(name: str, first: tuple[EvalRun, EvalResult], other: EvalRun) -> Section:
    """Measure the other model alike, and compare."""
    exam, measured = first
    second = run_evaluation(other)
    why = comparable(exam.subject, other.subject)
    a, b = measured.drawn, second.drawn
    section = against_section(
        name,
        measured.scores,
        second.scores,
        images=None if a is None or b is None else (a, b),
        left_out={"heldout": why} if why else {},
    )
    own = {each.name: each.figures for each in second.sections if each.figures}
    return replace(section, figures=section.figures | {"of_the_other": own})


def _not_asked_for(
    options: EvaluationOptions, *, bound: BoundOptions | None, sweep: SweepOptions
) -> dict[str, str]:
    """Say what else could be measured, and how to ask for it."""
    asked = {
        "compare": options.compare is not None,
        "bound": bound is not None,
        "guidance_sweep": bool(sweep.guidance_sweep),
        "step_sweep": bool(options.step_sweep),
    }
    return {name: f"not asked for (--{name})" for name, is_asked in asked.items() if not is_asked}


def _facts(exam: EvalRun, measured: EvalResult) -> dict[str, Any]:
    """Return what the figures rest on, as JSON values."""
    subject, drawn = exam.subject, measured.drawn
    return asdict(exam.data) | {
        "device": str(subject.device),
        "unet_sha256": weights_hash(subject.components.unet),
        "num_real_images": len(subject.latents),
        "size": list(subject.size),
        "num_captions": 0 if drawn is None else len(drawn.captions),
        "num_images": 0 if drawn is None else len(drawn.flat),
        "steps": exam.num_steps,
        "guidance_scale": exam.guidance_scale,
    }


def _told(facts: dict[str, Any]) -> dict[str, str]:
    """Say the facts in words."""
    height, width = facts["size"]
    split = facts["split"].replace("_", "-")
    drawn = f"{facts['num_images']} of {facts['num_captions']} captions, {height} x {width} px"
    sampled = f"{facts['steps']} steps, guidance {facts['guidance_scale']:g}, seeds from "
    return {
        "data": facts["data"],
        "real images": f"{facts['num_real_images']:,} of the {split} split",
        "drawn images": drawn if facts["num_images"] else "none",
        "sampling": f"{sampled}{facts['seed']}",
        "U-Net": f"sha256 {facts['unet_sha256'][:16]}",
    }
