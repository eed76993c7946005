"""What a sequence of kernels moves and computes, counted while PyTorch calls them.

Every operation counts as one kernel that reads each operand once and writes each result once, as
if all re-reads came out of a cache; views are free. That favours products of matrices, everybody's
alike. Operations of this library are entered, and their Triton launches counted by
`kernel_launches`. Tensors of `numberless()` have shapes and no numbers: published sizes cost
nothing, and the code takes the way that it takes on a GPU.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyadapt.core.kernels import hadamard
from polyadapt.core.kernels.dispatch import KERNEL_DTYPES

aten = torch.ops.aten
# What bounds a step's rate: 16-bit and TF32 tensor cores, and the units outside of them.
MATRIX, TF32, FP32 = "matrix", "tf32", "fp32"
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm)
ONLY_WRITE: tuple[Any, ...] = (
    aten.eye,
    aten.zeros,
    aten.zeros_like,
    aten.ones,
    aten.ones_like,
    aten.full,
)
ONLY_WRITE += (aten.new_zeros, aten.zero_, aten.fill_)
FREE: tuple[Any, ...] = (
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten._unsafe_view,
)
FREE += (aten.promote_types,)
Launch = Callable[..., Any]  # -> what a launch returns, and its steps


@dataclass(frozen=True)
class Step:
    """One kernel: bytes between memory and chip, additions and multiplications, what does them."""

    name: str
    bytes: int
    operations: int
    engine: str = FP32


class Traffic(TorchDispatchMode):
    """Collects the steps of what runs inside the `with` block."""

    active: ClassVar[list[Traffic]] = []

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    def __enter__(self) -> Self:
        self.active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self.active.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "polyadapt":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if _is_made_of_others(func):  # F.linear inside of an operation
            with self:
                return func.decompose(*args, **kwargs)
        if func.overloadpacket is aten.nonzero:  # how many there are is in the numbers: none
            self.steps.append(Step("nonzero", tensor_bytes(args[0]), 0))
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        found = func(*args, **kwargs)
        if not _is_free(func):
            self.steps.append(_of_torch(func.overloadpacket, (args, kwargs), found))
        return found


def _is_free(func: Any) -> bool:
    return func.is_view or func.namespace == "prim" or func.overloadpacket in FREE


def _is_made_of_others(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return not _is_free(func) and func.has_kernel_for_dispatch_key(key)


def _of_torch(packet: Any, given: Any, found: Any) -> Step:
    reads, name = tensors_in(given), packet.__name__
    if packet in PRODUCTS:
        left, out = reads[-2], found
        engine = FP32 if left.dtype == torch.float32 else MATRIX
        return step(name, reads, [out], 2 * out.numel() * left.shape[-1], engine)
    writes = tensors_in(found)
    most = max((t.numel() for t in (*reads, *writes)), default=0)
    return step(name, [] if packet in ONLY_WRITE else reads, writes, most)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def step(
    name: str,
    reads: Iterable[Tensor | None],
    writes: Iterable[Tensor],
    operations: int,
    engine: str = FP32,
    extra: int = 0,
) -> Step:
    """A kernel that reads and writes each tensor once, and `extra` bytes beside them."""
    moved = sum(tensor_bytes(t) for t in (*reads, *writes) if t is not None)
    return Step(name, moved + extra, operations, engine)


def tensor_bytes(t: Tensor) -> int:
    """Bytes of the numbers that are there: an expanded dimension has one."""
    at = zip(t.shape, t.stride(), strict=True)
    return math.prod(size if stride else min(size, 1) for size, stride in at) * t.element_size()


def total(steps: Iterable[Step]) -> tuple[int, int]:
    """Bytes and operations."""
    steps = tuple(steps)
    return sum(step.bytes for step in steps), sum(step.operations for step in steps)


def launched(launch: Launch) -> Callable[..., Any]:
    """The launch as a function that adds its steps to the block that counts, if there is one."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found, *steps = launch(*args, **kwargs)
        if Traffic.active:
            Traffic.active[-1].steps += steps
        return found

    return call


@contextmanager
def numberless() -> Iterator[None]:
    """Tensors without numbers, and code that believes to be on a GPU with Triton."""
    from polyadapt.benchmarks.kernel_launches import LAUNCHES

    core = [module for name, module in sys.modules.items() if name.startswith("polyadapt.core")]
    with ExitStack() as stack:
        for module in core:
            if hasattr(module, "runs_kernel"):
                stack.enter_context(mock.patch.object(module, "runs_kernel", _would_run))
        for (module, name), launch in LAUNCHES.items():
            stack.enter_context(mock.patch.object(module, name, launched(launch)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # they have none
        stack.enter_context(mock.patch.object(hadamard, "matrix", _matrix))  # from numbers
        stack.enter_context(FakeTensorMode())
        yield


def _matrix(k: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(k, k, dtype=dtype)


def _would_run(tensor: Tensor) -> bool:
    return tensor.dtype in KERNEL_DTYPES and tensor.numel() > 0
