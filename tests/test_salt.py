"""SALT and S-SAM: the update by hand, its clamps, its starts, its gradients, its two forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from polyadapt.core import SALT, SSAM, LoRA, Recipe, activate, attach, select
from polyadapt.core.adapters.salt import SpectralAdapter, ThinSpectralAdapter, spectral
from polyadapt.core.layers import FrozenLayer
from polyadapt.core.recipe import ActsOnOutput, LowRank
from polyadapt.core.sites import Site
from polyadapt.core.spectral import Spectrum, decomposed
from polyadapt.tests.factor_cases import layers, site_at, stir
from polyadapt.tests.law_models import LAYERS, tokens

W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
CLAMPS = ["diagonal", "full", "none"]


def adapter_at(model: nn.Module, recipe: Recipe) -> tuple[SpectralAdapter, FrozenLayer]:
    """A new adapter at `model[0]`, always the same one, and its frozen layer."""
    site, layer = site_at(model, "0")
    made = recipe.build(site, layer.matrix().detach(), Generator().manual_seed(0))
    assert isinstance(made, SpectralAdapter)
    return made, layer


def of_weight(w: Tensor, recipe: Recipe) -> SpectralAdapter:
    """The adapter of a linear layer with this weight."""
    site = Site("0", "weight", None, None, "linear", tuple(w.shape), "output", "")
    made = recipe.build(site, w, Generator().manual_seed(0))
    assert isinstance(made, SpectralAdapter)
    return made


def filled(made: SpectralAdapter, **values: Any) -> SpectralAdapter:
    with torch.no_grad():
        for name, value in values.items():
            made.get_parameter(name).copy_(torch.as_tensor(value))
    return made


def by_hand(y: float, recipe: SALT) -> SpectralAdapter:
    """The card's: r = 1, q = 1, a = 2, b = -1, X = (1, 0), Y = (0, y)."""
    made = of_weight(W0, recipe)
    return filled(made, a=[2.0], b=[-1.0], X=[[1.0], [0.0]], Y=[[0.0, y]])


def random_matrix(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    w = torch.randn(d_out, d_in, generator=Generator().manual_seed(seed))
    return w / math.sqrt(d_in)


def as_written(made: SpectralAdapter, w: Tensor, clamp: str) -> Tensor:
    """U clamp(M) V^T in fp64, as the formula has it."""
    found, r = decomposed(w), made.top
    u, s, v = (t.double() for t in (found.U, found.s, found.V))
    m = s.diag()
    if r:
        values = made.a.double() * s[:r] + made.b.double()
        m[:r, :r] = (values if clamp == "none" else values.relu()).diag()
    if r < len(s):
        m[r:, r:] += made.X.double() @ made.Y.double()
    return u @ (m.relu() if clamp == "full" else m) @ v.mT


# The update


@pytest.mark.parametrize("clamp", CLAMPS)
def test_the_weight_of_the_hand_example(clamp: Any) -> None:
    made = by_hand(0.5, SALT(top=1, rank=1, clamp=clamp))
    wanted = torch.tensor([[5, 0, 0], [0, 2, 0.5], [0, 0, 1]])
    torch.testing.assert_close(made.weight(W0), wanted)


@pytest.mark.parametrize(("clamp", "coupling"), [("full", 0.0), ("diagonal", -0.5), ("none", -0.5)])
def test_a_negative_coupling_is_cut_under_the_full_clamp_alone(clamp: Any, coupling: float) -> None:
    made = by_hand(-0.5, SALT(top=1, rank=1, clamp=clamp))
    assert made.weight(W0)[1, 2].item() == pytest.approx(coupling)


@pytest.mark.parametrize(("clamp", "value"), [("full", 0.0), ("diagonal", 0.0), ("none", -3.0)])
def test_a_scaled_value_below_zero_is_cut_unless_nothing_is(clamp: Any, value: float) -> None:
    made = filled(of_weight(W0, SALT(top=1, rank=1, clamp=clamp)), a=[1.0], b=[-6.0])
    assert made.weight(W0).diag().tolist() == pytest.approx([value, 2, 1])


def test_the_diagonal_of_the_block_is_cut_under_the_full_clamp_alone() -> None:
    for clamp, value in (("full", 0.0), ("diagonal", -3.0)):
        made = of_weight(W0, SALT(top=1, rank=1, clamp=clamp))
        filled(made, X=[[5.0], [0.0]], Y=[[-1.0, 0.0]])
        assert made.weight(W0).diag().tolist() == pytest.approx([3, value, 1])


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9)], ids=str)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("top", [0, 2, 4])
def test_the_weight_is_the_formulas_for_any_shape(
    shape: tuple[int, int], clamp: Any, top: int
) -> None:
    w = random_matrix(*shape)
    made = of_weight(w, SALT(top=top, rank=2, clamp=clamp))
    stir(made)
    found = made.weight(w)
    assert found.shape == w.shape
    torch.testing.assert_close(found.double(), as_written(made, w, clamp), rtol=0, atol=1e-6)
    assert (found - w).abs().max() > 0.05


