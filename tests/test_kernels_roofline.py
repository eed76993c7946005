"""What the roofline table counts and predicts, on numbers that a hand can check."""

from __future__ import annotations

import pkgutil

import pytest
import torch
from torch import Tensor

from polyadapt.benchmarks.kernel_launches import LAUNCHES
from polyadapt.benchmarks.kernel_layers import (
    Size,
    counted,
    frozen,
    least,
    ours,
    peft,
    published,
    published_norm,
)
from polyadapt.benchmarks.kernel_traffic import Step, Traffic, numberless, tensor_bytes, total
from polyadapt.benchmarks.kernels_roofline import GPU, KINDS, prediction_table, traffic_table
from polyadapt.core import kernels
from polyadapt.core.kernels.dora_compose import dora_compose

SMALL = Size(tokens=2, d_out=3, d_in=5, rank=1)


def steps_of(steps: list[Step], name: str) -> list[Step]:
    return [step for step in steps if step.name == name]


def test_a_product_reads_its_factors_once_and_writes_its_result_once() -> None:
    with numberless():
        left, right = torch.empty(2, 3), torch.empty(3, 4)
        with Traffic() as traffic:
            left @ right
    assert traffic.steps == [Step("mm", 4 * (2 * 3 + 3 * 4 + 2 * 4), 2 * 2 * 3 * 4, "fp32")]


def test_a_view_is_free_and_an_expanded_vector_is_read_once() -> None:
    with numberless():
        vector, matrix = torch.empty(3), torch.empty(2, 3)
        with Traffic() as traffic:
            seen = vector.expand(2, 3)
            assert traffic.steps == []
            seen * matrix.t().t()
    assert traffic.steps == [Step("mul", 4 * (3 + 6 + 6), 6)]
    assert tensor_bytes(torch.empty(0, 3)) == 0


def test_a_new_tensor_is_only_written_and_an_empty_one_not_even_that() -> None:
    with numberless(), Traffic() as traffic:
        torch.empty(8)
        torch.eye(4)
    assert traffic.steps == [Step("eye", 4 * 16, 16)]


def test_the_fused_composition_touches_three_large_tensors_and_keeps_two_for_the_gain() -> None:
    with numberless():
        base, lora = (torch.empty(64, 256, dtype=torch.bfloat16) for _ in range(2))
        gain = torch.empty(256, requires_grad=True)
        with Traffic() as traffic:
            out = dora_compose(base, lora, gain, 1.0)
            (forward,) = traffic.steps
            out.backward(torch.empty_like(out))
    large = 64 * 256 * 2
    assert forward.bytes == 3 * large + 256 * 4
    (backward,) = steps_of(traffic.steps, "dora_compose_backward")
    partial = 2 * 256 * 4  # of two programs, 32 rows each: written, then read
    assert backward.bytes == 5 * large + 2 * 256 * 4 + 2 * partial


def test_every_module_of_kernels_has_its_launches_counted() -> None:
    modules = {name for _, name, _ in pkgutil.iter_modules(kernels.__path__)}
    counted_ = {module.__name__.rpartition(".")[2] for module, _ in LAUNCHES}
    assert {name for name in modules if name.endswith("_triton")} == counted_


def test_a_step_takes_what_the_slower_of_its_two_roofs_allows() -> None:
    gpu = GPU("small", bandwidth=10, matrix=100, tf32=50, fp32=1)
    assert gpu.seconds([Step("copy", 20, 1)]) == 2
    assert gpu.seconds([Step("sum", 10, 3)]) == 3
    assert gpu.seconds([Step("mm", 10, 300, "matrix")]) == 3
    assert gpu.seconds([Step("mm", 10, 300, "tf32")]) == 6
    assert gpu.seconds([Step("copy", 20, 1), Step("sum", 10, 3)]) == 5


def test_a_frozen_layer_is_one_product_in_each_direction() -> None:
    forward, backward = counted(frozen, SMALL)
    assert forward == [Step("mm", 2 * (2 * 5 + 3 * 5 + 2 * 3), 2 * 2 * 3 * 5, "matrix")]
    assert total(backward) == total(forward)


def test_peft_sends_an_identity_matrix_through_both_factors() -> None:
    forward, _ = counted(peft, SMALL)
    assert steps_of(forward, "eye") == [Step("eye", 2 * 5 * 5, 25)]
    through_a, through_b = 2 * 5 * 5 * 1, 2 * 5 * 1 * 3
    branch = 2 * 2 * 5 * 1 + 2 * 2 * 1 * 3
    layer = 2 * 2 * 3 * 5
    products = steps_of(forward, "mm")
    assert total(products)[1] == layer + through_a + through_b + branch


def test_the_published_sequence_composes_in_one_kernel_and_its_caller_adds() -> None:
    forward, backward = counted(published, SMALL)
    composed, added = forward[-2:]
    out, gain = 2 * 2 * 3, 2 * 3  # bytes
    assert (composed.name, composed.bytes) == ("published compose", 4 * out + gain)
    assert (added.name, added.bytes) == ("add", 3 * out)
    assert backward[0].name == "published compose backward"
    assert backward[0].bytes == 3 * out + gain


def test_the_published_norm_is_the_norm() -> None:
    norm = published_norm(torch.tensor([[3.0, 4.0]]), torch.eye(1, 2), torch.ones(1, 1), 2.0)
    torch.testing.assert_close(norm, torch.tensor([41.0]).sqrt())  # (3 + 2)^2 + 4^2


def test_ours_writes_the_output_once() -> None:
    forward, _ = counted(ours, SMALL)
    assert forward[-1].name == "dora_compose"
    assert forward[-1].bytes == 3 * 2 * 2 * 3 + 4 * 3


def test_no_sequence_is_below_the_least() -> None:
    moved, done = least(SMALL)
    assert moved == 2 * (2 * 5 + 3 * 5 + (5 + 3) + 3 + 2 * 3)
    assert done == 2 * 2 * 3 * 5 + 2 * 2 * (5 + 3) + 2 * 3 * 5 + 4 * 3 * 5
    for kind in (peft, published, ours):
        found = total(counted(kind, SMALL)[0])
        assert found[0] > moved


@pytest.mark.parametrize("name", KINDS)
def test_tables_have_a_row_for_each_sequence(name: str) -> None:
    steps = [Step("copy", 10**9, 1)]
    counts = {SMALL: dict.fromkeys(KINDS, (steps, steps))}
    assert sum(f" {name} " in line for line in traffic_table(counts)) == 1
    head, *rows = prediction_table(counts)
    assert name in head
    assert all("1.00x" in row for row in rows)
    assert f"{1e12 / 2.039e12:11.3f} ms" in rows[0]


def test_counting_leaves_the_ops_as_they_were() -> None:
    before: Tensor = dora_compose(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.5)
    counted(ours, SMALL)
    after = dora_compose(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.5)
    assert after.tolist() == before.tolist() == [[0.5, 0.5]]
