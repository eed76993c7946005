"""No configuration calls what it names, at any depth, in any domain."""

from __future__ import annotations

import json
from collections.abc import Callable as Function
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from polyadapt.core.complaints import in_one_line
from polyadapt.core.errors import AdaptError
from polyadapt.tests.domain_cases import CASES, Case, outcome, with_value

pytestmark = pytest.mark.in_an_empty_folder

CALL: dict[str, Any] = {"class_path": "os.mkdir", "init_args": {"path": "trace"}}
SAID = "class_path 'os.mkdir' is not allowed here: numbers, words, lists and keys with values are"
NO_FUNCTION = SAID.replace("class_path", "the function")
FORMS: dict[str, Any] = {
    "alone": CALL,
    "of a key": {"a": CALL},
    "in a list": {"a": [1, CALL]},
    "deep": {"a": {"b": [{"c": {"d": CALL}}]}},
    "text of a key": {"a": yaml.safe_dump(CALL)},
    "text of a list": {"a": json.dumps([CALL])},
    "text": json.dumps({"a": CALL}),
    "with another key": {"a": {**CALL, "b": 1}},
    "in a class": {"a": {"class_path": "collections.OrderedDict", "init_args": {"a": CALL}}},
}


def _dotted(case: Case) -> str:
    return ".".join(case.options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_among_options_is_refused_before_anything_is_built(case: Case, form: str) -> None:
    line = outcome(case, with_value(case, case.options, FORMS[form]))
    told = SAID.replace("os.mkdir", "collections.OrderedDict") if form == "in a class" else SAID
    assert line == f"{_dotted(case)}: {told}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_on_the_command_line_is_refused(case: Case) -> None:
    good = yaml.safe_dump(case.configuration())
    bar = ["--trainer.callbacks=RichProgressBar"] if "callbacks" in case.options else []
    line = outcome(case, good, *bar, f"--{_dotted(case)}={json.dumps({'a': CALL})}")
    assert line.startswith(_dotted(case))
    assert line.endswith(f": {SAID}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_in_a_file_that_a_configuration_names_is_refused(case: Case) -> None:
    above = case.options[:2]
    inside: dict[str, Any] = {"class_path": "RichProgressBar", "init_args": {}}
    if above == ("model", "backbone"):
        inside = case.configuration()["model"]["backbone"]
    inside["init_args"][case.options[-1]] = {"a": CALL}
    Path("inner.yaml").write_text(yaml.safe_dump(inside))
    assert SAID in outcome(case, with_value(case, above, "inner.yaml"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("callbacks", CALL, "trainer.callbacks: 'os.mkdir' is not allowed"),
        ("logger", CALL, "trainer.logger: 'os.mkdir' is not allowed"),
        ("plugins", [CALL], "trainer.plugins: 'os.mkdir' is not allowed"),
        ("profiler", CALL, "trainer.profiler: 'os.mkdir' is not allowed"),
        (
            "strategy",
            {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": CALL}},
            f"trainer.strategy.init_args.ddp_comm_state: {SAID}",
        ),
        (
            "callbacks",
            {"class_path": "LambdaCallback", "init_args": {"on_fit_start": CALL}},
            f"trainer.callbacks.init_args.on_fit_start: {NO_FUNCTION}",
        ),
        (
            "callbacks",
            [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": "os.mkdir"}}],
            f"trainer.callbacks.init_args.on_fit_start: {NO_FUNCTION}",
        ),
    ],
    ids=["callback", "logger", "plugin", "profiler", "object", "function made", "function"],
)
def test_a_trainer_is_given_classes_of_its_own_and_no_functions(
    case: Case, key: str, value: Any, line: str
) -> None:
    assert outcome(case, with_value(case, ("trainer", key), value)).startswith(line)


@pytest.mark.parametrize(
    "callback",
    [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "a"}},
        {"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}},
        {"class_path": "ModelPruning", "init_args": {"pruning_fn": "l1_unstructured"}},
        {"class_path": "RichProgressBar", "init_args": {"console_kwargs": {"width": 80}}},
    ],
    ids=["stopping", "averaging", "pruning", "bar"],
)
def test_what_lightning_brings_works_as_before(callback: Mapping[str, Any]) -> None:
    case = CASES["timeseries"]
    text = with_value(case, ("trainer", "callbacks"), [dict(callback)])
    assert outcome(case, text, build=False) == "works"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_model_beside_an_adapter_file_is_read_and_not_made(
    case: Case, verb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    from polyadapt.core.configuration import DomainCLI

    monkeypatch.setattr(
        DomainCLI, "_refuse_another_backbone", lambda self, model, file: read.append(model)
    )
    monkeypatch.setattr(DomainCLI, "instantiate_trainer", lambda self: None)
    monkeypatch.setattr(case.domain().task, "from_file", lambda file: None)
    case.save()
    text = with_value(case, ("model", "adapter"), CALL)
    assert outcome(case, text, "--set=a.safetensors", verb=verb) == "works"
    assert read[0]["adapter"] == CALL


def test_a_value_that_holds_itself_is_one_line() -> None:
    held: dict[str, Any] = {}
    held["a"] = held
    case = CASES["vision"]
    line = outcome(case, with_value(case, case.options, held))
    assert line == "a value of the configuration holds itself"


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [trace]", "!!python/name:os.x"])
def test_python_tags_of_yaml_are_refused(text: str) -> None:
    line = outcome(CASES["vision"], f"model: {text}")
    assert "python" in line


def by_default(value: int) -> int:
    return value


class Worker:
    """A user's own class, whose author has chosen a function."""

    def __init__(self, work: Function[[int], int] = by_default, times: object = None) -> None:
        self.done = work(3), times


@pytest.mark.parametrize("settings", [{}, {"times": 4}])
def test_a_function_that_is_the_default_stays(settings: dict[str, int]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--worker", type=Worker)
    path = f"{__name__}.Worker"
    with in_one_line(parser, {}):
        said = parser.parse_object({"worker": {"class_path": path, "init_args": settings}})
        assert parser.instantiate_classes(said).worker.done == (3, settings.get("times"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"work": "os.mkdir"}, f"worker.init_args.work: {NO_FUNCTION}"),
        ({"work": CALL}, f"worker.init_args.work: {NO_FUNCTION}"),
        ({"times": CALL}, f"worker.init_args.times: {SAID}"),
    ],
    ids=["function", "made", "object"],
)
def test_a_function_or_class_of_a_configuration_is_refused(
    settings: dict[str, Any], line: str
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--worker", type=Worker)
    path = f"{__name__}.Worker"
    with pytest.raises(AdaptError) as error, in_one_line(parser, {}):
        parser.parse_object({"worker": {"class_path": path, "init_args": settings}})
    assert str(error.value) == line