def test_all_values_scaled_is_s_sam() -> None:
    w = random_matrix(6, 4)
    salt, ssam = of_weight(w, SALT(top=1.0)), of_weight(w, SSAM())
    assert [name for name, _ in salt.named_parameters()] == ["a", "b"]
    for made in (salt, ssam):
        filled(made, a=[2.0, 0.5, -1.0, 1.0], b=[0.1, 0.2, 0.3, -0.1])
    assert torch.equal(salt.weight(w), ssam.weight(w))
    torch.testing.assert_close(ssam.weight(w).double(), as_written(ssam, w, "full"))


def test_no_value_scaled_is_lora_in_the_singular_basis() -> None:
    w = random_matrix(6, 4)
    made = of_weight(w, SALT(top=0, rank=2, clamp="none"))
    assert [name for name, _ in made.named_parameters()] == ["X", "Y"]
    stir(made)
    found = decomposed(w)
    delta = (found.U @ made.X) @ (made.Y @ found.V.mT)
    torch.testing.assert_close(made.weight(w), w + delta)
    a, b, p, scale = made.factors()
    torch.testing.assert_close(scale * b @ a, delta)
    assert p is None


@pytest.mark.parametrize(("rank", "top", "held"), [(2, 1, 3), (3, 4, 5), (5, 1, 5), (5, 5, 5)])
def test_the_factors_have_no_more_rank_than_the_update(rank: int, top: int, held: int) -> None:
    w = random_matrix(5, 6)
    for clamp, most in (("diagonal", held), ("full", 5)):
        made = of_weight(w, SALT(top=top, rank=rank, clamp=clamp))
        stir(made)
        a, b, _, _ = made.factors()
        assert (a.shape, b.shape) == ((most, 6), (5, most))
        torch.testing.assert_close(w + b @ a, made.weight(w))


# The start


@pytest.mark.parametrize(("model", "x"), layers())
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("clamp", CLAMPS)
def test_a_new_adapter_changes_no_bit(model: nn.Module, x: Tensor, init: Any, clamp: Any) -> None:
    made, layer = adapter_at(model, SALT(top=1, rank=2, init=init, clamp=clamp))
    assert torch.equal(made.weight(layer.matrix()), layer.matrix())
    if isinstance(made, ThinSpectralAdapter):
        y = model(x)
        assert torch.equal(made.output(x, y, layer), y)


def test_the_starts_are_those_that_are_declared() -> None:
    w = random_matrix(300, 300)
    kaiming, gaussian, paper = (
        of_weight(w, SALT(top=10, rank=64, init=init)) for init in ("kaiming", "gaussian", "paper")
    )
    bound = math.sqrt(2 / (7 * 64))  # sqrt(6 / ((1 + 20) q))
    assert 0.99 * bound < kaiming.X.abs().max() <= bound
    for made in (kaiming, gaussian):
        assert made.a.tolist() == [1] * 10
        assert made.b.count_nonzero() == made.Y.count_nonzero() == 0
    for drawn in (gaussian.X, paper.X, paper.Y):
        assert drawn.std().item() == pytest.approx(0.01, rel=0.03)
    assert [SALT(init="paper").identity, SALT().identity, SSAM().identity] == [False, True, True]


def test_the_papers_start_couples_by_what_relu_keeps_of_a_small_product() -> None:
    w = random_matrix(768, 768)
    made = of_weight(w, SALT(top=50, rank=256, clamp="full", init="paper"))
    u, v = made.U[:, 50:], made.V[:, 50:]
    block = u.mT @ (made.weight(w) - w) @ v
    block.diagonal().zero_()
    assert block.min() > -1e-5
    # the positive half of N(0, (1e-4 sqrt(256))^2) has the mean 0.0016 / sqrt(2 pi)
    assert block.mean().item() == pytest.approx(0.0016 / math.sqrt(2 * math.pi), rel=0.02)


# Signs


def test_a_flipped_pair_of_vectors_leaves_the_scaled_values_and_not_the_block() -> None:
    w = random_matrix(6, 5)
    found = decomposed(w)
    signs = torch.tensor([-1.0, 1, -1, 1, -1])
    other = Spectrum(found.U * signs, found.s, found.V * signs)

    def updated(spectrum: Spectrum, top: int) -> Tensor:
        block = None if top == 5 else (torch.ones(5, 1), torch.ones(1, 5))
        made = spectral(spectrum, top, block, "diagonal", "stored")
        return (filled(made, a=[2.0] * 5) if top else made).weight(w)

    torch.testing.assert_close(updated(other, 5), updated(found, 5))
    assert not torch.allclose(updated(other, 0), updated(found, 0), atol=0.1)


# Gradients


