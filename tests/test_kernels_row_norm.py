"""`row_norm`: both forms, the bounds on their errors, what is refused, and DoRA's use of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyadapt.core.adapters import dora
from polyadapt.core.errors import AdaptError
from polyadapt.core.kernels import row_norm as module
from polyadapt.core.kernels.row_norm import Method, exact, factored, factored_is_cheaper, row_norm
from polyadapt.tests.factor_cases import dora_at, stir
from polyadapt.tests.kernel_cases import norm_case

BF16 = torch.bfloat16
METHODS: list[Method] = ["exact", "factored", "auto"]
UNIT = {torch.float32: 2**-24, torch.float64: 2**-53}

by_method = pytest.mark.parametrize("method", METHODS)


def truth(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    norms: Tensor = (w0.double() + scale * b.double() @ a.double()).norm(dim=1)
    return norms


@by_method
def test_the_norm_of_a_hand_case(method: Method) -> None:
    w0, a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
    assert row_norm(w0, a, b, 2.0, method).item() == pytest.approx(41**0.5)  # 25 + 12 + 4
    assert row_norm(w0, a, b, 0.0, method).item() == 5.0


@by_method
@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_the_norm_is_that_of_the_whole_weight_in_any_chunks(
    method: Method, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    w0, a, b = norm_case((11, 9), 3, torch.float64)
    found = row_norm(w0, a, b, 0.7, method)
    torch.testing.assert_close(found, truth(w0, a, b, 0.7), rtol=1e-12, atol=0)


def test_beside_minus_w0_the_published_form_is_off_by_a_fifth_and_the_exact_one_is_not() -> None:
    e = 2393 * 2**-23  # w^2 = 1 + 2 e + e^2 rounds e^2 = 0.68 units of its last place up to one
    w0, one = torch.tensor([[1 + e]]), torch.ones(1, 1)
    norm, believed = factored(w0, one, one, -1.0)
    assert norm.item() == pytest.approx(1.2103 * e, rel=1e-4)
    assert not believed
    for method in METHODS:
        assert row_norm(w0, one, one, -1.0, method).item() == e


def test_where_the_update_cancels_most_of_the_weight_only_the_published_form_is_wrong() -> None:
    w0, a, b = norm_case((40, 50), 2, torch.float32)
    w0 = 1e-4 * w0 - b @ a
    norm, believed = factored(w0, a, b, 1.0)
    wanted = truth(w0, a, b, 1.0)
    assert ((norm - wanted).abs() / wanted).max() > 0.1
    assert not believed.any()
    for method in METHODS:
        found = row_norm(w0, a, b, 1.0, method).double()
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("left", [1.0, 0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_both_forms_keep_the_bounds_that_are_derived(rank: int, left: float) -> None:
    w0, a, b = norm_case((200, 300), rank, torch.float32)
    w0 = left * w0 - (1 - left) * (b @ a)
    wanted, unit = truth(w0, a, b, 1.0), UNIT[torch.float32]
    most = w0.double().norm(dim=1) + b.double().abs() @ a.double().norm(dim=1)
    error = (exact(w0, a, b, 1.0) - wanted).abs() / wanted
    assert (error <= unit * ((rank + 2) * most / wanted + 151)).all()
    norm, believed = factored(w0, a, b, 1.0)
    error, bound = (norm - wanted).abs() / wanted, (306 + 2 * rank) / 2 * unit
    assert (error <= bound * (most / wanted) ** 2 * (1 + 1e-3))[wanted > 0.05 * most].all()
    assert (error <= 4.01 * bound)[believed].all()  # two bits
    assert (believed == (wanted >= 0.5 * most))[(wanted / most - 0.5).abs() > 1e-3].all()


def test_the_bound_holds_in_some_rows_and_the_others_are_computed_exactly() -> None:
    w0, a, b = norm_case((6, 40), 2, torch.float32)
    w0[::2] = 1e-4 * w0[::2] - b[::2] @ a
    norm, believed = factored(w0, a, b, 1.0)
    assert believed.tolist() == [False, True] * 3
    found = row_norm(w0, a, b, 1.0, "factored")
    assert torch.equal(found[believed], norm[believed])
    torch.testing.assert_close(found.double(), truth(w0, a, b, 1.0), rtol=1e-2, atol=0)


@pytest.fixture
def fewer_digits() -> Iterator[None]:
    """Let torch multiply fp32 with fewer digits where the CPU can."""
    backend: Any = torch.backends.mkldnn
    before, backend.matmul.fp32_precision = backend.matmul.fp32_precision, "tf32"
    yield
    backend.matmul.fp32_precision = before


@pytest.mark.usefixtures("fewer_digits")
def test_no_bound_holds_where_torch_multiplies_with_fewer_digits() -> None:
    w0, a, b = norm_case((6, 40), 2, torch.float32)
    b = b / 100
    assert not factored(w0, a, b, 1.0)[1].any()
    assert factored(w0.double(), a, b, 1.0)[1].all()
    assert torch.equal(row_norm(w0, a, b, 1.0, "factored"), exact(w0, a, b, 1.0))


@by_method
def test_a_row_that_vanishes_has_no_norm_and_nan_is_not_hidden(method: Method) -> None:
    w0, a, b = norm_case((5, 6), 2, torch.float32)
    assert row_norm(b @ a, a, b, -1.0, method).max() < 1e-5
    w0[1, 2], w0[3, 0] = torch.nan, torch.inf
    found = row_norm(w0, a, b, 1.0, method)
    assert found.isnan().tolist() == [False, True, False, False, False]
    assert found.isinf().tolist() == [False, False, False, True, False]
    a[0, 0] = torch.nan
    assert row_norm(w0, a, b, 1.0, method).isnan().all()


class Made(TorchDispatchMode):
    """The operations that run and the most numbers that one of them makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket.__name__)
        read = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in read:
            self.largest = max(self.largest, result.numel())
        return result


