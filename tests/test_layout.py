"""The rules of the house that a program can read: what imports what, how long things get."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = {"vision", "speech", "timeseries", "vlm", "geometry3d"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 80

# What a user who wants the core alone has not installed, or does not want to wait for.
HEAVY = ["lightning", "monai", "numpy", "open_clip", "timm", "torch", "torchvision", "transformers"]
HEAVY += ["triton", "whisper"]


def _parts(file: Path) -> tuple[str, ...]:
    return file.relative_to(ROOT).with_suffix("").parts


def _module(file: Path) -> str:
    """core/sites.py -> polyadapt.core.sites, core/__init__.py -> polyadapt.core."""
    return ".".join(part for part in ("polyadapt", *_parts(file)) if part != "__init__")


FOLDERS = [ROOT / name for name in ("core", *sorted(DOMAINS)) if (ROOT / name).is_dir()]
PACKAGE = [ROOT / "__init__.py", *(file for d in FOLDERS for file in sorted(d.rglob("*.py")))]
EVERY_FILE = PACKAGE + sorted((ROOT / "tests").rglob("*.py"))

by_module = pytest.mark.parametrize("file", PACKAGE, ids=_module)
by_file = pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: "/".join(_parts(file)))


def _imported(file: Path) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, was it written relatively) for each import of a package file."""
    inside = _module(file).split(".")
    if file.name != "__init__.py":
        inside.pop()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else []
            target = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{target}.{alias.name}", node.level > 0) for alias in node.names)


def test_the_packages_that_ship_are_the_folders_with_an_init() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [_module(file) for file in PACKAGE if file.name == "__init__.py"]
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(folders)
    assert {file.parent for file in PACKAGE} == {
        file.parent for file in PACKAGE if file.name == "__init__.py"
    }


def test_a_folder_of_code_at_the_top_is_the_core_a_domain_or_not_shipped() -> None:
    allowed = DOMAINS | {"core", "tests", "configs", "benchmarks", "docs", "build", "dist"}
    found = {file.parent.name for file in ROOT.glob("[!.]*/*.py")}
    assert found <= allowed


@by_module
def test_a_package_file_imports_only_the_core_and_its_own_domain(file: Path) -> None:
    house = {"core"} if file.is_relative_to(ROOT / "core") else {"core", _parts(file)[0]}
    for name, relative in _imported(file):
        assert relative == name.startswith("polyadapt."), f"{name}: ours relatively, others not"
        if relative:
            top = name.split(".")[1]
            assert top in house or top not in DOMAINS | {"core"}, f"{name} is another domain"


@by_file
def test_a_file_stays_short_enough_to_read(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


@by_file
def test_a_function_stays_short_enough_to_read(file: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, functions) and node.end_lineno:
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


@by_file
def test_a_file_is_named_after_what_it_does(file: Path) -> None:
    assert not {"utils", "util", "helpers", "misc", "common"} & set(_parts(file))


@by_module
def test_a_module_says_in_its_first_lines_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


def _loaded_after(statement: str) -> list[str]:
    """The heavy packages that a fresh process has loaded once it has run the statement."""
    code = f"import sys\n{statement}\nprint(*[n for n in {HEAVY} if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout.split()


def test_importing_the_core_loads_nothing_heavy() -> None:
    assert _loaded_after("import polyadapt.core, polyadapt.core.cli") == []


def test_a_name_of_the_core_loads_torch_and_no_framework() -> None:
    loaded = _loaded_after("from polyadapt.core import AdapterSet, Recipe, attach, load, select")
    assert "torch" in loaded
    assert {*loaded} <= {"torch", "numpy", "triton"}  # torch loads the other two itself


def test_everything_of_the_core_but_training_needs_torch_and_safetensors_alone() -> None:
    code = (
        "import sys, torch, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "from polyadapt import core\n"
        "names = sorted({*core._HOME} - {'AdaptedModule', 'RunFiles'})\n"  # Lightning's
        "import polyadapt.core.cli; [getattr(core, name) for name in (*names, 'LoRA')]\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*new - sys.stdlib_module_names)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["polyadapt"]


def test_importing_a_domain_loads_nothing_heavy() -> None:
    for folder in FOLDERS:
        assert _loaded_after(f"import {_module(folder / '__init__.py')}") == [], folder.name


@pytest.mark.parametrize("file", [f for f in PACKAGE if ">>>" in f.read_text()], ids=_module)
def test_the_examples_in_the_docstrings_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an example that saves a file saves it here
    ran = doctest.testmod(importlib.import_module(_module(file)), optionflags=doctest.ELLIPSIS)
    assert ran.attempted
    assert not ran.failed
