"""Which part of a SAM's encoder does not change in training: the chain that `PrefixCache` cuts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.errors import AdaptError
from ...core.prefix_chain import Block, Chain
from .lite_medsam import TinyEncoder
from .sam import SegmentAnything

_ENCODER = "vision_encoder"


def encoder_chain(sam: SegmentAnything) -> Chain:
    """Images [b, 3, s, s] -> embeddings [b, d, g, g], block by block; the neck is the last block.

    `PrefixCache(sam, n, chain=encoder_chain(sam))` keeps the states that enter the first adapted
    block, and with no adapter in the encoder the embeddings: what trains the decoder alone, or
    adapts it, then never runs the encoder again. Running statistics (LiteMedSAM's) count as fixed,
    as they are in training by `AdaptedModule`.

    Raises `AdaptError` for an encoder whose forward is not known here.
    """
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    encoder: Any = sam.vision_encoder
    if isinstance(encoder, TinyEncoder):
        return _chain(encoder, encoder.patch_embed, _tiny_vit(encoder))
    if isinstance(encoder, SamVisionEncoder):
        return _chain(encoder, _embedded(encoder), _vision_transformer(encoder))
    raise AdaptError(
        f"a prefix cannot be cached for a SAM with {type(encoder).__name__}: for SamVisionEncoder"
        " and TinyEncoder, whose forwards are known"
    )


def _chain(encoder: Any, embed: Any, blocks: list[Block]) -> Chain:
    return Chain(
        embed=embed,
        blocks=blocks,
        end=lambda x: x,
        embedding=[encoder.patch_embed],
        owner=encoder,
        after=("prompt_encoder", "mask_decoder"),
        fixed_statistics=True,
    )


def _embedded(encoder: Any) -> Any:
    def embed(images: Tensor) -> Tensor:
        states: Tensor = encoder.patch_embed(images)
        return states if encoder.pos_embed is None else states + encoder.pos_embed

    return embed


def _vision_transformer(encoder: Any) -> list[Block]:
    layers = [
        Block(f"{_ENCODER}.layers.{n}", layer, layer) for n, layer in enumerate(encoder.layers)
    ]
    return [*layers, Block(f"{_ENCODER}.neck", encoder.neck, encoder.neck)]


def _tiny_vit(encoder: Any) -> list[Block]:
    """States are [b, c, h, w] between stages and [b, h, w, c] inside those with attention."""
    blocks = []
    for n, stage in enumerate(encoder.stages):
        path = f"{_ENCODER}.stages.{n}"
        attends = hasattr(stage, "downsample")
        if attends:
            blocks.append(
                Block(f"{path}.downsample", stage.downsample, _then_last(stage.downsample))
            )
        for i, block in enumerate(stage.blocks):
            ends = attends and i + 1 == len(stage.blocks)
            blocks.append(
                Block(f"{path}.blocks.{i}", block, _then_second(block) if ends else block)
            )
    return [*blocks, Block(f"{_ENCODER}.neck", encoder.neck, _of_last(encoder.neck))]


def _then_last(module: nn.Module) -> Any:
    """The module's result with channels last."""
    return lambda x: module(x).permute(0, 2, 3, 1)


def _then_second(module: nn.Module) -> Any:
    """The module's result with channels second."""
    return lambda x: module(x).permute(0, 3, 1, 2)


def _of_last(module: nn.Module) -> Any:
    """The module of the state with channels last."""
    return lambda x: module(x.permute(0, 2, 3, 1))
