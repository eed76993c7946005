"""`dora_compose`: the formula, its gradients, what it refuses, and DoRA's use of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import DoRA
from polyadapt.core.adapters import dora
from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels.dora_compose import dora_compose
from polyadapt.tests.factor_cases import dora_at, stir
from polyadapt.tests.kernel_cases import compose_case

BF16 = torch.bfloat16


def leaves(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)


@pytest.mark.parametrize("whole", [False, True], ids=["delta", "whole"])
def test_the_gradients_are_those_of_the_formula(whole: bool) -> None:
    def at(b: Tensor, lora: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
        return dora_compose(b, lora, g, 0.7, bias, whole)

    case = leaves((2, 2, 3), (2, 2, 3), (3,), (3,))
    assert torch.autograd.gradcheck(at, case)
    assert torch.autograd.gradcheck(at, case[:3])
    assert torch.autograd.gradcheck(lambda b, lora: at(b, lora, case[2].detach()), case[:2])
    strided = leaves((3, 2), (3, 2))
    assert torch.autograd.gradcheck(lambda b, lora: at(b.mT, lora.mT, case[2]), strided)


def test_by_hand() -> None:
    base, lora = torch.tensor([[5.0, 1.0]]), torch.tensor([[2.0, 4.0]])
    gain, bias = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0])
    # (2 - 1) (5 - 1) + 2 * 3 * 2 = 16 and (0.5 - 1) (1 + 1) + 0.5 * 3 * 4 = 5
    assert dora_compose(base, lora, gain, 3.0, bias).tolist() == [[16.0, 5.0]]
    assert dora_compose(base, lora, gain, 3.0, bias, whole=True).tolist() == [[21.0, 6.0]]


def test_the_gradients_by_hand() -> None:
    base, lora, gain, bias = (
        torch.tensor(v, requires_grad=True) for v in ([[5.0], [1.0]], [[2.0], [4.0]], [2.0], [1.0])
    )
    dora_compose(base, lora, gain, 3.0, bias).backward(torch.tensor([[1.0], [10.0]]))
    found = [t.grad.flatten().tolist() for t in (base, lora, gain, bias) if t.grad is not None]
    # d gain: (5 - 1 + 3 * 2) + 10 (1 - 1 + 3 * 4); d bias: (1 - 2) (1 + 10)
    assert found == [[1.0, 10.0], [6.0, 60.0], [130.0], [-11.0]]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_gain_of_one_and_no_branch_change_nothing_at_all(dtype: torch.dtype) -> None:
    base, lora, gain, bias = compose_case((4, 9), dtype)
    lora, gain = torch.zeros_like(lora), torch.ones_like(gain)
    assert not dora_compose(base, lora, gain, 2.0, bias).any()
    assert torch.equal(dora_compose(base, lora, gain, 2.0, bias, whole=True), base)


def test_a_gain_of_two_and_no_branch_double_the_output_without_its_bias() -> None:
    base, lora, gain, bias = compose_case((4, 9), torch.float64)
    lora, gain = torch.zeros_like(lora), torch.full_like(gain, 2).double()
    assert torch.equal(dora_compose(base, lora, gain, 2.0, bias), base - bias)


def published(base: Tensor, lora: Tensor, gain: Tensor, scale: float) -> Tensor:
    """The published kernel: g and g - 1 in the activations' dtype, the low-rank term in fp32."""
    gain = gain.to(base.dtype)
    return ((gain - 1) * base + gain.float() * (scale * lora.float())).to(base.dtype)


def test_a_gain_of_one_plus_a_1024th_survives_bf16_and_not_in_the_published_formula() -> None:
    base, gain = torch.ones(1, 1, dtype=BF16), torch.tensor([1 + 2**-10])
    assert dora_compose(base, torch.zeros_like(base), gain, 1.0).item() == 2**-10
    assert published(base, torch.zeros_like(base), gain, 1.0).item() == 0


def test_beside_one_the_published_formula_loses_what_this_one_keeps() -> None:
    made = torch.Generator().manual_seed(0)
    base, lora = (torch.randn(64, 1000, generator=made).to(BF16) for _ in range(2))
    lora, gain = lora / 100, 1 + 0.0015 * torch.randn(1000, generator=made)  # as trained adapters
    exact = dora_compose(base.double(), lora.double(), gain.double(), 0.5)

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert error(dora_compose(base, lora, gain, 0.5)) < 0.004  # bf16 rounds by up to 2^-8
    assert error(published(base, lora, gain, 0.5)) > 0.1


def test_pieces_of_rows_have_the_bits_of_the_whole() -> None:
    base, lora, gain, bias = compose_case((33, 70), BF16)
    whole = dora_compose(base, lora, gain, 0.5, bias, whole=True)
    pieces = [
        dora_compose(b, low, gain, 0.5, bias, whole=True)
        for b, low in zip(base.split(7), lora.split(7), strict=True)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_strided_operands_give_the_numbers_of_contiguous_ones() -> None:
    base, lora, gain, _ = compose_case((6, 8), torch.float32)
    wide = torch.stack([gain, gain], dim=1).flatten()[::2]
    found = dora_compose(base.t().contiguous().t(), lora.repeat(1, 2)[:, :8], wide, 0.5)
    assert torch.equal(found, dora_compose(base, lora, gain, 0.5))
    assert found.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)], ids=str)
