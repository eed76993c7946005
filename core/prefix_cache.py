"""What a frozen backbone computes before its first adapted block, once per sample."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import AdaptError
from .prefix_chain import Chain, has_statistics, vision_transformer
from .recipe import require


class PrefixCache:
    """Calls a backbone on samples that it may have seen: cache(images, keys).

    It is a timm `VisionTransformer`, or one whose forward `chain` describes (see `Chain`).

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
        chain: Chain | None = None,
    ) -> None:
        require(samples > 0, f"samples={samples} is not allowed: 1 or more")
        self.backbone = backbone
        self.chain = vision_transformer(backbone) if chain is None else chain
        self.samples = samples
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder)
        self.first = self.chain.first_adapted(backbone)
        self._prefix = self.chain.prefix(self.first)
        self.chain.require_repeatable(self.first)
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
        found = self.chain.first_adapted(self.backbone)
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
        with torch.no_grad(), _evaluating(self._prefix):
            return self._through(0, self.first, self.chain.embed(images))

    def _rest(self, states: Tensor) -> Tensor:
        if self.first == 0 and self.chain.whole is not None:  # a set may act on all blocks at once
            return self.chain.end(self.chain.whole(states))
        return self.chain.end(self._through(self.first, len(self.chain.blocks), states))

    def _through(self, first: int, end: int, x: Tensor) -> Tensor:
        for block in self.chain.blocks[first:end]:
            x = block.function(x)
        return x

    def _fingerprint(self, images: Tensor) -> tuple[object, ...]:
        """What the states depend on besides the samples."""
        tensors = [t for m in self._prefix for t in (*m.parameters(), *m.buffers())]
        tensors += list(self.chain.owner.parameters(recurse=False))
        device = images.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weights = tuple((id(t), t._version) for t in tensors)
        return images.shape[1:], images.dtype, images.device, cast, weights


@contextmanager
def _evaluating(prefix: Sequence[nn.Module]) -> Iterator[None]:
    """Running statistics as they are: Lightning asks for training mode before a run begins."""
    found = [m for outer in prefix for m in outer.modules() if has_statistics(m) and m.training]
    for module in found:
        module.training = False
    try:
        yield
    finally:
        for module in found:
            module.training = True
