"""DoRA's row norm: exact in chunks, and kept only while nothing changes."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.core.adapters import dora
from polyadapt.core.adapters.dora import DoRAAdapter, row_norm
from polyadapt.core.kernels import row_norm as norms
from polyadapt.core.layers import FrozenLayer
from polyadapt.tests.factor_cases import dora_at, stir


def test_the_row_norm_of_a_hand_case() -> None:
    w0, a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
    assert row_norm(w0, a, b, 2.0).item() == pytest.approx(41**0.5)  # |(5, 4)|
    assert row_norm(w0, a, b, 0.0).item() == 5.0


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_the_row_norm_is_that_of_the_whole_weight_in_any_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "CHUNK_ELEMENTS", chunk)
    w0, a, b = (torch.randn(s, dtype=torch.float64) for s in ((11, 9), (3, 9), (11, 3)))
    expected = torch.linalg.norm(w0 + 0.7 * b @ a, dim=1)
    torch.testing.assert_close(row_norm(w0, a, b, 0.7), expected, rtol=1e-12, atol=0)


def test_the_row_norm_stays_exact_where_the_update_cancels_the_weight() -> None:
    a, b = torch.randn(2, 50), torch.randn(40, 2)
    w0 = -(b @ a) + 1e-4 * torch.randn(40, 50)
    exact = (w0.double() + b.double() @ a.double()).norm(dim=1)
    factored = w0.square().sum(1) + 2 * ((w0 @ a.t()) * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
    torch.testing.assert_close(row_norm(w0, a, b, 1.0).double(), exact, rtol=2e-3, atol=0)
    assert ((factored.clamp_min(0).sqrt() - exact).abs() / exact).max() > 0.1


def test_a_row_of_zeros_divides_by_no_zero_and_nan_is_not_hidden() -> None:
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    norm = row_norm(b @ a, a, b, -1.0)
    assert norm.min() >= 1e-12
    assert norm.max() < 1e-5
    w0 = torch.zeros(5, 6)
    w0[1, 2] = torch.nan
    assert row_norm(w0, a, b, 1.0).isnan().tolist() == [False, True, False, False, False]
    linear = nn.Linear(6, 5)
    linear.weight.data[2] = 0
    model = nn.Sequential(linear)
    adapter, layer = dora_at(model)
    x = torch.randn(3, 6)
    assert torch.equal(adapter.output(x, model(x), layer), model(x))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each row norm that is computed."""
    calls: list[int] = []

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return row_norm(*args)

    monkeypatch.setattr(dora, "row_norm", count)
    return calls


def frozen_case() -> tuple[DoRAAdapter, FrozenLayer, nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    adapter, layer = dora_at(model)
    stir(adapter)
    return adapter, layer, model, torch.randn(3, 6)


def expected(adapter: DoRAAdapter, layer: FrozenLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(x, adapter.weight(layer.matrix()), layer.bias)


def test_the_norm_is_computed_once_until_something_changes(counted: list[int]) -> None:
    adapter, layer, model, x = frozen_case()
    counted.clear()
    with torch.no_grad():
        for _ in range(3):
            adapter.output(x, model(x), layer)
        assert len(counted) == 1
        adapter.m.mul_(2)  # n does not depend on it
        adapter.output(x, model(x), layer)
        assert len(counted) == 1


CHANGES: list[Any] = [
    pytest.param(lambda a, m: a.A.mul_(2), id="A"),
    pytest.param(lambda a, m: a.B.add_(1), id="B"),
    pytest.param(lambda a, m: m[0].weight.mul_(3), id="W0"),
    pytest.param(lambda a, m: m[0].load_state_dict(nn.Linear(6, 5).state_dict()), id="loaded W0"),
    pytest.param(
        lambda a, m: a.load_state_dict({k: v + 1 for k, v in a.state_dict().items()}), id="loaded"
    ),
    pytest.param(lambda a, m: setattr(a.B, "data", a.B.data + 1), id="new storage"),
    pytest.param(lambda a, m: setattr(a, "B", nn.Parameter(a.B + 1)), id="new parameter"),
    pytest.param(lambda a, m: (a.B.data.add_(1), a.invalidate()), id=".data and invalidate"),
    pytest.param(lambda a, m: (a.B.data.add_(1), a.after_step(1, None)), id=".data and after_step"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(change: Callable[[DoRAAdapter, Any], Any]) -> None:
    adapter, layer, model, x = frozen_case()
    with torch.no_grad():
        adapter.output(x, model(x), layer)
        change(adapter, model)
        moved = adapter.output(x, model(x), layer)
    torch.testing.assert_close(moved, expected(adapter, layer, x))


@pytest.mark.parametrize("fused", [False, True])
def test_no_stale_norm_survives_training(fused: bool) -> None:
    """A fused optimiser writes without raising versions."""
    adapter, layer, model, x = frozen_case()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            moved = adapter.output(x, model(x), layer)
        torch.testing.assert_close(moved, expected(adapter, layer, x))
        moved = adapter.output(x, model(x), layer)
        torch.testing.assert_close(moved, expected(adapter, layer, x))
        moved.square().sum().backward()
        optimiser.step()


def test_no_norm_is_kept_between_a_forward_and_its_step() -> None:
    adapter, layer, model, x = frozen_case()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=True)
    loss = adapter.output(x, model(x), layer).square().sum()
    with torch.no_grad():
        adapter.output(x, model(x), layer)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():
        moved = adapter.output(x, model(x), layer)
    torch.testing.assert_close(moved, expected(adapter, layer, x))


def test_a_norm_kept_in_inference_mode_serves_in_training() -> None:
    adapter, layer, model, x = frozen_case()
    adapter.requires_grad_(False)
    with torch.inference_mode():
        adapter.output(x, model(x), layer)
    adapter.m.requires_grad_(True)
    adapter.output(x, model(x), layer).sum().backward()
    assert adapter.m.grad is not None


def test_a_backbone_made_in_inference_mode_is_never_stale(counted: list[int]) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 5))
        adapter, layer = dora_at(model)
        x = torch.randn(3, 6)
        adapter.output(x, model(x), layer)
        counted.clear()
        layer.stored.mul_(3)
        moved = adapter.output(x, model(x), layer)
        assert len(counted) == 1
        torch.testing.assert_close(moved, expected(adapter, layer, x))


def test_copies_do_not_share_the_kept_norm(counted: list[int]) -> None:
    adapter, layer, model, x = frozen_case()
    with torch.no_grad():
        adapter.output(x, model(x), layer)
        for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert twin._cached is None  # it refers to W0, which is not the adapter's to copy
            twin.B.add_(1)
            moved = twin.output(x, model(x), layer)
            torch.testing.assert_close(moved, expected(twin, layer, x))
    assert set(adapter.state_dict()) == {"A", "B", "m"}


def test_threads_share_the_kept_norm() -> None:
    adapter, layer, model, x = frozen_case()
    right = expected(adapter, layer, x)
    wrong: list[float] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(50):
                moved = adapter.output(x, model(x), layer)
                wrong.extend([1.0] * (not torch.allclose(moved, right, atol=1e-5)))
                adapter.invalidate()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
