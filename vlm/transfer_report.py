"""What sets do on other classes and other data, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean, mean

from .few_shot_report import share
from .records import Record


@dataclass(frozen=True)
class Summary:
    """The last column: its name, and its number from one seed's (of the trained data first)."""

    name: str
    of: Callable[[Sequence[float]], float]


HARMONIC = Summary("harmonic mean", harmonic_mean)
AVERAGE = Summary("average of the others", lambda values: mean(values[1:]))


def table(records: Sequence[Record], summary: Summary) -> str:
    """Markdown: a row per method, a column per data set, mean top-1 (+- deviation over seeds).

    The first record is of the data that is trained on.
    """
    titles = [*dict.fromkeys(record.data for record in records)]
    rows = [["method", "trainable", *titles, summary.name]]
    rows += [["---"] * len(rows[0])]
    methods = dict.fromkeys(record.method for record in records)
    rows += [_row([r for r in records if r.method == name], titles, summary) for name in methods]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", _told(records)])


def _row(mine: Sequence[Record], titles: Sequence[str], summary: Summary) -> list[str]:
    seeds = dict.fromkeys(record.seed for record in mine)
    found = {(record.seed, record.data): record.top1 for record in mine}
    by_seed = [[found[seed, title] for title in titles] for seed in seeds]
    cells = [share(column) for column in zip(*by_seed, strict=True)]
    last = share([summary.of(values) for values in by_seed])
    return [mine[0].method, f"{mine[0].trainable:,}", *cells, last]


def _told(records: Sequence[Record]) -> str:
    source = records[0].data
    trained = [record for record in records if record.shots] or records
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(record.seed for record in trained))
    sizes = {r.data: f"{r.data} {r.classes} ({r.test_images:,})" for r in records}
    templates = {r.data: f"{r.data} {r.template!r}" for r in records}
    same = len({record.template for record in records}) == 1
    said = repr(records[0].template) if same else ", ".join(templates.values())
    shots = max(record.shots for record in records)
    training = f" Trained on {shots} shots of {source}." if shots else ""
    return (
        f"Top-1 %, mean +- standard deviation over the seeds {seeds}.{training} Backbone"
        f" {records[0].backbone}. Classes (test images): {', '.join(sizes.values())}. Every data"
        f" set is asked about its own classes. Template: {said}."
    )
