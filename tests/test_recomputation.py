"""recompute="cheap": the same gradients, bit for bit, from less that is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from polyadapt.core import (
    IA3,
    VPT,
    AdaLoRA,
    AdaptError,
    AdapterSet,
    Bottleneck,
    DoRA,
    FullFineTuning,
    LoRA,
    MoSA,
    Recipe,
    activate,
    attach,
    recompute,
    select,
    sets_of,
)
from polyadapt.core.recomputation import Mode, blocks
from polyadapt.tests.law_real_models import OTHERS, TIMM, gpt2_with_head, words
from polyadapt.tests.law_table import stir
from polyadapt.tests.test_resume import Task, run

REAL = {**TIMM, **OTHERS}
LINEAR = "blocks.*.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2}"
CACHED = ("GPT-2", "GPT-2 with head", "transformers Whisper")
DEPTH, TOKENS, WIDTH, HEADS, BATCH = 3, 5, 32, 2, 4


def vit(**settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5,
        **settings,
    )  # fmt: skip


def image() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16, generator=Generator().manual_seed(1))


def adapted(recipe: Recipe, at: Any = LINEAR, **settings: Any) -> tuple[nn.Module, AdapterSet]:
    model = vit(**settings)
    sites = select(model, at, slot="weight") if isinstance(at, tuple) else at
    return model, stir(attach(model, recipe, sites, generator=Generator().manual_seed(2)))


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel()).cos().view(y.shape)).sum()


def gradients(model: nn.Module, made: AdapterSet, call: Callable[[], Tensor]) -> list[Tensor]:
    """The loss and every gradient, under one seed; the random state after it comes last."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = loss_of(call())
    torch.rand(3)  # other work draws before backward recomputes
    loss.backward()
    own = [p.grad for p in made.parameters() if p.grad is not None]
    assert own
    return [loss.detach(), *own, torch.get_rng_state()]


def same_with_and_without(
    model: nn.Module, made: AdapterSet, call: Callable[[], Tensor]
) -> tuple[str, ...]:
    plain = gradients(model, made, call)
    with recompute(model) as on:
        found = gradients(model, made, call)
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)].count(False) == 0
    return on.blocks


