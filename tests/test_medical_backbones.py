"""SAM backbones by name: other sizes, the authors' checkpoints, and where adapters sit on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.tiny_vit import Attention
from torch import Tensor

from polyadapt.core import SALT, LoRA, attach, select
from polyadapt.core.errors import AdaptError
from polyadapt.core.recipe import Recipe
from polyadapt.tests.sam_models import DECODER, PATCH, SIZE, VISION, WINDOW, images, noisy, sam
from polyadapt.vision.medical.backbones import (
    Backbone,
    LiteMedSAM,
    SAMCheckpoint,
    TransformersSAM,
)
from polyadapt.vision.medical.lite_medsam import WindowAttention, our_weights, untrained
from polyadapt.vision.medical.official_names import transformers_name
from polyadapt.vision.medical.sam import SegmentAnything
from polyadapt.vision.medical.sam_sizes import absolute, relative, resize, set_prompt_size
from polyadapt.vision.medical.transformers_sam import from_official
from polyadapt.vision.medical.view import View

GRID = SIZE // PATCH
OWN = {key: DECODER[key] for key in ("mlp_dim", "num_attention_heads")}
TINY = TransformersSAM(pretrained=False, options=VISION, decoder=OWN)


# Settings


def test_a_random_sam_is_the_same_when_built_again() -> None:
    first, again = TINY.build(), Backbone.from_json(TINY.to_json()).build()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not first.training


def test_the_random_encoder_of_other_pictures_returns_other_embeddings() -> None:
    """transformers' own range of 1e-10 would make it blind."""
    model = TINY.build()
    a, b = model.encode(images())
    assert (a - b).abs().mean() > 0.01


def test_a_backbone_says_what_pictures_it_was_trained_on() -> None:
    model = TINY.build()
    assert TINY.view(model) == View.sam(SIZE)
    assert SAMCheckpoint(file="x").view(model) == View.sam(SIZE)
    assert SAMCheckpoint(file="x", medsam=True).view(model) == View.medsam(SIZE)
    assert LiteMedSAM().view(model) == View.medsam(SIZE)


BAD_SETTINGS: list[tuple[Backbone, str]] = [
    (TransformersSAM(name="no/such-sam"), "cannot load transformers' 'no/such-sam' .without a net"),
    (TransformersSAM(options={"depth": 1}), "brings its own settings: leave out options, decoder"),
    (
        TransformersSAM(pretrained=False, options={"wide": 8}),
        "SamVisionConfig has no setting 'wide'",
    ),
    (TransformersSAM(pretrained=False, decoder={"deep": 8}), "SamMaskDecoderConfig has no setting"),
    (
        TransformersSAM(pretrained=False, options={"hidden_size": "x"}),
        "Field 'hidden_size' expected",
    ),
    (TransformersSAM(pretrained=False, options={"hidden_size": 9}), "cannot load a SAM with"),
    (TransformersSAM(pretrained=False, img_size=36, options=VISION, decoder=OWN), "multiple of 8"),
    (LiteMedSAM(img_size=30), "img_size 30 is not allowed: a positive multiple of 4"),
    (SAMCheckpoint(file="no.pth"), "cannot load the checkpoint 'no.pth': .*No such file"),
]


@pytest.mark.parametrize(("settings", "line"), BAD_SETTINGS)
def test_a_backbone_that_cannot_be_made_is_refused_in_one_line(
    settings: Backbone, line: str
) -> None:
    with pytest.raises(AdaptError, match=line) as error:
        settings.build()
    assert "\n" not in str(error.value)


# Other sizes


@torch.no_grad()
def test_at_its_own_size_a_sam_is_the_same_bit_for_bit() -> None:
    model, seen = sam(), images()
    before = model(seen)
    assert torch.equal(resize(model, SIZE)(seen), before)


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 32, 40, 96])
def test_a_sam_of_another_size_has_its_shapes(size: int) -> None:
    model = resize(sam(), size)
    assert model.img_size == size
    grid = size // PATCH
    assert model.encode(images(1, size)).shape == (1, 16, grid, grid)
    logits = model(images(1, size))
    assert logits.shape == (1, 1, size, size)
    assert logits.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_a_sam_of_vit_b_width_at_512_embeds_32_by_32_places() -> None:
    """With two of its twelve blocks: one that attends in windows, one everywhere."""
    two = {"num_hidden_layers": 2, "global_attn_indexes": [1]}
    model = TransformersSAM(pretrained=False, img_size=512, options=two).build()
    found = model.encode(images(1, 512))
    assert found.shape == (1, 256, 32, 32)
    assert found.isfinite().all()
    assert [len(layer.attn.rel_pos_h) for layer in _layers(model)] == [27, 63]


def _layers(model: SegmentAnything) -> Any:
    return model.vision_encoder.layers


