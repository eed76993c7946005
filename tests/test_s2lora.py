"""S2-LoRA: the shared pair, its gradients, what is sparse, what it costs, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import whisper
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from polyadapt.core import AdaLoRA, AdaptError, AdapterSet, LoRA, Recipe, S2LoRA, attach, select
from polyadapt.core.adapters.s2lora import S2LoRAAdapter
from polyadapt.core.optim.proximal import proximal_step
from polyadapt.core.training import warmup_cosine

A = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
B = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
LAM = (0.5, -1.0), (0.0, 2.0)
X = torch.tensor([[1.0, -1.0]])


class Two(nn.Module):
    """Two layers that get the same input."""

    def __init__(self, d_in: int = 6, d_out: int = 6) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(d_in, d_out), nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) + self.v(x)
        return y


def two(seed: int = 0, d_in: int = 6, d_out: int = 6) -> Two:
    torch.manual_seed(seed)
    return Two(d_in, d_out)


def sparse(made: AdapterSet) -> list[S2LoRAAdapter]:
    return [a for a in made.adapters.values() if isinstance(a, S2LoRAAdapter)]


def by_hand(**settings: Any) -> tuple[nn.Module, AdapterSet]:
    """The card's two modules."""
    model = two(d_in=2, d_out=3)
    made = attach(model, S2LoRA(rank=2, **settings), at="{q,v}")
    fill(made, {"A_2": A, "B_3": B})
    with torch.no_grad():
        for adapter, lam in zip(sparse(made), LAM, strict=True):
            adapter.lam.copy_(torch.tensor(lam))
    return model, made


def fill(made: AdapterSet, factors: dict[str, Tensor]) -> None:
    assert made.bank is not None
    with torch.no_grad():
        for name, factor in factors.items():
            made.bank.get_parameter(name).copy_(factor)


def stirred(made: AdapterSet) -> AdapterSet:
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return made


# The update


def test_the_updates_of_the_hand_example() -> None:
    _, made = by_hand()
    first, second = (adapter.weight(torch.zeros(3, 2)) for adapter in sparse(made))
    assert first.tolist() == [[0.5, 1.0], [1.0, 1.0], [0.0, -3.0]]
    assert second.tolist() == [[0.0, 0.0], [0.0, 2.0], [0.0, 6.0]]
    assert (X @ first.T).tolist() == [[-0.5, 0.0, 3.0]]
    assert (X @ second.T).tolist() == [[0.0, -2.0, -6.0]]


def test_the_shared_factors_get_the_sum_of_both_modules_gradients() -> None:
    model, made = by_hand()
    model(X).sum().backward()
    found = {name: p.grad for name, p in made.trained().items()}
    assert found.keys() == {".bank/A_2", ".bank/B_3", "q/lam", "v/lam"}
    lists = {name: [] if g is None else g.tolist() for name, g in found.items()}
    assert lists[".bank/A_2"] == [[1.5, -1.5], [4.0, -4.0]]
    assert lists[".bank/B_3"] == [[-0.5, -1.0]] * 3
    assert lists["q/lam"] == lists["v/lam"] == [-3.0, -4.0]


@pytest.mark.parametrize("init", ["adalora", "lora"])
def test_a_new_set_leaves_every_bit_of_every_module(init: Any) -> None:
    model, base, x = two(), two(), torch.randn(4, 6)
    made = attach(model, S2LoRA(rank=3, init=init), at="{q,v}")
    for name in ("q", "v"):
        assert torch.equal(model.get_submodule(name)(x), base.get_submodule(name)(x))
    lam = torch.cat([adapter.lam for adapter in sparse(made)])
    assert lam.tolist() == [0.0 if init == "adalora" else 1.0] * 6


def test_the_factors_start_as_the_recipe_says() -> None:
    model = two(d_in=400, d_out=300)
    made = attach(model, S2LoRA(rank=60), at="{q,v}")
    assert made.bank is not None
    for factor in made.bank.parameters():
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.02)
    made = attach(model, S2LoRA(rank=60, init="lora"), at="{q,v}", name="b")
    assert made.bank is not None
    a, b = made.bank.get_parameter("A_400"), made.bank.get_parameter("B_300")
    assert float(a.detach().abs().max()) == pytest.approx(1 / 20, rel=1e-3)
    assert not bool(b.any())


