"""What kind of layer a module is, its width, and the parts of fused projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from .errors import SiteError
from .layers import (
    BlockLayer,
    ConvLayer,
    EmbeddingLayer,
    FrozenLayer,
    LinearLayer,
    TransposedLinearLayer,
    module_at,
)
from .patterns import Pattern

if TYPE_CHECKING:
    from .sites import Site

Rows = tuple[int, int]

# Fused projections by the name of their module or parameter: equal parts, in this order.
_FUSED = {
    "qkv": "qkv",
    "in_proj_weight": "qkv",
    "in_proj_bias": "qkv",
    "in_proj": "qkv",
    "Wqkv": "qkv",
    "to_qkv": "qkv",
    "c_attn": "qkv",
    "kv": "kv",
    "to_kv": "kv",
}


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """transformers' Conv1D, known by its name: core does not import transformers."""
    return type(module).__name__.endswith("Conv1D") and hasattr(module, "nf")


def is_called_layer(module: nn.Module) -> bool:
    """A layer whose one matrix is meant when its path is named."""
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding
    return isinstance(module, layers) or is_conv1d_of_gpt2(module)


def layer_class(module: nn.Module, parameter: str | None) -> type[FrozenLayer]:
    """The layer kind that translates between storage and matrix for this parameter."""
    if parameter is None:
        return BlockLayer
    if parameter != "weight":
        return FrozenLayer
    if isinstance(module, nn.Linear):
        return LinearLayer
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return ConvLayer
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer
    return TransposedLinearLayer if is_conv1d_of_gpt2(module) else FrozenLayer


def kind_of(module: nn.Module, parameter: str | None) -> str:
    """linear, transposed linear, conv1d, conv2d, embedding, parameter or block."""
    return layer_class(module, parameter)(module, parameter).kind


def stored_at(module: nn.Module, path: str, parameter: str) -> nn.Parameter:
    """The parameter itself; one that is computed anew at each call, or not yet made, is refused."""
    stored = module._parameters.get(parameter)
    what = f"{path}.{parameter}".lstrip(".")
    if stored is None:
        raise SiteError(
            f"{what} is no stored parameter: {type(module).__name__} has"
            f" {', '.join(n for n, _ in module.named_parameters()) or 'none'} (torch's weight_norm"
            " and other parametrizations compute theirs: remove them first)"
        )
    if is_lazy(stored):
        raise SiteError(f"{what} has no shape yet: run the model once before choosing sites")
    return stored


def layer_at(model: nn.Module, site: Site) -> FrozenLayer:
    """The frozen layer of `model` at a site."""
    module = module_at(model, site.path)
    return layer_class(module, site.parameter)(module, site.parameter, site.rows)


def width_of(module: nn.Module) -> int | None:
    """Channels that a module returns: those of its last matrix, or of its last vector."""
    last = None
    for child in module.modules():
        if is_called_layer(child) and child._parameters.get("weight") is not None:
            last = layer_class(child, "weight")(child, "weight").matrix().shape[0]
    if last is None:
        sizes = [p.shape[0] for p in module.parameters() if p.ndim >= 1]
        last = sizes[-1] if sizes else None
    return last


def parts_of(
    module: nn.Module, path: str, parameter: str, kind: str, pattern: Pattern
) -> Iterator[tuple[str | None, Rows | None, tuple[int, ...]]]:
    """(part, rows, shape) of every part that the pattern asks of a parameter; the whole if none."""
    matrix = layer_class(module, parameter)(module, parameter).matrix()
    if not pattern.parts:
        yield None, None, tuple(matrix.shape)
        return
    letters = _letters(module, path, parameter, matrix.shape[0])
    if letters is None:
        raise SiteError(
            f"pattern {pattern.text!r}: {path} is not a fused projection that we know"
            f" ({', '.join(_FUSED)}); leave out [{','.join(pattern.parts)}]"
        )
    size = matrix.shape[0] // len(letters)
    for part in pattern.parts:
        if part not in letters:
            raise SiteError(
                f"pattern {pattern.text!r}: {path} has parts {','.join(letters)}, not {part!r}"
            )
        start = letters.index(part) * size
        yield part, (start, start + size), (size, *matrix.shape[1:])


def refuse_interleaved(owner: nn.Module | None, path: str, pattern: Pattern) -> None:
    """Where q, k, v of each head lie together, equal parts in a row would be wrong rows.

    LeViT, and after it TinyViT and EfficientFormer, divide each head's outputs into `key_dim`,
    `key_dim` and the rest: their attention is known by that attribute.
    """
    if pattern.parts and hasattr(owner, "key_dim"):
        kind = f"{type(owner).__module__}.{type(owner).__name__}"
        raise SiteError(
            f"pattern {pattern.text!r}: {path} of {kind} keeps q, k, v of each head together, so"
            f" it has no parts: leave out [{','.join(pattern.parts)}]"
        )


def _letters(module: nn.Module, path: str, parameter: str, d_out: int) -> str | None:
    leaf = path.rsplit(".", 1)[-1]
    own_name = parameter if parameter.startswith("in_proj") else leaf
    letters = _FUSED.get(own_name)
    stored = module._parameters[parameter]
    halves = stored is not None and d_out == 2 * stored.shape[0]
    if letters == "qkv" and is_conv1d_of_gpt2(module) and halves:
        letters = "kv"  # GPT-2's cross-attention keeps q apart
    return letters if letters and d_out % len(letters) == 0 else None
