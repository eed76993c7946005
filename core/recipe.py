"""Recipe (a method and its plain settings) and Adapter (its tensors at one site).

A method is one file in `core/adapters`: a frozen dataclass that derives from `Recipe` and an
`nn.Module` that derives from `Adapter`. What a method can do is declared by having the function:

=================  ================================================================
`weight(w)`        W [d_out, d_in] -> W' of the same shape: it can be merged
`output(x, y, layer)`  layer input x, layer output y -> y': it can act where the layer is called
`enter(x)`         what a block is called with instead of x (with `output`: prompt tokens)
`factors()`        (A, B, p, scale) with delta = scale * B diag(p) A: plain low rank
`branch(layer)`    the same with a gain per row: many sets in one batch at once
`penalty()`        a scalar to add to the loss
`after_step(step, total)`  work after every optimiser step
`deployed()`       what inference needs, when that is less than training does
=================  ================================================================

Tensors that the sites share are a bank (`Recipe.build_bank`, see `banks`), under `adapter.bank`.

A term or work that needs all sites at once (a rank budget) is the recipe's: `Recipe.penalty` and
`Recipe.after_step` get the whole set, and ask each adapter unless a method says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from .banks import bank_of, owners
from .errors import AdaptError

if TYPE_CHECKING:
    from .layers import FrozenLayer
    from .sites import Site


@runtime_checkable
class ActsOnWeight(Protocol):
    """A method that maps a weight to a weight; it is mergeable by having this."""

    def weight(self, w: Tensor) -> Tensor:
        """W [d_out, d_in] -> W' of the same shape and dtype."""
        ...


@runtime_checkable
class ActsOnOutput(Protocol):
    """A method that changes what a called layer returns."""

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """Layer input x and this site's rows y of its output -> y' of y's shape and dtype."""
        ...


@runtime_checkable
class ActsOnInput(Protocol):
    """A method that also changes what a block is called with, such as one with prompt tokens."""

    def enter(self, x: Tensor) -> Tensor:
        """The block's input -> what it is called with instead; `output` then gets the latter."""
        ...


@runtime_checkable
class LowRank(Protocol):
    """A method whose update is scale * B diag(p) A."""

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """(A [r, d_in], B [d_out, r], p [r] or None, scale)."""
        ...


@dataclass(frozen=True)
class Branch:
    """y + (gain - 1)(y - bias) + scale * up down x: an adapter on a linear layer."""

    down: Tensor  # [r, d_in]
    up: Tensor  # [d_out, r]
    scale: float = 1.0
    gain: Tensor | None = None  # [d_out]


@runtime_checkable
class Branching(Protocol):
    """A method that is no plain low-rank update, and yet has the form of a `Branch`."""

    def branch(self, layer: FrozenLayer) -> Branch:
        """What the adapter does to what a linear layer returns."""
        ...


