"""The baselines of few-shot adaptation give the numbers that their formulas give by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.vlm.baselines import TipAdapter, accuracy, linear_probe, zero_shot

pytestmark = pytest.mark.slow

# Two classes along the axes, and an image between them that leans to the first.
CLASSES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
IMAGE = torch.tensor([[0.8, 0.6]])


def clouds(per_class: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised features around one axis per class."""
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 6, generator=Generator().manual_seed(seed))
    return F.normalize(4 * torch.eye(6)[labels] + noise, dim=1), labels


def test_zero_shot_logits_are_a_hundred_times_the_cosines() -> None:
    torch.testing.assert_close(zero_shot(IMAGE, CLASSES), torch.tensor([[80.0, 60.0]]))


def test_accuracy_is_the_share_of_rows_whose_largest_logit_is_the_labels() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 1])) == 0.5


def test_tip_adapter_adds_the_votes_of_the_training_images() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    cache = TipAdapter.of(keys, torch.tensor([0, 1, 1]), CLASSES, alpha=2.0, beta=5.0)
    # Affinities 0.8, 0.6, 0.96; votes exp(-5 * 0.2) against exp(-5 * 0.4) + exp(-5 * 0.04).
    first, second = math.exp(-1.0), math.exp(-2.0) + math.exp(-0.2)
    wanted = torch.tensor([[80 + 2 * first, 60 + 2 * second]])
    torch.testing.assert_close(cache.logits(IMAGE), wanted)


def test_tip_adapter_with_alpha_zero_is_zero_shot() -> None:
    cache = TipAdapter.of(CLASSES, torch.tensor([0, 1]), CLASSES, alpha=0.0)
    assert torch.equal(cache.logits(IMAGE), zero_shot(IMAGE, CLASSES))


def test_one_step_of_tip_adapter_f_moves_a_key_along_the_gradient_by_hand() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cache = TipAdapter.of(keys, torch.tensor([0, 1]), CLASSES, beta=1.0, scale=1.0)
    tuned = cache.fine_tuned(IMAGE, torch.tensor([1]), epochs=1, lr=0.1)
    # The loss falls where key 1 comes nearer to the image, so AdamW adds lr * sign to it, after
    # shrinking it by its decay of 1e-2 * lr; key 0 goes the other way. (eps is 1e-4.)
    votes = torch.exp(-(1 - IMAGE @ keys.t()))
    share = (IMAGE + votes).softmax(1)[0, 0]
    slope = share * votes[0, 1] * IMAGE[0]
    wanted = keys[1] * (1 - 1e-3) + 0.1 * slope / (slope + 1e-4)
    torch.testing.assert_close(tuned.keys[1], wanted)
    assert bool((tuned.keys[0] < keys[0]).all())


def test_tip_adapter_f_fits_its_images_better_and_leaves_the_cache_alone() -> None:
    images, labels = clouds(8)
    cache = TipAdapter.of(images, labels, torch.eye(6)[[1, 2, 0]], scale=2.0)
    before, keys = F.cross_entropy(cache.logits(images), labels), cache.keys.clone()
    tuned = cache.fine_tuned(images, labels, epochs=30, lr=1e-2)
    assert F.cross_entropy(tuned.logits(images), labels) < before / 2
    assert torch.equal(cache.keys, keys)
    assert not tuned.keys.requires_grad


def test_tip_adapter_f_is_a_function_of_its_seed() -> None:
    images, labels = clouds(8)
    cache = TipAdapter.of(images, labels, torch.eye(6)[:3], scale=2.0)
    one, same, other = (
        cache.fine_tuned(images, labels, epochs=2, batch_size=5, seed=seed).keys
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("per_class", [1, 6])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_probe_tells_clouds_apart(per_class: int, classes: int) -> None:
    probe = linear_probe(*clouds(per_class, classes))
    images, labels = clouds(20, classes, seed=1)
    assert probe.weight.shape == (classes, 6)
    assert accuracy(probe.logits(images), labels) > 0.9


def test_a_linear_probe_is_where_the_gradient_of_its_loss_vanishes() -> None:
    images, labels = clouds(1)
    probe = linear_probe(images, labels)
    weight = (probe.weight / 6**0.5).requires_grad_()  # of the scaled features sqrt(6) f
    logits = 6**0.5 * images @ weight.t() + probe.bias
    loss = 0.316 * F.cross_entropy(logits, labels, reduction="sum") + weight.square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3 < weight.abs().max()


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 2, 2]])
def test_a_probe_of_one_class_or_of_classes_without_images_is_refused(labels: list[int]) -> None:
    with pytest.raises(AdaptError, match="two classes or more"):
        linear_probe(torch.eye(3), torch.tensor(labels))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(AdaptError, match="beta=-1"):
        TipAdapter.of(CLASSES, torch.tensor([0, 1]), CLASSES, beta=-1)
    cache = TipAdapter.of(CLASSES, torch.tensor([0, 1]), CLASSES)
    with pytest.raises(AdaptError, match="epochs=0"):
        cache.fine_tuned(CLASSES, torch.tensor([0, 1]), epochs=0)
