"""Every name that a setting may take, for the settings' types and the commands' help.

Imports nothing heavy. Each alias names the dict or functions that its names stand for;
tests/config/test_choices.py compares the two, so a new name is one entry there and one here.
"""

from typing import Literal

BetaSchedule = Literal[  # diffusion/schedules.py BETA_SCHEDULES
    "linear", "scaled_linear", "quadratic", "cosine", "squaredcos_cap_v2", "sigmoid"
]
PredictionType = Literal[  # diffusion/prediction.py PREDICTION_TYPES
    "epsilon", "v_prediction", "sample", "flow_prediction"
]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]  # diffusion/ddpm.py
LossWeighting = Literal["none", "min_snr", "soft_min_snr", "p2"]  # diffusion/loss_weighting.py
Loss = Literal["mse", "huber"]  # diffusion/losses.py per_sample_loss
TimestepSampling = Literal[  # diffusion/timesteps.py TIMESTEP_SAMPLINGS
    "uniform", "stratified", "logit_normal", "loss_aware"
]

Scheduler = Literal[  # pipeline/schedulers.py SCHEDULERS
    "ddpm",
    "ddim",
    "pndm",
    "euler",
    "euler-a",
    "heun",
    "dpm2",
    "dpm2-a",
    "dpm++2s",
    "dpm++2m",
    "dpm++2m-sde",
    "deis",
    "unipc",
    "lcm",
    "tcd",
]

OptimizerName = Literal[  # training/optim/optimizer.py OPTIMIZERS
    "adamw", "adamw8bit", "adafactor", "muon", "prodigy", "schedule_free_adamw", "lion"
]
LRDecay = Literal["constant", "cosine", "linear"]  # training/optim/lr.py
MixedPrecision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]  # training/trackers.py PACKAGES
AttentionKernel = Literal["auto", "plain", "sdpa", "xformers"]  # training/text_to_image/model.py
FinetuneMethod = Literal[  # training/finetune/methods.py TRAINABLE
    "full", "attention", "cross_attention", "lora", "textual_inversion", "controlnet"
]
AdapterType = Literal["lora", "dora", "lokr"]  # training/finetune/lora.py, lokr.py
ConditionKind = Literal[  # models/compatibility.py CONDITION_KINDS
    "none", "inpaint", "instruct_pix2pix", "upscale", "depth"
]
InpaintMasks = Literal["random", "boxes", "strokes", "file"]  # data/inpaint_masks.py
Degradation = Literal["bicubic", "area", "jpeg", "blur"]  # data/degradations.py DEGRADATIONS
Mask = Literal["none", "alpha", "file"]  # data/masks.py
BillOfMaterials = Literal["names", "hashes", "none"]  # training/bill/
