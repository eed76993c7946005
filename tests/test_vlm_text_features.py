"""Class features: gradients in chunks against those of the whole, what is kept, what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.benchmarks.text_side import Live
from polyadapt.core import LoRA, S2LoRA, activate, attach, recompute, sets_of, switch
from polyadapt.core.errors import AdaptError
from polyadapt.vlm.text_features import TextFeatures, class_features, encode

pytestmark = pytest.mark.slow

CLASSES = 7


class Towers(nn.Module):
    """A text tower and a vision tower; as in open_clip, none is called through the whole."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.visual = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


class Pair:
    """The interface of an image-text model around them; it counts the texts that are encoded."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model: Any = Towers(dropout)
        self.encoded = 0

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[ord(sign) % 20 for sign in f"{text:>20}"] for text in texts])

    def shorter(self, tokens: Tensor) -> Tensor:
        return tokens

    def text_features(self, tokens: Tensor) -> Tensor:
        self.encoded += len(tokens)
        x = self.model.embedding(tokens)
        for block in self.model.blocks:
            x = x + block(x)
        return F.normalize(x.mean(1), dim=-1)


def adapted(at: str, name: str = "a", dropout: float = 0.0, pair: Pair | None = None) -> Pair:
    pair = pair or Pair(dropout)
    made = attach(pair.model, LoRA(rank=2, dropout=dropout), at, name)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return pair


def tokens() -> Tensor:
    return torch.randint(0, 20, (CLASSES, 5), generator=torch.Generator().manual_seed(1))


def gradients(pair: Pair, features: Tensor) -> list[Tensor]:
    goal = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * goal).sum().backward()
    trained = [p for p in pair.model.parameters() if p.requires_grad]
    found = [p.grad for p in trained if p.grad is not None]
    assert len(found) == len(trained) > 0
    pair.model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_features_and_gradients_in_chunks_are_those_of_the_whole(chunk: int) -> None:
    pair = adapted("blocks.*.{0,3}")
    whole, parts = encode(pair, tokens()), encode(pair, tokens(), chunk)
    assert torch.allclose(whole, parts, atol=1e-6)
    for plain, ours in zip(gradients(pair, whole), gradients(pair, parts), strict=True):
        assert plain.abs().max() > 1e-3
        assert torch.allclose(plain, ours, atol=1e-6, rtol=1e-5)


def test_a_chunk_that_runs_again_draws_the_same_dropout() -> None:
    pair = adapted("blocks.*.{0,3}", dropout=0.5)
    torch.manual_seed(3)
    plain = torch.cat([pair.text_features(part) for part in tokens().split(3)])
    torch.manual_seed(3)
    ours = encode(pair, tokens(), 3)
    assert torch.equal(plain, ours)
    pairs = zip(gradients(pair, plain), gradients(pair, ours), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_a_chunk_runs_again_under_the_sets_that_it_ran_under_first() -> None:
    pair = adapted("blocks.*.0", "b", pair=adapted("blocks.*.0", "a"))
    found = []
    for chunk in (None, 2):
        with activate(pair.model, "a"):
            features = encode(pair, tokens(), chunk)
        switch(pair.model, "b")
        features.square().sum(1)[0].backward()  # the first row alone: others get zeros
        found.append([p.grad.clone() for p in _set(pair, "a").parameters()])
        assert all(p.grad is None for p in _set(pair, "b").parameters())
        pair.model.zero_grad()
    pairs = zip(*found, strict=True)
    assert all(torch.allclose(first, second, atol=1e-6) for first, second in pairs)


def _set(pair: Pair, name: str) -> Any:
    return sets_of(pair.model)[name]


def test_chunks_of_blocks_that_are_recomputed_have_the_same_gradients() -> None:
    pair = adapted("blocks.*.{0,3}", dropout=0.0)
    whole = gradients(pair, encode(pair, tokens()))
    with recompute(pair.model):
        parts = gradients(pair, encode(pair, tokens(), 3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def test_blocks_that_are_recomputed_keep_nothing_of_a_chunk() -> None:
    pair = adapted("blocks.*.{0,3}")
    kept = {}
    with recompute(pair.model):
        for chunk in (None, 3):
            with Live({p.untyped_storage().data_ptr() for p in pair.model.parameters()}) as live:
                features = encode(pair, tokens(), chunk)
            kept[chunk] = live.now
            gradients(pair, features)
    assert kept[None] > CLASSES * 5 * 16 * 4  # an activation of the first layer is among them
    assert kept[3] < 2 * (CLASSES * 5 + CLASSES * 8) * 8  # tokens and features


def test_in_chunks_only_tokens_are_kept_for_backward() -> None:
    pair = adapted("blocks.*.{0,3}")
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encode(pair, tokens())
        plain, kept = sum(kept), []
        encode(pair, tokens(), 3)
    assert plain > CLASSES * 5 * 16  # an activation of the first layer is among them
    assert sum(kept) == CLASSES * 5  # the tokens, and nothing that a block made


@pytest.mark.parametrize("chunk", [0, -1, True])
def test_a_chunk_is_a_number_of_texts(chunk: int) -> None:
    with pytest.raises(AdaptError, match="a whole number from 1, or None"):
        encode(Pair(), tokens(), chunk)


# What is kept


def test_with_adapters_of_the_vision_tower_alone_the_features_are_one_constant() -> None:
    pair = adapted("visual.1", "b", pair=adapted("visual.0", "a"))
    features = TextFeatures(pair, tokens())
    first = features()
    assert not first.requires_grad
    with torch.no_grad():
        next(_set(pair, "a").parameters()).add_(1.0)  # a step of training
    with activate(pair.model, "b"):
        assert features() is first
    with activate(pair.model, None):
        assert features() is first
    assert pair.encoded == CLASSES


def test_while_the_text_tower_is_trained_every_step_encodes_and_an_evaluation_once() -> None:
    pair = adapted("blocks.0.0")
    features = TextFeatures(pair, tokens())
    assert features().requires_grad
    assert features().requires_grad
    assert pair.encoded == 2 * CLASSES
    with torch.no_grad():
        before = features()
        assert features() is before
        assert pair.encoded == 3 * CLASSES
        next(_set(pair, "a").parameters()).add_(1.0)
        assert not torch.allclose(features(), before)


def test_each_active_set_has_features_of_its_own() -> None:
    pair = adapted("blocks.0.0", "b", pair=adapted("blocks.0.0", "a"))
    features = TextFeatures(pair, tokens())
    found = {}
    for _ in range(2):
        for name in ("a", "b", None):
            with torch.no_grad(), activate(pair.model, name):
                found[name] = features()
                assert torch.equal(found[name], encode(pair, tokens()))
    assert not torch.allclose(found["a"], found["b"])
    assert not torch.allclose(found["a"], found[None])
    assert pair.encoded == (3 + 6) * CLASSES


def test_a_set_that_takes_the_place_of_another_does_not_get_its_features() -> None:
    pair = Pair()
    features, seen = TextFeatures(pair, tokens()), []
    for _ in range(12):  # of one shape: freed memory is used again
        adapted("blocks.0.0", pair=pair)
        with torch.no_grad():
            seen.append(features())
            assert torch.equal(seen[-1], encode(pair, tokens()))
        _set(pair, "a").detach()
    assert not torch.allclose(seen[0], seen[-1])


def test_merged_weights_and_shared_factors_are_seen() -> None:
    pair = Pair()
    features = TextFeatures(pair, tokens())
    with torch.no_grad():
        plain = features()
        made = attach(pair.model, S2LoRA(rank=2, share="shape"), ["blocks.*.0", "visual.0"], "s")
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape))
        shared = features()
        assert not torch.allclose(shared, plain)
        for parameter in made.bank.parameters():  # type: ignore[union-attr]
            parameter.mul_(2.0)
        assert not torch.allclose(features(), shared)
        apart = features()
        made.merge()
        assert torch.allclose(features(), apart, atol=1e-5)
        made.unmerge()
        with activate(pair.model, None):
            assert torch.equal(features(), plain)


def test_constants_are_those_of_eval_mode_and_the_mode_stays() -> None:
    pair = adapted("visual.0", dropout=0.5)
    pair.model.train()
    pair.model.blocks[0].eval()
    features = TextFeatures(pair, tokens())()
    assert pair.model.training
    assert not pair.model.blocks[0].training
    assert torch.equal(features, encode_in_eval_mode(pair))


def encode_in_eval_mode(pair: Pair) -> Tensor:
    pair.model.eval()
    with torch.no_grad():
        return encode(pair, tokens())


def test_what_inference_mode_made_can_be_trained_with() -> None:
    pair = adapted("visual.0")
    features = TextFeatures(pair, tokens())
    with torch.inference_mode():
        features()
    image = pair.model.visual(torch.ones(1, 8))
    (image @ features().T).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in pair.model.parameters())


def test_a_set_for_each_sample_has_no_class_features() -> None:
    pair = adapted("visual.0")
    with activate(pair.model, per_sample=["a", None]), pytest.raises(AdaptError, match="one set"):
        TextFeatures(pair, tokens())()


# Zero-shot


def test_features_of_templates_are_averaged_and_normalised_again() -> None:
    pair = Pair()
    one, other = (class_features(pair, ["cat", "dog"], [t]) for t in ("a {}", "the {}s"))
    both = class_features(pair, ["cat", "dog"], ["a {}", "the {}s"])
    assert torch.allclose(both, F.normalize(one + other, dim=-1), atol=1e-6)
    assert torch.equal(one, pair.text_features(pair.tokenize(["a cat", "a dog"])))
    with pytest.raises(AdaptError, match="no template"):
        class_features(pair, ["cat", "dog"], [])
