"""The privacy receipt: what a model betrays of its training images, by fixed draws of its loss.

Measures members against held-out images of their kind, and canaries against their twins where the
run planted them; generates images and looks for copies. The statistics are membership.py's.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.audit.membership import Membership, membership, membership_scores
from latentdiff.config.options import PrivacyOptions
from latentdiff.config.validation import check_ranges
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.evaluation.eval_set import (
    EvalModel,
    audit_options,
    encode_folder,
    open_denoiser,
    read_real_images,
    read_split,
    subsample,
)
from latentdiff.evaluation.generate import GeneratedImages, generate
from latentdiff.evaluation.metrics.features import THUMBNAILS, embed_sets
from latentdiff.evaluation.metrics.heldout_loss import (
    Triples,
    stratified_timesteps,
    triple_losses,
)
from latentdiff.evaluation.metrics.vlb import Chain, unet_model
from latentdiff.evaluation.report.memorization import memorization_section
from latentdiff.evaluation.report.section import Section
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_info import default_guidance, default_steps
from latentdiff.training.inputs.canaries import canary_folders

MIN_IMAGES = 5  # of each kind: fewer tell nothing
NUM_STEPS = 25  # sampling steps of a model whose folder names none
MEMBERS, OTHERS, CANARIES, TWINS = "members", "held-out", "canaries", "twins"


@dataclass(frozen=True)
class PrivacyReceipt:
    """What was measured. scores: of each image, by the name of its folder in `folders`.

    canaries: None where the run planted none; base: how well the base model, which saw neither,
    tells members from others; copies: None where no image was generated.
    """

    model: EvalModel
    folders: Mapping[str, Folder]
    scores: Mapping[str, Tensor]
    members: Membership
    canaries: Membership | None = None
    base: Membership | None = None
    copies: Section | None = None
    notes: list[str] = field(default_factory=list)


def audit_privacy(model: str, options: PrivacyOptions) -> PrivacyReceipt:
    """Measure what a model betrays of its training images.

    ValueError or OSError names what is wrong with a folder or a model before heavy work;
    FloatingPointError tells of a damaged model.
    """
    check_ranges(options)
    folders = dict(_read_folders(model, options))
    eval_model = open_denoiser(model, audit_options(options, split="train"))
    losses = _losses(eval_model, folders, draws=options.draws)
    base_losses: dict[str, Tensor] = {}
    if options.base:
        base = open_denoiser(options.base, audit_options(options, split="train"))
        base_losses = _losses(base, folders, draws=options.draws)
    scores = _scores(losses, base_losses)
    own = membership_scores(torch.cat([*base_losses.values()])) if base_losses else None
    num = len(folders[MEMBERS])
    return PrivacyReceipt(
        eval_model,
        folders,
        scores,
        membership(scores[MEMBERS], scores[OTHERS]),
        membership(scores[CANARIES], scores[TWINS]) if CANARIES in scores else None,
        None if own is None else membership(own[:num], own[num : num + len(folders[OTHERS])]),
        _copies(eval_model, folders, options) if options.num_images else None,
    )


def _scores(losses: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each folder's scores; canaries, which look like nothing else, apart from the rest."""
    scores: dict[str, Tensor] = {}
    for pair in ((MEMBERS, OTHERS), (CANARIES, TWINS)):
        if pair[0] not in losses:
            continue
        own, of_base = (
            torch.cat([one[name] for name in pair]) if one else None for one in (losses, base)
        )
        assert own is not None
        both = membership_scores(own, base=of_base)
        scores |= dict(zip(pair, both.split([len(losses[name]) for name in pair]), strict=True))
    return scores


def _read_folders(model: str, options: PrivacyOptions) -> Iterator[tuple[str, Folder]]:
    """Yield the folders of members and others, and of canaries and twins where there are any."""
    own = audit_options(options, split="train")
    members = _enough(read_split(own, "train"), options.data, options)
    if options.heldout:
        others = read_split(audit_options(options, split="train", data=options.heldout), "all")
    else:
        others = read_split(own, "heldout")
    where = options.heldout or f"the held-out split of {options.data}"
    others = _enough(others, where, options)
    _refuse_shared(members, others)
    yield MEMBERS, members
    yield OTHERS, others
    if (found := canary_folders(Path(resolve_model(model)))) is not None:
        for name, root in zip((CANARIES, TWINS), found, strict=True):
            yield name, read_folder(root)


