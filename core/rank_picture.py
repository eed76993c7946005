"""A heat map of live ranks: what each block of the backbone kept, by kind of weight."""

from __future__ import annotations

import io

from .live_ranks import RankTable


def rank_picture(table: RankTable, title: str = "live ranks") -> bytes:
    """A PNG: a column per layer, a row per kind, the live ranks as colour and number.

    Places without a site stay white. Needs matplotlib.

    >>> rank_picture(RankTable(("0", "1"), ("q", "v"), {("0", "q"): 3, ("1", "v"): 0}, 4))[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = len(table.layers), len(table.kinds)
    size = (2.6 + 0.42 * columns, 1.8 + 0.32 * rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axis = figure.subplots()
    cells = [[table.live.get((at, kind)) for at in table.layers] for kind in table.kinds]
    values = [[float("nan") if n is None else n for n in row] for row in cells]
    shown = axis.imshow(values, vmin=0, vmax=max(1, table.most), cmap="viridis", aspect="auto")
    for y, row in enumerate(cells):
        for x, live in enumerate(row):
            if live is not None:
                colour = "black" if live > table.most / 2 else "white"
                axis.text(x, y, str(live), ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(columns), [name or "outside" for name in table.layers], rotation=90)
    axis.set_yticks(range(rows), table.kinds)
    axis.set_xlabel("layer")
    axis.set_title(title)
    figure.colorbar(shown, label=f"live ranks, of at most {table.most}")
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # type: ignore[no-untyped-call]
    return content.getvalue()
