"""One table of Whisper's module paths: openai-whisper's spelling and that of transformers."""

from __future__ import annotations

from typing import Literal

from ..core.errors import AdaptError

Layout = Literal["openai", "transformers"]
LAYOUTS: tuple[Layout, ...] = ("openai", "transformers")

# Pairs (openai-whisper, transformers) of what stands below a tower, and below a block of it.
_TOWER = (
    ("conv1", "conv1"),
    ("conv2", "conv2"),
    ("token_embedding", "embed_tokens"),
    ("positional_embedding", "embed_positions.weight"),
)
_LAST_NORM = {"encoder": ("ln_post", "layer_norm"), "decoder": ("ln", "layer_norm")}
_ATTENTIONS = (("attn", "self_attn"), ("cross_attn", "encoder_attn"))
_PROJECTIONS = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj"))
_BLOCK = (
    *_ATTENTIONS,
    *((f"{a}.{p}", f"{b}.{q}") for a, b in _ATTENTIONS for p, q in _PROJECTIONS),
    ("attn_ln", "self_attn_layer_norm"),
    ("cross_attn_ln", "encoder_attn_layer_norm"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
    ("mlp_ln", "final_layer_norm"),
)
_LEAVES = ("weight", "bias")

# What a set usually sits on, as patterns of `select`; `{a,b}` lists what must all exist. None
# matches transformers' `proj_out`, which is the token embedding again.
_QKVO: dict[Layout, str] = {
    "openai": "{query,key,value,out}",
    "transformers": "{q_proj,k_proj,v_proj,out_proj}",
}
_SITES: dict[str, dict[Layout, tuple[str, ...]]] = {
    "attention": {
        "openai": (f"**.{{attn,cross_attn}}.{_QKVO['openai']}",),
        "transformers": (f"**.{{self_attn,encoder_attn}}.{_QKVO['transformers']}",),
    },
    "encoder-attention": {
        "openai": (f"encoder.blocks.*.attn.{_QKVO['openai']}",),
        "transformers": (f"model.encoder.layers.*.self_attn.{_QKVO['transformers']}",),
    },
    "decoder-attention": {
        "openai": (f"decoder.blocks.*.{{attn,cross_attn}}.{_QKVO['openai']}",),
        "transformers": (
            f"model.decoder.layers.*.{{self_attn,encoder_attn}}.{_QKVO['transformers']}",
        ),
    },
    "query-value": {
        "openai": ("**.{attn,cross_attn}.{query,value}",),
        "transformers": ("**.{self_attn,encoder_attn}.{q_proj,v_proj}",),
    },
    "mlp": {
        "openai": ("**.mlp.{0,2}",),
        "transformers": ("**.layers.*.{fc1,fc2}",),
    },
}
_SITES["linear"] = {
    layout: (*_SITES["attention"][layout], *_SITES["mlp"][layout]) for layout in LAYOUTS
}


def sites_for(layout: Layout, what: str = "attention") -> tuple[str, ...]:
    """Patterns for `attach(..., at=...)` in one spelling.

    `what`: attention (all query, key, value and output projections), the same of one tower as
    encoder-attention or decoder-attention, query-value, mlp, linear (attention and mlp).

    >>> sites_for("openai", "mlp"), sites_for("transformers", "mlp")
    (('**.mlp.{0,2}',), ('**.layers.*.{fc1,fc2}',))
    """
    if what not in _SITES:
        raise AdaptError(f"no sites are called {what!r}; there are {', '.join(_SITES)}")
    return _SITES[what][layout]


def to_transformers(path: str) -> str:
    """The path of a module or parameter in transformers' Whisper.

    >>> to_transformers("decoder.blocks.3.cross_attn.query.weight")
    'model.decoder.layers.3.encoder_attn.q_proj.weight'
    """
    return _renamed(path, "openai", "transformers")


def to_openai(path: str) -> str:
    """The path of a module or parameter in openai-whisper's Whisper.

    >>> to_openai("model.encoder.layers.0.fc2.bias")
    'encoder.blocks.0.mlp.2.bias'
    """
    return _renamed(path, "transformers", "openai")


def _renamed(path: str, here: Layout, there: Layout) -> str:
    parts = path.split(".")
    if here == "transformers" and parts[0] == "model":
        parts = parts[1:]
    tower, rest = parts[0], parts[1:]
    if tower in _LAST_NORM and (new := _below(tower, rest, here, there)) is not None:
        return ".".join([*(["model"] if there == "transformers" else []), tower, *new])
    raise AdaptError(f"{path!r} of the {here} layout has no counterpart in the {there} layout")


def _below(tower: str, rest: list[str], here: Layout, there: Layout) -> list[str] | None:
    """The part of a path below its tower, in the other spelling; None where there is none."""
    blocks = {"openai": "blocks", "transformers": "layers"}
    if not rest:
        return []
    if rest[0] != blocks[here]:
        return _looked_up((*_TOWER, _LAST_NORM[tower]), rest, here)
    if len(rest) <= 2:
        return [blocks[there], *rest[1:]]
    inside = _looked_up(_BLOCK, rest[2:], here)
    return None if inside is None else [blocks[there], rest[1], *inside]


def _looked_up(
    table: tuple[tuple[str, str], ...], rest: list[str], here: Layout
) -> list[str] | None:
    known = dict(table) if here == "openai" else {b: a for a, b in table}
    leaf = rest[-1:] if rest[-1] in _LEAVES and ".".join(rest) not in known else []
    name = ".".join(rest[: len(rest) - len(leaf)])
    return [known[name], *leaf] if name in known else None
