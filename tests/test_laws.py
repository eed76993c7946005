"""Laws 1 to 8: what every method promises at every layer kind, cell by cell of the law table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polyadapt.core import AdaptError, AdapterSet, MoSA, activate, attach, load, select, switch
from polyadapt.core.errors import SiteError, StoreError
from polyadapt.tests.law_models import BATCH, Unused
from polyadapt.tests.law_table import CELLS, Cell, outputs_after_loading, stir


def _each(cells: Sequence[Cell]) -> pytest.MarkDecorator:
    """Every cell; fast runs have the typical ones."""
    marks = {True: [], False: [pytest.mark.slow]}
    params = [pytest.param(c, marks=marks[c.typical], id=str(c)) for c in cells]
    return pytest.mark.parametrize("cell", params)


by_cell = _each(CELLS)
by_acting_cell = _each([c for c in CELLS if c.acts])
by_merging_cell = _each([c for c in CELLS if c.row.weight])
by_twofold_cell = _each([c for c in CELLS if c.both_forms])

# precision -> dtype of the backbone, and how far two equal computations may be apart, relative to
# the largest output: measured 7e-7, 7e-16, 0.024 and 0.027. bf16 keeps 8 bits, so each of the six
# roundings on the way moves a value by up to 2^-9, and the norm behind the layer doubles that.
PRECISIONS: dict[str, tuple[torch.dtype, float]] = {
    "fp32": (torch.float32, 5e-6),
    "fp64": (torch.float64, 1e-14),
    "autocast": (torch.float32, 0.04),
    "bf16": (torch.bfloat16, 0.04),
}


def run(model: nn.Module, x: Tensor, *, training: bool = False) -> Tensor:
    """Train with grad or eval without: torch's encoder layer has a path of its own for each."""
    model.train(training)
    with torch.set_grad_enabled(training):
        y: Tensor = model(x)
    return y.detach()


def apart(y: Tensor, z: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((y.double() - z.double()).abs().max() / y.double().abs().max())


# Law 1


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@by_cell
def test_a_fresh_set_leaves_every_bit_of_the_output(cell: Cell, training: bool) -> None:
    base, model, x = cell.model(), cell.model(), cell.inputs()
    cell.attach(model)
    y, z = run(base, x, training=training), run(model, x, training=training)
    assert torch.equal(y, z) == cell.identity
    assert not cell.row.near or apart(y, z) < 1e-3


# Law 2


@by_cell
def test_counts_equal_the_formula(cell: Cell) -> None:
    adapters = cell.attach(cell.model())
    trained, stored = cell.row.trained, cell.row.stored or cell.row.trained
    shared = cell.row.shared(adapters.sites)
    assert adapters.trainable_count() == sum(map(trained, adapters.sites)) + shared
    assert adapters.stored_count() == sum(map(stored, adapters.sites)) + shared


# Law 3


def _precisely(precision: str, x: Tensor) -> tuple[Tensor, AbstractContextManager[object]]:
    dtype, _ = PRECISIONS[precision]
    around = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    return x.to(dtype) if x.is_floating_point() else x, around


@pytest.mark.parametrize(
    ("precision", "training"),
    [
        pytest.param(precision, training, marks=[pytest.mark.slow] * (training and n > 0))
        for n, precision in enumerate(PRECISIONS)
        for training in (False, True)
    ],
)
@by_merging_cell
def test_both_forms_and_the_merged_weights_agree(
    cell: Cell, precision: str, training: bool
) -> None:
    dtype, bound = PRECISIONS[precision]
    model, twin = (cell.model().to(dtype) for _ in range(2))
    adapters = cell.adapted(model)
    by_weight = cell.attach(twin, slot="weight") if cell.both_forms else None
    x, around = _precisely(precision, cell.inputs())
    with around:
        y = _without_dropout(model, adapters, x, training)
        if by_weight:
            by_weight.load_state_dict(adapters.state_dict())
            assert apart(y, _without_dropout(twin, by_weight, x, training)) <= bound
        adapters.merge()
        assert apart(y, _without_dropout(model, adapters, x, training)) <= bound
    assert apart(y, run(cell.model().to(dtype), x)) > 0.05  # the set does act


def _without_dropout(model: nn.Module, adapters: AdapterSet, x: Tensor, training: bool) -> Tensor:
    model.train(training)
    adapters.eval()
    with torch.set_grad_enabled(training):
        y: Tensor = model(x)
    return y.detach()


@by_acting_cell
def test_inference_mode_gives_the_same_bits_and_training_goes_on(cell: Cell) -> None:
    model, x = cell.model(), cell.inputs()
    cell.adapted(model)
    y = run(model, x)
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    model(x).sum().backward()  # nothing that was kept is an inference tensor
    with torch.inference_mode():
        assert torch.equal(model(x), y)


@by_cell
def test_a_method_without_a_weight_form_cannot_be_merged(cell: Cell) -> None:
    adapters = cell.attach(cell.model())
    if not cell.row.weight:
        with pytest.raises(AdaptError, match=r"cannot be merged|nothing to merge"):
            adapters.merge()
    else:
        adapters.merge()
        adapters.unmerge()


# Law 4


def _traces(model: nn.Module) -> list[object]:
    """What an attached set could leave behind: classes, hooks, attributes, flags."""
    found: list[object] = []
    for module in model.modules():
        hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        found.append((type(module), hooks, sorted(vars(module)), list(module._modules)))
    return [*found, [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]]


def _same_state(model: nn.Module, base: nn.Module) -> None:
    """Every module of the backbone holds exactly its own names and values."""
    for path, module in base.named_modules():
        own, here = module.state_dict(), model.get_submodule(path).state_dict()
        assert here.keys() == own.keys()
        assert all(torch.equal(here[key], own[key]) for key in own)


@by_cell
def test_attach_and_detach_leave_the_backbone_as_it_was(cell: Cell) -> None:
    model, base = cell.model(), cell.model()
    next(model.parameters()).requires_grad_(True)
    before = _traces(model)
    first, second = cell.adapted(model), cell.adapted(model, "b", seed=2)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "drawer" not in n)
    _same_state(model, base)
    first.detach()
    second.detach()
    assert _traces(model) == before
    _same_state(model, base)


