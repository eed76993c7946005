"""A null in a configuration: refused by its key where a class takes none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from polyadapt.core.errors import AdaptError
from polyadapt.core.nulls import refuse_nulls
from polyadapt.core.recipe import Recipe
from polyadapt.tests.domain_cases import CASES, Case, outcome, with_value


@pytest.fixture(scope="module", autouse=True)
def _in_a_folder_with_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("nulls"))
        for case in CASES.values():
            case.save()
        yield


@pytest.mark.parametrize(
    ("domain", "place", "line"),
    [
        ("timeseries", ("model", "look_back"), "model.look_back: null is not allowed: int"),
        ("timeseries", ("model", "patches"), "model.patches: null is not allowed: Patches"),
        (
            "timeseries",
            ("model", "patches", "stride"),
            "model.patches.stride: null is not allowed: int",
        ),
        (
            "timeseries",
            ("model", "aim", "init_args", "horizon"),
            "model.aim.horizon: null is not allowed: int",
        ),
        ("vlm", ("model", "template"), "model.template: null is not allowed: str"),
        (
            "vision",
            ("data", "init_args", "augmentation"),
            "data.augmentation: null is not allowed: none, flip, random_resized_crop",
        ),
        (
            "speech",
            ("data", "init_args", "batch_size"),
            "data.batch_size: null is not allowed: int",
        ),
        ("speech", ("data", "class_path"), "class_path: null is not allowed: a class"),
        (
            "vision",
            ("model", "adapter", "init_args"),
            "model.adapter: init_args of LoRA: null is not allowed: its settings, or leave it out",
        ),
    ],
)
def test_a_null_is_refused_by_its_key(domain: str, place: tuple[str, ...], line: str) -> None:
    case = CASES[domain]
    assert outcome(case, with_value(case, place, None), build=False) == line


def test_a_null_stays_where_one_is_meant() -> None:
    case = CASES["timeseries"]
    place = ("model", "adapter", "init_args", "alpha")
    assert outcome(case, with_value(case, place, None), build=False) == "works"


def _all_below(cls: Any) -> Iterator[Any]:
    yield cls
    for below in cls.__subclasses__():
        yield from _all_below(below)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_type_of_every_setting_is_known(case: Case) -> None:
    domain = case.domain()
    bases: list[Any] = [domain.task, domain.data, Recipe, *domain.subclasses]
    refused = []
    for cls in (cls for base in bases for cls in _all_below(base)):
        for name in inspect.signature(cls).parameters:
            try:
                refuse_nulls({name: None}, cls, cls.__name__)
            except AdaptError as error:
                refused.append(str(error))
    assert "LoRA.rank: null is not allowed: int" in refused
    assert not any("ForwardRef" in line or "'" in line for line in refused)
