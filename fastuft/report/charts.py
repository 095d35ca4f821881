"""Plots of the report as data URIs: curves as SVG, maps as PNG, drawn without pyplot's global state."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure as Canvas

from fastuft.names import printable
from fastuft.report.files import RunFiles

# Okabe and Ito's colors, which color-blind readers can distinguish; once they repeat, lines also differ in style.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5F5F5F")
STYLES = ("-", "--", ":", "-.")
CURVES = (
    ("loss", "loss"),
    ("loss_alignment", "alignment term of the loss"),
    ("loss_distribution", "distribution term of the loss"),
    ("lr", "learning rate"),
)
WATCHED = (("retrieval", "retrieval %"), ("source_clustering", "source clustering %"))
LOOKS = (
    ("effective_rank", "effective rank"),
    ("lidar", "LiDAR"),
    ("uniformity", "uniformity"),
    ("view_agreement", "view agreement"),
    ("neighbors_kept", "neighbors kept"),
    ("source_cka", "source CKA"),
)
_LABEL = 40  # characters of a name beside a plot

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "fastuft",
}


def _uri(canvas: Canvas, format: str) -> str:
    buffer = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in another script has boxes
        canvas.savefig(buffer, format=format, dpi=170, transparent=True, bbox_inches="tight", metadata=metadata)
    kind = "image/svg+xml" if format == "svg" else "image/png"
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered moving average over an odd ``window``, which is shorter at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= _LABEL else f"{shown[: _LABEL - 1]}…"


def _legend(owner: Canvas, handles: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """A legend that shows names as they are: no math between dollar signs, no name hidden for a leading underscore."""
    legend = owner.legend(handles, [str(number) for number in range(len(names))], **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=_short(name), parse_math=False)


def curves(arms: dict[str, list[RunFiles]], names: Collection[str]) -> str | None:
    """Loss, its two terms and learning rate against steps, for the first run of each named arm.

    Colors follow the order of ``arms``. None if there are no metrics.
    """
    shown = {name: runs[0] for name, runs in arms.items() if name in names and len(runs[0].series("loss")[0])}
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(9.2, 5.4), layout="constrained")
        panels = list(canvas.subplots(2, 2).flat)
        for axes, (key, title) in zip(panels, CURVES, strict=True):
            for number, name in enumerate(arms):
                if name not in shown:
                    continue
                steps, values = shown[name].series(key)
                if not len(steps):
                    continue
                color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
                window = 1 if key == "lr" else max(1, len(values) // 25) | 1
                if window > 1:
                    axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
                point = "o" if len(steps) == 1 else ""  # a line of one point would not be seen
                axes.plot(
                    steps, smooth(values, window), style, marker=point, color=color, linewidth=1.5, label=f"{number}"
                )
            axes.set_title(title)
            axes.set_xlabel("step")
        handles = panels[0].get_legend_handles_labels()[0]
        _legend(canvas, handles, list(shown), loc="outside lower center", ncols=min(4, len(shown)))
        return _uri(canvas, "svg")


def watched(arms: dict[str, list[RunFiles]]) -> str | None:
    """Accuracies evaluated during training, in per cent, against steps; None if nothing was watched."""
    return _panels(arms, "watch", WATCHED, scale=100)


def looks(arms: dict[str, list[RunFiles]]) -> str | None:
    """The label-free measures of a verdict against steps; None if no run has looks."""
    return _panels(arms, "look", LOOKS, scale=1)


def _panels(
    arms: dict[str, list[RunFiles]], kind: str, quantities: Sequence[tuple[str, str]], *, scale: float
) -> str | None:
    """Quantities of one kind of row, three panels per line; None if no run has any."""
    panels = [
        (key, title) for key, title in quantities if any(len(runs[0].series(key, kind)[0]) for runs in arms.values())
    ]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawn: dict[str, Artist] = {}
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(min(4.6, 9.2 / max(2, columns)) * columns, 2.8 * lines + 0.3), layout="constrained")
        grid = np.atleast_1d(canvas.subplots(lines, columns)).flatten()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, (key, title) in zip(grid, panels, strict=False):
            for number, (name, runs) in enumerate(arms.items()):
                steps, values = runs[0].series(key, kind)
                if len(steps):
                    color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
                    axes.plot(steps, scale * values, style, marker="o", markersize=3, color=color)
                    drawn[name] = axes.lines[-1]
            axes.set_title(title)
            axes.set_xlabel("step")
        _legend(canvas, list(drawn.values()), list(drawn), loc="outside lower center", ncols=min(4, len(drawn)))
        return _uri(canvas, "svg")


def class_colors(count: int) -> np.ndarray:
    """``count`` colors [count, 4]: up to ten distinct ones, otherwise hues around the circle at two lightnesses."""
    if count <= 10:
        return matplotlib.colormaps["tab10"](np.arange(count))
    hues = matplotlib.colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))
    hues[:, :3] *= np.where(np.arange(count) % 2, 0.95, 0.65)[:, None]
    return hues


def maps(arms: dict[str, list[RunFiles]], classes: Sequence[str]) -> str | None:
    """t-SNE maps of the arms side by side, points colored by class; None if no run has one."""
    shown = {name: runs[0].arrays for name, runs in arms.items() if "tsne" in runs[0].arrays}
    if not shown:
        return None
    colors = class_colors(max(1, len(classes)))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(3.1 * columns, 3.2 * lines), layout="constrained")
        panels = np.atleast_1d(canvas.subplots(lines, columns)).flatten()
        for axes in panels:
            axes.set_axis_off()
        for axes, (name, arrays) in zip(panels, shown.items(), strict=False):
            points, labels = arrays["tsne"], arrays["tsne_labels"]
            tint = [colors[label % len(colors)] if label >= 0 else (0.35, 0.35, 0.35, 1.0) for label in labels]
            axes.scatter(points[:, 0], points[:, 1], s=max(3, 2400 / len(points)), c=tint, linewidths=0, alpha=0.85)
            axes.set_title(_short(name), loc="center", parse_math=False)
            axes.set_aspect("equal", adjustable="datalim")
        if 1 < len(classes) <= 20 and any((arrays["tsne_labels"] >= 0).any() for arrays in shown.values()):
            marks = [
                matplotlib.lines.Line2D([], [], marker="o", linestyle="", markersize=5, color=color)
                for color in colors[: len(classes)]
            ]
            _legend(
                canvas,
                marks,
                classes,
                loc="outside lower center",
                ncols=min(4 * columns, len(marks)),
                handletextpad=0.1,
            )
        return _uri(canvas, "png")
