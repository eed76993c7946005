"""The first update of LoRA by its rank: alpha/r, alpha/sqrt(r), and One-for-All's code.

Mean norm of s B A x after one step at a layer of width 512, of that at rank 256; 64 draws. The
claim that alpha/sqrt(r) keeps it level (arXiv 2312.03732, 2603.29756) holds for SGD when A's
standard deviation does not depend on the rank. It does not hold for the published code, whose A has
standard deviation 1/r, nor for Adam, with which both papers train: there alpha/r is level.

Run: python benchmarks/rank_stability.py
"""

from __future__ import annotations

from pathlib import Path

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core.container import write_atomically
from polyadapt.timeseries.rank_stability import OPTIMISERS, RULES, curve, picture, table


def main() -> None:
    """Print the table; the picture goes beside the results."""
    one_thread()
    curves = [curve(optimiser, rule) for optimiser in OPTIMISERS for rule in RULES]
    out = Path(__file__).parent / "results" / "rank_stability.png"
    write_atomically(out, picture(curves))
    print(f"{table(curves)}\n\n{machine()}")


if __name__ == "__main__":
    main()
