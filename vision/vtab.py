"""`polyadapt vision vtab`: one configuration on every task of VTAB-1k that is there; one table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.records import records_csv
from .compare import whole_numbers
from .records import Fit, Record, records_of, seeded
from .vtab_tasks import (
    FINAL,
    IMAGES,
    TASKS,
    TUNE,
    Summary,
    Task,
    check_lists,
    deviations,
    means,
    tasks_in,
)

CONVENTION = "A: mean of the 3 group means; B: flat mean of the tasks"
SPLITS = {"final": FINAL, "tune": TUNE}
LINES = ("orig", "vpt", "fact", "raw")


def main(argv: list[str]) -> int:
    """Fit every task with every seed, then print and write the table; finished fits are kept."""
    asked = _parser().parse_args(argv)
    lists = SPLITS[asked.split]
    tasks = tasks_in(asked.root, lists)
    for task in tasks:
        check_lists(asked.root, task, lists)
    records = records_of(
        [task_fit(asked.config, task, seed, asked) for seed in asked.seeds for task in tasks]
    )
    shown = table(records)
    write_atomically(asked.out / "results.csv", records_csv(records))
    write_atomically(asked.out / "table.txt", f"{shown}\n".encode())
    print(f"\n{shown}\n\n{asked.out / 'results.csv'}\n{asked.out / 'table.txt'}")
    return 0


def task_fit(config: Path, task: Task, seed: int, asked: argparse.Namespace) -> Fit:
    """One task with one seed: `final` trains on all images and tests, `tune` validates."""
    given = {k: v or "null" for k, v in SPLITS[asked.split].items()}
    data = {**given, "root": asked.root / task.name, "classes": task.classes, "val_share": 0.0}
    words = [f"--config={config}", f"--model.preprocessing=vtab_{asked.preprocessing}"]
    words += ["--data=ImageLists", *(f"--data.init_args.{k}={v}" for k, v in data.items())]
    return Fit(
        words=(*words, *seeded(seed)),
        folder=asked.out / f"{task.name}-seed{seed}",
        part="test" if asked.split == "final" else "val",
        name=task.name,
        mean_convention=CONVENTION,
    )


def table(records: Sequence[Record]) -> str:
    """A row per task, group means, both means, and everything the numbers depend on."""
    by_task = {t.name: [r.top1 * 100 for r in records if r.name == t.name] for t in TASKS}
    by_task = {name: values for name, values in by_task.items() if values}
    scores = means({name: statistics.mean(values) for name, values in by_task.items()})
    several = {n: statistics.stdev(values) for n, values in by_task.items() if len(values) > 1}
    spread = deviations(several) if several.keys() == by_task.keys() else None
    rows: list[tuple[str, ...]] = [("group", "task", "classes", "images", "top-1 %")]
    rows += [_row(task, records) for task in TASKS if task.name in by_task]
    rows += _mean_rows(scores, spread)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(records, set(by_task))])


def _row(task: Task, records: Sequence[Record]) -> tuple[str, ...]:
    own = [record for record in records if record.name == task.name]
    values = [100 * record.top1 for record in own]
    spread = statistics.stdev(values) if len(values) > 1 else None
    images = str(own[0].train_images)
    return task.group, task.name, str(task.classes), images, _shown(statistics.mean(values), spread)


def _mean_rows(scores: Summary, spread: Summary | None) -> list[tuple[str, ...]]:
    found = {(group, "mean"): value for group, value in scores.groups.items()}
    found |= {("A", "mean of the group means"): scores.a, ("B", "flat mean of the tasks"): scores.b}
    around: Sequence[float | None] = [None] * len(found)
    if spread is not None:
        around = [*spread.groups.values(), spread.a, spread.b]
    return [
        (*names, "", "", _shown(value, deviation))
        for (names, value), deviation in zip(found.items(), around, strict=True)
    ]


def _shown(value: float, spread: float | None) -> str:
    return f"{value:.2f}" + ("" if spread is None else f" +- {spread:.2f}")


def _notes(records: Sequence[Record], found: set[str]) -> list[str]:
    first = records[0]
    seeds_used = sorted({record.seed for record in records})
    counts = statistics.mean(record.with_head for record in records)
    measured = "val200 after training on train800" if first.part == "val" else "the test set"
    notes = [
        f"{first.method} on {first.backbone}; {first.resize}, {first.interpolation};"
        f" mean {first.mean}, std {first.std}",
        f"measured on {measured}, last epoch of {first.epochs}; seeds"
        f" {', '.join(map(str, seeds_used))}",
        f"trained: {first.trainable:,} in adapters, {counts:,.0f} with the tasks' mean head",
    ]
    if missing := [task.name for task in TASKS if task.name not in found]:
        notes.append(
            f"missing {len(missing)} of {len(TASKS)}: {', '.join(missing)}; A and B are means of"
            " the tasks above, not over VTAB-1k"
        )
    whole = IMAGES if first.part == "test" else IMAGES * 4 // 5
    if small := sorted({r.name for r in records if r.train_images != whole}):
        notes.append(f"not VTAB-1k's {whole} training images: {', '.join(small)}")
    return notes


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vision vtab",
        description="Fit one configuration on each task of VTAB-1k whose folder is in ROOT (with"
        " train800.txt, val200.txt, train800val200.txt, test.txt: lines 'path label') and print a"
        " table with both means. Stopped, the same command goes on.",
    )
    add = parser.add_argument
    add("--root", type=Path, required=True, metavar="FOLDER", help="holds a folder per task")
    add("--config", type=Path, required=True, metavar="YAML", help="model, trainer, batch size")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for runs, records and table")
    add("--seeds", type=whole_numbers, default=[0], metavar="0,1,...", help="default: 0")
    add(
        "--split",
        choices=SPLITS,
        default="final",
        help="final (default): train on 1,000 images, measure the test set;"
        " tune: train on 800, measure the other 200",
    )
    add(
        "--preprocessing",
        choices=LINES,
        default="orig",
        help="the backbone's mean and std (orig, default), ImageNet's (vpt: bilinear, fact:"
        " bicubic) or none (raw); replaces the configuration's",
    )
    return parser
