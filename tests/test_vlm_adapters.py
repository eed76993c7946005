"""CLIP-LoRA on towers of every kind: the card's checks, and what PEFT gets wrong on open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from polyadapt.core import AdapterSet, LoRA, activate, attach
from polyadapt.core.errors import AdaptError
from polyadapt.tests.vlm_models import KINDS, clip, images, size_of, tokens
from polyadapt.vlm.adapters import CLIP_LORA
from polyadapt.vlm.model import ImageText, image_text_of
from polyadapt.vlm.names import encoder_of, sites_for
from polyadapt.vlm.split import SplitAttention, split_attention

pytestmark = pytest.mark.slow

by_kind = pytest.mark.parametrize("kind", KINDS)
PLAIN = CLIP_LORA.replace(dropout=0.0)


def _split(kind: str = "CLIP") -> ImageText:
    model = KINDS[kind]().requires_grad_(False)  # torch adds otherwise where a weight wants grad
    split_attention(model)
    return image_text_of(model)


def _logits(pair: ImageText, kind: str = "CLIP") -> Tensor:
    """100 times the cosines of three images and two texts."""
    return 100 * pair.image_features(images(3, size_of(kind))) @ pair.text_features(tokens(2)).T


def _moved(made: AdapterSet, seed: int = 4) -> AdapterSet:
    """Every factor away from zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) / 4)
    return made


@by_kind
def test_a_fresh_set_leaves_the_zero_shot_logits_as_they_are_to_the_bit(kind: str) -> None:
    pair = _split(kind)
    with torch.no_grad():
        before = _logits(pair, kind)
        made = attach(pair.model, CLIP_LORA, sites_for(pair.model, parts="qkvo"))
        assert torch.equal(_logits(pair, kind), before)
        _moved(made)
        assert (_logits(pair, kind) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("rank", "parts", "count"), [(2, "qkv", 184_320), (4, "qkvo", 491_520)], ids=["qkv", "qkvo"]
)
def test_vit_b_16_trains_as_many_numbers_as_the_card_says(
    rank: int, parts: str, count: int
) -> None:
    with torch.device("meta"):
        model = CLIP(512, CLIPVisionCfg(patch_size=16), CLIPTextCfg())
    split_attention(model)
    made = attach(model, CLIP_LORA.replace(rank=rank), sites_for(model, parts=parts))
    assert made.trainable_count() == count
    by_tower = {"vision": 0, "text": 0}
    for site, adapter in made.pairs():
        by_tower[encoder_of(site.path)] += sum(p.numel() for p in adapter.parameters())
    assert by_tower["vision"] * 2 == by_tower["text"] * 3  # widths 768 and 512
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_scale_is_alpha_over_the_root_of_the_rank() -> None:
    model = clip(width=8, head_width=8)
    split_attention(model)
    recipe = CLIP_LORA.replace(rank=4)
    made = attach(model, recipe, sites_for(model, "vision", "v"))
    adapter: Any = next(iter(made.adapters.values()))
    assert adapter.A.shape == (4, 8)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.fill_(1.0)
        assert (adapter.weight(torch.zeros(8, 8)) == 2.0).all()  # 4 / sqrt(4)
    assert recipe.replace(scaling="standard").scale_of(4) * 4 == 1.0
    assert CLIP_LORA.scale_of(2) == pytest.approx(0.70711, abs=1e-5)


@by_kind
def test_merged_logits_are_the_same_and_unmerging_restores_every_bit(kind: str) -> None:
    pair = _split(kind)
    before = {name: p.clone() for name, p in pair.model.state_dict().items()}
    made = _moved(attach(pair.model, CLIP_LORA, sites_for(pair.model, parts="qkvo")))
    with torch.no_grad():
        apart = _logits(pair, kind) / 100
        made.merge()
        torch.testing.assert_close(_logits(pair, kind) / 100, apart, atol=1e-5, rtol=0)
    made.unmerge()
    made.detach()
    after = pair.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@by_kind
def test_the_first_gradient_is_zero_at_a_and_not_at_b(kind: str) -> None:
    pair = _split(kind)
    made = attach(pair.model, CLIP_LORA, sites_for(pair.model, parts="qkvo"))
    pair.model.train()
    F.cross_entropy(_logits(pair, kind), torch.tensor([0, 1, 1])).backward()
    for site, adapter in made.pairs():
        grads = {name: p.grad for name, p in adapter.named_parameters()}
        assert torch.equal(grads["A"], torch.zeros_like(grads["A"])), site.name  # type: ignore[arg-type]
        assert grads["B"].abs().max() > 0, site.name  # type: ignore[union-attr]


