"""The backbones of the law table: every layer kind in a model of its own, tiny and seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadapt.core.adapters.gated_cross_attention import attending

WIDTH, TOKENS, BATCH, VOCABULARY = 16, 5, 4, 11


class Conv1D(nn.Module):
    """The storage of transformers' layer of this name, which is recognised by name."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_out) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Around(nn.Module):
    """front -> layer -> back, so that the layer's input and output both depend on others."""

    layer: Any

    def __init__(self, layer: nn.Module | None, d_in: int = WIDTH, d_out: int = 12) -> None:
        super().__init__()
        self.front = nn.Linear(WIDTH, d_in)
        if layer is not None:
            self.layer = layer
        self.norm = nn.LayerNorm(d_out)
        self.back = nn.Linear(d_out, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.back(self.norm(self.act(torch.tanh(self.front(x)))))
        return out

    def act(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Strided(Around):
    """Gives its layer a state that is not contiguous, as whisper's encoder does."""

    def act(self, x: Tensor) -> Tensor:
        return super().act(x.transpose(1, 2).contiguous().transpose(1, 2))


class Reads(Around):
    """Uses the layer's weight without calling the layer, as many attention modules do."""

    def act(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Fused(Around):
    """One projection to q, k and v, in either storage."""

    def __init__(self, projection: nn.Module, name: str) -> None:
        super().__init__(None, d_out=WIDTH)
        self.name = name
        self.add_module(name, projection)

    def act(self, x: Tensor) -> Tensor:
        q, k, v = self.get_submodule(self.name)(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class Attention(Around):
    """nn.MultiheadAttention over itself; with `kdim` q, k and v have weights of their own."""

    def __init__(self, batch_first: bool = True, kdim: int | None = None) -> None:
        super().__init__(None, d_out=WIDTH)
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(WIDTH, 2, kdim=kdim, vdim=kdim, batch_first=batch_first)
        self.narrow = kdim or WIDTH

    def act(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        keys = x[..., : self.narrow]
        y: Tensor = self.attn(x, keys, keys)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Encoder(Around):
    """A post-norm nn.TransformerEncoderLayer, which has a fast path of its own in eval."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
        super().__init__(layer, d_out=WIDTH)


class Table(Around):
    """A bare matrix of positions, a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__(None, d_out=WIDTH)
        self.table = nn.Parameter(torch.randn(TOKENS, WIDTH) / 4)

    def act(self, x: Tensor) -> Tensor:
        return x + self.table


class Convolved(Around):
    """A convolution; tokens become positions, or a small image."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(layer, d_in=layer.in_channels * 9, d_out=layer.out_channels)
        self.size = (9 * TOKENS,) if isinstance(layer, nn.Conv1d) else (9, TOKENS)

    def act(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.reshape(len(x), -1, *self.size))
        return y.flatten(2).transpose(1, 2)


class FusedConvolution(Around):
    """One 1x1 convolution to q, k and v, as hybrid networks have."""

    def __init__(self) -> None:
        super().__init__(None, d_out=WIDTH)
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1)

    def act(self, x: Tensor) -> Tensor:
        image = x.transpose(-1, -2).unsqueeze(-1)
        q, k, v = self.qkv(image).squeeze(-1).transpose(-1, -2).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class Embedded(Around):
    """An embedding of token numbers; x holds those."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(VOCABULARY, WIDTH), d_in=12, d_out=12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.front(self.layer(x)))
        out: Tensor = self.back(self.norm(y))
        return out


class Block(nn.Module):
    """A transformer block without its attention: x + mlp(norm2(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class AttentionBlock(Block):
    """A whole transformer block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        return super().forward(x + self.proj(F.scaled_dot_product_attention(q, k, v)))


class Attending(Around):
    """A block that looks at features, which its model makes of the block's own state."""

    def act(self, x: Tensor) -> Tensor:
        with attending(x[:, :2].cos()):
            return super().act(x)


class Unused(nn.Module):
    """Calls `used` only."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.used, self.spare = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def tokens() -> Tensor:
    """A batch of token states."""
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))


def numbers() -> Tensor:
    """A batch of token numbers."""
    return torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Layer:
    """One layer kind: a model that has it, where it is, and what the model is called with."""

    make: Callable[[], nn.Module]
    at: str
    inputs: Callable[[], Tensor] = tokens

    def model(self, seed: int = 0) -> nn.Module:
        """The frozen backbone in eval mode; the same seed gives the same bits in any process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make().eval().requires_grad_(False)
            for parameter in model.parameters():  # fresh norms and attention biases are constants
                if bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(torch.randn(parameter.shape) / 4)
            return model


def _conv2d(**settings: object) -> Layer:
    return Layer(lambda: Convolved(nn.Conv2d(4, 6, **settings)), "layer")  # type: ignore[arg-type]


LAYERS = {
    "linear": Layer(lambda: Around(nn.Linear(WIDTH, 12)), "layer"),
    "linear without bias": Layer(lambda: Around(nn.Linear(WIDTH, 12, bias=False)), "layer"),
    "linear on a strided state": Layer(lambda: Strided(nn.Linear(WIDTH, 12)), "layer"),
    "linear that is read": Layer(lambda: Reads(nn.Linear(WIDTH, 12)), "layer"),
    "rows of a linear": Layer(lambda: Fused(nn.Linear(WIDTH, 3 * WIDTH), "qkv"), "qkv[q,v]"),
    "Conv1D": Layer(lambda: Around(Conv1D(WIDTH, 12)), "layer"),
    "rows of a Conv1D": Layer(lambda: Fused(Conv1D(WIDTH, 3 * WIDTH), "c_attn"), "c_attn[v]"),
    "conv1d": Layer(lambda: Convolved(nn.Conv1d(4, 6, 3, stride=2, padding=1)), "layer"),
    "conv2d": _conv2d(kernel_size=3, stride=2, padding=1),
    "conv2d, dilated": _conv2d(kernel_size=(3, 2), dilation=(2, 1), padding_mode="circular"),
    "conv2d, grouped": _conv2d(kernel_size=3, groups=2, padding="same"),
    "rows of a conv2d": Layer(FusedConvolution, "qkv[k,v]"),
    "embedding": Layer(Embedded, "layer", numbers),
    "in_proj of attention": Layer(Attention, "attn.in_proj_weight[q,v]"),
    "out_proj of attention": Layer(lambda: Attention(batch_first=False), "attn.out_proj"),
    "q_proj of attention": Layer(lambda: Attention(kdim=12), "attn.{q,k}_proj_weight"),
    "encoder layer": Layer(Encoder, "layer.{linear1,linear2,self_attn.out_proj}"),
    "matrix of the model": Layer(Table, "table"),
    "bias": Layer(lambda: Around(nn.Linear(WIDTH, 12)), "layer.bias"),
    "bias of attention": Layer(Attention, "attn.in_proj_bias[q,v]"),
    "norm": Layer(lambda: Around(nn.Linear(WIDTH, 12)), "norm.{weight,bias}"),
    "block": Layer(lambda: Around(Block(), d_out=WIDTH), "layer"),
    "block with attention": Layer(lambda: Around(AttentionBlock(), d_out=WIDTH), "layer"),
    "block with features": Layer(lambda: Attending(Block(), d_out=WIDTH), "layer"),
    "block on a strided state": Layer(lambda: Strided(Block(), d_out=WIDTH), "layer"),
}
