"""Self-calibration: what it learns, what it keeps, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyadapt.core import LoRA, attach, sets_of
from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.backbones import RandomDust3r
from polyadapt.geometry3d.calibration import (
    RECIPE,
    Schedule,
    calibrate,
    error_of,
    held_out_views,
    shuffled,
    survey,
)
from polyadapt.geometry3d.labels import Labels, pseudo_labels, true_labels
from polyadapt.geometry3d.loss import confidence_loss
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import predict
from polyadapt.tests.calibration_cases import SITE, Flat, surveyed

TWO_STEPS = Schedule(lr=0.05, epochs=1, batch=6)  # of 4 views' 6 couples: 12 pairs
QUICK = Schedule(lr=0.05, epochs=3, batch=6)
SMALL = LoRA(rank=2)


def _error(network: Flat, held_out: tuple[int, ...]) -> float:
    """Against the truth, on pairs with a held-out view."""
    scene = network.scene
    edges = torch.tensor([[i, j] for i in range(6) for j in range(6) if i != j])
    edges = edges[(edges[:, :, None] == torch.tensor(held_out)).any((1, 2))]
    return error_of(predict(network, scene.images, edges).pair, true_labels(scene, edges))


def test_two_steps_on_its_own_labels_reduce_the_error_on_held_out_views() -> None:
    network = Flat()
    before = _error(network, (1, 4))
    found = calibrate(
        network,
        surveyed(),
        SITE,
        schedule=TWO_STEPS,
        recipe=SMALL,
        hold_out=2,
    )
    assert found.held_out == (1, 4)
    assert found.adapters is not None
    assert found.gain > 0.1
    assert _error(network, (1, 4)) < 0.9 * before


def test_two_steps_on_shuffled_labels_do_not() -> None:
    network = Flat()
    seen = surveyed()
    own = pseudo_labels(seen.alignment)
    before = _error(network, (1, 4))
    found = calibrate(
        network,
        seen,
        SITE,
        schedule=TWO_STEPS,
        recipe=SMALL,
        labels=shuffled(own),
        judge=true_labels(network.scene, seen.predictions.edges),
        hold_out=2,
    )
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.gain < 0.01
    assert found.adapters is None


def test_where_it_does_not_help_the_base_is_kept_bit_for_bit() -> None:
    network = Flat()
    seen = surveyed()
    wrong = shuffled(pseudo_labels(seen.alignment))
    found = calibrate(network, seen, SITE, schedule=QUICK, recipe=SMALL, labels=wrong)
    assert found.adapters is None
    assert found.after > 0.99 * found.before
    assert str(found).endswith("the base is kept")
    assert sets_of(network) == {}
    again = predict(network, network.scene.images, seen.predictions.edges).pair
    assert torch.equal(again.points2, seen.predictions.pair.points2)


def test_a_perfect_network_has_nothing_to_gain_and_keeps_its_base() -> None:
    network = Flat()
    with torch.no_grad():
        network.flatten.weight.copy_(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    seen = survey(network, network.scene.images, focals=network.scene.focals, steps=5)
    found = calibrate(network, seen, SITE, schedule=QUICK, recipe=SMALL)
    assert found.adapters is None
    assert found.before < 1e-3


def test_the_same_seed_gives_the_same_set_and_another_seed_another() -> None:
    def trained(seed: int) -> Tensor:
        network = Flat()
        seen = surveyed()
        found = calibrate(network, seen, SITE, schedule=TWO_STEPS, recipe=SMALL, seed=seed)
        assert found.adapters is not None
        return torch.cat([t.flatten() for t in found.adapters.state_dict().values()])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_a_failure_within_leaves_no_set_behind() -> None:
    network = Flat()
    seen = surveyed()
    own = pseudo_labels(seen.alignment)
    broken = own._replace(points2=torch.full_like(own.points2, torch.nan))
    with pytest.raises(AdaptError, match=r"step 1: the loss is nan; lower lr \(now 0\.05\)"):
        calibrate(
            network,
            seen,
            SITE,
            schedule=TWO_STEPS,
            recipe=SMALL,
            labels=broken,
            judge=own,
        )
    assert sets_of(network) == {}


def test_every_pair_gets_the_labels_of_another_when_they_are_shuffled() -> None:
    number = torch.arange(5.0)[:, None, None].expand(5, 2, 2)
    points, valid = number[..., None].expand(5, 2, 2, 3), number >= 0
    mixed = shuffled(Labels(points, valid, points, valid))
    found = mixed.points1[:, 0, 0, 0]
    assert sorted(found.tolist()) == [0, 1, 2, 3, 4]
    assert bool((found != torch.arange(5)).all())


@pytest.mark.parametrize(("views", "many"), [(3, None), (5, 3), (4, 0)])
def test_views_that_do_not_suffice_are_refused(views: int, many: int | None) -> None:
    with pytest.raises(AdaptError, match="needs at least 3 images to learn from and 1"):
        held_out_views(views, many)


def test_no_labels_at_all_are_refused_by_name() -> None:
    network = Flat()
    seen = surveyed()
    none = torch.zeros_like(seen.alignment.weights[:, 0], dtype=torch.bool)
    points = torch.zeros(*none.shape, 3)
    empty = Labels(points, none, points, none)
    with pytest.raises(AdaptError, match="no pair of the views to calibrate on has a label"):
        calibrate(network, seen, SITE, recipe=SMALL, labels=empty)
    with pytest.raises(AdaptError, match="no pair of the held-out views has a label"):
        calibrate(network, seen, SITE, recipe=SMALL, judge=empty)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(AdaptError, match="lr=0 is not allowed: above 0"):
        Schedule(lr=0)
    with pytest.raises(AdaptError, match="batch=0 and epochs=10 are at least 1"):
        Schedule(batch=0)
    with pytest.raises(AdaptError, match=r"last_lr=0\.1 lies from 0 to lr"):
        Schedule(last_lr=0.1)


def test_at_the_start_nothing_changes_and_heads_and_mlps_get_no_gradient() -> None:
    network = RandomDust3r().build()
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        before = network(images[:1], images[1:])
    made = attach(network, RECIPE, RandomDust3r.default_sites)
    after: Pair = network(images[:1], images[1:])
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one, two)
    known = torch.ones(1, 32, 48, dtype=torch.bool)
    labels = Labels(torch.rand(1, 32, 48, 3) + 1, known, torch.rand(1, 32, 48, 3) + 1, known)
    confidence_loss(after, labels).backward()
    own = {id(p) for p in made.parameters()}
    for name, parameter in network.named_parameters():
        if id(parameter) not in own:
            assert parameter.grad is None, name
    assert all(p.grad is not None for n, p in made.named_parameters() if n.endswith(".B"))
