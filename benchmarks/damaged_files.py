"""100,000 damaged and forged adapter files: how many are loaded wrong, crash, or show a traceback.

Damaged files (flipped bits, cuts, swapped tensors, hostile headers) must be refused in one line.
Forged ones carry a valid digest: each is refused, or what is loaded is exactly what it says. What
refuses a file must leave the backbone as it was. Run: python benchmarks/damaged_files.py [COUNT]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.tests.damage import DAMAGE, FORGERIES, good_sets, read_damaged

RESULTS = ("refused", "as it says", "wrong")


def peak() -> float:
    """The most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        goods, path = good_sets(Path(name)), Path(name) / "a.safetensors"
        read_damaged(goods, 500, path, seed=-1)  # what a first file loads is not its fault
        before, begin = peak(), time.perf_counter()
        outcome = read_damaged(goods, asked.count, path, asked.seed)
        seconds = time.perf_counter() - begin
    print(machine("safetensors"))
    print(f"{'damage':<10}" + "".join(f"{result:>12}" for result in RESULTS))
    for make in DAMAGE + FORGERIES:
        kind = make.__name__
        told = "".join(f"{outcome.counts[kind, result]:>12,}" for result in RESULTS)
        print(f"{kind:<10}{told}   {(make.__doc__ or '').splitlines()[0]}")
    print(f"{'all':<10}" + "".join(f"{outcome.total(result):>12,}" for result in RESULTS))
    print(
        f"{asked.count:,} files in {seconds:.0f} s, the slowest {1e3 * outcome.slowest:.0f} ms;"
        f" peak memory grew by {peak() - before:.1f} MiB"
    )
    print(*(line[:500] for line in outcome.wrong[:20]), sep="\n")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
