"""Cached states of a SAM's encoder: its embeddings and gradients, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyadapt.core import AdaptError, FullFineTuning, HeadOnly, LoRA, PrefixCache, attach
from polyadapt.tests.medical_cases import SPARSE
from polyadapt.tests.sam_models import images, noisy, sam
from polyadapt.tests.segmentation_cases import task_of, vessels
from polyadapt.tests.test_prefix_cache import calls_of
from polyadapt.tests.training_cases import quiet_trainer
from polyadapt.vision.medical.data import Batch, GeneratedVessels
from polyadapt.vision.medical.encoder_prefix import encoder_chain
from polyadapt.vision.medical.frozen_prefix import KeptPrefix, require_keepable
from polyadapt.vision.medical.lite_medsam import untrained
from polyadapt.vision.medical.mask_head import DECODER
from polyadapt.vision.medical.sam import SegmentAnything
from polyadapt.vision.medical.sam_sizes import set_prompt_size
from polyadapt.vision.medical.task import Segmentation
from polyadapt.vision.medical.view import View

LITE = 32  # pixels


def lite() -> SegmentAnything:
    """LiteMedSAM's network; after the noise its variances are those of no data."""
    model = noisy(untrained(), by=0.05).eval()
    set_prompt_size(model, LITE, LITE // 4)
    return model


def vit() -> SegmentAnything:
    return sam()


def cache(model: SegmentAnything, samples: int = 4, **settings: Any) -> PrefixCache:
    return PrefixCache(model, samples, chain=encoder_chain(model), **settings)


@pytest.mark.parametrize(
    ("make", "at", "first", "blocks"),
    [
        (vit, "vision_encoder.layers.*.attn.qkv", 0, 3),
        (vit, "vision_encoder.layers.1.attn.{qkv,proj}", 1, 3),
        (vit, "vision_encoder.neck.conv1", 2, 3),
        (vit, "mask_decoder.transformer.layers.0.mlp.lin1", 3, 3),
        (lite, "vision_encoder.stages.*.blocks.*.attn.qkv", 3, 16),
        (lite, "vision_encoder.stages.2.downsample.conv1.conv", 5, 16),
        (lite, "vision_encoder.stages.3.blocks.1.attn.proj", 14, 16),
        (lite, "vision_encoder.neck.conv1", 15, 16),
        (lite, "mask_decoder.transformer.layers.0.mlp.lin1", 16, 16),
    ],
)
def test_embeddings_and_gradients_are_the_encoder_s_and_the_prefix_runs_once(
    make: Any, at: str, first: int, blocks: int
) -> None:
    model = make()
    seen = images(size=model.img_size)
    adapters = attach(model, LoRA(rank=2, init="kaiming"), at=at)
    for name, parameter in adapters.trained().items():
        if name.endswith("B"):
            nn.init.normal_(parameter, std=0.1)
    kept = cache(model)
    assert (kept.first, len(kept.chain.blocks)) == (first, blocks)
    plain = model.encode(seen)
    embedded = calls_of(model.vision_encoder.patch_embed)
    for _ in range(2):
        found = kept(seen, [3, 1])
        assert torch.allclose(found, plain, rtol=1e-4, atol=1e-5)
    assert embedded == [2]
    if first == blocks:
        assert not found.requires_grad
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(plain.square().sum(), trained)
    gradients = torch.autograd.grad(found.square().sum(), trained)
    for gradient, right in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_running_statistics_stay_as_they_are_even_when_training_mode_is_asked_for() -> None:
    model = lite()
    attach(model, HeadOnly())
    seen = images(size=LITE)
    wanted = model.encode(seen)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    mean = norm.running_mean.clone()  # type: ignore[union-attr]
    kept = cache(model.train())
    kept.fill(seen, [0, 1])
    assert norm.training
    assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
    assert torch.allclose(kept(seen, [0, 1]), wanted, rtol=1e-4, atol=1e-5)


def test_another_table_of_positions_throws_the_states_away() -> None:
    model = vit()
    seen = images()
    kept = cache(model)
    before = kept(seen, [0, 1])
    with torch.no_grad():
        model.get_parameter("vision_encoder.pos_embed").add_(torch.randn(8))
    assert torch.allclose(kept(seen, [0, 1]), model.encode(seen), atol=1e-5)
    assert not torch.allclose(before, model.encode(seen), atol=1e-3)


# What a data module's pictures keep


def data(**settings: Any) -> GeneratedVessels:
    made = GeneratedVessels(3, 2, 0, 64, 64, vessels=SPARSE, **settings)
    made.setup()
    made.view = View.sam(64)
    return made


def batches(made: GeneratedVessels, part: str) -> list[Batch]:
    return list(DataLoader(made.pictures(part), 2))


def test_training_and_validation_pictures_are_kept_apart(tmp_path: Path) -> None:
    model, made = vit(), data()
    kept = KeptPrefix(model, made, folder=tmp_path)
    for _ in range(2):
        for part in ("train", "val"):
            for batch in batches(made, part):
                assert torch.allclose(kept(batch, part), model.encode(batch.image), atol=1e-5)
    assert len(kept.cache) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"augmentation": "flip"},
            "augmentation='flip' is not allowed: .* so augmentation: none, or",
        ),
        ({"crop": 16}, "cache_prefix with crop=16 is not allowed: .* so crop: null, or cache_pref"),
    ],
)
def test_pictures_that_vary_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError, match=said):
        KeptPrefix(vit(), data(**settings))