class Adapter(nn.Module):
    """The tensors of one method at one site. Subclasses add `weight`, `output` or both.

    Tensors are created in fp32 on the CPU with an explicit dtype (a trainer may change torch's
    default dtype); `attach` moves them to the backbone's device.
    """

    needs_first: ClassVar[bool] = False
    """True when the update depends on the frozen W0, so that no other set may act before it."""

    input: str = "layer"
    """`layer`: x of `output` is what the layer was called with. `ffn`: x is the residual state
    that enters the MLP branch of a transformer block (the site must be a block)."""

    bank: nn.Module | None = None
    """What the set's adapters share, if their recipe builds a bank. The set owns it."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None

    def after_step(self, step: int, total: int | None) -> None:
        """Work after optimiser step `step` (1-based) of `total` (None when unknown)."""

    def deployed(self) -> Adapter:
        """The adapter that inference needs; itself unless training holds more."""
        return self


def offers(adapter: Adapter, form: type) -> bool:
    """isinstance(adapter, form) for one of the protocols above, which answer slowly themselves."""
    if torch.compiler.is_compiling():  # it warns of caches
        return isinstance(adapter, form)
    return _offers(type(adapter), form)  # type: ignore[arg-type]  # classes hash


@cache
def _offers(adapter: type[Adapter], form: type) -> bool:
    return issubclass(adapter, form)


Piece: TypeAlias = "tuple[FrozenLayer, Adapter]"
"""An adapter and the rows of the layer that it sits on."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method and its settings: plain numbers that serialise to JSON.

    >>> from polyadapt.core import LoRA
    >>> LoRA(rank=4).to_json()["rank"], Recipe.from_json(LoRA(rank=4).to_json()) == LoRA(rank=4)
    (4, True)
    """

    @property
    def identity(self) -> bool:
        """The adapted backbone equals the frozen one exactly at the start."""
        return True

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse settings that do not fit the chosen sites as a whole."""

    def check_model(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Refuse a backbone on which the method would not be what it says; the model is as it was.

        Called after the adapters have been built.
        """

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The adapter at `site`; `weight` is the frozen W0 [d_out, d_in] (None for a block)."""
        raise AdaptError(f"{type(self).__name__} builds no adapters: it has no sites")

    def build_bank(self, sites: Sequence[Site], generator: Generator | None) -> nn.Module | None:
        """What the adapters at these sites share, built before them; None: nothing."""
        return None

    def bank_shapes(self, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor of that bank."""
        return {}

    def least_numbers(self, site: Site) -> int | None:
        """How many numbers a file holds for a low-rank adapter there, at least; None: it is none.

        Asked before a file's adapter is built without a backbone, and its shapes take memory.
        """
        return None

    def default_at(self, model: nn.Module) -> Sequence[str]:
        """Patterns to use when `attach` got none."""
        raise AdaptError(
            f"{type(self).__name__} needs sites: pass at='blocks.*.attn.qkv' or the like"
        )

    def deployed(self) -> Recipe:
        """The recipe of the adapters that `Adapter.deployed` returns."""
        return self

    def renamed(self, names: Mapping[Site, str]) -> Recipe:
        """The same on a backbone that calls these sites otherwise: for settings that name some."""
        return self

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor:
        """What is added to the loss: the sum of the adapters' terms, 0 when there are none."""
        terms = [t for a in adapters.values() if (t := a.penalty()) is not None]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def after_step(self, adapters: Mapping[str, Adapter], step: int, total: int | None) -> None:
        """Work after optimiser step `step` (1-based) of `total`; gradients are still there."""
        for adapter in adapters.values():
            adapter.after_step(step, total)

    def parameter_groups(
        self, adapters: Mapping[str, Adapter], lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimiser groups over the trainable tensors; vectors (biases, gains) do not decay."""
        modules = owners(bank_of(adapters), adapters).values()
        tensors = [p for module in modules for p in module.parameters() if p.requires_grad]
        return decay_groups(tensors, lr, weight_decay)

    def check_state(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Refuse tensors whose names and shapes fit a set of this recipe, but not their numbers.

        `own` is what the set that is to have them holds now, by the same names.
        """

    def to_json(self) -> dict[str, Any]:
        """The method's name and its fields as JSON values."""
        return {"method": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote; unknown methods and fields are refused by name."""
        from .adapters import recipe_class  # imports every method: only when a file is read

        fields = dict(data)
        name = fields.pop("method", None)
        cls = recipe_class(name)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise AdaptError(f"{name} has no setting {unknown[0]!r}; it has {sorted(known)}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise AdaptError(f"{name} cannot take the settings {fields}: {error}") from error

    def replace(self, **changes: Any) -> Self:
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)


def decay_groups(
    tensors: Sequence[nn.Parameter], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices decay, vectors do not; an empty one is left out."""
    matrices = [p for p in tensors if p.ndim > 1]
    vectors = [p for p in tensors if p.ndim <= 1]
    groups = [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def require(condition: bool, message: str) -> None:
    """Raise `AdaptError(message)` unless the condition holds."""
    if not condition:
        raise AdaptError(message)


def require_rank(method: str, rank: object, site: Site | None = None) -> None:
    """A rank is a whole number from 1 to the smaller side of the site's weight."""
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    require(whole and rank >= 1, f"{method}: rank {rank!r} is not allowed: a whole number from 1")  # type: ignore[operator]
    if site is not None:
        largest = min(site.shape)
        require(
            rank <= largest,  # type: ignore[operator]
            f"{method}: rank {rank} does not fit {site.name}: its weight is {list(site.shape)},"
            f" so at most {largest}",
        )


def require_finite(method: str, **numbers: float) -> None:
    """Every setting is a number that is finite in fp32, in which adapters compute."""
    for name, value in numbers.items():
        good = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 3.4e38
        require(good, f"{method}: {name}={value!r} is not allowed: a finite number")


def require_duration(method: str, name: str, value: object) -> None:
    """A number of steps when whole, a share of all steps when a fraction."""
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    share = isinstance(value, float) and 0 <= value < 1
    require(
        steps or share,
        f"{method}: {name}={value!r} is not allowed: a whole number of steps, or a share below 1",
    )


def steps_of(duration: int | float, total: int) -> int:
    """The steps of a duration in a run of `total`.

    >>> steps_of(20, 300), steps_of(0.1, 300)
    (20, 30)
    """
    return duration if isinstance(duration, int) else round(duration * total)
