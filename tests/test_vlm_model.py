"""One interface over open_clip's and transformers' image-text models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from polyadapt.core.errors import AdaptError
from polyadapt.core.images.preprocessing import Preprocessing
from polyadapt.tests.vlm_models import (
    CONTEXT,
    KINDS,
    SIZE,
    VOCABULARY,
    clip,
    images,
    seeded,
    size_of,
    timm_and_bert,
    tokens,
    transformers_clip,
    transformers_siglip,
    wordwise,
)
from polyadapt.vlm.model import CLIP_MEAN, image_text_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_length_one_and_the_width_that_is_said(kind: str) -> None:
    model = image_text_of(KINDS[kind]())
    size = size_of(kind)
    assert model.preprocessing.size == (size, size)
    assert model.context == CONTEXT
    with torch.no_grad():
        found = model.image_features(images(2, size)), model.text_features(tokens())
    for features, count in zip(found, (2, 3), strict=True):
        assert features.shape == (count, model.width)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(count))


def test_scaled_cosines_are_open_clips_own_logits() -> None:
    model = clip()
    ours = image_text_of(model)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)  # type: ignore[operator]
        expected = model.get_logits(images(), tokens())[0]  # type: ignore[operator]
        cosines = ours.image_features(images()) @ ours.text_features(tokens()).T
    torch.testing.assert_close(ours.scale * cosines, expected)
    assert ours.bias is None


def test_scaled_cosines_and_bias_are_siglips_own_logits() -> None:
    model = transformers_siglip()
    ours = image_text_of(model)
    with torch.no_grad():
        model.logit_scale.fill_(0.5)  # type: ignore[operator]
        model.logit_bias.fill_(-2.0)  # type: ignore[operator]
        read = tokens() % (VOCABULARY - 1)
        expected = model(input_ids=read, pixel_values=images()).logits_per_image
        cosines = ours.image_features(images()) @ ours.text_features(read).T
    assert ours.bias == -2.0
    torch.testing.assert_close(ours.scale * cosines + ours.bias, expected)


def test_a_text_that_just_fits_is_read_and_a_longer_one_is_refused() -> None:
    model = image_text_of(clip(vocabulary=49408))
    assert model.context == CONTEXT
    six = "a photo of a cat ."  # six words between start and end
    found = model.tokenize([six, "dog"])
    assert found.dtype == torch.int64
    assert (found != 0).sum(1).tolist() == [8, 3]
    with pytest.raises(AdaptError, match=r"the text 'a photo of a big cat .' is longer than the 8"):
        model.tokenize(["dog", "a photo of a big cat ."])
    with pytest.raises(AdaptError) as error:
        model.tokenize(["very " * 200])
    assert len(str(error.value)) < 130


def test_odd_characters_and_an_empty_text_are_texts() -> None:
    model = image_text_of(clip(vocabulary=49408))
    found = model.tokenize(["", "naïve 猫", "!"])
    assert found.shape == (3, CONTEXT)
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("make", [transformers_clip, timm_and_bert])
def test_a_tokenizer_of_transformers_or_of_open_clip_can_be_given(make: Any) -> None:
    model = image_text_of(make(), wordwise())
    found = model.tokenize(["a photo of a cat", "dog"])
    assert found.tolist() == [[2, 3, 4, 2, 5, 1, 0, 0], [6, 1, 0, 0, 0, 0, 0, 0]]
    model.tokenize(["a a a a a a a"])
    with pytest.raises(AdaptError, match="is longer than the 8 tokens"):
        model.tokenize(["a a a a a a a a"])


def test_a_hugging_face_tower_reads_as_far_as_its_tokenizer_says() -> None:
    from open_clip.tokenizer import HFTokenizer, get_clean_fn

    theirs = HFTokenizer.__new__(HFTokenizer)
    theirs.tokenizer_mode, theirs.context_length, theirs.strip_sep_token = "", 5, False
    theirs.tokenizer, theirs.clean_fn = wordwise(), get_clean_fn("whitespace")
    model = image_text_of(timm_and_bert(), theirs)
    assert model.tokenize(["a  cat"]).tolist() == [[2, 5, 1, 0, 0]]
    with pytest.raises(AdaptError, match="is longer than the 5 tokens"):
        model.tokenize(["a photo of a cat"])


def test_texts_without_a_tokenizer_are_refused() -> None:
    for make in (clip, timm_and_bert, transformers_clip):
        with pytest.raises(AdaptError, match="came without a tokenizer: pass tokenizer="):
            image_text_of(make()).tokenize(["a cat"])
    with pytest.raises(AdaptError, match="texts are a list of at least one, not 'cat'"):
        image_text_of(clip(vocabulary=49408)).tokenize("cat")


@pytest.mark.parametrize("shape", [(40, 60), (32, 32), (75, 33)])
def test_images_are_seen_as_open_clip_sees_them(shape: tuple[int, int]) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    model: Any = clip()
    for options in ({}, {"resize_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4)}):
        model.visual.preprocess_cfg = {"size": SIZE, "interpolation": "bicubic", **options}
        expected = image_transform_v2(PreprocessCfg(size=SIZE, **options), is_train=False)(image)
        torch.testing.assert_close(image_text_of(model).preprocessing(image), expected)


def test_preprocessing_is_what_the_family_was_trained_with_unless_given() -> None:
    assert image_text_of(transformers_clip()).preprocessing.mean == CLIP_MEAN
    assert image_text_of(transformers_siglip()).preprocessing.crop_mode == "squash"
    other = Preprocessing(size=(SIZE, SIZE), mean=(0.1,) * 3, std=(1.0,) * 3)
    assert image_text_of(clip(), preprocessing=other).preprocessing == other
    model: Any = clip()
    model.visual.preprocess_cfg = {"resize_mode": "longest"}
    with pytest.raises(AdaptError, match="resized by their longest side"):
        image_text_of(model)


def test_a_half_precision_model_is_asked_in_its_dtype_and_answers_in_float32() -> None:
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
    from open_clip.model import convert_weights_to_lp

    eye = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=SIZE)
    reader = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=12, heads=2, layers=1)
    model = seeded(lambda: CLIP(8, eye, reader, cast_dtype=torch.bfloat16))
    exact = image_text_of(model).image_features(images())
    convert_weights_to_lp(model, torch.bfloat16)
    half = image_text_of(model)
    assert next(model.parameters()).dtype == torch.float32  # embeddings are kept
    assert half.text_features(tokens()).dtype == torch.float32
    torch.testing.assert_close(half.image_features(images()), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, SIZE, SIZE), r"images are \[b, 3, height, width\], not \[3, 32, 32\]"),
        (torch.zeros(2, 1, SIZE, SIZE), r"not \[2, 1, 32, 32\]"),
    ],
)
def test_other_shapes_are_refused(wrong: Tensor, message: str) -> None:
    model = image_text_of(clip())
    with pytest.raises(AdaptError, match=message):
        model.image_features(wrong)
    with pytest.raises(AdaptError, match=r"tokens are \[t, 8\], not \[3, 9\]"):
        model.text_features(tokens(context=9))


def test_another_class_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(AdaptError, match="Linear is no image-text model that we know: open_clip's"):
        image_text_of(nn.Linear(2, 2))
