"""Copies, pickles, casts and the place where a backbone keeps its adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError, Bottleneck, LoRA, activate, attach, sets_of
from polyadapt.core.errors import SiteError
from polyadapt.tests.law_models import LAYERS, Block, tokens
from polyadapt.tests.law_table import CELLS, Cell, stir


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@pytest.mark.parametrize(
    "kind", ["deepcopy", *(pytest.param(k, marks=pytest.mark.slow) for k in [*COPIES][1:])]
)
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(c, marks=[] if c.typical else [pytest.mark.slow], id=str(c))
        for c in CELLS
        if c.acts and not c.row.like
    ],
)
def test_a_copy_has_the_same_bits_and_a_life_of_its_own(cell: Cell, kind: str) -> None:
    model, x = cell.model(), cell.inputs()
    cell.adapted(model, "a", seed=1)
    cell.adapted(model, "b", seed=2)
    twin = COPIES[kind](model)
    for name in ("a", "b", None):
        with activate(model, name), activate(twin, name):
            assert torch.equal(twin(x), model(x))
    before = model(x).detach()
    stir(sets_of(twin)["b"], seed=3)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    sets_of(model)["b"].detach()
    sets_of(model)["a"].detach()
    with activate(twin, "a"):
        assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_merged_model_unmerges(kind: str) -> None:
    model, x = LAYERS["linear"].model(), tokens()
    base = model(x)
    adapters = stir(attach(model, LoRA(rank=2), at="layer"))
    adapters.merge()
    twin = COPIES[kind](model)
    assert torch.equal(twin(x), model(x))
    sets_of(twin)["default"].unmerge()
    with activate(twin, None):
        assert torch.equal(twin(x), base)
    assert not torch.equal(model(x), base)


def _adapted() -> nn.Module:
    model = nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(16, 4))
    attach(model, Bottleneck(rank=2, placement="parallel_ffn"), at="0.0", name="a")
    stir(attach(model, LoRA(rank=2), at="0.0.mlp.0", name="b"))
    return model


@pytest.mark.parametrize("path", ["0", "0.0", "0.0.mlp", "0.0.mlp.0", "polyadapt_drawer"])
def test_a_part_that_shares_adapters_is_not_copied_alone(path: str) -> None:
    model = _adapted()
    with pytest.raises(AdaptError, match="copy the whole backbone"):
        copy.deepcopy(model.get_submodule(path))


@pytest.mark.parametrize("path", ["1", "0.1", "0.1.mlp"])
def test_a_part_without_adapters_is_copied_alone(path: str) -> None:
    part = _adapted().get_submodule(path)
    x = tokens()
    assert torch.equal(copy.deepcopy(part)(x), part(x))


def test_a_parent_of_the_backbone_is_copied_with_it() -> None:
    parent = nn.Sequential(_adapted(), nn.Tanh())
    assert torch.equal(copy.deepcopy(parent)(tokens()), parent(tokens()))


# Casts

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "a parent's cast": lambda m: nn.Sequential(m).bfloat16()[0],
    "a copy's cast": lambda m: copy.deepcopy(m).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_adapters_stay_in_fp32_when_the_backbone_is_cast(cast: str) -> None:
    model = LAYERS["linear"].model()
    attach(model, LoRA(rank=2), at="layer")
    twin = CASTS[cast](model)
    base = [p for n, p in twin.named_parameters() if "drawer" not in n]
    assert {p.dtype for p in base} <= {torch.bfloat16, torch.float16, torch.float64}
    own = list(sets_of(twin)["default"].parameters())
    assert {p.dtype for p in own} == {torch.float32}
    twin(tokens().to(base[0].dtype)).float().square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in own)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own)


def test_a_cast_keeps_the_parameters_that_an_optimiser_holds() -> None:
    model = LAYERS["linear"].model()
    held = list(attach(model, LoRA(rank=2), at="layer").parameters())
    now = sets_of(model.bfloat16())["default"].parameters()
    assert [id(p) for p in now] == [id(p) for p in held]


def test_a_move_takes_the_adapters_along_in_fp32() -> None:
    model = LAYERS["linear"].model()
    attach(model, LoRA(rank=2), at="layer")
    model.to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.polyadapt_drawer.parameters()} == {  # type: ignore[union-attr]
        ("meta", torch.float32)
    }
    model.to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_set_that_is_cast_itself_obeys() -> None:
    model = LAYERS["linear"].model()
    adapters = attach(model, LoRA(rank=2), at="layer").to(torch.float64)
    assert {p.dtype for p in adapters.parameters()} == {torch.float64}


@pytest.mark.parametrize("cell", [c for c in CELLS if c.acts and c.slot == "output"], ids=str)
def test_adapters_are_made_in_fp32_whatever_the_default(cell: Cell) -> None:
    model = cell.model()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does while modules are made
    try:
        adapters = cell.attach(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}


# The drawer


class WithChild(nn.Sequential):
    """Has a child of the drawer's name."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))
        self.polyadapt_drawer: nn.Module = nn.Identity()


class WithAttribute(nn.Sequential):
    """Has a plain attribute of the drawer's name."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))
        self.polyadapt_drawer = "mine"


class WithProperty(nn.Sequential):
    """Has a property of the drawer's name."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))

    @property
    def polyadapt_drawer(self) -> str:
        return "mine"


@pytest.mark.parametrize("kind", [WithChild, WithAttribute, WithProperty])
def test_a_backbone_that_owns_the_name_of_the_drawer_keeps_it(kind: type[nn.Module]) -> None:
    model = kind()
    with pytest.raises(AdaptError, match=f"{kind.__name__} already has something called"):
        attach(model, LoRA(rank=2), at="0")
    assert not isinstance(model.polyadapt_drawer, Tensor | nn.ModuleDict)


def test_a_root_that_calls_all_its_children_does_not_notice_the_drawer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4)
    y = model(x)
    attach(model, LoRA(rank=2), at="0")
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "root", [nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict({"0": nn.Linear(4, 4)})]
)
def test_a_root_that_is_never_called_is_refused(root: nn.Module) -> None:
    with pytest.raises(AdaptError, match="attach to a module that is called"):
        attach(root, LoRA(rank=2), at="0")


def test_one_parameter_is_not_adapted_through_two_backbones() -> None:
    model: Any = nn.Sequential(nn.Sequential(nn.MultiheadAttention(16, 2)))
    stir(attach(model[0], LoRA(rank=2), at="0.in_proj_weight[q]", name="inner"))
    inner = model[0][0].in_proj_weight.detach().clone()
    with pytest.raises(SiteError, match=r"0\.0\.in_proj_weight is adapted already"):
        attach(model, LoRA(rank=2), at="0.0.in_proj_weight[v]", name="outer")
    assert sets_of(model) == {}
    assert torch.equal(model[0][0].in_proj_weight, inner)


def test_a_set_of_a_part_keeps_learning_under_a_set_of_the_whole() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    inner = attach(model[0], LoRA(rank=2), at="0", name="inner")
    attach(model, LoRA(rank=2), at="1", name="outer")
    assert all(p.requires_grad for p in inner.parameters())
    assert list(model.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
