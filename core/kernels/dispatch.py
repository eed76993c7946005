"""Where a kernel runs and where its reference does, and the arguments that neither takes."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from ..errors import AdaptError

# They compute in fp32, so fp64 is left to the references.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_GPU = (8, 0)  # the oldest that the tests compile for
SWITCH = "POLYADAPT_KERNELS"  # in the environment: 0 leaves all kernels out


def runs_kernel(tensor: Tensor) -> bool:
    """Whether a kernel takes this tensor: on a GPU, with Triton, not empty, not fp64."""
    if tensor.device.type != "cuda" or tensor.dtype not in KERNEL_DTYPES or not tensor.numel():
        return False
    return has_kernels(tensor.device.index or 0)


@functools.cache  # the notice comes once per GPU
def has_kernels(gpu: int) -> bool:
    """Whether Triton is installed and this GPU is one that the kernels are compiled for.

    Never with POLYADAPT_KERNELS=0 in the environment. Raises `AdaptError` for other than 0 and 1.
    """
    switch, why = os.environ.get(SWITCH, "1"), ""
    if switch not in ("0", "1"):
        raise AdaptError(f"{SWITCH}={switch!r} is not known: 1 lets kernels run, 0 does not")
    if switch == "0":
        return False
    if importlib.util.find_spec("triton") is None:
        why = "Triton is not installed"
    elif torch.version.hip is None and torch.cuda.get_device_capability(gpu) < OLDEST_GPU:
        why = f"GPU {gpu} is older than compute capability {'.'.join(map(str, OLDEST_GPU))}"
    if why:
        warnings.warn(f"plain PyTorch in the place of fused kernels: {why}", stacklevel=2)
    return not why


def floating(op: str, **tensors: Tensor) -> None:
    """Raise unless all are tensors of floating numbers on one device."""
    (first, one), *others = tensors.items()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdaptError(f"{op}: {name} is {tensor.dtype}, not a tensor of floating numbers")
    for name, tensor in others:
        if tensor.device != one.device:
            raise AdaptError(
                f"{op}: {name} is on {tensor.device} and {first} on {one.device}: one is needed"
            )


def shaped(op: str, name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise unless the tensor has this shape: nothing is broadcast."""
    if tensor.shape != shape:
        raise AdaptError(f"{op}: {name} is {list(tensor.shape)}, not {list(shape)}")
