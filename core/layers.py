"""The layer kinds: how each stores its weight and how it acts as a linear map.

Adapters see every weight as a matrix W [d_out, d_in] of the rows that the site names; a layer kind
translates. Convolutions flatten their kernel (d_in = c_in * kh * kw), GPT-2's Conv1D and Embedding
store the transpose (an embedding is a linear map of one-hot rows, d_in = number of rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SiteError

Rows = tuple[int, int]


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """What an adapter may ask of the frozen layer (or raw parameter) that it sits on."""

    module: nn.Module
    parameter: str | None
    rows: Rows | None = None

    kind = "parameter"
    channel_axis = -1  # where the rows of W appear in the layer's output

    @property
    def stored(self) -> nn.Parameter:
        """The frozen parameter as the backbone stores it."""
        stored = self.module._parameters[self.parameter or ""]
        if stored is None:
            raise SiteError(f"{type(self.module).__name__} has no {self.parameter}")
        return stored

    def matrix(self, stored: Tensor | None = None) -> Tensor:
        """This part's rows of the stored tensor as [d_out, d_in], a view where possible."""
        whole = self.as_matrix(self.stored if stored is None else stored)
        return whole if self.rows is None else whole[self.rows[0] : self.rows[1]]

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Stored layout -> all rows as a matrix (vectors and other tensors stay as they are)."""
        return stored

    def as_stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.reshape(like.shape)

    @property
    def bias(self) -> Tensor | None:
        """This part's rows of the layer's bias."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, Tensor) or self.rows is None:
            return bias
        return bias[self.rows[0] : self.rows[1]]

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """A [r, d_in] in the place of the weight, without bias: r channels for x."""
        raise SiteError(f"a {self.kind} site is not called: it has no input to act on")

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """B [d_out, r] on the channels of h."""
        return F.linear(h, b)

    def channels(self, v: Tensor) -> Tensor:
        """A vector [d_out] shaped to multiply the layer's output."""
        return v


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with the same bits for a trained and a loaded set.

    For a strided x torch chooses another kernel when the weight requires grad.
    """
    return F.linear(x.contiguous(), weight, bias)


class LinearLayer(FrozenLayer):
    """nn.Linear and its subclasses: stored [d_out, d_in]."""

    kind = "linear"

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return linear(x, a)


class TransposedLinearLayer(LinearLayer):
    """GPT-2's Conv1D: stored [d_in, d_out]."""

    kind = "transposed linear"

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def as_stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t().contiguous()


class EmbeddingLayer(TransposedLinearLayer):
    """nn.Embedding: stored [number, dim]; x holds row numbers, so A x picks columns of A."""

    kind = "embedding"

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.t())


class ConvLayer(FrozenLayer):
    """nn.Conv1d and nn.Conv2d: stored [c_out, c_in / groups, *kernel], flattened to a matrix."""

    module: nn.Conv1d | nn.Conv2d

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"conv{self._dims}d"

    @property
    def channel_axis(self) -> int:  # type: ignore[override]
        return -1 - self._dims  # counted from the end: unbatched inputs are allowed

    @property
    def _dims(self) -> int:
        return len(self.module.kernel_size)

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        if self.module.groups != 1:
            raise SiteError(
                "a grouped convolution has no low-rank path of its own: use its weight slot"
            )
        kernel = a.view(a.shape[0], -1, *self.module.kernel_size)
        kind = nn.Conv1d if isinstance(self.module, nn.Conv1d) else nn.Conv2d
        # The layer's own stride, padding mode and dilation; not a subclass's casts (whisper).
        convolved: Tensor = kind._conv_forward(self.module, x, kernel, None)  # type: ignore[arg-type]
        return convolved

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        kernel = b.view(*b.shape, *(1,) * self._dims)
        return F.conv1d(h, kernel) if self._dims == 1 else F.conv2d(h, kernel)

    def channels(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1,) * self._dims)


class BlockLayer(FrozenLayer):
    """A whole module, adapted at its output; it has no weight of its own."""

    kind = "block"


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)` for a path that is known to be there, at a fifth of its cost."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def replace_rows(whole: Tensor, parts: Sequence[tuple[Rows, Tensor]], axis: int = 0) -> Tensor:
    """A new tensor with some ranges along `axis` replaced; the other entries keep their bits.

    >>> replace_rows(torch.zeros(3), [((1, 2), torch.ones(1))])
    tensor([0., 1., 0.])
    """
    pieces, done = [], 0
    for (start, stop), piece in sorted(parts, key=lambda part: part[0]):
        pieces += [whole.narrow(axis, done, start - done), piece]
        done = stop
    pieces.append(whole.narrow(axis, done, whole.shape[axis] - done))
    kept = [p for p in pieces if p.shape[axis]]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=axis)
