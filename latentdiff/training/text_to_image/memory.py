"""The memory that a run needs, estimated before its first step.

Weights, gradients, optimiser and averages follow from the parameters; what else a step takes at its
peak comes from a forward and backward pass of one micro-batch on fake tensors, which have sizes and
no contents, and from the updates. The kernels' own memory and the allocator's unused blocks come on
top.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from latentdiff.models.compatibility import CONDITION_KINDS, reads_time_ids
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.training.finetune.lokr import without_drawing
from latentdiff.training.fsdp import is_sharded, local_shard
from latentdiff.training.inputs.batches import BatchLayout
from latentdiff.training.inputs.encode import bucket_sizes
from latentdiff.training.optim.memory import (
    PeakMemory,
    num_bytes,
    optimizer_bytes,
    update_bytes,
)
from latentdiff.training.text_to_image.setup import Run

logger = logging.getLogger(__name__)
USABLE = 0.85  # share of a GPU's memory; the rest is for kernels and unused blocks
PARTS = {
    "unet": "U-Net",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "vae": "VAE",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process while it trains.

    gradients: all, or the largest where each is used at once. averages: on the accelerator;
    host_averages: with train.ema_device=cpu. activations: all else of a step at its peak, with the
    tensors of an update; None where they cannot be estimated.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    host_averages: int
    activations: int | None

    @property
    def on_device(self) -> int:
        """All of it but the averages on the host."""
        known = self.weights + self.gradients + self.optimizer + self.averages
        return known + (self.activations or 0)


def usable_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that training may plan with; None for other devices."""
    if device.type != "cuda":
        return None
    return int(USABLE * torch.cuda.get_device_properties(device).total_memory)


