"""The five fused operations beside what plain PyTorch does in their place, at published sizes.

`cases` makes the same calls for counting (without numbers), for a GPU, and tiny for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadapt.benchmarks.kernel_traffic import Step, Traffic, tensor_bytes
from polyadapt.core.kernels.dora_compose import dora_compose
from polyadapt.core.kernels.hadamard import hadamard
from polyadapt.core.kernels.lowrank_linear import lowrank_linear
from polyadapt.core.kernels.multi_lora import Sets, multi_lora
from polyadapt.core.kernels.row_norm import row_norm
from polyadapt.core.kernels.segments import segments

SCALE = 0.5
TOKENS = 4096
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One call of an operation, and the same by plain PyTorch."""

    op: str
    shape: str
    ours: Callable[[], Tensor]
    eager: Callable[[], Tensor]
    reads: tuple[Tensor, ...]  # all that the result depends on
    operations: int  # the fewest known
    leaves: tuple[Tensor, ...] = ()  # get gradients
    back_reads: tuple[Tensor, ...] = ()  # what these depend on, beside the arriving one
    back_operations: int = 0

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"

    def least(self, backward: bool = False) -> tuple[int, int]:
        """Bytes and operations: everything read once, results written once."""
        out = self.eager()
        if not backward:
            return sum(map(tensor_bytes, (*self.reads, out))), self.operations
        moved = sum(map(tensor_bytes, (*self.back_reads, out, *self.leaves)))
        return moved, self.back_operations

    def steps(self, call: Callable[[], Tensor]) -> tuple[list[Step], list[Step]]:
        """Of the forward and of the backward; among `numberless` tensors."""
        with Traffic() as forward:
            out = call()
        with Traffic() as backward:
            if self.leaves:
                torch.autograd.grad(out, self.leaves, torch.empty_like(out))
        return forward.steps, backward.steps


