"""Configurations of every domain with anything wrong in them: they work, or one line says what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyadapt.tests.broken_files import places
from polyadapt.tests.domain_cases import CASES, Case, outcome, with_value

WRONG: list[Any] = [
    *(None, True, 0, -1, 3, 2**70, 1.5, 1e308, float("nan"), float("inf"), b"\xff"),
    *("", "x", "../..", "a\nb", "{", "[1", "null", "!!python/object:os.system", "${oc.env:HOME}"),
    *("LoRA", "Recipe", "torch.nn.Linear", "os.system", "blocks.*"),
    *([], [1], ["x"], {}, {"a": 1}, [[[]]], {1: 2}, {"class_path": 3}, {"class_path": "LoRA"}),
    {"class_path": "os.mkdir", "init_args": {"path": "trace"}},
]
KEYS = ["x", "", "a.b", "__class__", "model", "trainer", "class_path", "init_args", "at", "config"]
SIGNS = ["{", "}", "[", ":", "\t", "- ", "&a ", "*a", "!!", '"', "\x00", "%", "é", "\n", " ", "#"]
VISION = CASES["vision"]


@st.composite
def values(draw: Callable[..., Any], case: Case) -> str:
    """One or two values replaced, taken away, renamed or put in."""
    made = case.configuration()
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
def texts(draw: Callable[..., Any], case: Case) -> str:
    """The text of a good configuration with a sign put in, or over some of it."""
    text: str = yaml.safe_dump(case.configuration())
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
        for case in CASES.values():
            case.save()
        yield


few = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
every_domain = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_domain
def test_the_configuration_that_is_changed_works(case: Case) -> None:
    assert outcome(case, yaml.safe_dump(case.configuration())) == "works"


@pytest.mark.slow
@few
@every_domain
@given(st.data())
def test_changed_values_work_or_are_refused_in_one_line(case: Case, data: st.DataObject) -> None:
    outcome(case, data.draw(values(case)), build=False)


@pytest.mark.slow
@few
@every_domain
@given(st.data())
def test_changed_texts_work_or_are_refused_in_one_line(case: Case, data: st.DataObject) -> None:
    outcome(case, data.draw(texts(case)), build=False)


@pytest.mark.slow
@few
@every_domain
@given(st.data())
def test_what_is_built_of_changed_values_works_or_is_refused_in_one_line(
    case: Case, data: st.DataObject
) -> None:
    outcome(case, data.draw(values(case)))


@pytest.mark.slow
@every_domain
def test_a_null_in_any_place_works_or_is_refused_in_one_line(case: Case) -> None:
    lines = []
    for number in range(len(list(places(case.configuration())))):
        made = case.configuration()
        place, key = list(places(made))[number]
        place[key] = None
        lines.append(outcome(case, yaml.safe_dump(made)))
    assert sum("null is not allowed" in line for line in lines) >= 10


@every_domain
@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("trainer", True, "trainer: True is not allowed: settings such as max_epochs: 10"),
        ("trainer", None, "trainer: None is not allowed: settings such as max_epochs: 10"),
        ("config", {"model": 1}, "unknown key 'config': a configuration names no other one"),
    ],
)
def test_what_such_changes_have_found_is_refused_by_name(
    case: Case, key: str, value: Any, line: str
) -> None:
    assert outcome(case, with_value(case, (key,), value), build=False) == line


def test_options_that_timm_stumbles_over_are_refused_by_name() -> None:
    line = outcome(VISION, with_value(VISION, (*VISION.options, "patch_size"), 0))
    assert line.startswith("timm cannot make 'vit_tiny_patch16_224' with {")
    assert line.endswith(": integer division or modulo by zero")


@pytest.mark.parametrize(
    ("domain", "name", "value", "parameter"),
    [
        ("vision", "in_chans", 0, "patch_embed.proj.weight [96, 0, 8, 8]"),
        ("timeseries", "n_inner", 0, "model.h.0.mlp.c_fc.weight [8, 0]"),
        ("vlm", "embed_dim", 0, "visual.proj [64, 0]"),
    ],
)
def test_options_that_leave_a_parameter_empty_are_refused_by_its_name(
    domain: str, name: str, value: int, parameter: str
) -> None:
    case = CASES[domain]
    line = outcome(case, with_value(case, (*case.options, name), value))
    assert line.endswith(f" is not allowed: its parameter {parameter} is empty")


@pytest.mark.parametrize("domain", ["vision", "timeseries", "vlm"])
def test_options_that_are_null_are_refused_by_their_name(domain: str) -> None:
    case = CASES[domain]
    line = outcome(case, with_value(case, case.options, None))
    assert line == "model.backbone.options: null is not allowed: dict[str, Any]"


def test_a_setting_of_a_wrong_type_that_transformers_refuses_is_one_line() -> None:
    case = CASES["timeseries"]
    line = outcome(case, with_value(case, (*case.options, "n_head"), "x"))
    assert line.startswith("cannot load transformers' GPT2Model 'gpt2'")
    assert "n_head" in line


def test_options_that_would_let_a_file_of_weights_run_code_are_refused() -> None:
    case = CASES["vlm"]
    line = outcome(case, with_value(case, (*case.options, "weights_only"), False))
    assert line == "weights_only=False is not allowed: only files without code are read"
