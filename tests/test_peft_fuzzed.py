"""A PEFT folder changed at random is read to PEFT's very outputs, or refused in one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from polyadapt.core import AdaptError, import_peft, sets_of
from polyadapt.core.peft.config import (
    CONFIG,
    NO_EFFECT,
    OF_METHOD,
    REFUSED,
    TENSORS,
    UNDERSTOOD,
    is_neutral,
)
from polyadapt.tests.peft_cases import (
    METHODS,
    apart,
    nested,
    peft_model,
    quiet,
    saved,
    states,
    tensors,
)

pytestmark = pytest.mark.slow

FIELDS = sorted(NO_EFFECT | UNDERSTOOD | REFUSED | OF_METHOD["LORA"] | OF_METHOD["ADALORA"])
# What a config may be changed to: all JSON, and values that come close to the right ones.
NAMES = st.sampled_from(
    ["fc", "proj", "patch", "patch.proj", "^fc", ".*", "f.", "(f|p).*", "f(", ""]
)
NUMBERS = st.integers(-2, 9) | st.floats() | st.sampled_from([10**400, True, False, None])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=3)
fuzzed = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=METHODS)
def good(request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """A good folder of each method."""
    with tempfile.TemporaryDirectory() as parent:
        made = peft_model(nested(), ["fc", "patch.proj"], request.param)
        yield saved(made, Path(parent) / "peft"), request.param


def imported(config: bytes, content: bytes) -> nn.Module | None:
    """The model with the set, or None when the folder was refused and the model left alone."""
    model = nested()
    message = ""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        (folder / CONFIG).write_bytes(config)
        (folder / TENSORS).write_bytes(content)
        try:
            import_peft(model, folder)
        except AdaptError as error:
            message = str(error)
    assert message.isprintable()
    assert bool(message) != bool(sets_of(model))
    return None if message else model


def in_peft(config: dict[str, Any], content: bytes) -> Tensor:
    """What PEFT makes of it; its own defaults stand for what is none, false or empty.

    It stumbles over a wrong type in fields that have no effect, where we do not look.
    """
    config = {k: v for k, v in config.items() if not is_neutral(v)}
    try:
        return _in_peft(config, content)
    except (TypeError, ValueError, AttributeError, KeyError):
        return _in_peft({k: v for k, v in config.items() if k not in NO_EFFECT}, content)


def _in_peft(config: dict[str, Any], content: bytes) -> Tensor:
    import peft

    with tempfile.TemporaryDirectory() as parent, quiet():
        folder = Path(parent)
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / TENSORS).write_bytes(content)
        made = peft.PeftModel.from_pretrained(nested(), str(folder)).eval()
        out: Tensor = made(states())
    return out


@fuzzed
@given(changes=CHANGES)
def test_a_changed_config_is_read_as_peft_reads_it_or_refused(
    good: tuple[Path, str], changes: dict[str, Any]
) -> None:
    folder, _ = good
    config = json.loads((folder / CONFIG).read_text()) | changes
    content = (folder / TENSORS).read_bytes()
    model = imported(json.dumps(config).encode(), content)
    if model is not None:
        assert apart(model(states()), in_peft(config, content)) <= 1e-5


@fuzzed
@given(data=st.data())
def test_changed_tensors_are_read_as_peft_reads_them_or_refused(
    good: tuple[Path, str], data: st.DataObject
) -> None:
    folder, _ = good
    found = tensors(folder)
    for _ in range(data.draw(st.integers(1, 3))):
        data.draw(st.sampled_from(_DAMAGES))(found, data)
    config, content = json.loads((folder / CONFIG).read_text()), save(found)
    model = imported(json.dumps(config).encode(), content)
    if model is not None:
        assert apart(model(states()), in_peft(config, content)) <= 1e-5


@fuzzed
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(good: tuple[Path, str], data: st.DataObject) -> None:
    folder, _ = good
    files = {name: bytearray((folder / name).read_bytes()) for name in (CONFIG, TENSORS)}
    content = files[data.draw(st.sampled_from([CONFIG, TENSORS]))]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[place : place + data.draw(st.integers(1, 40))]
        if not content:
            break
    model = imported(bytes(files[CONFIG]), bytes(files[TENSORS]))
    if model is not None:
        out = in_peft(json.loads(files[CONFIG]), bytes(files[TENSORS]))
        assert torch.allclose(model(states()), out, rtol=1e-4, equal_nan=True)


Damage = Callable[[dict[str, Tensor], st.DataObject], object]


def _some(found: dict[str, Tensor], data: st.DataObject) -> str:
    return data.draw(st.sampled_from(sorted(found) or [""]))


def _drop(found: dict[str, Tensor], data: st.DataObject) -> None:
    found.pop(_some(found, data), None)


def _rename(found: dict[str, Tensor], data: st.DataObject) -> None:
    old = _some(found, data)
    place = data.draw(st.integers(0, len(old)))
    piece = data.draw(st.sampled_from(["x", ".", "fc", ".default", ".lora_A", "\n", "proj."]))
    if old in found:
        found[old[:place] + piece + old[place:]] = found.pop(old)


def _swap(found: dict[str, Tensor], data: st.DataObject) -> None:
    one, other = _some(found, data), _some(found, data)
    if one in found and other in found:
        found[one], found[other] = found[other].clone(), found[one].clone()


def _reshape(found: dict[str, Tensor], data: st.DataObject) -> None:
    name = _some(found, data)
    if name in found:
        new = data.draw(
            st.sampled_from(
                [
                    lambda t: t.mT if t.ndim > 1 else t,
                    lambda t: t[:1],
                    lambda t: t[None],
                    lambda t: t.flatten(),
                ]
            )
        )(found[name])
        found[name] = new.contiguous().clone()


def _number(found: dict[str, Tensor], data: st.DataObject) -> None:
    name = _some(found, data)
    if name in found and found[name].numel() and found[name].is_floating_point():
        value = data.draw(
            st.floats(-2, 2, width=16) | st.sampled_from([float("nan"), float("inf")])
        )
        found[name] = found[name].clone()
        found[name].view(-1)[0] = value


def _cast(found: dict[str, Tensor], data: st.DataObject) -> None:
    name = _some(found, data)
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
    if name in found:
        with quiet():  # a part of complex numbers is lost
            found[name] = found[name].to(data.draw(st.sampled_from(kinds)))


_DAMAGES: list[Damage] = [_drop, _rename, _swap, _reshape, _number, _cast]
