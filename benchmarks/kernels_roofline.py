"""Predicted, not measured: DoRA by bytes and operations, at published sizes, on three GPUs.

A step takes as long as its bytes take at the peak bandwidth or its operations at the peak rate of
the unit that does them, whichever is longer; a sequence is the sum of its steps. Launches, caches
that miss and kernels that fall short of the peaks are left out for everybody.

Run: python -m benchmarks.kernels_roofline
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from polyadapt.benchmarks.kernel_layers import (
    Call,
    Size,
    counted,
    frozen,
    least,
    ours,
    peft,
    peft_in_fp32,
    published,
)
from polyadapt.benchmarks.kernel_ops import Case, cases
from polyadapt.benchmarks.kernel_traffic import Step, numberless, total


@dataclass(frozen=True)
class GPU:
    """Peaks of a data sheet: bytes and operations per second, without sparsity."""

    name: str
    bandwidth: float
    matrix: float  # bf16 and fp16 on tensor cores
    tf32: float
    fp32: float  # outside of tensor cores: PyTorch's default and `ieee` products of fp32

    def seconds(self, steps: Sequence[Step]) -> float:
        """The least time of a sequence of kernels."""
        rates = {"matrix": self.matrix, "tf32": self.tf32, "fp32": self.fp32}
        return sum(max(s.bytes / self.bandwidth, s.operations / rates[s.engine]) for s in steps)


GPUS = (
    # NVIDIA A100 Tensor Core GPU data sheet (2021), A100 80GB SXM.
    GPU("A100", 2.039e12, 312e12, 156e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM; 1979 and 989 with sparsity.
    GPU("H100", 3.35e12, 989.5e12, 494.5e12, 67e12),
    # NVIDIA Blackwell architecture technical brief, HGX B200; 4500 and 2200 with sparsity.
    GPU("B200", 8e12, 2250e12, 1100e12, 80e12),
)
# Weights and ranks of the norm benchmark of arXiv 2603.22276, its longest text; and a small rank.
TOKENS = 4096
SIZES = (
    Size(TOKENS, 4096, 4096, 16),
    Size(TOKENS, 4096, 4096, 384),
    Size(TOKENS, 8192, 8192, 384),
    Size(TOKENS, 8192, 8192, 768),
    Size(TOKENS, 4096, 11008, 384),
    Size(TOKENS, 8192, 28672, 384),
)
KINDS: dict[str, Callable[[Size], Call]] = {
    "frozen layer": frozen,
    "PEFT": peft,
    "PEFT, fp32": peft_in_fp32,
    "published": published,
    "ours": ours,
}
Counts = dict[str, tuple[list[Step], list[Step]]]


def traffic_table(counts: dict[Size, Counts]) -> list[str]:
    """GB and 10^9 operations; the forward as a multiple of the least that it could be."""
    lines = [
        f"{'weight, rank':22} {'sequence':14} {'kernels':>9} {'GB':>13} {'10^9 operations':>17}"
    ]
    lines[0] += f" {'forward / least':>22}"
    for size, kinds in counts.items():
        fewest = least(size)
        for name, passes in kinds.items():
            both = [total(steps) for steps in passes]
            kernels = "+".join(str(len(steps)) for steps in passes)
            moved, done = ("+".join(f"{of[at] / 1e9:.4g}" for of in both) for at in (0, 1))
            share = [all_ / few for all_, few in zip(both[0], fewest, strict=True)]
            shares = "" if name == "frozen layer" else f"{share[0]:.2f}x GB, {share[1]:.3f}x op."
            lines.append(f"{size!s:22} {name:14} {kernels:>9} {moved:>13} {done:>17} {shares:>22}")
    return lines


def prediction_table(counts: dict[Size, Counts]) -> list[str]:
    """Milliseconds of a forward and of forward and backward, and PEFT's over the others."""
    head = f"{'':5} {'weight, rank':22} {'pass':8}" + "".join(f"{name:>14}" for name in KINDS)
    lines = [head + f"{'PEFT/publ.':>12}{'PEFT/ours':>12}{'fp32/ours':>12}"]
    for gpu in GPUS:
        for size, kinds in counts.items():
            for label, passes in (("forward", 1), ("f. + b.", 2)):
                taken = {n: gpu.seconds([*chain(*both[:passes])]) for n, both in kinds.items()}
                row = f"{gpu.name:5} {size!s:22} {label:8}"
                row += "".join(f"{1e3 * seconds:11.3f} ms" for seconds in taken.values())
                faster = [taken["PEFT"] / taken[name] for name in ("published", "ours")]
                faster.append(taken["PEFT, fp32"] / taken["ours"])
                lines.append(row + "".join(f"{ratio:11.2f}x" for ratio in faster))
    return lines


