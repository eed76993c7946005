"""DoRA: a trained magnitude per row, and a LoRA for the direction (arXiv 2402.09353 eq. 5).

Ours: the row norm n is exact and never needs a buffer of W0's size, and the backward of linear
layers keeps no more activations than LoRA's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import row_norm as norms
from ..kernels.dispatch import runs_kernel
from ..kernels.dora_compose import dora_compose
from ..layers import linear
from ..precision import widened, without_autocast
from ..recipe import Adapter, Branch
from .lora import LoRA, Pair, PairAdapter, traced

if TYPE_CHECKING:
    from ..layers import FrozenLayer
    from ..sites import Site

SMALLEST_NORM = 1e-12  # a row of zeros keeps its direction; NaN stays NaN
# x (W0 + s B A)^T = (y' - b) / g carries the rounding of y' and of b over |g|. From 1/2 on that is
# at most one bit more than keeping the base product would cost; rows below are computed anew.
SMALLEST_GAIN = 0.5

_Cached = tuple[tuple[tuple[int, int], ...], Tensor, tuple[Tensor, ...]]  # key, n, tensors read


def row_norm(w0: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||(W0 + s B A)_i|| for every row i, at least 1e-12, without gradient.

    >>> row_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), 2.0)
    tensor([6.4031])
    """
    plain = traced() or not runs_kernel(w0)
    norm = norms.exact if plain else norms.row_norm
    return norm(w0, a, b, scale).clamp_min(SMALLEST_NORM)


class DoRAAdapter(PairAdapter):
    """W' = diag(m / n) (W0 + s B A), m [d_out] trained, n_i = ||(W0 + s B A)_i|| a constant."""

    needs_first = True

    def __init__(self, pair: Pair, w0: Tensor) -> None:
        super().__init__(pair)
        norm = row_norm(w0, pair.A.to(w0.device), pair.B.to(w0.device), pair.scale)
        self.m = nn.Parameter(norm.to(torch.float32))  # by the same code as n: m / n is exactly 1
        self._cached: _Cached | None = None
        self._in_training = False  # a forward with grad since the last `after_step`

    def weight(self, w: Tensor) -> Tensor:
        """diag(m / n) (W + s B A) for the frozen W."""
        gain = self.m / row_norm(w, self.A, self.B, self.scale).to(self.m.dtype)
        return (gain[:, None] * widened(w, self.A, self.B, self.scale)).to(w.dtype)

    def output(self, x: Tensor, y: Tensor, layer: FrozenLayer) -> Tensor:
        """y + ((g - 1) (y - b) + g s B A x) with g = m / n; g = 1 and B = 0 leave y's bits.

        Under dropout both the branch and the (g - 1) term see drop(x), as in PEFT.
        """
        norm, dropped = self.norm(layer).to(self.m.dtype), self.drops(x)
        if x.is_floating_point():  # an embedding's x holds row numbers
            x = (F.dropout(x, self.dropout) if dropped else x).to(y.dtype)
        if layer.kind not in ("linear", "transposed linear") or traced():
            return self._plain(x, y, norm, layer, dropped)
        constants = (norm, layer.matrix(), layer.bias, self.scale, dropped)
        result: Tensor = DoRALinear.apply(x, y, self.A, self.B, self.m, *constants)
        return result

    def _plain(
        self, x: Tensor, y: Tensor, norm: Tensor, layer: FrozenLayer, dropped: bool
    ) -> Tensor:
        """The same in operations that autograd and the compiler follow, for any layer kind."""
        gain, bias = _gain(self.m, norm, y), layer.bias
        branch = layer.down(x, self.A.to(y.dtype))
        branch = layer.up(branch, _folded(self.B, gain, self.scale, y.dtype))
        if dropped:
            base = layer.down(x, layer.matrix().to(x.dtype))
        else:
            base = _without_bias(y, None if bias is None else layer.channels(bias))
        return (y + (layer.channels(gain - 1) * base + branch)).to(y.dtype)

    def branch(self, layer: FrozenLayer) -> Branch:
        """g = m / n as the gain, A and g B as the factors."""
        gain = self.m / self.norm(layer).to(self.m.dtype)
        return Branch(self.A, gain[:, None] * self.B, self.scale, gain)

    def norm(self, layer: FrozenLayer) -> Tensor:
        """n of this layer, kept until a factor or W0 changes.

        Not kept while the factors train: an optimiser may write without raising a tensor's version
        (torch's AdamW(fused=True) does), and a stale n would be silently wrong.
        """
        trains = self.A.requires_grad or self.B.requires_grad
        if trains and (self._in_training or torch.is_grad_enabled()):
            self.invalidate()
            self._in_training = True  # a step may follow any time: nothing is kept before it
            return row_norm(layer.matrix(), self.A, self.B, self.scale)
        read = (layer.stored, self.A, self.B)
        if traced() or any(t.is_inference() for t in read):  # no versions to compare
            return row_norm(layer.matrix(), self.A, self.B, self.scale)
        key = tuple((t._version, t.data_ptr()) for t in read)
        cached = self._cached
        if cached is None or cached[0] != key:
            # Outside of inference mode, or the kept tensor could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                norm = row_norm(layer.matrix(), self.A, self.B, self.scale)
            # One assignment: other threads see all of it or nothing. `read` is held, so that no
            # new parameter can take the address of an old one.
            self._cached = cached = (key, norm, read)
        return cached[1]

    def invalidate(self) -> None:
        """Forget the kept norm; call it after writing into a factor or W0 through `.data`."""
        self._cached = None

    def after_step(self, step: int, total: int | None) -> None:
        """The factors have moved."""
        self.invalidate()
        self._in_training = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


