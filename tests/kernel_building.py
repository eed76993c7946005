"""Kernels compiled for GPUs that are not there, and what is read from the result.

Triton brings the assembler. What a device would refuse when it loads a kernel is its shared memory
and its registers; what would make it slow are spills and loads of single numbers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one block may ask for (CUDA's programming guide; CDNA3's manual).
SHARED: dict[int | str, int] = {80: 166912, 89: 101376, 90: 232448, 100: 232448, "gfx942": 65536}
GPUS = [*SHARED]
BESIDE_16 = [["tt.divisibility", 16]]  # what the JIT infers for sizes and addresses
AS_DTYPE: Mapping[str, str] = MappingProxyType({})
FOR_TRITON = ("num_warps", "num_stages")


def compiled(
    kernel: Any,
    gpu: int | str,
    dtype: str,
    options: Mapping[str, Any],
    odd: tuple[str, ...] = (),
    types: Mapping[str, str] = AS_DTYPE,
) -> Any:
    """The kernel for a GPU; `options` gives constants, warps and stages.

    Parameters `.._ptr` point to `dtype`, `scale` is fp32 and the others i32: `types` names those
    that are not. `odd` names what is not a multiple of 16.
    """
    launch = {n: options[n] for n in FOR_TRITON if n in options}
    constants = {n: value for n, value in options.items() if n not in launch}
    names = [parameter.name for parameter in kernel.params]
    known = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in names if n not in constants}
    known |= {n: t for n, t in {"scale": "fp32", **types}.items() if n in known}
    aligned = [n for n, t in known.items() if t[0] in "*i" and n not in odd]
    source = ASTSource(
        fn=kernel,
        signature={n: known.get(n, "constexpr") for n in names},
        constexprs=constants,
        attrs={(names.index(n),): BESIDE_16 for n in aligned},
    )
    target = GPUTarget("cuda", gpu, 32) if isinstance(gpu, int) else GPUTarget("hip", gpu, 64)
    return triton.compile(source, target=target, options=launch)


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
