"""The `parameters` text by which A1111's web UI, and tools that read its PNG files, tell settings.

A prompt, a line "Negative prompt: ...", and a line "Steps: 20, Sampler: Euler a, ...". Its clip
skip counts the last layer as 1, where diffusers' counts it as 0. Does not answer for: the PNG file
(png_metadata.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from latentdiff.pipeline.schedulers import scheduler_name, scheduler_of

KEY = "parameters"
NEGATIVE = "Negative prompt: "
LABELS = {  # its names of schedulers that differ from ours in more than case, spaces and dashes
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2-a": "DPM2 a",
    "dpm++2s": "DPM++ 2S",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "pndm": "PLMS",
    "unipc": "UniPC",
}
PAIR = re.compile(r'\s*([^:,"]+):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
LORA = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^:>]*))?[^>]*>")
NUMBERS: dict[str, tuple[str, type[int] | type[float]]] = {  # its name -> the call's argument
    "Steps": ("num_inference_steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
}


def parameters_text(settings: Any) -> str | None:
    """Return the text of an image's settings, of a sheet's first image; None where none fits."""
    settings = settings[0] if isinstance(settings, list) and settings else settings
    call = settings.get("call") if isinstance(settings, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("prompt"), str):
        return None
    lines = [_prompt_text(call, "prompt")]
    if negative := _prompt_text(call, "negative_prompt"):
        lines.append(NEGATIVE + negative)
    values = _values(call, settings)
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in values.items()))
    return "\n".join(lines).replace("\0", "").encode(errors="replace").decode()


def read_parameters(text: str) -> dict[str, Any]:
    """Return settings as LatentDiff's PNG files hold them, as far as the text tells them.

    "call" holds the pipeline's arguments, "loras" the weights of the LoRAs that the prompt names.
    Raises ValueError for a text without a line of settings, or with a number that is none.
    """
    *lines, last = text.strip().split("\n")
    values = {key.strip(): _unquoted(value) for key, value in PAIR.findall(last)}
    if "Steps" not in values:
        raise ValueError('the last line of "parameters" names no "Steps: "')
    at = next((k for k, line in enumerate(lines) if line.startswith(NEGATIVE.strip())), len(lines))
    loras = {name: _number("lora", weight or "1", float) for name, weight in LORA.findall(text)}
    negative = "\n".join(lines[at:]).removeprefix(NEGATIVE.strip())
    call: dict[str, Any] = {"prompt": _without_loras("\n".join(lines[:at]))}
    call |= {"negative_prompt": _without_loras(negative)} if negative.strip() else {}
    call |= _numbers(values)
    found: dict[str, Any] = {"call": call}
    if sampler := values.get("Sampler"):
        found["scheduler"] = _scheduler(sampler, values.get("Schedule type", ""))
    if model := values.get("Model"):
        found["model"] = {"name": model}
    return found | ({"loras": loras} if loras else {})


def _values(call: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last line's entries in A1111's order; those unknown are absent."""
    parts = {name: settings.get(name) for name in ("scheduler", "model", "versions")}
    scheduler, model, versions = (p if isinstance(p, dict) else {} for p in parts.values())
    known = scheduler_name(scheduler) or ""
    name = known.removesuffix("-karras")
    clip_skip, size = call.get("clip_skip"), (call.get("width"), call.get("height"))
    values = {
        "Steps": call.get("num_inference_steps"),
        "Sampler": LABELS.get(name, name.upper()) or scheduler.get("class"),
        "Schedule type": "Karras" if name != known else None,
        "CFG scale": call.get("guidance_scale"),
        "Seed": call.get("seed"),
        "Size": f"{size[0]}x{size[1]}" if None not in size else None,
        "Model": model.get("name"),
        "Clip skip": clip_skip + 1 if isinstance(clip_skip, int) else None,
        "Denoising strength": call.get("strength"),
        "Version": f"latentdiff {versions['latentdiff']}" if "latentdiff" in versions else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def _prompt_text(call: Mapping[str, Any], name: str) -> str:
    """Return a prompt, its brackets escaped where they were read as text."""
    text = str(call.get(name) or "")
    return re.sub(r"([()\[\]\\])", r"\\\1", text) if call.get("prompt_weighting") is False else text


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    try:
        return str(json.loads(text))
    except ValueError:
        return text.strip()


def _numbers(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the call's numbers that are stated."""
    call = {
        argument: _number(key, values[key], kind)
        for key, (argument, kind) in NUMBERS.items()
        if key in values
    }
    if size := values.get("Size"):
        width, _, height = size.partition("x")
        call |= {"height": _number("Size", height, int), "width": _number("Size", width, int)}
    if skip := values.get("Clip skip"):
        call["clip_skip"] = _number("Clip skip", skip, int) - 1
    return call


def _number(name: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r:.40}, expected a number") from None


def _scheduler(sampler: str, schedule: str) -> dict[str, Any]:
    """Return the scheduler's class and settings, or the label alone of one that is unknown."""
    label = f"{sampler} Karras" if schedule == "Karras" else sampler
    known = re.sub(r"^PLMS", "pndm", label)
    try:
        cls, settings = scheduler_of(known)
    except ValueError:
        return {"name": label}
    return {"class": cls.__name__} | settings


def _without_loras(prompt: str) -> str:
    return LORA.sub("", prompt).strip(" \n")
