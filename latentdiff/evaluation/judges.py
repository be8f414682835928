"""What an evaluation draws and by whom it is judged, as a person asks for it."""

from dataclasses import dataclass

from latentdiff.evaluation.bound_data import choose_device
from latentdiff.evaluation.clip_guidance import Clip, load_clip, load_open_clip
from latentdiff.evaluation.features import Features, open_features
from latentdiff.evaluation.guidance_sweep import check_sweep
from latentdiff.evaluation.options import EvaluationOptions, SubjectOptions, SweepOptions

FEWEST_PICTURES = 8
FEWEST_TRAIN = 3


@dataclass(frozen=True, eq=False)
class Judges:
    """The networks that judge pictures."""

    clip: Clip | None
    features: Features | None


def check(options: EvaluationOptions, sweep: SweepOptions) -> None:
    """Raise ValueError for options out of range."""
    num, each = options.num_pictures, options.pictures_per_caption
    if num and num < FEWEST_PICTURES:
        raise ValueError(f"num_pictures={num}, expected 0 or at least {FEWEST_PICTURES}")
    if each < 1 or (num and 2 * each > num):
        raise ValueError(
            f"pictures_per_caption={each}, expected at least 1, and num_pictures={num} to give two "
            "captions or more"
        )
    lowest = {"steps": 1, "num_train": FEWEST_TRAIN}
    for name, least in lowest.items():
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name}={value}, expected at least {least}")
    if min(options.step_sweep, default=1) < 1:
        raise ValueError(f"step_sweep={options.step_sweep}, expected at least one step each")
    if options.clip_weights and not options.clip:
        raise ValueError("clip_weights needs the open_clip model's name as --clip")
    if sweep.guidance_sweep or options.step_sweep:
        check_sweep(sweep)


def open_judges(options: EvaluationOptions, data: SubjectOptions) -> Judges:
    """Open the networks that are given; ValueError or FileNotFoundError says what is wrong."""
    device = choose_device(data.device)
    clip = None
    if options.clip and options.clip_weights:
        clip = load_open_clip(options.clip, options.clip_weights, device=device)
    elif options.clip:
        clip = load_clip(options.clip, device=device)
    features = open_features(options.features, device=device) if options.features else None
    return Judges(clip, features)
