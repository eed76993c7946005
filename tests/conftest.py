"""What every test relies on: this checkout as `polyadapt`, fixed threads and seeds, the data."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The order of a sum depends on the number of threads, so tests that compare bits fix it. Two is
# the smallest number that runs the parallel code paths. Processes that a test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that spin while they wait would take the cores from the other test process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test may depend on a network or a display.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


def _use_this_checkout() -> None:
    """Let `import polyadapt` find this checkout, here and in processes that a test starts."""
    spec = importlib.util.find_spec("polyadapt")
    if spec and spec.origin and Path(spec.origin).resolve() == ROOT / "__init__.py":
        return
    # Not installed, or another checkout is: the folder's name is free, so go through a link.
    link = ROOT / ".link" / "polyadapt"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to("..", target_is_directory=True)
    sys.path.insert(0, str(link.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(link.parent), os.environ.get("PYTHONPATH")])
    )


_use_this_checkout()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_the_threads() -> Iterator[None]:
    """A test that changes their number changes the bits of those that run after it."""
    import torch

    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(autouse=True)
def _in_an_empty_folder(request: pytest.FixtureRequest) -> None:
    """A test that is marked so is there before any other fixture writes files for it."""
    if request.node.get_closest_marker("in_an_empty_folder"):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))


@pytest.fixture
def after_training(trained: Path, tmp_path: Path) -> None:
    """The test's folder holds what the module's `trained` made once."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the small data sets; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("POLYADAPT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}; POLYADAPT_SHARED_DATA can name another")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none: such a run is whole, nothing was skipped."""
    for_a_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_a_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=for_a_gpu)
        items[:] = [item for item in items if item not in for_a_gpu]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cells of the law table (a law for a method at a layer kind) ran and passed."""
    files = ("test_laws.py", "test_compile.py", "test_stacking.py")
    for outcome in ("passed", "failed"):
        reports = terminalreporter.stats.get(outcome, [])
        cells = [r.nodeid for r in reports if " at " in r.nodeid and r.fspath.endswith(files)]
        if cells:
            laws = {cell.split("::")[1].split("[")[0] for cell in cells}
            terminalreporter.write_line(
                f"law table: {len(cells)} cells {outcome}, {len(laws)} laws"
            )
