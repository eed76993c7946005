"""`lowrank_linear`: every order of its products, the gradients, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels.lowrank_linear import lowrank_linear
from polyadapt.core.kernels.plan import ORDERS
from polyadapt.tests.lowrank_cases import KEEP_SCALE, SCALE, formula, lowrank_case

F64, BF16 = torch.float64, torch.bfloat16
NEEDED = ("x", "w0", "a", "b")
# What a call may have beside x, W0, A and B, and the orders that can run it.
EXTRAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), tuple(ORDERS)),
    "bias-weights": (("bias", "weights"), tuple(ORDERS)),
    "dropout": (("keep", "weights"), ("P1", "P2")),
    "gain": (("bias", "gain", "weights"), ("P1", "P2")),
    "base": (("base",), ("P1", "P2")),
    "base-gain": (("base", "bias", "gain", "keep"), ("P1", "P2")),
}
CALLS = [
    pytest.param(extra, plan, id=f"{name}-{plan}")
    for name, (extra, plans) in EXTRAS.items()
    for plan in plans
]


def called(given: dict[str, Any], plan: str | None = None) -> Tensor:
    """The op with the case's scales."""
    rest = {n: t for n, t in given.items() if n not in NEEDED}
    x, w0, a, b = (given[n] for n in NEEDED)
    return lowrank_linear(x, w0, a, b, SCALE, **rest, keep_scale=KEEP_SCALE, plan=plan)


def learning(given: dict[str, Tensor]) -> list[Tensor]:
    return [t.requires_grad_() for n, t in given.items() if n not in ("w0", "keep")]


@pytest.mark.parametrize(("extra", "plan"), CALLS)
def test_every_order_gives_the_formula_and_its_gradients(extra: tuple[str, ...], plan: str) -> None:
    case = lowrank_case(F64)
    given = {n: case[n] for n in (*NEEDED, *extra)}
    leaves = learning(given)
    wanted = formula(**given)
    found = called(given, plan)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn(wanted.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(found, leaves, grad, allow_unused=True)
    expected = torch.autograd.grad(wanted, leaves, grad, allow_unused=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("extra", "plan"), CALLS)
def test_every_order_passes_gradcheck(extra: tuple[str, ...], plan: str) -> None:
    case = lowrank_case(F64, (2,), (3, 2, 2))
    given = {n: case[n] for n in (*NEEDED, *extra)}
    names = [n for n in given if n not in ("w0", "keep")]

    def at(*tensors: Tensor) -> Tensor:
        return called(given | dict(zip(names, tensors, strict=True)), plan)

    assert torch.autograd.gradcheck(at, tuple(learning(given)))


@pytest.mark.parametrize("plan", ORDERS)
@pytest.mark.parametrize("name", ["x", "a", "b", "weights"])
def test_one_gradient_alone_is_what_it_is_among_the_others(name: str, plan: str) -> None:
    case = lowrank_case(F64)
    given = {n: case[n] for n in (*NEEDED, "weights")}
    own = given[name].requires_grad_()
    (found,) = torch.autograd.grad(called(given, plan).square().sum(), own)
    (wanted,) = torch.autograd.grad(formula(**given).square().sum(), own)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    x, w0 = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    # x W0^T = (3, 2, 2), v = 3, s v B^T = (6, 0, -6)
    assert lowrank_linear(x, w0, a, b, 2.0).tolist() == [[9.0, 2.0, -4.0]]
    gain, bias = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, 3.0])
    assert lowrank_linear(x, w0, a, b, 2.0, bias, gain=gain).tolist() == [[19.0, 2.0, 1.0]]
    base, half = torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([0.5])
    based = lowrank_linear(x, None, a, b, 2.0, base=base, weights=half)
    assert based.tolist() == [[6.0, 2.0, -1.0]]
    left = torch.tensor([[False, True]])  # v = 2 * 2
    out = lowrank_linear(x, w0, a, b, 2.0, keep=left, keep_scale=2.0)
    assert out.tolist() == [[11.0, 2.0, -6.0]]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_branch_of_zero_leaves_the_bits_of_the_base(dtype: torch.dtype) -> None:
    case = lowrank_case(dtype)
    b = torch.zeros_like(case["b"])
    found = lowrank_linear(case["x"], None, case["a"], b, 2.0, base=case["base"])
    assert torch.equal(found, case["base"])
    assert found.data_ptr() != case["base"].data_ptr()


