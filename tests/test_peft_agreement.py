"""Our sets and PEFT's models of the same folder give the same outputs, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyadapt.core import AdaLoRA, DoRA, LoRA, Recipe, attach, export_peft, import_peft
from polyadapt.core.peft.config import TENSORS
from polyadapt.tests.law_table import stir
from polyadapt.tests.peft_cases import (
    CASES,
    EXACT,
    METHODS,
    apart,
    loaded,
    outputs,
    peft_model,
    saved,
    tensors,
    wrapped,
)

pytestmark = pytest.mark.slow  # whole runs


# whisper's own layer norm computes in fp32, whatever its weights are
DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in EXACT
    if (name, dtype) != ("openai Whisper", torch.float64)
]
by_case = pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
by_method = pytest.mark.parametrize("method", METHODS)


@by_case
@by_method
def test_an_imported_set_gives_pefts_outputs(
    name: str, dtype: torch.dtype, method: str, tmp_path: Path
) -> None:
    case = CASES[name]
    target = case.adalora if method == "AdaLoRA" else case.target
    made = peft_model(case.model(dtype), target, method, **case.settings)
    expected = outputs(case.real, made.get_base_model())
    saved(made, tmp_path)
    model = case.model(dtype)
    plain = outputs(case.real, model)
    ours = import_peft(model, tmp_path)
    assert apart(plain, expected) > 0.01
    assert apart(outputs(case.real, model), expected) <= EXACT[dtype]
    assert {site.path for site in ours.sites} == wrapped(made)
    export_peft(ours, tmp_path / "again")
    first, second = tensors(tmp_path), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    for key, tensor in second.items():
        assert torch.equal(tensor, first[key]), key
    ours.detach()
    assert torch.equal(outputs(case.real, model), plain)


RECIPES: dict[str, Recipe] = {
    "LoRA": LoRA(rank=3, alpha=7),
    "rsLoRA": LoRA(rank=3, alpha=2.5, scaling="rank_stabilised"),
    "DoRA": DoRA(rank=3, alpha=6),
    "AdaLoRA": AdaLoRA(rank=2, initial_rank=3, alpha=5),
}


@by_case
@by_method
def test_an_exported_set_gives_our_outputs_in_peft_and_comes_back_bit_for_bit(
    name: str, dtype: torch.dtype, method: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = case.model(dtype)
    target = case.adalora if method == "AdaLoRA" else case.target
    ours = stir(attach(model, RECIPES[method], [f"**.{end}" for end in target])).to(dtype)
    expected = outputs(case.real, model)
    folder = tmp_path / "set"
    export_peft(ours, folder)
    made = loaded(case.model(dtype), folder)
    assert wrapped(made) == {site.path for site in ours.sites}
    assert apart(outputs(case.real, made.get_base_model()), expected) <= EXACT[dtype]
    again = import_peft(case.model(dtype), folder)
    before, after = ours.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert {key for key in before if key.rsplit("/")[-1] in "ABEm"} == set(after)
    export_peft(again, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
