"""Which tensors a kernel takes, and what is told where it does not run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels import dora_compose, hadamard
from polyadapt.core.kernels.dispatch import has_kernels, runs_kernel
from polyadapt.tests.kernel_cases import compose_case


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    has_kernels.cache_clear()
    yield
    has_kernels.cache_clear()


def tensor(device: str, dtype: torch.dtype, numbers: int) -> Any:
    """What the dispatch reads of a tensor, also where the device does not exist."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: numbers)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A machine with one NVIDIA GPU."""

    def of(_: int) -> tuple[int, int]:
        return capability

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of)


@pytest.mark.parametrize(
    ("device", "dtype", "numbers", "taken"),
    [
        ("cuda", torch.bfloat16, 8, True),
        ("cuda:1", torch.float16, 8, True),
        ("cuda", torch.float32, 1, True),  # no smallest size: a kernel is one launch
        ("cuda", torch.float64, 8, False),
        ("cuda", torch.bfloat16, 0, False),
        ("cpu", torch.float32, 8, False),
        ("mps", torch.float32, 8, False),
    ],
)
def test_a_kernel_takes_what_is_on_a_gpu_not_empty_and_not_fp64(
    device: str, dtype: torch.dtype, numbers: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, (8, 0))
    assert runs_kernel(tensor(device, dtype, numbers)) is taken


def test_an_old_gpu_and_a_missing_triton_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    one = tensor("cuda", torch.float32, 8)
    with pytest.warns(UserWarning, match="GPU 0 is older than compute capability 8.0"):
        assert not runs_kernel(one)
    assert not runs_kernel(one)  # warnings are errors here: a second one would fail

    def nothing(_: str) -> None:
        return None

    has_kernels.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.warns(UserWarning, match="plain PyTorch .*: Triton is not installed"):
        assert not runs_kernel(one)


def test_the_environment_leaves_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    one = tensor("cuda", torch.float32, 8)
    monkeypatch.setenv("POLYADAPT_KERNELS", "0")
    assert not runs_kernel(one)
    has_kernels.cache_clear()
    monkeypatch.setenv("POLYADAPT_KERNELS", "off")
    with pytest.raises(AdaptError, match="POLYADAPT_KERNELS='off' is not known: 1 lets kernels"):
        runs_kernel(one)


def test_the_ops_launch_their_kernels_where_these_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyadapt.core.kernels import dora_compose_triton, hadamard_triton

    launched: list[str] = []

    def forward(*args: Any) -> Tensor:
        launched.append("compose")
        return dora_compose.reference(*args)

    def backward(*args: Any) -> dora_compose.Gradients:
        launched.append("backward")
        return dora_compose.reference_backward(*args)

    def transform(x: Tensor, matrix: Tensor) -> Tensor:
        launched.append(f"hadamard {list(matrix.shape)}")
        return hadamard.reference(x, False)

    def everywhere(_: Tensor) -> bool:
        return True

    monkeypatch.setattr(dora_compose_triton, "forward", forward)
    monkeypatch.setattr(dora_compose_triton, "backward", backward)
    monkeypatch.setattr(hadamard_triton, "forward", transform)
    monkeypatch.setattr(dora_compose, "runs_kernel", everywhere)
    monkeypatch.setattr(hadamard, "runs_kernel", everywhere)
    base, lora, gain, bias = compose_case((2, 3), torch.float32)
    dora_compose.dora_compose(base.requires_grad_(), lora, gain, 1.0, bias).sum().backward()
    hadamard.hadamard(torch.ones(1, 192))
    hadamard.hadamard(torch.ones(1, 8))  # too narrow for the kernel
    assert launched == ["compose", "backward", "hadamard [12, 12]"]


def test_importing_dora_and_the_ops_loads_no_triton() -> None:
    code = (
        "import sys, polyadapt.core.kernels.hadamard\n"
        "from polyadapt.core import DoRA\n"
        "print('triton' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
