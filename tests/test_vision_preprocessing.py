"""What a backbone gets to see of an image, and which backbones there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import timm.data
import torch

from polyadapt.core.errors import AdaptError
from polyadapt.core.images.preprocessing import Augmentation, Preprocessing, vary
from polyadapt.tests.vision_cases import noise
from polyadapt.vision.backbones import Backbone, TimmBackbone, feature_width

WANTS = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("shape", [(32, 32), (50, 33), (33, 50), (100, 9)])
@pytest.mark.parametrize(
    ("crop_pct", "crop_mode", "interpolation"),
    [(0.9, "center", "bicubic"), (1.0, "center", "bilinear"), (0.95, "squash", "bicubic")],
)
def test_evaluation_sees_exactly_what_timm_s_own_transform_makes(
    shape: tuple[int, int], crop_pct: float, crop_mode: str, interpolation: str
) -> None:
    settings: dict[str, Any] = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    theirs = timm.data.create_transform((3, 28, 28), is_training=False, **settings)
    image = noise(0, *shape)
    assert torch.equal(Preprocessing(size=(28, 28), **settings)(image), theirs(image))


def test_preprocessing_is_the_backbone_s_and_follows_its_image_size() -> None:
    spec = TimmBackbone(name="vit_tiny_patch16_224", pretrained=False, img_size=32)
    wants = spec.preprocessing(spec.build())
    assert wants.size == (32, 32)
    assert wants.mean == (0.5, 0.5, 0.5)
    assert wants.crop_pct == 0.9
    assert Preprocessing.from_json(json.loads(json.dumps(wants.to_json()))) == wants


def test_imagenet_s_mode_keeps_the_size_and_changes_the_rest() -> None:
    wants = WANTS.imagenet()
    assert (wants.size, wants.crop_pct, wants.interpolation) == ((8, 8), 0.875, "bilinear")
    assert (wants.mean, wants.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_greys_become_three_channels_and_colours_one() -> None:
    one = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    grey = noise(0).convert("L")
    three = WANTS(grey)
    assert three.shape == (3, 8, 8)
    assert torch.equal(three[0], three[2])
    assert torch.equal(one(noise(0)), one(grey))


def test_a_backbone_of_one_channel_gets_one() -> None:
    spec = TimmBackbone(
        name="vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        options={"in_chans": 1, "depth": 1},
    )
    model = spec.build()
    wants = spec.preprocessing(model)
    assert model(wants(noise(0))[None]).shape == (1, feature_width(model))


@pytest.mark.parametrize("how", ["flip", "random_resized_crop"])
def test_a_training_view_is_a_function_of_seed_epoch_and_image(how: Augmentation) -> None:
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (3, 4)]
    views = {key: vary(WANTS, noise(0), how, key) for key in keys}
    torch.manual_seed(99)  # no global generator has a say
    assert all(torch.equal(vary(WANTS, noise(0), how, key), view) for key, view in views.items())
    expected = 2 if how == "flip" else len(keys)
    assert len({view.numpy().tobytes() for view in views.values()}) == expected


def test_flip_turns_about_half_of_the_images_and_nothing_else() -> None:
    straight = WANTS(noise(0))
    views = [vary(WANTS, noise(0), "flip", (0, 0, index)) for index in range(200)]
    turned = [torch.equal(view, straight.flip(2)) for view in views]
    kept = [torch.equal(view, straight) for view in views]
    assert sum(turned) + sum(kept) == 200
    assert 80 < sum(turned) < 120


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    assert torch.equal(vary(WANTS, noise(0), "none", (0, 5, 1)), WANTS(noise(0)))


def test_a_very_long_image_can_still_be_cropped() -> None:
    view = vary(WANTS, noise(0, 400, 2), "random_resized_crop", (0, 0, 0))
    assert view.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": (8,)}, "size"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5, 0.5, 0.0)}, "std"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_mode": "border"}, "center, squash"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        Preprocessing.from_json(WANTS.to_json() | change)


def test_preprocessing_with_a_missing_value_is_refused() -> None:
    with pytest.raises(AdaptError, match="'std'"):
        Preprocessing.from_json({k: v for k, v in WANTS.to_json().items() if k != "std"})


# Backbones


def test_random_weights_can_be_made_again_and_disturb_no_generator() -> None:
    spec = TimmBackbone(
        name="vit_tiny_patch16_224", pretrained=False, img_size=32, options={"depth": 1}
    )
    first = spec.build()
    state = torch.get_rng_state()
    again = Backbone.from_json(json.loads(json.dumps(spec.to_json()))).build()
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_spec_builds_timm_s_model_of_that_name(name: str) -> None:
    model = TimmBackbone(name=name, pretrained=False, img_size=32, options={"depth": 1}).build()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, feature_width(model)) == (1, 192)


def test_swin_has_pooled_features() -> None:
    options = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "window_size": 4}
    spec = TimmBackbone(
        name="swin_tiny_patch4_window7_224", pretrained=False, img_size=32, options=options
    )
    model = spec.build()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, feature_width(model)) == (2, 32)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TimmBackbone(name="vit_smal_patch16_224"), "nearest: vit_small_patch16_224"),
        (TimmBackbone(name="vit_small_patch16_224.none"), "Invalid pretrained tag"),
        (TimmBackbone(name="vit_small_patch16_18x2_224"), "No pretrained weights exist"),
        (
            TimmBackbone(name="vit_tiny_patch16_224", pretrained=False, options={"depht": 2}),
            "depht",
        ),
    ],
)
def test_a_backbone_that_timm_does_not_make_is_refused(spec: TimmBackbone, said: str) -> None:
    with pytest.raises(AdaptError, match=said) as refused:
        spec.build()
    assert "\n" not in str(refused.value)


def test_weights_that_cannot_be_fetched_are_an_error_and_not_random(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdaptError, match="could not be fetched") as refused:
        TimmBackbone(name="vit_tiny_patch16_224").build()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [{"backbone": "Bogus"}, {}, None, {"backbone": "TinyViT", "a": 1}])
def test_a_foreign_backbone_description_is_refused(data: object) -> None:
    with pytest.raises(AdaptError, match=r"Bogus|names no backbone|has the settings"):
        Backbone.from_json(data)


def test_every_kind_of_augmentation_is_tested_here() -> None:
    assert get_args(Augmentation) == ("none", "flip", "random_resized_crop")
