"""Run by `test_kernels_processes.py`: `dora_compose` and `hadamard` compiled for five GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from polyadapt.core.kernels import dora_compose_triton, hadamard_triton
from polyadapt.core.kernels.hadamard import LARGEST_TILE
from polyadapt.core.kernels.paley import factor
from polyadapt.tests.kernel_building import GPUS, check_resources, compiled, wide_loads

# Vectors beside operands of any dtype.
TYPES = dict.fromkeys(("gain_ptr", "d_gain_ptr", "sums_ptr", "matrix_ptr"), "*fp32")
FORWARD = {"WITH_BIAS": True, "WHOLE": True, **dora_compose_triton.TILE}
BACKWARD = {"WITH_GAIN": True, **FORWARD, "STEPS": dora_compose_triton.STEPS}
COMPOSE = [
    pytest.param(dora_compose_triton.compose, FORWARD, id="forward"),
    pytest.param(dora_compose_triton.compose_backward, BACKWARD, id="backward"),
]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("kernel", "options"), COMPOSE)
def test_compose_compiles_without_spills_and_loads_16_bytes(
    kernel: Any, options: dict[str, Any], gpu: int | str, tmp_path: Path
) -> None:
    built = compiled(kernel, gpu, "bf16", options, types=TYPES)
    check_resources(built, gpu, tmp_path)
    if isinstance(gpu, int):
        operands = 2 if kernel is dora_compose_triton.compose else 3
        numbers = options["ROWS"] * options["COLUMNS"] // (32 * options["num_warps"])
        assert wide_loads(built) >= operands * numbers // 8
        assert "ld.global.b16" not in built.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", built.asm["ptx"])  # sums have a fixed order


@pytest.mark.parametrize(("kernel", "options"), COMPOSE)
def test_compose_compiles_for_an_odd_width_and_in_fp32_and_without_its_options(
    kernel: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    none = {n: False if n.startswith("W") else value for n, value in options.items()}
    check_resources(compiled(kernel, 90, "bf16", options, ("columns", "rows"), TYPES), 90, tmp_path)
    check_resources(compiled(kernel, 90, "fp32", options, types=TYPES), 90, tmp_path)
    check_resources(compiled(kernel, 90, "fp16", none, types=TYPES), 90, tmp_path)
    # The JIT makes a size of 1 a constant: a single token is such a call.
    one = options | {"rows": 1, "columns": 1}
    check_resources(compiled(kernel, 90, "bf16", one, types=TYPES), 90, tmp_path)


# 14336 = 28 * 512 is padded to 32 * 512, the largest tile; of all GPUs, 89 has least memory.
HADAMARD: list[tuple[int | str, int]] = [(90, n) for n in (16, 384, 768, 1024, 1280, 3072)]
HADAMARD += [(gpu, 1280) for gpu in GPUS if gpu != 90] + [(89, 14336), (89, LARGEST_TILE)]
HADAMARD += [("gfx942", LARGEST_TILE)]


@pytest.mark.parametrize(("gpu", "size"), HADAMARD)
def test_hadamard_compiles_without_spills_and_off_the_tf32_units(
    gpu: int | str, size: int, tmp_path: Path
) -> None:
    shape = hadamard_triton.shape_of(size, factor(size) or 0)
    built = compiled(hadamard_triton.transform, gpu, "bf16", shape, types=TYPES)
    check_resources(built, gpu, tmp_path)
    if isinstance(gpu, int):
        assert "tf32" not in built.asm["ptx"]
        assert size < 256 or wide_loads(built)
    else:
        assert "xf32" not in built.asm["amdgcn"]


def test_a_kernel_that_spills_is_noticed(tmp_path: Path) -> None:
    one_warp = hadamard_triton.shape_of(LARGEST_TILE // 2, 1) | {"num_warps": 1}
    built = compiled(hadamard_triton.transform, 90, "bf16", one_warp, types=TYPES)
    with pytest.raises(AssertionError):
        check_resources(built, 90, tmp_path)
