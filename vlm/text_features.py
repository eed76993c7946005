"""Class features of prompts: with gradients that fit into memory, and kept while they are constant.

Fine-tuning the text tower on a data set of C classes encodes all C prompts in every step. What
backward needs of that, the activations of C x context tokens in every block, is most of the memory
of the step. In chunks, only tokens and features [C, d] are kept, and backward holds one chunk's
activations at a time, for one more forward of the text tower; the gradients are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.activation import Stamp, current
from ..core.drawer import Drawer, find_drawer, own_parameters
from ..core.errors import AdaptError
from ..core.recomputation import within_larger
from ..core.sets import AdapterSet
from .names import encoder_of
from .prompts import class_tokens

_MOST_KEPT = 8


class TextTower(Protocol):
    """What is needed of an image-text model here: `ImageText` is one."""

    model: nn.Module

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> tokens [t, context]."""
        ...

    def shorter(self, tokens: Tensor) -> Tensor:
        """Tokens [t, context] without the columns that no feature depends on."""
        ...

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens [t, context], or fewer of `shorter` -> normalised features [t, d]."""
        ...


def encode(pair: TextTower, tokens: Tensor, chunk: int | None = None) -> Tensor:
    """Features [t, d] of tokens [t, context], `chunk` texts at a time (None: all at once).

    With gradients, each chunk runs again in backward, with the same random numbers and adapter sets
    (gradient checkpointing, arXiv 1604.06174): gradients are those of the whole batch up to the
    rounding of products of other sizes. Dropout draws other masks than it would for the whole.
    `AdaptError` for a chunk below 1.
    """
    require_chunk(chunk)
    if chunk is None or chunk >= len(tokens):
        return pair.text_features(tokens)
    return torch.cat([_encode_again(pair, part) for part in tokens.split(chunk)])


def require_chunk(chunk: int | None) -> None:
    """Refuse what is no number of texts."""
    if chunk is not None and (isinstance(chunk, bool) or chunk < 1):
        raise AdaptError(f"chunk={chunk!r} is not allowed: a whole number from 1, or None")


def _encode_again(pair: TextTower, tokens: Tensor) -> Tensor:
    """Nothing is kept for backward but the tokens, from which it starts."""
    if not torch.is_grad_enabled():
        return pair.text_features(tokens)
    made: Tensor = checkpoint(partial(_stamped, pair), tokens, use_reentrant=False)
    return made


def _stamped(pair: TextTower, tokens: Tensor) -> Tensor:
    """Features that tell backward which sets made them: a tower may be called without its root."""
    with within_larger():
        features = pair.text_features(tokens)
    drawer = find_drawer(pair.model)
    if drawer is not None:
        Stamp(drawer)(pair.model, (), features)
    return features


def class_features(
    pair: TextTower, classes: Sequence[str], templates: Sequence[str], chunk: int | None = 256
) -> Tensor:
    """The zero-shot classifier [classes, d], without gradients.

    g_c = mean over the templates of the normalised features, normalised again (arXiv 2103.00020).
    """
    if not templates:
        raise AdaptError("no template is given: one or more are wanted")
    tokens = [class_tokens(pair.tokenize, classes, template) for template in templates]
    device = _device(pair.model)
    with torch.no_grad():
        short = [pair.shorter(each).to(device) for each in tokens]
        return averaged([encode(pair, each, chunk) for each in short])


def averaged(features: Sequence[Tensor]) -> Tensor:
    """Features [c, d] of several templates as one of length 1; a single one is as it was."""
    if len(features) == 1:
        return features[0]
    return F.normalize(torch.stack([*features]).mean(0), dim=-1)


class TextFeatures:
    """The features of fixed prompts: called as often as they are needed.

    Encoded anew in each call while what makes them is trained. Else they are kept, keyed by what
    acts on the text tower: its weights and the adapters of the active sets, each by identity and
    version. With adapters in the vision tower alone they are one constant for all sets. Constants
    are those of eval mode, without dropout. `AdaptError` when each sample has a set of its own:
    then there is no one class feature.
    """

    def __init__(self, pair: TextTower, tokens: Tensor, chunk: int | None = None) -> None:
        require_chunk(chunk)
        self.pair = pair
        self.tokens = pair.shorter(tokens)
        self.chunk = chunk
        self._kept: dict[object, tuple[list[Tensor], Tensor]] = {}

    def __call__(self) -> Tensor:
        """[prompts, d], on the model's device."""
        tokens = self.tokens.to(_device(self.pair.model))
        acting = list(_acting(self.pair.model))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in acting):
            return encode(self.pair, tokens, self.chunk)
        key = (_autocast(tokens.device), *map(_version, acting))
        if key not in self._kept:
            self._keep(key, acting, self._constant(tokens))
        return self._kept[key][1]

    def _constant(self, tokens: Tensor) -> Tensor:
        # Tensors of inference mode could not be multiplied with what is trained later.
        with torch.inference_mode(False), torch.no_grad(), _evaluating(self.pair.model):
            return encode(self.pair, tokens, self.chunk)

    def _keep(self, key: object, acting: list[Tensor], features: Tensor) -> None:
        """With the tensors that the key names: while they live, no other gets their identity."""
        for old in list(self._kept)[: 1 - _MOST_KEPT]:
            self._kept.pop(old, None)
        self._kept[key] = acting, features


def _acting(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter that text features may depend on now."""
    drawer = find_drawer(model)
    own = (p for name, p in own_parameters(model) if encoder_of(name) == "text")
    return own if drawer is None else chain(own, _of_sets(drawer))


def _of_sets(drawer: Drawer) -> Iterator[Tensor]:
    active = current(drawer)
    if active.per_sample is not None or active.routed is not None:
        raise AdaptError("class features are of one set: activate(model, name), not one per sample")
    for name in active.names:
        yield from _of_text(drawer.set_called(name))


def _of_text(adapters: AdapterSet) -> Iterator[Tensor]:
    pairs = zip(adapters.sites, adapters.modules_in_order, strict=True)
    found = [module for site, module in pairs if encoder_of(site.path) == "text"]
    if found and adapters.bank is not None:
        found.append(adapters.bank)
    for module in found:
        yield from module.parameters()
        yield from module.buffers()


def _version(tensor: Tensor) -> tuple[int, int, int | None]:
    """Changes when the tensor is replaced, moved or written to."""
    written = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), written


def _autocast(device: torch.device) -> torch.dtype | None:
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within: every module in eval mode."""
    trained = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True
