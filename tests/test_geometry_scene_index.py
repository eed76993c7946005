"""Scenes' sets: found by their images or their names, resident together, and never guessed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyadapt.core import LoRA, activate, attach, sets_of
from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.backbones import Backbone, RandomDust3r
from polyadapt.geometry3d.scene_file import Scene, read_scene, save_scene
from polyadapt.geometry3d.scene_index import SceneIndex, features_of

BACKBONE = RandomDust3r(encoder_depth=1, depth=1, head="linear")
SIZE = (32, 48)
SCENE = Scene(
    name="red",
    backbone=BACKBONE,
    size=SIZE,
    focal=None,
    space="log",
    mu=0.02,
    gate=0.5,
    cut=1.5,
    before=0.2,
    after=0.1,
)
COLOURS = {"red": (0.9, 0.1, 0.1), "blue": (0.1, 0.1, 0.9)}


def _views(colour: tuple[float, ...], seed: int, many: int = 4) -> Tensor:
    """Images of one colour with some noise."""
    noise = torch.rand(many, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    return 0.8 * torch.tensor(colour)[:, None, None] + 0.2 * noise


def _stored(folder: Path, name: str, backbone: Backbone = BACKBONE, file: str = "") -> Path:
    """A scene's file whose set is not trained but moved."""
    network = backbone.build()
    made = attach(network, LoRA(rank=2), "**.attn.qkv", name=name)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * len(name))
    path = folder / f"{file or name}.safetensors"
    scene = replace(SCENE, name=name, backbone=backbone)
    save_scene(made, path, scene, features_of(network, _views(COLOURS.get(name, (0, 1, 0)), 0)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in COLOURS:
        _stored(tmp_path, name)
    return tmp_path


def test_what_a_scene_says_of_itself_comes_back(tmp_path: Path) -> None:
    found, features = read_scene(_stored(tmp_path, "red"))
    assert found == SCENE
    assert features.shape == (4, 32)
    assert found.rule().space == "log"


@pytest.mark.parametrize("name", ["red", "blue"])
def test_a_scene_is_found_by_other_images_of_it(folder: Path, name: str) -> None:
    assert SceneIndex(folder).find(_views(COLOURS[name], seed=7, many=3)) == name


def test_features_are_those_of_the_untouched_network(folder: Path) -> None:
    index, images = SceneIndex(folder), _views(COLOURS["red"], seed=7)
    before = features_of(index.network, images)
    index.use("red")
    assert torch.equal(features_of(index.network, images), before)


def test_images_of_no_scene_are_not_guessed(folder: Path) -> None:
    with pytest.raises(AdaptError, match=r"the images are like no scene in .*; name one of"):
        SceneIndex(folder).find(_views((0.1, 0.9, 0.1), seed=3))


def test_images_that_fit_two_scenes_are_not_guessed(tmp_path: Path) -> None:
    _stored(tmp_path, "red")
    path = _stored(tmp_path, "blue", file="other")
    red, features = read_scene(tmp_path / "red.safetensors")
    network = BACKBONE.build()
    made = attach(network, LoRA(rank=2), "**.attn.qkv", name="again")
    save_scene(made, path, replace(red, name="again"), features)
    with pytest.raises(AdaptError, match=r"the images may show '(again|red)' .*: name one"):
        SceneIndex(tmp_path).find(_views(COLOURS["red"], seed=0))


def test_several_scenes_are_resident_and_switched(folder: Path) -> None:
    index = SceneIndex(folder)
    one, two = _views(COLOURS["red"], 1, 1), _views(COLOURS["blue"], 1, 1)
    with torch.no_grad():
        base = index.network(one, two).points1
        index.use("red")
        red = index.network(one, two).points1
        index.use("blue")
        blue = index.network(one, two).points1
        assert sorted(sets_of(index.network)) == ["blue", "red"]
        index.use("red")
        assert torch.equal(index.network(one, two).points1, red)
        with activate(index.network, "blue"):
            assert torch.equal(index.network(one, two).points1, blue)
        index.use(None)
        assert torch.equal(index.network(one, two).points1, base)
    assert not torch.equal(red, base)
    assert not torch.equal(red, blue)


def test_a_name_that_is_not_there_is_refused(folder: Path) -> None:
    index = SceneIndex(folder)
    with pytest.raises(AdaptError, match=r"no scene 'green' in .*: blue, red"):
        index.use("green")


def test_two_files_of_one_scene_are_refused(folder: Path) -> None:
    _stored(folder, "red", file="twice")
    with pytest.raises(AdaptError, match="are both of scene 'red'"):
        SceneIndex(folder)


def test_scenes_of_different_backbones_are_refused(folder: Path) -> None:
    _stored(folder, "green", replace(BACKBONE, seed=1))
    with pytest.raises(AdaptError, match=r"'blue' and 'green' in .* are of different backbones"):
        SceneIndex(folder)


def test_a_folder_without_scenes_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match=r"there is no scene's file \(\*\.safetensors\) in"):
        SceneIndex(tmp_path)
    network = BACKBONE.build()
    made = attach(network, LoRA(rank=2), "**.attn.qkv")
    made.save(tmp_path / "plain.safetensors")
    with pytest.raises(AdaptError, match="holds no calibrated scene: task None"):
        SceneIndex(tmp_path)


def test_a_record_that_lacks_something_is_refused(tmp_path: Path) -> None:
    network = BACKBONE.build()
    made = attach(network, LoRA(rank=2), "**.attn.qkv")
    made.extra = SCENE.to_json()
    path = tmp_path / "scene.safetensors"
    made.save(path)
    with pytest.raises(AdaptError, match="lacks or misstates 'features' of a calibrated scene"):
        read_scene(path)
    made.extra.pop("mu")
    made.save(path)
    with pytest.raises(AdaptError, match=r"lacks or misstates .*'mu' of a calibrated scene"):
        read_scene(path)
