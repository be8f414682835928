"""Plots of the evaluation by matplotlib (pip install "latentdiff[plots]")."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.atomic import atomic_file
from latentdiff.evaluation.metrics.vlb import Z_95, TimestepBin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREEN = "#333333", "#0072b2", "#d55e00", "#009e73"  # Okabe & Ito 2008


def check_matplotlib() -> None:
    """Raise ValueError where matplotlib is missing, before any work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'the plots need matplotlib, which is not installed: pip install "latentdiff[plots]"'
        ) from error


def new_figure(*, columns: int, rows: int = 1, panel: tuple[float, float] = (5.0, 3.6)) -> Any:
    """Return a figure without a window, and its (rows, columns) axes; panel: inches of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as a whole PNG file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    return path


def plot_terms(along: Sequence[TimestepBin], path: Path) -> Path:
    """Plot the bound's terms and the caption's information by timestep."""
    figure, axes = new_figure(columns=2)
    terms, information = axes[0]
    t = [(s.first + s.last) / 2 for s in along]
    length = [s.last - s.first + 1 for s in along]
    for name, colour in (("unconditional", ORANGE), ("conditional", BLUE)):
        _band(terms, t, [getattr(s, name) for s in along], length, colour=colour, label=name)
    terms.set(yscale="log", xlabel="t", ylabel="$L_{t-1}$ (bits per dimension)")
    terms.legend(frameon=False)
    _band(information, t, [s.caption for s in along], length, colour=GREEN, label="")
    information.axhline(0, color=INK, linewidth=0.8)
    information.set(xlabel="t", ylabel="caption information (bits per dim)")
    return save(figure, path)


def _band(
    axes: Any,
    t: Sequence[float],
    values: Sequence[Any],
    length: Sequence[int],
    *,
    colour: str,
    label: str,
) -> None:
    """Plot means a step with their 95 % intervals."""
    mean = [v.mean / n for v, n in zip(values, length, strict=True)]
    half = [Z_95 * v.se_images / n for v, n in zip(values, length, strict=True)]
    axes.plot(t, mean, color=colour, label=label)
    low = [m - h for m, h in zip(mean, half, strict=True)]
    high = [m + h for m, h in zip(mean, half, strict=True)]
    axes.fill_between(t, low, high, color=colour, alpha=0.25, linewidth=0)


def plot_rate_distortion(along: Sequence[TimestepBin], path: Path) -> Path:
    """Plot distortion and rate along the reverse chain, and one against the other."""
    figure, axes = new_figure(columns=3, panel=(4.2, 3.4))
    t = [(s.first + s.last) / 2 for s in along]
    rate, distortion = [s.rate for s in along], [s.x0_rmse for s in along]
    panels = (
        ("t, from noise to clean", "distortion (RMSE of predicted latents)", t, distortion),
        ("t, from noise to clean", "rate (bits per dimension)", t, rate),
        ("rate (bits per dimension)", "distortion", rate, distortion),
    )
    for axis, (x_label, y_label, x, y) in zip(axes[0], panels, strict=True):
        axis.plot(x, y, color=BLUE)
        axis.set(xlabel=x_label, ylabel=y_label)
    for axis in axes[0][:2]:
        axis.invert_xaxis()
    return save(figure, path)


def plot_guidance(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Plot fidelity against diversity by guidance scale; points of `guidance_sweep`."""
    figure, axes = new_figure(columns=1)
    axis = axes[0][0]
    x = [p["diversity"]["mean"] for p in points]
    y = [p["fidelity"]["mean"] for p in points]
    axis.errorbar(
        x,
        y,
        xerr=[Z_95 * (p["diversity"]["se"] or 0) for p in points],
        yerr=[Z_95 * (p["fidelity"]["se"] or 0) for p in points],
        color=BLUE,
        marker="o",
    )
    for place, point in zip(zip(x, y, strict=True), points, strict=True):
        text = f"{point['guidance_scale']:g}"
        axis.annotate(text, place, xytext=(5, 5), textcoords="offset points", color=INK)
    axis.set(xlabel="diversity (distance between images of a caption)", ylabel="fidelity")
    return save(figure, path)


def plot_steps(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Plot distance and fidelity by number of steps; points of `step_report`."""
    figure, axes = new_figure(columns=2)
    x = [p["num_steps"] for p in points]
    panels = (
        ("to_most_steps", "distance to the most steps (RMS of latents)", BLUE),
        ("fidelity", "fidelity (bits per image)", GREEN),
    )
    for axis, (name, label, colour) in zip(axes[0], panels, strict=True):
        mean = [p[name]["mean"] for p in points]
        error = [Z_95 * (p[name]["se"] or 0) for p in points]
        axis.errorbar(x, mean, yerr=error, color=colour, marker="o")
        axis.set(xscale="log", xlabel="sampling steps", ylabel=label, xticks=x)
        axis.set_xticklabels([str(num) for num in x])
        axis.minorticks_off()
    return save(figure, path)
