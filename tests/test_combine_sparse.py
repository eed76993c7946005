"""TIES, DARE and the cut of a dense update to a rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator

from polyadapt.core import LoRA, combine
from polyadapt.core.low_rank import Lost, Update, best_of_rank, dare, own_generator, ties
from polyadapt.tests.combined_sets import TINY, A, B, deltas, far, trained, wanted
from polyadapt.tests.saved_sets import net


def test_ties_worked_by_hand() -> None:
    one = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    two = torch.tensor([[1.0, 4.0], [-2.0, 0.1]])
    # The larger half of each: [[3, .], [., 2]] and [[., 4], [-2, .]]: they never meet.
    assert ties([one, two], 0.5).tolist() == [[3.0, 4.0], [-2.0, 2.0]]
    # Three quarters: [[3, -1], [., 2]] and [[1, 4], [-2, .]]. Sums 4, 3, -2, 2: the first entry
    # averages 3 and 1, the second elects + and leaves -1 out.
    assert ties([one, two], 0.75).tolist() == [[2.0, 4.0], [-2.0, 2.0]]
    # All: 0.5 and -2 elect -, 2 and 0.1 average.
    torch.testing.assert_close(ties([one, two], 1.0), torch.tensor([[2.0, 4.0], [-2.0, 1.05]]))


def test_ties_elects_no_sign_where_the_sum_is_0() -> None:
    assert ties([torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0])], 1.0).tolist() == [0.0, 2.0]


def test_ties_of_sets_is_ties_of_their_weighted_updates() -> None:
    model = net().double()
    made = [(trained(model, f"s{n}", LoRA(rank=2), B, n), 0.5 + n) for n in range(3)]
    whole = combine(model, made, method="ties", density=0.3, rank=8)  # all of an 8 x 8 weight
    for name, found in deltas(whole).items():
        expected = ties([w * deltas(s)[name] for s, w in made], 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert whole.extra["combined"]["error"] < 1e-10


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_cut_after_ties_and_dare_states_its_error(method: Any) -> None:
    model = net().double()
    made = [(trained(model, f"s{n}", LoRA(rank=2), B, n), 1.0) for n in range(2)]
    whole, cut = (
        combine(model, made, f"{method}{rank}", method=method, density=0.5, rank=rank)
        for rank in (8, 3)
    )
    error = far(deltas(cut), deltas(whole))
    assert cut.extra["combined"]["error"] == pytest.approx(error, abs=1e-10)
    assert error > 0.01


def test_dare_keeps_its_share_and_rescales_it() -> None:
    thinned = dare(torch.ones(100, 100), 0.25, own_generator(0))
    assert set(thinned.flatten().tolist()) == {0.0, 4.0}
    assert float(thinned.mean()) == pytest.approx(1.0, abs=0.05)  # 10,000 draws: 0.017 spread


def test_dare_draws_by_seed_site_and_set() -> None:
    model = net().double()
    one, two = (trained(model, n, LoRA(rank=2), B, 0) for n in ("one", "two"))
    options: dict[str, Any] = {"method": "dare", "density": 0.5, "rank": 8}
    made = [
        deltas(combine(model, weighted, f"d{n}", seed=seed, **options))
        for n, (weighted, seed) in enumerate(
            [
                ([(one, 1.0)], 0),
                ([(one, 1.0)], 0),
                ([(one, 1.0)], 1),
                ([(one, 1.0), (two, -1.0)], 0),
            ]
        )
    ]
    assert far(made[0], made[1]) == 0
    assert far(made[0], made[2]) > 0.1
    assert far(made[3], {k: 0 * t for k, t in made[3].items()}) > 0.1  # equal sets, other draws
    masks = [delta.abs() > 1e-9 for delta in made[0].values()]
    assert not torch.equal(masks[0], masks[1])


def test_dare_that_drops_nothing_is_the_exact_sum() -> None:
    model = net().double()
    made = [(trained(model, f"s{n}", LoRA(rank=2), A, n), 0.5 + n) for n in range(2)]
    whole = combine(model, made, method="dare", density=1, rank=4)
    assert far(deltas(whole), wanted(*made)) < TINY


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_best_of_a_dense_update_is_that_of_the_svd(shape: tuple[int, int], rank: int) -> None:
    delta = torch.randn(shape, generator=Generator().manual_seed(0), dtype=torch.float64)
    update, lost = best_of_rank(delta, rank)
    values = torch.linalg.svdvals(delta)
    assert (update.A.shape, update.B.shape) == ((rank, shape[1]), (shape[0], rank))
    assert lost.discarded == pytest.approx(float(values[rank:].norm()), abs=1e-12)
    assert lost.whole == pytest.approx(float(values.norm()))
    assert float((update.dense() - delta).norm()) == pytest.approx(lost.discarded, abs=1e-12)
    torch.testing.assert_close(update.A.norm(dim=1), update.B.norm(dim=0))


def test_nothing_has_no_error() -> None:
    update, lost = best_of_rank(torch.zeros(3, 2), 1)
    assert (update.dense().tolist(), lost.share) == (torch.zeros(3, 2).tolist(), 0.0)
    assert Lost().share == 0.0
    assert Update(torch.ones(1, 2), torch.ones(3, 1)).rank == 1
