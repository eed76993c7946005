"""transformers' SamModel from settings, or from a checkpoint of segment-anything's authors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.building import seeded
from ...core.errors import AdaptError
from .official_names import renamed
from .sam import SegmentAnything

_MARKS = {
    "image_encoder.pos_embed",
    "image_encoder.patch_embed.proj.weight",
    "image_encoder.neck.0.weight",
    "image_encoder.blocks.0.attn.rel_pos_h",
    "image_encoder.blocks.0.mlp.lin1.weight",
    "mask_decoder.transformer.layers.0.mlp.lin1.weight",
}


def from_official(state: Mapping[str, Tensor]) -> SegmentAnything:
    """The SAM that a checkpoint of the authors' holds, its tensors neither lost nor left over."""
    if not isinstance(state, Mapping) or not set(state) >= _MARKS:
        raise AdaptError(
            f"this is no SAM of segment-anything's: it has not all of {sorted(_MARKS)}"
        )
    ours = renamed(state)
    with seeded(0):
        sam = drawn(*_settings_of(ours))
    own = sam.state_dict()
    if odd := [n for n in {**own, **ours} if n not in own or n not in ours]:
        where = "the checkpoint lacks" if odd[0] in own else "this SAM has no"
        raise AdaptError(f"{where} {odd[0]} (and {len(odd) - 1} more names do not fit)")
    sam.load_state_dict(ours, strict=True)
    return sam


def _settings_of(ours: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Encoder's and decoder's settings, read off the shapes.

    Blocks that attend within windows have the shorter tables of relative positions.
    """
    _, grid, _, width = ours["vision_encoder.pos_embed"].shape
    patch = ours["vision_encoder.patch_embed.projection.weight"].shape[-1]
    names = [name for name in ours if name.endswith("attn.rel_pos_h")]
    tables = {int(name.split(".")[2]): ours[name] for name in names}
    shortest = min(len(table) for table in tables.values())
    vision = {
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": len(tables),
        "num_attention_heads": width // tables[0].shape[1],
        "mlp_dim": len(ours["vision_encoder.layers.0.mlp.lin1.weight"]),
        "output_channels": len(ours["vision_encoder.neck.conv1.weight"]),
        "window_size": (shortest + 1) // 2,
        "global_attn_indexes": [n for n, table in tables.items() if len(table) != shortest],
    }
    mlp = len(ours["mask_decoder.transformer.layers.0.mlp.lin1.weight"])
    return vision, {"mlp_dim": mlp, "layer_norm_eps": 1e-5}  # torch's default, as the authors'


def drawn(vision: Mapping[str, Any], decoder: Mapping[str, Any]) -> SegmentAnything:
    """A SAM of these settings of SamVisionConfig and SamMaskDecoderConfig, its numbers random.

    What must agree with the encoder follows it. Raises `AdaptError` for settings that there are not
    or that are of another type.
    """
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamVisionConfig

    # transformers' own range for the encoder, 1e-10, would draw one that returns nothing.
    eye = configured(SamVisionConfig, {"initializer_range": 0.02, **vision})
    width, size, patch = eye.output_channels, eye.image_size, eye.patch_size
    eye.num_pos_feats = width // 2
    prompts = {"hidden_size": width, "image_size": size, "patch_size": patch}
    masks = configured(SamMaskDecoderConfig, {**decoder, "hidden_size": width})
    config = SamConfig(vision_config=eye, prompt_encoder_config=prompts, mask_decoder_config=masks)
    return parts_of(SamModel(config))


def configured(kind: type[Any], settings: Mapping[str, Any]) -> Any:
    """One of transformers' configurations, which keeps what it does not know without a word."""
    from huggingface_hub.errors import StrictDataclassError

    if unknown := sorted(settings.keys() - kind().to_dict().keys()):
        raise AdaptError(f"{kind.__name__} has no setting {unknown[0]!r}")
    try:
        return kind(**settings)
    except StrictDataclassError as error:
        raise AdaptError(f"{kind.__name__}: {str(error).splitlines()[-1].strip()}") from error


def parts_of(model: Any) -> SegmentAnything:
    """The parts of a SamModel, without its second name for the prompt encoder's positions."""
    sam = SegmentAnything(model.vision_encoder, model.prompt_encoder, model.mask_decoder)
    return sam.eval()
