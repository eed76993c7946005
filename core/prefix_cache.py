"""What a frozen backbone computes before its first adapted block, once per sample."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import AdaptError
from .recipe import require
from .sets import sets_of

_RANDOM = ("p", "drop_prob", "prob")  # of dropout, of timm's drop path, of its patch dropout


class PrefixCache:
    """Calls a timm `VisionTransformer` on samples that it may have seen: cache(images, keys).

    With k the first block that holds a site of any attached set, the state h_k [n, tokens, d] that
    enters block k does not change in training. It is kept per sample, in memory or (with `folder`)
    in a file that is mapped into memory and goes with this process. A call computes the states that
    are missing, together, then blocks k.., norm and head. So the gain grows with k: methods that
    adapt every block (k = 0) save the patch embedding only.

    `keys` number the samples from 0 to `samples` - 1, and one number is one input: no augmentation.
    The first max_bytes // (bytes of a state) samples are kept, the others computed at each call.
    Outputs are the backbone's bit for bit where the kernels give a row the same bits in every batch
    (a batch that is computed whole is one), else up to the rounding of a batch's composition.

    States are thrown away when the prefix's tensors were replaced or written to (by torch, not by
    `.data`), or the input's size, dtype or device changes. Raises `AdaptError` for another
    backbone, an adapted embedding, dropout or running statistics in the prefix, keys out of range,
    a bound without room for one state, states for which memory or disk has no room, and when a set
    was attached to an earlier block.

    >>> from timm.models.vision_transformer import VisionTransformer
    >>> from polyadapt.core import LoRA, PrefixCache, attach
    >>> vit = VisionTransformer(
    ...     img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, num_classes=0
    ... )
    >>> _ = attach(vit, LoRA(rank=1), at="blocks.2.attn.qkv")
    >>> cached = PrefixCache(vit, samples=4)
    >>> cached.first, cached(torch.randn(2, 3, 16, 16), [3, 1]).shape, len(cached)
    (2, torch.Size([2, 8]), 2)
    """

    def __init__(
        self,
        backbone: nn.Module,
        samples: int,
        *,
        max_bytes: int = 2 << 30,
        folder: str | Path | None = None,
    ) -> None:
        require(samples > 0, f"samples={samples} is not allowed: 1 or more")
        _require_vision_transformer(backbone)
        self.backbone = backbone
        self.samples = samples
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder)
        self.first = _first_adapted(backbone)
        self._prefix = _prefix(backbone, self.first)
        _require_repeatable(self._prefix)
        self._places: dict[int, int] = {}
        self._states = torch.empty(0)
        self._known: tuple[object, ...] = ()

    def __len__(self) -> int:
        """The number of samples whose state is kept."""
        return len(self._places)

    def clear(self) -> None:
        """Forget all states."""
        self._places, self._states, self._known = {}, torch.empty(0), ()

    @property
    def full(self) -> bool:
        """Whether nothing more will be kept: all samples are, or the bound is reached."""
        return bool(self._places) and len(self._places) == len(self._states)

    def fill(self, images: Tensor, keys: Tensor | Sequence[int]) -> None:
        """Compute and keep states without the rest of the backbone.

        States that were filled in an order and in batches of one's own do not depend, by rounding,
        on the batches that they are asked for in later.
        """
        self._entering(images, self._checked(images, keys))

    def __call__(self, images: Tensor, keys: Tensor | Sequence[int]) -> Tensor:
        """backbone(images), the sample of each image given by its key."""
        return self._rest(self._entering(images, self._checked(images, keys)))

    def _checked(self, images: Tensor, keys: Tensor | Sequence[int]) -> list[int]:
        """The keys as numbers, if they fit the images, and the sets still fit the cache."""
        numbers = keys.tolist() if isinstance(keys, Tensor) else list(keys)
        require(len(numbers) == len(images), f"{len(numbers)} keys for {len(images)} images")
        wrong = [key for key in numbers if not 0 <= key < self.samples]
        require(not wrong, f"key {wrong[:1]} is not one of the {self.samples} samples")
        found = _first_adapted(self.backbone)
        require(
            found >= self.first,
            f"block {found} was adapted after this cache was made for block {self.first} and later:"
            " make a new one",
        )
        return numbers

    def _entering(self, images: Tensor, keys: Sequence[int]) -> Tensor:
        """The states that enter block `first`, those that are missing computed and kept."""
        known = self._fingerprint(images)
        if known != self._known:
            self.clear()
            self._known = known
        missing = [row for row, key in enumerate(keys) if key not in self._places]
        if len(missing) == len(keys):
            fresh = self._compute(images)
            self._keep(keys, fresh)
            return fresh
        places = [self._places.get(key, 0) for key in keys]
        states = self._states[places].to(images.device)
        if missing:
            fresh = self._compute(images[missing])
            states[missing] = fresh
            self._keep([keys[row] for row in missing], fresh)
        return states

    def _keep(self, keys: Sequence[int], states: Tensor) -> None:
        if not self._places:
            self._states = self._room(states)
        for key, state in zip(keys, states, strict=True):
            place = len(self._places)
            if key not in self._places and place < len(self._states):
                self._states[place] = state
                self._places[key] = place

    def _room(self, states: Tensor) -> Tensor:
        """Room for as many states as are allowed; none of it is taken before it is written."""
        number = min(self.samples, self.max_bytes // states[0].nbytes)
        require(
            number > 0,
            f"a bound of {self.max_bytes} bytes holds no state: one is {states[0].nbytes} bytes",
        )
        shape, total = [number, *states.shape[1:]], number * states[0].numel()
        taken = f"the states of {number} samples take {number * states[0].nbytes} bytes"
        if self.folder is None:
            try:
                return torch.empty(shape, dtype=states.dtype)
            except RuntimeError as error:
                raise AdaptError(f"{taken}, more than the memory has: lower the bound") from error
        try:
            # A disk that is full would end the process when a page is written.
            free = shutil.disk_usage(self.folder).free
            require(number * states[0].nbytes <= free, f"{taken}, {self.folder} has {free} free")
            handle, path = tempfile.mkstemp(dir=self.folder, prefix="prefix-")
        except OSError as error:
            raise AdaptError(f"cannot write into {self.folder}: {error.strerror}") from error
        os.close(handle)
        mapped = torch.from_file(path, shared=True, size=total, dtype=states.dtype)
        os.unlink(path)  # the mapping keeps it, and its end frees the disk
        return mapped.view(shape)

    def _compute(self, images: Tensor) -> Tensor:
        model = self.backbone
        with torch.no_grad():
            x = model.patch_drop(model._pos_embed(model.patch_embed(images)))  # type: ignore[operator]
            x = model.norm_pre(x)  # type: ignore[operator]
            return self._through(range(self.first), x)

    def _rest(self, states: Tensor) -> Tensor:
        model = self.backbone
        if self.first == 0:  # a set may act on the list of blocks as a whole
            x = model.blocks(states)  # type: ignore[operator]
        else:
            x = self._through(range(self.first, len(model.blocks)), states)  # type: ignore[arg-type]
        return model.forward_head(model.norm(x))  # type: ignore[operator, no-any-return]

    def _through(self, numbers: Iterable[int], x: Tensor) -> Tensor:
        for number in numbers:
            x = self.backbone.blocks[number](x)  # type: ignore[index, operator]
        return x

    def _fingerprint(self, images: Tensor) -> tuple[object, ...]:
        """What the states depend on besides the samples."""
        tensors = [t for m in self._prefix for t in (*m.parameters(), *m.buffers())]
        tensors += list(self.backbone.parameters(recurse=False))
        device = images.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weights = tuple((id(t), t._version) for t in tensors)
        return images.shape[1:], images.dtype, images.device, cast, weights


def _require_vision_transformer(backbone: nn.Module) -> None:
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer.forward, VisionTransformer.forward_features
    if (
        not isinstance(backbone, VisionTransformer)
        or (type(backbone).forward, type(backbone).forward_features) != plain
    ):
        raise AdaptError(
            f"a prefix cannot be cached for {type(backbone).__name__}: only for timm's"
            " VisionTransformer, whose forward is known"
        )


def _first_adapted(backbone: nn.Module) -> int:
    """The first block with a site of any attached set; their number if no block is adapted."""
    depth = len(backbone.blocks)  # type: ignore[arg-type]
    first = depth
    for name, adapters in sets_of(backbone).items():
        for site in adapters.adapters:
            top, _, below = site.partition(".")
            if top == "blocks":
                number = below.partition(".")[0]
                first = min(first, int(number)) if number.isdecimal() else 0
            elif top not in ("norm", "fc_norm", "head", "attn_pool"):
                raise AdaptError(f"set {name!r} adapts {site!r}: nothing before it can be cached")
    return first


def _prefix(backbone: nn.Module, first: int) -> list[nn.Module]:
    above = [backbone.patch_embed, backbone.pos_drop, backbone.patch_drop, backbone.norm_pre]
    blocks = list(backbone.blocks)[:first]  # type: ignore[arg-type]
    return [*above, *blocks]


def _require_repeatable(prefix: Sequence[nn.Module]) -> None:
    for module in (inner for outer in prefix for inner in outer.modules()):
        name = type(module).__name__
        if getattr(module, "running_mean", None) is not None:
            raise AdaptError(f"a prefix with {name} cannot be cached: its statistics are a batch's")
        rates = [getattr(module, rate, 0) for rate in _RANDOM]
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            raise AdaptError(f"a prefix with {name} above 0 cannot be cached: it draws at random")