def norm_table(counts: dict[Size, Counts]) -> list[str]:
    """Milliseconds of the row norm alone, as it is and as other units would bound it."""
    names = ("PEFT's", "ours", "its bytes", "in 3x TF32")
    lines = [f"{'':5} {'weight, rank':22}" + "".join(f"{name:>15}" for name in names)]
    for gpu in GPUS:
        for size, kinds in counts.items():
            theirs = kinds["PEFT"][0]
            last = next(n for n, step in enumerate(theirs) if step.name == "linalg_vector_norm")
            (norm,) = (step for step in kinds["ours"][0] if step.name == "row_norm")
            thrice = replace(norm, operations=3 * norm.operations, engine="tf32")
            forms = (theirs[1 : last + 1], [norm], [replace(norm, operations=0)], [thrice])
            row = "".join(f"{1e3 * gpu.seconds(steps):12.3f} ms" for steps in forms)
            lines.append(f"{gpu.name:5} {size!s:22}{row}")
    return lines


def op_table() -> list[str]:
    """Each operation's passes: GB and 10^9 operations, and how much faster the roof allows."""
    head = f"{'operation':68} {'pass':8} {'eager GB':>9} {'ours':>8} {'least':>8} {'ours/l.':>8}"
    head += f" {'eager 10^9':>10} {'ours':>9} {'least':>9}" + "".join(f"{g.name:>8}" for g in GPUS)
    with numberless():
        return [head, *(line for case in cases("cpu") for line in op_rows(case))]


def op_rows(case: Case) -> list[str]:
    """A line for each pass of an operation."""
    lines, calls = [], [case.steps(call) for call in (case.eager, case.ours)]
    for at, label in enumerate(("forward", "backward") if case.leaves else ("forward",)):
        eager, ours_ = (both[at] for both in calls)
        (slow, slow_op), (fast, fast_op) = total(eager), total(ours_)
        least_, fewest = case.least(backward=bool(at))
        line = f"{case.name:68} {label:8} {slow / 1e9:9.4f} {fast / 1e9:8.4f} {least_ / 1e9:8.4f}"
        line += f" {fast / least_:7.2f}x {slow_op / 1e9:10.4g} {fast_op / 1e9:9.4g}"
        line += f" {fewest / 1e9:9.4g}"
        ratios = [gpu.seconds(eager) / gpu.seconds(ours_) for gpu in GPUS]
        lines.append(line + "".join(f"{ratio:7.2f}x" for ratio in ratios))
    return lines


def main() -> None:
    counts = {size: {name: counted(kind, size) for name, kind in KINDS.items()} for size in SIZES}
    print("PREDICTION from counts and data sheets. No GPU was at hand and no time was measured.")
    print(f"bf16, {TOKENS} tokens at once, no bias. PEFT 0.21.2: factors in bf16, or in fp32 as")
    print("get_peft_model leaves them; products of fp32 run outside the tensor cores (no TF32).\n")
    print("Counted, forward + backward:", *traffic_table(counts), sep="\n")
    print("\nPREDICTED milliseconds:", *prediction_table(counts), sep="\n")
    print("\nPREDICTED milliseconds of the row norm alone; the last two are what its bytes would")
    print("need, and its products in three of TF32 (which nobody here has built):")
    print(*norm_table(counts), sep="\n")
    print("\nThe five operations, counted; right, PREDICTED time of eager over ours:")
    print(*op_table(), sep="\n")


if __name__ == "__main__":
    main()
