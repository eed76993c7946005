"""Image-text backbones by name: built again from plain settings, refused in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from polyadapt.core import select
from polyadapt.core.errors import AdaptError
from polyadapt.core.images.preprocessing import IMAGENET_MEAN
from polyadapt.tests.vlm_models import (
    CONTEXT,
    SIZE,
    VOCABULARY,
    images,
    tokens,
    transformers_clip,
    transformers_siglip,
    wordwise,
)
from polyadapt.vlm.backbones import Backbone, OfflinePair, OpenCLIP, TransformersCLIP
from polyadapt.vlm.names import sites_for
from polyadapt.vlm.split import SplitAttention

pytestmark = pytest.mark.slow  # whole runs

TINY: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {
        "layers": 1,
        "width": 16,
        "head_width": 8,
        "patch_size": 16,
        "image_size": SIZE,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 12,
        "heads": 2,
        "layers": 1,
    },
}


def _tiny(**changes: Any) -> OpenCLIP:
    settings: dict[str, Any] = {"name": "ViT-B-32", "pretrained": None, "options": TINY}
    return OpenCLIP(**settings | changes)


def test_a_random_model_is_the_same_when_built_again_and_leaves_the_callers_draws_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again = _tiny().build(), Backbone.from_json(_tiny().to_json()).build()
    assert torch.equal(torch.rand(1), expected)
    states = first.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(_tiny(seed=1).build().state_dict()["visual.proj"], first.visual.proj)  # type: ignore[arg-type, union-attr]
    assert not first.training


def test_towers_come_split_unless_asked_otherwise() -> None:
    whole, split = _tiny(split=False).build(), _tiny().build()
    assert not any(isinstance(module, SplitAttention) for module in whole.modules())
    assert sum(isinstance(module, SplitAttention) for module in split.modules()) == 2
    pairs = _tiny(split=False).image_text(whole), _tiny().image_text(split)
    with torch.no_grad():
        features = [pair.text_features(tokens()) for pair in pairs]
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=0)


def test_building_says_nothing_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger().level
    _tiny().build()
    assert not caplog.records
    assert logging.getLogger().level == level


def test_a_file_of_weights_is_loaded(tmp_path: Path) -> None:
    model = _tiny(split=False, seed=5).build()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    again = _tiny(pretrained=str(tmp_path / "clip.pt")).build()
    pairs = _tiny().image_text(model), _tiny().image_text(again)
    with torch.no_grad():
        features = [pair.image_features(images()) for pair in pairs]
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_tiny(name="ViT-B-33"), "open_clip has no model 'ViT-B-33'; nearest: ViT-B-32"),
        (_tiny(pretrained="opnai"), "no weights 'opnai' for 'ViT-B-32', and there is no such file"),
        (_tiny(pretrained="openai"), "another activation .*: name 'ViT-B-32-quickgelu'"),
        (
            _tiny(name="ViT-B-32-quickgelu", pretrained="laion2b_e16"),
            "has no weights 'laion2b_e16' for 'ViT-B-32-quickgelu'",
        ),
        (
            _tiny(options={"vision_cfg": {"wide": 8}}),
            "cannot load open_clip's 'ViT-B-32' with .*wide",
        ),
        (_tiny(name="local-dir:nowhere"), "cannot load open_clip's 'local-dir:nowhere'"),
        (_tiny(name="local-dir:here", pretrained="openai"), "brings its own weights: leave out"),
        (TransformersCLIP(name="./nowhere"), "cannot load transformers' './nowhere'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong: Backbone, message: str) -> None:
    with pytest.raises(AdaptError, match=message) as error:
        wrong.build()
    assert "\n" not in str(error.value)


def test_a_broken_file_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.pt").write_bytes(b"no weights")
    with pytest.raises(AdaptError, match=r"with the weights '.*clip.pt'"):
        _tiny(pretrained=str(tmp_path / "clip.pt")).build()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_of_transformers_brings_weights_tokenizer_and_preprocessing(
    kind: str, tmp_path: Path
) -> None:
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    model: Any = {"clip": transformers_clip, "siglip": transformers_siglip}[kind]()
    model.save_pretrained(tmp_path)
    wordwise().save_pretrained(tmp_path)
    side = {"height": SIZE, "width": SIZE}
    if kind == "clip":
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=side).save_pretrained(tmp_path)
    else:
        SiglipImageProcessor(size=side).save_pretrained(tmp_path)
    spec = Backbone.from_json(TransformersCLIP(name=str(tmp_path)).to_json())
    built = spec.build()
    pair = spec.image_text(built)
    with torch.no_grad():
        features = pair.image_features(images())
        again = model.get_image_features(pixel_values=images()).pooler_output
    torch.testing.assert_close(features, torch.nn.functional.normalize(again, dim=1))
    assert pair.tokenize(["a cat"]).shape == (1, CONTEXT)
    wants = pair.preprocessing
    assert wants.size == (SIZE, SIZE)
    assert wants.interpolation == "bicubic"
    expected = ("center", 0.8) if kind == "clip" else ("squash", 1.0)
    assert (wants.crop_mode, wants.crop_pct) == expected


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    size: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(hidden_size=8, intermediate_size=8, vocab_size=9, **size)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(AdaptError, match="BertModel is no image-text model that we know"):
        TransformersCLIP(name=str(tmp_path)).build()


@pytest.mark.slow
def test_the_offline_pair_has_its_towers_own_tokenizer_and_preprocessing() -> None:
    spec = Backbone.from_json(OfflinePair(img_size=56).to_json())
    model = spec.build()
    pair = spec.image_text(model)
    assert pair.preprocessing.mean == IMAGENET_MEAN  # DINOv2's, not CLIP's
    assert len(select(model, sites_for(model))) == 3 * (12 + 6)
    with torch.no_grad():
        seen, read = (
            pair.image_features(images(2, 56)),
            pair.text_features(pair.tokenize(["a cat"])),
        )
    assert (seen.shape, read.shape) == ((2, pair.width), (1, pair.width))
    with pytest.raises(AdaptError, match=f"is longer than the {pair.context} tokens"):
        pair.tokenize(["cat " * 40])
