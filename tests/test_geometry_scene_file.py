"""A scene's record that says what cannot be is refused with its file's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.scene_file import FEATURES, read_scene
from polyadapt.tests.calibration_cases import FOCAL, HEIGHT, SITE, WIDTH, Flat, FlatBackbone

pytestmark = pytest.mark.slow

RECORD = {
    "task": "scene calibration",
    "backbone": FlatBackbone().to_json(),
    "size": [HEIGHT, WIDTH],
    "space": "log",
    "name": "hills",
    "focal": FOCAL,
} | dict.fromkeys(("mu", "gate", "cut", "before", "after"), 0.5)


def _written(path: Path, **changes: object) -> Path:
    made = attach(Flat(), LoRA(rank=1), SITE)
    made.extra = RECORD | changes
    made.head = {FEATURES: torch.ones(2, 3)}
    made.save(path)
    return path


def test_a_record_that_can_be_is_read(tmp_path: Path) -> None:
    scene, _ = read_scene(_written(tmp_path / "a.safetensors", focal=None, mu=1))
    assert (scene.focal, scene.mu, scene.size) == (None, 1, (HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate", "high"),
        ("mu", None),
        ("space", "linear"),
        ("name", 3),
        ("focal", -1.0),
        ("focal", "long"),
        ("size", [0, 16]),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(
    name: str, value: object, tmp_path: Path
) -> None:
    path = _written(tmp_path / "a.safetensors", **{name: value})
    with pytest.raises(AdaptError, match=rf"a\.safetensors: a scene's {name} is .*, which cannot"):
        read_scene(path)


def test_a_size_that_is_no_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="lacks or misstates"):
        read_scene(_written(tmp_path / "a.safetensors", size=[1, 2, 3]))