def kept(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Numbers held for backward between the patch embedding and the last norm, each once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # or an address could be used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // t.element_size()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(call())
    del loss
    return sum(sizes.values())


# ---- the same gradients


@pytest.mark.parametrize(
    ("recipe", "at"),
    [
        (LoRA(rank=2, dropout=0.5), LINEAR),
        (LoRA(rank=2), (LINEAR,)),
        (DoRA(rank=2), LINEAR),
        (DoRA(rank=2), (LINEAR,)),
        (AdaLoRA(rank=2), LINEAR),
        (IA3(), None),
        (Bottleneck(rank=2), "blocks.*"),
        (MoSA(rank=2), "blocks.*"),
        (VPT(prompts=2), None),
        (FullFineTuning(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Recipe) else str(value),
)
def test_gradients_have_the_same_bits(recipe: Recipe, at: Any) -> None:
    model, made = adapted(recipe, at, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2)
    x = image().requires_grad_(True)
    assert same_with_and_without(model.train(), made, lambda: model(x)) == (
        "blocks.0",
        "blocks.1",
        "blocks.2",
    )


@pytest.mark.parametrize("name", REAL)
def test_the_blocks_of_real_classes_are_found_and_their_gradients_kept(name: str) -> None:
    case = REAL[name]
    model = case.model()
    found = [path for path, _ in blocks(model)]
    assert found == [site.path for site in select(model, case.blocks)]
    made = stir(attach(model, LoRA(rank=2), at=case.at))
    assert [path for path, _ in blocks(model)] == found
    if name in CACHED:
        model.config.use_cache = False  # type: ignore[union-attr]
    same_with_and_without(model, made, lambda: case.call(model))


def test_a_mixed_batch_is_recomputed_as_it_was() -> None:
    case = REAL["open_clip tower"]  # its blocks read adapted weights themselves
    found = []
    for mode in get_args(Mode):
        model = case.model()
        for seed, name in enumerate("ab"):
            own = Generator().manual_seed(seed)
            stir(attach(model, LoRA(rank=2), at=case.at, name=name, generator=own), seed)
        with recompute(model, mode):
            with activate(model, per_sample=["a", None, "b"]):
                loss = loss_of(case.call(model))
            with activate(model, "b"):
                loss.backward()
        found.append([p.grad for name in "ab" for p in sets_of(model)[name].parameters()])
    assert all(a is not None and b is not None for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)


def test_training_with_it_has_the_same_bits(tmp_path: Path) -> None:
    recipe = LoRA(rank=2, dropout=0.1)
    plain = run(Task(recipe), tmp_path / "plain", max_epochs=1)
    task = Task(recipe, recompute="cheap")
    found = run(task, tmp_path / "cheap", max_epochs=1)
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    with pytest.raises(AdaptError, match=r"on already for blocks\.0"):
        recompute(task.backbone)


# ---- what is kept


def expected() -> int:
    """Per block and token its input, qkv, attention and its log-sum, proj, fc1 and fc2."""
    return DEPTH * BATCH * TOKENS * ((1 + 3 + 1 + 1 + 4 + 1) * WIDTH + HEADS)


@pytest.mark.parametrize("recipe", [LoRA(rank=3), DoRA(rank=3), AdaLoRA(rank=2)], ids=str)
@pytest.mark.parametrize("at", [LINEAR, (LINEAR,)], ids=["output", "weight"])
@pytest.mark.parametrize("autocast", [False, True])
def test_base_products_and_attention_are_kept_and_nothing_else(
    recipe: Recipe, at: Any, autocast: bool
) -> None:
    model, _ = adapted(recipe, at)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = model.get_submodule("blocks")(torch.ones(BATCH, TOKENS, WIDTH))
        y: Tensor = state
        return y

    plain = kept(model, call)
    with recompute(model):
        cheap = kept(model, call)
    of_the_loss = BATCH * TOKENS * WIDTH
    assert cheap == expected() + of_the_loss
    assert cheap < 0.72 * plain


# ---- on and off


def test_it_leaves_no_trace() -> None:
    model, made = adapted(LoRA(rank=2))
    model.add_module("extra", nn.Sequential(*(nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)) for _ in range(2))))  # fmt: skip
    before = [(type(m), sorted(vars(m)), getattr(m, "inplace", None)) for m in model.modules()]
    on = recompute(model)
    assert [m.inplace for m in model.modules() if isinstance(m, nn.ReLU)] == [False, False]
    loss = loss_of(model(image()))
    on.remove()
    on.remove()
    after = [(type(m), sorted(vars(m)), getattr(m, "inplace", None)) for m in model.modules()]
    assert after == before
    with recompute(model):
        loss.backward()
    found = [p.grad for p in made.parameters()]
    model.zero_grad()
    loss_of(model(image())).backward()
    assert all(
        a is not None and b.grad is not None and torch.equal(a, b.grad)
        for a, b in zip(found, made.parameters(), strict=True)
    )


def test_without_grad_blocks_run_as_they_are() -> None:
    model, _ = adapted(LoRA(rank=2))
    with torch.no_grad():
        y = model(image())
        with recompute(model):
            assert torch.equal(model(image()), y)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_recomputes_itself(way: Callable[[nn.Module], nn.Module]) -> None:
    model, made = adapted(LoRA(rank=2))
    wanted = gradients(model, made, lambda: model(image()))
    made.zero_grad()
    with recompute(model):
        twin = way(model)
        found = gradients(twin, sets_of(twin)["default"], lambda: twin(image()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(p.grad is None for p in made.parameters())


def test_sets_may_come_and_go_meanwhile() -> None:
    model = vit()
    with recompute(model):
        first = stir(attach(model, LoRA(rank=2), at=LINEAR, name="first"))
        loss = loss_of(model(image()))
        stir(attach(model, LoRA(rank=3), at=(LINEAR,), name="second"), 4)
        loss.backward()
    found = [p.grad for p in first.parameters()]
    with activate(model, "first"):
        wanted = gradients(model, first, lambda: model(image()))
    assert all(
        a is not None and torch.equal(a, b) for a, b in zip(found, wanted[1:-1], strict=True)
    )


@pytest.mark.slow
def test_compiled_models_run_as_they_are() -> None:
    torch.compiler.reset()
    model, made = adapted(LoRA(rank=2))
    model.eval()
    wanted = gradients(model, made, lambda: model(image()))
    with recompute(model):
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = gradients(model, made, lambda: call(image()))
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


# ---- refusals


def test_what_cannot_be_recomputed_is_refused() -> None:
    with pytest.raises(AdaptError, match="Linear has no list of blocks"):
        recompute(nn.Linear(2, 2))
    with pytest.raises(AdaptError, match="recompute='all' is not allowed: none or cheap"):
        recompute(vit(), "all")  # type: ignore[arg-type]
    with recompute(vit(), "none") as off:
        assert off.blocks == ()


def test_a_cache_is_refused() -> None:
    model = gpt2_with_head()
    attach(model, LoRA(rank=2), at="transformer.h.*.attn.c_attn")
    with (
        recompute(model),
        pytest.raises(AdaptError, match="GPT2Block was called with a key-value cache"),
    ):
        model(words())


def test_a_second_backward_is_refused_by_torch() -> None:
    model, _ = adapted(LoRA(rank=2))
    with recompute(model):
        loss = loss_of(model(image()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only allowed to backward once"):
        loss.backward()
