"""Images that make no scene, asked of the small network with its own weights: one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.connected import require_connected
from polyadapt.geometry3d.pointmaps import Pair
from polyadapt.geometry3d.predictions import Predictions
from polyadapt.geometry3d.scenes.camouflage import camouflaged
from polyadapt.tests.command_cases import Run, command
from polyadapt.tests.scene_files import save_images

pytestmark = pytest.mark.slow

WORDS = ("--backbone", "small", "--focal", "64", "--sweeps", "3")


@pytest.fixture
def reconstruct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    words = ("--out", str(tmp_path / "found"), *WORDS)
    return command(capsys, "geometry3d", "reconstruct", *words)


def test_images_of_different_places_are_refused(tmp_path: Path, reconstruct: Run) -> None:
    images = torch.stack([camouflaged(seed, 1).images[0] for seed in (40, 41, 42)])
    line = reconstruct(save_images(images, tmp_path / "apart")).line()
    assert "0.png overlaps no other image as far as the network is sure" in line
    assert not (tmp_path / "found").exists()


def test_an_image_of_another_place_is_named(tmp_path: Path, reconstruct: Run) -> None:
    images = torch.cat([camouflaged(40, 3).images, camouflaged(42, 1).images])
    line = reconstruct(save_images(images, tmp_path / "one")).line()
    assert "3.png: no overlap with the rest" in line


def test_images_without_texture_are_refused(tmp_path: Path, reconstruct: Run) -> None:
    shades = torch.tensor([0.3, 0.4, 0.5])[:, None, None, None].expand(-1, 3, 48, 64)
    line = reconstruct(save_images(shades, tmp_path / "blank")).line()
    assert "it needs texture, and cameras that stand apart" in line


def test_a_scene_in_grey_is_reconstructed(tmp_path: Path, reconstruct: Run) -> None:
    code, said, _ = reconstruct(save_images(camouflaged(40, 3).images, tmp_path / "grey", "L"))
    assert code == 0
    assert said.startswith("3 views, ")


def _said(sure: list[tuple[int, int]], views: int) -> Predictions:
    """Pairs that are sure of all their pixels, among all pairs."""
    edges = torch.tensor([[i, j] for i in range(views) for j in range(views) if i != j])
    high = torch.tensor([5.0 if (i, j) in sure else 1.0 for i, j in edges.tolist()])
    confidence = high[:, None, None].expand(-1, 2, 2)
    points = torch.zeros(len(edges), 2, 2, 3)
    return Predictions(edges, Pair(points, confidence + 5, points, confidence))


def test_images_may_be_joined_by_a_chain_in_either_order_but_not_in_two_pieces() -> None:
    names = ["a", "b", "c", "d"]
    require_connected(_said([(0, 1), (2, 1), (3, 2)], 4), names)
    with pytest.raises(AdaptError, match=r"^c, d: no overlap with the rest"):
        require_connected(_said([(0, 1), (2, 3)], 4), names)
    with pytest.raises(AdaptError, match=r"^a overlaps no other image .*, nor does any other"):
        require_connected(_said([], 4), names)
