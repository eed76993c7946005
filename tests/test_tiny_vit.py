"""The tiny ViT: timm's class, packaged weights, and the seeded script that made them."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import timm.data
import torch
from PIL.ImageFont import FreeTypeFont
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from polyadapt.core.errors import AdaptError
from polyadapt.vision import glyphs as glyphs_module
from polyadapt.vision.glyphs import (
    CANVAS,
    CLASSES,
    HELD_OUT_FONTS,
    TRAINING_FONTS,
    Glyphs,
    render_letters,
)
from polyadapt.vision.pretrain_tiny import normalised, pretrain
from polyadapt.vision.tiny_vit import PRETRAINING_HEAD, WEIGHTS, ConvStem, tiny_vit


@pytest.fixture(scope="module")
def two_fonts() -> Glyphs:
    return Glyphs(["DejaVuSans", "cmr10"])


def packaged_classifier() -> nn.Module:
    head = nn.Linear(96, len(CLASSES))
    stored = load_file(WEIGHTS)
    head.load_state_dict({n: stored[PRETRAINING_HEAD + n] for n in ("weight", "bias")})
    return nn.Sequential(tiny_vit(), head).eval()


def test_the_tiny_vit_is_timms_class_with_390240_parameters() -> None:
    model = tiny_vit(pretrained=False)
    stem = (3 * 9 + 1) * 24 + (24 * 9 + 1) * 48 + (48 * 9 + 1) * 96 + 2 * (24 + 48)
    block = 97 * 288 + 97 * 96 + 97 * 384 + 385 * 96 + 2 * 192
    assert type(model) is VisionTransformer
    assert sum(p.numel() for p in model.parameters()) == 390_240
    assert stem + 96 + 17 * 96 + 3 * block + 192 == 390_240


def test_the_packaged_weights_load_strictly_and_stay_under_four_megabytes() -> None:
    stored = load_file(WEIGHTS)
    model = tiny_vit()
    head = {PRETRAINING_HEAD + "weight", PRETRAINING_HEAD + "bias"}
    assert set(stored) == set(model.state_dict()) | head
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert WEIGHTS.stat().st_size < 4_000_000


def test_features_are_finite_and_change_with_the_image() -> None:
    with torch.inference_mode():
        features = tiny_vit().eval()(torch.stack([torch.full((3, 24, 24), v) for v in (-1.0, 1)]))
    assert features.shape == (2, 96)
    assert features.isfinite().all()
    assert (features[0] - features[1]).abs().max() > 0.1


def test_timm_finds_the_preprocessing() -> None:
    config = timm.data.resolve_model_data_config(tiny_vit(pretrained=False))
    assert config["input_size"] == (3, 24, 24)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bilinear"


def test_train_mode_changes_no_frozen_value_and_no_output() -> None:
    model, images = tiny_vit(), torch.randn(4, 3, 24, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(model.train()(images), model.eval()(images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_image_of_another_size_is_refused_by_name() -> None:
    with pytest.raises(AdaptError, match=r"images are \(28, 28\): the tiny ViT takes \(24, 24\)"):
        tiny_vit(pretrained=False)(torch.zeros(1, 3, 28, 28))


def test_a_patch_size_that_the_stem_cannot_make_is_refused() -> None:
    with pytest.raises(AdaptError, match="patches of 4 px"):
        ConvStem(img_size=24, patch_size=4)


def test_a_missing_weight_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("polyadapt.vision.tiny_vit.WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(AdaptError, match=r"no weight file gone\.safetensors"):
        tiny_vit()


def test_only_the_52_letters_are_drawn_and_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def record(letter: str, font: FreeTypeFont) -> Tensor:
        drawn.append(letter)
        return torch.zeros(CANVAS, CANVAS)

    monkeypatch.setattr(glyphs_module, "_draw", record)
    render_letters(["DejaVuSans"])
    assert drawn == list(string.ascii_letters)
    assert "".join(CLASSES) == string.ascii_uppercase


def test_both_cases_share_a_class() -> None:
    letters = render_letters(["DejaVuSans"])[0]
    small, capital = letters[:, CLASSES.index("O")]
    other = letters[1, CLASSES.index("T")]
    assert (small - capital).abs().mean() < 0.5 * (small - other).abs().mean()


def test_held_out_fonts_are_not_trained_on() -> None:
    assert len(TRAINING_FONTS) == 20
    assert len(HELD_OUT_FONTS) == 2
    assert not set(HELD_OUT_FONTS) & set(TRAINING_FONTS)


def test_glyphs_depend_on_the_generator_only(two_fonts: Glyphs) -> None:
    torch.manual_seed(1)
    images, labels = two_fonts.sample(300, Generator().manual_seed(5))
    torch.manual_seed(2)
    again, same_labels = two_fonts.sample(300, Generator().manual_seed(5))
    others, _ = two_fonts.sample(300, Generator().manual_seed(6))
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(images, others)


def test_glyphs_are_bright_on_dark_and_of_26_classes(two_fonts: Glyphs) -> None:
    images, labels = two_fonts.sample(1000, Generator().manual_seed(0))
    border = torch.cat([images[..., 0, :], images[..., -1, :]], -1)
    assert images.shape == (1000, 1, 24, 24)
    assert images.min() >= 0
    assert images.max() <= 1
    assert border.mean() < images[..., 8:16, 8:16].mean()
    assert labels.unique().tolist() == list(range(26))


def test_pretraining_twice_writes_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("polyadapt.vision.pretrain_tiny.TRAINING_FONTS", ("DejaVuSans", "cmr10"))
    monkeypatch.setattr("polyadapt.vision.pretrain_tiny.HELD_OUT_FONTS", ("cmss10",))
    monkeypatch.setattr("polyadapt.vision.pretrain_tiny._EVALUATED", 50)
    first, second, other = (tmp_path / f"{n}.safetensors" for n in ("first", "second", "other"))
    found = pretrain(first, seed=3, steps=3)
    torch.manual_seed(99)  # what the process drew before must not matter
    assert pretrain(second, seed=3, steps=3) == found
    pretrain(other, seed=4, steps=3)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    assert set(found) == {"training_fonts", "held_out_fonts"}
    assert "step 3 of 3" in capsys.readouterr().out
    monkeypatch.setattr("polyadapt.vision.tiny_vit.WEIGHTS", first)
    assert tiny_vit()(torch.zeros(1, 3, 24, 24)).isfinite().all()
    assert sorted(tmp_path.iterdir()) == sorted([first, second, other])  # no temporary file left


@pytest.mark.parametrize(
    ("settings", "message"), [({"steps": 0}, "steps=0"), ({"threads": 0}, "threads=0")]
)
def test_pretraining_refuses_nonsense(
    tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(AdaptError, match=message):
        pretrain(tmp_path / "w.safetensors", **settings)


def test_pretraining_names_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="does not exist"):
        pretrain(tmp_path / "nowhere" / "w.safetensors", steps=1)


def test_the_packaged_weights_name_letters_of_fonts_they_never_saw() -> None:
    images, labels = Glyphs(HELD_OUT_FONTS).sample(600, Generator().manual_seed(20_240))
    with torch.inference_mode():
        right = packaged_classifier()(normalised(images)).argmax(1) == labels
    assert right.double().mean() > 0.75
