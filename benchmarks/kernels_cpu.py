"""DoRA on one linear layer against PEFT 0.21.2's, on a CPU: time, kept and peak memory.

By width, rank, tokens and dropout; `dora` beside it asks another question, what DoRA costs over
LoRA. The factors require grad, so that the row norm is computed anew in every forward, as in
training. Kept: storages that the graph holds for backward, parameters aside. Peak: the most that
torch's allocator holds beyond what is there before, counted from its records, not from the
process: neither other jobs nor the C library's habits change it.

Run: python -m benchmarks.kernels_cpu [--rounds 7] [--widths 1024,4096]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.profiler import profile

from polyadapt.benchmarks.rounds import Times, interleaved, machine, one_thread
from polyadapt.benchmarks.training_step import kept
from polyadapt.core import DoRA, attach

WIDTHS = (1024, 4096)
RANKS = (16, 384)
TOKENS = (64, 512)
DROPOUTS = (0.0, 0.1)
KINDS = ("ours", "PEFT")


@dataclass(frozen=True)
class Cell:
    """A row of the table."""

    width: int
    rank: int
    tokens: int
    dropout: float

    def __str__(self) -> str:
        return f"{self.width:6} {self.rank:5} {self.tokens:7} {self.dropout:8g}"

    def model(self, kind: str) -> nn.Module:
        """A frozen linear layer under DoRA, its B not zero."""
        torch.manual_seed(0)
        made: nn.Module = nn.Sequential(nn.Linear(self.width, self.width)).train()
        if kind == "PEFT":
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.rank,
                lora_dropout=self.dropout,
                target_modules=["0"],
                use_dora=True,
            )
            made = inject_adapter_in_model(config, made)
        else:
            attach(made, DoRA(rank=self.rank, dropout=self.dropout), "0")
        for name, parameter in made.named_parameters():
            if name.endswith(".B") or "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        return made

    def x(self) -> Tensor:
        """An input that needs a gradient, as behind another adapted layer."""
        torch.manual_seed(1)
        return torch.randn(self.tokens, self.width, requires_grad=True)


def summed(made: nn.Module, x: Tensor) -> Tensor:
    """A loss that keeps nothing itself."""
    loss: Tensor = made(x).sum()
    return loss


def step(made: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward."""

    def call() -> None:
        made.zero_grad()
        x.grad = None
        summed(made, x).backward()

    return call


def peak(call: Callable[[], Any]) -> int:
    """Bytes: the most that is allocated at once during a call, beyond what was before."""
    with profile(profile_memory=True) as recorded:
        call()
    now = most = 0
    events = recorded.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def ratio(times: Times) -> str:
    """Ours over PEFT's per round: median, spread, and both times."""
    ratios = times.ratios("ours", to="PEFT")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    both = " / ".join(f"{1e3 * times.median(kind):.4g}" for kind in KINDS)
    return f"{statistics.median(ratios):7.2f} {spread:15} {both:>15}"


def row(cell: Cell, rounds: int) -> str:
    """Times and MiB of one cell."""
    made, x = {kind: cell.model(kind) for kind in KINDS}, cell.x()
    forward = {kind: lambda one=one: one(x) for kind, one in made.items()}
    steps = {kind: step(one, x) for kind, one in made.items()}
    times = [interleaved(calls, rounds) for calls in (forward, steps)]
    held = " / ".join(f"{kept(made[kind], x, loss_of=summed):.4g}" for kind in KINDS)
    most = " / ".join(f"{peak(steps[kind]) / 2**20:.4g}" for kind in KINDS)
    return f"{cell} {' '.join(map(ratio, times))} {held:>15} {most:>15}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    asked = parser.parse_args()
    one_thread()
    print(machine("peft"))
    print("time: ours over PEFT's (smallest to largest round), ms ours / PEFT")
    print("memory: MiB ours / PEFT, kept for backward and at the peak of a step, fp32")
    head = f"{'width':>6} {'rank':>5} {'tokens':>7} {'dropout':>8}"
    head += f" {'forward':>23} {'ms':>15} {'f. + backward':>23} {'ms':>15}"
    print(head + f" {'kept MiB':>15} {'peak MiB':>15}")
    widths = map(int, asked.widths.split(","))
    for sizes in itertools.product(widths, RANKS, TOKENS, DROPOUTS):
        print(row(Cell(*sizes), asked.rounds), flush=True)


if __name__ == "__main__":
    main()
