"""The segmentation task: what it trains, its measures at the pictures' own size, its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.core import (
    SALT,
    SSAM,
    BitFit,
    FullFineTuning,
    HeadOnly,
    LayerNormTuning,
    LoRA,
    Recipe,
    sets_of,
)
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.store import read_file
from polyadapt.tests.sam_models import noisy
from polyadapt.tests.segmentation_cases import (
    SIDE,
    SPEC,
    batch_for,
    losses_of,
    shift,
    task_of,
    vessels,
)
from polyadapt.vision.medical.describe import Segmenter, describe
from polyadapt.vision.medical.losses import CentreLineDice, DiceCE
from polyadapt.vision.medical.mask_head import DECODER
from polyadapt.vision.medical.task import Segmentation
from polyadapt.vision.medical.text_prompt import ClipText
from polyadapt.vision.medical.view import View

PLACES = ["attention", "mlp"]
METHODS: dict[str, tuple[Recipe, list[str] | None]] = {
    "SALT": (SALT(top=3, rank=2), PLACES),
    "SALT, paper": (SALT(top=3, rank=2, clamp="full", init="paper"), PLACES),
    "SSAM": (SSAM(), PLACES),
    "LoRA": (LoRA(rank=2), None),
    "BitFit": (BitFit(), None),
    "LayerNormTuning": (LayerNormTuning(), None),
    "FullFineTuning": (FullFineTuning(), None),
}
by_method = pytest.mark.parametrize("method", METHODS)


# What is trained


@by_method
def test_the_loss_of_every_method_falls(method: str) -> None:
    """By the adapters alone: the head is frozen."""
    recipe, at = METHODS[method]
    task = task_of(recipe, at=at)
    torch.manual_seed(1)
    noisy(task.head.requires_grad_(False))  # as drawn, a decoder answers nothing
    losses = losses_of(task, steps=20)
    assert losses[-1] < losses[0] - 0.005


def test_the_head_alone_learns_too() -> None:
    losses = losses_of(task_of(HeadOnly()), steps=20)
    assert losses[-1] < losses[0] - 0.05


def trained_names(task: Segmentation) -> list[str]:
    task.training_loss(batch_for(task)).backward()
    return [n for n, p in task.named_parameters() if p.grad is not None and bool(p.grad.any())]


def test_salt_trains_nothing_of_clip_the_prompt_encoder_or_the_patch_embedding() -> None:
    """Check 10 of the card, with all that SALT's code trains and its text prompt."""
    with pytest.MonkeyPatch.context() as patched:  # the tower itself is no part of the task
        patched.setattr(ClipText, "features", lambda self, names: torch.ones(1, 8))
        task = task_of(
            SALT(top=3, rank=2, init="paper"),
            at=PLACES,
            parts=["norms", "encoder_norms", "positions"],
            prompt="text",
        )
    names = sorted(trained_names(task))
    head = [name.removeprefix("head.") for name in names if name.startswith("head.")]
    adapters = [name for name in names if name not in {f"head.{own}" for own in head}]
    assert len(adapters) == 4 * 2 * 4  # a, b, X, Y of four layers in each of two blocks
    assert all(name.startswith("backbone.polyadapt_drawer.") for name in adapters)
    own = [name for name in head if not name.startswith("copies.")]
    assert own == [
        f"prompt.{name}" for name in ("affine.bias", "affine.weight", "norm.bias", "norm.weight")
    ]
    copied = [name.removeprefix("copies.") for name in head if name not in own]
    assert all("norm" in name or name == "vision_encoder/pos_embed" for name in copied)
    assert {name.split("/")[0] for name in copied} == {"vision_encoder", "mask_decoder"}
    for frozen in ("clip", "prompt_encoder", "patch_embed", "neck", "features"):
        assert frozen not in " ".join(names)


def test_a_method_s_own_sites_are_those_of_the_encoder() -> None:
    for recipe in (BitFit(), FullFineTuning(), LayerNormTuning()):
        paths = {site.path.split(".")[0] for site in task_of(recipe).adapters.sites}
        assert paths == {"vision_encoder"}
    assert not task_of(HeadOnly()).adapters.sites


