"""The entry: every metric that the given inputs allow, in metrics.json and one HTML report.

The metrics of one model's images are run.py's; this module adds the others and writes the files.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text
from latentdiff.config.evaluation import (
    BoundOptions,
    EvalModelOptions,
    EvaluationOptions,
    SweepOptions,
)
from latentdiff.evaluation.eval_set import open_eval_model
from latentdiff.evaluation.metric_nets import load_metric_nets
from latentdiff.evaluation.report.comparison import comparison_section
from latentdiff.evaluation.report.heldout_loss import comparable
from latentdiff.evaluation.report.html_report import write_evaluation_report
from latentdiff.evaluation.report.section import Section
from latentdiff.evaluation.report.sweeps import (
    guidance_report,
    guidance_section,
    step_report,
    steps_section,
)
from latentdiff.evaluation.report.vlb import bound_report, bound_section
from latentdiff.evaluation.run import EvalResult, EvalRun, check_options, run_evaluation
from latentdiff.models.components import resolve_model
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
    """Evaluate a model, write out/metrics.json and out/report.html; return the report's path.

    bound: None skips the bound. An impossible request raises ValueError or OSError before any image
    is generated; FloatingPointError where the model's outputs are not finite.
    """
    check_options(options, sweep)
    scale = options.guidance_scale
    if scale is None:
        scale = default_guidance(read_model_info(resolve_model(model)))
    nets = load_metric_nets(options, data)
    run = EvalRun(open_eval_model(model, data), nets, out / "images", data, options, scale)
    other = None
    if options.compare is not None:
        other_model = open_eval_model(options.compare, data)
        other = replace(run, eval_model=other_model, folder=out / "images-other")
    chain_sections = _chain_sections(run, out, bound=bound, sweep=sweep)
    result = run_evaluation(run)
    sections = result.sections + chain_sections
    if other is not None:
        index = 0 if result.generated is None else 1
        sections.insert(index, _comparison(run, result, name=str(options.compare), other=other))
    skipped = result.skipped | _not_requested(options, bound=bound, sweep=sweep)
    return _write(model, out, run=run, result=result, sections=sections, skipped=skipped)


def _write(
    model: str,
    out: Path,
    *,
    run: EvalRun,
    result: EvalResult,
    sections: list[Section],
    skipped: dict[str, str],
) -> Path:
    """Write metrics.json and report.html; return the latter's path."""
    settings = _settings(run, result)
    figures = {section.name: section.figures for section in sections if section.figures}
    metrics = {"model": model, "data": run.data.data, "settings": settings, "left_out": skipped}
    write_metrics(out, metrics | figures)
    return write_evaluation_report(
        out / "report.html",
        title=f"Evaluation of {model}",
        facts=_facts(settings),
        sections=sections,
        skipped=skipped,
    )


def write_metrics(out: Path, metrics: dict[str, Any]) -> Path:
    """Put sections of figures into out/metrics.json besides the ones it has; return its path.

    Sections of another model or other data are dropped. ValueError where the file is no JSON
    object.
    """
    path = out / "metrics.json"
    known: Any = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}; delete it") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(known).__name__}; delete it")
    if any(known.get(name) != metrics.get(name) for name in ("model", "data")):
        known = {}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(known | metrics, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _chain_sections(
    run: EvalRun, out: Path, *, bound: BoundOptions | None, sweep: SweepOptions
) -> list[Section]:
    """Evaluate the bound and the sweeps, where requested."""
    eval_model, clip, sections = run.eval_model, run.nets.clip, []
    if bound is not None:
        sections.append(bound_section(bound_report(eval_model, out, bound), out))
    if sweep.guidance_sweep:
        sections.append(guidance_section(guidance_report(eval_model, out, sweep, clip=clip), out))
    if run.options.step_sweep:
        scale, steps = run.guidance_scale, run.options.step_sweep
        figures = step_report(
            eval_model, out, steps, options=sweep, guidance_scale=scale, clip=clip
        )
        sections.append(steps_section(figures, out))
    return sections


def _comparison(run: EvalRun, result: EvalResult, *, name: str, other: EvalRun) -> Section:
    """Evaluate the other model in the same way, and compare."""
    second = run_evaluation(other)
    why = comparable(run.eval_model, other.eval_model)
    a, b = result.generated, second.generated
    section = comparison_section(
        name,
        result.scores,
        second.scores,
        images=None if a is None or b is None else (a, b),
        skipped={"heldout": why} if why else {},
    )
    own = {each.name: each.figures for each in second.sections if each.figures}
    return replace(section, figures=section.figures | {"of_the_other": own})


def _not_requested(
    options: EvaluationOptions, *, bound: BoundOptions | None, sweep: SweepOptions
) -> dict[str, str]:
    """Name each metric that was not requested, with its option."""
    requested = {
        "compare": options.compare is not None,
        "bound": bound is not None,
        "guidance_sweep": bool(sweep.guidance_sweep),
        "step_sweep": bool(options.step_sweep),
    }
    return {name: f"not requested (--{name})" for name, is_on in requested.items() if not is_on}


def _settings(run: EvalRun, result: EvalResult) -> dict[str, Any]:
    """Return the settings of the evaluation as JSON values."""
    eval_model, generated = run.eval_model, result.generated
    return asdict(run.data) | {
        "device": str(eval_model.device),
        "unet_sha256": weights_hash(eval_model.components.unet),
        "num_real_images": len(eval_model.latents),
        "size": list(eval_model.size),
        "num_captions": 0 if generated is None else len(generated.captions),
        "num_images": 0 if generated is None else len(generated.flat),
        "steps": run.num_inference_steps,
        "guidance_scale": run.guidance_scale,
    }


def _facts(settings: dict[str, Any]) -> dict[str, str]:
    """Return the settings as text for the report."""
    height, width = settings["size"]
    split = settings["split"].replace("heldout", "held-out")
    images = (
        f"{settings['num_images']} of {settings['num_captions']} captions, {height} x {width} px"
    )
    sampled = f"{settings['steps']} steps, guidance {settings['guidance_scale']:g}, seeds from "
    return {
        "data": settings["data"],
        "real images": f"{settings['num_real_images']:,} of the {split} split",
        "generated images": images if settings["num_images"] else "none",
        "sampling": f"{sampled}{settings['seed']}",
        "U-Net": f"sha256 {settings['unet_sha256'][:16]}",
    }