def test_windows_and_their_tables_stay() -> None:
    model, small = sam(), resize(sam(), SIZE // 2)
    before, (windowed, everywhere) = _layers(model)[0], _layers(small)
    assert (windowed.window_size, everywhere.window_size) == (WINDOW, 0)
    assert windowed.attn.rel_pos_h.shape == before.attn.rel_pos_h.shape
    assert len(everywhere.attn.rel_pos_h) == 2 * (GRID // 2) - 1


@torch.no_grad()
def test_resampled_distances_are_what_sams_own_attention_would_make_of_the_old_ones() -> None:
    model = sam()
    old = _layers(model)[1].attn
    tokens = torch.randn(1, GRID // 2, GRID // 2, VISION["hidden_size"])
    expected = old(tokens)[0]  # it resamples a table that does not fit, at every call
    new = _layers(resize(model, SIZE // 2))[1].attn
    torch.testing.assert_close(new(tokens)[0], expected)


@torch.no_grad()
def test_resampled_positions_are_read_at_the_same_places_of_the_scene() -> None:
    """A wave across the scene is that wave on the smaller grid; a cropped table is another."""

    def wave(grid: int) -> Tensor:
        middle = (torch.arange(grid) + 0.5) / grid
        return torch.cos(math.pi * middle)[:, None].expand(grid, grid)

    model = sam()
    table = "vision_encoder.pos_embed"
    model.get_parameter(table)[:] = wave(GRID)[..., None]
    small = resize(model, SIZE // 2).get_parameter(table)[0, ..., 0]
    off = (small - wave(GRID // 2)).abs().max()
    assert off < 0.05
    assert (wave(GRID)[: GRID // 2, : GRID // 2] - wave(GRID // 2)).abs().max() > 10 * off


def test_resampled_tables_are_rounded_once_lest_machines_find_others() -> None:
    """A set of the decoder alone names all frozen weights by their bits."""
    torch.manual_seed(0)
    wide = torch.randn(1, 14, 14, 8)
    assert torch.equal(absolute(wide, 9), absolute(wide.double(), 9).float())
    assert torch.equal(relative(wide[0, 0], 5), relative(wide[0, 0].double(), 5).float())
    assert absolute(wide.half(), 9).dtype == torch.float16


@torch.no_grad()
def test_a_box_means_the_same_share_of_a_smaller_picture() -> None:
    """Its half pixel apart: SAM counts from the middles of pixels."""
    big, small = sam(), resize(sam(), SIZE // 2)
    small.prompt_encoder.load_state_dict(big.prompt_encoder.state_dict())
    box = torch.tensor([[[7.5, 15.5, 31.5, 47.5]]])
    half = (box + 0.5) / 2 - 0.5
    expected, _ = big.prompt_encoder(None, None, box, None)
    found, _ = small.prompt_encoder(None, None, half, None)
    torch.testing.assert_close(found, expected)


# The authors' checkpoints

NAMES = {  # ours -> theirs, from the published modules of segment-anything
    "vision_encoder.pos_embed": "image_encoder.pos_embed",
    "vision_encoder.patch_embed.projection.": "image_encoder.patch_embed.proj.",
    "vision_encoder.neck.conv1.": "image_encoder.neck.0.",
    "vision_encoder.neck.layer_norm1.": "image_encoder.neck.1.",
    "vision_encoder.neck.conv2.": "image_encoder.neck.2.",
    "vision_encoder.neck.layer_norm2.": "image_encoder.neck.3.",
    "vision_encoder.layers.": "image_encoder.blocks.",
    "prompt_encoder.shared_embedding.positional_embedding": (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    ),
    "prompt_encoder.point_embed.": "prompt_encoder.point_embeddings.",
    "prompt_encoder.mask_embed.conv1.": "prompt_encoder.mask_downscaling.0.",
    "prompt_encoder.mask_embed.layer_norm1.": "prompt_encoder.mask_downscaling.1.",
    "prompt_encoder.mask_embed.conv2.": "prompt_encoder.mask_downscaling.3.",
    "prompt_encoder.mask_embed.layer_norm2.": "prompt_encoder.mask_downscaling.4.",
    "prompt_encoder.mask_embed.conv3.": "prompt_encoder.mask_downscaling.6.",
    "mask_decoder.upscale_conv1.": "mask_decoder.output_upscaling.0.",
    "mask_decoder.upscale_layer_norm.": "mask_decoder.output_upscaling.1.",
    "mask_decoder.upscale_conv2.": "mask_decoder.output_upscaling.3.",
}


def _official(name: str) -> str:
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    if name.startswith(("mask_decoder.output_hyper", "mask_decoder.iou_prediction_head.")):
        name = name.replace(".layers.0.", ".layers.1.")
        return name.replace(".proj_in.", ".layers.0.").replace(".proj_out.", ".layers.2.")
    return name.replace("layer_norm", "norm")


def test_the_authors_names_go_to_transformers_and_none_is_lost() -> None:
    ours = set(sam().state_dict())
    theirs = {_official(name) for name in ours}
    assert len(theirs) == len(ours)
    assert "mask_decoder.transformer.layers.1.norm4.weight" in theirs
    assert "image_encoder.blocks.1.norm2.bias" in theirs
    assert {transformers_name(name) for name in theirs} == ours


def _checkpoint() -> tuple[SegmentAnything, dict[str, Tensor]]:
    """A SAM with the eight heads of the authors' decoder, and what they would store of it."""
    decoder = {"mlp_dim": 8, "layer_norm_eps": 1e-5}
    model = noisy(TransformersSAM(pretrained=False, options=VISION, decoder=decoder).build())
    return model, {_official(name): tensor for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_a_checkpoint_of_the_authors_is_the_sam_that_it_was(tmp_path: Path) -> None:
    model, stored = _checkpoint()
    torch.save(stored, tmp_path / "sam_vit_t.pth")
    settings = SAMCheckpoint(file=str(tmp_path / "sam_vit_t.pth"))
    seen = images()
    assert torch.equal(settings.build()(seen), model(seen))
    small = SAMCheckpoint(file=settings.file, img_size=SIZE // 2).build()
    half = images(1, SIZE // 2)
    assert torch.equal(small(half), resize(model, SIZE // 2)(half))


Damage = Callable[[dict[str, Tensor]], Any]
DAMAGED: dict[str, tuple[Damage, str]] = {
    "lacking": (
        lambda s: s.pop("image_encoder.blocks.0.norm1.bias"),
        r"the checkpoint lacks vision_encoder.layers.0.layer_norm1.bias \(and 0 more",
    ),
    "more": (lambda s: s.update(head=torch.zeros(1)), "this SAM has no head"),
    "other": (dict.clear, "no SAM of segment-anything's: it has not all of .'image_encoder"),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGED.values(), ids=DAMAGED)
def test_a_checkpoint_of_something_else_is_refused(damage: Damage, line: str) -> None:
    _, stored = _checkpoint()
    damage(stored)
    with pytest.raises(AdaptError, match=line):
        from_official(stored)


# LiteMedSAM's encoder


@torch.no_grad()
def test_window_attention_is_timms_with_q_k_v_stacked() -> None:
    width, heads, window = 320, 10, 7
    theirs = noisy(Attention(width, width // heads, heads, 1, (window, window)), by=0.02)
    prefix = "image_encoder.layers.3.blocks.0.attn."
    stored = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    ours = WindowAttention(width, heads, window)
    renamed = {name.split(".attn.")[1]: tensor for name, tensor in our_weights(stored).items()}
    ours.load_state_dict(renamed)
    x = torch.randn(3, window**2, width)
    torch.testing.assert_close(ours(x), theirs(x))


@torch.no_grad()
def test_window_attention_sees_new_biases_in_evaluation_too() -> None:
    attention = WindowAttention(8, 2, 3).eval()
    x = torch.randn(1, 9, 8)
    before = attention(x)
    attention.attention_biases[:, 0] += 5
    assert not torch.allclose(attention(x), before)


# Where adapters sit


def _lite() -> SegmentAnything:
    model = noisy(untrained(), by=0.01)
    set_prompt_size(model, 16, 4)
    return model.eval()


KINDS: dict[str, tuple[Backbone, Callable[[], SegmentAnything], int, int]] = {
    "transformers": (TINY, sam, 2, SIZE),
    "LiteMedSAM": (LiteMedSAM(), _lite, 10, 16),
}
kinds = pytest.mark.parametrize(("settings", "build", "blocks", "size"), KINDS.values(), ids=KINDS)
RECIPES: list[tuple[str, Recipe]] = [
    ("transformers", LoRA(rank=2)),
    ("transformers", SALT(top=2, rank=2)),
    ("LiteMedSAM", LoRA(rank=2)),
]


@kinds
def test_salts_layers_are_four_per_block_and_two_of_the_neck(
    settings: Backbone, build: Callable[[], SegmentAnything], blocks: int, size: int
) -> None:
    model = build()
    found = select(model, settings.sites())
    assert len(found) == 4 * blocks
    assert {site.kind for site in found} == {"linear"}
    neck = select(model, settings.sites(["neck"]))
    assert [(site.kind, site.shape[0]) for site in neck] == [("conv2d", neck[0].shape[0])] * 2
    assert len(
        select(model, [p.replace("{qkv,proj}", "qkv[q,v]") for p in settings.sites()[:1]])
    ) == (2 * blocks)


def test_a_place_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(AdaptError, match="'head' is no place in a SAM: attention, mlp, neck are"):
        TINY.sites(["head"])


@pytest.mark.parametrize(("kind", "recipe"), RECIPES)
def test_every_adapter_learns_and_merged_is_unmerged(kind: str, recipe: Recipe) -> None:
    settings, build, _, size = KINDS[kind]
    model, seen = build(), images(1, size)
    adapters = attach(model, recipe, settings.sites(["attention", "mlp", "neck"]), "organ")
    noisy(adapters, by=0.01)
    model(seen).square().mean().backward()
    assert [n for n, p in adapters.trained().items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        unmerged = model(seen)
        adapters.merge()
        merged = model(seen)
    assert (merged - unmerged).abs().max() < 1e-5 * unmerged.abs().max()
