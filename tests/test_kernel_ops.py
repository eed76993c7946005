"""The calls that the benchmarks of the fused operations make, tiny and on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polyadapt.benchmarks import kernels_gpu
from polyadapt.benchmarks.kernel_layers import Size
from polyadapt.benchmarks.kernel_ops import Case, cases
from polyadapt.benchmarks.kernel_traffic import Step, Traffic, numberless, total
from polyadapt.benchmarks.kernels_cpu import peak
from polyadapt.benchmarks.kernels_roofline import GPU, KINDS
from polyadapt.core.kernels.lowrank_linear import lowrank_linear

SHRINK = 256  # 16 tokens, widths 16 and 32
SLOW = GPU("slow", bandwidth=1e9, matrix=1e12, tf32=1e12, fp32=1e12)
SMALL = list(cases("cpu", SHRINK, torch.float32))

by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


@by_case
def test_ours_and_eager_are_the_same_operation(case: Case) -> None:
    torch.testing.assert_close(case.ours(), case.eager(), rtol=1e-4, atol=1e-5)


@by_case
def test_their_gradients_agree(case: Case) -> None:
    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, case.leaves, torch.ones_like(out)) if case.leaves else ()

    for found, wanted in zip(gradients(case.ours()), gradients(case.eager()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_all_five_operations_are_there_and_all_but_the_norm_have_a_backward() -> None:
    ops = {case.op for case in SMALL}
    assert ops == {"dora_compose", "row_norm", "lowrank_linear", "multi_lora", "hadamard"}
    assert {case.op for case in SMALL if case.leaves} == ops - {"row_norm"}


def test_counting_a_case_finds_at_least_the_least() -> None:
    with numberless():
        for case in cases("cpu", SHRINK):
            for call in (case.ours, case.eager):
                forward, backward = case.steps(call)
                assert bool(backward) == bool(case.leaves), case.name
                for steps, least in ((forward, case.least()), (backward, case.least(True))):
                    moved, done = total(steps)
                    assert not steps or (moved >= least[0] and done >= least[1]), case.name


def test_the_fused_composition_is_at_its_least() -> None:
    with numberless():
        case = next(cases("cpu", SHRINK))
        forward, _ = case.steps(case.ours)
        assert total(forward) == case.least()


def test_a_layer_with_its_branch_takes_the_products_of_both() -> None:
    with numberless():
        shapes = ((2, 16), (32, 16), (1, 16), (32, 1))
        x, w0, a, b = (torch.empty(*shape, dtype=torch.bfloat16) for shape in shapes)
        with Traffic() as traffic:
            lowrank_linear(x, w0, a, b, 0.5)
    down, product = traffic.steps
    assert down == Step("mm", 2 * (2 * 16 + 16 + 2), 2 * 2 * 16, "matrix")
    moved = 2 * (2 * 16 + 32 * 16 + 2 + 32 + 2 * 32)
    assert product == Step("product", moved, 2 * 2 * 32 * (16 + 1), "matrix")


def test_the_peak_is_the_most_that_is_there_at_once() -> None:
    def call() -> None:
        first = torch.empty(2**20)
        del first
        second, third = torch.empty(2**18), torch.empty(2**19)
        del second, third

    assert peak(call) == 4 * 2**20


def test_without_a_gpu_one_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels_gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a GPU" in line


@pytest.fixture
def three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are made, and take what the fixture says."""

    def timed(call: Callable[[], object], repetitions: int) -> kernels_gpu.Times:
        call()
        return kernels_gpu.Times([0.5, 1.0, 3.0])

    monkeypatch.setattr(kernels_gpu, "timed", timed)


@pytest.mark.usefixtures("three_times")
def test_a_line_of_the_gpu_table_has_times_prediction_and_difference() -> None:
    step = Step("copy", 10**6, 1)
    both = ([step], [step]), ([step] * 2, [step] * 2)
    forward, with_backward = kernels_gpu.rows(SMALL[0], both, SLOW, 1)
    assert "1.0000 (0.5000 to 1.0000)" in forward
    assert forward.split()[-5:-1] == ["1.00x", "2.00x", "1.0000", "100%"]
    assert with_backward.split()[-5:-1] == ["1.00x", "2.00x", "2.0000", "200%"]
    assert float(forward.split()[-1]) < 1e-5


@pytest.mark.usefixtures("three_times")
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"published"}))
def test_a_dora_layer_is_timed_in_both_directions(kind: str) -> None:
    forward, both = kernels_gpu.layer_rows(Size(4, 8, 16, 2), kind, SLOW, "cpu", 1)
    assert "1.0000 (0.5000 to 1.0000)" in forward
    assert 0 < float(forward.split()[-1]) < float(both.split()[-1])
