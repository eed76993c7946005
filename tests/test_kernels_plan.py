"""The planner's counts: formulas, worked examples, what a call excludes, what it tells."""

from __future__ import annotations

import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels.plan import ORDERS, Plan, Shape, choose, costs, excluded, explain

QKV = {"tokens": 12608, "d_in": 768, "d_out": 2304}  # ViT-B, 64 pictures of 197 tokens
WIDE = {"tokens": 8192, "d_in": 4096, "d_out": 4096}


@pytest.mark.parametrize(
    ("sizes", "rank", "frozen", "extra"),
    [
        (QKV, 8, 89.2, [1.859, 2.014, 1.423, 1.296, 44.7]),
        (QKV, 128, 89.2, [29.7, 32.2, 22.8, 20.7, 46.0]),
        (WIDE, 384, 549.8, [154.6, 180.4, 141.7, 128.8, 313.5]),
    ],
    ids=["ViT-B-8", "ViT-B-128", "4096-384"],
)
def test_worked_examples_in_gflop(
    sizes: dict[str, int], rank: int, frozen: float, extra: list[float]
) -> None:
    shape = Shape(**sizes, rank=rank)  # type: ignore[arg-type]
    assert shape.frozen / 1e9 == pytest.approx(frozen, abs=0.05)
    for found, wanted in zip(costs(shape).values(), extra, strict=True):
        assert found / 1e9 == pytest.approx(wanted, abs=5e-4 if wanted < 2.5 else 0.05)


@pytest.mark.parametrize(("t", "i", "o", "r"), [(1, 1, 1, 1), (7, 5, 3, 2), (0, 4, 6, 2)])
def test_the_counts_are_the_formulas(t: int, i: int, o: int, r: int) -> None:
    assert costs(Shape(t, i, o, r)) == {
        "P1": 6 * t * r * (i + o),
        "P2": 2 * t * r * (4 * i + 3 * o),
        "P3": 2 * o * i * r + 2 * t * r * (3 * i + 2 * o),
        "P4": 4 * o * i * r + 4 * t * r * (i + o),
        "P5": 6 * o * i * r + 2 * t * i * o,
    }
    # Without dX, its product with A is left out, and no weight is merged for it.
    assert costs(Shape(t, i, o, r, needs_dx=False)) == {
        "P1": 2 * t * r * (2 * i + 3 * o),
        "P2": 2 * t * r * (3 * i + 3 * o),
        "P3": 2 * o * i * r + 4 * t * r * (i + o),
        "P4": 2 * o * i * r + 4 * t * r * (i + o),
        "P5": 6 * o * i * r + 2 * t * i * o,
    }
    alone = costs(Shape(t, i, o, r, needs_grad=False))
    assert {alone["P1"], alone["P2"]} == {2 * t * r * (i + o)}
    assert {alone["P3"], alone["P4"], alone["P5"]} == {2 * o * i * r}


def test_where_one_order_becomes_cheaper_than_another() -> None:
    def extra(name: str, tokens: int) -> int:
        return costs(Shape(tokens, 60, 30, 4))[name]

    # T > d_in for P3 before P1, T > d_in d_out / (d_in + d_out) before P2; twice that: P4 before P1
    for first, second, tokens in (("P3", "P1", 60), ("P3", "P2", 20), ("P4", "P1", 40)):
        assert extra(first, tokens) == extra(second, tokens)
        assert extra(first, tokens + 1) < extra(second, tokens + 1)


def test_inference_merges_for_a_large_batch_and_never_for_a_step_of_a_decoder() -> None:
    batch = Shape(**QKV, rank=8, needs_grad=False)  # type: ignore[arg-type]
    assert choose(batch).order.name == "P3"
    step = Shape(5, 768, 768, 8, needs_grad=False)  # five beams of Whisper
    assert choose(step).order.name == "P1"
    assert (costs(step)["P1"], costs(step)["P3"]) == (122_880, 9_437_184)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dropout": True}, "dropout acts on the branch alone"),
        ({"gain": True}, "the gain is no part of W0 + s B A"),
        ({"base": True}, "x W0^T is already there"),
        ({"dtype": torch.bfloat16}, "torch.bfloat16 would round small updates away"),
        ({"dtype": torch.float16}, "torch.float16 would round small updates away"),
    ],
    ids=["dropout", "gain", "base", "bf16", "fp16"],
)
def test_merged_orders_are_left_out_and_refused_by_name(
    change: dict[str, object], says: str
) -> None:
    shape = Shape(**QKV, rank=8, **change)  # type: ignore[arg-type]
    assert excluded(shape) == dict.fromkeys(("P3", "P4", "P5"), says)
    assert choose(shape).order.name == "P1"
    assert choose(shape, "P2").order.name == "P2"
    with pytest.raises(AdaptError) as refused:
        choose(shape, "P4")
    assert str(refused.value) == (f"plan P4 (merged forward and for dX): {says}; P1, P2 can run")


def test_a_plan_can_be_wanted_by_name_or_taken_from_another_call() -> None:
    one, other = Shape(2, 8, 8, 2), Shape(3, 8, 8, 2)
    assert not excluded(one)
    assert choose(other, choose(one, "P5")) == Plan(other, ORDERS["P5"])
    with pytest.raises(AdaptError, match="plan 'P6' is not known: P1, P2, P3, P4, P5"):
        choose(one, "P6")
    with pytest.raises(AdaptError, match="plan: rank=-1 is not a number from 0"):
        Shape(1, 2, 3, -1)


def test_the_explanation_is_a_table_with_what_is_kept_and_what_is_excluded() -> None:
    table = explain(choose(Shape(**QKV, rank=8, dropout=True))).splitlines()  # type: ignore[arg-type]
    assert table[0] == ("12608 tokens, 768 -> 2304, rank 8, torch.float32, with dX: 89.238 GFLOP")
    assert table[1] == (
        "> P1  two products, v kept             1.859 GFLOP more, keeps 100,864 numbers"
    )
    assert table[5].startswith("  P5  merged and kept, by dY^T x      44.704 GFLOP more, keeps")
    assert table[5].endswith("keeps 1,769,472 numbers; excluded: dropout acts on the branch alone")
    assert "> P4" in explain(choose(Shape(**QKV, rank=8)))  # type: ignore[arg-type]
    assert ", without dX: 44.619" in explain(choose(Shape(**QKV, rank=8, needs_dx=False)))  # type: ignore[arg-type]
