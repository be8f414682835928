"""The bound and the sweeps as sections of the report, from their JSON figures."""

from pathlib import Path
from typing import Any

from latentdiff.evaluation.metrics.bootstrap import Interval
from latentdiff.evaluation.report.section import Row, Section

BOUND_IMAGES = ("bound_terms.png", "rate_distortion.png", "progressive.png", "interpolation.png")


def bound_section(figures: dict[str, Any], out: Path) -> Section:
    """Show the figures and plots of `bound_report`."""
    num = figures["num_images"]
    known = (
        ("Bits per dimension with captions", figures["conditional"]["bits_per_dim"]),
        ("Bits per dimension without", figures["unconditional"]["bits_per_dim"]),
        ("Worth of the caption, bits per dimension", figures["caption_bits_per_dim"]),
        ("Worth of the caption, bits per image", figures["caption_bits_per_image"]),
    )
    rows = [Row(label, _value(estimate, num)) for label, estimate in known]
    shape = " x ".join(map(str, figures["latent_shape"]))
    notes = [
        f"The variational bound of latents of {shape} over {figures['num_timesteps']} steps: a "
        "density, so it may be negative and compares models of the same latents only."
    ]
    plots = [out / name for name in BOUND_IMAGES if (out / name).is_file()]
    return Section("bound", "Variational bound", figures, rows, notes, plots=plots)


def guidance_section(figures: dict[str, Any], out: Path) -> Section:
    """Show the figures and the plot of `sweep_report`."""
    rows = _sweep_rows(figures, "guidance_scale", "guidance {:g}")
    notes = [
        "Fidelity: bits that an image's caption is worth to the unguided model. Diversity: root "
        "mean square distance between latents of a caption."
    ]
    plots = [out / "guidance_sweep.png"]
    return Section(
        "guidance", "Guidance scale", figures, rows, notes, plots=plots, has_headline=False
    )


def steps_section(figures: dict[str, Any], out: Path) -> Section:
    """Show the figures and the plot of `step_report`."""
    rows = _sweep_rows(figures, "num_steps", "{} steps")
    notes = [f"At guidance {figures['guidance_scale']:g}, from the same noise each time."]
    plots = [out / "step_sweep.png"]
    return Section("steps", "Sampling steps", figures, rows, notes, plots=plots, has_headline=False)


def _sweep_rows(figures: dict[str, Any], key: str, label: str) -> list[Row]:
    names = ("fidelity", "diversity", "clip_score", "to_most_steps")
    return [
        Row(f"{label.format(point[key])}: {name.replace('_', ' ')}", _value(point[name], num))
        for num in [figures["captions"]]
        for point in figures["points"]
        for name in names
        if name in point
    ]


def _value(estimate: dict[str, Any], num: int) -> Interval | str:
    if estimate["interval_95"] is None:
        return f"{estimate['mean']:.4g}"
    low, high = estimate["interval_95"]
    return Interval(estimate["mean"], low, high, 0.95, num)
