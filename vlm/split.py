"""Attention whose q, k and v are layers of their own, for towers that hold them as one matrix.

CLIP keeps one in-projection [3d, d] (rows 0 to d - 1 are q, then k, then v) and hands it to a fused
function. Nothing there is called with an input, so an adapter's dropout cannot act, and every
forward forms the adapted matrix anew. Once split, each of the three is a layer that is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.drawer import find_drawer
from ..core.errors import AdaptError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # in the order of the in-projection's rows


class SplitAttention(nn.Module):
    """softmax(q k^T / sqrt(d / heads) + mask) v W_o^T + b_o, with q, k and v from called layers.

    Stands in for `nn.MultiheadAttention` where blocks call it without asking for weights, and
    equals it to rounding: inputs [b, n, d], or [n, b, d] unless `batch_first`; `attn_mask` is
    [n, m] or [b * heads, n, m], added to the scores, or True where nothing may be seen.
    The three layers hold views of the frozen in-projection, so a split costs no memory.

    >>> split = SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    >>> x = torch.zeros(3, 5, 8)
    >>> split(x, x, x)[0].shape, split.q_proj.weight.shape
    (torch.Size([3, 5, 8]), torch.Size([8, 8]))
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, joined: nn.Module) -> None:
        super().__init__()
        self._take_over(joined)
        self.num_heads: int = joined.num_heads  # type: ignore[assignment]
        self.out_proj = joined.out_proj  # type: ignore[assignment]
        self.batch_first = bool(getattr(joined, "batch_first", True))
        self.dropout = _dropout(joined)
        self.train(joined.training)

    def _take_over(self, joined: nn.Module) -> None:
        """Move the in-projection here; what is left of the module waits for `join`, unseen."""
        weight, bias = joined.in_proj_weight, joined.in_proj_bias
        for n, name in enumerate(PROJECTIONS):
            self.add_module(name, _rows(weight, bias, n))  # type: ignore[arg-type]
        joined.in_proj_weight = joined.in_proj_bias = None  # type: ignore[assignment]
        self.__dict__["joined"] = joined

    def join(self) -> nn.Module:
        """The module of before, with the rows of the three layers in one matrix again."""
        joined: nn.Module = self.__dict__["joined"]
        layers = [self._modules[name] for name in PROJECTIONS]
        for leaf in ("weight", "bias"):
            rows = [layer._parameters[leaf] for layer in layers if layer is not None]
            setattr(joined, f"in_proj_{leaf}", _stacked(rows))
        return joined.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention` with need_weights=False."""
        if need_weights:
            raise AdaptError(
                "split attention has no weights to return: ask with need_weights=False"
            )
        inputs = (query, key, value)
        if not self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)  # type: ignore[assignment]
        mixed = self.out_proj(_flat(self.mixed(*inputs, attn_mask)))
        return (mixed if self.batch_first else mixed.transpose(0, 1)), None

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Inputs [b, n, d] -> what each head sees [b, heads, n, d / heads]."""
        q, k = self.by_head(self.q_proj(query)), self.by_head(self.k_proj(key))
        v = self.by_head(self.v_proj(value))
        q, k = self.normed(q, k)
        if mask is not None:
            mask = _additive(mask, q, k)
        p = self.dropout if self.training else 0.0
        heads: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return heads

    def by_head(self, x: Tensor) -> Tensor:
        """[b, n, d] -> [b, heads, n, d / heads]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are compared."""
        return q, k


class SplitNormedAttention(SplitAttention):
    """The same in place of open_clip's own `Attention`, with its norms and its scale per head."""

    head_scale: nn.Parameter | None

    def __init__(self, joined: nn.Module) -> None:
        super().__init__(joined)
        for name in ("ln_q", "ln_k", "ln_inner", "out_drop"):
            self.add_module(name, joined._modules[name])
        self.register_parameter("head_scale", joined.head_scale)  # type: ignore[arg-type]

    def join(self) -> nn.Module:
        joined = super().join()
        joined.head_scale = self.head_scale  # type: ignore[assignment]  # it may have moved
        return joined

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.ln_q(q), self.ln_k(k)  # type: ignore[operator]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[b, n, d] -> [b, n, d]."""
        mixed = self.mixed(x, x, x, attn_mask)
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        out: Tensor = self.out_drop(self.out_proj(self.ln_inner(_flat(mixed))))  # type: ignore[operator]
        return out


def split_attention(model: nn.Module) -> tuple[str, ...]:
    """Split every self-attention of open_clip's residual blocks; the paths of those that were.

    Poolers and cross-attention stay as they are, as do timm's and transformers' attentions, whose
    projections are called already. Outputs stay the same to rounding. State dicts have the names of
    split layers from here on (`joined_attention` gives back the old ones): load weights before.
    Raises `AdaptError` while adapter sets are attached, and for open_clip's scaled cosine.

    >>> from open_clip.transformer import Transformer
    >>> tower = Transformer(width=8, layers=2, heads=2)
    >>> split_attention(tower)
    ('resblocks.0.attn', 'resblocks.1.attn')
    """
    _refuse_attached(model, "split")
    found = [(path, block, _split_class(block.attn)) for path, block in _blocks(model)]
    for _, block, split in found:
        block.attn = split(block.attn)  # type: ignore[arg-type]
    return tuple(path for path, _, _ in found)


def joined_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo `split_attention`: the classes, names and bits of before; the paths that were joined."""
    _refuse_attached(model, "joined")
    found = [
        (f"{path}.attn".lstrip("."), block)
        for path, block in model.named_modules()
        if isinstance(getattr(block, "attn", None), SplitAttention)
    ]
    for _, block in found:
        block.attn = block.attn.join()
    return tuple(path for path, _ in found)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path of the attention, its block) of residual blocks: a pooler has no `ln_1`, and the norm
    of keys is that of a block that looks at another tower."""
    for path, block in model.named_modules():
        children = block._modules
        if {"attn", "ln_1"} <= children.keys() and "ln_1_kv" not in children:
            attention = children["attn"]
            if getattr(attention, "in_proj_weight", None) is not None:
                yield f"{path}.attn".lstrip("."), block


def _split_class(attention: Any) -> type[SplitAttention]:
    """What stands in for an attention; one that cannot be split is refused."""
    if isinstance(attention, nn.MultiheadAttention):
        if attention.bias_k is not None or attention.add_zero_attn:
            raise AdaptError("attention with keys of its own (bias_k, add_zero_attn) has no split")
        return SplitAttention
    if attention.logit_scale is not None:
        raise AdaptError(
            "open_clip's scaled cosine attention multiplies four-dimensional tensors with bmm,"
            " which torch refuses, split or not: use a tower without it"
        )
    return SplitNormedAttention


def _refuse_attached(model: nn.Module, what: str) -> None:
    drawer = find_drawer(model)
    if drawer is not None:
        raise AdaptError(
            f"attention is {what} before sets are attached: detach {sorted(drawer.sets)} first"
        )


def _rows(weight: nn.Parameter, bias: nn.Parameter | None, n: int) -> nn.Linear:
    """The n-th of three layers, on views: the placeholder is on meta, which draws nothing."""
    d = weight.shape[1]
    layer = nn.Linear(d, d, bias=bias is not None, device="meta")
    for leaf, whole in (("weight", weight), ("bias", bias)):
        if whole is not None:
            view = whole.detach()[n * d : (n + 1) * d]
            if view.is_meta:  # the pointer of a view is its offset there: layers would look tied
                view = torch.empty_like(view)
            setattr(layer, leaf, nn.Parameter(view, requires_grad=whole.requires_grad))
    return layer


def _stacked(rows: list[nn.Parameter | None]) -> nn.Parameter | None:
    given = [row for row in rows if row is not None]
    if not given:
        return None
    whole = torch.cat([row.detach() for row in given])
    return nn.Parameter(whole, requires_grad=given[0].requires_grad)


def _dropout(joined: nn.Module) -> float:
    """Of the attention's weights: a number in torch's class, a layer in open_clip's."""
    if isinstance(joined, nn.MultiheadAttention):
        return float(joined.dropout)
    return float(joined.attn_drop.p)  # type: ignore[arg-type, union-attr]


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask as scaled_dot_product_attention wants it: added, or True where something is seen."""
    if mask.ndim == 3:
        mask = mask.view(*q.shape[:2], q.shape[2], k.shape[2])
    return ~mask if mask.dtype == torch.bool else mask.to(q.dtype)


def _flat(x: Tensor) -> Tensor:
    """[b, heads, n, d / heads] -> [b, n, d]."""
    return x.transpose(1, 2).flatten(2)
