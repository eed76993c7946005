"""Run by `test_kernels_processes.py`: the kernels compiled for GPUs that are not there.

Triton brings the assembler. What a device would refuse when it loads a kernel (shared memory,
registers) and what would make it slow (spills, loads of single numbers) is read from the result.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polyadapt.core.kernels import dora_compose_triton, hadamard_triton
from polyadapt.core.kernels.hadamard import LARGEST_TILE
from polyadapt.core.kernels.paley import factor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one block may ask for (CUDA's programming guide; CDNA3's manual).
SHARED: dict[int | str, int] = {80: 166912, 89: 101376, 90: 232448, 100: 232448, "gfx942": 65536}
GPUS = [*SHARED]
BESIDE_16 = [["tt.divisibility", 16]]  # what the JIT infers for sizes and addresses
POINTERS = {"gain_ptr": "*fp32", "d_gain_ptr": "*fp32", "sums_ptr": "*fp32", "matrix_ptr": "*fp32"}
NUMBERS = {"scale": "fp32", "rows": "i32", "columns": "i32"}


def compiled(
    kernel: Any, gpu: int | str, dtype: str, options: dict[str, Any], odd: tuple[str, ...] = ()
) -> Any:
    """The kernel for a GPU; `odd` names what is not a multiple of 16."""
    options = dict(options)
    warps = options.pop("num_warps")
    names = [parameter.name for parameter in kernel.params]
    types = {n: POINTERS.get(n, f"*{dtype}") for n in names if n.endswith("_ptr")}
    types |= {n: NUMBERS[n] for n in names if n in NUMBERS and n not in options}
    aligned = [n for n in types if n != "scale" and n not in odd]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs=options,
        attrs={(names.index(n),): BESIDE_16 for n in aligned},
    )
    target = GPUTarget("cuda", gpu, 32) if isinstance(gpu, int) else GPUTarget("hip", gpu, 64)
    return triton.compile(source, target=target, options={"num_warps": warps})


def check_resources(kernel: Any, gpu: int | str, folder: Path) -> None:
    """Shared memory within the chip's limit, no spills, registers for at least one block."""
    assert kernel.metadata.shared <= SHARED[gpu]
    if not isinstance(gpu, int):
        assert kernel.asm["hsaco"]
        spills = re.findall(r"_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spills
        assert {*spills} == {"0"}
        return
    (folder / "cubin").write_bytes(kernel.asm["cubin"])
    tool = [str(TOOLS / "cuobjdump"), "-res-usage", str(folder / "cubin")]
    usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert (found["STACK"], found["LOCAL"]) == (0, 0)
    assert found["REG"] * 32 * kernel.metadata.num_warps <= 65536


def wide_loads(kernel: Any) -> int:
    """Loads of 16 bytes."""
    return len(re.findall(r"ld\.global\S*\.v4\.", kernel.asm["ptx"]))


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
    built = compiled(kernel, gpu, "bf16", options)
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
    check_resources(compiled(kernel, 90, "bf16", options, odd=("columns", "rows")), 90, tmp_path)
    check_resources(compiled(kernel, 90, "fp32", options), 90, tmp_path)
    check_resources(compiled(kernel, 90, "fp16", none), 90, tmp_path)
    # The JIT makes a size of 1 a constant: a single token is such a call.
    one = options | {"rows": 1, "columns": 1}
    check_resources(compiled(kernel, 90, "bf16", one), 90, tmp_path)


# 14336 = 28 * 512 is padded to 32 * 512, the largest tile; of all GPUs, 89 has least memory.
HADAMARD: list[tuple[int | str, int]] = [(90, n) for n in (16, 384, 768, 1024, 1280, 3072)]
HADAMARD += [(gpu, 1280) for gpu in GPUS if gpu != 90] + [(89, 14336), (89, LARGEST_TILE)]
HADAMARD += [("gfx942", LARGEST_TILE)]


@pytest.mark.parametrize(("gpu", "size"), HADAMARD)
def test_hadamard_compiles_without_spills_and_off_the_tf32_units(
    gpu: int | str, size: int, tmp_path: Path
) -> None:
    shape = hadamard_triton.shape_of(size, factor(size) or 0)
    built = compiled(hadamard_triton.transform, gpu, "bf16", shape)
    check_resources(built, gpu, tmp_path)
    if isinstance(gpu, int):
        assert "tf32" not in built.asm["ptx"]
        assert size < 256 or wide_loads(built)
    else:
        assert "xf32" not in built.asm["amdgcn"]


def test_a_kernel_that_spills_is_noticed(tmp_path: Path) -> None:
    one_warp = hadamard_triton.shape_of(LARGEST_TILE // 2, 1) | {"num_warps": 1}
    built = compiled(hadamard_triton.transform, 90, "bf16", one_warp)
    with pytest.raises(AssertionError):
        check_resources(built, 90, tmp_path)
