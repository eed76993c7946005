"""AdaptedModule: a frozen backbone with one trainable adapter set, as a Lightning task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Generator, Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .errors import AdaptError, SiteError
from .optim.proximal import proximal_step
from .order import random_states, set_random_states
from .probe import check_gradients
from .recipe import Recipe, decay_groups, require, require_finite
from .recomputation import Mode
from .recomputation import recompute as recomputing
from .sets import AdapterSet, attach, sets_of

_BACKBONE = "backbone."
_ADAPTER = "adapter/"
_OURS = "polyadapt"  # our entry in Lightning's checkpoints


class AdaptedModule(LightningModule, ABC):
    """Trains the adapter set `adapter` at the sites `at` of a frozen `backbone`, and its own heads.

    A task derives from it, adds its head after `super().__init__` and returns the loss of a batch
    from `training_loss`; validation and prediction steps are Lightning's. The loss that is
    minimised is training_loss + adapters.penalty(). AdamW with a learning rate that rises linearly
    over the share `warmup` of all optimiser steps, then falls as a cosine to 0. `seed` draws the
    adapters from a generator of their own, else torch's global one is used. `recompute="cheap"`
    keeps less of the backbone's blocks for backward, see `recompute`.

    Checkpoints hold the adapters, the module's own tensors and the optimiser, not the backbone, and
    a run resumed from the end of an epoch continues bit for bit. Several processes (strategy "ddp")
    train as one does on their batches together, up to rounding. Raises `AdaptError` for settings
    out of range, another strategy, a loss or gradient that is not finite, adapters that do not act
    (of a method's own sites, when none does), a checkpoint that does not fit.

    >>> class Task(AdaptedModule):
    ...     def training_loss(self, batch):
    ...         return self.backbone(batch).square().mean()
    >>> from polyadapt.core import LoRA
    >>> task = Task(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2), at="0", lr=1e-3)
    >>> sorted(task.state_dict())
    ['adapter/0/A', 'adapter/0/B']
    """

    def __init__(
        self,
        backbone: nn.Module,
        adapter: Recipe,
        at: str | list[str] | None = None,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        set_name: str = "default",
        seed: int | None = None,
        recompute: Mode = "none",
    ) -> None:
        super().__init__()
        require_finite("training", lr=lr, weight_decay=weight_decay, warmup=warmup)
        require(lr > 0, f"training: lr={lr} is not allowed: above 0")
        require(weight_decay >= 0, f"training: weight_decay={weight_decay} is below 0")
        require(0 <= warmup < 1, f"training: warmup={warmup} is not allowed: a share, 0 to below 1")
        self.backbone = backbone
        self.set_name = set_name
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        generator = None if seed is None else Generator().manual_seed(seed)
        attach(backbone, adapter, at, set_name, generator=generator)
        recomputing(backbone, recompute)
        self._unproven = True
        self._chosen = at is not None
        self._total: int | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._peaks: tuple[list[str], Tensor] | None = None
        self._resume: dict[str, Any] | None = None
        self.train()

    @abstractmethod
    def training_loss(self, batch: Any) -> Tensor:
        """The task's loss for a batch: a scalar."""

    @property
    def adapters(self) -> AdapterSet:
        """The set in training; it is registered in the backbone, and only there."""
        return sets_of(self.backbone)[self.set_name]

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter file: what inference needs of the set, and the module's own tensors."""
        adapters = self.adapters
        adapters.head = {name: tensor.detach() for name, tensor in self._own_state().items()}
        adapters.save(path)

    # What is trained, and how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The task's loss and the adapters' penalties; refused when it is not finite."""
        loss = self.training_loss(batch) + self.adapters.penalty()
        if not loss.requires_grad:
            raise AdaptError("the loss depends on nothing that is trained: no adapter, no head")
        if not bool(loss.isfinite().all()):
            raise AdaptError(
                f"step {self.trainer.global_step + 1}: the loss is {float(loss.detach())};"
                f" {self._last_peak()}; lower lr (now {self.lr}) or look at the batch"
            )
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the recipe's groups and the module's own tensors; warm-up and cosine."""
        own = [p for name, p in self.named_parameters() if not name.startswith(_BACKBONE)]
        groups = self.adapters.parameter_groups(self.lr, self.weight_decay)
        groups += decay_groups([p for p in own if p.requires_grad], self.lr, self.weight_decay)
        if not groups:
            raise AdaptError(f"{self.adapters.recipe} trains nothing and the module has no head")
        total = self._total_steps()
        if total is None:
            raise AdaptError("the cosine needs the number of steps: set max_epochs or max_steps")
        optimizer = AdamW(groups, lr=self.lr)
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        require_strategy(self.trainer.strategy)
        # DDP would send buffers in every step, and cannot send sparse ones (Whisper has one). What
        # no file keeps, every process has computed alike: SALT's singular vectors are large.
        ignored = {name for name, buffer in self.named_buffers() if buffer.is_sparse}
        for path, module in self.named_modules():
            ignored |= {f"{path}.{name}" for name in module._non_persistent_buffers_set}
        self._ddp_params_and_buffers_to_ignore = sorted(ignored)  # the name that DDP looks for

    def on_fit_start(self) -> None:
        self._total = self._total_steps()
        self._trained = self._trained_by_name()
        for optimizer in self.trainer.optimizers:
            # A hook of the optimiser, not of Lightning: once per step also when gradients are
            # accumulated, never for a step that a gradient scaler leaves out, before zero_grad.
            optimizer.register_step_post_hook(self._after_step)
        for module in self._statistics():
            module.training = True  # else Lightning warns; nothing is called before on_train_start
        if self._resume is not None:
            # With a limit of steps Lightning 2.6 would restore the end of an epoch as a running
            # one, and count it twice: hide the limit until it has restored its loops.
            loop = self.trainer.fit_loop.epoch_loop
            self._resume["max_steps"], loop.max_steps = loop.max_steps, -1

    def on_train_start(self) -> None:
        if self._resume is not None:
            self.trainer.fit_loop.epoch_loop.max_steps = self._resume["max_steps"]
        for module in self._statistics():
            module.training = False
        if self._resume is not None and not self._resume["whole_epoch"]:
            raise AdaptError(
                "cannot resume from this checkpoint: it was written before the end of an epoch, and"
                " the rest of that epoch cannot be repeated; take one from an epoch's end"
            )

    def on_train_epoch_start(self) -> None:
        if self._resume is not None:
            set_random_states(self._resume["random"])
            self._resume = None
            # Lightning made this iterator before it knew the epoch: its workers already load the
            # order of epoch 0. The uninterrupted run makes its iterator here, too.
            iter(self.trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def on_after_backward(self) -> None:
        if self._unproven:
            self._prove()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = {n: p.grad for n, p in self._trained.items() if p.grad is not None}
        if not gradients:
            return
        norms = [torch.linalg.vector_norm(g, math.inf).float() for g in gradients.values()]
        peaks = torch.stack(norms)
        if not self._scales() and not bool(peaks.isfinite().all()):
            name = next(n for n, peak in zip(gradients, peaks, strict=True) if not peak.isfinite())
            raise AdaptError(
                f"step {self.trainer.global_step + 1}: the gradient of {name} is not finite;"
                f" {self._last_peak()}; lower lr (now {self.lr}) or look at the batch"
            )
        self._peaks = list(gradients), peaks

    def train(self, mode: bool = True) -> Self:
        """As usual, but running statistics of the frozen backbone stay frozen (evaluation mode)."""
        super().train(mode)
        for module in self._statistics():
            module.training = False
        return self

    # What a checkpoint holds

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """`adapter/<site>/<tensor>` and the module's own tensors, without the backbone."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in [n for n in state if n.startswith(prefix + _BACKBONE)]:
            del state[name]
        for name, tensor in self.adapters.state_dict().items():
            state[f"{prefix}{_ADAPTER}{name}"] = tensor
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Take exactly the tensors of `state_dict`; nothing is changed when one does not fit."""
        require(strict, "strict=False is not allowed: a checkpoint fits exactly or not at all")
        _check_names(state_dict, self.state_dict())
        adapters, own = {}, {}
        for name, value in state_dict.items():
            if name.startswith(_ADAPTER):
                adapters[name.removeprefix(_ADAPTER)] = value
            else:
                own[name] = value
        self.adapters.load_state_dict(adapters)
        super().load_state_dict(own, strict=False, assign=assign)  # the backbone's are missing
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning may save before the first resumed epoch has put the states back.
        random = random_states() if self._resume is None else self._resume["random"]
        checkpoint[_OURS] = {"settings": self._settings(), "random": random}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _OURS not in checkpoint:
            raise AdaptError("this checkpoint was not written by an AdaptedModule of polyadapt")
        ours = checkpoint[_OURS]
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        self._refuse_other_settings(ours["settings"], fitting)
        if fitting:
            progress = checkpoint["loops"]["fit_loop"]
            epoch = progress["epoch_progress"]["current"]
            over = epoch["processed"] == epoch["started"]
            whole = over and progress["epoch_loop.batch_progress"]["is_last_batch"]
            self._resume = {"random": ours["random"], "whole_epoch": whole}

    # Details

    def _own_state(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.state_dict().items() if not n.startswith(_ADAPTER)}

    def _settings(self) -> dict[str, Any]:
        recipe = self.adapters.recipe.to_json()
        return {
            "adapter": recipe,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "warmup": self.warmup,
        }

    def _refuse_other_settings(self, saved: Mapping[str, Any], fitting: bool) -> None:
        """Lightning restores the old learning rate without a word; a recipe must always fit."""
        for name, value in self._settings().items():
            if value != saved[name] and (fitting or name == "adapter"):
                raise AdaptError(
                    f"the checkpoint was made with {name}={saved[name]}, not with {value}: use the"
                    " same settings, or start a new run"
                )

    def _total_steps(self) -> int | None:
        """All optimiser steps of the run; None when it has no planned end."""
        total = self.trainer.estimated_stepping_batches
        return None if total < 0 or math.isinf(total) else max(1, int(total))

    def _trained_by_name(self) -> dict[str, nn.Parameter]:
        own = {n: p for n, p in self.named_parameters() if not n.startswith(_BACKBONE)}
        return {n: p for n, p in {**self.adapters.trained(), **own}.items() if p.requires_grad}

    def _statistics(self) -> list[nn.Module]:
        """Modules of the backbone that would update running statistics in training mode."""
        found = self.backbone.modules()
        return [m for m in found if getattr(m, "running_mean", None) is not None]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        step = self.trainer.global_step + 1
        proximal_step(optimizer, step, self._total)
        self.adapters.after_step(step, self._total)

    def _scales(self) -> bool:
        """With a gradient scaler (fp16), infinite gradients are normal: it leaves the step out."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _prove(self) -> None:
        """Every adapter must have received a gradient from the first batch.

        Of a method's own sites some: there may be biases or norms that this model does not use.
        """
        gradients = {id(p): p.grad for p in self.adapters.modules_in_order.parameters()}
        found = [g for g in gradients.values() if g is not None]
        if not all(bool(g.isfinite().all()) for g in found):
            return  # on_before_optimizer_step names it, or a gradient scaler leaves the step out
        if found and self.trainer.global_step == 0 and not any(bool(g.any()) for g in found):
            return  # a head, or a factor of a bank, that starts at zero hides all for one step
        self._unproven = False
        if not gradients or (not self._chosen and any(bool(g.any()) for g in found)):
            return
        try:
            check_gradients(self.adapters, gradients)
        except SiteError as error:
            raise SiteError(
                f"{error}, or they are checkpointed with use_reentrant=True: pass False"
            ) from None

    def _last_peak(self) -> str:
        """The largest gradient of the step before, in words."""
        if self._peaks is None:
            return "no step was taken before"
        names, peaks = self._peaks
        largest = int(peaks.argmax())
        return (
            f"the largest gradient of the step before was {peaks[largest]:.3g} at {names[largest]}"
        )


