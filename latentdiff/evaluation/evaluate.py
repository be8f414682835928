"""The entry: every metric that the given inputs allow, in metrics.json and one HTML report.

The metrics of one model's images are run.py's; this module adds the others and writes the files.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text
from latentdiff.config.data import DataConfig
from latentdiff.config.io import load_stored_config
from latentdiff.config.options import (
    BoundOptions,
    EvalModelOptions,
    EvaluationOptions,
    SweepOptions,
)
from latentdiff.config.text_to_image import Config
from latentdiff.evaluation.eval_set import (
    DISTILLED,
    check_eval_options,
    open_eval_model,
    read_classes,
    read_eval_folder,
)
from latentdiff.evaluation.metric_nets import load_metric_nets
from latentdiff.evaluation.report.comparison import comparison_section
from latentdiff.evaluation.report.heldout_loss import comparable
from latentdiff.evaluation.report.html_report import write_evaluation_report
from latentdiff.evaluation.report.sweeps import (
    guidance_report,
    guidance_section,
    step_report,
    steps_section,
)
from latentdiff.evaluation.report.vlb import (
    bound_chain,
    bound_report,
    bound_section,
    check_bound,
)
from latentdiff.evaluation.run import (
    OF_IMAGES,
    EvalResult,
    EvalRun,
    check_options,
    run_evaluation,
    too_few,
)
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.model_path import read_model_configs, resolve_model
from latentdiff.models.weights import weights_hash
from latentdiff.pipeline.files.model_info import default_guidance, read_model_info

logger = logging.getLogger(__name__)
SPLIT_TITLES = {
    "heldout": "the held-out split",
    "train": "the training split",
    "all": "the whole folder",
}
ORDER = (  # of the sections in the report
    "images",
    "compare",
    "following",
    "clip_score",
    "heldout",
    "fidelity",
    "dino",
    "cmmd",
    "memorisation",
    "diversity",
    "bound",
    "guidance",
    "steps",
)


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
    is generated. A section that fails later, as with FloatingPointError where the model's outputs
    are not finite, is raised when all others are computed and written.
    """
    _check(out, data=data, options=options, bound=bound, sweep=sweep)
    scale = options.guidance_scale
    if scale is None:
        is_sdxl = reads_time_ids(read_model_configs(model).get("unet", {}))
        scale = default_guidance(read_model_info(resolve_model(model)), is_sdxl=is_sdxl)
    nets = load_metric_nets(options, data)
    run = EvalRun(open_eval_model(model, data), nets, out / "images", data, options, scale)
    if run.eval_model.is_distilled and (bound is not None or sweep.guidance_sweep):
        raise ValueError(f"--bound and --guidance_sweep are of a model's denoiser; {DISTILLED}")
    if bound is not None:
        bound_chain(run.eval_model, bound)
    other = None
    if options.compare is not None:
        other_model = open_eval_model(options.compare, data)
        other = replace(run, eval_model=other_model, folder=out / "images-other")
    result = EvalResult(skipped=_not_requested(options, bound=bound, sweep=sweep))
    try:
        _add_chain_sections(result, run, out, bound=bound, sweep=sweep)
        run_evaluation(run, result)
        if other is not None:
            with result.part("compare"):
                _add_comparison(result, run, name=str(options.compare), other=other)
    finally:  # what is done is written, also after Ctrl-C
        report = _write(model, out, run=run, result=result)
    for error in result.failures.values():
        raise error
    return report


def _check(
    out: Path,
    *,
    data: EvalModelOptions,
    options: EvaluationOptions,
    bound: BoundOptions | None,
    sweep: SweepOptions,
) -> None:
    """Raise ValueError or OSError, before a model is loaded, for what would fail at the end.

    Logs which sections the folder has too few images for; ValueError where that leaves none.
    """
    check_options(options, sweep)
    if bound is not None:
        check_bound(bound)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file, expected a folder for the results")
    _known_metrics(out / "metrics.json")
    check_eval_options(data)
    folder = read_eval_folder(data)
    read_classes(folder.root, [record.id for record in folder], options.class_column)
    skipped = too_few(folder, options)
    others = bound is not None or sweep.guidance_sweep or options.step_sweep
    if len(skipped) == 1 + len(OF_IMAGES) and not others:
        why = "; ".join(sorted(set(skipped.values())))
        raise ValueError(
            f"nothing can be estimated from the {data.split} split of {data.data}: {why}. Take "
            "--split all for a folder that the model has not seen, raise --heldout_fraction as in "
            "training, or name a folder test/ or validation/"
        )
    for why in sorted(set(skipped.values())):
        names = ", ".join(name for name in skipped if skipped[name] == why)
        logger.warning("skipped: %s, as %s", names, why)


