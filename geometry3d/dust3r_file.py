"""DUSt3R's published files, loaded without running anything that they hold.

A .pth holds the call that made the network, as text, which its authors evaluate. Here that text is
parsed: one known name, keywords, literals. The weights come through torch's weights-only reader.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..core.building import made
from ..core.errors import AdaptError
from .dust3r import Dust3r, Dust3rSize
from .dust3r_names import renamed, size_from

CONSTRUCTOR = "AsymmetricCroCo3DStereo"
_LONGEST = 4000  # characters of a constructor's text; the published ones have some 400

# What a network of ours is: other values would load and answer wrongly. `None`: any value.
_FACTS: dict[str, tuple[Any, ...] | None] = {
    "pos_embed": ("RoPE100",),
    "patch_embed_cls": ("ManyAR_PatchEmbed", "PatchEmbedDust3R"),
    "output_mode": ("pts3d",),
    "depth_mode": (("exp", -math.inf, math.inf),),
    "conf_mode": (("exp", 1, math.inf),),
    "patch_size": (16,),
    "mlp_ratio": (4, 4.0),
    "norm_im2_in_dec": (True,),
    "freeze": None,
    "img_size": None,
    "landscape_only": None,
    "head_type": ("dpt", "linear"),
    "enc_embed_dim": None,
    "enc_depth": None,
    "enc_num_heads": None,
    "dec_embed_dim": None,
    "dec_depth": None,
    "dec_num_heads": None,
}
# The numbers that must agree with the shapes in the file.
_SIZES = {
    "enc_embed_dim": "encoder_width",
    "enc_depth": "encoder_depth",
    "enc_num_heads": "encoder_heads",
    "dec_embed_dim": "width",
    "dec_depth": "depth",
    "dec_num_heads": "heads",
    "head_type": "head",
}


def load_dust3r(file: str | Path) -> Dust3r:
    """The network of a DUSt3R checkpoint, on the CPU, in fp32 and eval mode.

    `file`: a .pth with the entries `model` and `args`, or a .safetensors with the same names (a
    `config.json` beside it is read, if there is one). Widths, depths and the kind of head are read
    off the shapes; the number of attention heads is the text's, else 64 numbers wide each.

    Raises `AdaptError` for a file that is missing, damaged or not plain data, a text that is more
    than a call of known names with literals, and a network that ours is not (MASt3R, another
    output, other keys).
    """
    path = Path(file)
    if not path.is_file():
        raise AdaptError(f"there is no checkpoint {str(file)!r}")
    state, facts = _safetensors(path) if path.suffix == ".safetensors" else _pth(path)
    check_facts(facts)
    ours = renamed(state)
    heads = (facts.get("enc_num_heads"), facts.get("dec_num_heads"))
    size = size_from(ours, heads if None not in heads else None)  # type: ignore[arg-type]
    _agree(facts, size)
    with torch.device("meta"):
        network = Dust3r(size)
    with made(f"the checkpoint {str(file)!r}"):
        network.load_state_dict(ours, assign=True)
    return network.eval()


def facts_of(text: str) -> dict[str, Any]:
    """The keywords of a constructor's text, without running it.

    >>> facts_of("AsymmetricCroCo3DStereo(enc_depth=24, conf_mode=('exp', 1, inf))")
    {'enc_depth': 24, 'conf_mode': ('exp', 1, inf)}
    """
    try:
        call = ast.parse(text[:_LONGEST].strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        call = None
    match call:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=words) if name == CONSTRUCTOR:
            return {str(word.arg): _literal(word.value, text) for word in words}
    raise AdaptError(
        f"the file's constructor is {_short(text)}: known is {CONSTRUCTOR}(name=value, ...) alone"
    )


def check_facts(facts: Mapping[str, Any]) -> None:
    """Refuse what a network of ours is not, by name."""
    for name, value in facts.items():
        if name not in _FACTS:
            raise AdaptError(f"the file's constructor has the option {name!r}, which is not known")
        allowed = _FACTS[name]
        plain = tuple(value) if isinstance(value, list) else value
        if allowed is not None and plain not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise AdaptError(f"the file's network has {name}={value!r}; ours has {wanted}")
        if name in _SIZES and name != "head_type" and not _count(value):
            raise AdaptError(f"the file's constructor says {name}={value!r}, not a whole number")


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _literal(node: ast.expr, text: str) -> Any:
    """Numbers, words, truth values, None, `inf`, and tuples or lists of them."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id="inf"):
            return math.inf
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _literal(operand, text)
            if isinstance(value, int | float):
                return -value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(_literal(part, text) for part in parts)
    raise AdaptError(f"the file's constructor is {_short(text)}: {ast.unparse(node)!r} is no value")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _pth(path: Path) -> tuple[Mapping[str, object], dict[str, Any]]:
    """State and facts of a file of torch.save, which holds plain data and a Namespace."""
    with (
        made(f"the checkpoint {str(path)!r}"),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except EOFError as error:
            raise AdaptError(f"cannot load the checkpoint {str(path)!r}: it is cut off") from error
        except UnpicklingError as error:  # torch's word on it advises to run what the file holds
            raise AdaptError(
                f"cannot load the checkpoint {str(path)!r}: it is no file of torch.save, or holds"
                " more than plain data, which is not run"
            ) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("model"), dict):
        held = sorted(map(str, stored))[:5] if isinstance(stored, dict) else type(stored).__name__
        raise AdaptError(f"{str(path)!r} holds {held}, not a dictionary with an entry 'model'")
    text = getattr(stored.get("args"), "model", None)
    if text is None:
        return stored["model"], {}
    if not isinstance(text, str):
        raise AdaptError(f"{str(path)!r}: its args.model is a {type(text).__name__}, not a text")
    return stored["model"], facts_of(text)


def _safetensors(path: Path) -> tuple[Mapping[str, object], dict[str, Any]]:
    from safetensors.torch import load_file

    with made(f"the checkpoint {str(path)!r}"):
        # Copied: what load_file returns may still lie in the file, which can change.
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    beside = path.with_name("config.json")
    if not beside.is_file():
        return state, {}
    with made(f"the configuration {str(beside)!r}"):
        facts = json.loads(beside.read_text())
    if not isinstance(facts, dict):
        raise AdaptError(f"{str(beside)!r} holds a {type(facts).__name__}, not an object")
    return state, {name: _from_json(value) for name, value in facts.items() if name in _FACTS}


def _from_json(value: Any) -> Any:
    """JSON writes tuples as lists, and infinities as words where its writer is strict."""
    if isinstance(value, list):
        return tuple(_from_json(part) for part in value)
    words = {"inf": math.inf, "Infinity": math.inf, "-inf": -math.inf, "-Infinity": -math.inf}
    return words.get(value, value) if isinstance(value, str) else value


def _agree(facts: Mapping[str, Any], size: Dust3rSize) -> None:
    for name, ours in _SIZES.items():
        if name in facts and facts[name] != getattr(size, ours):
            raise AdaptError(
                f"the file's constructor says {name}={facts[name]!r}, its tensors"
                f" {getattr(size, ours)!r}"
            )