def require_strategy(strategy: Strategy) -> None:
    """Refuse strategies that divide or replace what is trained, or start processes otherwise.

    FSDP and DeepSpeed leave a share of every adapter in each process; what saves, loads and checks
    adapters does not gather them. The others of DDP copy the trained task back in their own way.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return
    start = getattr(strategy, "_start_method", None)
    if type(strategy) is not DDPStrategy or start != "popen":
        how = "" if start in (None, "popen") else f" with start_method={start!r}"
        raise AdaptError(
            f"strategy {type(strategy).__name__}{how} is not supported: train on one device, or"
            " with strategy='ddp'"
        )


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """The share of the learning rate at a 0-based optimiser step of `total`.

    With w = round(warmup * total): (step + 1) / (w + 1) below w, from there
    (1 + cos(pi (step - w) / (total - w))) / 2, which is 1 at step w and 0 at `total`.

    >>> [round(warmup_cosine(step, 8, 0.25), 3) for step in (0, 1, 2, 5, 8)]
    [0.333, 0.667, 1.0, 0.5, 0.0]
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1, total - rise))
    return (1 + math.cos(math.pi * done)) / 2


def _check_names(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Names and shapes are exactly those wanted."""
    for name in wanted:
        if name not in found:
            raise AdaptError(f"checkpoint: tensor {name!r} is missing")
    for name, value in found.items():
        if name not in wanted:
            raise AdaptError(f"checkpoint: tensor {name!r} does not belong to this module")
        shape, own = getattr(value, "shape", None), getattr(wanted[name], "shape", None)
        if shape != own:
            raise AdaptError(
                f"checkpoint: {name!r} is {list(shape or ())}, expected {list(own or ())}"
            )
