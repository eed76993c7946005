"""MoSA at work: what it draws, recomputation, compilation, what is stored and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from polyadapt.core import Bottleneck, MoSA, attach, load
from polyadapt.tests.mosa_cases import HERE, adam, built, train, vit, wake

pytestmark = pytest.mark.slow  # whole runs


# ---- the draws


def test_training_forwards_differ_and_a_seed_repeats_them() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    wake(attach(model, MoSA(rank=4, dropout=0.0)))
    model.train()
    torch.manual_seed(1)
    first = [model(image) for _ in range(6)]
    torch.manual_seed(1)
    again = [model(image) for _ in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(first[0], other) for other in first[1:])


def test_each_expert_is_drawn_equally_often() -> None:
    experts = built(MoSA(rank=4, experts=4)).up
    drawn = torch.cat([experts.draw() for _ in range(4000)])
    assert drawn.bincount().tolist() == pytest.approx([1000] * 4, abs=120)  # 4 deviations


def test_evaluation_and_deploying_draw_nothing() -> None:
    adapter = built(MoSA(rank=4, share="none")).eval()
    before = torch.get_rng_state()
    adapter.output(torch.randn(3, 16, generator=Generator()), torch.zeros(3, 16), HERE)
    adapter.deployed()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recomputed_forward_draws_the_experts_of_the_first() -> None:
    adapter = built(MoSA(rank=4, experts=8, share="none"))
    wake(adapter)
    adapter.train()
    x, y = torch.randn(3, 16), torch.randn(3, 16)

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(5)
        if recompute:
            out = checkpoint(adapter.output, x, y, HERE, use_reentrant=False)
        else:
            out = adapter.output(x, y, HERE)
        torch.rand(7)  # the global generator goes on before backward recomputes
        return list(torch.autograd.grad(out.square().sum(), list(adapter.parameters())))

    pairs = zip(gradients(False), gradients(True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_training_step_compiles_into_one_graph_with_the_same_draws() -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    made = attach(model, MoSA(rank=4, experts=4, share="none", dropout=0.0))
    wake(made)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        eager = model(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(image), eager)


# ---- what is stored


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_the_deployed_adapter_evaluates_bit_for_bit_the_same(share: str) -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    made = attach(model, MoSA(rank=4, experts=3, share=share))
    wake(made)
    trained = model(image)
    state = {
        f"{site}/{name}": tensor
        for site, adapter in made.adapters.items()
        for name, tensor in adapter.deployed().state_dict().items()
    }
    deployed = made.recipe.deployed()
    made.detach()
    plain = attach(model, deployed)
    plain.load_state_dict(state)
    assert type(deployed) is Bottleneck
    assert torch.equal(model(image), trained)


def test_a_saved_file_loads_as_a_plain_adapter_with_identical_output(tmp_path: Path) -> None:
    model, image = vit(), torch.randn(2, 3, 16, 16)
    frozen = copy.deepcopy(model)
    made = attach(model, MoSA(rank=4, share="none"))
    train(model, adam(made), steps=3)
    made.save(tmp_path / "mosa.safetensors")
    loaded = load(frozen, tmp_path / "mosa.safetensors")
    assert isinstance(loaded.recipe, Bottleneck)
    assert loaded.stored_count() == made.stored_count() == 2 * (2 * 16 * 4 + 4 + 16 + 2 * 16)
    assert torch.equal(frozen(image), model(image))


def test_training_goes_on_from_a_stored_state_bit_for_bit() -> None:
    frozen = vit()
    recipe = MoSA(rank=4, experts=3, share="none")
    model = copy.deepcopy(frozen)
    made = attach(model, recipe)
    train(model, adam(made), steps=2)
    state = {name: t.clone() for name, t in made.state_dict().items()}
    other = copy.deepcopy(frozen)
    resumed = attach(other, recipe, generator=Generator().manual_seed(99))
    resumed.load_state_dict(state)
    for own, adapters in ((model, made), (other, resumed)):
        torch.manual_seed(6)
        train(own, adam(adapters), steps=3)
    pairs = zip(made.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_a_split_down_projection_keeps_its_start() -> None:
    kept = {
        (share, inactive): {
            name for name, _ in built(MoSA(rank=4, share=share, inactive=inactive)).named_buffers()
        }
        for share in ("down", "none")
        for inactive in ("init", "zero")
    }
    assert kept["down", "init"] == kept["down", "zero"] == {"up.owner"}
    assert kept["none", "zero"] == {"down.owner", "up.owner"}
    assert kept["none", "init"] == {"down.owner", "up.owner", "down.initial"}


# ---- other backbones


def test_swin_blocks_train_with_their_experts() -> None:
    swin = SwinTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
        num_classes=3,
    )
    made = attach(swin, MoSA(rank=2, experts=2))
    train(swin, adam(made), steps=3)
    assert all(bool(a.get_parameter("up.weight").any()) for a in made.adapters.values())
