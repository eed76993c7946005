"""What merging loses in low precision, and that it says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from polyadapt.core import AdaptError, AdapterSet, FullFineTuning, LoRA, attach

INPUT = torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8)


def line_of(ask: Callable[[], object]) -> str:
    with pytest.raises(AdaptError) as refused:
        ask()
    assert str(refused.value).isprintable()
    return str(refused.value)


def small_updates(dtype: torch.dtype) -> tuple[nn.Sequential, AdapterSet]:
    """Weights of 1 in 4 rows; the update is 1 in the first row, 2^-20 in the other three."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).to(dtype)
    nn.init.ones_(model.get_parameter("0.weight"))
    made = attach(model, LoRA(rank=1), at="0")
    made.adapters["0"].get_parameter("A").data.fill_(1.0)
    made.adapters["0"].get_parameter("B").data = torch.tensor([[1.0], [2**-20], [2**-20], [2**-20]])
    return model, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_in_low_precision_says_how_much_it_loses(dtype: torch.dtype) -> None:
    model, made = small_updates(dtype)
    with pytest.warns(UserWarning, match="left 75 % of the entries unchanged") as caught:
        made.merge()
    assert [w.filename for w in caught] == [__file__]
    assert model.state_dict()["0.weight"][:, 0].tolist() == [2.0, 1.0, 1.0, 1.0]


def test_a_merge_in_full_precision_loses_nothing_and_says_nothing() -> None:
    model, made = small_updates(torch.float32)
    made.merge()
    assert bool((model.state_dict()["0.weight"] > 1).all())


def test_a_large_update_loses_nothing_in_low_precision() -> None:
    model, made = small_updates(torch.bfloat16)
    made.adapters["0"].get_parameter("B").data.fill_(1.0)
    made.merge()
    assert bool((model.state_dict()["0.weight"] == 2).all())


def test_entries_that_no_adapter_is_for_do_not_count_as_lost() -> None:
    model = nn.Sequential(nn.ModuleDict({"qkv": nn.Linear(8, 24, bias=False).bfloat16()}))
    nn.init.ones_(model.get_parameter("0.qkv.weight"))
    made = attach(model, FullFineTuning(), at="qkv[k]")
    made.adapters["0.qkv[k]"].get_parameter("value").data.fill_(2.0)
    made.merge()  # without a warning, although two thirds of the tensor stayed
    rows = model.state_dict()["0.qkv.weight"][:, 0].tolist()
    assert rows == [1.0] * 8 + [2.0] * 8 + [1.0] * 8


def test_a_merge_that_is_stopped_by_its_warning_has_changed_nothing() -> None:
    import warnings

    model, made = small_updates(torch.bfloat16)
    before = model(torch.ones(1, 8).bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="75 %"):
            made.merge()
    assert line_of(made.unmerge) == "set 'default' is not merged"
    assert torch.equal(model(torch.ones(1, 8).bfloat16()), before)
