"""Pictures of what a classifier of images found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_MOST_NAMES = 60  # more class names than this cannot be read beside a matrix


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
    return png(figure)


def _write_counts(axis: Any, counts: Tensor, share: Tensor) -> None:
    for row, column in counts.nonzero().tolist():
        colour = "white" if share[row, column] > 0.5 else "black"
        text = str(int(counts[row, column]))
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    return picture.getvalue()
