"""Schedulers: every one of diffusers' driven alike, and the names people know them by.

`set_timesteps` chooses the steps of a call, of which `strength` keeps the last part.

Names such as "ddim", "euler a", "DPM++ 2M Karras", "unipc", "lcm".
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import Generators
from latentdiff.diffusion.prediction import predict_x0
from latentdiff.models.build import FLOW_SIGMAS, schedule_of
from latentdiff.pipeline import checks


@dataclass(frozen=True)
class DenoisingSteps:
    """The steps of a call that are taken, and how they were asked for.

    timesteps: noisiest first. settings: arguments that give this chain again. step_options: of each
    of the scheduler's steps.
    """

    timesteps: Tensor
    settings: dict[str, Any]
    step_options: dict[str, Any] = field(default_factory=dict)


def set_timesteps(
    scheduler: Any,
    num_inference_steps: object = None,
    *,
    timesteps: object = None,
    sigmas: object = None,
    strength: float | None = None,
    device: torch.device | None = None,
) -> DenoisingSteps:
    """Set a scheduler's chain of num_inference_steps, or of timesteps or sigmas in their place.

    strength: of image-to-image, keeps that last part of the chain. Schedulers of second order
    return more timesteps than steps. Raises ValueError for a number of steps outside 1..the number
    of training timesteps, values that do not descend, any of these unknown to the scheduler, or a
    strength that leaves no step.
    """
    settings = _spacing(scheduler, num_inference_steps, timesteps, sigmas)
    ((name, asked),) = settings.items()
    try:
        scheduler.set_timesteps(**settings, device=device)
    except ValueError as error:
        raise ValueError(
            f"{name}={asked} does not fit {type(scheduler).__name__}: {error}"
        ) from error
    order, is_count = getattr(scheduler, "order", 1), name == "num_inference_steps"
    steps = asked if is_count else math.ceil(len(scheduler.timesteps) / order)
    kept = steps if strength is None else int(steps * strength)
    if kept < 1:
        of = f"strength={strength:g} of " if strength is not None else ""
        raise ValueError(f"{of}{name}={asked} leaves no step; raise one")
    skipped = (steps - kept) * order
    if strength is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return DenoisingSteps(scheduler.timesteps[skipped:], {"num_inference_steps": steps} | settings)


def _spacing(scheduler: Any, steps: object, timesteps: object, sigmas: object) -> dict[str, Any]:
    """Return the one argument that sets a scheduler's chain, checked."""
    maximum = scheduler.config.num_train_timesteps
    if timesteps is None and sigmas is None:
        count = checks.count("num_inference_steps", steps, maximum=maximum)
        return {"num_inference_steps": count}
    if timesteps is not None and sigmas is not None:
        raise ValueError("got both timesteps and sigmas; pass one of them")
    name, value = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
    high = maximum - 1 if sigmas is None else MAX_SIGMA
    values = checks.descending(name, value, high=high, is_integer=sigmas is None)
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"{name} cannot be set on a {type(scheduler).__name__}; pass num_inference_steps, or "
            'take another scheduler by set_scheduler("euler")'
        )
    return {name: values}


def check_variance(scheduler: Any, *, out_channels: int, channels: int) -> None:
    """Raise ValueError where a U-Net learned its variance and the scheduler cannot use it."""
    learns = str(scheduler.config.get("variance_type")).startswith("learned")
    if out_channels != channels and not learns:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no use for this U-Net's learned variance "
            f"({out_channels} output channels for latents of {channels}); take a DDPMScheduler "
            'with variance_type="learned_range"'
        )


def step_options(scheduler: Any, *, eta: float, generator: Generators) -> dict[str, Any]:
    """Return eta and generator where the scheduler's step takes them, and return_dict=False."""
    options = {"eta": eta, "generator": generator}
    known = inspect.signature(scheduler.step).parameters
    read = {name: value for name, value in options.items() if name in known}
    return read | {"return_dict": False}