def test_at_step_0_only_coefficients_have_a_gradient_and_then_the_bank_has() -> None:
    model = two()
    made = attach(model, S2LoRA(rank=3, orthogonality=0.0), at="{q,v}")
    optimizer = torch.optim.AdamW(made.parameter_groups(lr=1e-2))
    assert made.bank is not None
    x, target = torch.randn(2, 4, 6, generator=Generator().manual_seed(0))
    acts = []
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        shared = [p.grad for p in made.bank.parameters()]
        own = [adapter.lam.grad for adapter in sparse(made)]
        acts.append([g is not None and bool(g.any()) for g in (*shared, *own)])
        optimizer.step()
    assert acts == [[False, False, True, True], [True, True, True, True]]


def test_with_lam_of_one_it_is_lora_and_with_a_private_bank_adalora() -> None:
    model, x = two(), torch.randn(4, 6)
    made = stirred(attach(model, S2LoRA(rank=3, alpha=12), at="q"))
    adapter = sparse(made)[0]
    a, b, lam = (factor.clone() for factor in adapter.factors()[:3])
    y = model(x)
    other = two()
    ada = attach(other, AdaLoRA(rank=3, initial_rank=3, alpha=12, allocate=False), at="q")
    ada.load_state_dict({"q/A": a, "q/B": b, "q/E": lam})
    assert torch.equal(other(x), y)
    adapter.lam.data.fill_(1.0)
    other = two()
    attach(other, LoRA(rank=3, alpha=12), at="q").load_state_dict({"q/A": a, "q/B": b})
    assert torch.equal(other(x), model(x))
    assert not torch.equal(model(x), y)


def test_merged_weights_give_the_unmerged_forward() -> None:
    model, x = two(), torch.randn(4, 6)
    made = stirred(attach(model, S2LoRA(rank=3), at="{q,v}"))
    y = model(x)
    made.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_on_the_branch_alone() -> None:
    model, x = two(), torch.ones(1000, 6)
    made = stirred(attach(model, S2LoRA(rank=3, dropout=0.5), at="q"))
    assert torch.allclose(model.eval()(x)[0], model(x)[1])
    trained = model.train()(x)
    assert len(trained.unique(dim=0)) > 10
    made.eval()
    assert torch.equal(model(x), model.eval()(x))  # the set's own mode counts


# What is sparse


def test_the_penalty_is_zero_for_orthonormal_factors_and_squared_for_others() -> None:
    _, made = by_hand(orthogonality=1.0)
    assert made.penalty().item() == (24.0 + 105.0) / 2  # divided by the number of matrices
    fill(made, {"A_2": torch.eye(2).flip(0), "B_3": torch.eye(3)[:, :2]})
    assert made.penalty().item() == 0.0


def test_l1_in_the_loss_is_divided_by_modules_and_rank() -> None:
    _, made = by_hand(sparsity="loss", l1=0.8, orthogonality=0.0)
    assert made.penalty().item() == pytest.approx(0.8 * (0.5 + 1.0 + 0.0 + 2.0) / (2 * 2))
    _, made = by_hand(l1=0.8, orthogonality=0.0)
    assert made.penalty().item() == 0.0  # the proximal step's: one of them, not both


def test_growing_factors_would_cheat_the_l1_term_but_for_the_orthogonality() -> None:
    model, made = by_hand(sparsity="loss", l1=4.0, orthogonality=0.0)
    _, guard = by_hand(orthogonality=1.0)
    y, l1, r = model(X), made.penalty().item(), guard.penalty().item()
    fill(made, {"A_2": 2 * A, "B_3": 2 * B})
    fill(guard, {"A_2": 2 * A, "B_3": 2 * B})
    for adapter in sparse(made):
        adapter.lam.data /= 4
    assert torch.equal(model(X), y)
    assert made.penalty().item() == l1 / 4
    assert guard.penalty().item() > r