@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
@pytest.mark.parametrize("encoder", ["vision", "text"])
@by_kind
def test_each_projection_of_either_tower_gets_its_true_gradient(
    kind: str, encoder: Literal["vision", "text"], part: str
) -> None:
    """PEFT leaves out_proj of open_clip without one. True: that of the model with W0 + s B A."""
    pair = _split(kind)
    made = _moved(attach(pair.model, PLAIN, sites_for(pair.model, encoder, [part])))
    labels = torch.tensor([0, 1, 1])
    F.cross_entropy(_logits(pair, kind), labels).backward()
    explicit = KINDS[kind]()
    split_attention(explicit)
    factors = {
        site: [p.detach().clone().requires_grad_() for p in adapter.parameters()]
        for site, adapter in made.pairs()
    }
    weights: dict[str, Tensor] = dict(explicit.named_parameters())
    for site, (a, b) in factors.items():
        name = f"{site.path}.weight"
        old = weights[name].detach()
        rows = slice(*(site.rows or (0, len(old))))
        delta = torch.zeros_like(old)
        delta = delta.index_copy(0, torch.arange(len(old))[rows], PLAIN.scale_of(2) * b @ a)
        weights[name] = old + delta
    other = _Logits(image_text_of(explicit), kind)
    called = {f"model.{name}": tensor for name, tensor in weights.items()}
    F.cross_entropy(torch.func.functional_call(other, called, ()), labels).backward()
    for site, adapter in made.pairs():
        for (name, found), wanted in zip(adapter.named_parameters(), factors[site], strict=True):
            assert wanted.grad is not None
            torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-4, msg=name)


class _Logits(nn.Module):
    """The logits as a module, so that its weights can be exchanged for one call."""

    def __init__(self, pair: ImageText, kind: str) -> None:
        super().__init__()
        self.model = pair.model
        self.pair, self.kind = pair, kind

    def forward(self) -> Tensor:
        return _logits(self.pair, self.kind)


def test_dropout_changes_a_pass_only_once_b_is_not_zero() -> None:
    pair = _split()
    made = attach(pair.model, CLIP_LORA, sites_for(pair.model))
    pair.model.train()
    with torch.no_grad():
        assert torch.equal(_logits(pair), _logits(pair))
        _moved(made)
        assert not torch.equal(_logits(pair), _logits(pair))
        pair.model.eval()
        assert torch.equal(_logits(pair), _logits(pair))


def test_q_k_and_v_drop_by_masks_of_their_own_and_the_frozen_branch_does_not() -> None:
    torch.manual_seed(0)
    attention = SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    with torch.no_grad():
        attention.k_proj.weight.copy_(attention.q_proj.weight)
    made = attach(attention, CLIP_LORA, "{q_proj,k_proj,v_proj}")
    x = torch.ones(1, 50, 8)
    with torch.no_grad():
        for adapter in made.adapters.values():
            for factor in adapter.parameters():
                factor.fill_(1.0)
        frozen = F.linear(x, attention.q_proj.weight, attention.q_proj.bias)
        kept = [(layer(x) - frozen)[0, :, 0] for layer in (attention.q_proj, attention.k_proj)]
    # 2 / sqrt(2) times the inputs that were kept, each of the eight weighed 4/3.
    counts = [delta / 2**0.5 * 0.75 for delta in kept]
    for count in counts:
        torch.testing.assert_close(count, count.round(), atol=1e-4, rtol=0)
        assert 4 < count.mean() < 8
    assert not torch.equal(*counts)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5])
def test_the_gradient_of_the_input_is_that_of_the_formula_at_every_rate(rate: float) -> None:
    """The official code's misses the adapter at rate 0."""
    torch.manual_seed(0)
    attention = SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    made = _moved(attach(attention, CLIP_LORA.replace(dropout=rate), "{q_proj,k_proj,v_proj}"))
    x = torch.randn(2, 5, 8)
    ours, formula = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(7)
    attention(ours, ours, ours)[0].square().sum().backward()

    torch.manual_seed(7)
    parts = []
    for (site, adapter), layer in zip(
        made.pairs(), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True
    ):
        a, b = adapter.parameters()
        keep = F.dropout(torch.ones_like(x), rate)
        y = formula @ layer.weight.T + layer.bias + (formula * keep) @ a.T @ b.T * 2**-0.5
        parts.append(y.unflatten(-1, (2, 4)).transpose(1, 2))
        assert site.path.startswith("qkv"[len(parts) - 1])
    q, k, v = parts
    heads = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    attention.out_proj(heads.transpose(1, 2).flatten(2)).square().sum().backward()
    torch.testing.assert_close(ours.grad, formula.grad, atol=1e-5, rtol=1e-5)


