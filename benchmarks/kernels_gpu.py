"""DoRA and the fused operations on a GPU: times beside PEFT's and PyTorch's and the predicted.

Each call is timed by events on the GPU, its cache written over before; median and 10 to 90 %.
Predicted are counted bytes and operations under the data sheet's peaks (`kernels_roofline`), for
GPUs that stand there. The difference between the two results is printed beside the times: a fast
wrong number is none.

Run: python -m benchmarks.kernels_gpu [--repetitions 50] [--only row_norm]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyadapt.benchmarks.kernel_layers import DTYPE, Call, Size, counted
from polyadapt.benchmarks.kernel_ops import Case, cases
from polyadapt.benchmarks.kernel_traffic import Step, numberless, total
from polyadapt.benchmarks.kernels_roofline import GPU, GPUS, KINDS, SIZES
from polyadapt.benchmarks.rounds import machine

WARM = 20  # tuners try their configurations, clocks rise
CACHE = 2**28  # bytes: more than the last cache of any GPU here
Both = tuple[list[Step], list[Step]]  # steps of the forward, of the backward


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, in order."""

    sorted: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.sorted)

    def __str__(self) -> str:
        low, high = (self.sorted[int(q * (len(self.sorted) - 1))] for q in (0.1, 0.9))
        return f"{self.median:9.4f} ({low:.4f} to {high:.4f})"


def timed(call: Callable[[], Any], repetitions: int) -> Times:
    """Between two events, with nothing of the last repetition left in the GPU's cache."""
    over = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    for _ in range(WARM):
        call()
    pairs = []
    for _ in range(repetitions):
        over.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return Times(sorted(begin.elapsed_time(end) for begin, end in pairs))


def passes(case: Case, call: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed of a call: the forward alone, and with the backward where there is one."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    def both() -> tuple[Tensor, ...]:
        out = call()
        return torch.autograd.grad(out, case.leaves, out.detach())

    return {"forward": forward, "f. + b.": both} if case.leaves else {"forward": forward}


def difference(case: Case) -> float:
    """The largest difference of the two results over the largest number."""
    with torch.no_grad():
        found, wanted = case.ours().double(), case.eager().double()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def predicted(only: str) -> dict[str, tuple[Both, Both]]:
    """Case -> steps of ours and of eager."""
    with numberless():
        return {
            case.name: (case.steps(case.ours), case.steps(case.eager))
            for case in cases("cpu")
            if only in case.op
        }


def rows(case: Case, counted: tuple[Both, Both], gpu: GPU | None, repetitions: int) -> list[str]:
    """A line for each pass."""
    away, lines = difference(case), []
    ours, eager = passes(case, case.ours), passes(case, case.eager)
    for at, label in enumerate(ours):
        fast, slow = timed(ours[label], repetitions), timed(eager[label], repetitions)
        one, other = ([*both[0], *(both[1] if at else [])] for both in counted)
        line = f"{case.name:68} {label:8} {slow!s:30} {fast!s:30} {slow.median / fast.median:6.2f}x"
        if gpu:
            seconds, moved = gpu.seconds(one), total(one)[0]
            line += f" {gpu.seconds(other) / seconds:6.2f}x {1e3 * seconds:10.4f}"
            line += f" {moved / (gpu.bandwidth * fast.median / 1e3):7.0%}"
        lines.append(f"{line} {away:10.1e}")
    return lines


def layer_rows(size: Size, kind: str, gpu: GPU | None, device: str, repetitions: int) -> list[str]:
    """A line for the forward, as in training, and one with the backward: gradients add up."""
    with torch.device(device):
        call: Call = KINDS[kind](size)
        x = torch.randn(size.tokens, size.d_in, dtype=DTYPE, requires_grad=True)
        arriving = torch.ones(size.tokens, size.d_out, dtype=DTYPE)

    def both() -> None:
        x.grad = None
        call(x).backward(arriving)

    steps, lines = counted(KINDS[kind], size), []
    for at, (label, timing) in enumerate({"forward": lambda: call(x), "f. + b.": both}.items()):
        taken = timed(timing, repetitions)
        line = f"{size!s:22} {kind:14} {label:8} {taken!s:30}"
        if gpu:
            line += f" {1e3 * gpu.seconds([*steps[0], *(steps[1] if at else [])]):10.4f}"
        lines.append(line)
    return lines


def print_layers(gpu: GPU | None, repetitions: int) -> None:
    """DoRA layers; the published kernels are counted alone, nobody here has them."""
    head = f"{'weight, rank':22} {'sequence':14} {'pass':8} {'ms':30}"
    print(head + (f" {'pred. ms':>10}" if gpu else ""))
    for size in SIZES:
        for kind in KINDS:
            if kind != "published":
                print(*layer_rows(size, kind, gpu, "cuda", repetitions), sep="\n", flush=True)


def print_ops(gpu: GPU | None, only: str, repetitions: int) -> None:
    """The operations beside plain PyTorch."""
    head = f"{'operation':68} {'pass':8} {'eager ms':30} {'ours ms':30} {'faster':>7}"
    if gpu:
        head += f" {'pred.':>7} {'pred. ms':>10} {'of bw.':>7}"
    print(f"{head} {'difference':>10}")
    counts = predicted(only)
    for case in cases("cuda"):
        if case.name in counts:
            print(*rows(case, counts[case.name], gpu, repetitions), sep="\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--only", default="", help="operations whose name holds this")
    asked = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("kernels_gpu needs a GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    gpu = next((one for one in GPUS if one.name in name), None)
    print(f"{name}, {machine('triton')}, CUDA {torch.version.cuda}")
    print(f"prediction: {gpu or 'none, this GPU is not in kernels_roofline.GPUS'}")
    print_ops(gpu, asked.only, asked.repetitions)
    if not asked.only:
        print_layers(gpu, asked.repetitions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