@by_method
def test_a_scale_of_zero_reads_neither_factor(method: Method) -> None:
    w0, a, b = norm_case((5, 6), 2, torch.float32)
    with Made() as made:
        found = row_norm(w0, torch.full_like(a, torch.nan), b, 0.0, method)
    assert not {"mm", "addmm", "matmul"} & {*made.ops}
    torch.testing.assert_close(found, w0.norm(dim=1))


@by_method
def test_no_buffer_has_the_size_of_the_weight(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 512)
    w0, a, b = norm_case((64, 128), 3, BF16, torch.float32)
    with Made() as made:
        row_norm(w0, a, b, 0.5, method)
        row_norm(w0, a, -10 * b, 0.5, method)  # with rows that the bound does not hold in
    assert made.largest == 512  # A has 384 numbers
    with Made() as made:
        w0 + 0.5 * b @ a
    assert made.largest == 64 * 128  # the measure sees such a buffer where there is one


@by_method
@pytest.mark.parametrize("factors", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_the_norm_is_in_fp32_for_any_dtypes_and_under_autocast(
    dtype: torch.dtype, factors: torch.dtype, method: Method
) -> None:
    w0, a, b = norm_case((7, 33), 3, dtype, factors)
    found = row_norm(w0, a, b, 0.7, method)
    torch.testing.assert_close(found, truth(w0, a, b, 0.7).float(), rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(row_norm(w0, a, b, 0.7, method), found)


@by_method
def test_one_operand_in_fp64_makes_all_of_it_fp64(method: Method) -> None:
    w0, a, b = norm_case((4, 5), 2, torch.float32)
    for case in ((w0.double(), a, b), (w0, a.double(), b), (w0, a, b.double())):
        found = row_norm(*case, 0.7, method)
        torch.testing.assert_close(found, truth(w0, a, b, 0.7), rtol=1e-12, atol=0)


@by_method
@pytest.mark.parametrize(("shape", "rank"), [((0, 4), 2), ((3, 0), 2), ((3, 4), 0)], ids=str)
def test_empty_operands_have_the_norms_of_what_is_there(
    shape: tuple[int, int], rank: int, method: Method
) -> None:
    w0, a, b = norm_case(shape, rank, torch.float32)
    torch.testing.assert_close(row_norm(w0, a, b, 0.5, method), w0.norm(dim=1))


@by_method
def test_strided_operands_give_the_numbers_of_contiguous_ones(method: Method) -> None:
    w0, a, b = norm_case((6, 8), 3, torch.float32)
    strided = (w0.t().contiguous().t(), a.repeat(1, 2)[:, :8], b.t().contiguous().t())
    torch.testing.assert_close(row_norm(*strided, 0.5, method), row_norm(w0, a, b, 0.5, method))


@by_method
def test_the_norm_is_a_constant_for_the_gradient(method: Method) -> None:
    case = [t.requires_grad_() for t in norm_case((4, 5), 2, torch.float32)]
    assert not row_norm(case[0], case[1], case[2], 0.5, method).requires_grad


def test_the_factored_form_is_cheaper_off_the_cpu_and_for_low_ranks() -> None:
    assert not factored_is_cheaper(torch.empty(4096, 4096), 8)
    w0 = torch.empty(4096, 4096, device="meta")  # 20 * 4096^2 = r^2 * 8192 at r = 202.4
    assert factored_is_cheaper(w0, 202)
    assert not factored_is_cheaper(w0, 203)


BAD: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("no matrix", lambda c: {"w0": c["w0"][0]}, "w0 is [4], not a matrix"),
    ("a vector for A", lambda c: {"a": c["a"][0]}, "a is [4], not a matrix"),
    ("A's width", lambda c: {"a": c["a"][:, :3]}, "a is [2, 3], not [2, 4]"),
    ("B's rank", lambda c: {"b": c["b"][:, :1]}, "b is [3, 1], not [3, 2]"),
    ("integers", lambda c: {"w0": torch.ones(3, 4, dtype=torch.long)}, "w0 is torch.int64"),
    ("another device", lambda c: {"b": c["b"].to("meta")}, "b is on meta and w0 on cpu"),
    ("no scale", lambda c: {"scale": math.inf}, "scale inf is not a finite number"),
    ("no method", lambda c: {"method": "gram"}, "method 'gram' is none of exact, factored, auto"),
]


@pytest.mark.parametrize(("change", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    w0, a, b = norm_case((3, 4), 2, torch.float32)
    arguments = {"w0": w0, "a": a, "b": b, "scale": 1.0}
    with pytest.raises(AdaptError) as refused:
        row_norm(**arguments | change(arguments))
    assert str(refused.value).startswith(f"row_norm: {says}")


@pytest.mark.slow
@by_method
def test_torch_accepts_the_registration(method: Method) -> None:
    op = torch.ops.polyadapt.row_norm.default
    torch.library.opcheck(op, (*norm_case((5, 6), 2, BF16, torch.float32), 0.5, method))


@pytest.mark.slow
def test_a_compiled_graph_holds_the_op() -> None:
    w0, a, b = norm_case((5, 6), 2, torch.float32)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(row_norm, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(w0, a.requires_grad_(), b, 0.5), exact(w0, a, b, 0.5))
    assert any("polyadapt.row_norm" in name for name in seen)


def dora_case() -> tuple[Any, Any, nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5)).double().requires_grad_(False)
    adapter, layer = dora_at(model)
    stir(adapter)
    return adapter.double(), layer, model, torch.randn(4, 6, dtype=torch.float64)


def test_a_new_dora_has_a_gain_of_exactly_one_in_every_dtype_of_the_weight() -> None:
    for dtype in (torch.float32, BF16, torch.float16):
        model = nn.Sequential(nn.Linear(301, 200)).to(dtype)
        adapter, layer = dora_at(model)
        assert torch.equal(adapter.m, adapter.norm(layer))  # and delta is 0, as B is
        x = torch.randn(3, 301).to(dtype)
        assert torch.equal(adapter.output(x, model(x), layer), model(x))


def test_dora_is_its_formula_and_its_norm_a_constant() -> None:
    adapter, layer, model, x = dora_case()
    product = layer.matrix() + adapter.scale * adapter.B @ adapter.A
    gain = adapter.m / product.detach().norm(dim=1)
    wanted = F.linear(x, gain[:, None] * product, layer.bias)
    found = adapter.output(x, model(x), layer)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    parameters = [adapter.A, adapter.B, adapter.m]
    right = torch.autograd.grad(wanted.square().sum(), parameters)
    ours = torch.autograd.grad(found.square().sum(), parameters)
    torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)


def test_dora_stays_finite_where_the_update_removes_the_weight() -> None:
    adapter, layer, model, x = dora_case()
    with torch.no_grad():
        layer.stored.copy_(-adapter.scale * adapter.B @ adapter.A)
    assert dora.row_norm(layer.matrix(), adapter.A, adapter.B, adapter.scale).min() >= 1e-12
    assert adapter.output(x, model(x), layer).isfinite().all()


def test_dora_traced_takes_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    w0, a, b = norm_case((5, 6), 2, torch.float32)
    monkeypatch.delattr(module, "row_norm")
    batched = torch.func.vmap(lambda factor: dora.row_norm(w0, factor, b, 0.5))
    both = batched(torch.stack([a, 2 * a]))
    torch.testing.assert_close(both[1], exact(w0, 2 * a, b, 0.5))