def _enough(folder: Folder, where: str, options: PrivacyOptions) -> Folder:
    """Return at most max_images records; ValueError where there are fewer than MIN_IMAGES."""
    if len(folder) < MIN_IMAGES:
        raise ValueError(
            f"{where} has {len(folder)} images, expected {MIN_IMAGES} or more: name a folder of "
            "images of the same kind that the model was not trained on by --heldout"
        )
    return subsample(folder, options.max_images)


def _refuse_shared(members: Folder, others: Folder) -> None:
    """Raise ValueError for an image that is a member and held out too."""
    first, second = (
        {hashlib.sha256(one.read_bytes(i)).digest(): one[i].id for i in range(len(one))}
        for one in (members, others)
    )
    if both := first.keys() & second.keys():
        key = min(both, key=lambda one: first[one])
        raise ValueError(
            f"{len(both)} held-out images are training images too, such as {second[key]}, which "
            f"is {first[key]}: an audit needs images that the model never saw"
        )


def _losses(
    eval_model: EvalModel, folders: Mapping[str, Folder], *, draws: int
) -> dict[str, Tensor]:
    """Return the losses of each folder's images on the same draws, (N, draws) float64."""
    found = {}
    for name, folder in folders.items():
        latents = eval_model.latents  # of the members
        if name != MEMBERS:
            latents = encode_folder(
                eval_model.components,
                folder,
                batch_size=eval_model.batch_size,
                device=eval_model.device,
                seed=eval_model.seed,
            )
        found[name] = image_losses(replace(eval_model, latents=latents), draws=draws)
    return found


def image_losses(eval_model: EvalModel, *, draws: int) -> Tensor:
    """Return the loss of each image at timesteps in strata, with one noise for all, (N, draws).

    Squared errors of the model's own prediction, float64; FloatingPointError where one is NaN.
    """
    chain, latents = Chain.of(eval_model.components), eval_model.latents
    schedule = chain.schedule.to(eval_model.device)
    num = len(latents)
    noise = torch.randn(draws, *latents.z0.shape[1:], generator=eval_model.generator())
    rows = []

    def denoise(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        unet = eval_model.components.unet
        return unet_model(unet, conditioning, num_outputs=chain.channels)(zt, t)

    for t, eps in zip(stratified_timesteps(draws, schedule.num_timesteps), noise, strict=True):
        triples = Triples(
            latents.z0,
            eps.expand(num, -1, -1, -1),
            t.expand(num),
            latents.conditioning,
            latents.null_conditioning,
        )
        measured = triple_losses(
            denoise,
            schedule,
            triples,
            prediction_type=chain.prediction_type,
            device=eval_model.device,
            captions=["true"],
        )
        rows.append(measured["true"])
    losses = torch.stack(rows, 1).double().cpu()
    if not losses.isfinite().all():
        raise FloatingPointError("the model's loss became NaN or Inf; is the folder damaged?")
    return losses


def _copies(
    eval_model: EvalModel, folders: Mapping[str, Folder], options: PrivacyOptions
) -> Section:
    """Generate images of training captions, evenly spaced, and look for copies among them."""
    size = eval_model.size
    train, heldout = (read_real_images(folders[name], size=size) for name in (MEMBERS, OTHERS))
    generated = _generate(eval_model, train.subsample(options.num_images).captions, options)
    features = embed_sets(
        THUMBNAILS,
        generated.flat,
        heldout.bytes,
        train.bytes,
        batch_size=eval_model.batch_size,
        device=eval_model.device,
    )
    return memorization_section(features, generated, train, num_train_in_all=len(train))


def _generate(
    eval_model: EvalModel, captions: tuple[str, ...], options: PrivacyOptions
) -> GeneratedImages:
    is_sdxl = eval_model.components.text_encoder_2 is not None
    scale = options.guidance_scale
    return generate(
        eval_model.pipeline(),
        captions,
        per_caption=1,
        num_inference_steps=default_steps(eval_model.info, NUM_STEPS),
        guidance_scale=default_guidance(eval_model.info, is_sdxl=is_sdxl)
        if scale is None
        else scale,
        first_seed=options.seed,
        batch_size=eval_model.batch_size,
        folder=Path(options.out) / "images",
    )
