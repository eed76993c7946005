"""ETTh1 at look-back 336: One-for-All with and without language weights, beside its baselines.

One protocol for all methods (`polyadapt timeseries compare`): Adam, the epoch that is best on every
8th development window, then all test windows once. The steps are

  protocol   last value, seasonal naive and DLinear on all windows; 96, three seeds: the gates
  patchtst   PatchTST on all windows; 96, three seeds
  96         all methods, on 8,192 fixed windows an epoch; three blocks, stride 16, three seeds
  192        the same at 192, one seed
  dense      LoRA of equal size and full fine-tuning; 96, one seed
  long       the same as 192 at 336 and 720
  six        One-for-All with six blocks and stride 8, three ways; 96, one seed

Run: python benchmarks/timeseries_etth1.py ETTh1.csv --out FOLDER [--steps protocol,96,192]
  [--threads 1]; with --estimate each step's time is told, by one batch per method, nothing is run.
What is finished is not run again, so that an interrupted step goes on, and a step that is done
prints its table. Differences below 0.003 are taken for noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from polyadapt.benchmarks.rounds import machine
from polyadapt.timeseries.adapters import code
from polyadapt.timeseries.backbones import OfflineMiniLM
from polyadapt.timeseries.compare import compare
from polyadapt.timeseries.compare_run import Comparison, Record, Run
from polyadapt.timeseries.data import ETT
from polyadapt.timeseries.methods import Method, method_called
from polyadapt.timeseries.protocol import Protocol

PLAIN = ("last-value", "seasonal-naive", "dlinear", "patchtst")
ONE_FOR_ALL = ("one-for-all", "random-weights", "no-language-model")
EVERYTHING = (*PLAIN, *ONE_FOR_ALL, "one-attention", "gpt4ts")
NOISE = 0.003


@dataclass(frozen=True)
class Step:
    """Some runs with one setting."""

    methods: Sequence[str]
    horizons: Sequence[int]
    seeds: Sequence[int]
    windows: int | None = 8192
    blocks: int = 3
    stride: int = 16


STEPS: Mapping[str, Step] = {
    "protocol": Step(PLAIN[:3], (96,), (0, 1, 2), windows=None),
    "patchtst": Step(PLAIN[3:], (96,), (0, 1, 2), windows=None),
    "96": Step(EVERYTHING, (96,), (0, 1, 2)),
    "192": Step(EVERYTHING, (192,), (0,)),
    "dense": Step(("lora", "full"), (96,), (0,)),
    "long": Step(EVERYTHING, (336, 720), (0,)),
    "six": Step(ONE_FOR_ALL, (96,), (0,), blocks=6, stride=8),
}
SHORT = ("protocol", "96", "192")


def shared(path: Path, step: Step) -> Comparison:
    """What the runs of a step have in common."""
    recipe = code()
    return Comparison(
        path=path,
        kind="ETT",
        data=partial(ETT, str(path)),
        look_back=336,
        backbone=OfflineMiniLM(blocks=step.blocks),
        patches=replace(recipe.patches, stride=step.stride),
        adapter=recipe.recipe,
        protocol=Protocol(windows_per_epoch=step.windows, every=8),
    )


def run(name: str, path: Path, out: Path) -> list[Record]:
    """A step; its table is printed, its time stated."""
    step = STEPS[name]
    methods = [method_called(word) for word in step.methods]
    print(f"\n## Step {name}\n", flush=True)
    found = compare(
        shared(path, step), methods, step.horizons, step.seeds, out / name, published=True
    )
    spent = sum(record.fit_seconds + record.test_seconds for record in found)
    print(f"\n{len(found)} runs: {spent / 60:.1f} minutes of training and test")
    return found


# What it says


def gates(records: Sequence[Record]) -> list[str]:
    """Whether the protocol is right: the last value's error is a fact, DLinear's is known well."""
    lines = []
    for method, low, high in (("last-value", 1.292, 1.296), ("dlinear", 0.36, 0.385)):
        found = statistics.mean(r.mse for r in records if r.method == method and r.horizon == 96)
        met = "met" if low <= found <= high else "NOT met"
        lines.append(f"gate: {method} at 96 has {found:.4f}, between {low} and {high}: {met}")
    return lines


def verdicts(records: Sequence[Record]) -> list[str]:
    """What the language weights are worth, by pairs of runs that share horizon and seed."""
    by_place = {(r.method, r.horizon, r.seed): r.mse for r in records}
    lines = []
    for horizon in sorted({r.horizon for r in records}):
        for other in ("random-weights", "no-language-model", "one-attention"):
            pairs = [
                by_place["one-for-all", horizon, seed] - mse
                for (method, at, seed), mse in by_place.items()
                if (method, at) == (other, horizon) and ("one-for-all", horizon, seed) in by_place
            ]
            if pairs:
                lines.append(f"at {horizon}, MiniLM against {other}: {verdict(pairs)}")
    return lines


def verdict(differences: Sequence[float]) -> str:
    """Of MSE with the language weights minus MSE without, one per seed.

    >>> verdict([-0.01, -0.02]), verdict([0.001])
    ('-0.0150 (-0.0100, -0.0200): the language weights help', '+0.0010 (+0.0010): no difference')
    """
    mean = statistics.mean(differences)
    same_sign = all(d * mean > 0 for d in differences)
    word = "no difference"
    if abs(mean) >= NOISE and same_sign:
        word = "the language weights help" if mean < 0 else "the language weights hurt"
        word += " (one seed)" if len(differences) == 1 else ""
    return f"{mean:+.4f} ({', '.join(f'{d:+.4f}' for d in differences)}): {word}"


# How long it takes


def estimate(name: str, path: Path) -> float:
    """Seconds of a step when no training stops early, from one batch per method and horizon."""
    step = STEPS[name]
    total = 0.0
    for horizon in step.horizons:
        for word in step.methods:
            method = method_called(word)
            total += _seconds(method, shared(path, step), horizon) * (
                len(step.seeds) if method.learns else 1
            )
    return total


def _seconds(method: Method, common: Comparison, horizon: int) -> float:
    """Of one run, by a training of one batch that is tested on one."""
    how = common.protocol
    one = replace(common, protocol=replace(how, epochs=1, windows_per_epoch=how.batch_size))
    data = common.windows(horizon, seed=0)
    train = min(how.windows_per_epoch or 10**9, len(data.windows("train")))
    val, test = len(data.windows("val")) / how.every, len(data.windows("test"))
    candidate = method.build(Run(one, method, horizon, 0, Path()).given(data.period))
    past, future = next(iter(one.windows(horizon, seed=0).train_dataloader()))
    forward = backward = 0.0
    for _ in range(2):  # the second is timed: the first one warms up
        begin = time.perf_counter()
        loss = (candidate.model(past) - future).square().mean()
        forward = time.perf_counter() - begin
        if method.learns:
            loss.backward()
        backward = time.perf_counter() - begin
    trained = how.epochs * (backward * train + forward * val) if method.learns else 0.0
    return (trained + forward * test) / len(past)


# The command


def main() -> None:
    """Run the steps that are asked for, then print gates and verdicts over all of them."""
    asked = _parser().parse_args()
    torch.set_num_threads(asked.threads)
    if asked.estimate:
        for name in asked.steps:
            print(f"step {name}: at most {estimate(name, asked.data) / 60:.0f} minutes", flush=True)
        print(machine("transformers"))
        return
    found = {name: run(name, asked.data, asked.out) for name in asked.steps}
    print("\n## Result\n")
    if "protocol" in found:
        print("\n".join(gates(found["protocol"])))
    for name, records in found.items():
        print("".join(f"step {name}, {line}\n" for line in verdicts(records)), end="")
    print(f"\n{machine('transformers')}")


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STEPS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("data", type=Path, help="ETTh1.csv")
    add("--out", type=Path, default=Path("etth1"), metavar="FOLDER", help="of runs and tables")
    add("--steps", type=_names, default=list(SHORT), help=f"of {','.join(STEPS)}")
    add("--threads", type=int, default=1)
    add("--estimate", action="store_true", help="tell how long the steps take, run nothing")
    return parser


if __name__ == "__main__":
    main()
