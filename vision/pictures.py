"""Pictures that show a result: a comparison of methods or of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ..core.images.pictures import png


@dataclass(frozen=True)
class Point:
    """One row of a comparison: a name, its values by seed, the numbers that its adapters train."""

    name: str
    values: tuple[float, ...]
    trained: int


def comparison(points: Sequence[Point], label: str, title: str) -> bytes:
    """A PNG: every seed as a dot, their mean as a stroke, the size of the adapters beside it.

    >>> comparison([Point("lora", (0.8, 0.9), 512)], "test top-1", "One method")[1:4]
    b'PNG'
    """
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(points)), dpi=120, layout="constrained")
    axis = figure.subplots()
    for row, point in enumerate(points):
        mean = sum(point.values) / len(point.values)
        axis.plot(point.values, [row] * len(point.values), "o", color="tab:blue", alpha=0.6)
        axis.plot([mean], [row], "|", color="black", markersize=18)
    names = [f"{point.name}\n{point.trained:,} in adapters" for point in points]
    axis.set_yticks(range(len(points)), names, fontsize=8)
    axis.set_ylim(len(points) - 0.5, -0.5)
    axis.set(title=title, xlabel=f"{label} (dot: one seed, stroke: mean)")
    axis.grid(axis="x", alpha=0.3)
    return png(figure)


def rank_curve(
    scores: Mapping[int, Sequence[float]], elbow: int | None, label: str, title: str
) -> bytes:
    """A PNG: every seed as a dot over the rank, a line through the means, the elbow marked.

    >>> rank_curve({4: (0.8, 0.9), 8: (0.9, 0.92)}, None, "validation top-1", "LoRA")[1:4]
    b'PNG'
    """
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    for rank, values in scores.items():
        axis.plot([rank] * len(values), values, "o", color="tab:blue", alpha=0.6)
    axis.plot(list(scores), [sum(v) / len(v) for v in scores.values()], color="black")
    if elbow is not None:
        axis.axvline(elbow, color="tab:red", linestyle="--", label=f"elbow: rank {elbow}")
        axis.legend()
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(scores), [str(rank) for rank in scores])
    axis.set(title=title, xlabel="rank (dot: one seed, line: mean)", ylabel=label)
    axis.grid(alpha=0.3)
    return png(figure)
