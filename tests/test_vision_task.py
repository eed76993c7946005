"""The classification task: its head, its losses, its measures, its file, its resumption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from polyadapt.core import HeadOnly, LoRA, MoSA, Recipe
from polyadapt.core.adapters.mosa import symmetric_kl
from polyadapt.core.errors import AdaptError, StoreError
from polyadapt.core.images.classifying import Prediction
from polyadapt.core.images.data import ArrayData
from polyadapt.core.images.preprocessing import Preprocessing
from polyadapt.core.store import read_file
from polyadapt.tests.training_cases import trainer_in
from polyadapt.vision.backbones import TimmBackbone
from polyadapt.vision.predict import Classifier
from polyadapt.vision.task import ImageClassification

pytestmark = pytest.mark.slow

SPEC = TimmBackbone(
    name="vit_tiny_patch16_224",
    pretrained=False,
    img_size=16,
    options={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
)
QKV = "blocks.*.attn.qkv"


def task_of(recipe: Recipe | None = None, **settings: Any) -> ImageClassification:
    at = None if recipe is not None else QKV
    settings = {"classes": ["cat", "dog", "eel"]} | settings
    return ImageClassification(SPEC, recipe or LoRA(rank=2), at, **settings)


def shift(task: ImageClassification) -> None:
    """Move every trained number away from its start, where most methods do nothing."""
    with torch.no_grad():
        for parameter in [*task.adapters.parameters(), *task.head.parameters()]:
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 16, 16), torch.arange(count) % 3


def save_arrays(path: Path, count: int = 24) -> None:
    labels = np.arange(count) % 3
    images = np.random.default_rng(0).integers(0, 80, (count, 16, 16, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 120  # the class is the channel that is bright
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        classes=np.array(["red", "green", "blue"]),
    )


# Head and losses


def test_logits_are_the_head_on_the_pooled_feature() -> None:
    task = task_of().eval()
    images, _ = batch()
    features = task.backbone(images)
    assert features.shape == (6, 24)
    assert torch.equal(task(images), features @ task.head.weight.T + task.head.bias)


def test_only_adapters_and_head_are_trained() -> None:
    task = task_of()
    task.training_loss(batch()).backward()
    trained = {name for name, p in task.named_parameters() if p.grad is not None}
    assert {"head.weight", "head.bias"} < trained
    assert all(name.startswith(("head.", "backbone.polyadapt_drawer.")) for name in trained)


def test_with_one_seed_every_method_starts_with_the_same_head() -> None:
    heads = []
    for recipe in (LoRA(rank=2), MoSA(rank=4), HeadOnly()):
        torch.manual_seed(5)
        at = QKV if isinstance(recipe, LoRA) else None
        heads.append(ImageClassification(SPEC, recipe, at, classes=["a", "b"]).head)
    assert all(torch.equal(head.weight, heads[0].weight) for head in heads)
    assert float(heads[0].weight.detach().abs().max()) <= 24**-0.5
    assert not heads[0].bias.any()


def test_the_loss_is_the_smoothed_cross_entropy() -> None:
    task = task_of(label_smoothing=0.1)
    shift(task)
    images, labels = batch()
    logits = task(images)
    target = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    by_hand = -(target * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(task.training_loss((images, labels)), by_hand, atol=1e-6)


def test_mosa_s_loss_pulls_two_forwards_together() -> None:
    task = task_of(MoSA(rank=4, experts=2, consistency=0.7)).train()
    shift(task)
    images, labels = batch()
    torch.manual_seed(3)
    loss = task.training_loss((images, labels))
    torch.manual_seed(3)
    first, second = task(images), task(images)
    assert not torch.equal(first, second)
    by_hand = F.cross_entropy(first, labels) + 0.7 * symmetric_kl(first, second)
    assert torch.equal(loss, by_hand)


def test_mosa_without_consistency_has_one_forward() -> None:
    task = task_of(MoSA(rank=4, experts=2, consistency=0.0)).train()
    calls = []
    task.backbone.register_forward_hook(lambda *_: calls.append(1))
    task.training_loss(batch())
    assert len(calls) == 1


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_label_smoothing_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(AdaptError, match="label_smoothing"):
        task_of(label_smoothing=value)


def test_a_head_of_one_class_is_refused() -> None:
    with pytest.raises(AdaptError, match="at least two classes"):
        task_of(classes=["cat"])


# Measures


def test_the_measures_are_those_of_a_hand_example() -> None:
    metrics = task_of().metrics["test"]
    sure = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    metrics.update(sure, torch.tensor([0, 1, 0, 2]))  # type: ignore[operator]
    found = metrics.compute()  # type: ignore[operator]
    assert float(found["test_top1"]) == 0.75
    # F1 of the classes: 2/3 (recall 1/2), 2/3 (precision 1/2), 1
    assert float(found["test_macro_f1"]) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # all four in one bin: confidence 0.8, accuracy 0.75
    assert float(found["test_calibration_error"]) == pytest.approx(0.05)


# Data and file


def test_classes_and_preprocessing_pass_between_data_and_task(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz")
    data = ArrayData(str(tmp_path / "a.npz"), val_share=0.25, batch_size=6)
    task = ImageClassification(SPEC, LoRA(rank=2), QKV, preprocessing="imagenet")
    trainer_in(tmp_path / "run").fit(task, datamodule=data)
    assert task.classes == ("red", "green", "blue")
    assert data.preprocessing == task.preprocessing
    assert task.preprocessing.mean == (0.485, 0.456, 0.406)
    extra = read_file(tmp_path / "run" / "adapter.safetensors").extra
    assert extra == {
        "task": "image classification",
        "backbone": SPEC.to_json(),
        "preprocessing": task.preprocessing.to_json(),
        "classes": ["red", "green", "blue"],
    }


def test_the_backbone_s_own_preprocessing_is_the_default() -> None:
    assert task_of().preprocessing == SPEC.preprocessing(SPEC.build())
    own = Preprocessing(size=(16, 16), mean=(0.1,) * 3, std=(0.9,) * 3)
    assert task_of(preprocessing=own).preprocessing == own


def test_a_head_for_other_classes_than_the_data_s_is_refused(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz")
    data = ArrayData(str(tmp_path / "a.npz"))
    with pytest.raises(AdaptError, match=r"the head knows .*cat.*, the data has .*red"):
        trainer_in(tmp_path / "run").fit(task_of(), datamodule=data)


@pytest.mark.parametrize("recipe", [LoRA(rank=2), MoSA(rank=4), HeadOnly()])
def test_a_file_is_the_same_classifier_again(tmp_path: Path, recipe: Recipe) -> None:
    at = QKV if isinstance(recipe, LoRA) else None
    task = ImageClassification(SPEC, recipe, at, classes=["cat", "dog", "eel"])
    shift(task)
    task.eval().save_adapter(tmp_path / "a.safetensors")
    images, _ = batch()
    again = ImageClassification.from_file(tmp_path / "a.safetensors").eval()
    assert again.classes == ("cat", "dog", "eel")
    assert torch.equal(again(images), task(images))
    classifier = Classifier(tmp_path / "a.safetensors")
    assert torch.equal(classifier.probabilities(images), task(images).softmax(-1))


def test_image_files_are_classified_in_order(tmp_path: Path) -> None:
    task = task_of()
    shift(task)
    task.eval().save_adapter(tmp_path / "a.safetensors")
    paths = [tmp_path / f"{name}.png" for name in "abcde"]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    found = list(Classifier(tmp_path / "a.safetensors").classify(paths, batch_size=2))
    with torch.inference_mode():
        images = torch.stack([task.preprocessing(Image.open(path)) for path in paths])
        probability, label = task(images).softmax(-1).max(-1)
    for i, prediction in enumerate(found):
        assert isinstance(prediction, Prediction)
        assert (prediction.path, prediction.label) == (paths[i], task.classes[int(label[i])])
        assert prediction.probability == pytest.approx(float(probability[i]), abs=1e-5)


def test_an_unreadable_image_stops_or_is_passed_over(tmp_path: Path) -> None:
    task = task_of()
    task.save_adapter(tmp_path / "a.safetensors")
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    paths[1].write_bytes(b"no image")
    classifier = Classifier(tmp_path / "a.safetensors")
    with pytest.raises(AdaptError, match=r"b\.png"):
        list(classifier.classify(paths))
    kinds = [type(result) for result in classifier.classify(paths, skip=True)]
    assert kinds == [Prediction, AdaptError, Prediction]


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    task = task_of()
    task.adapters.extra = {"task": "speech recognition"}
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match="no image classifier: task 'speech recognition'"):
        Classifier(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["backbone", "preprocessing", "classes"])
def test_a_classifier_s_file_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    task = task_of()
    del task.adapters.extra[key]
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match=key):
        Classifier(tmp_path / "a.safetensors")


def test_a_head_that_does_not_fit_the_class_names_is_refused(tmp_path: Path) -> None:
    task = task_of()
    task.adapters.extra["classes"] = ["cat", "dog"]
    task.save_adapter(tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match="2 class names, head \\[3\\]"):
        Classifier(tmp_path / "a.safetensors")


# Training


def test_a_small_problem_is_learnt(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz")
    data = ArrayData(str(tmp_path / "a.npz"), val_share=0.25, batch_size=6)
    torch.manual_seed(0)
    task = ImageClassification(SPEC, LoRA(rank=4), QKV, lr=1e-2)
    trainer = trainer_in(tmp_path / "run", max_epochs=15)
    trainer.fit(task, datamodule=data)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert found["test_top1"] > 0.9  # the class is a colour; chance is a third


class KeepFirst(Callback):
    """Copies the state at the end of the first epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(str(trainer.checkpoint_callback.best_model_path)).parent  # type: ignore[union-attr]
        if trainer.current_epoch == 1:
            shutil.copy(folder / "last.ckpt", folder.parent / "first.ckpt")


def test_a_resumed_run_sees_the_same_augmented_images_and_ends_in_the_same_bits(
    tmp_path: Path,
) -> None:
    save_arrays(tmp_path / "a.npz")

    def run(folder: str, start: Path | None, *callbacks: Callback) -> dict[str, Tensor]:
        torch.manual_seed(1)
        data = ArrayData(str(tmp_path / "a.npz"), batch_size=6, augmentation="random_resized_crop")
        task = ImageClassification(SPEC, MoSA(rank=4), lr=1e-2)
        trainer = trainer_in(tmp_path / folder, *callbacks, max_epochs=3)
        trainer.fit(task, datamodule=data, ckpt_path=start)
        return task.state_dict()

    whole = run("whole", None, KeepFirst())
    resumed = run("resumed", tmp_path / "first.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    tables = [(tmp_path / folder / "metrics.csv").read_text() for folder in ("whole", "resumed")]
    assert tables[0] == tables[1]
