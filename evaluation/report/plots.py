"""Plots of a report, as SVG in data URLs."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLOURS = (
    "#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#8b5a2b", "#dd4477", "#66aa00", "#b82e2e",
    "#316395", "#22aa99", "#6633cc", "#777777",
)  # fmt: skip
MARKERS = "osD^vP*Xph<>dH"
STYLE: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
         "axes.spines.right": False, "svg.hashsalt": "report"}  # fmt: skip
FEW = 5
"""Lines with bands; of more the bands would hide one another, and bars take their place."""
Point = tuple[float, float, float, float]
"""x, mean, low, high."""


def quality_plots(results: dict[str, Any], name: str, title: str) -> list[str]:
    """Of one measure against the steps, and against the latency where that was measured."""
    lines = _lines(results, name, lambda row: float(row["steps"]))
    pictures = [_plot(lines, "steps", title)]
    timed = _lines(results, name, lambda row: row["latency"]["ms"]["whole"]["mean"] if row["latency"] else None)
    if any(timed.values()):
        pictures.append(_plot(timed, "milliseconds a picture", title))
    return pictures


def _lines(results: dict[str, Any], name: str, x: Any) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = {}
    for row in results["rows"]:
        interval, at = row["measures"].get(name), x(row)
        if interval and interval["mean"] is not None and at is not None:
            lines.setdefault(row["model"], []).append((at, interval["mean"], interval["low"], interval["high"]))
    return {model: sorted(points) for model, points in lines.items()}


def _plot(lines: dict[str, list[Point]], x: str, title: str) -> str:
    with plt.rc_context(STYLE):
        rows = (len(lines) + 1) // 2
        figure, axis = plt.subplots(figsize=(5.2, 3.3 + 0.19 * rows))
        for i, (model, points) in enumerate(lines.items()):
            at, mean, low, high = zip(*points, strict=True)
            colour = COLOURS[i % len(COLOURS)]
            bars = len(points) == 1 or len(lines) > FEW
            axis.plot(
                at, mean, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.4, label=model
            )
            if bars:
                spans = [
                    [m - a for m, a in zip(mean, low, strict=True)],
                    [b - m for m, b in zip(mean, high, strict=True)],
                ]
                axis.errorbar(at, mean, yerr=spans, color=colour, capsize=2, linewidth=0, elinewidth=0.9, alpha=0.7)
            else:
                axis.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in lines.values() for p in points})
        if x == "steps":
            axis.set_xticks(ticks, [f"{n:g}" for n in ticks])
        else:
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.minorticks_off()
        axis.set_xlabel(x)
        axis.set_ylabel(title)
        axis.grid(alpha=0.25)
        figure.legend(loc="lower center", ncol=2, frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, (0.19 * rows + 0.1) / (3.3 + 0.19 * rows), 1, 1))
        return _svg(figure)


def _svg(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
