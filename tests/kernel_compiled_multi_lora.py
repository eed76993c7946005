"""Run by `test_kernels_processes.py`: the kernels of `multi_lora` compiled for five GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from polyadapt.core.kernels import multi_lora_triton
from polyadapt.core.kernels.segments import LARGE, SMALL
from polyadapt.tests.kernel_building import GPUS, check_resources, compiled, wide_loads

TABLES = ("order_ptr", "tiles_ptr", "starts_ptr", "ranks_ptr")
TYPES = dict.fromkeys(TABLES, "*i64") | {"hidden_ptr": "*fp32", "scales_ptr": "*fp32"}
ODD = ("width", "tokens", "down_ptr", "up_ptr")
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

both = pytest.mark.parametrize("name", ["shrink", "expand"])


def options_of(name: str, dtype: torch.dtype, rank: int, rows: int) -> dict[str, Any]:
    """What a launch gives as constants."""
    both = multi_lora_triton.options_of(rank, dtype, rows)
    if name == "shrink":
        return both | {"INNER": multi_lora_triton.STEP[both["PRECISION"]]}
    return both | {"COLUMNS": multi_lora_triton.COLUMNS, "WITH_Y": True}


def built(
    name: str, gpu: int | str, dtype: str, rank: int, rows: int, odd: tuple[str, ...] = ()
) -> Any:
    """A kernel as a call of that rank launches it."""
    stands_for = dtype if isinstance(gpu, int) else "fp32"  # AMD's have the options of fp32
    options = options_of(name, NAMES[stands_for], rank, rows)
    kernel = getattr(multi_lora_triton, name)
    return compiled(kernel, gpu, dtype, options, odd=odd, types=TYPES)


@both
@pytest.mark.parametrize(("rank", "rows"), [(16, SMALL), (64, LARGE)])
@pytest.mark.parametrize("gpu", GPUS)
def test_the_kernels_compile_without_spills_and_use_the_matrix_units(
    gpu: int | str, rank: int, rows: int, name: str, tmp_path: Path
) -> None:
    made = built(name, gpu, "bf16", rank, rows, odd=("tokens",))
    check_resources(made, gpu, tmp_path)
    if isinstance(gpu, int):
        assert re.search(r"mma\S*tf32|tcgen05\.mma\S*tf32", made.asm["ptx"])
        assert wide_loads(made) or "cp.async.cg.shared.global" in made.asm["ptx"]  # 16 bytes
        assert "ld.global.b16" not in made.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", made.asm["ptx"])  # sums have a fixed order


@both
@pytest.mark.parametrize(("rank", "rows"), [(16, SMALL), (32, LARGE), (64, LARGE)])
def test_fp32_stays_off_the_tf32_units(name: str, rank: int, rows: int, tmp_path: Path) -> None:
    for gpu in (80, 89):
        made = built(name, gpu, "fp32", rank, rows)
        check_resources(made, gpu, tmp_path)
        assert "tf32" not in made.asm["ptx"]


@both
def test_odd_sizes_and_ranks_compile(name: str, tmp_path: Path) -> None:
    for dtype in NAMES:
        check_resources(built(name, 90, dtype, 5, SMALL, odd=ODD), 90, tmp_path)
    check_resources(built(name, 80, "fp32", 100, LARGE, odd=ODD), 80, tmp_path)


@both
def test_sizes_of_1_compile(name: str, tmp_path: Path) -> None:
    """The JIT makes a size of 1 a constant: one token for each id, and one output."""
    options = options_of(name, torch.bfloat16, 1, SMALL) | {"width": 1, "tokens": 1}
    kernel = getattr(multi_lora_triton, name)
    check_resources(compiled(kernel, 90, "bf16", options, types=TYPES), 90, tmp_path)
    if name == "expand":  # the backward's
        none = options | {"WITH_Y": False}
        check_resources(compiled(kernel, 90, "bf16", none, types=TYPES), 90, tmp_path)
