"""The frozen network: a window of values -> patches -> blocks -> outputs."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor, nn

from ..core.errors import AdaptError
from .blocks import Blocks
from .normalisation import normalise
from .patches import Patches

FROZEN_LAYERS = ("in_layer.weight", "in_layer.bias", "out_layer.weight", "out_layer.bias")
OUT_LAYER = "out_layer"


class Network(nn.Module):
    """y = std (W_out vec(h) + b_out) + mean, h = blocks(W_in patch + b_in); x [b, L, c] -> [b, o].

    The window is normalised by its own mean and std (`normalise`), cut into N patches of P steps
    with c channels each, embedded by W_in [D, P c], sent through the blocks and flattened patch by
    patch for W_out [o, N D]. `restores=False` leaves out the last step: o logits, for c channels.
    `rescale=False` takes x as it is. As in GPT4TS (arXiv 2302.11939) and One-for-All (2603.29756),
    whose dense layers stay at their random start: here all four of their tensors are uniform in
    +-1/sqrt(number of inputs), as torch's own, drawn from `seed` alone. Forecasts take one channel
    at a time, c = 1.

    Raises `AdaptError` for a window of another length, another number of channels, and for more
    patches than the blocks have positions.

    >>> from .backbones import NoLanguageModel
    >>> network = Network(NoLanguageModel(width=8).build(), 48, Patches(16, 8), outputs=24)
    >>> network(torch.zeros(2, 48, 1)).shape, network.sites
    (torch.Size([2, 24]), ['blocks.positions', 'out_layer'])
    """

    def __init__(
        self,
        blocks: Blocks,
        look_back: int,
        patches: Patches,
        *,
        outputs: int,
        channels: int = 1,
        restores: bool = True,
        rescale: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        count = patches.count(look_back)
        if count > blocks.limit:
            raise AdaptError(
                f"look_back={look_back} makes {count} patches, the blocks have {blocks.limit}"
                " positions: raise the stride or shorten look_back"
            )
        if restores and (channels != 1 or not rescale):
            raise AdaptError("values are restored one channel at a time, and only if rescaled")
        self.look_back = look_back
        self.patches = patches
        self.channels = channels
        self.restores = restores
        self.rescale = rescale
        generator = Generator().manual_seed(seed)
        self.in_layer = _drawn(patches.length * channels, blocks.width, generator)
        self.blocks = blocks
        self.out_layer = _drawn(count * blocks.width, outputs, generator)

    @property
    def sites(self) -> list[str]:
        """Where One-for-All adapts: the position table and the output layer."""
        return [f"blocks.{self.blocks.positions_at}", OUT_LAYER]

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """x [b, L, c], what is `observed` of it -> [b, outputs]."""
        self._check(x)
        if not self.rescale:
            return self._outputs(x)
        z, mean, std = normalise(x, observed)
        y = self._outputs(z)
        return y.to(x.dtype) * std[..., 0] + mean[..., 0] if self.restores else y

    def _outputs(self, z: Tensor) -> Tensor:
        embedded = self.in_layer(self.patches.cut(z))
        y: Tensor = self.out_layer(self.blocks(embedded).flatten(1))
        return y

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[1:] != (self.look_back, self.channels):
            raise AdaptError(
                f"the network takes windows [b, {self.look_back}, {self.channels}], got"
                f" {list(x.shape)}"
            )

    def frozen_layers(self) -> dict[str, Tensor]:
        """The four tensors that are drawn at random, in the order of their drawing."""
        state = self.state_dict()
        return {name: state[name] for name in FROZEN_LAYERS}


def digest(layers: dict[str, Tensor]) -> str:
    """SHA-256 of the numbers of `Network.frozen_layers` as little-endian float32."""
    found = hashlib.sha256()
    for tensor in layers.values():
        numbers = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        found.update(numbers.astype("<f4").tobytes())
    return found.hexdigest()


def _drawn(d_in: int, d_out: int, generator: Generator) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        layer.bias.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
    return layer
