"""Where a backbone keeps its adapter sets: a registered child named `polyadapt_drawer`.

Being a child, `.to()`, DDP and optimisers see the adapters once. It hides from `state_dict` (the
backbone's names stay its own), keeps adapters in fp32 through casts, and its forward is the
identity for roots that call all their children.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .activation import Active, Records, Stamp
from .errors import AdaptError
from .layers import module_at

if TYPE_CHECKING:
    from .sets import AdapterSet
    from .slots import OutputSlot, WeightSlot

DRAWER = "polyadapt_drawer"
_NAME = re.compile(r"[A-Za-z0-9_\-]+")


class Drawer(nn.Module):
    """Holds the sets of one backbone, their slots, and which sets act by default."""

    guard: RemovableHandle

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # unregistered: the backbone is the parent
        self.holder = nn.ModuleDict()  # keys are prefixed: ModuleDict refuses names like "pop"
        self.default = Active()
        self.records = Records()
        self.slots: dict[tuple[str, str | None], WeightSlot | OutputSlot] = {}
        self.stamped: dict[str, Any] = {}
        self.trained: dict[str, bool] = {}  # requires_grad of the backbone's parameters before
        self.kept: dict[tuple[str, str], tuple[str, nn.Parameter]] = {}
        self.open: dict[object, Active] = {}  # one per running `activate` of any thread
        self.awake: set[str] = set()  # sets whose parameters may require grad
        self.before_merge = Active()
        self.allow_cast = False
        self.register_load_state_dict_post_hook(_forget_missing)  # type: ignore[no-untyped-call]

    @property
    def sets(self) -> dict[str, AdapterSet]:
        """The attached sets by name."""
        return {key.removeprefix("set_"): s for key, s in self.holder.items()}  # type: ignore[misc]

    def set_called(self, name: str) -> AdapterSet:
        """One attached set; the cost does not grow with their number."""
        key = f"set_{name}"
        if key not in self.holder:
            raise AdaptError(f"no adapter set is called {name!r}; attached: {sorted(self.sets)}")
        return self.holder[key]  # type: ignore[return-value]

    @property
    def merged(self) -> str | None:
        """The set that is in the weights now."""
        return next((owner for owner, _ in self.kept.values()), None)

    def checked(self, active: Active) -> Active:
        """Refuse unknown names and what a merged set forbids; make trainable sets require grad."""
        asked = set(active.names if active.per_sample is None else active.per_sample)
        known = {name: self.set_called(name) for name in asked if name is not None}
        if self.merged is not None and asked != {self.merged}:
            raise AdaptError(f"set {self.merged!r} is merged into the weights: unmerge it first")
        for earlier, later in combinations(active.names, 2):
            known[later].refuse_on_top_of(known[earlier])
        self.require_grads(active)
        return active

    def require_grads(self, active: Active) -> None:
        """Trainable sets that act require grad."""
        for name in set(active.per_sample or active.names) - {None}:
            self.awake.add(name)  # type: ignore[arg-type]
            self.set_called(name).require_grads()  # type: ignore[arg-type]

    def rest(self) -> None:
        """Sets that do not act by default stop requiring grad: an idle one would stall DDP."""
        for name in self.awake.difference(self.default.names):
            if f"set_{name}" in self.holder:
                self.set_called(name).requires_grad_(False)
        self.awake.intersection_update(self.default.names)

    def forward(self, x: Any = None, *rest: Any) -> Any:
        """The identity: a root that calls all its children must not notice."""
        return x

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: adapters are saved by their sets, not with the backbone."""
        return kwargs.get("destination", {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype or self.allow_cast else t.to(new.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Drawer:
        import copy

        if id(self.__dict__["backbone"]) not in memo:
            raise AdaptError(
                "copy the whole backbone: a part of it shares the adapters of the whole"
            )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": {}}  # a copy is in nobody's context

    def freeze(self) -> None:
        """No parameter of the backbone requires grad until the drawer is removed."""
        for name, parameter in own_parameters(self.__dict__["backbone"]):
            self.trained.setdefault(name, parameter.requires_grad)
            parameter.requires_grad = False  # the setter: a lazy layer's parameter has no methods

    def stamp(self, path: str) -> None:
        """Stamp the outputs of every module from the root to `path`, each once."""
        if path in self.stamped:
            return
        module = module_at(self.__dict__["backbone"], path)
        self.stamped[path] = module.register_forward_hook(Stamp(self))
        if path:
            self.stamp(path.rpartition(".")[0])

    def unstamp(self) -> None:
        """Take all stamps away."""
        for handle in self.stamped.values():
            handle.remove()
        self.stamped.clear()


def own_modules(backbone: nn.Module, repeated: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the backbone without what we keep there, in the same order.

    `repeated`: a module that is held under several names comes under each.
    """
    seen: set[nn.Module] = set()
    pending = [("", backbone)]
    while pending:
        path, module = pending.pop()
        if module in seen and not repeated:
            continue
        seen.add(module)
        yield path, module
        if module._modules:  # most are leaves
            prefix = f"{path}." if path else ""
            for name, child in reversed(module._modules.items()):
                if child is not None and name != DRAWER:
                    pending.append((prefix + name, child))


def own_parameters(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the backbone under each of its names, without what we keep there."""
    for path, module in own_modules(backbone, repeated=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def find_drawer(backbone: nn.Module) -> Drawer | None:
    """The backbone's drawer, if it has one."""
    drawer = backbone._modules.get(DRAWER)
    return drawer if isinstance(drawer, Drawer) else None


def drawer_of(backbone: nn.Module) -> Drawer:
    """The backbone's drawer; refused when nothing is attached."""
    drawer = find_drawer(backbone)
    if drawer is None:
        raise AdaptError(f"{type(backbone).__name__} has no adapter sets: attach or load one first")
    return drawer


def make_drawer(backbone: nn.Module) -> Drawer:
    """The backbone's drawer, made and registered when it is the first."""
    drawer = find_drawer(backbone)
    if drawer is not None:
        return drawer
    if hasattr(backbone, DRAWER):
        raise AdaptError(f"{type(backbone).__name__} already has something called {DRAWER}")
    if isinstance(backbone, nn.ModuleList | nn.ModuleDict):
        raise AdaptError(
            f"attach to a module that is called, not to a bare {type(backbone).__name__}"
        )
    drawer = Drawer(backbone)
    backbone.add_module(DRAWER, drawer)
    drawer.guard = backbone.register_load_state_dict_pre_hook(_refuse_while_merged)
    return drawer


def remove_drawer(drawer: Drawer) -> None:
    """Take an empty drawer out of its backbone and give back the backbone's requires_grad flags."""
    backbone: nn.Module = drawer.__dict__["backbone"]
    drawer.unstamp()
    drawer.guard.remove()
    del backbone._modules[DRAWER]
    for name, parameter in own_parameters(backbone):
        parameter.requires_grad = drawer.trained.get(name, parameter.requires_grad)


def check_set_name(name: str, taken: dict[str, AdapterSet]) -> None:
    """Names are letters, digits, _ and -, and new."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdaptError(f"a set's name has letters, digits, _ and - only, got {name!r}")
    if name in taken:
        raise AdaptError(f"a set called {name!r} is attached already; attached: {sorted(taken)}")


def _refuse_while_merged(module: nn.Module, *args: Any) -> None:
    """Values loaded now would be lost when the kept parameters come back."""
    drawer = find_drawer(module)
    if drawer is not None and drawer.kept:
        raise AdaptError("a set is merged into the weights: unmerge it before loading a checkpoint")


def _forget_missing(module: nn.Module, incompatible: Any) -> None:
    """Strict loading of a base checkpoint must not miss the adapters."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if DRAWER not in key.split(".")]


def same_device(backbone: nn.Module) -> torch.device:
    """Where new adapters go: the device of the backbone's first parameter."""
    first = next(backbone.parameters(), None)
    return torch.device("cpu") if first is None else first.device
