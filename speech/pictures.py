"""Pictures of a selection: the selector's confusions, and the WER by adapter set and by noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .decision import Costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_matrix(counts: Tensor, classes: Sequence[str], title: str) -> bytes:
    """A PNG of counts [true, found] of the selector, coloured by the share of the true noise.

    >>> import torch
    >>> confusion_matrix(torch.tensor([[3, 1], [0, 4]]), ["babble", "music"], "Selector")[1:4]
    b'PNG'
    """
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axis = _axes(len(classes), len(classes))
    image = axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axis, label="share of the true noise")
    for row, column in counts.nonzero().tolist():
        _write(axis, row, column, str(int(counts[row, column])), bool(share[row, column] > 0.5))
    _name(axis, classes, classes)
    axis.set(title=title, xlabel="found", ylabel="true noise")
    return _png(figure)


def wer_heat_map(costs: Costs, title: str) -> bytes:
    """A PNG of the WER of every set (rows) under every scenario (columns), the least one framed.

    >>> from .decision import Scenario
    >>> costs = Costs(("none", "a"), (Scenario("x"), Scenario("y")), ((10, 10), (4, 20)))
    >>> wer_heat_map(costs, "WER by set and noise")[1:4]
    b'PNG'
    """
    from matplotlib.patches import Rectangle

    figure, axis = _axes(len(costs.sets), len(costs.scenarios))
    top = max(max(row) for row in costs.wer) or 1.0
    image = axis.imshow(costs.wer, vmin=0, vmax=top, cmap="YlOrRd", aspect="auto")
    figure.colorbar(image, ax=axis, label="WER in %")
    for row, wers in enumerate(costs.wer):
        for column, wer in enumerate(wers):
            _write(axis, row, column, f"{wer:.1f}", wer > 0.6 * top)
            if wer == min(other[column] for other in costs.wer):
                place = (column - 0.5, row - 0.5)
                axis.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=2))
    _name(axis, costs.sets, [str(scenario) for scenario in costs.scenarios])
    axis.set(title=title, xlabel="noise", ylabel="adapter set")
    return _png(figure)


def _axes(rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    size = (min(16.0, 3.5 + 0.8 * columns), min(14.0, 2.5 + 0.5 * rows))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.subplots()


def _name(axis: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right")


def _write(axis: Any, row: int, column: int, text: str, dark: bool) -> None:
    colour = "white" if dark else "black"
    axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    return picture.getvalue()