def _gain(m: Tensor, norm: Tensor, y: Tensor) -> Tensor:
    """m / n, at least in fp32, so that its difference to 1 is exact for fp64 outputs too."""
    return (m / norm).to(torch.promote_types(m.dtype, y.dtype))


def _folded(b: Tensor, gain: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """diag(g) s B: scaling the small factor spares a pass over the output."""
    return ((gain * scale)[:, None] * b).to(dtype)


def _without_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y - b, at least in fp32: in bf16 the difference would round once more."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return wide if bias is None else wide - bias


class DoRALinear(torch.autograd.Function):
    """DoRA's output form for linear layers; keeps x, A x [.., r] and the output for backward.

    The gradient of m needs z = x (W0 + s B A)^T. It is recovered from the output, which the layer
    behind mostly keeps anyway. Autograd refuses the backward if the output was changed in place.
    """

    tensors = ("x", "y", "a", "b", "m", "norm", "w0", "bias")

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        m: Tensor,
        norm: Tensor,
        w0: Tensor,
        bias: Tensor | None,
        scale: float,
        dropped: bool,
    ) -> Tensor:
        gain = _gain(m, norm, y)
        with without_autocast(x):
            hidden = linear(x, a.to(x.dtype))
            if runs_kernel(y):
                out = _fused(x, y, hidden, b, gain, w0 if dropped else None, bias, scale)
            else:
                base = F.linear(x, w0.to(x.dtype)) if dropped else _without_bias(y, bias)
                delta = base * (gain - 1)
                del base  # one fresh buffer, filled in place: the peak is that of LoRA's forward
                delta += F.linear(hidden, _folded(b, gain, scale, x.dtype))
                delta += y
                out = delta.to(y.dtype)
        ctx.save_for_backward(x, hidden, None if dropped else out, a, b, m, norm, w0, bias)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, out, a, b, m, norm, w0, bias = ctx.saved_tensors
        gain, dropped = _gain(m, norm, x), out is None
        needs = dict(zip(DoRALinear.tensors, ctx.needs_input_grad[:8], strict=True))
        grads: dict[str, Tensor] = {}
        with without_autocast(x):
            if needs["m"]:
                z = _product(x, hidden, out, b, w0, bias, gain, ctx.scale)
                grads["m"] = _rows(z.mul_(grad)).sum(0) / norm
                del z
            if needs["b"]:
                grads["b"] = (gain * ctx.scale)[:, None] * (_rows(grad).t() @ _rows(hidden))
            if needs["a"] or needs["x"]:
                grad_hidden = _rows(grad) @ _folded(b, gain, ctx.scale, grad.dtype)
                grads["a"] = grad_hidden.t() @ _rows(x)
            if needs["x"]:
                grads["x"] = (grad_hidden @ a.to(x.dtype)).view(x.shape)
                if dropped:
                    grads["x"] += ((gain - 1) * grad).to(x.dtype) @ w0.to(x.dtype)
            if needs["y"]:
                grads["y"] = grad if dropped else (grad * gain).to(grad.dtype)
            if needs["bias"] and not dropped:  # another set may train it
                grads["bias"] = (1 - gain) * _rows(grad).sum(0)
        return *(grads.get(name) for name in needs), None, None


def _fused(
    x: Tensor,
    y: Tensor,
    hidden: Tensor,
    b: Tensor,
    gain: Tensor,
    w0: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The output by one kernel behind the product with B; under dropout, y0 is drop(x) w0^T."""
    lora, gain = (
        F.linear(hidden, b.to(x.dtype)),
        gain.to(torch.promote_types(gain.dtype, torch.float32)),
    )
    if w0 is None:
        return dora_compose(y, lora, gain, scale, bias, whole=True)
    return y + dora_compose(F.linear(x, w0.to(x.dtype)), lora, gain, scale)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _product(
    x: Tensor,
    hidden: Tensor,
    out: Tensor | None,
    b: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    scale: float,
) -> Tensor:
    """x (W0 + s B A)^T: from the output where the gain allows it, else computed anew."""
    wide = torch.promote_types(x.dtype, gain.dtype)
    if out is None:
        fresh = F.linear(x, w0.to(x.dtype))
        return fresh.to(wide).add_(F.linear(hidden, (scale * b).to(x.dtype)))
    z = _without_bias(out, bias) / gain
    small = (gain.abs() < SMALLEST_GAIN).nonzero().squeeze(1)
    if len(small):
        anew = _product(x, hidden, None, b[small], w0[small], None, gain, scale)
        z[..., small] = anew
    return z


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """W' = diag(m / n) (W0 + s B A), n the row norms of W0 + s B A (arXiv 2402.09353).

    A [r, d_in], B [d_out, r] = 0 and their settings as in `LoRA`; m [d_out] = ||W0_i||. n is a
    constant for the gradient (section 4.3), the bias is never scaled. Second derivatives, and
    changing the output of an adapted linear layer in place (`nn.ReLU(inplace=True)` behind it),
    are refused by autograd. Raises `AdaptError` as `LoRA` does.

    >>> from polyadapt.core import attach
    >>> attach(nn.Sequential(nn.Linear(8, 4)), DoRA(rank=2), at="0").trainable_count()
    28
    """

    def build(self, site: Site, weight: Tensor | None, generator: Generator | None) -> Adapter:
        """The factors and the magnitude at one site."""
        pair = self.pair(site, weight, generator)
        assert weight is not None, "pair refuses sites without a weight"
        return DoRAAdapter(pair, weight)
