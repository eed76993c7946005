"""What the adapter file of a time series model says besides its adapters; restoring it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.errors import AdaptError, StoreError
from ..core.sets import AdapterSet
from ..core.store import load, read_file
from . import blocks
from .aim import Aim
from .aims import Forecast as Forecast  # aims are found among those that are imported
from .backbones import Backbone
from .network import FROZEN_LAYERS, Network, digest
from .patches import Patches
from .scaling import Scaler

TASK = "time series"
Keep = Literal["seed", "tensors"]


@dataclass(frozen=True)
class Description:
    """Everything but the adapters that the model is made of.

    `sha256` is that of the frozen random layers, which the file holds itself (`kept` "tensors") or
    which are drawn again from `seed`; `blocks` is the digest of the blocks' weights, which a hub or
    a library may change under the same name (None: not known). `names`, `scaler`, `frequency` and
    `period` (rows of a season) are those of the data that it was trained on, where that is known.
    """

    backbone: Backbone
    look_back: int
    patches: Patches
    aim: Aim
    seed: int
    kept: Keep
    sha256: str
    names: tuple[str, ...] | None = None
    scaler: Scaler | None = None
    frequency: str | None = None
    period: int | None = None
    blocks: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What travels in the file."""
        return {
            "task": TASK,
            "backbone": self.backbone.to_json(),
            "look_back": self.look_back,
            "patches": self.patches.to_json(),
            "aim": self.aim.to_json(),
            "blocks": self.blocks,
            "frozen_layers": {"seed": self.seed, "kept": self.kept, "sha256": self.sha256},
            "names": None if self.names is None else list(self.names),
            "scaler": None if self.scaler is None else self.scaler.to_json(),
            "frequency": self.frequency,
            "period": self.period,
        }

    def of(self, data: object) -> Description:
        """The same, with what a data module says of itself."""
        says = ("names", "scaler", "frequency", "period")
        known: dict[str, Any] = {name: getattr(data, name, None) for name in says}
        return replace(self, **known)

    def network(self) -> Network:
        """The frozen network, its dense layers drawn from `seed`."""
        return network_of(self.backbone, self.aim, self.look_back, self.patches, self.seed)


def network_of(
    backbone: Backbone, aim: Aim, look_back: int, patches: Patches, seed: int
) -> Network:
    """The frozen network that an aim needs."""
    return Network(
        backbone.build(),
        look_back,
        patches,
        outputs=aim.outputs(look_back),
        channels=aim.width,
        restores=aim.restores,
        rescale=aim.rescales,
        seed=seed,
    )


def describe(path: str | Path) -> Description:
    """Read it; `StoreError` for a file that is missing, damaged or of another task."""
    return _described(path, read_file(path).extra)


def load_set(network: Network, path: str | Path, name: str | None = None) -> AdapterSet:
    """Put a file's frozen layers and adapters into a network of its own making.

    Layers that the file holds replace the network's; of those that it only has the seed of, the
    network's must have the file's SHA-256. Raises `StoreError` where it has not (the network was
    drawn from another seed, or this torch draws other numbers), for blocks of other weights, and
    for sizes that do not fit.
    """
    file = read_file(path)
    about = _described(path, file.extra)
    if about.blocks not in (None, blocks.digest(network.blocks)):
        raise StoreError(
            f"{path}: these are not the weights of {about.backbone} that it was trained with: its"
            " source, or the library that draws them, has others now, or the network is another"
        )
    if about.kept == "tensors":
        _restore(network, {n: t for n, t in file.head.items() if n in FROZEN_LAYERS}, path)
    found = digest(network.frozen_layers())
    if found != about.sha256:
        raise StoreError(
            f"{path}: the frozen layers of seed {about.seed} have the SHA-256"
            f" {about.sha256[:12]}..., the network's {found[:12]}...: build it from that seed, or"
            " train with frozen_layers='tensors' where that does not help"
        )
    return load(network, path, name)


def sizes(adapters: AdapterSet, network: Network) -> dict[str, int]:
    """Bytes of the adapters' numbers, and of them with the frozen random layers, in fp32."""
    dense = sum(layer.numel() for layer in network.frozen_layers().values())
    stored = adapters.stored_count()
    return {"adapters": 4 * stored, "with_frozen_layers": 4 * (stored + dense)}


def _restore(network: Network, held: Mapping[str, Tensor], path: str | Path) -> None:
    own = network.frozen_layers()
    for name, tensor in own.items():
        if name not in held or held[name].shape != tensor.shape:
            found = list(held[name].shape) if name in held else "nothing"
            raise StoreError(f"{path}: {name} is {list(tensor.shape)}, the file has {found}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(held[name])


def _described(path: str | Path, said: Mapping[str, Any]) -> Description:
    if said.get("task") != TASK:
        raise StoreError(f"{path} holds no time series model: task {said.get('task')!r}")
    try:
        return _read(said)
    except AdaptError as error:
        raise StoreError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} lacks or misstates {error} of a time series model") from error


def _read(said: Mapping[str, Any]) -> Description:
    frozen, names, scaler = said["frozen_layers"], said["names"], said["scaler"]
    if frozen["kept"] not in get_args(Keep):
        raise AdaptError(f"frozen_layers={frozen['kept']!r} is not known")
    return Description(
        backbone=Backbone.from_json(said["backbone"]),
        look_back=_whole(said["look_back"]),
        patches=Patches.from_json(said["patches"]),
        aim=Aim.from_json(said["aim"]),
        seed=_whole(frozen["seed"]),
        kept=frozen["kept"],
        sha256=str(frozen["sha256"]),
        names=None if names is None else tuple(map(str, names)),
        scaler=None if scaler is None else Scaler.from_json(scaler),
        frequency=None if said["frequency"] is None else str(said["frequency"]),
        blocks=None if said["blocks"] is None else str(said["blocks"]),
        period=None if said["period"] is None else _whole(said["period"]),
    )


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise AdaptError(f"{value!r} is no whole number")
    return value