@by_merging_cell
def test_merge_and_unmerge_give_the_same_parameters_back(cell: Cell) -> None:
    model, base = cell.model(), cell.model()
    adapters = cell.adapted(model)
    held = {name: id(p) for name, p in model.named_parameters()}
    y = run(model, cell.inputs())
    adapters.merge()
    assert {name: id(p) for name, p in model.named_parameters()} != held
    merged = run(model, cell.inputs())
    kept = {key: t.clone() for key, t in adapters.state_dict().items()}
    stir(adapters, seed=3)  # the merged weights are the set's no longer
    assert torch.equal(run(model, cell.inputs()), merged)
    adapters.load_state_dict(kept)
    adapters.unmerge()
    assert {name: id(p) for name, p in model.named_parameters()} == held
    _same_state(model, base)
    assert torch.equal(run(model, cell.inputs()), y)


@by_cell
def test_a_checkpoint_of_the_base_loads_strictly_under_a_set(cell: Cell) -> None:
    model, other = cell.model(), cell.model(seed=5)
    adapters = cell.adapted(model)
    kept = {key: t.clone() for key, t in adapters.state_dict().items()}
    model.load_state_dict(other.state_dict(), strict=True)
    _same_state(model, other)
    assert all(torch.equal(t, kept[key]) for key, t in adapters.state_dict().items())
    with activate(model, None):
        assert torch.equal(run(model, cell.inputs()), run(other, cell.inputs()))


# Law 5


def _gradients(cell: Cell, model: nn.Module, adapters: AdapterSet) -> dict[str, Tensor | None]:
    # MoSA trains the experts that it drew; its mean, in eval, reaches all of them.
    model.train(not isinstance(cell.row.recipe, MoSA))
    adapters.train(model.training and not getattr(cell.row.recipe, "dropout", 0))
    y = model(cell.inputs())
    weights = torch.linspace(-1, 1, y.numel()).cos().view(y.shape)  # uneven: norms fix plain sums
    (y * weights).sum().backward()
    return {name: p.grad for name, p in adapters.trained().items()}


