"""kill -9 at random moments of fit and of save: is a file ever half written, is a resume exact?

A run of twelve epochs is killed, and its folder looked through: every file under its own name must
be whole. It is then resumed, and half of the time killed again; at its end the metrics, the
checkpoint and the adapter file must be those of the run that nobody killed, bit for bit. A process
that saves one of two sets under one name, again and again, is killed likewise: the file is one of
the two. Processes are forked from one that has all imports. A loss of power is another matter.
Run: python benchmarks/killed_runs.py [--fits 100] [--saves 100]
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends import backend_agg  # noqa: F401  # what a run needs is there before it starts
from torch import nn

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core import AdapterSet, LoRA, attach
from polyadapt.core.store import read_file
from polyadapt.tests.test_resume import RECIPES, Task, run

EPOCHS = 12
Results = dict[str, bytes]


def started(work: Callable[[], object]) -> int:
    """The id of a fork of this process that does the work, in silence unless it fails."""
    child = os.fork()
    if child:
        return child
    told = os.dup(2)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        work()
    except BaseException:  # the child must end here, whatever happens
        os.write(told, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


def finished(work: Callable[[], object]) -> bool:
    """The work was done to its end without an error."""
    return os.waitpid(started(work), 0)[1] == 0


def killed(work: Callable[[], object], after: float) -> bool:
    """Whether the kill came before the end."""
    child = started(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)  # of a child that nobody waited for yet: its id is still its own
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def fit(folder: Path) -> None:
    """The run, resumed where its folder says."""
    last = folder / "last.ckpt"
    run(Task(RECIPES["lora"]), folder, resume=last if last.exists() else None, max_epochs=EPOCHS)


def broken(folder: Path) -> list[str]:
    """Files under their own names that are not whole."""
    checks: dict[str, Callable[[Path], object]] = {
        "last.ckpt": lambda path: torch.load(path, weights_only=True)["state_dict"],
        "adapter.safetensors": read_file,
        "metrics.csv": _check_table,
        "learning_curve.png": _check_picture,
    }
    found = []
    for path in folder.glob("[!.]*"):
        try:
            checks[path.name](path)
        except Exception as error:  # any trouble with a file is what this looks for
            found.append(f"{path.name}: {error!r}")
    return found


def _check_table(path: Path) -> None:
    header, *rows = csv.reader(path.read_text().splitlines())
    if not path.read_text().endswith("\n") or any(len(row) != len(header) for row in rows):
        raise ValueError("a row is cut")


def _check_picture(path: Path) -> None:
    if not path.read_bytes().endswith(b"IEND\xaeB\x60\x82"):
        raise ValueError("a picture is cut")


def results(folder: Path) -> Results:
    """What a run is compared by."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    tensors = {**state["state_dict"]}
    moments = state["optimizer_states"][0]["state"]
    tensors |= {f"{n}.{key}": t for n, held in moments.items() for key, t in held.items()}
    found = {name: t.numpy().tobytes() for name, t in tensors.items()}
    names = ("metrics.csv", "adapter.safetensors")
    return found | {name: (folder / name).read_bytes() for name in names}


def kill_fits(count: int, dice: random.Random, folder: Path) -> Counter[str]:
    """So many killed runs; each is resumed until it ends."""
    told: Counter[str] = Counter()
    length = min(_timed(folder / name) for name in ("first", "second", "whole"))
    expected = results(folder / "whole")
    for n in range(3 * count):  # some end before they are killed
        place = folder / str(n)
        while killed(partial(fit, place), dice.uniform(0, length)):
            told["kills"] += 1
            told["kills " + _progress(place)] += 1
            told["half-written files"] += len(broken(place))
            told["left-over parts under hidden names"] += len(list(place.glob(".*")))
            if dice.random() < 0.5:
                break
        told["runs that were resumed to their end"] += 1
        ended = finished(partial(fit, place))
        told["resumed runs that differ"] += not ended or results(place) != expected
        if told["kills"] >= count:
            break
    return told


def _timed(folder: Path) -> float:
    begin = time.perf_counter()
    assert finished(partial(fit, folder)), "the run itself fails"
    seconds = time.perf_counter() - begin
    print(f"  a run that nobody kills takes {seconds:.2f} s")
    return seconds


def _progress(place: Path) -> str:
    table = place / "metrics.csv"
    done = len(table.read_text().splitlines()) - 1 if table.exists() else 0
    if not done:
        return "before the first epoch's end"
    return "between epochs" if done < EPOCHS else "after the last epoch"


def kill_saves(count: int, dice: random.Random, folder: Path) -> Counter[str]:
    """So many killed processes that save one of two sets under one name."""
    told: Counter[str] = Counter()
    sets = [_large_set(seed) for seed in (0, 1)]
    path, whole = folder / "set.safetensors", []
    for adapters in sets:
        begin = time.perf_counter()
        adapters.save(path)
        length = time.perf_counter() - begin
        whole.append(path.read_bytes())

    def save_for_ever() -> None:
        while True:
            for adapters in sets:
                adapters.save(path)

    for _ in range(count):
        told["kills"] += killed(save_for_ever, dice.uniform(0, 6 * length))
        read_file(path)
        told["half-written files"] += path.read_bytes() not in whole
        told["left-over parts under hidden names"] += len(list(folder.glob(".set*")))
        for part in folder.glob(".set*"):
            part.unlink()
    return told


def _large_set(seed: int) -> AdapterSet:
    made = attach(nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), LoRA(rank=64), "*")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=100, help="kills of a fit")
    parser.add_argument("--saves", type=int, default=100, help="kills of a save")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    one_thread()  # and no thread of torch's before a fork
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dice, wrong = random.Random(asked.seed), 0
    print(machine("lightning"))
    for what, kill, count in (("fit", kill_fits, asked.fits), ("save", kill_saves, asked.saves)):
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            told = kill(count, dice, Path(name))
        print(f"{what}: {time.perf_counter() - begin:.0f} s")
        print(*(f"  {name}: {number}" for name, number in sorted(told.items())), sep="\n")
        wrong += told["half-written files"] + told["resumed runs that differ"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
