"""Samplers by the names people know: "ddim", "euler a", "DPM++ 2M Karras", "unipc", "lcm" ..."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import diffusers

KARRAS = {"use_karras_sigmas": True}

SAMPLERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
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

TRAINED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
)


def sampler_names() -> list[str]:
    """Return every name, those with Karras' noise levels (Karras et al. 2022, Eq. 5) too."""
    plain = list(SAMPLERS)
    return plain + [f"{name}-karras" for name in plain if _knows(SAMPLERS[name][0], KARRAS)]


def make_sampler(name: str, *, trained: Any) -> Any:
    """Make the scheduler of that name for the noise that a model was trained with.

    trained: any scheduler of the model; its betas, prediction type and time-steps' spacing are
    taken over. Case, spaces, "-" and "_" in the name do not matter. Raises ValueError for an
    unknown name, and for a scheduler that cannot do the model's zero terminal SNR.
    """
    cls, settings = _find(name)
    config = {key: trained.config[key] for key in TRAINED if key in trained.config}
    if str(trained.config.get("variance_type")).startswith("learned"):
        settings = settings | {"variance_type": trained.config["variance_type"]}
    if config.get("rescale_betas_zero_snr") and not _knows(cls, {"rescale_betas_zero_snr": True}):
        raise ValueError(
            f"sampler {name!r} ({cls.__name__}) cannot start from pure noise, and this model was "
            "trained with zero terminal SNR; take ddim, euler, dpm++2m or unipc"
        )
    latents_are_unbounded = {"clip_sample": False, "set_alpha_to_one": False}
    wanted = config | latents_are_unbounded | settings
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in wanted.items() if key in known})


def _find(name: str) -> tuple[type[Any], dict[str, Any]]:
    if isinstance(name, str):
        plain = {_squeezed(known): (known, False) for known in SAMPLERS}
        karras = {key + "karras": (known, True) for key, (known, _) in plain.items()}
        known, has_karras = (plain | karras).get(_squeezed(name), ("", False))
        if known:
            cls, settings = SAMPLERS[known]
            if not has_karras:
                return cls, settings
            if _knows(cls, KARRAS):
                return cls, settings | KARRAS
    near = difflib.get_close_matches(str(name), sampler_names(), n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no sampler {name!r}; {meant}known: {', '.join(sampler_names())}")


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _knows(cls: type[Any], settings: dict[str, Any]) -> bool:
    return settings.keys() <= inspect.signature(cls.__init__).parameters.keys()
