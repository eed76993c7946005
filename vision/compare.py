"""`polyadapt vision compare`: several configurations on the same data and seeds, side by side."""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from .records import seeded

MEMORY = (
    "memory: most that training took on top of what the process held before it (CPU: resident"
    " memory, VmHWM of a process of its own per run; GPU: torch's peak of allocated memory)"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One configuration trained with one seed and measured on the test part."""

    name: str
    method: str
    seed: int
    top1: float
    macro_f1: float
    calibration_error: float
    trainable: int
    stored: int
    head: int
    seconds: float
    memory_mib: float | None


def main(argv: list[str]) -> int:
    """Train and test every configuration with every seed; a table, a CSV file and a picture."""
    asked = _parser().parse_args(argv)
    names = [path.stem for path in asked.configs]
    for name in names:
        if names.count(name) > 1:
            raise AdaptError(f"two configurations are called {name!r}: give their files two names")
    if (asked.out / "outcomes.csv").exists():
        raise AdaptError(f"{asked.out} holds a comparison: choose another --out")
    from .which_task import refuse_segmentation

    for config in asked.configs:
        refuse_segmentation("compare", config)
    _refuse_other_data(asked.configs)
    outcomes: list[Outcome] = []
    total = len(names) * len(asked.seeds)
    for seed in asked.seeds:
        for config in asked.configs:
            folder = asked.out / f"{config.stem}-seed{seed}"
            outcomes.append(_in_its_own_process(config, seed, folder))
            print(f"{len(outcomes)} of {total}: {_line(outcomes[-1])}", flush=True)
    _write(asked.out, outcomes)
    return 0


def train_and_test(config: Path, seed: int, folder: Path) -> Outcome:
    """One run: fit, then test what was saved."""
    from ..core.complaints import errors_in_one_line
    from ..core.configuration import DomainCLI
    from ..core.fitting import calm, measure, train
    from .configuration import DOMAIN

    with calm(), errors_in_one_line():
        cli = DomainCLI(DOMAIN, "fit", [f"--config={config}", f"--run={folder}", *seeded(seed)])
        before, start = _start_of_memory(), time.perf_counter()
        train(cli)
        seconds, memory = time.perf_counter() - start, _most_memory_since(before)
        adapters = cli.model.adapters
        saved = [f"--config={folder}/config.yaml", f"--set={folder}/adapter.safetensors"]
        metrics = measure(DOMAIN, "test", saved, verbose=False)
    return Outcome(
        name=config.stem,
        method=type(adapters.recipe).__name__,
        seed=seed,
        top1=metrics["test_top1"],
        macro_f1=metrics["test_macro_f1"],
        calibration_error=metrics["test_calibration_error"],
        trainable=adapters.trainable_count(),
        stored=adapters.stored_count(),
        head=sum(parameter.numel() for parameter in cli.model.head.parameters()),
        seconds=seconds,
        memory_mib=memory,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Means over the seeds (+- standard deviation), a row per configuration."""
    seeds = len({outcome.seed for outcome in outcomes})
    head = ("configuration", "method", "top-1 %", "macro F1 %", "calibration error %")
    rows: list[tuple[str, ...]] = [(*head, "trainable", "stored", "head", "seconds", "memory MiB")]
    rows += [_row(list(group)) for group in _by_name(outcomes).values()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"test part, {seeds} seeds each; head: trained, too", MEMORY])


def _row(group: Sequence[Outcome]) -> tuple[str, ...]:
    first = group[0]
    shares = [
        [getattr(o, name) for o in group] for name in ("top1", "macro_f1", "calibration_error")
    ]
    memory = [o.memory_mib for o in group if o.memory_mib is not None]
    return (
        first.name,
        first.method,
        *(_percent(values) for values in shares),
        f"{first.trainable:,}",
        f"{first.stored:,}",
        f"{first.head:,}",
        f"{statistics.mean(o.seconds for o in group):.1f}",
        f"{max(memory):.0f}" if memory else "-",
    )


def _percent(values: Sequence[float]) -> str:
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _by_name(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.name, []).append(outcome)
    return groups


def _write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    from .pictures import Point, comparison

    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Outcome)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(outcome) for outcome in outcomes)
    points = [
        Point(name, tuple(o.top1 for o in group), group[0].trainable)
        for name, group in _by_name(outcomes).items()
    ]
    picture = comparison(points, "test top-1", "Methods on the same data and seeds")
    shown = table(outcomes)
    for name, content in (
        ("outcomes.csv", text.getvalue().encode()),
        ("table.txt", f"{shown}\n".encode()),
        ("comparison.png", picture),
    ):
        write_atomically(folder / name, content)
    print(f"\n{shown}\n")
    for name in ("outcomes.csv", "table.txt", "comparison.png"):
        print(folder / name)


def _line(outcome: Outcome) -> str:
    return f"{outcome.name}, seed {outcome.seed}: {outcome.top1:.1%}, {outcome.seconds:.0f} s"


def _refuse_other_data(configs: Sequence[Path]) -> None:
    """The configurations' data sections are equal; only then does a comparison say anything."""
    from ..core.configuration import DomainCLI
    from ..core.fitting import calm
    from .configuration import DOMAIN

    with calm():
        words = [[f"--config={config}"] for config in configs]
        read = [DomainCLI(DOMAIN, "fit", said, build=False) for said in words]
        said = [cli.config.data.as_dict() for cli in read]
    for config, data in zip(configs, said, strict=True):
        if data != said[0]:
            raise AdaptError(f"{config} and {configs[0]} differ in their data: {data}, {said[0]}")


def _in_its_own_process(config: Path, seed: int, folder: Path) -> Outcome:
    """A fresh process per run: nothing is shared, and its peak of memory is the run's own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(train_and_test, config, seed, folder).result()


def _start_of_memory() -> float | None:
    """MiB held now; the peaks that are measured later start here."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    _forget_peak()
    return _status("VmRSS")


def _most_memory_since(before: float | None) -> float | None:
    import torch

    if before is None:
        return None
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20 - before
    peak = _status("VmHWM")
    return None if peak is None else peak - before


def _forget_peak() -> None:
    """Linux then counts the peak from now on; elsewhere there is nothing to forget."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> float | None:
    """A size that Linux tells of this process, in MiB. Not getrusage: its peak is inherited."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), None)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt vision compare",
        description="Train configurations that share their data, with the same seeds; "
        "print and write a table, a CSV file and a picture.",
    )
    parser.add_argument("--configs", nargs="+", type=Path, required=True, metavar="YAML")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--seeds", type=whole_numbers, default=[0], metavar="0,1,...", help="default: 0"
    )
    return parser


def whole_numbers(text: str) -> list[int]:
    """The numbers of a list such as 0,1,2."""
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different whole numbers such as 0,1,2"
        )
    return [int(word) for word in words]
