"""The few-shot task: its logits, its steps and rates, its towers, its file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from polyadapt.core import BitFit, LoRA, Recipe, activate
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.images.data import ArrayData
from polyadapt.core.store import read_file
from polyadapt.tests.training_cases import trainer_in
from polyadapt.tests.vlm_cases import COLOURS, TEMPLATE, TinyCLIP, save_colours
from polyadapt.vlm.adapters import CLIP_LORA
from polyadapt.vlm.predict import Classifier
from polyadapt.vlm.prompts import class_tokens
from polyadapt.vlm.task import ImageTextClassification, cosine

pytestmark = pytest.mark.slow  # whole runs


def task_of(recipe: Recipe = CLIP_LORA, **settings: Any) -> ImageTextClassification:
    given: dict[str, Any] = {"classes": list(COLOURS), "template": TEMPLATE, "seed": 0} | settings
    return ImageTextClassification(TinyCLIP(), recipe, **given)


def shift(task: ImageTextClassification) -> None:
    """Move every trained number away from its start, where LoRA does nothing."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in task.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=0.3)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 32, 32, generator=drawn), torch.arange(count) % 3


class Rates(Callback):
    """Notes the learning rate of every optimiser step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def fitted(
    folder: Path, task: ImageTextClassification, *callbacks: Callback, **settings: Any
) -> Trainer:
    save_colours(str(folder / "a.npz"))
    data = ArrayData(str(folder / "a.npz"), val_share=0.25, batch_size=4, shots=2)
    trainer = trainer_in(folder / "run", *callbacks, **{"max_epochs": 1} | settings)
    trainer.fit(task, datamodule=data)
    return trainer


# Logits


def test_a_fresh_set_answers_as_the_frozen_model_does_bit_for_bit() -> None:
    task = task_of().eval()
    images, _ = batch()
    with torch.no_grad(), activate(task.backbone, None):
        tokens = class_tokens(task.pair.tokenize, COLOURS, TEMPLATE)
        texts = task.pair.text_features(task.pair.shorter(tokens))
        frozen = 100 * task.pair.image_features(images) @ texts.T
        whole = task.pair.text_features(tokens)
    with torch.no_grad():
        assert torch.equal(task(images), frozen)
    assert torch.allclose(texts, whole, rtol=0, atol=1e-6), "with the padding, up to rounding"
    assert frozen.std() > 1


def test_the_loss_is_the_cross_entropy_of_cosines_times_a_hundred() -> None:
    task = task_of(LoRA(rank=2))
    shift(task)
    images, labels = batch()
    image, text = task.pair.image_features(images), task.texts()
    cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)
    by_hand = F.cross_entropy(100 * cosines, labels)
    assert torch.allclose(task.training_loss((images, labels)), by_hand, rtol=1e-4)


def test_the_scale_can_be_the_checkpoint_s() -> None:
    task = task_of(scale=None)
    assert task.scale == pytest.approx(1 / 0.07, rel=1e-3)
    images, _ = batch()
    with torch.no_grad():
        task.eval()
        assert torch.allclose(task(images) * 100 / task.scale, task_of().eval()(images), atol=1e-4)


def test_logits_are_in_float32_under_autocast() -> None:
    task = task_of().eval()
    images, _ = batch(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        texts, image = task.texts(), task.pair.image_features(images)
        logits = task(images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, 100 * image @ texts.T, atol=1e-4)  # in bfloat16: off by 0.1


# What is trained


def test_in_the_first_step_every_up_projection_of_both_towers_gets_a_gradient_and_no_other() -> (
    None
):
    task = task_of()
    task.training_loss(batch()).backward()
    assert len(task.adapters.adapters) == 3 * (2 + 2)  # q, k, v of two blocks a tower
    for name, parameter in task.adapters.trained().items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) is name.endswith("/B")
    trained = [name for name, p in task.named_parameters() if p.grad is not None]
    assert all("polyadapt_drawer" in name for name in trained)


def test_dropout_is_seen_once_the_up_projections_have_left_zero() -> None:
    task, (images, _) = task_of().train(), batch()
    with torch.no_grad():
        assert torch.equal(task(images), task(images))
        shift(task)
    with torch.enable_grad():
        assert not torch.equal(task(images), task(images))


def test_of_the_vision_tower_alone_the_class_features_are_constants() -> None:
    task = task_of(encoder="vision")
    assert all(site.path.startswith("visual.") for site in task.adapters.sites)
    assert not task.texts().requires_grad
    first = task.texts()
    shift(task)
    assert task.texts() is first
    task.training_loss(batch()).backward()
    assert all(p.grad is not None for p in task.adapters.parameters())


def test_parts_and_layers_choose_the_sites_and_at_goes_before_them() -> None:
    task = task_of(LoRA(rank=2), encoder="text", parts="qo", layers="half-up")
    names = [site.path for site in task.adapters.sites]
    assert names == [f"transformer.resblocks.1.attn.{part}" for part in ("q_proj", "out_proj")]
    named = task_of(LoRA(rank=2), at="visual.transformer.resblocks.0.mlp.c_fc")
    assert len(named.adapters.sites) == 1
    assert len(task_of(BitFit()).adapters.sites) > 12  # a method with sites of its own takes them


@pytest.mark.parametrize(
    "settings",
    [{"text_chunk": 2}, {"recompute": "cheap"}, {"recompute": "cheap", "text_chunk": 2}],
    ids=str,
)
def test_what_saves_memory_gives_the_same_gradients(settings: dict[str, Any]) -> None:
    found = []
    for how in ({}, settings):
        task = task_of(LoRA(rank=2), **how)
        shift(task)
        task.training_loss(batch()).backward()
        found.append([p.grad for p in task.adapters.parameters()])
    for plain, ours in zip(*found, strict=True):
        assert plain is not None
        assert ours is not None
        assert plain.abs().max() > 1e-3
        assert torch.allclose(plain, ours, atol=1e-5, rtol=1e-4)


# Steps and rates


def test_four_shots_are_two_thousand_steps_and_end_at_a_millionth() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=10, enable_model_summary=False)
    task = task_of()
    task._limit_steps(trainer, shots=4)
    assert (trainer.max_steps, trainer.max_epochs) == (2000, -1)
    rates = [task.lr * cosine(step, 2000, task.last_lr / task.lr) for step in (0, 1000, 1999)]
    assert rates == pytest.approx([2e-4, (2e-4 + 1e-6) / 2, 1e-6], abs=2e-10)


@pytest.mark.slow
def test_a_run_takes_its_steps_per_shot_and_its_rate_falls_as_a_cosine(tmp_path: Path) -> None:
    rates, task = Rates(), task_of(steps_per_shot=3)
    trainer = fitted(tmp_path, task, rates, max_epochs=1)
    assert trainer.global_step == 6
    wanted = torch.optim.lr_scheduler.CosineAnnealingLR
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    schedule, expected = wanted(plain, T_max=6, eta_min=1e-6), []
    for _ in range(6):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        schedule.step()
    assert rates.seen == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "limits", "steps"),
    [
        ({"steps_per_shot": 50}, {"max_epochs": -1, "max_steps": 3}, 3),  # asked for by the trainer
        ({"steps_per_shot": None}, {"max_epochs": 2}, 4),  # 6 images, 4 a batch
    ],
)
def test_the_trainer_s_own_limits_hold_where_they_are_asked_for(
    tmp_path: Path, settings: dict[str, Any], limits: dict[str, Any], steps: int
) -> None:
    assert fitted(tmp_path, task_of(**settings), **limits).global_step == steps


class KeepFirst(Callback):
    """Copies the state at the end of the first epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = Path(str(trainer.checkpoint_callback.best_model_path))  # type: ignore[union-attr]
        if trainer.current_epoch == 1:
            shutil.copy(last, last.parent.parent / "first.ckpt")


