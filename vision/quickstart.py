"""`polyadapt vision quickstart`: a frozen tiny ViT, real digits, several methods side by side.

300 labelled digits, upright and inverted, three seeds, the same splits for all. Settings per method
are in `METHODS`; they were chosen on other seeds than the default ones. What wins is shown, also a
support vector machine on raw pixels.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..core.adapters.adaptertune import AdapterTune
from ..core.adapters.full_fine_tuning import FullFineTuning
from ..core.adapters.head_only import HeadOnly
from ..core.adapters.lora import LoRA
from ..core.adapters.mosa import MoSA
from ..core.cli import OneLineParser
from ..core.container import write_atomically
from ..core.errors import AdaptError
from ..core.order import epoch_loader
from ..core.recipe import Recipe
from ..core.threads import on_threads
from .backbones import TinyViT
from .digits import Digits, digits
from .fixed_features import LinearHead, logistic_regression, pixel_svm_accuracy
from .quickstart_report import picture, sets_in_use, table

VARIANTS = ("upright", "inverted")
CLASSES = [str(n) for n in range(10)]


@dataclass(frozen=True)
class Method:
    """One row of the comparison, with the settings that it is trained with."""

    name: str
    recipe: Recipe
    at: str | None = None
    lr: float = 5e-3
    steps: int = 200
    from_head: bool = True
    """Start from the converged head instead of a random one."""


METHODS = (
    Method("head, SGD", HeadOnly(), lr=1e-2, steps=200, from_head=False),
    Method("AdapterTune r8", AdapterTune(rank=8), lr=1e-2, from_head=False),
    Method("MoSA r8", MoSA(rank=8), lr=1e-2, steps=150),
    Method("LoRA r8", LoRA(rank=8, alpha=16), at="blocks.*.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2}"),
    Method("full fine-tuning", FullFineTuning(), lr=1e-3),
)
BATCH_SIZE = 32
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Result:
    """What one method reached on one split."""

    variant: str
    seed: int
    method: str
    accuracy: float
    trained: int
    stored: int
    seconds: float
    file: str = ""


def main(argv: Sequence[str] = ()) -> int:
    """Run the comparison; prints two tables and what to do next."""
    asked = _arguments(argv)
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    jobs = [(variant, seed, str(out)) for seed in asked.seeds for variant in VARIANTS]
    print(f"{len(jobs)} splits of scikit-learn's digits, 300 labels each, in two processes ...")
    results: list[Result] = []
    for found in _in_processes(jobs):
        results += found
        best = max(found, key=lambda result: result.accuracy)
        print(
            f"  {found[0].variant}, seed {found[0].seed}: best {best.method}, {best.accuracy:.1%}"
        )
    for variant in VARIANTS:
        print(f"\n{variant} digits, test accuracy in % (mean and each seed):")
        print(table([result for result in results if result.variant == variant]))
    _write_results(out / "results.csv", results)
    write_atomically(out / "quickstart.png", picture(results, digits(0)[1]))
    print("\n" + sets_in_use(results, asked.seeds[0]))
    print(_what_next(out, results, time.perf_counter() - started))
    return 0


def compare(variant: str, seed: int, out: str) -> list[Result]:
    """All methods on one split, on one thread; adapter files are written to `out`."""
    with on_threads(1):
        train, test = digits(seed, inverted=variant == "inverted")
        split = _Split(variant, seed, Path(out), train, test)
        return list(split.results())


@dataclass(frozen=True)
class _Split:
    variant: str
    seed: int
    out: Path
    train: Digits
    test: Digits

    def results(self) -> Iterator[Result]:
        started = time.perf_counter()
        accuracy = pixel_svm_accuracy(
            self.train.flat(), self.train.labels, self.test.flat(), self.test.labels
        )
        yield self._result("pixels, SVM", accuracy, 0, 0, started)
        started = time.perf_counter()
        head = logistic_regression(torch.from_numpy(self.train.flat()), self.train.labels)
        raw = head.accuracy(torch.from_numpy(self.test.flat()), self.test.labels)
        yield self._result("pixels, logistic regression", raw, 650, 650, started)
        started = time.perf_counter()
        head, accuracy = self._converged_head()
        yield self._result("head, converged", accuracy, 970, 970, started)
        for method in METHODS:
            yield self._trained(method, head)

    def _converged_head(self) -> tuple[LinearHead, float]:
        spec = TinyViT()
        backbone = spec.build().eval()
        wants = spec.preprocessing(backbone)
        train, test = (_outputs(backbone, part.prepared(wants)) for part in (self.train, self.test))
        head = logistic_regression(train, self.train.labels)
        return head, head.accuracy(test, self.test.labels)

    def _trained(self, method: Method, head: LinearHead) -> Result:
        from .task import ImageClassification

        started = time.perf_counter()
        torch.manual_seed(self.seed)
        task = ImageClassification(
            TinyViT(),
            method.recipe,
            method.at,
            classes=CLASSES,
            lr=method.lr,
            weight_decay=WEIGHT_DECAY,
        )
        if method.from_head:
            task.head.load_state_dict({"weight": head.weight, "bias": head.bias})
        images = self.train.prepared(task.preprocessing)
        _fit(task, images, self.train.labels, method.steps, self.seed)
        logits = _outputs(task.eval(), self.test.prepared(task.preprocessing))
        accuracy = float((logits.argmax(1) == self.test.labels).double().mean())
        name = f"{self.variant}-{method.name.replace(' ', '-').replace(',', '')}-{self.seed}"
        file = self.out / f"{name}.safetensors"
        task.save_adapter(file)
        own = sum(p.numel() for p in task.head.parameters())
        counts = (task.adapters.trainable_count() + own, task.adapters.stored_count() + own)
        return self._result(method.name, accuracy, *counts, started, str(file))

    def _result(
        self,
        method: str,
        accuracy: float,
        trained: int,
        stored: int,
        started: float,
        file: str = "",
    ) -> Result:
        seconds = time.perf_counter() - started
        return Result(self.variant, self.seed, method, accuracy, trained, stored, seconds, file)


@torch.inference_mode()
def _outputs(model: torch.nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(256)])


def _fit(task: torch.nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    from lightning.pytorch import Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its greetings
    loader = epoch_loader(TensorDataset(images, labels), BATCH_SIZE, seed, drop_last=True)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and intervals
        trainer.fit(task, loader)  # type: ignore[arg-type]


def _in_processes(jobs: Sequence[tuple[str, int, str]]) -> Iterator[list[Result]]:
    """Two processes of one thread each use two cores better than two threads do."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield from pool.map(compare, *zip(*jobs, strict=True))


def _write_results(path: Path, results: Sequence[Result]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(results[0])))
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    write_atomically(path, text.getvalue().encode())


def _what_next(out: Path, results: Sequence[Result], seconds: float) -> str:
    file = next(r.file for r in results if r.method.startswith("LoRA"))
    return (
        f"\n{seconds:.0f} s. Written: {out}/quickstart.png, {out}/results.csv and"
        f" {sum(bool(r.file) for r in results)} adapter files {out}/*.safetensors\n"
        f"Next: polyadapt adapters inspect {file}"
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="polyadapt vision quickstart", description=__doc__)
    parser.add_argument("--out", default="runs/quickstart", help="folder for what it writes")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    asked = parser.parse_args(argv)
    try:
        asked.seeds = [int(seed) for seed in asked.seeds.split(",")]
    except ValueError:
        raise AdaptError(f"--seeds {asked.seeds}: whole numbers with commas, as in 0,1,2") from None
    return asked
