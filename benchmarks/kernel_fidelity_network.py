"""A ViT with DoRA on every linear layer, computed in fp64 or as bf16 would compute it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

BF16 = torch.bfloat16
RANK = 8
UPDATE = 0.01  # ||s B A|| over ||W0||
# y, bias and l in bf16, m and n in fp64, s -> the change, or y and the change
Compose = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Formula:
    """How a library makes the change (`delta`), and the output (`whole`, else y + delta)."""

    name: str
    delta: Compose
    whole: Compose | None = None
    wide_branch: bool = False  # l in fp32

    def output(
        self, y: Tensor, bias: Tensor, lora: Tensor, m: Tensor, n: Tensor, s: float
    ) -> Tensor:
        """y' in bf16."""
        given = (y, bias, lora, m, n, s)
        return (y + self.delta(*given) if self.whole is None else self.whole(*given)).to(BF16)


class Arithmetic(enum.Enum):
    """Of everything but the change that DoRA makes."""

    BF16 = "bf16"
    EXACT = "fp64"


class Rounding(TorchDispatchMode):
    """fp32 tensors that hold bf16 numbers: each operation computes in fp32 and rounds once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.on or func.is_view:
            return found
        return tree_map_only(Tensor, lambda t: rounded(t) if t.dtype == torch.float32 else t, found)

    @contextmanager
    def off(self) -> Iterator[None]:
        """What runs inside says itself when it rounds."""
        self.on, before = False, self.on
        try:
            yield
        finally:
            self.on = before


def rounded(t: Tensor) -> Tensor:
    """The nearest bf16 numbers, in t's dtype."""
    return t.to(BF16).to(t.dtype)


class Layer(nn.Module):
    """A linear layer of bf16 numbers with DoRA; `formula` None is DoRA in fp64."""

    def __init__(self, linear: nn.Linear, width: float, scale: float, made: torch.Generator):
        super().__init__()
        self.linear, self.scale = linear, scale
        w0 = linear.weight.detach().double()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made, dtype=torch.float64)

        a, b = normal(RANK, w0.shape[1]), normal(w0.shape[0], RANK)
        b *= UPDATE * w0.norm() / (scale * b @ a).norm()
        self.a, self.b = rounded(a), rounded(b)  # bf16 numbers: no library loses any
        self.n = torch.linalg.vector_norm(w0 + scale * self.b @ self.a, dim=1)
        self.m = (1 + width * normal(len(w0))) * self.n
        self.adapted = True
        self.formula: Formula | None = None
        self.rounding: Rounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if not self.adapted:
            return y
        bias = self.linear.bias.detach()
        if self.formula is None:
            lora = F.linear(F.linear(x, self.a), self.b)
            gain = self.m / self.n
            exact: Tensor = y + (gain - 1) * (y - bias) + gain * self.scale * lora
            return exact
        lora = self._branch(x, self.formula)
        with nullcontext() if self.rounding is None else self.rounding.off():
            given = (y.to(BF16), bias.to(BF16), lora, self.m, self.n, self.scale)
            if self.rounding is not None:
                return self.formula.output(*given).to(x.dtype)
            return y + self.formula.delta(*given).to(x.dtype)

    def _branch(self, x: Tensor, formula: Formula) -> Tensor:
        """l, as the library has it in bf16 arithmetic; exactly but for one rounding else."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        free: AbstractContextManager[None] = nullcontext()
        if self.rounding is not None and formula.wide_branch:
            free = self.rounding.off()
        with free:
            lora = F.linear(F.linear(x, a), b)
        return lora.float() if formula.wide_branch else lora.to(BF16)


class Network:
    """ViT-Ti/16 with timm's random weights as bf16 numbers, and random images."""

    def __init__(self, width: float, images: int, scale: float) -> None:
        torch.manual_seed(0)
        model: Any = timm.create_model("vit_tiny_patch16_224").eval()
        model.requires_grad_(False)
        made = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter))
        self.images = rounded(torch.randn(images, 3, 224, 224, generator=made))
        self.layers: list[Layer] = []
        for name, module in list(model.blocks.named_modules()):
            if isinstance(module, nn.Linear):
                self.layers.append(Layer(module, width, scale, made))
                model.blocks.set_submodule(name, self.layers[-1])
        self.model = model

    def frozen(self, of: Arithmetic) -> Tensor:
        """Logits without the adapter."""
        return self._logits(False, None, of)

    def adapted(self, formula: Formula | None, of: Arithmetic) -> Tensor:
        """Logits with it; `of` fp64 lets only the change be in bf16."""
        return self._logits(True, formula, of)

    def _logits(self, adapted: bool, formula: Formula | None, of: Arithmetic) -> Tensor:
        rounding = Rounding() if of is Arithmetic.BF16 else None
        for layer in self.layers:
            layer.adapted, layer.formula, layer.rounding = adapted, formula, rounding
        dtype = torch.float64 if rounding is None else torch.float32
        self.model.to(dtype)
        with torch.inference_mode(), rounding or nullcontext():
            logits: Tensor = self.model(self.images.to(dtype))
        return logits.double()