def test_gain_and_rank_weights_are_not_rounded_to_bf16_and_the_sum_is_once() -> None:
    one, beside = torch.ones(1, 1, dtype=BF16), torch.tensor([1 + 2**-8])  # 1 in bf16
    assert beside.to(BF16).item() == 1
    # 255 (1 + 2^-8) = 255.996
    assert lowrank_linear(one, 127 * one, one, 128 * one, 1.0, gain=beside).item() == 256
    assert lowrank_linear(255 * one, 0 * one, one, one, 1.0, weights=beside).item() == 256
    # From 256 on bf16 counts in twos: 256 + 0.75 is 256, 256 + 0.75 + 0.75 is not.
    bias = torch.tensor([0.75], dtype=BF16)
    assert lowrank_linear(one, 256 * one, one, 0.75 * one, 1.0, bias).item() == 258


def test_factors_keep_their_own_dtype_in_their_gradients() -> None:
    case = lowrank_case(BF16)
    a, b = (case[n].float().requires_grad_() for n in "ab")
    y = lowrank_linear(case["x"], case["w0"], a, b, SCALE)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.float32)


def test_strided_operands_give_the_numbers_of_contiguous_ones() -> None:
    case = lowrank_case(F64)
    strided = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in case.items()}
    strided["bias"] = torch.stack([case["bias"]] * 2, dim=1).flatten()[::2]
    names = (*NEEDED, "bias", "keep")
    assert not strided["x"].is_contiguous()
    found, wanted = (called({n: of[n] for n in names}) for of in (strided, case))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [((0,), (6, 5, 2)), ((2, 0), (6, 5, 2)), ((3,), (6, 5, 0)), ((3,), (6, 0, 2)), ((), (6, 5, 2))],
    ids=["no token", "no token of two", "rank 0", "no output", "one token without an axis"],
)
@pytest.mark.parametrize("plan", [None, "P1", "P5"])
def test_empty_operands_have_the_right_answer(
    tokens: tuple[int, ...], sizes: tuple[int, int, int], plan: str | None
) -> None:
    case = lowrank_case(F64, tokens, sizes)
    given = {n: case[n] for n in (*NEEDED, "bias", "weights")}
    leaves = learning(given)
    found, wanted = called(given, plan), formula(**given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients, expected = (torch.autograd.grad(y.sum(), leaves) for y in (found, wanted))
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("plan", "numbers"), [("P1", 12), ("P2", 0), ("P3", 0), ("P5", 30)])
def test_beyond_its_operands_a_call_keeps_what_its_order_says(plan: str, numbers: int) -> None:
    case = lowrank_case(F64)
    given = {n: case[n] for n in NEEDED}
    leaves, kept = learning(given), 0

    def pack(t: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if any(t.data_ptr() == own.data_ptr() for own in given.values()) else t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        called(given, plan).sum().backward()
    assert kept == numbers
    assert all(t.grad is not None for t in leaves)


def test_autocast_does_not_change_the_dtypes_of_a_call() -> None:
    case = lowrank_case(torch.float32)
    given = {n: case[n] for n in NEEDED}
    leaves = learning(given)
    wanted = called(given)
    with torch.autocast("cpu", dtype=BF16):
        found = called(given)
        gradients = torch.autograd.grad(found.sum(), leaves)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted.sum(), leaves))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("d_in", {"x": torch.ones(3, 4)}, "x is [3, 4], not [3, 6]"),
    ("rank", {"b": torch.ones(5, 3)}, "b is [5, 3], not [5, 2]"),
    ("W0", {"w0": torch.ones(6, 5)}, "w0 is [6, 5], not [5, 6]"),
    ("a vector", {"a": torch.ones(6)}, "a is [6], not a matrix"),
    ("bias", {"bias": torch.ones(1)}, "bias is [1], not [5]"),
    ("base", {"base": torch.ones(3, 5)}, "base is [3, 5], not [2, 3, 5]"),
    ("weights", {"weights": torch.ones(1)}, "weights is [1], not [2]"),
    ("gain", {"gain": torch.ones(6)}, "gain is [6], not [5]"),
    ("keep", {"keep": torch.ones(2, 6, dtype=torch.bool)}, "keep is [2, 6], not [2, 3, 6]"),
    ("keep in numbers", {"keep": torch.ones(2, 3, 6)}, "keep is torch.float32, not torch.bool"),
    ("a number", {"x": torch.tensor(1.0)}, "x is a single number"),
    ("token ids", {"x": torch.ones(2, 3, 6, dtype=torch.long)}, "x is torch.int64, not a tensor"),
    ("dtypes", {"w0": torch.ones(5, 6, dtype=BF16)}, "w0 is torch.bfloat16 and x torch.float32"),
    ("weights' dtype", {"weights": torch.ones(2, dtype=BF16)}, "weights is torch.bfloat16, not"),
    ("gain's dtype", {"gain": torch.ones(5, dtype=F64)}, "gain is torch.float64, not torch.float"),
    ("device", {"b": torch.ones(5, 2, device="meta")}, "b is on meta and x on cpu"),
    ("nothing frozen", {"w0": None}, "w0 is None, and there is no base in its place"),
    ("scale", {"scale": math.inf}, "scale inf is not a finite number"),
    ("dropout's scale", {"keep_scale": math.nan}, "keep_scale nan is not a finite number"),
]