def predicted_z0(scheduler: Any, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Return the clean latents (B, C, h, w) that a prediction stands for (Ho et al. 2020, Eq. 15).

    xt is the noisy latents as the U-Net reads them: sqrt(alpha_bar) z0 + sqrt(1 - alpha_bar) eps,
    of unit variance where z0 is, or of rectified flow (1 - s) z0 + s eps, of less.
    """
    channels = xt.shape[1]
    return predict_x0(
        schedule_of(scheduler).to(xt.device),
        output[:, :channels],
        xt,
        nearest_timesteps(scheduler, t, count=len(xt)).to(xt.device),
        prediction_type=scheduler.config.prediction_type,
    ).float()


def nearest_timesteps(scheduler: Any, t: Tensor, *, count: int) -> Tensor:
    """Return the training timestep nearest to t, (count,); some schedulers have t in between."""
    last = scheduler.config.num_train_timesteps - 1
    return t.round().long().clamp(0, last).expand(count)


MAX_SIGMA = 1e6  # above that of any noise schedule
KARRAS = {"use_karras_sigmas": True}

SCHEDULERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm2-a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpm++2s": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm++2m-sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}

TRAINED_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    FLOW_SIGMAS,
    "flow_shift",
)


def scheduler_names() -> list[str]:
    """Return every name, those with Karras' noise levels (Karras et al. 2022, Eq. 5) too."""
    plain = list(SCHEDULERS)
    return plain + [f"{name}-karras" for name in plain if _knows(SCHEDULERS[name][0], KARRAS)]


def make_scheduler(name: str, *, trained: Any) -> Any:
    """Make the scheduler of that name for the noise that a model was trained with.

    trained: any scheduler of the model; its betas, prediction type and time-steps' spacing are
    taken over. Case, spaces, "-" and "_" in the name do not matter. Raises ValueError for an
    unknown name, and for a scheduler that cannot do the model's zero terminal SNR or its flow.
    """
    cls, settings = scheduler_of(name)
    config = {key: trained.config[key] for key in TRAINED_KEYS if key in trained.config}
    if str(trained.config.get("variance_type")).startswith("learned"):
        settings = settings | {"variance_type": trained.config["variance_type"]}
    if config.get("rescale_betas_zero_snr") and not _knows(cls, {"rescale_betas_zero_snr": True}):
        raise ValueError(
            f"scheduler {name!r} ({cls.__name__}) cannot start from pure noise, and this model was "
            "trained with zero terminal SNR; take ddim, euler, dpm++2m or unipc"
        )
    if config.get(FLOW_SIGMAS) and not _knows(cls, {FLOW_SIGMAS: True}):
        raise ValueError(
            f"scheduler {name!r} ({cls.__name__}) cannot sample a model of rectified flow, which "
            "this one is; take unipc, dpm++2m, dpm++2s or deis"
        )
    latents_are_unbounded = {"clip_sample": False, "set_alpha_to_one": False}
    wanted = config | latents_are_unbounded | settings
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in wanted.items() if key in known})


def zero_terminal_snr_scheduler(trained: Any) -> Any:
    """Return a DDIMScheduler of a model's own betas, rescaled to zero terminal SNR.

    Lin et al. 2024. trained: as in `make_scheduler`; returned as it is where rescaled already.
    """
    if trained.config.get("rescale_betas_zero_snr"):
        return trained
    ddim = make_scheduler("ddim", trained=trained)
    rescaled = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(ddim.config, **rescaled)


def distilled_scheduler(trained: Any) -> Any:
    """Return the DDIMScheduler of a model distilled to few steps, which ends at the clean latents.

    Its steps are those that `diffusion.distillation.trailing_timesteps` names. trained: as in
    `make_scheduler`.
    """
    ddim = make_scheduler("ddim", trained=trained)
    few_steps = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 1}
    return diffusers.DDIMScheduler.from_config(ddim.config, **few_steps)


def scheduler_to_json(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's class name and settings as JSON values."""
    settings: dict[str, Any] = json.loads(scheduler.to_json_string())
    return settings


def scheduler_from_json(settings: Mapping[str, Any]) -> Any:
    """Return the scheduler that `scheduler_to_json` described; ValueError for an unknown class."""
    known = {cls.__name__: cls for cls, _ in SCHEDULERS.values()}
    if (name := settings["_class_name"]) not in known:
        raise ValueError(f"no scheduler {name!r}, expected one of {', '.join(known)}")
    return known[name].from_config(dict(settings))


def scheduler_name(settings: Mapping[str, Any]) -> str | None:
    """Return the name of a scheduler by its "class" and settings; None for one without a name."""
    for name, (cls, own) in SCHEDULERS.items():
        known = inspect.signature(cls.__init__).parameters
        if cls.__name__ == settings.get("class") and all(
            settings.get(key, known[key].default) == value for key, value in own.items()
        ):
            return f"{name}-karras" if settings.get("use_karras_sigmas") else name
    return None


def scheduler_of(name: str) -> tuple[type[Any], dict[str, Any]]:
    """Return the class and settings of a name; ValueError for an unknown one."""
    if isinstance(name, str):
        plain = {_squeezed(known): (known, False) for known in SCHEDULERS}
        karras = {key + "karras": (known, True) for key, (known, _) in plain.items()}
        known, has_karras = (plain | karras).get(_squeezed(name), ("", False))
        if known:
            cls, settings = SCHEDULERS[known]
            if not has_karras:
                return cls, settings
            if _knows(cls, KARRAS):
                return cls, settings | KARRAS
    near = difflib.get_close_matches(str(name), scheduler_names(), n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no scheduler {name!r}; {meant}known: {', '.join(scheduler_names())}")


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _knows(cls: type[Any], settings: dict[str, Any]) -> bool:
    return settings.keys() <= inspect.signature(cls.__init__).parameters.keys()
