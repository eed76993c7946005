"""What a sweep ends with: every point in sweep.csv, a table of means, and one picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .container import write_atomically
from .errors import AdaptError

TABLE, PICTURE = "sweep.csv", "sweep.png"
_NOT_MEASURED = ("epoch", "step", "lr")
Record = dict[str, Any]
Group = tuple[tuple[str, ...], list[dict[str, float]]]


def report(out: Path, keys: Sequence[str], records: Sequence[Record], metric: str | None) -> str:
    """Write table and picture into `out`; the table in words, a row per setting."""
    rows = [record["row"] for record in records if "row" in record]
    metrics = list(dict.fromkeys(n for row in rows for n in row if n not in _NOT_MEASURED))
    losses = [name for name in ("val_loss", "train_loss") if name in metrics]
    drawn = metric or [*losses, *metrics, ""][0]
    if rows and drawn not in metrics:
        raise AdaptError(f"metric {drawn!r} was not logged; logged: {', '.join(metrics)}")
    write_atomically(out / TABLE, _as_csv(keys, records, metrics).encode())
    told = []
    if rows:
        write_atomically(out / PICTURE, picture(keys, records, drawn))
        told = [table(keys, records, metrics), str(out / PICTURE)]
    failed = sum("row" not in record for record in records)
    told += [f"{failed} of {len(records)} points failed"] * bool(failed)
    return "\n".join([*told, str(out / TABLE)])


def table(keys: Sequence[str], records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Means over the seeds (+- standard deviation), a row for each combination of the others.

    >>> first = {"values": {"rank": "4", "seed": "0"}, "row": {"top1": 0.5}}
    >>> second = {"values": {"rank": "4", "seed": "1"}, "row": {"top1": 0.75}}
    >>> print(table(["rank", "seed"], [first, second], ["top1"]))
    rank  points  top1
    4     2       0.625 +- 0.1768
    """
    settings = _settings(keys)
    lines = [(*settings, "points", *metrics)]
    for values, rows in _groups(settings, records):
        cells = [_cell([row[name] for row in rows if name in row]) for name in metrics]
        lines.append((*values, str(len(rows)), *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def picture(keys: Sequence[str], records: Sequence[Record], metric: str) -> bytes:
    """A PNG: the metric over the first key, a line for each combination of the others.

    Seeds are no combination: their mean is drawn, and a bar from the lowest to the highest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, *others = _settings(keys)
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axis = figure.subplots()
    known = [record for record in records if metric in record.get("row", {})]
    place = _places(list(dict.fromkeys(record["values"][first] for record in known)))
    for values, _ in _groups(others, known):
        line = [r for r in known if tuple(r["values"][key] for key in others) == values]
        found = [(x, [row[metric] for row in rows]) for (x,), rows in _groups([first], line)]
        mean = [statistics.mean(y) for _, y in found]
        reach = [[m - min(y) for m, (_, y) in zip(mean, found, strict=True)]]
        reach += [[max(y) - m for m, (_, y) in zip(mean, found, strict=True)]]
        label = ", ".join(f"{key}={value}" for key, value in zip(others, values, strict=True))
        where = [place[x] for x, _ in found]
        axis.errorbar(where, mean, reach, marker="o", capsize=3, label=label or None)
    axis.set_xticks(list(place.values()), list(place))
    axis.set_xlabel(first)
    axis.set_ylabel(f"{metric} (as logged)")
    axis.set_title(f"{len(known)} fits" + (": mean, lowest, highest" * (len(known) > len(place))))
    axis.grid(alpha=0.3)
    if others:
        axis.legend(fontsize="small")
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # type: ignore[no-untyped-call]
    return content.getvalue()


def _settings(keys: Sequence[str]) -> list[str]:
    """The keys without those that only repeat a measurement; all of them if there is no other."""
    return [k for k in keys if k.rpartition(".")[2] not in ("seed", "seed_everything")] or [*keys]


def _groups(keys: Sequence[str], records: Sequence[Record]) -> list[Group]:
    """Values of the keys -> the rows that were measured with them, in their first order."""
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for record in records:
        if "row" in record:
            values = tuple(record["values"][key] for key in keys)
            groups.setdefault(values, []).append(record["row"])
    return list(groups.items())


def _places(values: Sequence[str]) -> dict[str, float]:
    """Where a value stands on the axis: numbers by their size, words one after another."""
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return {value: float(place) for place, value in enumerate(values)}


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.4g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def _as_csv(keys: Sequence[str], records: Sequence[Record], metrics: Sequence[str]) -> str:
    text = io.StringIO()
    columns = [*keys, *_NOT_MEASURED, *metrics, "seconds", "error"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in records:
        writer.writerow({**record.get("row", {}), **record, **record["values"]})
    return text.getvalue()
