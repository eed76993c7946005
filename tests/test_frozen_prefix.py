"""`cache_prefix`: the same training, with the frozen blocks before the first adapter run once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyadapt.core import AdaptError, HeadOnly, LoRA, MoSA, Recipe, cli
from polyadapt.core.images.data import ArrayData
from polyadapt.tests.command_cases import write
from polyadapt.tests.test_prefix_cache import calls_of
from polyadapt.tests.test_vision_task import SPEC, KeepFirst, save_arrays
from polyadapt.tests.training_cases import trainer_in
from polyadapt.tests.vision_cases import configuration, save_labelled
from polyadapt.vision.task import ImageClassification

pytestmark = pytest.mark.slow

LAST = "blocks.1.attn.qkv"
STATE = 5 * 24 * 4  # bytes: 4 patches and the class token, 24 numbers each, in single precision


@pytest.fixture(autouse=True)
def _in_a_folder_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_arrays(Path("a.npz"))  # 24 images: 18 for training, 6 for validation


def images(**settings: Any) -> ArrayData:
    return ArrayData("a.npz", **{"val_share": 0.25, "batch_size": 4, **settings})


def task_of(recipe: Recipe, at: str | None, **settings: Any) -> ImageClassification:
    return ImageClassification(SPEC, recipe, at, lr=1e-2, seed=0, **settings)


def mix(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """What rounding may do, many times larger: an image's state depends on its batch."""
    return output + 1e-2 * output.mean(0)


class Ran:
    """A finished run, and the sizes of the batches that went through the patch embedding."""

    def __init__(
        self,
        folder: str,
        *callbacks: Callback,
        recipe: Recipe | None = None,
        at: str | None = LAST,
        epochs: int = 2,
        start: str | None = None,
        mixing: bool = False,
        **settings: Any,
    ) -> None:
        torch.manual_seed(1)
        self.task = task_of(recipe or LoRA(rank=2, dropout=0.1), at, **settings)
        if mixing:
            self.task.backbone.patch_embed.register_forward_hook(mix)  # type: ignore[union-attr]
        self.embedded = calls_of(self.task.backbone.patch_embed)  # type: ignore[arg-type]
        self.data = images()
        self.folder = Path(folder)
        trainer = trainer_in(self.folder, *callbacks, max_epochs=epochs)
        trainer.fit(self.task, datamodule=self.data, ckpt_path=start)

    @property
    def state(self) -> dict[str, Tensor]:
        return self.task.state_dict()

    @property
    def table(self) -> str:
        return (self.folder / "metrics.csv").read_text()


def assert_near(found: Ran, wanted: Ran, bound: float = 1e-5) -> None:
    assert found.state.keys() == wanted.state.keys()
    for name, tensor in wanted.state.items():
        assert torch.allclose(found.state[name], tensor, rtol=0, atol=bound), name


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_each_image_passes_the_prefix_once_and_the_adapters_are_the_same(where: str) -> None:
    plain = Ran("plain")
    kept = Ran("kept", cache_prefix=where)
    assert kept.embedded == [4] * 6
    assert sum(plain.embedded) == 2 * 24
    assert_near(kept, plain)


@pytest.mark.parametrize(
    ("recipe", "at"), [(HeadOnly(), None), (MoSA(rank=4), None), (LoRA(rank=2), "**.qkv")]
)
def test_the_head_alone_and_methods_of_every_block_train_as_without_it(
    recipe: Recipe, at: str | None
) -> None:
    plain = Ran("plain", recipe=recipe, at=at)
    kept = Ran("kept", recipe=recipe, at=at, cache_prefix="memory")
    assert kept.embedded == [4] * 6
    assert_near(kept, plain)


def test_recomputation_works_on_the_blocks_behind_the_prefix() -> None:
    plain = Ran("plain")
    assert_near(Ran("kept", cache_prefix="memory", recompute="cheap"), plain)


def test_what_does_not_fit_is_computed_in_every_epoch() -> None:
    kept = Ran("kept", cache_prefix="memory", cache_bytes=10 * STATE + 1)
    # Filled with two batches and a half, which ends it; 8 and 6 images are left in each epoch.
    assert kept.embedded[:3] == [4, 4, 4]
    assert sum(kept.embedded) == 12 + 2 * (8 + 6)
    assert_near(kept, Ran("plain"))


@pytest.mark.parametrize("room", [2 << 30, 10 * STATE])
def test_a_resumed_run_ends_in_the_same_bits_whatever_batches_do_to_a_state(room: int) -> None:
    settings: dict[str, Any] = {"epochs": 3, "cache_prefix": "memory", "cache_bytes": room}
    settings["mixing"] = True
    whole = Ran("whole", KeepFirst(), **settings)
    resumed = Ran("resumed", start="first.ckpt", **settings)
    assert all(torch.equal(resumed.state[name], whole.state[name]) for name in whole.state)
    assert resumed.table == whole.table


