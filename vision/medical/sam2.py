"""SAM 2 on single pictures, behind the interface of `SegmentAnything`: transformers' Sam2Model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import AdaptError
from .sam import SegmentAnything
from .sam_sizes import require_multiple, set_prompt_size
from .transformers_sam import configured

KINDS = ("sam2", "sam2_video")  # the authors' files on the hub hold the video model, too


class SegmentAnything2(SegmentAnything):
    """SAM 2 (arXiv 2408.00714) without its memory of other frames: a Hiera encoder with a neck.

    Its decoder also wants the encoder's features at 2 and 4 times the embeddings' resolution. These
    travel in the one tensor of embeddings, pixels folded into channels: [b, 4 d, g, g]. So whatever
    keeps, batches or adapts embeddings need not know of them.

    The mask is always the first of the four that the decoder draws, the one that a `MaskHead`
    trains; SAM 2 itself takes one of the other three, outside of training, when it finds the first
    unstable (our choice).
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.vision_encoder, model.prompt_encoder, model.mask_decoder)
        self.no_memory_embedding = model.no_memory_embedding
        model.mask_decoder.dynamic_multimask_via_stability = False

    @property
    def mark(self) -> Tensor:
        return self.get_parameter("prompt_encoder.point_embed.weight")[1:2]

    def _encoded(self, images: Tensor) -> Tensor:
        fine, middle, coarse = self.vision_encoder(images).fpn_hidden_states
        decoder: Any = self.mask_decoder
        coarse = coarse + self.no_memory_embedding.reshape(1, -1, 1, 1)
        middle, fine = decoder.conv_s1(middle), decoder.conv_s0(fine)
        return torch.cat([coarse, F.pixel_unshuffle(middle, 2), F.pixel_unshuffle(fine, 4)], dim=1)

    def _masks(self, embeddings: Tensor, sparse: Tensor | None, dense: Tensor) -> Tensor:
        d = self.width
        coarse, middle, fine = embeddings.split([d, d, 2 * d], dim=1)
        masks: Tensor = self.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self._positions(coarse),
            sparse_prompt_embeddings=self._nowhere(coarse) if sparse is None else sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[F.pixel_shuffle(fine, 4), F.pixel_shuffle(middle, 2)],
        )[0]
        return masks

    def _nowhere(self, embeddings: Tensor) -> Tensor:
        """What SAM 2 is asked when it is asked nothing: a point that is none, [b, 1, t, d]."""
        points = embeddings.new_zeros(len(embeddings), 1, 1, 2)
        labels = -torch.ones(points.shape[:-1], dtype=torch.int64, device=points.device)
        tokens: Tensor = self.prompt_encoder(points, labels, None, None)[0]
        return tokens


def resize2(sam: SegmentAnything, img_size: int) -> SegmentAnything:
    """The same SAM 2, in place, for images [b, 3, img_size, img_size].

    Hiera's positions are a small table that it resamples bicubically at every call and one per
    window, so that nothing is to be resampled here. Raises `AdaptError` for a size of which no
    whole windows, or no whole cells of the coarsest stage, can be cut.
    """
    encoder: Any = sam.vision_encoder
    settings = encoder.config.backbone_config
    stride = settings.patch_stride[0]
    coarsest = stride * 2 ** (len(settings.blocks_per_stage) - 1)
    require_multiple(img_size, math.lcm(stride * settings.window_size_per_stage[0], coarsest))
    cell = sam.img_size // int(sam.prompt_encoder.image_embedding_size[0])
    set_prompt_size(sam, img_size, img_size // cell)
    return sam


def fetched2(name: str) -> SegmentAnything:
    """A model of the hub or a folder; what its file lacks is refused, not drawn."""
    from transformers import AutoConfig, Sam2Model

    kind = AutoConfig.from_pretrained(name).model_type
    if kind not in KINDS:
        raise AdaptError(f"{name!r} is a model of the kind {kind!r}, not {' or '.join(KINDS)}")
    loading: Any = Sam2Model.from_pretrained
    model, info = loading(name, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise AdaptError(f"{name!r} lacks {sorted(info['missing_keys'])[0]}, which SAM 2 has")
    return SegmentAnything2(model).eval()


def drawn2(hiera: Mapping[str, Any], decoder: Mapping[str, Any]) -> SegmentAnything:
    """A SAM 2 of these settings of Sam2HieraDetConfig and Sam2MaskDecoderConfig, numbers random.

    The decoder's `hidden_size` is that of neck and prompts, too.
    """
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2MaskDecoderConfig, Sam2Model

    eye = configured(Sam2HieraDetConfig, hiera)
    masks = configured(Sam2MaskDecoderConfig, decoder)
    size = eye.image_size if isinstance(eye.image_size, int) else eye.image_size[0]
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": eye.to_dict(),
        "backbone_channel_list": eye.embed_dim_per_stage[::-1],
        "fpn_hidden_size": masks.hidden_size,
    }
    prompts = {"hidden_size": masks.hidden_size, "image_size": size}
    config = Sam2Config(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks.to_dict()
    )
    model: Any = Sam2Model(config)
    # Two buffers of one meaning, which files hold twice: a drawn model shall agree with itself.
    model.prompt_encoder.shared_embedding = model.shared_image_embedding
    return SegmentAnything2(model).eval()
