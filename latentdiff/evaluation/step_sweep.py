"""What sampling steps buy: fidelity, diversity, and how far the picture still is from the last."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.diffusion.bound import estimate
from latentdiff.evaluation import plots
from latentdiff.evaluation.bound import plain
from latentdiff.evaluation.bound_data import Subject
from latentdiff.evaluation.clip_guidance import Clip
from latentdiff.evaluation.guidance_sweep import (
    check_sweep,
    draw_latents,
    measure,
    spread_captions,
)
from latentdiff.evaluation.options import SweepOptions


def step_report(
    subject: Subject,
    out: Path,
    steps: Sequence[int],
    *,
    options: SweepOptions,
    guidance_scale: float,
    clip: Clip | None = None,
) -> dict[str, Any]:
    """Draw the same captions from the same noise with each number of steps, and measure.

    Writes step_sweep.png into `out`. A point has fidelity, diversity and clip_score as those of the
    guidance sweep, and "to_most_steps", the root mean square distance of a picture's latents to
    those with the most steps.
    """
    check_sweep(options)
    asked = spread_captions(
        subject, options.sweep_captions, pictures_per_caption=options.sweep_pictures
    )
    chosen = sorted(set(steps))
    drawn = [
        draw_latents(subject, asked, guidance_scale=guidance_scale, num_steps=num) for num in chosen
    ]
    points = []
    for num, one in zip(chosen, drawn, strict=True):
        apart = (one.z0 - drawn[-1].z0).double().square().flatten(1).mean(1).sqrt()
        figures = measure(subject, one, per_caption=options.sweep_pictures, clip=clip)
        figures["to_most_steps"] = plain(estimate(apart.view(-1, options.sweep_pictures)))
        points.append({"num_steps": num} | figures)
    plots.plot_steps(points, out / "step_sweep.png")
    return {
        "captions": min(options.sweep_captions, len(subject.latents)),
        "pictures_per_caption": options.sweep_pictures,
        "guidance_scale": guidance_scale,
        "points": points,
    }
