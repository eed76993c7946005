"""The kernels in processes of their own: interpreted on the CPU, compiled for five GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _run(name: str, **variables: str) -> None:
    """Every test of a file that is not collected by itself passes in a fresh process."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_XDIST")}
    pytest_in_it = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*pytest_in_it, str(HERE / name)],
        cwd=HERE.parent,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]  # 5: none was found
    assert "skipped" not in ran.stdout


def _named(pattern: str) -> list[str]:
    return sorted(path.name for path in HERE.glob(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("name", _named("kernel_interpreted*.py"))
def test_the_interpreted_kernels_are_the_references(name: str, tmp_path: Path) -> None:
    _run(name, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", _named("kernel_compiled*.py"))
def test_the_kernels_compile_for_five_gpus(name: str, tmp_path: Path) -> None:
    _run(name, TRITON_CACHE_DIR=str(tmp_path))