def test_the_proximal_step_gives_exact_zeros_at_the_rate_of_the_coefficients() -> None:
    model = two()
    made = attach(model, S2LoRA(rank=3, l1=1.0, warmup=2), at="q")
    (adapter,) = sparse(made)
    adapter.lam.data = torch.tensor([0.3, -0.05, 0.1])
    before = {n: p.clone() for n, p in made.trained().items() if "bank" in n}
    optimizer = torch.optim.SGD(made.parameter_groups(lr=0.1))
    proximal_step(optimizer, 2)
    assert adapter.lam.tolist() == pytest.approx([0.3, -0.05, 0.1])
    proximal_step(optimizer, 3)
    assert adapter.lam.tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert adapter.rank() == 1
    assert all(torch.equal(p, made.trained()[n]) for n, p in before.items())


def test_every_tensor_is_in_one_group_without_decay() -> None:
    made = attach(two(), S2LoRA(rank=3, l1=0.3), at="{q,v}")
    lam, bank = made.parameter_groups(lr=1e-3, weight_decay=0.1)
    assert (lam["lr"], bank["lr"]) == (1e-3, pytest.approx(1e-4))
    assert lam["weight_decay"] == bank["weight_decay"] == 0.0
    assert (lam["l1"], lam["l1_warmup"]) == (0.3, 0.1)
    assert "l1" not in bank
    grouped = [id(p) for group in (lam, bank) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in made.parameters())
    assert len({*grouped}) == len(grouped) == 4
    (lam, _) = attach(two(), S2LoRA(sparsity="loss", rank=3), at="q").parameter_groups(1.0)
    assert "l1" not in lam


@pytest.mark.parametrize("l1", [0.0, 0.5])
def test_the_useful_ranks_survive_and_the_others_are_exactly_zero(l1: float) -> None:
    """The target is an update of rank 2 at q and none at v; the data are noisy."""
    model, target, total = two(), two(), 300
    generator = Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    with torch.no_grad():
        target.q.weight += basis[:, :2] @ torch.diag(torch.tensor([1.0, -0.7])) @ basis[2:4]
    made = attach(model, S2LoRA(rank=4, l1=l1), at="{q,v}", generator=generator)
    fill(made, {"A_6": basis[2:6], "B_6": basis[:, [0, 1, 4, 5]]})
    optimizer = torch.optim.AdamW(made.parameter_groups(lr=5e-2))
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, 0.1))
    q, v = sparse(made)
    zeros = 0
    for step in range(1, total + 1):
        x, noise = torch.randn(2, 16, 6, generator=generator)
        errors = [getattr(model, n)(x) - getattr(target, n)(x) + noise / 2 for n in "qv"]
        loss = torch.stack(errors).square().mean() + made.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        proximal_step(optimizer, step, total)
        schedule.step()
        zeros += 8 - q.rank() - v.rank() if step > total - 100 else 0
    assert zeros == 0 if l1 == 0 else zeros > 0.9 * 6 * 100  # of 6 that only noise moves
    assert q.lam[:2].tolist() == pytest.approx([1.0, -0.7], abs=0.05 if l1 == 0 else 0.35)


# What it costs


class Towers(nn.Module):
    """openai-whisper's encoder and decoder of a size, their shapes only."""

    def __init__(self, name: str) -> None:
        super().__init__()
        states, layers = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12)}[name]
        sizes = states, states // 64, layers
        with torch.device("meta"):
            self.encoder = whisper.model.AudioEncoder(80, 1500, *sizes)
            self.decoder = whisper.model.TextDecoder(51865, 448, *sizes)


ATTENTION = "**.{attn,cross_attn}.{query,key,value,out}"
MLP = "**.blocks.*.mlp.{0,2}"


