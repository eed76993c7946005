"""AdaptedModule: what is trained and how, what is refused, what a checkpoint holds."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import AdaptError, FullFineTuning, HeadOnly, LoRA, MoSA, Recipe
from polyadapt.core.order import epoch_loader
from polyadapt.core.training import AdaptedModule, warmup_cosine
from polyadapt.tests.training_cases import quiet_trainer

QKV = "blocks.*.attn.qkv"


def vit(depth: int = 1, width: int = 16) -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=width, depth=depth, num_heads=2, num_classes=0
    )


class Task(AdaptedModule):
    """Three classes of small pictures."""

    def __init__(
        self,
        adapter: Recipe,
        at: str | list[str] | None = None,
        backbone: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone or vit(), adapter, at, **options)
        self.head = nn.Linear(16, 3)
        self.rates: list[float] = []

    def training_loss(self, batch: Any) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(self.head(self.backbone(pictures)), labels)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.rates.append(optimizer.param_groups[0]["lr"])


def pictures(number: int = 20) -> TensorDataset:
    return TensorDataset(torch.randn(number, 3, 16, 16), torch.randint(3, (number,)))


def fit(task: AdaptedModule, number: int = 20, **options: Any) -> Trainer:
    trainer = quiet_trainer(**options)
    loader: DataLoader[Any] = epoch_loader(pictures(number), 4, seed=0)
    trainer.fit(task, loader)
    return trainer


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


# Training


def test_adapters_and_head_are_trained_and_the_backbone_is_not() -> None:
    task = Task(LoRA(rank=2), QKV)
    frozen, started = copied(task.backbone), copied(task)
    fit(task)
    assert all(torch.equal(frozen[n], t) for n, t in task.backbone.state_dict().items())
    assert [n for n, t in task.state_dict().items() if torch.equal(started[n], t)] == []


def test_matrices_decay_and_vectors_do_not() -> None:
    task = Task(LoRA(rank=2), QKV, weight_decay=0.5)
    trainer = fit(task)
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    named = dict(task.adapters.named_parameters())
    assert [decays.pop(id(p)) for p in named.values()] == [0.5, 0.5]  # A and B
    assert (decays.pop(id(task.head.weight)), decays.pop(id(task.head.bias))) == (0.5, 0.0)
    assert not decays


def test_the_learning_rate_rises_over_the_warm_up_and_falls_as_a_cosine() -> None:
    task = Task(LoRA(rank=2), QKV, lr=0.3, warmup=0.2)
    fit(task, max_epochs=2)  # 10 steps, 2 of them warm-up
    falling = [0.15 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert task.rates == pytest.approx([0.1, 0.2, *falling])


def test_the_schedule_ends_at_zero_and_stays_there() -> None:
    assert [warmup_cosine(step, 4, 0.0) for step in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]


def test_after_step_is_called_once_per_optimiser_step_also_when_gradients_accumulate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Task(LoRA(rank=2), QKV)
    calls: list[tuple[int, int | None]] = []
    before = [task.head.weight.detach().clone()]

    def record(step: int, total: int | None) -> None:
        assert task.head.weight.grad is not None, "after_step comes before zero_grad"
        assert not torch.equal(task.head.weight, before[-1]), "after_step comes after the step"
        before.append(task.head.weight.detach().clone())
        calls.append((step, total))

    monkeypatch.setattr(task.adapters, "after_step", record)
    fit(task, max_epochs=2, accumulate_grad_batches=2)  # 5 batches: 2 + 2 + 1
    assert calls == [(step, 6) for step in range(1, 7)]


def test_the_penalty_is_added_to_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(LoRA(rank=2), QKV)
    batch = pictures(4).tensors
    plain = task.training_step(batch, 0).detach()
    monkeypatch.setattr(task.adapters, "penalty", lambda: torch.tensor(0.25))
    assert float(task.training_step(batch, 0).detach() - plain) == pytest.approx(0.25)


def test_one_seed_gives_the_same_adapters_whatever_was_drawn_before() -> None:
    first = Task(LoRA(rank=2), QKV, seed=7)
    torch.rand(3)
    second = Task(LoRA(rank=2), QKV, seed=7)
    pairs = zip(first.adapters.parameters(), second.adapters.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = Task(LoRA(rank=2), QKV, seed=8)
    assert not torch.equal(next(first.adapters.parameters()), next(other.adapters.parameters()))


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(768, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.mix(x.flatten(1))))  # type: ignore[no-any-return]


def test_running_statistics_of_the_backbone_stay_frozen() -> None:
    task = Task(LoRA(rank=2), "mix", WithBatchNorm())
    frozen = copied(task.backbone)
    norm, drop = task.backbone.norm, task.backbone.drop
    assert isinstance(norm, nn.Module)
    assert isinstance(drop, nn.Module)
    assert (norm.training, drop.training) == (False, True)
    fit(task)
    assert (norm.training, drop.training) == (False, True)
    assert all(torch.equal(frozen[n], t) for n, t in task.backbone.state_dict().items())


def test_a_backbone_given_in_evaluation_mode_is_trained_in_training_mode() -> None:
    task = Task(LoRA(rank=2), QKV, vit().eval())
    assert all(module.training for module in task.modules())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_adapters_stay_in_single_precision(precision: Any) -> None:
    task = Task(LoRA(rank=2), QKV)
    started = copied(task)
    seen: set[torch.dtype | None] = set()

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.update(p.dtype for p in task.adapters.parameters())

    task.backbone.register_forward_hook(note)
    fit(task, number=4, precision=precision)
    weights = {parameter.dtype for parameter in task.backbone.blocks[0].mlp.parameters()}  # type: ignore[union-attr, index]
    assert weights == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert seen == {torch.float32}
    assert not torch.equal(
        started["adapter/blocks.0.attn.qkv/B"], task.adapters.state_dict()["blocks.0.attn.qkv/B"]
    )


def test_each_adapter_is_registered_once_and_copies_are_their_own() -> None:
    task = Task(LoRA(rank=2), QKV)
    names = [n for n, _ in task.named_parameters(remove_duplicate=False) if "drawer" in n]
    assert len(names) == 2
    twin = copy.deepcopy(task)
    with torch.no_grad():
        for parameter in twin.adapters.parameters():
            parameter.fill_(7.0)
    assert all(bool((p == 7.0).all()) for n, p in twin.named_parameters() if "drawer" in n)
    assert not any(bool((p == 7.0).any()) for p in task.adapters.parameters())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 is not allowed: above 0"),
        ({"lr": math.nan}, "lr=nan is not allowed"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is below 0"),
        ({"warmup": 1.0}, "warmup=1.0 is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        Task(LoRA(rank=2), QKV, **options)


class Steep(Task):
    """Its largest gradient is 1000, of the head's bias; the third loss is not a number."""

    def training_loss(self, batch: Any) -> Tensor:
        bad = math.nan if self.trainer.global_step == 2 else 0.0
        return super().training_loss(batch) + 1000 * self.head.bias.sum() + bad


