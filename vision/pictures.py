"""Pictures that show a result: the confusion matrix, a comparison of methods or of ranks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_MOST_NAMES = 60  # more class names than this cannot be read beside a matrix


@dataclass(frozen=True)
class Point:
    """One row of a comparison: a name, its values by seed, the numbers that its adapters train."""

    name: str
    values: tuple[float, ...]
    trained: int


def confusion_matrix(counts: Tensor, classes: Sequence[str], title: str) -> bytes:
    """A PNG of counts [true, predicted], coloured by the share of the true class.

    >>> import torch
    >>> confusion_matrix(torch.tensor([[3, 1], [0, 4]]), ["cat", "dog"], "Pets")[1:4]
    b'PNG'
    """
    n = len(classes)
    side = min(14.0, 3.5 + 0.32 * n)
    figure = Figure(figsize=(side + 1.2, side), dpi=120, layout="constrained")
    axis = figure.subplots()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axis, label="share of the true class")
    axis.set(title=title, xlabel="predicted class", ylabel="true class")
    if n <= _MOST_NAMES:
        axis.set_xticks(range(n), [str(name) for name in classes], rotation=90)
        axis.set_yticks(range(n), [str(name) for name in classes])
    if n <= 20:
        _write_counts(axis, counts, share)
    return _png(figure)


def _write_counts(axis: Any, counts: Tensor, share: Tensor) -> None:
    for row, column in counts.nonzero().tolist():
        colour = "white" if share[row, column] > 0.5 else "black"
        text = str(int(counts[row, column]))
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


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
    return _png(figure)


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
    return _png(figure)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    return picture.getvalue()