@pytest.mark.parametrize(("change", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    case = lowrank_case(torch.float32)
    arguments: dict[str, Any] = {**{n: case[n] for n in NEEDED}, "scale": 1.0, **change}
    with pytest.raises(AdaptError) as refused:
        lowrank_linear(**arguments)
    assert str(refused.value).startswith(f"lowrank_linear: {says}")


def test_an_order_that_the_call_forbids_is_refused_by_name() -> None:
    case = lowrank_case(BF16)
    with pytest.raises(AdaptError, match=r"plan P3 \(merged forward\): torch\.bfloat16 would"):
        called({n: case[n] for n in NEEDED}, "P3")


def test_a_second_derivative_is_refused() -> None:
    case = lowrank_case(F64)
    given = {n: case[n] for n in NEEDED}
    leaves = learning(given)
    first = torch.autograd.grad(called(given).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(first[0].sum(), leaves)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its copies
@pytest.mark.parametrize("plan", ["P1", "P5"])
def test_torch_accepts_the_registration(plan: str) -> None:
    case = lowrank_case(torch.float32)
    x, a, b, weights = (case[n].requires_grad_() for n in ("x", "a", "b", "weights"))
    operands = (x, case["w0"], a, b, SCALE, case["bias"], None, weights, None, 1.0, None)
    op = torch.ops.polyadapt.lowrank_linear.default
    torch.library.opcheck(op, (*operands, plan, True))
    fixed = [t.detach() if isinstance(t, Tensor) else t for t in operands]
    kept = op(*fixed, plan, True)[1]
    backward = torch.ops.polyadapt.lowrank_linear_backward.default
    for needs in ([True, True, True, True, False], [False, True, False, False, False]):
        torch.library.opcheck(backward, (torch.ones(2, 3, 5), *fixed, kept, plan, needs))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [("bias", "weights"), ("base", "keep")], ids=["whole", "base"])
def test_a_compiled_graph_holds_the_op_and_its_backward(extra: tuple[str, ...]) -> None:
    case = lowrank_case(torch.float32)
    given = {n: case[n] for n in (*NEEDED, *extra)}
    leaves = learning(given)
    plain = called(given)
    wanted = torch.autograd.grad(plain.square().sum(), leaves)
    compiled: Callable[..., Tensor] = torch.compile(called, fullgraph=True, backend="aot_eager")
    found = compiled(given)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), leaves), wanted)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU would be given, with the references in the kernels' places."""
    from polyadapt.core.kernels import lowrank_linear_triton, lowrank_orders

    launches: list[str] = []

    def forward(call: lowrank_orders.Call, v: Tensor) -> Tensor:
        launches.append("whole" if call.base is None else "beside")
        return lowrank_orders.reference(call, v)

    def backward(call: lowrank_orders.Call, grad: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        launches.append("backward")
        return lowrank_orders.up_again(call, grad), lowrank_orders.by_column(call, grad, v)

    def everywhere(_: Tensor) -> bool:
        return True

    monkeypatch.setattr(lowrank_linear_triton, "forward", forward)
    monkeypatch.setattr(lowrank_linear_triton, "backward", backward)
    monkeypatch.setattr(lowrank_orders, "runs_kernel", everywhere)
    return launches


@pytest.mark.parametrize(
    ("dtype", "sizes", "launches"),
    [
        (BF16, (16, 32, 2), ["whole", "backward"]),
        (BF16, (16, 32, 40), ["whole"]),  # dY is read twice: partial sums would be more
        (BF16, (16, 32, 32), ["whole", "backward"]),
        (BF16, (16, 32, 24), ["whole"]),
        (BF16, (16, 31, 2), ["beside"]),
        (torch.float32, (16, 32, 2), ["beside"]),
        (torch.float32, (16, 32, 65), []),
        (torch.float32, (16, 32, 0), []),
    ],
    ids=["bf16", "a large rank", "32", "24", "odd", "fp32", "fp32 of a large rank", "rank 0"],
)
def test_kernels_are_launched_where_they_suit(
    dtype: torch.dtype, sizes: tuple[int, int, int], launches: list[str], launched: list[str]
) -> None:
    case = lowrank_case(dtype, (3,), sizes)
    given = {n: case[n] for n in (*NEEDED, "bias")}
    leaves = learning(given)
    found, wanted = called(given, "P1"), formula(**given)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    torch.autograd.grad(found.sum(), leaves)
    assert launched == launches