@pytest.mark.parametrize(
    ("name", "total", "modules", "attn", "dim", "shape", "lora"),
    [
        ("tiny", 37_184_640, (48, 16), 26_112, 31_232, 37_376, 294_912),
        ("base", 71_825_920, (72, 24), 35_072, 41_728, 49_920, 589_824),
        ("small", 240_582_912, (144, 48), 53_760, 62_976, 75_264, 1_769_472),
    ],
)
def test_counts_on_whisper_are_the_cards(
    name: str, total: int, modules: tuple[int, int], attn: int, dim: int, shape: int, lora: int
) -> None:
    model = Towers(name)
    assert sum(p.numel() for p in model.parameters()) == total
    attention, mlp = select(model, ATTENTION), select(model, MLP)
    assert (len(attention), len(mlp)) == modules
    recipe = S2LoRA(rank=8)
    for chosen, sites, wanted in (
        (S2LoRA(), attention, attn),
        (recipe.replace(share="dim"), (*attention, *mlp), dim),
        (recipe.replace(share="shape"), (*attention, *mlp), shape),
    ):
        shapes = chosen.bank_shapes(sites).values()
        assert sum(a * b for a, b in shapes) + chosen.rank * len(sites) == wanted
    assert sum(8 * sum(site.shape) for site in attention) == lora


def test_the_attached_set_and_its_file_count_as_many(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = Towers("tiny").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    made = attach(model, S2LoRA(), at=ATTENTION)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 26_112
    assert made.trainable_count() == made.stored_count() == 26_112
    made.save(tmp_path / "set.safetensors")
    assert sum(t.numel() for t in load_file(tmp_path / "set.safetensors").values()) == 26_112


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 is not allowed"),
        ({"alpha": 0.0}, "alpha=0 is not allowed"),
        ({"share": "slice"}, "share='slice' is not allowed: attn or dim or shape"),
        ({"share": ["attn"]}, r"share=\['attn'\] is not allowed"),
        ({"init": "zero"}, "init='zero' is not allowed: adalora or lora"),
        ({"sparsity": "both"}, "sparsity='both' is not allowed: proximal or loss"),
        ({"l1": -1.0}, "l1=-1.0 is below 0"),
        ({"l1": float("nan")}, "l1=nan is not allowed: a finite number"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0 is below 0"),
        ({"bank_lr_ratio": -1.0}, "bank_lr_ratio=-1.0 is below 0"),
        ({"warmup": 1.5}, "warmup=1.5 is not allowed: a whole number of steps, or a share"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"kept": ["q"]}, r"kept=\['q'\] is not allowed"),
        ({"rank": 2, "kept": {"q": 3}}, "kept=3 at q is more than rank=2"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        S2LoRA(**settings)


def test_one_pair_refuses_sites_of_other_shapes_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 24))
    with pytest.raises(AdaptError) as error:
        attach(model, S2LoRA(rank=2), at="{0,1}")
    assert "1 is [24, 6] and 0 [6, 6]" in str(error.value)
    assert "share='dim' (a matrix per side) or 'shape' (a pair per shape)" in str(error.value)
    assert attach(model, S2LoRA(rank=2, share="dim"), at="{0,1}").trainable_count() == 2 * 36 + 4
    made = attach(model, S2LoRA(rank=2, share="shape"), at="{0,1}", name="b")
    assert made.trainable_count() == 2 * (12 + 30) + 4


def test_a_site_without_a_matrix_and_a_rank_that_does_not_fit_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    with pytest.raises(AdaptError, match=r"1\.weight is of shape"):
        attach(model, S2LoRA(rank=2), at="1.weight")
    with pytest.raises(AdaptError, match="rank 7 does not fit 0"):
        attach(model, S2LoRA(rank=7), at="0")
    with pytest.raises(AdaptError, match=r"dropout=0\.5 cannot act on 0"):
        attach(model, S2LoRA(rank=2, dropout=0.5), at=select(model, "0", slot="weight"))


def test_settings_survive_json() -> None:
    recipe = S2LoRA(rank=4, share="dim", warmup=20, kept={"q": 2})
    assert Recipe.from_json(recipe.to_json()) == recipe