def test_sites_are_the_attention_or_places_or_patterns() -> None:
    def sites(at: Any) -> set[str]:
        return {site.name.partition("layers.0.")[2] for site in task_of(at=at).adapters.sites} - {
            ""
        }

    assert sites(None) == sites("attention") == {"attn.qkv", "attn.proj"}
    assert sites(["mlp", "vision_encoder.layers.*.attn.qkv[q,v]"]) == {
        "mlp.lin1",
        "mlp.lin2",
        "attn.qkv[q]",
        "attn.qkv[v]",
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "box"}, "prompt='box' is not allowed: class, text, none"),
        ({"val_scores": "some"}, "val_scores='some' is not allowed: dice, all"),
        ({"view": View.sam(64)}, f"view.side=64 is not the backbone's img_size={SIDE}"),
        ({"parts": ["head"]}, "'head' is no part of a SAM: tokens"),
        ({"at": "attn.q"}, "nothing in SegmentAnything is called 'attn.q'"),
        ({"at": "mask_decoder.transformer.layers.0.mlp.lin1"}, "lin1.weight is adapted by the set"),
        ({"structure": ""}, "structure"),
    ],
)
def test_what_does_not_fit_together_is_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError) as refused:
        task_of(**settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


# Losses and measures


def test_the_loss_is_that_of_the_shares_of_pixels_or_of_whole_ones() -> None:
    for fractions in (True, False):
        task = task_of(fractions=fractions, loss=CentreLineDice(ce=1.0))
        batch = batch_for(task)
        between = bool(((batch.mask > 0) & (batch.mask < 1)).any())
        assert not between  # the picture is as wide as the view: nothing is resized
        expected = CentreLineDice(ce=1.0)(task(batch.image), batch.mask)
        assert torch.equal(task.training_loss(batch), expected)


def test_fractions_are_asked_of_the_data() -> None:
    data = vessels(1)
    data.view = View.sam(16)  # half as wide
    data.fractions = True
    shares = data.pictures("train")[0].mask
    data.fractions = False
    whole = data.pictures("train")[0].mask
    assert set(shares.unique().tolist()) > {0.0, 1.0}
    assert torch.equal(whole, (shares >= 0.5).float())


# The file


@by_method
def test_a_file_is_the_same_segmentation_again(method: str, tmp_path: Path) -> None:
    recipe, at = METHODS[method]
    task = task_of(recipe, at=at, whole_box=True, loss=DiceCE(ce=0.5))
    shift(task)
    task.eval().save_adapter(tmp_path / "a.safetensors")
    batch = batch_for(task)
    again = Segmentation.from_file(tmp_path / "a.safetensors").eval()
    with torch.no_grad():
        logits = task.logits(batch)
        assert float(logits.std()) > 0
        torch.testing.assert_close(again.logits(batch), logits)
        assert again.loss == task.loss
        assert again.adapters.extra == task.adapters.extra
    segmenter = Segmenter(tmp_path / "a.safetensors")
    torch.testing.assert_close(segmenter.logits(batch.image), logits)


@by_method
def test_merged_is_what_it_was(method: str) -> None:
    recipe, at = METHODS[method]
    task = task_of(recipe, at=at)
    shift(task)
    task.eval()
    batch = batch_for(task)
    with torch.no_grad():
        logits = task.logits(batch)
        task.adapters.merge()
        torch.testing.assert_close(task.logits(batch), logits, atol=1e-4, rtol=1e-4)


def test_a_file_says_everything(tmp_path: Path) -> None:
    task = task_of(parts=["tokens"], structure="nerve", whole_box=True, fractions=False)
    task.save_adapter(tmp_path / "a.safetensors")
    about = describe(tmp_path / "a.safetensors")
    assert about.backbone == SPEC
    assert about.view == View.sam(SIDE)
    assert (about.parts, about.token, about.whole_box) == (("tokens",), "class", True)
    assert (about.structure, about.fractions, about.loss) == ("nerve", False, DiceCE())
    assert sorted(about.head) == [
        "copies.mask_decoder/iou_token/weight",
        "copies.mask_decoder/mask_tokens/weight",
        "prompt.token",
    ]
    assert read_file(tmp_path / "a.safetensors").extra["classes"] == ["nerve"]


def test_a_picture_of_any_size_has_logits_of_its_own_size(tmp_path: Path) -> None:
    task = task_of()
    shift(task)
    task.eval().save_adapter(tmp_path / "a.safetensors")
    segmenter = Segmenter(tmp_path / "a.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    native = segmenter.native(pixels)
    assert native.shape == (50, 70)
    with torch.no_grad():
        square = task(task.view(pixels)[None])
    assert torch.allclose(task.view.native(square, (50, 70))[0, 0], native, atol=1e-5)


@pytest.mark.parametrize("key", ["backbone", "view", "parts", "prompt", "classes", "loss"])
def test_a_file_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    task = task_of()
    del task.adapters.extra[key]
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match=key):
        describe(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "image classification"}, "holds no segmentation: task 'image classification'"),
        ({"prompt": {"token": "text", "whole_box": False}}, "its prompt 'text' is unknown, or not"),
        ({"prompt": {"token": "point", "whole_box": False}}, "its prompt 'point' is unknown"),
        ({"classes": ["a", "b"]}, "too many values"),
        ({"loss": {"loss": "L1"}}, "names no loss"),
        ({"view": {"side": 32}}, "view: "),
    ],
)
def test_a_file_that_misstates_something_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    task = task_of()
    task.adapters.extra |= changes
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match=said):
        describe(tmp_path / "a.safetensors")


def test_a_head_of_other_parts_than_the_file_says_is_refused(tmp_path: Path) -> None:
    task = task_of(parts=["tokens"])
    task.adapters.extra["parts"] = [*DECODER]
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(AdaptError, match=r"copies\.mask_decoder/.* is missing"):
        Segmenter(tmp_path / "a.safetensors")


def test_from_a_file_no_set_of_the_start_is_left(tmp_path: Path) -> None:
    task_of(set_name="eyes").save_adapter(tmp_path / "a.safetensors")
    again = Segmentation.from_file(tmp_path / "a.safetensors")
    assert list(sets_of(again.backbone)) == ["default"]
    assert isinstance(again.adapters.recipe, LoRA)
