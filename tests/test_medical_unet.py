"""The U-Net on patches: what it sees, how it is trained, and that it learns generated vessels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, nn

from polyadapt.core import AdaptError
from polyadapt.tests.medical_cases import SPARSE
from polyadapt.vision.medical.data import Case, GeneratedVessels
from polyadapt.vision.medical.losses import DiceCE
from polyadapt.vision.medical.metrics import score
from polyadapt.vision.medical.unet import (
    PatchUNet,
    Pixels,
    pairs,
    patches,
    prepared,
    segment,
    train,
)

SMALL = PatchUNet(channels=(4, 8), side=16, batch=3)


def vessels(pictures: int = 2, side: int = 64, how: Any = SPARSE) -> list[Case]:
    data = GeneratedVessels(pictures, 0, 0, side, side, vessels=how)
    data.setup()
    return data.cases("train")


def test_light_and_contrast_of_a_region_do_not_matter() -> None:
    pattern = np.random.default_rng(0).integers(0, 60, size=(48, 48, 3)).astype(np.uint8)
    dark, bright = prepared(pattern, window=1 / 4), prepared(pattern + np.uint8(150), window=1 / 4)
    assert torch.allclose(dark, bright, atol=1e-4)
    ramp = np.repeat(np.arange(48, dtype=np.uint8)[:, None, None] * 2, 48, axis=1).repeat(3, axis=2)
    # In the middle of an even slope a value is the mean of those around it.
    assert float(prepared(ramp, window=1 / 4)[:, 12:36].abs().max()) < 1.0
    assert prepared(ramp).shape == (3, 48, 48)


def test_a_value_is_measured_in_deviations_of_those_around_it() -> None:
    pixels = np.zeros((9, 9, 3), dtype=np.uint8)
    pixels[4, 4] = 90
    # Of 9 values one is 90: mean 10, deviation sqrt(900 - 100) = 28.28; (90 - 10) / (28.28 + 4).
    assert float(prepared(pixels, window=1 / 3)[0, 4, 4]) == pytest.approx(80 / 32.284, abs=1e-3)


def test_patches_are_places_of_a_picture_with_its_mask_in_any_of_eight_positions() -> None:
    places = torch.arange(40 * 50.0).view(1, 40, 50)
    source = patches([(places.repeat(3, 1, 1), places)], SMALL, Generator().manual_seed(0))
    steps = set()
    for _ in range(20):
        seen, marked = next(source)
        assert (seen.shape, marked.shape) == ((3, 3, 16, 16), (3, 1, 16, 16))
        assert torch.equal(seen[:, :1], marked)
        for patch in marked[:, 0]:
            assert len(patch.unique()) == 16 * 16
            corner = patch[0, 0]
            steps.add((float(patch[0, 1] - corner), float(patch[1, 0] - corner)))
    assert steps == {pair for s in (1, -1) for t in (50, -50) for pair in ((s, t), (t, s))}


def test_small_pictures_are_padded_to_a_patch() -> None:
    ((seen, marked),) = pairs(vessels(1, side=10), SMALL)
    assert (seen.shape, marked.shape) == ((3, 16, 16), (1, 16, 16))
    assert not seen[:, 10:].any()
    pixels = vessels(1, side=10)[0].read()[0].pixels
    assert segment(SMALL.build(0).eval(), pixels, SMALL).shape == (10, 10)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_steps_are_repeatable_and_another_seed_draws_other_patches() -> None:
    given, loss = pairs(vessels(), SMALL), DiceCE(batch=True)

    def trained(seed: int) -> list[float]:
        return train(SMALL.build(0), given, SMALL, loss, seed=seed, steps=3)

    first = trained(1)
    assert len(first) == 3
    assert first == pytest.approx(trained(1), rel=1e-5)
    assert first != pytest.approx(trained(2), rel=1e-5)


def test_a_limit_of_time_ends_training_with_the_network_ready_to_use() -> None:
    net = SMALL.build(0)
    before = weights(net)
    losses = train(net, pairs(vessels(), SMALL), SMALL, DiceCE(), seed=0, cpu_seconds=0.2)
    assert losses
    assert not net.training
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


@pytest.mark.parametrize("limits", [{}, {"steps": 1, "cpu_seconds": 1.0}])
def test_one_limit_is_needed(limits: dict[str, Any]) -> None:
    with pytest.raises(AdaptError, match="give steps or cpu_seconds"):
        train(SMALL.build(0), [], SMALL, DiceCE(), seed=0, **limits)


def test_a_side_that_no_grid_covers_is_refused() -> None:
    with pytest.raises(AdaptError, match="side=100 is not allowed: a positive multiple of 32"):
        PatchUNet(side=100)


@pytest.mark.slow
def test_it_learns_vessels_in_a_few_steps_and_finds_them_in_another_picture() -> None:
    settings = PatchUNet(channels=(8, 16, 32), side=32)
    cases = vessels(4, side=128)
    net = settings.build(seed=0)
    losses = train(net, pairs(cases[:3], settings), settings, DiceCE(batch=True), seed=0, steps=120)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    picture, target = cases[3].read()
    found: Pixels = (segment(net, picture.pixels, settings) > 0).numpy().astype(np.uint8)
    assert score(found, target, overlap_only=True).dice > 0.6