def fitting_layout(run: Run, *, available: int | None) -> BatchLayout:
    """Return the layout whose micro-batch needs at most `available` bytes, by the estimate.

    Halved until it fits; one image at once where even that does not. The run's own where the config
    names a micro-batch, or where memory is not known. The sums of a step, and so its result but for
    rounding, are those of the whole batch. Every process must call it; all take the smallest.
    """
    layout = run.layout
    if run.config.train.micro_batch_size or available is None:
        return layout
    while layout.micro_batch_size > 1:
        memory = estimate_memory(replace(run, layout=layout))
        if memory.activations is None or memory.on_device <= available:
            break
        layout = replace(layout, micro_batch_size=-(-layout.micro_batch_size // 2))
    smallest = min(gather_object([layout.micro_batch_size]))
    return replace(layout, micro_batch_size=smallest)


def estimate_memory(run: Run) -> Memory:
    """Estimate the memory of this process; the module's docstring names the parts not included."""
    components, train_step = run.components, run.train_step
    parts = [getattr(components, name) for name in PARTS]
    modules: list[nn.Module] = [part for part in parts if part is not None]
    if run.teacher is not None:
        modules.append(run.teacher.unet)
    if run.controlnet is not None:
        modules.append(run.controlnet)
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    trained = [local_shard(parameter) for parameter in train_step.parameters.values()]
    copies = 2 if run.layout.num_processes > 1 and not is_sharded(train_step.parameters) else 1
    averages = [
        average for average in (train_step.ema, *train_step.posthoc_emas.values()) if average
    ]
    is_host = run.config.train.ema_device == "cpu" and run.accelerator.device.type != "cpu"
    total = sum(average.num_bytes for average in averages)
    return Memory(
        weights=num_bytes(
            local_shard(x) for x in tensors if x.device.type == run.accelerator.device.type
        ),
        gradients=copies * _gradient_bytes(trained, run),  # processes send them from buckets
        optimizer=optimizer_bytes(
            train_step.optimizer.param_groups, name=run.config.train.optimizer
        ),
        averages=0 if is_host else total,
        host_averages=total if is_host else 0,
        activations=activations_of(run),
    )


def _gradient_bytes(trained: Sequence[Tensor], run: Run) -> int:
    """Return the bytes of all gradients, or of the largest where each is used at once."""
    sizes = [num_bytes([tensor]) for tensor in trained]
    return max(sizes) if run.config.train.fused_backward_pass else sum(sizes)


@dataclass(frozen=True)
class Update:
    """The memory of an update of the weights.

    num_bytes: that of one parameter, besides its gradient. is_fused: each is updated within the
    backward pass, which frees its gradient.
    """

    num_bytes: Callable[[Tensor], int]
    is_fused: bool


def estimate_activations(
    model: nn.Module,
    inputs: Callable[[], tuple[Any, ...]],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    update: Update | None = None,
    accumulates: bool = False,
) -> int:
    """Return the peak bytes of a training step, besides weights, optimiser state and gradients.

    inputs: makes the model's arguments; it is called where tensors have no contents. update: how
    weights are updated, else not at all. accumulates: gradients are there before the pass. Nothing
    is computed, and the model stays as it is. Raises RuntimeError for operations whose output has
    an unknown size.
    """
    # An autograd engine whose first pass is fake starts threads, after which a fork cannot train.
    torch.ones((), requires_grad=True).backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a frozen text encoder's weights
    sizes = PeakMemory()
    with mode:
        named = (*model.named_parameters(), *model.named_buffers())
        fakes: dict[str, Tensor] = {f"model.{name}": mode.from_tensor(x) for name, x in named}
        trained = [fake for fake in fakes.values() if fake.requires_grad]
        updates = [0 if update is None else update.num_bytes(fake) for fake in trained]
        for fake, needed in zip(trained, updates, strict=True):
            if update is not None and update.is_fused:
                fake.register_post_accumulate_grad_hook(partial(_update, sizes, needed))
        with sizes:
            arguments = inputs()
            for fake in trained if accumulates else ():
                fake.grad = torch.zeros_like(fake)
            functional_call(_Pass(model, autocast), fakes, arguments)
            if update is not None and not update.is_fused:
                sizes.add_for_a_moment(max(updates))
    gradients = [num_bytes([fake]) for fake in trained]
    return sizes.peak - (max(gradients) if update and update.is_fused else sum(gradients))


def _update(sizes: PeakMemory, num_bytes: int, parameter: Tensor) -> None:
    """Do as a hook that updates a parameter within the backward pass, and frees its gradient."""
    sizes.add_for_a_moment(num_bytes)
    parameter.grad = None


class _Pass(nn.Module):
    """A forward and backward pass, within which the model's parameters may be exchanged."""

    def __init__(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, *arguments: Any) -> None:
        with self.autocast():
            output = self.model(*arguments)
        output.float().square().mean().backward()


def activations_of(run: Run) -> int | None:
    """Estimate the activations of one micro-batch; None, with the reason logged, where it fails."""
    if is_sharded(run.train_step.parameters) or run.config.train.attention == "xformers":
        return None
    model = run.train_step.model
    device = next(model.parameters()).device  # the accelerator's may be called cpu:0
    null = run.train_data.null_text
    codec, n = LatentCodec(run.components.vae), run.layout.micro_batch_size
    largest = max(bucket_sizes(run.config.data), key=lambda bucket: bucket.height * bucket.width)
    height, width = largest.height // codec.factor, largest.width // codec.factor

    def inputs() -> tuple[Tensor, Tensor, Conditioning]:
        zt = torch.empty(n, codec.channels, height, width, device=device)
        t = torch.empty(n, dtype=torch.int64, device=device)
        empty = null.map(lambda x: torch.empty(n, *x.shape[1:], dtype=x.dtype, device=device))
        if reads_time_ids(run.components.unet.config):
            time_ids = torch.empty(n, 6, dtype=torch.int64, device=device)
            empty = replace(empty, time_ids=time_ids)
        return zt, t, replace(empty, **_condition(run, zt))

    try:
        with without_drawing(model):
            return estimate_activations(
                model,
                inputs,
                autocast=run.accelerator.autocast,
                update=_update_of(run),
                accumulates=run.layout.accumulation > 1,
            )
    except RuntimeError as error:
        logger.warning("the memory of activations cannot be estimated: %s", error)
        return None


def _update_of(run: Run) -> Update:
    """Return the memory of a run's updates; 0 of those that update all parameters at once."""
    settings = run.config.train
    one_by_one = settings.fused_backward_pass or settings.full_bf16
    is_known = one_by_one or settings.optimizer == "adafactor"
    return Update(
        partial(update_bytes, name=settings.optimizer) if is_known else lambda parameter: 0,
        is_fused=settings.fused_backward_pass,
    )


def _condition(run: Run, zt: Tensor) -> dict[str, Tensor]:
    """Return the condition of noisy latents (B, C, h, w), where the model reads one."""
    kind = run.config.condition.kind
    if run.controlnet is not None:
        factor = LatentCodec(run.components.vae).factor
        sides = [side * factor for side in zt.shape[2:]]
        return {"control": torch.empty(len(zt), 3, *sides, device=zt.device)}
    if kind == "none":
        return {}
    condition = CONDITION_KINDS[kind]
    labels = torch.empty(len(zt), dtype=torch.int64, device=zt.device)
    num = condition.num_channels(zt.shape[1])
    found = {"condition": torch.empty(len(zt), num, *zt.shape[2:], device=zt.device)}
    return found | ({"class_labels": labels} if condition.num_class_embeds else {})
