"""Images and prompts become masks as in transformers' SAM; a head trains parts of it apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyadapt.core import LoRA, attach
from polyadapt.core.errors import AdaptError
from polyadapt.tests.sam_models import DIM, PATCH, SIZE, WIDTH, images, noisy, sam, sam_model
from polyadapt.vision.medical.mask_head import (
    DECODER,
    PARTS,
    ClassToken,
    MaskHead,
    TextToken,
    part_names,
)
from polyadapt.vision.medical.sam import Prompt, SegmentAnything
from polyadapt.vision.medical.text_prompt import ClipText

BOXES = torch.tensor([[[4.0, 8, 40, 50]], [[0, 0, 20, 63]]])
POINTS = torch.tensor([[[[9.0, 30], [50, 2]]], [[[1, 1], [33, 40]]]])
LABELS = torch.tensor([[[1, 0]], [[1, -10]]])
PROMPTS = {
    "nothing": Prompt(),
    "boxes": Prompt(boxes=BOXES),
    "points": Prompt(points=POINTS, labels=LABELS),
    "both": Prompt(boxes=BOXES, points=POINTS, labels=LABELS),
}
TINY_CLIP = {
    "embed_dim": 6,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 16},
    "text_cfg": {"context_length": 16, "width": 12, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_the_logits_are_those_of_transformers(prompt: Prompt) -> None:
    model, seen = sam_model(), images()
    theirs = model(
        seen,
        input_boxes=prompt.boxes,
        input_points=prompt.points,
        input_labels=prompt.labels,
        multimask_output=False,
    ).pred_masks[:, :, 0]
    ours = sam(model)
    torch.testing.assert_close(ours.decode(ours.encode(seen), prompt), theirs)


@torch.no_grad()
def test_points_without_labels_lie_on_the_object() -> None:
    model, seen = sam(), images()
    said = Prompt(points=POINTS, labels=torch.ones(2, 1, 2))
    assert torch.equal(model(seen, Prompt(points=POINTS)), model(seen, said))


@torch.no_grad()
def test_a_call_enlarges_the_low_resolution_to_the_images() -> None:
    model, seen = sam(), images()
    low = model.decode(model.encode(seen))
    assert low.shape == (2, 1, 4 * SIZE // PATCH, 4 * SIZE // PATCH)
    expected = F.interpolate(low, (SIZE, SIZE), mode="bilinear")
    assert torch.equal(model(seen), expected)
    assert torch.equal(model(seen, embeddings=model.encode(seen)), expected)


@torch.no_grad()
def test_several_masks_of_an_image_are_those_of_each_prompt_alone() -> None:
    model, seen = sam(), images()
    boxes = torch.stack([BOXES[:, 0], BOXES.flip(0)[:, 0]], dim=1)
    together = model(seen, Prompt(boxes=boxes))
    for mask in range(2):
        alone = model(seen, Prompt(boxes=boxes[:, [mask]]))
        torch.testing.assert_close(together[:, [mask]], alone)


@torch.no_grad()
def test_tokens_come_after_the_other_prompts_and_for_all_images_alike() -> None:
    model, seen = sam(), images()
    token = torch.randn(1, 3, DIM)
    shared = model(seen, Prompt(boxes=BOXES, tokens=token))
    assert torch.equal(shared, model(seen, Prompt(boxes=BOXES, tokens=token.repeat(2, 1, 1, 1))))
    assert not torch.allclose(shared, model(seen, Prompt(boxes=BOXES)))


BAD_PROMPTS = [
    (Prompt(boxes=torch.zeros(2, 4)), r"boxes of 2 images are \[2, m, 4\], not \[2, 4\]"),
    (Prompt(boxes=torch.zeros(1, 1, 4)), r"boxes of 2 images are \[2, m, 4\], not \[1, 1, 4\]"),
    (Prompt(points=torch.zeros(2, 1, 3)), r"points of 2 images are \[2, m, n, 2\]"),
    (Prompt(tokens=torch.zeros(1, 1, 3)), rf"tokens of 2 images are \[2, m, t, {DIM}\]"),
    (Prompt(labels=torch.ones(2, 1, 1)), "labels are one per point"),
    (Prompt(points=POINTS, labels=torch.ones(2, 1, 5)), "labels are one per point"),
    (Prompt(boxes=BOXES, tokens=torch.zeros(3, 1, DIM)), "not boxes for 1, tokens for 3"),
]


@pytest.mark.parametrize(("prompt", "line"), BAD_PROMPTS)
def test_a_prompt_of_another_shape_is_refused_in_one_line(prompt: Prompt, line: str) -> None:
    model = sam()
    with pytest.raises(AdaptError, match=line):
        model(images(), prompt)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, SIZE, SIZE), (3, SIZE, SIZE)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdaptError, match=rf"images are \[b, 3, {SIZE}, {SIZE}\], not"):
        sam()(torch.zeros(shape))


# The head


def test_an_untrained_head_is_the_frozen_sam_bit_for_bit() -> None:
    model, seen = sam(), images()
    head = MaskHead(model, parts=list(PARTS))
    assert torch.equal(head(model, seen, Prompt(boxes=BOXES)), model(seen, Prompt(boxes=BOXES)))


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_of_a_part_acts_and_the_sam_stays_frozen(part: str) -> None:
    model, seen = sam().requires_grad_(False), images()
    head = MaskHead(model, parts=[part], prompt=ClassToken(model))
    head(model, seen).square().mean().backward()
    silent = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    # A softmax does not see what all its logits have in common, nor the first block's zero queries.
    assert [n for n in silent if not n.endswith("k_proj/bias")] == []
    assert all(p.grad is None for p in model.parameters())


def test_a_change_in_the_head_acts_there_and_nowhere_else() -> None:
    model, seen = sam(), images()
    before = model(seen)
    head = MaskHead(model, parts=["tokens"])
    with torch.no_grad():
        head.copies["mask_decoder/mask_tokens/weight"].add_(1)
    assert not torch.allclose(head(model, seen), before)
    assert torch.equal(model(seen), before)


def test_the_decoders_parts_leave_out_what_cannot_act() -> None:
    model = sam()
    chosen = {name for part in DECODER for name in part_names(model, part)}
    decoder = {n for n, _ in model.named_parameters() if n.startswith("mask_decoder.")}
    left = {".".join(name.split(".")[1:3]) for name in decoder - chosen}
    others = {f"output_hypernetworks_mlps.{mask}" for mask in (1, 2, 3)}
    assert left == others | {f"iou_prediction_head.{p}" for p in ("proj_in", "layers", "proj_out")}


def test_the_norms_are_as_many_as_salts_code_trains() -> None:
    """4,608 in a decoder of width 256, and 4 c per block of an encoder of width c."""
    model = sam()
    counts = {p: sum(v.numel() for v in MaskHead(model, parts=[p]).copies.values()) for p in PARTS}
    assert counts["norms"] * 256 // DIM == 4_608
    assert counts["encoder_norms"] == 2 * 4 * WIDTH
    assert counts["positions"] == (SIZE // PATCH) ** 2 * WIDTH


def test_a_part_that_there_is_not_is_refused_by_name() -> None:
    model = sam()
    with pytest.raises(AdaptError, match="'head' is no part of a SAM: tokens, norms"):
        MaskHead(model, parts=["head"])
    bare = SegmentAnything(torch.nn.Identity(), model.prompt_encoder, model.mask_decoder)
    with pytest.raises(AdaptError, match="this SAM, of a Identity, has no 'positions'"):
        MaskHead(bare, parts=["positions"])


def test_adapters_and_head_learn_together() -> None:
    model, seen = sam(), images()
    adapters = attach(model, LoRA(rank=1), "vision_encoder.layers.*.attn.qkv")
    noisy(adapters)
    head = MaskHead(model, parts=["upscaling", "encoder_norms"], prompt=ClassToken(model))
    head(model, seen).square().mean().backward()
    trained = [*adapters.parameters(), *head.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_a_tensor_is_trained_by_the_set_or_by_the_head() -> None:
    model = sam()
    attach(model, LoRA(rank=1), "mask_decoder.transformer.layers.0.mlp.lin1", "organ")
    line = "transformer.layers.0.mlp.lin1.weight is adapted by the set 'organ': leave it out"
    with pytest.raises(AdaptError, match=line):
        MaskHead(model, parts=["transformer"])
    MaskHead(model, parts=["upscaling"])


def test_known_embeddings_are_refused_where_the_encoder_is_trained() -> None:
    model, seen = sam(), images()
    head = MaskHead(model, parts=["encoder_norms"])
    with pytest.raises(AdaptError, match="this head trains parts of the encoder"):
        head(model, seen, embeddings=model.encode(seen))


@torch.no_grad()
def test_a_head_on_a_sam_of_half_precision_answers_in_it() -> None:
    model = sam().bfloat16()
    head = MaskHead(model, prompt=ClassToken(model))
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    logits = head(model, images().bfloat16())
    assert logits.dtype is torch.bfloat16
    assert logits.isfinite().all()


def test_a_class_token_starts_as_the_mark_of_the_object_and_gives_a_mask_per_class() -> None:
    model = sam()
    token = ClassToken(model, classes=3)
    mark = model.get_parameter("prompt_encoder.point_embed.1.weight")
    assert torch.equal(token(), mark.expand(3, 1, DIM))
    assert MaskHead(model, prompt=token)(model, images()).shape == (2, 3, SIZE, SIZE)


@torch.no_grad()
def test_a_head_may_put_a_box_around_the_whole_square_where_none_is_given() -> None:
    model, seen = sam(), images()
    head = MaskHead(model, prompt=ClassToken(model, classes=3), whole_box=True)
    square = torch.tensor([0.0, 0, SIZE - 1, SIZE - 1]).expand(2, 3, 4)
    assert torch.equal(head(model, seen), head(model, seen, Prompt(boxes=square)))
    other = BOXES.expand(2, 3, 4)
    plain = MaskHead(model, prompt=ClassToken(model, classes=3))
    assert torch.equal(
        head(model, seen, Prompt(boxes=other)), plain(model, seen, Prompt(boxes=other))
    )


def test_of_a_text_token_the_affine_learns_and_the_features_travel() -> None:
    model, features = sam().requires_grad_(False), torch.randn(2, 5)
    head = MaskHead(model, parts=[], prompt=TextToken(model, features))
    logits: Tensor = head(model, images())
    assert logits.shape == (2, 2, SIZE, SIZE)
    logits.square().mean().backward()
    learned = {n for n, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {
        f"prompt.{n}" for n in ("affine.weight", "affine.bias", "norm.weight", "norm.bias")
    }
    assert torch.equal(head.state_dict()["prompt.features"], features)


def test_the_start_of_a_text_token_follows_the_runs_seed() -> None:
    model, features = sam(), torch.randn(1, 5)
    torch.manual_seed(3)
    first = TextToken(model, features)
    torch.rand(7)
    assert torch.equal(TextToken(model, features)(), first())


def test_text_features_come_from_open_clip_one_row_per_name() -> None:
    clip = ClipText(name="ViT-B-32", pretrained=None, template="a {}.", options=TINY_CLIP)
    found = clip.features(["vessel", "optic disc"])
    assert found.shape == (2, 6)
    assert not found.requires_grad
    torch.testing.assert_close(clip.features(["optic disc"]), found[1:])
    assert not torch.allclose(found[0], found[1])


def test_a_text_prompt_without_a_place_for_the_name_is_refused() -> None:
    with pytest.raises(AdaptError, match="template 'a vessel' is not allowed"):
        ClipText(template="a vessel").features(["vessel"])
    with pytest.raises(AdaptError, match="needs a list of class names, not 'vessel'"):
        ClipText().features("vessel")
    with pytest.raises(AdaptError, match="cannot load open_clip's 'ViT-B-33'"):
        ClipText(name="ViT-B-33").features(["vessel"])
