"""Two processes that train one set by DistributedDataParallel, for test_replay_frameworks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from polyadapt.core import LoRA, attach, sets_of, switch
from polyadapt.tests.law_models import BATCH, Around, Block, Encoder, tokens
from polyadapt.tests.law_table import stir

STEPS = 2


class Checkpointed(Around):
    """An attention layer whose weights are read, and a block; both are recomputed in backward."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(Encoder().layer, Block()), d_out=16)

    def act(self, x: Tensor) -> Tensor:
        for layer in self.layer.children():
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def adapted() -> nn.Module:
    """The same model in every process: set b is trained, set a is idle."""
    torch.manual_seed(0)
    model = Checkpointed().train()
    at = ["layer.0.self_attn.in_proj_weight[q,v]", "layer.0.linear1", "layer.1.mlp.0"]
    for seed, name in enumerate("ab"):
        stir(attach(model, LoRA(rank=2), at=at, name=name), seed)
    switch(model, "b")
    return model


def steps(model: nn.Module, backbone: nn.Module, batch: Tensor) -> list[Tensor]:
    """The set's tensors after some steps on a batch."""
    trained = list(sets_of(backbone)["b"].parameters())
    optimiser = torch.optim.SGD(trained, lr=0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(batch).square().mean().backward()
        optimiser.step()
    return [p.detach() for p in trained]


def work(rank: int, folder: str) -> None:
    """One process: its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        backbone = adapted()
        half = tokens().chunk(2)[rank]
        assert len(half) == BATCH // 2, "both halves weigh the same"
        found = steps(DistributedDataParallel(backbone), backbone, half)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
