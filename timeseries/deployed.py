"""The model of an adapter file for rows in the units of their table, as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .aims import Classify, Impute, Reconstruct
from .description import Description
from .network import Network


class Deployed(nn.Module):
    """What is exported: rows [b, L, C] in the units of the table -> answers in them.

    ============  ====================================================================
    Forecast      [b, T, C], with quantiles [b, T, C, Q]
    Impute        [b, L, C]: the rows, with what was NaN filled
    Reconstruct   [b, L]: how far each row is from what was expected, squared
    Classify      [b, n]: the probability of each class
    ============  ====================================================================

    Scaling is part of it, as the description has it (scores stay scaled); b is any, C fixed.

    >>> from .aims import Forecast
    >>> from .backbones import NoLanguageModel
    >>> from .patches import Patches
    >>> small = NoLanguageModel(width=8), 48, Patches(), Forecast(horizon=24)
    >>> about = Description(*small, seed=0, kept="seed", sha256="", names=("load", "OT"))
    >>> Deployed(about, about.network())(torch.zeros(3, 48, 2)).shape
    torch.Size([3, 24, 2])
    """

    def __init__(self, about: Description, network: Network) -> None:
        super().__init__()
        self.network = network
        self.aim = about.aim
        self.window = about.look_back, channels_of(about)
        scaler, plain = about.scaler, (0.0,) * self.window[1]
        mean, std = (plain, [1.0] * len(plain)) if scaler is None else (scaler.mean, scaler.std)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, rows: Tensor) -> Tensor:
        """[b, L, C] -> see the class."""
        scaled = (rows - self.mean) / self.std
        if isinstance(self.aim, Impute):
            known = ~rows.isnan()
            there = torch.where(known, scaled, 0)
            return torch.where(known, rows, self._own(self.aim.answer(self.network, there, known)))
        answer = self.aim.answer(self.network, scaled)
        if isinstance(self.aim, Classify):
            return answer.softmax(-1)
        if isinstance(self.aim, Reconstruct):
            return self.aim.scores(answer, scaled)
        return self._own(answer)

    def _own(self, answer: Tensor) -> Tensor:
        """[b, rows, C] or [b, rows, C, Q] in the table's units."""
        shape = (-1,) + (1,) * (answer.ndim - 3)
        return answer * self.std.view(shape) + self.mean.view(shape)

    def examples(self, number: int, seed: int) -> Tensor:
        """Windows of noise on the scale of the table, for Impute with gaps; `seed` draws them."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(number, *self.window, generator=generator) * self.std + self.mean
        if isinstance(self.aim, Impute):
            rows[torch.rand(rows.shape, generator=generator) < self.aim.share] = torch.nan
        return rows


def channels_of(about: Description) -> int:
    """C: as many as the model was trained on; 1 where it takes any number, one at a time."""
    if about.names is not None:
        return len(about.names)
    return about.aim.width if about.scaler is None else len(about.scaler.mean)
