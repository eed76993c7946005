"""The README says what is true: its example runs, its method table names what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm

from polyadapt.core import AdapterSet
from polyadapt.core.adapters import recipes

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    real = timm.create_model

    def without_download(name: str, pretrained: bool, **options: Any) -> Any:
        assert pretrained
        return real("vit_tiny_patch16_224", depth=2, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.group(1), names)
    assert isinstance(names["pets"], AdapterSet)
    assert (tmp_path / "pets.safetensors").is_file()


def test_the_method_table_has_a_row_for_every_method_and_no_other() -> None:
    rows = {m.group(1) for m in re.finditer(r"^\| `(\w+)`.*\| works \|$", README, re.MULTILINE)}
    assert rows == {recipe.__name__ for recipe in recipes().values()}


def test_the_picture_is_there() -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert shown
    assert all((Path(__file__).parent.parent / path).is_file() for path in shown)
