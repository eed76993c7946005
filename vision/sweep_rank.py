"""`polyadapt vision sweep-rank`: a configuration at several ranks, and where the gain ends."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.records import records_csv
from .compare import whole_numbers
from .records import Fit, Part, Record, records_of, seeded

MEASURED = {"val": "validation", "test": "test"}


def main(argv: list[str]) -> int:
    """Fit every rank with every seed, print and write table and picture; finished fits are kept."""
    asked = _parser().parse_args(argv)
    from .which_task import refuse_segmentation

    refuse_segmentation("sweep-rank", asked.config)
    # The largest first: one that does not fit is refused before the others are trained.
    ranks = sorted(asked.ranks, reverse=True)
    points = [(rank, seed) for seed in asked.seeds for rank in ranks]
    fits = [rank_fit(asked.config, rank, seed, asked.out, asked.part) for rank, seed in points]
    _write(asked.out, records_of(fits))
    return 0


def rank_fit(config: Path, rank: int, seed: int, out: Path, part: Part) -> Fit:
    """The configuration at this rank; `rank_fit(...).record()` fits and measures it, once."""
    words = (f"--config={config}", f"--model.adapter.init_args.rank={rank}", *seeded(seed))
    return Fit(words=words, folder=out / f"rank{rank}-seed{seed}", part=part, name=f"rank {rank}")


def elbow(scores: Mapping[int, float]) -> int | None:
    """The rank at which a score that rises with log2(rank) bends most, None where it does not.

    From the smallest rank to the best one, both axes are scaled to 0..1; the elbow is the rank
    that lies farthest above the straight line in between (the rule of Kneedle, Satopaa 2011).
    None when the smallest rank is the best, or when no rank in between lies above the line.

    AdapterTune (arXiv 2603.14706) predicts such a bend: the error of approximation falls with the
    rank, that of estimation grows. Its theorem and how it finds the bend are not known to us.

    >>> elbow({1: 0.5, 2: 0.7, 4: 0.8, 8: 0.82, 16: 0.83})
    4
    """
    first, best = min(scores), max(sorted(scores), key=lambda rank: scores[rank])
    above: dict[int, float] = {}
    for rank in sorted(scores):
        if first < rank < best:
            along = math.log2(rank / first) / math.log2(best / first)
            risen = (scores[rank] - scores[first]) / (scores[best] - scores[first])
            above[rank] = risen - along
    bend = max(above, key=lambda rank: above[rank], default=None)
    return None if bend is None or above[bend] <= 0 else bend


def good_enough(scores: Mapping[int, Sequence[float]]) -> int | None:
    """The smallest rank whose mean is within one standard error of the best; None for one seed.

    >>> good_enough({4: [0.78, 0.80], 8: [0.79, 0.81], 16: [0.70, 0.71]})
    4
    """
    if min(len(values) for values in scores.values()) < 2:
        return None
    means = {rank: statistics.mean(values) for rank, values in scores.items()}
    best = max(sorted(means), key=lambda rank: means[rank])
    error = statistics.stdev(scores[best]) / math.sqrt(len(scores[best]))
    return min(rank for rank, mean in means.items() if mean >= means[best] - error)


def table(records: Sequence[Record]) -> str:
    """A row per rank, then the elbow."""
    scores = _scores(records)
    rows: list[tuple[str, ...]] = [("rank", "top-1 %", "each seed", "trained", "with head")]
    for rank, values in scores.items():
        one = next(record for record in records if record.rank == rank)
        seeds = " ".join(f"{100 * value:.1f}" for value in values)
        mean = f"{100 * statistics.mean(values):.2f}"
        rows.append((str(rank), mean, seeds, f"{one.trainable:,}", f"{one.with_head:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(records, scores)])


def _notes(records: Sequence[Record], scores: Mapping[int, Sequence[float]]) -> list[str]:
    one = records[0]
    bend = elbow({rank: statistics.mean(values) for rank, values in scores.items()})
    notes = [
        f"{one.method} on {one.backbone}; {MEASURED[one.part]} part, last epoch of {one.epochs}",
        "elbow: none among these ranks" if bend is None else f"elbow: rank {bend}",
    ]
    enough = good_enough(scores)
    if enough is not None:
        notes.append(f"within one standard error of the best: from rank {enough}")
    return notes


def _scores(records: Sequence[Record]) -> dict[int, list[float]]:
    """Rank -> its values by seed, ranks in order."""
    found: dict[int, list[float]] = {}
    for record in sorted(records, key=lambda record: record.rank or 0):
        found.setdefault(record.rank or 0, []).append(record.top1)
    return found


def _write(out: Path, records: Sequence[Record]) -> None:
    from .pictures import rank_curve

    scores, shown = _scores(records), table(records)
    bend = elbow({rank: statistics.mean(values) for rank, values in scores.items()})
    one = records[0]
    picture = rank_curve(
        scores, bend, f"{MEASURED[one.part]} top-1", f"{one.method}, {one.backbone}"
    )
    contents = {
        "sweep.csv": records_csv(records),
        "sweep.txt": f"{shown}\n".encode(),
        "sweep.png": picture,
    }
    print(f"\n{shown}\n")
    for name, content in contents.items():
        write_atomically(out / name, content)
        print(out / name)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vision sweep-rank",
        description="Fit one configuration at several ranks with the same seeds; print and write a"
        " table, a CSV file and a picture, and tell where the gain levels off. Stopped, the same"
        " command goes on.",
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="YAML", help="its method has a rank")
    add("--ranks", type=_ranks, required=True, metavar="4,8,16,...")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for runs, records and table")
    add("--seeds", type=whole_numbers, default=[0], metavar="0,1,...", help="default: 0")
    add(
        "--part",
        choices=MEASURED,
        default="val",
        help="measure the validation images (default: a rank is a choice) or the test images",
    )
    return parser


def _ranks(text: str) -> list[int]:
    if "0" in text.split(","):
        raise argparse.ArgumentTypeError("rank 0 is not allowed: from 1")
    return whole_numbers(text)
