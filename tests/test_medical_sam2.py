"""SAM 2 behind the interface of SAM: it answers as transformers' model, and is adapted alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Sam2Model

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.tests.sam_models import images, noisy
from polyadapt.vision.medical.backbones import Backbone, TransformersSAM2
from polyadapt.vision.medical.mask_head import PARTS, ClassToken, MaskHead
from polyadapt.vision.medical.sam import Prompt, SegmentAnything

HIERA: dict[str, Any] = {
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 24, 32],
    "blocks_per_stage": [1, 2, 1, 1],
    "num_attention_heads_per_stage": [1, 2, 2, 4],
    "window_size_per_stage": [4, 2, 2, 2],
    "global_attention_blocks": [2],
    "window_positional_embedding_background_size": [3, 3],
    "image_size": 64,
}
DECODER = {"hidden_size": 16, "mlp_dim": 8, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
TINY = TransformersSAM2(pretrained=False, options=HIERA, decoder=DECODER)


def sam2() -> SegmentAnything:
    return noisy(TINY.build())


def theirs(ours: SegmentAnything) -> Sam2Model:
    """transformers' model of the same tensors, which here takes the first mask, too."""
    from transformers import Sam2Config

    encoder: Any = ours.vision_encoder
    config = Sam2Config(
        vision_config=encoder.config.to_dict()
        | {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64},
        mask_decoder_config={**DECODER, "dynamic_multimask_via_stability": False},
    )
    model: Sam2Model = Sam2Model(config).eval()
    state = ours.state_dict()
    places = state["prompt_encoder.shared_embedding.positional_embedding"]
    state["shared_image_embedding.positional_embedding"] = places
    model.load_state_dict(state, strict=True)
    return model


BOX = torch.tensor([[[4.0, 8, 40, 50]], [[0, 0, 20, 30]]])
POINT = torch.tensor([[[[9.0, 5]]], [[[30, 40]]]])


@pytest.mark.parametrize(
    "prompt",
    [Prompt(), Prompt(boxes=BOX), Prompt(points=POINT), Prompt(boxes=BOX, points=POINT)],
    ids=["nothing", "box", "point", "both"],
)
@torch.no_grad()
def test_the_masks_are_transformers_own(prompt: Prompt) -> None:
    ours, seen = sam2(), images()
    labels = None if prompt.points is None else torch.ones(2, 1, 1, dtype=torch.int64)
    wanted = theirs(ours)(
        pixel_values=seen,
        input_boxes=prompt.boxes,
        input_points=prompt.points,
        input_labels=labels,
        multimask_output=False,
    ).pred_masks[:, :, 0]
    embeddings = ours.encode(seen)
    assert embeddings.shape == (2, 4 * 16, 4, 4)
    torch.testing.assert_close(ours.decode(embeddings, prompt), wanted, rtol=1e-4, atol=1e-4)
    assert ours(seen, prompt).shape == (2, 1, 64, 64)


def test_the_usual_places_are_there_and_lora_on_them_acts() -> None:
    ours, seen = sam2(), images()
    before = ours(seen).detach()
    sites = attach(ours, LoRA(rank=2), at=TINY.sites(["attention", "mlp", "neck"]), name="a")
    assert len(sites.sites) == 5 * 4 + 4
    torch.testing.assert_close(ours(seen), before)
    for parameter in sites.parameters():
        parameter.data.normal_()
    assert not torch.allclose(ours(seen), before, atol=1e-3)


@pytest.mark.parametrize("part", PARTS)
def test_a_head_trains_each_of_its_parts(part: str) -> None:
    ours = sam2().requires_grad_(False)
    head = MaskHead(ours, parts=[part], prompt=ClassToken(ours))
    head(ours, images()).square().mean().backward()
    assert len(head.copies) > 0
    for name, copy in head.copies.items():
        if "k_proj/bias" not in name:  # a softmax does not see what all keys share
            assert copy.grad is not None
            assert copy.grad.abs().sum() > 0, name


def test_a_head_takes_embeddings_that_are_known() -> None:
    ours, seen = sam2(), images()
    head = MaskHead(ours, prompt=ClassToken(ours), whole_box=True)
    known: Tensor = ours.encode(seen)
    torch.testing.assert_close(head(ours, seen, embeddings=known), head(ours, seen))


@torch.no_grad()
def test_other_sizes_need_whole_windows() -> None:
    larger = TransformersSAM2(pretrained=False, img_size=96, options=HIERA, decoder=DECODER).build()
    assert larger(images(size=96)).shape == (2, 1, 96, 96)
    with pytest.raises(AdaptError, match="img_size 80 is not allowed: a positive multiple of 32"):
        TransformersSAM2(pretrained=False, img_size=80, options=HIERA, decoder=DECODER).build()


def test_what_is_no_sam_2_is_refused(tmp_path: Path) -> None:
    from transformers import SamConfig, SamModel

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32}
    SamModel(SamConfig(vision_config=tiny)).save_pretrained(tmp_path)
    with pytest.raises(AdaptError, match="a model of the kind 'sam', not sam2 or sam2_video"):
        TransformersSAM2(name=str(tmp_path)).build()
    with pytest.raises(AdaptError, match="has no setting 'depth'"):
        TransformersSAM2(pretrained=False, options={"depth": 3}).build()
    with pytest.raises(AdaptError, match="leave out options"):
        TransformersSAM2(options=HIERA).build()


@torch.no_grad()
def test_a_saved_model_is_loaded_and_one_with_a_tensor_less_is_refused(tmp_path: Path) -> None:
    ours, seen = sam2(), images()
    model = theirs(ours)
    model.save_pretrained(tmp_path)
    settings = TransformersSAM2(name=str(tmp_path), img_size=64)
    assert Backbone.from_json(settings.to_json()) == settings
    torch.testing.assert_close(settings.build()(seen), ours(seen))
    whole = model.state_dict()
    less = {name: t for name, t in whole.items() if name != "no_memory_embedding"}
    model.save_pretrained(tmp_path, state_dict=less)
    with pytest.raises(AdaptError, match="lacks no_memory_embedding"):
        settings.build()