def test_a_loss_that_is_not_a_number_names_the_step_and_the_largest_gradient() -> None:
    message = r"step 3: the loss is nan; the largest gradient .* was 1e\+03 at head.bias; lower lr"
    with pytest.raises(AdaptError, match=message):
        fit(Steep(LoRA(rank=2), QKV))


class Cusp(Task):
    """A finite loss whose gradient is not: the root of |x| at 0."""

    def training_loss(self, batch: Any) -> Tensor:
        rootless = self.head.bias - self.head.bias.detach()
        return super().training_loss(batch) + rootless.abs().sqrt().sum()


def test_a_gradient_that_is_not_finite_is_refused_by_name_before_the_step() -> None:
    task = Cusp(LoRA(rank=2), QKV)
    started = copied(task)
    message = "step 1: the gradient of head.bias is not finite; no step was taken before"
    with pytest.raises(AdaptError, match=message):
        fit(task)
    assert all(torch.equal(started[n], t) for n, t in task.state_dict().items())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_gradient_scaler_may_leave_a_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Cusp(LoRA(rank=2), QKV)
    started = copied(task)
    calls: list[int] = []
    monkeypatch.setattr(task.adapters, "after_step", lambda step, total: calls.append(step))
    fit(task, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
    assert calls == []
    assert all(torch.equal(started[n], t) for n, t in task.state_dict().items())


def test_a_gradient_of_an_adapter_is_named_by_its_site() -> None:
    task = Task(LoRA(rank=2), QKV)
    factor = task.adapters.adapters["blocks.0.attn.qkv"].B
    assert isinstance(factor, Tensor)
    factor.register_hook(lambda gradient: gradient + math.inf)
    with pytest.raises(AdaptError, match=r"the gradient of blocks\.0\.attn\.qkv/B is not finite"):
        fit(task)


class Blind(Task):
    """A task that never calls the backbone's last block."""

    def training_loss(self, batch: Any) -> Tensor:
        assert isinstance(self.backbone, VisionTransformer)
        hidden = self.backbone.blocks[0](self.backbone.patch_embed(batch[0]))
        return F.cross_entropy(self.head(hidden.mean(1)), batch[1])


def test_adapters_that_do_not_act_are_named_at_the_first_batch() -> None:
    with pytest.raises(AdaptError, match=r"1 of 2 adapters .* do not act: blocks\.1"):
        fit(Blind(LoRA(rank=2), QKV, vit(depth=2)))


def test_a_sweeping_default_may_hold_parameters_that_are_not_used() -> None:
    assert fit(Blind(FullFineTuning(), None, vit(depth=2))).global_step == 5


def test_a_head_that_starts_at_zero_is_no_idle_adapter() -> None:
    task = Task(LoRA(rank=2), QKV)
    nn.init.zeros_(task.head.weight)
    assert fit(task).global_step == 5
    blind = Blind(LoRA(rank=2), QKV, vit(depth=2))
    nn.init.zeros_(blind.head.weight)
    with pytest.raises(AdaptError, match=r"1 of 2 adapters .* do not act: blocks\.1"):
        fit(blind)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.vit = vit()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.vit, x, use_reentrant=self.use_reentrant)
        assert isinstance(y, Tensor)
        return y


