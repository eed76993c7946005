"""The arithmetic that the fidelity table emulates, on numbers that a hand can check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.benchmarks.kernel_fidelity import FORMULAS, Score, changes, norms
from polyadapt.benchmarks.kernel_fidelity_network import Rounding

STEP = 2**-10  # bf16 has no number between 1 and 1 + 2^-7


def change(name: str, gain: float, y: float, lora: float, bias: float = 0.0) -> float:
    """The change of one number, by one of the formulas."""
    (formula,) = (one for one in FORMULAS if one.name == name)
    narrow = [torch.tensor([[number]], dtype=torch.bfloat16) for number in (y, bias, lora)]
    m, n = torch.tensor([gain], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return formula.delta(narrow[0], narrow[1][0], narrow[2], m, n, 0.5).item()


def test_a_gain_between_two_bf16_numbers_is_lost_by_those_that_round_it() -> None:
    lost = {"PEFT, bf16 factors", "published", "published, exact n"}
    for formula in FORMULAS:
        assert change(formula.name, 1 + STEP, 1.0, 0.0) == (0.0 if formula.name in lost else STEP)


@pytest.mark.parametrize("formula", [formula.name for formula in FORMULAS])
def test_all_agree_where_nothing_has_to_be_rounded(formula: str) -> None:
    assert change(formula, 1.5, 3.0, 4.0, bias=1.0) == 0.5 * 2 + 1.5 * 0.5 * 4


def test_the_score_of_half_the_truth_is_half() -> None:
    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert Score.of(true / 2, true) == Score(0.5, 0.5)
    assert Score.of(torch.tensor([3.0, 0.0]), true) == Score(0.8, 9 / 25)


def test_ours_is_truer_than_every_formula_that_rounds_the_gain() -> None:
    found = {name: itself.error for name, (itself, _) in changes(0.0015).items()}
    assert found["ours"] < 0.01 < 0.1 < found["published, exact n"] < found["published"]
    assert found["PEFT, bf16 factors"] > 0.1


def test_the_factored_norm_fails_beside_minus_the_weight_and_its_bound_tells() -> None:
    near, far = norms(1e-2), norms(100)
    assert near["factored"] > 1e-4 > 1e-5 > max(near["exact"], near["with its bound"])
    assert near["believed"] == 0
    assert far["believed"] == 1
    assert far["factored"] < 1e-5


def test_emulated_bf16_rounds_the_result_of_each_operation_and_not_within() -> None:
    one, small = torch.ones(2, 2), torch.full((2, 2), STEP)
    with Rounding() as rounding:
        assert torch.equal(one + small, one)
        inside: Tensor = one @ small + 0  # 2 * 2^-10 is held by fp32 and by bf16
        with rounding.off():
            assert (one + small)[0, 0].item() == 1 + STEP
    assert inside[0, 0].item() == 2 * STEP