def test_with_the_vision_encoder_alone_class_features_are_constants() -> None:
    pair = _split()
    made = attach(pair.model, CLIP_LORA, sites_for(pair.model, "vision"))
    assert {encoder_of(site.path) for site in made.sites} == {"vision"}
    assert not pair.text_features(tokens()).requires_grad
    assert pair.image_features(images()).requires_grad
    with torch.no_grad():
        before = pair.text_features(tokens())
        _moved(made)
        assert torch.equal(pair.text_features(tokens()), before)


@pytest.mark.parametrize("split", [True, False], ids=["split", "unsplit"])
def test_training_never_writes_a_frozen_tensor(split: bool) -> None:
    """PEFT puts new tensors in their place at each forward, and they drift."""
    pair = _split() if split else image_text_of(clip())
    made = attach(pair.model, CLIP_LORA if split else PLAIN, sites_for(pair.model, parts="qkvo"))
    own = {id(p) for p in made.parameters()}
    before = {
        n: (id(p), p.data_ptr(), p.detach().clone())
        for n, p in pair.model.named_parameters()
        if id(p) not in own
    }
    optimiser = torch.optim.AdamW(made.parameter_groups(1e-2, 1e-2))
    pair.model.train()
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(_logits(pair) / 10, torch.tensor([0, 1, 1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(pair.model.named_parameters())
    for name, (held, place, value) in before.items():
        assert (id(after[name]), after[name].data_ptr()) == (held, place)
        assert torch.equal(after[name], value)


@pytest.mark.parametrize("split", [True, False], ids=["split", "unsplit"])
def test_two_threads_agree_with_one(split: bool) -> None:
    """On one model with two sets; PEFT's threads find each other's weights, or none."""
    pair = _split() if split else image_text_of(clip())
    for seed, name in enumerate(("pets", "cars")):
        _moved(attach(pair.model, PLAIN, sites_for(pair.model, parts="qkvo"), name), seed)
    names = ["pets", "cars"] * 20

    def answer(name: str) -> Tensor:
        with torch.no_grad(), activate(pair.model, name):
            return _logits(pair)

    alone = {name: answer(name) for name in ("pets", "cars")}
    assert not torch.equal(alone["pets"], alone["cars"])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(answer, names))
    assert all(torch.equal(f, alone[name]) for f, name in zip(found, names, strict=True))


def test_one_batch_can_be_of_two_sets() -> None:
    pair = _split()
    for seed, name in enumerate(("pets", "cars")):
        _moved(attach(pair.model, CLIP_LORA, sites_for(pair.model), name), seed)
    with torch.no_grad():
        apart = []
        for name in ("pets", "cars"):
            with activate(pair.model, name):
                apart.append(pair.image_features(images(2)))
        with activate(pair.model, per_sample=["cars", "pets"]):
            mixed = pair.image_features(images(2))
    torch.testing.assert_close(mixed, torch.stack([apart[1][0], apart[0][1]]), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CLIP", "CLIP, open_clip's attention"])
def test_split_towers_compile_to_one_graph(kind: str) -> None:
    """PEFT breaks it in every block."""
    pair = _split(kind)
    made = _moved(attach(pair.model, PLAIN, sites_for(pair.model, parts="qkvo")))
    graphs = []

    def count(graph: Any, inputs: Sequence[Any]) -> Any:
        graphs.append(len(inputs))
        return graph

    def both(seen: Tensor, read: Tensor) -> Tensor:
        return pair.image_features(seen) @ pair.text_features(read).T

    whole = torch.compile(both, fullgraph=True, backend=count)
    found = whole(images(), tokens(2))
    torch.testing.assert_close(100 * found, _logits(pair, kind), atol=1e-4, rtol=0)
    assert len(graphs) == 1
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


def test_dropout_wants_layers_that_are_called() -> None:
    model = clip()
    with pytest.raises(AdaptError, match=r"dropout=0.25 cannot act on .*in_proj_weight\[q\]"):
        attach(model, CLIP_LORA, sites_for(model))
    assert attach(model, LoRA(rank=2), sites_for(model)).trainable_count() == 2 * 3 * 4 * (16 + 12)