@pytest.mark.slow
def test_a_resumed_run_ends_after_its_steps_and_in_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = (task_of(steps_per_shot=3) for _ in range(2))
    torch.manual_seed(5)
    fitted(tmp_path, whole, KeepFirst())
    data = ArrayData(str(tmp_path / "a.npz"), val_share=0.25, batch_size=4, shots=2)
    rates = Rates()
    trainer = trainer_in(tmp_path / "again", rates, max_epochs=1)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "first.ckpt")
    assert trainer.global_step == 6
    assert len(rates.seen) == 4  # two steps were taken before
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_small_problem_is_learnt(tmp_path: Path) -> None:
    task = task_of(LoRA(rank=4), lr=2e-2, steps_per_shot=20)
    trainer = fitted(tmp_path, task)
    (found,) = trainer.test(task, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert found["test_top1"] > 0.9  # the class is a colour; chance is a third


# The file


def saved(folder: Path, **settings: Any) -> tuple[Path, ImageTextClassification]:
    task = task_of(LoRA(rank=2), **settings)
    shift(task)
    task.save_adapter(folder / "a.safetensors")
    return folder / "a.safetensors", task.eval()


def test_a_file_holds_all_that_the_classifier_is_made_of(tmp_path: Path) -> None:
    path, task = saved(tmp_path, scale=50.0)
    assert read_file(path).head == {}
    images, _ = batch()
    with torch.no_grad():
        logits = task(images)
        again = ImageTextClassification.from_file(path).eval()
        assert (again.classes, again.template, again.scale) == (COLOURS, TEMPLATE, 50.0)
        assert torch.allclose(again(images), logits, atol=1e-5)
    found = Classifier.from_file(path).probabilities(images)
    assert torch.allclose(found, logits.softmax(-1), atol=1e-5)


def test_an_adapted_model_answers_other_classes_too(tmp_path: Path) -> None:
    path, task = saved(tmp_path)
    images, _ = batch()
    found = Classifier.from_file(path, classes=["cat", "dog"], templates=["the {}", "a {}"])
    with torch.no_grad():
        texts = [
            task.pair.text_features(task.pair.tokenize([t.format("cat"), t.format("dog")]))
            for t in ("the {}", "a {}")
        ]
        mean = F.normalize(sum(texts), dim=-1)  # type: ignore[arg-type]
        by_hand = (100 * task.pair.image_features(images) @ mean.T).softmax(-1)
    assert torch.allclose(found.probabilities(images), by_hand, atol=1e-5)


def test_a_classifier_answers_with_the_sets_that_are_active(tmp_path: Path) -> None:
    path, task = saved(tmp_path)
    images, _ = batch()
    found = Classifier.from_file(path)
    adapted = found.probabilities(images)
    with activate(found.pair.model, None):
        frozen = found.probabilities(images)
    with torch.no_grad(), activate(task.backbone, None):
        assert torch.allclose(frozen, task(images).softmax(-1), atol=1e-5)
    assert not torch.allclose(adapted, frozen, atol=1e-2)
    assert torch.equal(found.probabilities(images), adapted)


@pytest.mark.parametrize("key", ["backbone", "preprocessing", "classes", "template", "scale"])
def test_a_file_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    task = task_of()
    del task.adapters.extra[key]
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match=key):
        Classifier.from_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("task", "speech", "no image-text classifier: task 'speech'"),
        ("classes", ["cat"], "at least two classes"),
        ("template", "a photo", "'a photo' has 0 slots"),
        ("scale", -1.0, "scale=-1.0"),
    ],
)
def test_a_file_that_says_nonsense_is_refused(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    task = task_of()
    task.adapters.extra[key] = value
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match=said):
        ImageTextClassification.from_file(tmp_path / "a.safetensors")


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": 0.0}, "scale=0.0 is not allowed"),
        ({"last_lr": 1.0}, "last_lr=1.0 is not allowed: from 0 to lr=0.0002"),
        ({"steps_per_shot": 0}, "steps_per_shot=0 is not allowed"),
        ({"text_chunk": 0}, "chunk=0 is not allowed"),
        ({"template": "a photo"}, "has 0 slots"),
        ({"classes": ["red"]}, "at least two classes"),
        ({"classes": ["red", "Red"]}, "'red' and 'Red' are the same to the tokenizer"),
        ({"classes": ["red", "a" + " long" * 9]}, "longer than the 8 tokens"),
        ({"encoder": "ears"}, "'ears'"),
        ({"parts": "qx"}, "'x'"),
    ],
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaptError, match=said) as refused:
        task_of(**settings)
    assert "\n" not in str(refused.value)


def test_without_classes_there_are_no_logits() -> None:
    with pytest.raises(AdaptError, match="the classes are not known yet"):
        task_of(classes=None)(batch()[0])


def test_data_of_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match=r"the prompts are of .*'cat'.*, the data has .*'red'"):
        fitted(tmp_path, task_of(classes=["cat", "dog", "eel"]))


def test_a_run_with_another_template_does_not_go_on(tmp_path: Path) -> None:
    fitted(tmp_path, task_of(steps_per_shot=2))
    other = task_of(steps_per_shot=4, template="the {}.")
    data = ArrayData(str(tmp_path / "a.npz"), val_share=0.25, batch_size=4, shots=2)
    with pytest.raises(AdaptError, match=r"with template=a \{\}\., not with the \{\}\."):
        trainer_in(tmp_path / "b", max_epochs=1).fit(
            other, datamodule=data, ckpt_path=tmp_path / "run" / "last.ckpt"
        )