class Maps(Callback):
    """Keeps which files are mapped into memory while the run runs."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.maps = Path("/proc/self/maps").read_text()


def test_on_disk_the_states_lie_in_the_run_s_folder_and_are_gone_afterwards() -> None:
    maps = Maps()
    kept = Ran("kept", maps, cache_prefix="disk")
    where = str(kept.folder.resolve() / "prefix-")
    assert where in maps.maps
    assert where not in Path("/proc/self/maps").read_text()
    assert not list(kept.folder.glob("prefix-*"))


def test_after_training_the_data_bring_no_numbers() -> None:
    kept = Ran("kept", cache_prefix="memory")
    assert len(next(iter(kept.data.train_dataloader()))) == 2
    trainer = trainer_in(Path("again"))
    (found,) = trainer.validate(kept.task, datamodule=kept.data, verbose=False)
    assert found["val_loss"] == pytest.approx(float(kept.table.split(",")[-4]), abs=1e-5)
    (found,) = trainer.test(kept.task, datamodule=kept.data, verbose=False)
    assert set(found) >= {"test_loss", "test_top1"}


def test_a_trial_of_a_few_batches_does_not_compute_all_images() -> None:
    task = task_of(LoRA(rank=2), LAST, cache_prefix="memory")
    embedded = calls_of(task.backbone.patch_embed)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, enable_model_summary=False, **quiet)
    trainer.fit(task, datamodule=images())
    assert embedded == [4, 4]


# The command


@pytest.fixture
def fit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def command(*words: str, **changes: Any) -> tuple[int, str]:
        save_labelled()
        write("c.yaml", configuration(**{"model__cache_prefix": "memory"} | changes))
        code = cli.main(["vision", "fit", "--config", "c.yaml", *words])
        return code, capsys.readouterr().err

    return command


def test_the_head_alone_is_trained_by_the_command(fit: Callable[..., tuple[int, str]]) -> None:
    code, said = fit("--model.cache_prefix=disk", model__adapter="HeadOnly", model__at=None)
    assert (code, said) == (0, "")
    assert Path("runs/c/adapter.safetensors").is_file()
    assert not list(Path("runs/c").glob("prefix-*"))
    assert "cache_prefix: disk" in Path("runs/c/config.yaml").read_text()
    file = "--set=runs/c/adapter.safetensors"
    assert cli.main(["vision", "test", "--config", "runs/c/config.yaml", file]) == 0
    checkpoint = "--ckpt_path=runs/c/last.ckpt"
    assert cli.main(["vision", "validate", "--config", "runs/c/config.yaml", checkpoint]) == 0


SWIN = {"name": "swin_tiny_patch4_window7_224", "pretrained": False}
DROPPED = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 2, "pos_drop_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__init_args__augmentation": "flip"}, "cache_prefix with augmentation='flip' is not"),
        ({"model__backbone__init_args__options": DROPPED}, "a prefix with Dropout above 0 cannot"),
        ({"model__backbone__init_args": SWIN, "model__at": None, "model__adapter": "HeadOnly"},
         "a prefix cannot be cached for SwinTransformer: only for timm's VisionTransformer"),
        ({"trainer__devices": 2, "trainer__strategy": "ddp"}, "cache_prefix on 2 processes is not"),
        ({"model__cache_prefix": "ram"}, "'ram' is not allowed: none, memory, disk"),
        ({"model__cache_bytes": 1000}, "a bound of 1000 bytes holds no state: one is 1920 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_in_one_line_before_training(
    fit: Callable[..., tuple[int, str]], changes: dict[str, Any], said: str
) -> None:
    code, line = fit(**changes)
    assert (code, line.count("\n")) == (2, 1)
    assert said in line
    assert not Path("runs/c/last.ckpt").exists()


def test_images_without_numbers_are_refused() -> None:
    pairs = TensorDataset(torch.zeros(4, 3, 16, 16), torch.arange(4) % 3)
    task = task_of(LoRA(rank=2), LAST, cache_prefix="memory", classes=["a", "b", "c"])
    with pytest.raises(AdaptError, match="cache_prefix needs an ImageData, which numbers its imag"):
        trainer_in(Path("run")).fit(task, DataLoader(pairs, 2), DataLoader(pairs, 2))


def test_an_adapted_embedding_is_refused_with_the_task() -> None:
    with pytest.raises(AdaptError, match=r"adapts 'patch_embed.proj': nothing before it can be"):
        task_of(LoRA(rank=2), "patch_embed.proj", cache_prefix="memory")
