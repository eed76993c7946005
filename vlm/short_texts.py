"""Prompts without the padding behind them, in towers whose features do not depend on it.

CLIP reads 77 tokens and takes the feature at a text's end, which a causal tower computes from what
stands before it; prompts have some ten tokens. All that is computed behind the longest one's end is
thrown away, in every step. A tower that masks the padding does not look at it either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def ends_before(tokens: Tensor, last: Tensor) -> Tensor:
    """Tokens [t, n] without the columns behind the largest of the positions `last` [t].

    >>> ends_before(torch.tensor([[5, 9, 0, 0], [5, 6, 9, 0]]), torch.tensor([1, 2])).tolist()
    [[5, 9, 0], [5, 6, 9]]
    """
    return tokens[:, : int(last.max()) + 1]


def last_of(tokens: Tensor, padding: int) -> Tensor:
    """The position of every text's last token that is no padding.

    >>> last_of(torch.tensor([[5, 0, 9, 0], [0, 0, 0, 0]]), padding=0).tolist()
    [2, 0]
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return (position * (tokens != padding)).amax(1)


def is_causal(text: Any) -> bool:
    """Whether open_clip's text tower sees what stands before a token alone, and takes the end's.

    The end is the largest token. CoCa's class token behind the text, other pooling and towers that
    see in both directions are not of this kind.
    """
    pooled = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    extra = getattr(text, "cls_emb", None)
    return pooled == "argmax" and extra is None and getattr(text, "attn_mask", None) is not None


def causal_features(text: Any, tokens: Tensor) -> Tensor:
    """What such a tower of context n computes, from tokens [t, m] with m <= n -> [t, d].

    open_clip's own code adds all n positions and masks n x n, so that it takes only n tokens.
    """
    m = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:m].to(dtype)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:m, :m]))
    ends = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
    projection = text.text_projection
    if projection is not None:
        ends = projection(ends) if isinstance(projection, nn.Linear) else ends @ projection
    features: Tensor = ends
    return features
