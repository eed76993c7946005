"""Run by `test_kernels_processes.py`: `row_norm`'s kernel compiled for five GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from polyadapt.core.kernels.row_norm_triton import SPAN, TILE, squares
from polyadapt.tests.kernel_building import GPUS, check_resources, compiled, wide_loads

FACTORS_IN_FP32 = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
SUMS_IN_FP32 = {"out_ptr": "*fp32"}
# The JIT makes a size or stride of 1 a constant.
BY_ROW = {"SPAN": SPAN, "column_stride": 1, **TILE}


@pytest.mark.parametrize("types", [FACTORS_IN_FP32, SUMS_IN_FP32], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gpu", GPUS)
def test_the_kernel_compiles_without_spills_and_multiplies_in_fp32(
    gpu: int | str, types: dict[str, str], tmp_path: Path
) -> None:
    built = compiled(squares, gpu, "bf16", BY_ROW, types=types)
    check_resources(built, gpu, tmp_path)
    if not isinstance(gpu, int):
        assert re.search(r"v_mfma_f32_\d+x\d+x\d+_f32", built.asm["amdgcn"])
        assert "xf32" not in built.asm["amdgcn"]
        return
    ptx = built.asm["ptx"]
    assert "fma.rn.f32" in ptx
    assert not re.search(r"tf32|mma\.sync|wgmma|tcgen05", ptx)
    assert not re.search(r"\b(atom|red)\.", ptx)  # sums have a fixed order
    numbers = TILE["ROWS"] * TILE["COLUMNS"] // (32 * TILE["num_warps"])
    assert wide_loads(built) >= numbers // 8  # of W0
    assert not re.search(r"ld\.global(\.\w+)*\.b16", ptx)


VARIANTS: list[Any] = [
    pytest.param("bf16", {}, ("rows", "columns", "rank", "row_stride"), id="odd sizes"),
    pytest.param("fp16", {}, (), id="fp16"),
    pytest.param("fp32", {}, (), id="fp32"),
    pytest.param("bf16", {"row_stride": 1, "column_stride": None}, (), id="transposed"),
    pytest.param("bf16", {"column_stride": None}, (), id="any strides"),
    pytest.param("bf16", {"rank": 1}, (), id="rank 1"),
    pytest.param("bf16", {"rows": 1, "columns": 1, "rank": 1, "row_stride": 1}, (), id="a number"),
]


@pytest.mark.parametrize(("dtype", "changed", "odd"), VARIANTS)
def test_the_kernel_compiles_for_every_layout_and_dtype(
    dtype: str, changed: dict[str, int | None], odd: tuple[str, ...], tmp_path: Path
) -> None:
    options = {n: value for n, value in (BY_ROW | changed).items() if value is not None}
    built = compiled(squares, 90, dtype, options, odd, FACTORS_IN_FP32)
    check_resources(built, 90, tmp_path)
    if "row_stride" in changed and "rank" not in changed:
        assert wide_loads(built)  # along the rows, where the numbers are neighbours
