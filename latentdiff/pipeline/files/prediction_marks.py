"""The prediction type that a file or a folder states: recognised, never guessed.

In one file the empty entries "v_pred" and "ztsnr" state it, which ComfyUI, Forge and kohya's tools
read, and modelspec.prediction_type in the metadata; in a folder the scheduler's config and
latentdiff.json. Where two of them contradict each other, the model is refused with both.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"  # empty entries of one file
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")  # entries of files that nothing here samples
METADATA = "modelspec.prediction_type"
SPELLINGS = {
    "epsilon": ("epsilon", "eps"),
    "v_prediction": ("v", "v_prediction", "velocity"),
    "sample": ("sample", "x0"),
    "flow_prediction": ("flow_prediction", "flow", "rectified_flow", "flow_matching"),
}
FIX = "name the right one by prediction_type"
NO_MARK = f"no entry {V_PREDICTION}"
FLOW_NODE = "the node ModelSamplingSD3 (shift {shift:g})"
NODES = {  # of ComfyUI, between the model and the sampler
    "sample": "the node ModelSamplingDiscrete (sampling x0)",
    "v_prediction": "the node ModelSamplingDiscrete (sampling v_prediction, zsnr {zsnr})",
}


def marks_of(scheduler_config: Mapping[str, Any]) -> list[str]:
    """Return the empty entries by which other programs sample what a scheduler's config says."""
    holds = {
        V_PREDICTION: scheduler_config.get("prediction_type") == "v_prediction",
        ZERO_TERMINAL_SNR: bool(scheduler_config.get("rescale_betas_zero_snr")),
    }
    return [mark for mark, is_set in holds.items() if is_set]


def stated_in_file(
    name: str, keys: Container[str], metadata: Mapping[str, str], *, otherwise: str
) -> str:
    """Return the prediction type that one file states; otherwise: the one of files that state none.

    keys: of its tensors. Raises ValueError where they contradict the metadata or each other, and
    for a type that is not known here.
    """
    if edm := next((key for key in EDM if key in keys), None):
        raise ValueError(
            f"{name} is a model for EDM's noise levels (it holds the entry {edm}), as Playground "
            "2.5 is, and those are not sampled here"
        )
    findings: dict[str, str] = {}
    if told := metadata.get(METADATA, ""):
        known = next((kind for kind, names in SPELLINGS.items() if told.lower() in names), None)
        if known is None:
            raise ValueError(
                f"the metadata of {name} says {METADATA}={told!r:.80}, which is none of "
                f"{', '.join(SPELLINGS)}; {FIX}"
            )
        findings[f"its metadata says {METADATA}={told}"] = known
    if V_PREDICTION in keys:
        findings[f"it holds the entry {V_PREDICTION}"] = "v_prediction"
    stated = _agreed(name, findings, fix=FIX) or otherwise
    if ZERO_TERMINAL_SNR in keys and stated == "epsilon":
        raise ValueError(
            f"{name} contradicts itself: it holds the entry {ZERO_TERMINAL_SNR}, zero terminal "
            f"SNR, where epsilon has no answer, and {next(iter(findings), NO_MARK)}; {FIX}"
        )
    return stated


def check_folder(name: str, scheduler_config: Mapping[str, Any], recorded: str | None) -> None:
    """Raise ValueError where a folder's scheduler config contradicts itself or latentdiff.json.

    recorded: the prediction type in latentdiff.json, None where it has none.
    """
    config = "scheduler/scheduler_config.json"
    kind = scheduler_config.get("prediction_type")
    if not scheduler_config:
        return
    fix = f"correct the one that is wrong; {config} is the one that other programs read"
    findings = {f"{config} says prediction_type={kind}": kind} if kind else {}
    if recorded:
        findings[f"latentdiff.json says prediction_type={recorded}"] = recorded
    if "use_flow_sigmas" in scheduler_config and kind:
        is_flow = bool(scheduler_config["use_flow_sigmas"])
        if is_flow or kind == "flow_prediction":
            says = f"{config} says use_flow_sigmas={str(is_flow).lower()}"
            findings[says] = "flow_prediction" if is_flow else "epsilon, v_prediction or sample"
    _agreed(name, findings, fix=fix)
    if kind == "epsilon" and scheduler_config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"{name} contradicts itself: {config} says prediction_type=epsilon and "
            "rescale_betas_zero_snr=true, and epsilon has no answer at zero terminal SNR; " + fix
        )


def comfyui_node(scheduler_config: Mapping[str, Any], *, is_sdxl: bool) -> str:
    """Return the node that ComfyUI needs to sample a single file as it was trained, "" for none.

    ComfyUI reads the marks in files of SDXL; it takes all else to predict epsilon.
    """
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind == "epsilon" or (kind == "v_prediction" and is_sdxl):
        return ""
    if kind == "flow_prediction":
        return FLOW_NODE.format(shift=scheduler_config.get("flow_shift") or 1.0)
    zsnr = str(bool(scheduler_config.get("rescale_betas_zero_snr"))).lower()
    return NODES[kind].format(zsnr=zsnr)


def flow_shift_of(scheduler_config: Mapping[str, Any]) -> float | None:
    """Return the shift of the sigmas of rectified flow; None where it is 1, or for other models."""
    shift = float(scheduler_config.get("flow_shift") or 1.0)
    is_flow = scheduler_config.get("prediction_type") == "flow_prediction"
    return shift if is_flow and shift != 1 else None


def _agreed(name: str, findings: Mapping[str, str], *, fix: str) -> str | None:
    kinds = set(findings.values())
    if len(kinds) > 1:
        raise ValueError(f"{name} contradicts itself: {', and '.join(findings)}; {fix}")
    return next(iter(kinds), None)