def test_reentrant_checkpointing_that_starves_the_adapters_is_found() -> None:
    at = "vit.blocks.*.attn.qkv"
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(AdaptError, match=r"do not act: vit.*use_reentrant=True: pass False"),
    ):
        fit(Task(LoRA(rank=2), at, Checkpointed(use_reentrant=True)))
    assert fit(Task(LoRA(rank=2), at, Checkpointed(use_reentrant=False))).global_step == 5


def test_a_loss_that_depends_on_nothing_trained_is_refused() -> None:
    task = Task(HeadOnly())
    task.head.requires_grad_(False)
    with pytest.raises(AdaptError, match="trains nothing and the module has no head"):
        fit(task)
    with pytest.raises(AdaptError, match="the loss depends on nothing that is trained"):
        task.training_step(pictures(4).tensors, 0)


def test_a_run_without_an_end_has_no_cosine() -> None:
    with pytest.raises(AdaptError, match="set max_epochs or max_steps"):
        fit(Task(LoRA(rank=2), QKV), max_epochs=-1)


# Checkpoints


def test_the_state_is_adapters_head_and_nothing_of_the_backbone() -> None:
    assert set(Task(LoRA(rank=2), QKV).state_dict()) == {
        "adapter/blocks.0.attn.qkv/A",
        "adapter/blocks.0.attn.qkv/B",
        "head.weight",
        "head.bias",
    }


def test_the_state_is_the_full_training_state() -> None:
    names = set(Task(MoSA(rank=2, experts=2)).state_dict())
    assert {"adapter/blocks.0/up.weight", "adapter/blocks.0/up.owner"} <= names


def test_the_state_loads_into_another_module() -> None:
    first, second = Task(LoRA(rank=2), QKV, seed=1), Task(LoRA(rank=2), QKV, seed=2)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.state_dict()[n], t) for n, t in first.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, "tensor 'head.bias' is missing"),
        ({"adapter/blocks.0.attn.qkv/B": None}, "tensor 'adapter/blocks.0.attn.qkv/B' is missing"),
        ({"backbone.cls_token": torch.ones(1)}, "'backbone.cls_token' does not belong"),
        ({"head.bias": torch.ones(4)}, r"'head.bias' is \[4\], expected \[3\]"),
        ({"adapter/blocks.0.attn.qkv/B": torch.full((48, 2), math.nan)}, "NaN"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    change: dict[str, Tensor | None], message: str
) -> None:
    task = Task(LoRA(rank=2), QKV)
    started = copied(task)
    state = {name: tensor + 1 for name, tensor in started.items()} | change
    with pytest.raises(AdaptError, match=message):
        task.load_state_dict({n: t for n, t in state.items() if t is not None})
    assert all(torch.equal(started[n], t) for n, t in task.state_dict().items())
    with pytest.raises(AdaptError, match="strict=False is not allowed"):
        task.load_state_dict(started, strict=False)


def test_a_checkpoint_holds_adapters_head_and_optimiser_only(tmp_path: Path) -> None:
    class Wide(Task):
        def __init__(self) -> None:
            super().__init__(LoRA(rank=1), QKV, vit(width=128))
            self.head = nn.Linear(128, 3)

    task = Wide()
    fit(task).save_checkpoint(tmp_path / "last.ckpt")
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in task.parameters() if not p.requires_grad)
    assert (trained, frozen > 200_000) == (128 + 384 + 3 * 128 + 3, True)
    # Values and two Adam moments in fp32; 32 KiB for names, zip entries and random states.
    assert (tmp_path / "last.ckpt").stat().st_size < 3 * 4 * trained + 32_768
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(task.state_dict())
    assert len(saved["optimizer_states"][0]["state"]) == 4
