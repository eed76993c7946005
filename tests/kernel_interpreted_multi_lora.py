"""Run by `test_kernels_processes.py` with TRITON_INTERPRET=1: `multi_lora` on a CPU."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core.kernels import multi_lora, multi_lora_triton
from polyadapt.core.kernels.multi_lora import Sets
from polyadapt.core.kernels.segments import segments
from polyadapt.tests.kernel_cases import (
    ONE_ULP,
    UNTOUCHED,
    assert_close,
    guarded,
    guards_are_whole,
    mutant,
)
from polyadapt.tests.served_cases import Served, served_case, whole_served_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 4, 0, 20]  # one, less than a tile, none, more than a tile of 16


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


def guarding(patch: Any, kernels: ModuleType) -> list[Tensor]:
    """Let the kernels' buffers be guarded, and NaN before they are written; the list of them."""
    made: list[Tensor] = []

    def empty(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        made.append(guarded(torch.full(shape, torch.nan, dtype=dtype), UNTOUCHED))
        return made[-1]

    patch(kernels, "empty", empty)
    return made


def run(case: Served, with_y: bool = True, kernels: ModuleType = multi_lora_triton) -> Tensor:
    """Both kernels, their operands between NaN."""
    s = case.sets
    scales = guarded(s.scales)
    sets = Sets(guarded(s.down), guarded(s.up), s.starts, s.ranks, scales, s.rank)
    made = segments(case.ids, len(sets), case.x.shape[1])
    y = guarded(case.y) if with_y else None
    found: Tensor = kernels.forward(guarded(case.x), y, sets, made)
    return found


def check(case: Served, with_y: bool = True, kernels: ModuleType = multi_lora_triton) -> None:
    """They are the reference."""
    y = case.y if with_y else torch.zeros_like(case.y)
    wanted = multi_lora.reference(case.x, y, case.sets, case.ids)
    assert_close(run(case, with_y, kernels), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "sizes"), [(1, (65, 70)), (7, (3, 1)), (30, (40, 20))], ids=str)
def test_the_kernels_are_the_reference_and_stay_inside_their_buffers(
    tokens: int, sizes: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guarding(monkeypatch.setattr, multi_lora_triton)
    case = served_case(RANKS, tokens, dtype, sizes=sizes)
    check(case)
    check(case, with_y=False)  # as the backward calls them
    assert len(made) == 4  # v and the output of each
    assert all(guards_are_whole(t) for t in made)
    assert made[1].isfinite().all()


@pytest.mark.parametrize("d_out", [384, 1000, 1])
def test_a_tile_of_256_outputs_is_masked(d_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_lora_triton, "COLUMNS", 256)
    made = guarding(monkeypatch.setattr, multi_lora_triton)
    check(served_case([1, 5], 1, sizes=(8, d_out)))
    assert all(guards_are_whole(t) for t in made)


def test_large_tiles_are_the_reference() -> None:
    case = served_case([2, 70], 70, sizes=(6, 5))  # more ranks than a step, more rows than a tile
    assert segments(case.ids, 2, 70).rows == 64
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_set_and_of_a_rank_of_0_keep_their_bits(dtype: torch.dtype) -> None:
    case = served_case([2, 0], tokens=3, dtype=dtype)
    untouched = case.ids != 0
    case.y[untouched] = torch.tensor([-0.0, math.nan, math.inf, 1e-40] * 3, dtype=dtype)
    found = run(case)
    assert torch.equal(found[untouched].view(torch.uint8), case.y[untouched].view(torch.uint8))


def test_ranks_filled_up_with_zeros_have_the_same_bits() -> None:
    case = served_case([4, 3], tokens=2)
    filled = Sets.of(
        [torch.cat([a, a.new_zeros(16 - len(a), 10)]) for a in case.downs],
        [torch.cat([b, b.new_zeros(12, 16 - b.shape[1])], dim=1) for b in case.ups],
        case.scales,
    )
    assert torch.equal(run(replace(case, sets=filled)), run(case))


def test_a_permuted_batch_is_permuted_exactly() -> None:
    case = whole_served_case(RANKS, tokens=3)
    order = torch.randperm(len(case.ids), generator=torch.Generator().manual_seed(0))
    mixed = replace(case, x=case.x[order], y=case.y[order], ids=case.ids[order])
    assert torch.equal(run(mixed), run(case)[order])


def test_factors_may_be_finer_than_what_they_act_on() -> None:
    case = served_case([1, 4], 2)
    half = replace(case, x=case.x.bfloat16(), y=case.y.bfloat16())
    check(half)
    exact = multi_lora.reference(half.x.double(), half.y.double(), case.sets, case.ids)
    bound = ONE_ULP[torch.bfloat16]
    torch.testing.assert_close(run(half).double(), exact, rtol=bound, atol=1e-5)


def test_scales_are_of_sets_and_in_fp32() -> None:
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    sets = Sets.of([ones] * 2, [ones] * 2, [1 + 2**-10, 3.0])
    ids, x = torch.tensor([1, 0]), torch.ones(2, 1, 1, dtype=torch.bfloat16)
    found = run(Served(x, -x, [ones] * 2, [ones] * 2, [1.0, 3.0], ids, sets))
    assert found.flatten().tolist() == [2.0, 2**-10]


OWN = "rank, start = tl.load(ranks_ptr + owner), tl.load(starts_ptr + owner)"
WRONG = {
    "scale": ("tl.load(scales_ptr + owner) * delta", "delta"),
    "scale of the next": ("tl.load(scales_ptr + owner)", "tl.load(scales_ptr + owner + 1)"),
    "order": ("tl.load(order_ptr + place // tokens, mask=here, other=0)", "(place // tokens)"),
    "start": (OWN, "rank, start = tl.load(ranks_ptr + owner), 0"),
    "rank": (OWN, "rank, start = largest, tl.load(starts_ptr + owner)"),
    "a rank too much": ("held = r < rank", "held = r < rank + 1"),
    "y": ("changed = y.to(tl.float32) +", "changed ="),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG)
def test_wrong_kernels_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant("multi_lora_triton", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(served_case([1, 4, 2], 2), kernels=wrong)


def test_kernels_that_leave_their_buffers_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = served_case([1, 4, 2], 2)
    wrong = mutant("multi_lora_triton", "column < width", "column < width + 1", tmp_path)
    made = guarding(monkeypatch.setattr, wrong)
    assert run(case, kernels=wrong).isnan().any()  # what they read
    assert not guards_are_whole(made[1])  # where they wrote