def _write(
    model: str,
    out: Path,
    *,
    run: EvalRun,
    result: EvalResult,
) -> Path:
    """Write metrics.json and report.html; return the latter's path."""
    settings, skipped = _settings(run, result), result.skipped
    sections = sorted(result.sections, key=lambda one: [*ORDER, one.name].index(one.name))
    figures = {section.name: section.figures for section in sections if section.figures}
    metrics = {"model": model, "data": run.data.data, "settings": settings, "left_out": skipped}
    write_metrics(out, metrics | figures, failed=list(result.failures))
    return write_evaluation_report(
        out / "report.html",
        title=f"Evaluation of {model}",
        warning=_warning(model, run),
        facts=_facts(settings),
        sections=sections,
        skipped=skipped,
    )


def write_metrics(out: Path, metrics: dict[str, Any], *, failed: Sequence[str] = ()) -> Path:
    """Put sections of figures into out/metrics.json besides the ones it has; return its path.

    Sections that failed now, or of another model or other data, are dropped. ValueError where the
    file is no JSON object.
    """
    path = out / "metrics.json"
    known = _known_metrics(path)
    if any(known.get(name) != metrics.get(name) for name in ("model", "data")):
        known = {}
    known = {name: value for name, value in known.items() if name not in failed}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(known | metrics, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _known_metrics(path: Path) -> dict[str, Any]:
    """Return what metrics.json holds already; ValueError where it is no JSON object."""
    known: Any = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}; delete it") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(known).__name__}; delete it")
    return known


def _add_chain_sections(
    result: EvalResult, run: EvalRun, out: Path, *, bound: BoundOptions | None, sweep: SweepOptions
) -> None:
    """Evaluate the bound and the sweeps, where requested."""
    eval_model, clip = run.eval_model, run.nets.clip
    if bound is not None:
        with result.part("bound"):
            result.sections.append(bound_section(bound_report(eval_model, out, bound), out))
    if sweep.guidance_sweep:
        with result.part("guidance"):
            figures = guidance_report(eval_model, out, sweep, clip=clip)
            result.sections.append(guidance_section(figures, out))
    if run.options.step_sweep:
        scale, steps = run.guidance_scale, run.options.step_sweep
        with result.part("steps"):
            figures = step_report(
                eval_model, out, steps, options=sweep, guidance_scale=scale, clip=clip
            )
            result.sections.append(steps_section(figures, out))


def _add_comparison(result: EvalResult, run: EvalRun, *, name: str, other: EvalRun) -> None:
    """Evaluate the other model in the same way, and compare."""
    second = EvalResult()
    run_evaluation(other, second)
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
    result.sections.append(replace(section, figures=section.figures | {"of_the_other": own}))
    for failed, error in second.failures.items():
        result.failures[f"{failed} of the other"] = error
        result.skipped[f"{failed} of the other"] = second.skipped[failed]


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


def _warning(model: str, run: EvalRun) -> str:
    """Say that images were trained on, or may have been, where they are not a held-out split."""
    if run.is_heldout:
        return ""
    num = len(run.eval_model.folder)
    data, root = _trained_data(model), run.eval_model.folder.root.resolve()
    fraction = data.heldout_fraction if data else 0.0
    is_same = data is not None and any(
        Path(one.root).expanduser().resolve() == root for one in data.each_source() if one.root
    )
    if run.data.split == "all" and not is_same:
        text = f"These {num:,} images are not held out: where the model was trained on them"
        return f"{text}, a good fit may be copying."
    some_heldout = run.data.split == "all" and (fraction or len(run.eval_model.folder.heldout()))
    images = f"Most of these {num:,} images" if some_heldout else f"These {num:,} images"
    return f"{images} were trained on: a good fit may be copying."


def _trained_data(model: str) -> DataConfig | None:
    """Return the data settings of the run that a model's folder lies in; None where unknown."""
    path = resolve_model(model).parent / "config.yaml"
    try:
        return load_stored_config(path, Config).data if path.is_file() else None
    except ValueError:  # of another recipe
        return None


def _facts(settings: dict[str, Any]) -> dict[str, str]:
    """Return the settings as text for the report."""
    height, width = settings["size"]
    split = SPLIT_TITLES[settings["split"]]
    images = (
        f"{settings['num_images']} of {settings['num_captions']} captions, {height} x {width} px"
    )
    sampled = f"{settings['steps']} steps, guidance {settings['guidance_scale']:g}, seeds from "
    return {
        "data": settings["data"],
        "real images": f"{settings['num_real_images']:,} of {split}",
        "generated images": images if settings["num_images"] else "none",
        "sampling": f"{sampled}{settings['seed']}",
        "U-Net": f"sha256 {settings['unet_sha256'][:16]}",
    }