def test_data_without_numbers_are_refused() -> None:
    with pytest.raises(AdaptError, match="needs a SegmentationData, which numbers its pictures, n"):
        KeptPrefix(vit(), [torch.zeros(1)])  # type: ignore[arg-type]


# In training


def fitted(
    folder: Path, data: GeneratedVessels | None = None, **settings: Any
) -> tuple[list[int], Segmentation]:
    """The sizes of the batches that were embedded, and the trained task."""
    task = task_of(LoRA(rank=2), **{"at": LAST, "lr": 0.01, "seed": 0} | settings)
    embedded = calls_of(task.get_submodule("backbone.vision_encoder.patch_embed"))
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0, default_root_dir=folder)
    trainer.fit(task, datamodule=data or vessels())
    return embedded, task


LAST = "vision_encoder.layers.1.attn.qkv"


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ("memory", {}),
        ("disk", {}),
        ("memory", {"at": "mask_decoder.transformer.layers.0.mlp.lin1", "parts": ["upscaling"]}),
    ],
)
def test_a_task_that_keeps_the_prefix_trains_the_same(
    where: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    always, plain = fitted(tmp_path, **settings)
    once, kept = fitted(tmp_path, cache_prefix=where, **settings)
    # Four pictures for training and two for validation, in two epochs, or once.
    assert (always, once) == ([2, 2, 2] * 2, [2, 2, 2])
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(kept.state_dict()[name], tensor, atol=1e-4), name


@pytest.mark.parametrize(
    ("data_settings", "settings", "said"),
    [
        (
            {"augmentation": "turns"},
            {},
            "cache_prefix with augmentation='turns' is not allowed: a p",
        ),
        ({}, {"cache_prefix": "ram"}, "cache_prefix='ram' is not allowed: none, memory, disk"),
        ({}, {"parts": ["positions"]}, "cache_prefix with the part 'positions' is not allowed"),
    ],
)
def test_a_task_that_cannot_keep_it_says_so(
    data_settings: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = vessels(**data_settings)
    with pytest.raises(AdaptError, match=said):
        fitted(tmp_path, given, **{"cache_prefix": "memory"} | settings)


# What cannot be kept


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_an_encoder_whose_forward_is_not_known_is_refused() -> None:
    model = vit()
    model.vision_encoder = Other()
    with pytest.raises(AdaptError, match="cannot be cached for a SAM with Other: for SamVisionEnc"):
        require_keepable(model, DECODER)


def test_dropout_in_the_prefix_is_refused() -> None:
    model = vit()
    model.vision_encoder.layers[0].attn.dropout = 0.1  # type: ignore[index, union-attr]
    attach(model, LoRA(rank=2), at="vision_encoder.layers.1.attn.qkv")
    with pytest.raises(AdaptError, match=r"a prefix with SamVision\w*Attention above 0 cannot"):
        require_keepable(model, DECODER)


def test_an_adapted_table_of_positions_is_refused() -> None:
    model = vit()
    attach(model, FullFineTuning(), at="vision_encoder.**")
    with pytest.raises(AdaptError, match="nothing before it can be cached"):
        require_keepable(model, DECODER)