def test_an_empty_batch_has_an_empty_result_and_gradients_of_zero(shape: tuple[int, ...]) -> None:
    base, lora, gain, bias = (t.requires_grad_() for t in compose_case(shape, torch.float32))
    out = dora_compose(base, lora, gain, 0.5, bias)
    assert out.shape == shape
    out.sum().backward()
    assert gain.grad is not None
    assert gain.grad.tolist() == [0.0] * shape[-1]


BAD: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("lora's shape", lambda a: {"lora": a["lora"][:1]}, "lora is [1, 4], not [3, 4]"),
    ("a gain for broadcasting", lambda a: {"gain": a["gain"][:1]}, "gain is [1], not [4]"),
    ("a gain in bf16", lambda a: {"gain": a["gain"].to(BF16)}, "gain is torch.bfloat16, not"),
    ("bias's shape", lambda a: {"bias": torch.ones(3)}, "bias is [3], not [4]"),
    ("mixed dtypes", lambda a: {"lora": a["lora"].to(BF16)}, "lora is torch.bfloat16 and base"),
    ("integers", lambda a: {"bias": torch.ones(4, dtype=torch.long)}, "bias is torch.int64"),
    ("another device", lambda a: {"gain": a["gain"].to("meta")}, "gain is on meta and base on cpu"),
    ("a single number", lambda a: {"base": torch.tensor(1.0)}, "base is a single number"),
    ("no scale", lambda a: {"scale": math.nan}, "scale nan is not a finite number"),
]


@pytest.mark.parametrize(("change", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    base, lora, gain, _ = compose_case((3, 4), torch.float32)
    arguments = {"base": base, "lora": lora, "gain": gain, "scale": 1.0}
    with pytest.raises(AdaptError) as refused:
        dora_compose(**arguments | change(arguments))
    assert str(refused.value).startswith(f"dora_compose: {says}")


def test_the_large_operands_are_kept_for_a_trained_gain_alone() -> None:
    base, lora, gain, _ = compose_case((8, 16), torch.float32)
    base.requires_grad_()
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dora_compose(base, lora, gain, 0.5)
        frozen = sum(kept)
        dora_compose(base, lora, gain.requires_grad_(), 0.5)
    assert (frozen, sum(kept) - frozen) == (16, 16 + 2 * 128)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its copies
@pytest.mark.parametrize("biased", [False, True])
def test_torch_accepts_the_registration(biased: bool) -> None:
    base, lora, gain, bias = (t.requires_grad_() for t in compose_case((3, 5), torch.float32))
    last = bias if biased else None
    op = torch.ops.polyadapt.dora_compose.default
    torch.library.opcheck(op, (base, lora, gain, 0.5, last, biased))
    base, lora, gain, bias = (t.detach() for t in (base, lora, gain, bias))
    last = bias if biased else None
    for read in ((base, lora), (None, None)):
        backward = torch.ops.polyadapt.dora_compose_backward.default
        torch.library.opcheck(backward, (torch.ones(3, 5), gain, 0.5, biased, *read, last))


@pytest.mark.slow
def test_a_compiled_graph_holds_the_op_and_its_backward() -> None:
    case = [t.requires_grad_() for t in compose_case((3, 5), torch.float32)]
    base, lora, gain, bias = case
    plain = dora_compose(base, lora, gain, 0.5, bias)
    wanted = torch.autograd.grad(plain.square().sum(), case)
    compiled = torch.compile(dora_compose, fullgraph=True, backend="aot_eager")
    found = compiled(base, lora, gain, 0.5, bias)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), case), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "dropout"])
def test_dora_through_the_op_is_dora(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, with the op's reference in the kernel's place."""
    model, x = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False), torch.randn(3, 6)
    adapter, layer = dora_at(model, DoRA(rank=2, dropout=dropout))
    stir(adapter)
    called: list[bool] = []

    def composed(*args: Any, **options: Any) -> Tensor:
        called.append(True)
        return dora_compose(*args, **options)

    def on_a_gpu(_: Tensor) -> bool:
        return True

    def results() -> list[Tensor]:
        torch.manual_seed(3)  # of the dropout
        out = adapter.output(x, model(x), layer)
        return [out, *torch.autograd.grad(out.square().sum(), [*adapter.parameters()])]

    plain = results()
    monkeypatch.setattr(dora, "dora_compose", composed)
    monkeypatch.setattr(dora, "runs_kernel", on_a_gpu)
    torch.testing.assert_close(results(), plain, rtol=1e-4, atol=1e-5)
    assert called == [True]
