"""Run by `test_kernels_processes.py`: `lowrank_linear`'s kernels, every tile for every GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from polyadapt.core.kernels import lowrank_linear_triton
from polyadapt.core.kernels.lowrank_linear_triton import BESIDE, MOST_RANKS, PASS, WHOLE
from polyadapt.tests.kernel_building import GPUS, check_resources, compiled, wide_loads

FP32 = dict.fromkeys(("weights_ptr", "gain_ptr", "z_ptr", "d_b_ptr"), "*fp32")
FLAGS = {"WITH_WEIGHTS": True, "WITH_GAIN": True, "WITH_BIAS": True}
RANKS = [16, MOST_RANKS]
MATRIX_UNITS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

on_every_gpu = pytest.mark.parametrize("gpu", GPUS)
of_ranks = pytest.mark.parametrize("ranks", RANKS)
tiles_of_whole = pytest.mark.parametrize("tile", WHOLE, ids=range(len(WHOLE)))
tiles_beside = pytest.mark.parametrize("tile", BESIDE, ids=range(len(BESIDE)))


def options(tile: Any, ranks: int, based: bool, w_stride: str = "w_column") -> dict[str, Any]:
    """The constants of the launch; the JIT makes a stride of 1 one of them."""
    steps = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **tile.kwargs}
    tiles = {"GROUP": 8, "DEPTH": lowrank_linear_triton.DEPTH, "RANKS": ranks, "UPCAST": False}
    return {**FLAGS, "WITH_BASE": based, **tiles, **steps, w_stride: 1}


def product(gpu: int | str, dtype: str, constants: dict[str, Any], *odd: str) -> Any:
    return compiled(lowrank_linear_triton.product, gpu, dtype, constants, odd, FP32)


def multiplies(kernel: Any, gpu: int | str, *units: str) -> bool:
    """One of these instructions is there, by default the widest of the GPU."""
    if not isinstance(gpu, int):
        return "v_mfma" in kernel.asm["amdgcn"]
    return any(unit in kernel.asm["ptx"] for unit in units or (MATRIX_UNITS[gpu],))


def wide_copies(kernel: Any) -> int:
    """Copies of 16 bytes from global to shared memory, and loads of 16 bytes."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10", kernel.asm["ptx"])
    return len(copies) + wide_loads(kernel)


@on_every_gpu
@tiles_of_whole
def test_the_whole_product_runs_on_matrix_units_without_spills(
    tile: Any, gpu: int | str, tmp_path: Path
) -> None:
    built = product(gpu, "bf16", options(tile, 16, False))
    check_resources(built, gpu, tmp_path)
    assert multiplies(built, gpu)
    if isinstance(gpu, int):
        numbers = (tile.kwargs["ROWS"] + tile.kwargs["COLUMNS"]) * lowrank_linear_triton.DEPTH
        assert wide_copies(built) >= numbers // (8 * 32 * tile.num_warps)
        assert "ld.global.b16" not in built.asm["ptx"]


@on_every_gpu
@of_ranks
@tiles_beside
def test_beside_a_base_nothing_spills_and_loads_are_wide(
    tile: Any, ranks: int, gpu: int | str, tmp_path: Path
) -> None:
    constants = options(tile, ranks, True)
    built = product(gpu, "bf16", constants)
    check_resources(built, gpu, tmp_path)
    assert multiplies(built, gpu, "mma.sync", "wgmma.mma_async", "tcgen05.mma")
    if isinstance(gpu, int):
        assert wide_copies(built)
        assert "ld.global.b16" not in built.asm["ptx"]
    exact = product(gpu, "fp32", constants)
    check_resources(exact, gpu, tmp_path)
    assert "tf32" not in exact.asm["ptx" if isinstance(gpu, int) else "amdgcn"]


@on_every_gpu
@of_ranks
def test_the_pass_over_the_gradient_has_no_atomics_and_no_spills(
    ranks: int, gpu: int | str, tmp_path: Path
) -> None:
    constants = {**PASS, "WITH_GAIN": True, "RANKS": ranks, "UPCAST": False}
    kernel = lowrank_linear_triton.one_pass
    built = compiled(kernel, gpu, "bf16", constants, types=FP32)
    check_resources(built, gpu, tmp_path)
    assert multiplies(built, gpu)
    if isinstance(gpu, int):
        assert wide_copies(built)
        assert not re.search(r"\b(atom|red)\.", built.asm["ptx"])


def test_odd_sizes_a_transposed_weight_and_single_numbers_compile(tmp_path: Path) -> None:
    odd = ("tokens", "rank", "d_in", "d_out", "w_row", "base_row")
    none = dict.fromkeys(FLAGS, False)
    for tile in (WHOLE[2], BESIDE[1]):
        based = tile is BESIDE[1]
        constants = options(tile, MOST_RANKS, based)
        free = odd if based else odd[:2]  # the others are multiples of 16 there
        check_resources(product(90, "fp16", constants, *free), 90, tmp_path)
        check_resources(product(90, "fp16", constants | none), 90, tmp_path)
        ones = constants | dict.fromkeys(free, 1)
        check_resources(product(90, "bf16", ones), 90, tmp_path)
    turned = product(90, "bf16", options(WHOLE[2], 16, False, "w_row"))
    check_resources(turned, 90, tmp_path)
    assert multiplies(turned, 90)
    assert wide_copies(turned)
    constants = {**PASS, "WITH_GAIN": False, "RANKS": 16, "UPCAST": False}
    kernel = lowrank_linear_triton.one_pass
    check_resources(compiled(kernel, 90, "fp16", constants, odd[:2], FP32), 90, tmp_path)
    one = constants | {"tokens": 1, "rank": 1, "steps": 1}
    check_resources(compiled(kernel, 90, "bf16", one, types=FP32), 90, tmp_path)