def cases(
    device: str, shrink: int = 1, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Iterator[Case]:
    """Each case when it is asked for, so that the operands of one are there at a time.

    `shrink` divides every size, but for those that the transform takes.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(of)

    tokens = TOKENS // shrink
    for width in (4096, 8192):
        yield compose_case(normal, tokens, width // shrink)
    for width, rank in ((4096, 16), (4096, 384), (8192, 384)):
        yield norm_case(normal, width // shrink, max(1, rank // shrink))
    for width, rank in ((4096, 16), (4096, 64), (8192, 384)):
        yield linear_case(normal, tokens, width // shrink, max(1, rank // shrink))
        yield branch_case(normal, tokens, width // shrink, max(1, rank // shrink))
    for samples, each in ((64, 64), (256, 1)):
        yield sets_case(normal, samples, each, 4096 // shrink)
    for size in (4096, 3072):
        yield transform_case(normal, tokens, size)


def compose_case(normal: Make, rows: int, width: int) -> Case:
    """DoRA's output; eager: PEFT's sequence of operations, the gain in the activations' dtype."""
    base, lora = normal(rows, width), normal(rows, width, std=0.01)
    gain = 1 + normal(width, std=0.01, of=torch.float32)
    leaves = tuple(t.requires_grad_() for t in (base, lora, gain))

    def eager() -> Tensor:
        g = gain.to(base.dtype)
        return base + ((g - 1) * base + g * lora * SCALE)

    return Case(
        op="dora_compose",
        shape=f"{rows} x {width}",
        ours=lambda: dora_compose(base, lora, gain, SCALE, whole=True),
        eager=eager,
        reads=leaves,
        operations=5 * rows * width,
        leaves=leaves,
        back_reads=leaves,
        back_operations=7 * rows * width,
    )


def norm_case(normal: Make, width: int, rank: int) -> Case:
    """Eager: PEFT's identity matrix through both factors, in bf16; ours has factors in fp32."""
    w0, a, b = normal(width, width), normal(rank, width), normal(width, rank, std=0.01)
    wide = (w0, a.float(), b.float())

    def eager() -> Tensor:
        eye = torch.eye(width, dtype=w0.dtype, device=w0.device)
        update = F.linear(F.linear(eye, a), b).t()
        norm: Tensor = torch.linalg.norm(w0 + SCALE * update, dim=1)
        return norm

    return Case(
        op="row_norm",
        shape=f"{width} x {width}, r {rank}",
        ours=lambda: row_norm(*wide, SCALE),
        eager=eager,
        reads=wide,
        operations=2 * width * width * rank + 4 * width * width,
    )


def linear_case(normal: Make, tokens: int, width: int, rank: int) -> Case:
    """A layer and its branch; eager: three products, PEFT's way."""
    x, a, b = _branch(normal, tokens, width, rank)
    w0 = normal(width, width, std=width**-0.5)
    return Case(
        op="lowrank_linear",
        shape=f"{tokens} tokens, {width} x {width}, r {rank}",
        ours=lambda: lowrank_linear(x, w0, a, b, SCALE),
        eager=lambda: F.linear(x, w0) + F.linear(F.linear(x, a), b) * SCALE,
        reads=(x, w0, a, b),
        operations=2 * tokens * width * (width + 2 * rank),
        leaves=(x, a, b),
        back_reads=(x, w0, a, b),
        back_operations=2 * tokens * width * (width + 4 * rank),
    )


def branch_case(normal: Make, tokens: int, width: int, rank: int) -> Case:
    """The branch on an output that is there, as behind a hook."""
    x, a, b = _branch(normal, tokens, width, rank)
    base = normal(tokens, width).requires_grad_()
    return Case(
        op="lowrank_linear",
        shape=f"base, {tokens} tokens, {width} x {width}, r {rank}",
        ours=lambda: lowrank_linear(x, None, a, b, SCALE, base=base),
        eager=lambda: base + F.linear(F.linear(x, a), b) * SCALE,
        reads=(x, a, b, base),
        operations=2 * tokens * width * 2 * rank,
        leaves=(x, a, b),  # that of the base is what arrives
        back_reads=(x, a, b),
        back_operations=2 * tokens * width * 4 * rank,
    )


def _branch(normal: Make, tokens: int, width: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    x, a = normal(tokens, width), normal(rank, width, std=width**-0.5)
    return x.requires_grad_(), a.requires_grad_(), normal(width, rank).requires_grad_()


def sets_case(normal: Make, samples: int, tokens: int, width: int, sets: int = 8) -> Case:
    """Samples of eight sets and of none; eager: rows by set, a loop over the sets, rows back."""
    ranks = [(8, 16, 32, 64)[k % 4] for k in range(sets)]
    downs = [normal(rank, width, std=width**-0.5) for rank in ranks]
    ups, scales = [normal(width, rank) for rank in ranks], [SCALE] * sets
    x, y = (normal(samples, tokens, width).requires_grad_() for _ in range(2))
    owners = [n % (sets + 1) - 1 for n in range(samples)]
    ids = torch.tensor(owners, device=x.device)
    places = [[n for n, owner in enumerate(owners) if owner == k] for k in range(sets)]
    order = torch.tensor([n for place in places for n in place], device=x.device)
    held = Sets.of(downs, ups, scales)
    made = segments(ids, sets, tokens)

    def eager() -> Tensor:
        rows = x.index_select(0, order).split([len(place) for place in places])
        factors = zip(rows, downs, ups, scales, strict=True)
        deltas = [F.linear(F.linear(row, a), b) * scale for row, a, b, scale in factors]
        return y.index_add(0, order, torch.cat(deltas))

    ranked = sum(len(place) * rank for place, rank in zip(places, ranks, strict=True))
    operations = 2 * tokens * ranked * 2 * width
    return Case(
        op="multi_lora",
        shape=f"{samples} x {tokens} tokens, {width} x {width}, {sets} sets of r 8 to 64",
        ours=lambda: multi_lora(x, y, held, ids, made),
        eager=eager,
        reads=(x, y, ids, held.down, held.up),
        operations=operations,
        leaves=(x,),  # that of y is what arrives
        back_reads=(ids, held.down, held.up),
        back_operations=operations,
    )


def transform_case(normal: Make, rows: int, size: int) -> Case:
    """Eager: a product with the matrix, as one has it without a fast transform."""
    x = normal(rows, size).requires_grad_()
    matrix = hadamard(torch.eye(size, device=x.device)).to(x.dtype)
    power = size & -size
    k = size // power
    k, power = (k, power) if k == 1 else (4 * k, power // 4)  # 3072 is 12 * 2^8
    operations = rows * size * (power.bit_length() + (k if k > 1 else 0))
    return Case(
        op="hadamard",
        shape=f"{rows} x {size}",
        ours=lambda: hadamard(x),
        eager=lambda: x @ matrix,
        reads=(x,),
        operations=operations,
        leaves=(x,),
        back_operations=operations,
    )
