"""`multi_lora`: many sets in one batch, its gradients, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels import multi_lora as module
from polyadapt.core.kernels.multi_lora import Sets, gathered, gathers, looped, multi_lora
from polyadapt.core.kernels.segments import LARGE, SMALL, segments
from polyadapt.tests.served_cases import Served, served_case, whole_served_case

BF16 = torch.bfloat16
RANKS = [1, 4, 8, 16, 64]


def one_by_one(case: Served) -> Tensor:
    """Every id through its own factors alone."""
    rows = []
    for x, y, k in zip(case.x, case.y, case.ids.tolist(), strict=True):
        delta = 0 if k < 0 else case.scales[k] * (x @ case.downs[k].mT @ case.ups[k].mT)
        rows.append(y + delta)
    return torch.stack(rows)


# Cards' checks (s-lora.md), in their order


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_mixed_batch_is_a_loop_over_its_requests(
    tokens: int, dtype: torch.dtype, within: float
) -> None:
    case = served_case(RANKS, tokens=tokens, dtype=dtype)
    wanted = one_by_one(case)
    assert {*case.ids.tolist()} == {-1, 0, 1, 2, 3, 4}
    torch.testing.assert_close(case.run(), wanted, rtol=within, atol=within * 10)
    for way in (gathered, looped):
        owner = torch.where(case.ids < 0, len(RANKS), case.ids)
        found = way(case.x, case.y, case.sets, owner)
        torch.testing.assert_close(found, wanted, rtol=within, atol=within * 10)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_rows_of_no_set_and_of_a_rank_of_0_keep_their_bits(dtype: torch.dtype) -> None:
    case = served_case([2, 0], tokens=3, dtype=dtype)
    case.y[case.ids != 0] = torch.tensor([-0.0, math.nan, math.inf, 1e-40] * 3, dtype=dtype)
    found = case.run()
    untouched = case.ids != 0
    assert torch.equal(found[untouched].view(torch.uint8), case.y[untouched].view(torch.uint8))
    assert not torch.equal(found[~untouched], case.y[~untouched])


def test_a_batch_of_one_id_is_the_merged_layer() -> None:
    case = served_case([2, 8], tokens=5)
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(3))
    y, ids = case.x @ weight.mT, torch.ones_like(case.ids)
    merged = weight + case.scales[1] * case.ups[1] @ case.downs[1]
    found = multi_lora(case.x, y, case.sets, ids)
    torch.testing.assert_close(found, case.x @ merged.mT, rtol=1e-5, atol=1e-4)


def test_ranks_filled_up_with_zeros_change_nothing() -> None:
    case = whole_served_case([4, 3], tokens=2)
    filled = Sets.of(
        [torch.cat([a, a.new_zeros(16 - len(a), 10)]) for a in case.downs],
        [torch.cat([b, b.new_zeros(12, 16 - b.shape[1])], dim=1) for b in case.ups],
        case.scales,
    )
    assert torch.equal(multi_lora(case.x, case.y, filled, case.ids), case.run())


def test_each_set_has_its_own_scale() -> None:
    sets = Sets.of([torch.ones(1, 1)] * 3, [torch.ones(1, 1)] * 3, scales=[1.0, 0.5, 3.0])
    y = multi_lora(torch.full((4, 1), 2.0), torch.ones(4, 1), sets, torch.tensor([2, 0, -1, 1]))
    assert y.flatten().tolist() == [7.0, 3.0, 1.0, 2.0]


def test_a_scale_is_not_rounded_to_the_dtype_of_the_factors() -> None:
    scale = 1 + 2**-10  # bf16 has no number between 1 and 1 + 2^-7
    sets = Sets.of([torch.ones(1, 1, dtype=BF16)], [torch.ones(1, 1, dtype=BF16)], [scale])
    x, y = torch.ones(1, 1, dtype=BF16), -torch.ones(1, 1, dtype=BF16)
    assert multi_lora(x, y, sets, torch.zeros(1, dtype=torch.long)).item() == 2**-10


@pytest.mark.parametrize("way", [gathered, looped])
def test_a_permuted_batch_is_permuted_exactly(way: Callable[..., Tensor]) -> None:
    case = whole_served_case(RANKS, tokens=3)  # whole numbers: no sum is rounded
    order = torch.randperm(len(case.ids), generator=torch.Generator().manual_seed(0))
    owner = torch.where(case.ids < 0, len(RANKS), case.ids)
    found = way(case.x[order], case.y[order], case.sets, owner[order])
    assert torch.equal(found, way(case.x, case.y, case.sets, owner)[order])


def test_a_mixture_of_two_is_one_set_of_their_ranks() -> None:
    case = served_case([2, 3], tokens=4)
    shares = (0.3, 0.7)
    down = torch.cat([*case.downs])
    up = torch.cat([p * s * b for p, s, b in zip(shares, case.scales, case.ups, strict=True)], 1)
    ids = torch.zeros_like(case.ids)
    found = multi_lora(case.x, case.y, Sets.of([down], [up], [1.0]), ids)
    deltas = [multi_lora(case.x, case.y, case.sets, ids + k) - case.y for k in range(2)]
    wanted = case.y + 0.3 * deltas[0] + 0.7 * deltas[1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


# What else holds


def test_autocast_changes_nothing() -> None:
    case = served_case([2, 5], tokens=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(), served_case([2, 5], tokens=4).run())
    torch.testing.assert_close(case.run(), one_by_one(case), rtol=1e-5, atol=1e-5)


def test_ids_may_be_of_tokens() -> None:
    case = served_case([2, 5], tokens=4)
    ids = torch.tensor([0, 1, -1, 1]).repeat(len(case.ids), 1)
    found = multi_lora(case.x, case.y, case.sets, ids)
    for t, k in enumerate([0, 1, -1, 1]):
        alone = multi_lora(case.x[:, t], case.y[:, t], case.sets, torch.full_like(case.ids, k))
        torch.testing.assert_close(found[:, t], alone, rtol=1e-5, atol=1e-5)


def test_what_a_shorter_rank_leaves_empty_is_never_read() -> None:
    case = served_case([1, 3], tokens=2)
    case.downs[1][:], case.ups[1][:] = math.inf, math.nan
    case = case.again()
    assert case.run()[case.ids == 0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_an_empty_batch_has_an_empty_result(shape: tuple[int, int]) -> None:
    case = served_case([2], tokens=1)
    x, y = torch.ones(*shape, 10), torch.ones(*shape, 12).requires_grad_()
    found = multi_lora(x, y, case.sets, torch.zeros(shape[0], dtype=torch.long))
    assert found.shape == (*shape, 12)
    found.sum().backward()


def test_the_gradients_are_those_of_the_formula() -> None:
    case = served_case([1, 3], tokens=2, dtype=torch.float64)
    x, y = case.x[:4].requires_grad_(), case.y[:4].requires_grad_()
    ids = torch.tensor([1, -1, 0, 1])

    def at(x: Tensor, y: Tensor) -> Tensor:
        return multi_lora(x, y, case.sets, ids)

    assert torch.autograd.gradcheck(at, (x, y))
    assert torch.autograd.gradgradcheck(at, (x, y))
    assert torch.autograd.gradcheck(lambda x: at(x, y.detach()), (x,))
    strided = x.detach().mT.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: at(s.mT, y), (strided,))


def test_the_way_is_the_one_that_moves_fewer_numbers() -> None:
    def taken(ids: int, tokens: int, rank: int, present: int) -> bool:
        return gathers(torch.empty(ids, tokens, 768), torch.empty(ids, tokens, 768), rank, present)

    assert taken(ids=8, tokens=197, rank=8, present=8)  # images
    assert taken(ids=4, tokens=1, rank=8, present=4)  # a few tokens to come, all different
    assert not taken(ids=512, tokens=1, rank=8, present=4)  # many tokens, a few sets


def test_tiles_cover_every_row_once_and_hold_one_set_each() -> None:
    made = torch.Generator().manual_seed(0)
    for ids, tokens, sets in ((40, 1, 3), (5, 33, 9), (300, 2, 2), (1, 1, 1000)):
        numbers = torch.randint(-1, sets, (ids,), generator=made)
        cut = segments(numbers, sets, tokens)
        rows: list[int] = []
        for own, first, end in cut.tiles.tolist():
            places = range(first, min(first + cut.rows, end))
            owners = {int(numbers[cut.order[p // tokens]]) for p in places}
            assert owners <= {own if own < sets else -1}
            rows += [int(cut.order[p // tokens]) * tokens + p % tokens for p in places]
        assert sorted(rows) == list(range(ids * tokens))
        assert len(cut.tiles) <= ids * tokens // cut.rows + min(sets + 1, ids)


def test_tiles_are_large_where_sets_have_that_many_rows() -> None:
    assert segments(torch.zeros(8, dtype=torch.long), 1000, tokens=197).rows == LARGE
    assert segments(torch.zeros(8, dtype=torch.long), 1000).rows == SMALL
    assert segments(torch.zeros(512, dtype=torch.long), 8).rows == LARGE


# Wrong input

BAD: list[tuple[str, Callable[[Served], Any], str]] = [
    ("x", lambda c: {"x": c.x[..., :9]}, "x is [9, 2, 9], not [9, 2, 10]"),
    ("y", lambda c: {"y": c.y[..., :1]}, "y is [9, 2, 1], not [9, 2, 12]"),
    ("dtypes", lambda c: {"y": c.y.to(BF16)}, "y is torch.bfloat16 and x torch.float32"),
    ("device", lambda c: {"y": c.y.to("meta")}, "y is on meta and x on cpu"),
    ("integers", lambda c: {"x": c.x.long()}, "x is torch.int64"),
    ("int32", lambda c: {"ids": c.ids.int()}, "ids are torch.int32 [9] on cpu, not int64"),
    ("a number", lambda c: {"ids": c.ids[0]}, "ids are torch.int64 [] on cpu, not int64"),
    ("few ids", lambda c: {"ids": c.ids[:3]}, "ids is [3], not [9]"),
    ("no such set", lambda c: {"ids": c.ids + 1}, "ids go from 0 to 2; there are sets 0 to 1"),
    ("below -1", lambda c: {"ids": c.ids - 1}, "ids go from -2 to 0; there are sets 0 to 1"),
]


@pytest.mark.parametrize(("change", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_does_not_fit_is_named(change: Callable[[Served], Any], says: str) -> None:
    case = served_case([1, 2], tokens=2)
    arguments = {"x": case.x, "y": case.y, "sets": case.sets, "ids": case.ids}
    with pytest.raises(AdaptError) as refused:
        multi_lora(**arguments | change(case))
    assert str(refused.value).startswith(f"multi_lora: {says}")


@pytest.mark.parametrize(
    ("downs", "ups", "scales", "says"),
    [
        ([], [], [], "0 downs, 0 ups and 0 scales: one of each per set"),
        ([(1, 4)], [(5, 1)], [1.0, 1.0], "1 downs, 1 ups and 2 scales"),
        ([(1, 4), (1, 3)], [(5, 1)] * 2, [1.0] * 2, "downs[1] is [1, 3], not [1, 4]"),
        ([(1, 4), (2, 4)], [(5, 1)] * 2, [1.0] * 2, "ups[1] is [5, 1], not [5, 2]"),
        ([(4,)], [(5, 1)], [1.0], "downs[0] is torch.float32 [4], not a matrix"),
        ([(1, 4)], [(5, 1)], [math.nan], "scales[0] is nan, not a finite number"),
    ],
    ids=["none", "scales", "d_in", "rank", "vector", "nan"],
)
def test_factors_that_do_not_go_together_are_named(
    downs: list[Any], ups: list[Any], scales: list[float], says: str
) -> None:
    with pytest.raises(AdaptError) as refused:
        Sets.of([torch.ones(s) for s in downs], [torch.ones(s) for s in ups], scales)
    assert str(refused.value).startswith(f"multi_lora: {says}")


def test_factors_that_train_are_refused_unless_grad_is_off() -> None:
    case = served_case([2], tokens=2)
    case.downs[0].requires_grad_()
    case = case.again()
    with pytest.raises(AdaptError, match=r"multi_lora: the sets' factors require grad.*x and y"):
        case.run()
    with torch.no_grad():
        case.run()


# As an op of torch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its copies
@pytest.mark.parametrize("with_y", [True, False])
def test_torch_accepts_the_registration(with_y: bool) -> None:
    case = served_case([1, 3], tokens=2)
    made = segments(case.ids, 2, 2)
    sets, y = case.sets, case.y.requires_grad_() if with_y else None
    factors = (sets.down, sets.up, sets.starts, sets.ranks, sets.scales, sets.rank)
    for tables in ((None, None, 0), (made.order, made.tiles, made.rows)):
        arguments = (case.x.requires_grad_(), y, *factors, case.ids, *tables)
        torch.library.opcheck(torch.ops.polyadapt.multi_lora.default, arguments)


@pytest.mark.slow
def test_a_compiled_graph_holds_the_op_and_its_backward() -> None:
    case = served_case([1, 3], tokens=2)
    inputs = [case.x.requires_grad_(), case.y.requires_grad_()]
    plain = case.run()
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    compiled = torch.compile(multi_lora, fullgraph=True, backend="aot_eager")
    found = compiled(case.x, case.y, case.sets, case.ids)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), wanted)


def test_the_kernels_are_launched_with_the_tables_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from polyadapt.core.kernels import multi_lora_triton

    launched: list[tuple[Any, ...]] = []

    def forward(x: Tensor, y: Tensor | None, sets: Sets, made: Any) -> Tensor:
        launched.append((y is None, made.rows, len(made.tiles)))
        y = x.new_zeros(*x.shape[:2], sets.up.shape[1]) if y is None else y
        return module.reference(x, y, sets, ids)

    def everywhere(_: Tensor) -> bool:
        return True

    case = served_case([1, 3], tokens=2)
    ids, wanted = case.ids, case.run()
    monkeypatch.setattr(multi_lora_triton, "forward", forward)
    monkeypatch.setattr(module, "runs_kernel", everywhere)
    x = case.x.requires_grad_()
    kept = segments(ids, 2, 2)
    torch.testing.assert_close(multi_lora(x, case.y, case.sets, ids, kept), wanted)
    multi_lora(x, case.y, case.sets, ids).sum().backward()
    assert launched == [(False, SMALL, 4), (False, SMALL, 4), (True, SMALL, 4)]
