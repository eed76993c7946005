"""Vision configurations with anything wrong in them: they work or are refused in one line."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyadapt.core.complaints import errors_in_one_line
from polyadapt.core.configuration import DomainCLI
from polyadapt.core.errors import AdaptError
from polyadapt.tests.broken_files import places
from polyadapt.tests.vision_cases import configuration, save_labelled
from polyadapt.vision.configuration import DOMAIN

WRONG: list[Any] = [
    *(None, True, 0, -1, 3, 2**70, 1.5, 1e308, float("nan"), float("inf"), b"\xff"),
    *("", "x", "../..", "a\nb", "{", "[1", "null", "!!python/object:os.system", "${oc.env:HOME}"),
    *("LoRA", "Recipe", "torch.nn.Linear", "os.system", "blocks.*"),
    *([], [1], ["x"], {}, {"a": 1}, [[[]]], {1: 2}, {"class_path": 3}, {"class_path": "LoRA"}),
    {"class_path": "os.mkdir", "init_args": {"path": "trace"}},
]
KEYS = ["x", "", "a.b", "__class__", "model", "trainer", "class_path", "init_args", "at", "config"]
SIGNS = ["{", "}", "[", ":", "\t", "- ", "&a ", "*a", "!!", '"', "\x00", "%", "é", "\n", " ", "#"]


def whole() -> dict[str, Any]:
    made = copy.deepcopy(configuration())
    made["data"]["init_args"]["augmentation"] = "flip"
    made["model"].update(lr=1e-3, warmup=0.1, weight_decay=0.05, set_name="pets")
    return made


@st.composite
def values(draw: Callable[..., Any]) -> str:
    """One or two values replaced, taken away, renamed or put in."""
    made = whole()
    for _ in range(draw(st.integers(1, 2))):
        spots = list(places(made))
        if not spots:
            break
        place, key = draw(st.sampled_from(spots))
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        if how == "replace":
            place[key] = draw(st.sampled_from(WRONG))
        elif how == "remove":
            del place[key]
        elif isinstance(place, dict):
            name = draw(st.sampled_from(KEYS))
            place[name] = place.pop(key) if how == "rename" else draw(st.sampled_from(WRONG))
    text: str = yaml.safe_dump(made)
    return text


@st.composite
def texts(draw: Callable[..., Any]) -> str:
    """The text of a good configuration with a sign put in, or over some of it."""
    text: str = yaml.safe_dump(whole())
    start = draw(st.integers(0, len(text)))
    rest = text[start + draw(st.integers(0, 2)) :]
    return f"{text[:start]}{draw(st.sampled_from(SIGNS))}{rest}"


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In a folder with data, and without a network: timm would ask it for minutes."""
    real = timm.create_model

    def without_network(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no network")
        return real(name, pretrained=False, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("configs"))
        patch.setattr(timm, "create_model", without_network)
        save_labelled(12)
        yield


def outcome(text: str, build: bool = True) -> str:
    """`works`, or the one line that refuses it; nothing may be written before a run starts."""
    Path("c.yaml").write_text(text)
    before = sorted(os.listdir())
    try:
        with errors_in_one_line():
            DomainCLI(DOMAIN, "fit", ["--config", "c.yaml"], build=build)
    except AdaptError as error:
        line = str(error)
        assert line
        assert line.isprintable()
        return line
    finally:
        assert sorted(os.listdir()) == before
    return "works"


few = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_the_configuration_that_is_changed_works() -> None:
    assert outcome(yaml.safe_dump(whole())) == "works"


@pytest.mark.slow
@few
@given(values())
def test_changed_values_work_or_are_refused_in_one_line(text: str) -> None:
    outcome(text, build=False)


@pytest.mark.slow
@few
@given(texts())
def test_changed_texts_work_or_are_refused_in_one_line(text: str) -> None:
    outcome(text, build=False)


@pytest.mark.slow
@few
@given(values())
def test_what_is_built_of_changed_values_works_or_is_refused_in_one_line(text: str) -> None:
    outcome(text)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("trainer", True, "trainer: True is not allowed: settings such as max_epochs: 10"),
        ("trainer", None, "trainer: None is not allowed: settings such as max_epochs: 10"),
        ("config", {"model": 1}, "unknown key 'config': a configuration names no other one"),
    ],
)
def test_what_such_changes_have_found_is_refused_by_name(key: str, value: Any, line: str) -> None:
    assert outcome(yaml.safe_dump({**whole(), key: value}), build=False) == line


def test_options_that_timm_stumbles_over_are_refused_by_name() -> None:
    made = whole()
    made["model"]["backbone"]["init_args"]["options"]["patch_size"] = 0
    line = outcome(yaml.safe_dump(made))
    assert line.startswith("timm cannot make 'vit_tiny_patch16_224' with {")
    assert line.endswith(": integer division or modulo by zero")
