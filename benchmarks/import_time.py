"""What importing costs: seconds and modules, in fresh processes, beside torch and PEFT.

Run: python benchmarks/import_time.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from polyadapt.benchmarks.rounds import machine

COMMAND = (
    "import time, sys; begin = time.perf_counter(); {};"
    " print(time.perf_counter() - begin, len(sys.modules))"
)
STATEMENTS = {
    "torch": "import torch",
    "polyadapt.core": "import polyadapt.core",
    "polyadapt.core and a LoRA": "from polyadapt.core import LoRA, attach; LoRA()",
    "peft": "import peft",
}


def fresh(statement: str) -> tuple[float, int]:
    """Seconds and modules of one statement in a process of its own."""
    run = [sys.executable, "-c", COMMAND.format(statement)]
    seconds, modules = subprocess.run(
        run, check=True, capture_output=True, text=True
    ).stdout.split()
    return float(seconds), int(modules)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    print(machine("peft"))
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in STATEMENTS}
    for _ in range(asked.rounds):
        for name, statement in STATEMENTS.items():
            found[name].append(fresh(statement))
    base = statistics.median(seconds for seconds, _ in found["torch"])
    for name, runs in found.items():
        seconds = sorted(s for s, _ in runs)
        print(
            f"{name}: {statistics.median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}),"
            f" {statistics.median(seconds) / base:.2f} of torch, {runs[0][1]} modules"
        )
    help_ = [_help() for _ in range(asked.rounds)]
    print(
        f"polyadapt --help: {statistics.median(help_):.2f} s ({min(help_):.2f} to {max(help_):.2f})"
    )


def _help() -> float:
    import time

    begin = time.perf_counter()
    command = [sys.executable, "-m", "polyadapt.core.cli", "--help"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
