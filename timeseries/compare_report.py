"""A comparison of forecasters as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..core.images.pictures import png
from .compare_run import Record
from .peers import ONE_FOR_ALL, PEERS

_HEAD = ("method", "MSE", "MAE", "trainable", "stored", "with frozen layers", "seconds")
_NOTE = (
    "stored: bytes of what was trained; with frozen layers: and of all that was drawn at random and"
    " stayed frozen, which a file needs, or its seed. Seconds: training and test, mean over seeds."
)


def table(records: Sequence[Record], published: bool = False) -> str:
    """Markdown, a table per horizon: means over seeds (+- standard deviation)."""
    parts = [_of_horizon(records, horizon, published) for horizon in _horizons(records)]
    seeds = ", ".join(str(seed) for seed in sorted({r.seed for r in records if r.lr}))
    first = records[0]
    backbones = {r.backbone: None for r in records if r.backbone}
    told = f"Data {first.data}, look-back {first.look_back}"
    told += "".join(f", backbone {backbone}" for backbone in backbones)
    told += f"; seeds {seeds}. " if seeds else ". "
    lines = ["\n\n".join(parts), "", told + _NOTE]
    if published and first.data in ONE_FOR_ALL:
        mse, mae = ONE_FOR_ALL[first.data]
        lines.append(
            f"One-for-All's paper (GPT-2) has MSE {mse:.2f} and MAE {mae:.2f}, means over 96, 192,"
            " 336 and 720. Published rows: other backbone weights, look-backs and test loaders."
        )
    return "\n".join(lines)


def _of_horizon(records: Sequence[Record], horizon: int, published: bool) -> str:
    mine = [record for record in records if record.horizon == horizon]
    rows = [_HEAD, ("---",) * len(_HEAD)]
    rows += [_row([r for r in mine if r.method == name]) for name in _methods(mine)]
    if published:
        for name, (mse, mae) in _peers(mine).items():
            rows.append((f"*{name}, published*", f"{mse:.3f}", f"{mae:.3f}", *"----"))
    title = f"### {horizon} steps ahead, {mine[0].windows:,} test windows\n"
    return "\n".join([title, *("| " + " | ".join(row) + " |" for row in rows)])


def _row(mine: Sequence[Record]) -> tuple[str, ...]:
    first = mine[0]
    return (
        first.method,
        _spread([r.mse for r in mine]),
        _spread([r.mae for r in mine]),
        f"{first.trainable:,}",
        f"{first.stored_bytes:,}",
        f"{first.whole_bytes:,}",
        f"{statistics.mean(r.fit_seconds + r.test_seconds for r in mine):.0f}",
    )


def _spread(values: Sequence[float]) -> str:
    told = f"{statistics.mean(values):.4f}"
    return f"{told} +- {statistics.stdev(values):.4f}" if len(values) > 1 else told


def _methods(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.method for record in records))


def _horizons(records: Sequence[Record]) -> list[int]:
    return sorted({record.horizon for record in records})


def picture(records: Sequence[Record], published: bool = False) -> bytes:
    """A PNG: a panel per horizon, a line per method, a dot per seed; the mean as a bar.

    A panel is as wide as the methods that learn need; what lies beyond is written at its edge.
    """
    horizons, names = _horizons(records), _methods(records)
    size = (1.6 + 4.6 * len(horizons), 1.6 + 0.34 * (len(names) + 5 * published))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(1, len(horizons), squeeze=False).flat
    for axis, horizon in zip(axes, horizons, strict=True):
        mine = [record for record in records if record.horizon == horizon]
        rows = {name: [r.mse for r in mine if r.method == name] for name in names}
        learned = [r.mse for r in mine if r.lr]
        if published:
            known = {f"{name} (published)": [mse] for name, (mse, _) in _peers(mine).items()}
            rows |= known
            learned += [mse for (mse,) in known.values()]
        _draw(axis, rows, learned or [r.mse for r in mine])
        axis.set(title=f"{horizon} steps ahead", xlabel="test MSE (scaled)")
    figure.suptitle(f"{records[0].data}, look-back {records[0].look_back}")
    return png(figure)


def _draw(axis: Axes, rows: Mapping[str, Sequence[float]], within: Sequence[float]) -> None:
    margin = 0.05 * max(within) if len(set(within)) == 1 else 0.1 * (max(within) - min(within))
    high = max(within) + margin
    for place, (name, values) in enumerate(rows.items()):
        style = "D" if name.endswith("(published)") else "o"
        axis.plot(values, [place] * len(values), style, markersize=5, alpha=0.6)
        if values and statistics.mean(values) > high:
            axis.text(
                high, place, f"{statistics.mean(values):.3f} \u2192 ", ha="right", va="center"
            )
        elif len(values) > 1:
            axis.plot(statistics.mean(values), place, "k|", markersize=14)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xlim(min(within) - margin, high)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)


def _peers(mine: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """The published (MSE, MAE) by model, for the data and horizon of these records."""
    first = mine[0]
    known = PEERS.get(first.data, {}).items()
    return {name: row[first.horizon] for name, row in known if first.horizon in row}