def gradient_of_y(clamp: Any, towards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dY at the start for L = <towards, W'>, with X and G = dL/dM of the block."""
    w = random_matrix(5, 6)
    made = of_weight(w, SALT(top=2, rank=2, clamp=clamp))
    (made.weight(w) * towards).sum().backward()
    assert made.Y.grad is not None
    g = made.U[:, 2:].mT @ towards @ made.V[:, 2:]
    return made.Y.grad, made.X.detach(), g


def test_from_the_start_the_full_clamp_lets_gradients_of_the_diagonal_through_alone() -> None:
    towards = random_matrix(5, 6, seed=1)
    grad, x, g = gradient_of_y("full", towards)
    torch.testing.assert_close(grad, x.mT @ (g * torch.eye(3)))
    for clamp in ("diagonal", "none"):
        grad, x, g = gradient_of_y(clamp, towards)
        torch.testing.assert_close(grad, x.mT @ g)


def test_gradients_of_scale_and_shift_are_those_of_the_formula() -> None:
    towards = random_matrix(3, 3, seed=1)
    made = of_weight(W0, SALT(top=2, rank=1))
    (made.weight(W0) * towards).sum().backward()
    g = towards.diag()[:2]
    torch.testing.assert_close(made.a.grad, g * torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(made.b.grad, g)


# The two forms


@pytest.mark.parametrize(("model", "x"), layers())
def test_weight_and_output_agree(model: nn.Module, x: Tensor) -> None:
    made, layer = adapter_at(model, SALT(top=1, rank=1))
    assert isinstance(made, ThinSpectralAdapter)
    stir(made)
    moved = made.output(x, model(x), layer)
    with torch.no_grad():
        layer.stored.copy_(layer.as_stored(made.weight(layer.matrix()), layer.stored))
    torch.testing.assert_close(moved, model(x))
    assert not torch.equal(moved, made.output(x, model(x), layer))


@given(
    d_out=st.integers(6, 40),
    d_in=st.integers(6, 40),
    top=st.integers(0, 2),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_fused_forward_is_that_of_the_reconstructed_weight(
    d_out: int, d_in: int, top: int, rank: int, seed: int
) -> None:
    w = random_matrix(d_out, d_in, seed)
    made = of_weight(w, SALT(top=top, rank=rank, clamp="none"))
    stir(made)
    a, b, _, _ = made.factors()
    x = torch.randn(7, d_in, generator=Generator().manual_seed(seed))
    fused = F.linear(x, w) + F.linear(F.linear(x, a), b)
    wanted = x.double() @ as_written(made, w, "none").mT
    torch.testing.assert_close(fused.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "thin"),
    [
        (SALT(top=1, rank=3), True),  # 4 * (8 + 8) = 8 * 8
        (SALT(top=2, rank=3), False),
        (SALT(top=3, rank=8), False),
        (SALT(top=1, rank=1, clamp="full"), False),
        (SSAM(), False),
    ],
)
def test_only_a_branch_cheaper_than_the_layer_acts_on_outputs(recipe: Recipe, thin: bool) -> None:
    made = of_weight(random_matrix(8, 8), recipe)
    assert isinstance(made, ActsOnOutput) == thin
    assert isinstance(made, LowRank)


@pytest.mark.parametrize("recipe", [SALT(top=1, rank=1), SALT(top=3, rank=2), SSAM()], ids=str)
def test_sets_act_together_with_others_and_merge(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(3, 8)
    sites = select(model, "{0,2}", "weight")
    stir(attach(model, LoRA(rank=2), at=sites, name="lora"))
    made = attach(model, recipe, at=sites, name="own")
    stir(made)
    with activate(model, "own"):
        alone = model(x)
    with activate(model, ["lora", "own"]):
        both = model(x)
    with activate(model, ["own", "lora"]):
        torch.testing.assert_close(model(x), both)
    assert not torch.allclose(both, alone)
    made.merge()
    torch.testing.assert_close(model(x), alone)


def test_parts_of_one_projection_may_act_in_different_ways() -> None:
    model, x = LAYERS["rows of a linear"].model(), tokens()
    recipe = SALT(top=1, rank=2, tops={"qkv[v]": 1.0})
    made, other = (attach(model, recipe, at="qkv[q,v]", name=name) for name in "ab")
    assert [isinstance(a, ActsOnOutput) for a in made.adapters.values()] == [True, False]
    stir(made)
    stir(other, 0.2)
    names = ["b", None, "a", "b"]
    with torch.no_grad(), activate(model, per_sample=names):
        mixed = model(x)
    for n, name in enumerate(names):
        with torch.no_grad(), activate(model, name):
            torch.testing.assert_close(model(x[n : n + 1])[0], mixed[n], rtol=1e-5, atol=1e-5)
    other.detach()
    made.merge()
    torch.testing.assert_close(model(x)[2], mixed[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_training_lowers_a_loss_and_moves_every_number(clamp: Any) -> None:
    torch.manual_seed(0)
    model, x, wanted = nn.Sequential(nn.Linear(8, 6)), torch.randn(32, 8), torch.randn(32, 6)
    made = attach(model, SALT(top=2, rank=2, clamp=clamp), at="0")
    start = {name: p.clone() for name, p in made.trained().items()}
    optimizer = torch.optim.AdamW(made.parameter_groups(lr=0.02, weight_decay=0.01))
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), wanted) + made.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in made.trained().items())
