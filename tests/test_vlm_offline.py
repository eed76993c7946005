"""The offline pair: two real towers, and projections that a committed script has trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from polyadapt.core.errors import AdaptError
from polyadapt.core.images.dinov2 import dinov2_small
from polyadapt.core.images.preprocessing import Preprocessing
from polyadapt.core.images.sources import read_arrays
from polyadapt.core.minilm import CONFIG
from polyadapt.vlm import offline
from polyadapt.vlm.backbones import Backbone, OfflinePair
from polyadapt.vlm.offline import CONTEXT, PROJECTIONS, WIDTH, offline_pair, pair_tokenizer
from polyadapt.vlm.pretrain_pair import Features, accuracy, main, pretrain_pair, train

pytestmark = pytest.mark.slow

SEEN = ["airplane", "bird", "deer", "frog", "ship"]


@pytest.fixture(scope="module")
def pair() -> Any:
    return offline_pair()


def synthetic(classes: int = 10, per_class: int = 4) -> Features:
    """Images around one direction per class, captions around unrelated ones."""
    generator = Generator().manual_seed(0)
    centres, texts = torch.randn(2, classes, 384, generator=generator)
    labels = torch.arange(classes).repeat_interleave(per_class)
    images = centres[labels] + 2 * torch.randn(len(labels), 384, generator=generator)
    captions = texts + 0.1 * torch.randn(4, classes, 384, generator=generator)
    return Features(images, labels, captions)


def arrays(folder: Path, per_class: int = 30) -> Path:
    """Black images of three classes."""
    labels = np.repeat(np.arange(3), per_class)
    images = np.zeros((len(labels), 8, 8, 3), dtype=np.uint8)
    file = folder / "images.npz"
    np.savez(file, train_images=images, train_labels=labels, classes=["a", "b", "c"])
    return file


def test_the_committed_file_says_what_it_was_trained_on() -> None:
    with safe_open(PROJECTIONS, "pt") as file:
        record = json.loads(file.metadata()["pretraining"])
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        "visual.head.proj.weight": [WIDTH, 384],
        "text.proj.weight": [WIDTH, 384],
        "logit_scale": [],
    }
    assert record["classes"] == SEEN
    assert (record["images"], record["seed"], record["steps"]) == (400, 0, 300)
    assert len(record["data_sha256"]) == 64


def test_the_projections_learn_captions_from_features_and_follow_their_seed() -> None:
    features = synthetic()
    one, same, other = (train(features, seed, steps=40) for seed in (0, 0, 1))
    assert accuracy(features, one) == 1
    assert accuracy(features, train(features, 0, steps=1)) < 1
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"classes": ["a", "d"]}, "no class 'd'; it has a, b, c"),
        ({"classes": ["a"]}, "at least two different ones"),
        ({"classes": ["a", "a"]}, "at least two different ones"),
        ({"per_class": 11}, "per_class=11: from 1 to 10, 20 more measure"),
        ({"per_class": 0}, "per_class=0"),
        ({"steps": 0}, "steps=0: from 1"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_towers_are_loaded(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(AdaptError, match=told):
        pretrain_pair(arrays(tmp_path), tmp_path / "out.safetensors", **settings)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_that_is_not_there_is_refused_by_the_command(tmp_path: Path) -> None:
    out = tmp_path / "none" / "out.safetensors"
    with pytest.raises(AdaptError, match="a folder that is there"):
        main([str(arrays(tmp_path)), "--out", str(out)])


def test_projections_of_another_shape_or_no_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"text.proj.weight": torch.zeros(2, 384)}, file)
    with pytest.raises(AdaptError, match=r"holds \{'text.proj.weight': \(2, 384\)\}, expected"):
        offline._projections(file)
    file.write_bytes(b"none")
    with pytest.raises(AdaptError, match="cannot read the projections"):
        offline._projections(file)


def test_a_wheel_that_is_not_installed_is_refused_with_what_mends_it() -> None:
    with pytest.raises(AdaptError, match=r"MiniLM needs the package gone==0\.1\.0"):
        replace(CONFIG, package="gone").path()


@pytest.mark.slow
def test_the_text_tower_is_the_wheels_sentence_encoder(pair: Any) -> None:
    from transformers import BertModel

    bert = BertModel.from_pretrained(str(CONFIG.path().parent), add_pooling_layer=False).eval()
    texts = ["a photo of a cat.", "an aeroplane"]
    tokens = pair_tokenizer()(texts)
    with torch.inference_mode():
        for text, found in zip(texts, pair.encode_text(tokens), strict=True):
            alone = pair_tokenizer().tokenizer(text, return_tensors="pt")  # without padding
            sentence = bert(**alone).last_hidden_state.mean(1) @ pair.text.proj.weight.t()
            torch.testing.assert_close(found, sentence[0], atol=1e-4, rtol=1e-4)
    assert tokens.shape == (2, CONTEXT)


@pytest.mark.slow
def test_words_of_one_meaning_lie_nearer_than_others(pair: Any) -> None:
    with torch.inference_mode():
        texts = pair_tokenizer()(["a ship", "a boat", "a deer"])
        ship, boat, deer = F.normalize(pair.encode_text(texts), dim=1)
    assert ship @ boat > ship @ deer + 0.1


@pytest.mark.slow
def test_the_image_tower_is_the_wheels_dinov2_and_the_scale_is_a_hundred(pair: Any) -> None:
    image = torch.randn(1, 3, 98, 98, generator=Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = dinov2_small(98).eval()(image) @ pair.visual.head.proj.weight.t()
        torch.testing.assert_close(pair.encode_image(image), wanted)
    assert pair.logit_scale.exp().item() == pytest.approx(100)
    spec = OfflinePair()
    assert Backbone.from_json(spec.to_json()) == spec
    assert spec.image_text(pair).preprocessing == Preprocessing.of(pair.visual.trunk)
    assert (spec.image_text(pair).context, spec.image_text(pair).width) == (CONTEXT, WIDTH)


@pytest.mark.slow
def test_test_images_of_the_seen_classes_are_named_far_above_chance(
    pair: Any, shared_data: Path
) -> None:
    sources = read_arrays(str(shared_data / "cifar10_small.npz"))
    test, wants = sources.test, Preprocessing.of(pair.visual.trunk)
    assert test is not None
    labels = [sources.classes.index(name) for name in SEEN]
    chosen = [[i for i, label in enumerate(test.labels) if label == at][:6] for at in labels]
    images = torch.stack([wants(test.image(i)) for indices in chosen for i in indices])
    named = named_as(pair, images, [f"a photo of a {name}." for name in SEEN])
    right = named == torch.arange(5).repeat_interleave(6)
    assert right.double().mean() > 0.5  # 0.2 by chance


@torch.inference_mode()
def named_as(pair: Any, images: Tensor, texts: list[str]) -> Tensor:
    """The nearest text of every image."""
    found = pair.encode_image(images, normalize=True)
    nearest: Tensor = found @ pair.encode_text(pair_tokenizer()(texts), normalize=True).t()
    return nearest.argmax(1)
