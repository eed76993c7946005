"""300 calls from 2 threads with other sets active in each, and 4 processes that load one file.

Every call's output must be, bit for bit, what the same call gives alone. The processes load the
file while this one keeps writing it anew, and each compares what its backbone then returns.
Run: python benchmarks/threads_and_processes.py [--calls 300]
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from polyadapt.benchmarks.rounds import machine, one_thread
from polyadapt.core import Bottleneck, DoRA, LoRA, Recipe, activate, attach, load

BATCH, THREADS, PROCESSES, LOADS = 4, 2, 4, 25
SETS: dict[str, tuple[Recipe, str]] = {
    "lora": (LoRA(rank=8), "blocks.*.attn.qkv[q,v]"),
    "dora": (DoRA(rank=4), "blocks.*.mlp.{fc1,fc2}"),
    "bottleneck": (Bottleneck(rank=8), "blocks.*"),
}
Active = str | list[str] | None
ALONE: list[Active] = [None, "lora", "dora", "bottleneck", ["dora", "lora"]]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10
    ).eval()


def adapted() -> nn.Module:
    model = backbone()
    for n, (name, (recipe, at)) in enumerate(SETS.items()):
        made = attach(model, recipe, at, name)
        generator = Generator().manual_seed(n)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=Generator().manual_seed(9))


def call(model: nn.Module, plan: Active | Sequence[str | None], mixed: bool) -> Tensor:
    options = {"per_sample": plan} if mixed else {"names": plan}
    with torch.no_grad(), activate(model, **options):  # type: ignore[arg-type]
        output: Tensor = model(images())
    return output


def plans(count: int, seed: int) -> list[tuple[Active | list[str | None], bool]]:
    """Which sets act in each call: a third of the batches are mixed."""
    dice = random.Random(seed)
    names = [None, *SETS]
    return [
        ([dice.choice(names) for _ in range(BATCH)], True)
        if dice.random() < 1 / 3
        else (dice.choice(ALONE), False)
        for _ in range(count)
    ]


def right_calls(count: int) -> int:
    """How many of the calls of all threads gave what they give alone."""
    model = adapted()
    work = [plans(count // THREADS, seed) for seed in range(THREADS)]
    alone = [[call(model, *plan) for plan in own] for own in work]
    right = [0] * THREADS
    start = threading.Barrier(THREADS)

    def run(thread: int) -> None:
        start.wait()
        for plan, expected in zip(work[thread], alone[thread], strict=True):
            right[thread] += torch.equal(call(model, *plan), expected)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(right)


def loads(path: str, expected: str, results: multiprocessing.Queue[int]) -> None:
    """How many loads of the file, each into a fresh backbone, gave the expected output."""
    one_thread()
    results.put(sum(_told(Path(path)) == expected for _ in range(LOADS)))


def _told(path: Path) -> str:
    model = backbone()
    load(model, path)
    with torch.no_grad():
        return hashlib.sha256(model(images()).numpy().tobytes()).hexdigest()


def right_loads(folder: Path) -> int:
    """How many loads in all processes were right."""
    model, path = backbone(), folder / "set.safetensors"
    made = attach(model, *SETS["dora"], name="dora")
    made.save(path)
    expected = _told(path)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=loads, args=(str(path), expected, results)) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and results.qsize() < PROCESSES:
        made.save(path)
        time.sleep(0.001)
    right: int = sum(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    asked = parser.parse_args()
    one_thread()
    sys.setswitchinterval(1e-5)  # threads take turns as often as they can
    print(machine("timm"))
    begin = time.perf_counter()
    calls = right_calls(asked.calls)
    print(f"{calls} of {asked.calls} calls from {THREADS} threads are right", end="")
    print(f" ({time.perf_counter() - begin:.1f} s)")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = right_loads(Path(folder))
    print(f"{found} of {PROCESSES * LOADS} loads in {PROCESSES} processes are right", end="")
    print(f" ({time.perf_counter() - begin:.1f} s)")
    return 0 if (calls, found) == (asked.calls, PROCESSES * LOADS) else 1


if __name__ == "__main__":
    sys.exit(main())