@by_acting_cell
def test_gradients_reach_every_adapter_tensor_and_no_frozen_one(cell: Cell) -> None:
    model = cell.model()
    adapters = cell.adapted(model)
    found = _gradients(cell, model, adapters)
    assert len(found) == len(list(adapters.parameters()))
    assert [name for name, g in found.items() if g is None or not bool(g.abs().max() > 0)] == []
    frozen = [p for name, p in model.named_parameters() if "drawer" not in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@by_twofold_cell
def test_gradients_of_both_forms_agree(cell: Cell) -> None:
    model, twin = cell.model(), cell.model()
    adapters, by_weight = cell.adapted(model), cell.attach(twin, slot="weight")
    by_weight.load_state_dict(adapters.state_dict())
    found, other = _gradients(cell, model, adapters), _gradients(cell, twin, by_weight)
    for name, gradient in found.items():
        assert gradient is not None
        wanted = other[name]
        assert wanted is not None
        assert apart(wanted, gradient) < 1e-4, name


# Law 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file per cell, and beside it what each model put out when it was saved."""
    folder = tmp_path_factory.mktemp("files")
    outputs = {}
    for number, cell in enumerate(CELLS):
        model = cell.model()
        cell.adapted(model).save(folder / f"{number}.safetensors")
        outputs[str(cell)] = run(model, cell.inputs())
    torch.save(outputs, folder / "saved.pt")
    return folder


@pytest.fixture(scope="module")
def reloaded(saved: Path) -> dict[str, Tensor]:
    """What a fresh process with another seed puts out after loading every file."""
    program = [sys.executable, "-m", "polyadapt.tests.law_table", str(saved), "12345"]
    subprocess.run(program, check=True)
    outputs: dict[str, Tensor] = torch.load(saved / "outputs.pt")
    return outputs


@pytest.mark.slow
@by_cell
def test_a_fresh_process_gives_the_same_bits_from_the_file(
    cell: Cell, saved: Path, reloaded: dict[str, Tensor]
) -> None:
    assert torch.equal(reloaded[str(cell)], torch.load(saved / "saved.pt")[str(cell)])


@pytest.mark.slow
def test_loading_moves_no_random_number(saved: Path) -> None:
    before = torch.get_rng_state()
    outputs_after_loading(saved)
    assert torch.equal(torch.get_rng_state(), before)


# Law 7


@by_acting_cell
def test_switching_there_and_back_gives_the_same_bits(cell: Cell) -> None:
    model, base, x = cell.model(), cell.model(), cell.inputs()
    cell.adapted(model, "a", seed=1)
    cell.adapted(model, "b", seed=2)
    seen = []
    for name in ("a", "b", "a", None):
        with activate(model, name):
            seen.append(run(model, x))
    switch(model, "a")
    seen.append(run(model, x))
    a, b, again, none, switched = seen
    assert torch.equal(a, again)
    assert torch.equal(a, switched)
    assert torch.equal(none, run(base, x))
    assert apart(a, b) > 1e-2


@by_acting_cell
def test_a_mixed_batch_equals_the_loop_over_its_samples(cell: Cell) -> None:
    model, base, x = cell.model(), cell.model(), cell.inputs()
    cell.adapted(model, "a", seed=1)
    cell.adapted(model, "b", seed=2)
    names = ["b", None, "a", "b"]
    with activate(model, per_sample=names):
        mixed = run(model, x)
    with activate(model, per_sample=[None] * BATCH):
        none = run(model, x)
    assert torch.equal(none, run(base, x))
    assert torch.equal(mixed[1], none[1])
    for n, name in enumerate(names):
        with activate(model, name):
            assert apart(run(model, x[n : n + 1])[0], mixed[n]) <= _batch_against_loop(base, x)


def _batch_against_loop(base: nn.Module, x: Tensor) -> float:
    """How far the base itself moves when a sample comes alone: its kernels sum in another order."""
    loop = torch.cat([run(base, x[n : n + 1]) for n in range(len(x))])
    rounding = 16 * torch.finfo(torch.float32).eps  # of the adapters' own few products
    return apart(run(base, x), loop) + rounding


# Law 8


@by_acting_cell
def test_a_file_for_other_weights_is_refused_by_name(cell: Cell, saved: Path) -> None:
    path = saved / f"{CELLS.index(cell)}.safetensors"
    model = cell.model(seed=9)
    before = _traces(model)
    named = "|".join(f"{s.path}.{s.parameter or ''}".lstrip(".") for s in cell.sites(model))
    with pytest.raises(StoreError, match=f"made on other weights: .*first ({named})"):
        load(model, path)
    assert _traces(model) == before


@by_cell
def test_a_set_of_other_tensors_is_refused_and_changes_nothing(cell: Cell) -> None:
    adapters = cell.adapted(cell.model())
    own = adapters.state_dict()
    kept = {key: t.clone() for key, t in own.items()}
    doubled = {key: 2 * t for key, t in kept.items()}
    for wrong in (*_each_without_one(doubled), {**doubled, "stray/A": torch.zeros(1)}):
        with pytest.raises(AdaptError, match=r"missing|does not belong"):
            adapters.load_state_dict(wrong)
    assert all(torch.equal(own[key], kept[key]) for key in own)


def _each_without_one(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: t for k, t in state.items() if k != left_out} for left_out in state]


@by_acting_cell
def test_a_site_that_nothing_calls_is_named_by_the_probe(cell: Cell) -> None:
    model = Unused(cell.model)
    inner = [site.name for site in cell.sites(cell.model())]
    used, spare = ([f"{twin}.{name}" for name in inner] for twin in ("used", "spare"))
    before = _traces(model)
    with pytest.raises(SiteError, match="do not act") as refused:
        attach(model, cell.row.recipe, [*used, *spare], probe=cell.inputs())
    assert spare[0] in str(refused.value)
    assert used[0] not in str(refused.value)
    assert _traces(model) == before
    attach(model, cell.row.recipe, used, probe=cell.inputs())


@by_merging_cell
def test_a_tied_weight_is_refused_under_both_names(cell: Cell) -> None:
    model = cell.model()
    site = cell.sites(model)[0]
    owner = model.get_submodule(site.path)
    model.twin = nn.Module()
    model.twin.register_parameter("tied", owner._parameters[site.parameter or ""])
    with pytest.raises(SiteError, match=r"tied.* and .*twin\.tied|twin\.tied and"):
        select(model, site.name)
