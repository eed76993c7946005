"""Forecasts without a language model: past [b, L, c] -> future [b, T, c]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import AdaptError
from ..core.recipe import require


class LastValue(nn.Module):
    """Every step ahead is the last value that was seen; nothing is learned.

    >>> LastValue(horizon=2)(torch.tensor([[[1.0], [5.0]]])).flatten().tolist()
    [5.0, 5.0]
    """

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon

    def forward(self, past: Tensor) -> Tensor:
        """[b, L, c] -> [b, T, c]."""
        return past[:, -1:].expand(-1, self.horizon, -1)


class SeasonalNaive(nn.Module):
    """Step h ahead is the value of the last season at the same place, `period` rows a season.

    y_h = x[L - period + (h mod period)], h from 0. Raises `AdaptError` for a past that is shorter
    than a season.

    >>> SeasonalNaive(horizon=3, period=2)(torch.tensor([[[0.0], [1], [2]]])).flatten().tolist()
    [1.0, 2.0, 1.0]
    """

    def __init__(self, horizon: int, period: int) -> None:
        super().__init__()
        require(period >= 1, f"period={period} is not allowed: a whole number from 1")
        self.horizon = horizon
        self.period = period

    def forward(self, past: Tensor) -> Tensor:
        """[b, L, c] -> [b, T, c]."""
        if past.shape[1] < self.period:
            raise AdaptError(
                f"a past of {past.shape[1]} rows is shorter than a season of {self.period}:"
                " lengthen look_back"
            )
        places = torch.arange(self.horizon, device=past.device) % self.period
        return past[:, -self.period :][:, places]


class DLinear(nn.Module):
    """Trend and rest of the past, each through one linear map that all channels share.

    trend = the mean of `kernel` neighbours, where the first and last value go on beyond the ends;
    y = W_t trend + b_t + W_r (past - trend) + b_r, W [T, L]. Source: arXiv 2205.13504. Weights
    start at 1/L, so that the first forecast is about the mean of the past; biases as torch's.

    >>> model = DLinear(look_back=336, horizon=96)
    >>> sum(p.numel() for p in model.parameters()), model(torch.ones(2, 336, 7)).shape
    (64704, torch.Size([2, 96, 7]))
    """

    def __init__(self, look_back: int, horizon: int, kernel: int = 25) -> None:
        super().__init__()
        require(
            kernel >= 1 and kernel % 2 == 1,
            f"DLinear: kernel={kernel} is not allowed: an odd number, so that it has a middle",
        )
        self.kernel = kernel
        self.of_trend = nn.Linear(look_back, horizon)
        self.of_rest = nn.Linear(look_back, horizon)
        for layer in (self.of_trend, self.of_rest):
            nn.init.constant_(layer.weight, 1 / look_back)

    def trend(self, past: Tensor) -> Tensor:
        """The moving average of [b, L, c], of the same shape."""
        side = self.kernel // 2
        longer = F.pad(past.mT, (side, side), mode="replicate")
        return F.avg_pool1d(longer, self.kernel, stride=1).mT

    def forward(self, past: Tensor) -> Tensor:
        """[b, L, c] -> [b, T, c]."""
        trend = self.trend(past)
        y: Tensor = self.of_trend(trend.mT) + self.of_rest((past - trend).mT)
        return y.mT


class PatchTST(nn.Module):
    """PatchTST (arXiv 2211.14730) by transformers' class, at the size of the authors' ETTh script.

    Patches of 16 with stride 8 (shorter when L is below 32), three layers of width 16 with 4 heads,
    an MLP of 128, dropout 0.3, learned positions, batch norm behind each part; every channel on its
    own, scaled by its own mean and std. Unlike the authors' model there are no copies of the last
    value before patching (one patch fewer), no attention scores carried from layer to layer, and no
    learned numbers in the scaling. Raises `AdaptError` for a past shorter than 2.

    >>> PatchTST(look_back=48, horizon=24)(torch.zeros(2, 48, 1)).shape
    torch.Size([2, 24, 1])
    """

    def __init__(
        self,
        look_back: int,
        horizon: int,
        *,
        width: int = 16,
        heads: int = 4,
        hidden: int = 128,
        layers: int = 3,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        from transformers import PatchTSTConfig, PatchTSTForPrediction

        require(look_back >= 2, f"PatchTST: look_back={look_back} is not allowed: from 2")
        length = min(16, look_back // 2)
        config = PatchTSTConfig(
            num_input_channels=1,
            context_length=look_back,
            prediction_length=horizon,
            patch_length=length,
            patch_stride=max(1, length // 2),
            d_model=width,
            num_attention_heads=heads,
            ffn_dim=hidden,
            num_hidden_layers=layers,
            ff_dropout=dropout,
            path_dropout=dropout,
            positional_dropout=dropout,
            positional_encoding_type="random",
            pre_norm=False,
            scaling="std",
            loss="mse",
        )
        self.model = PatchTSTForPrediction(config)

    def forward(self, past: Tensor) -> Tensor:
        """[b, L, c] -> [b, T, c]; every channel as a window of its own."""
        each = past.mT.flatten(0, 1).unsqueeze(-1)
        y: Tensor = self.model(past_values=each).prediction_outputs
        return y.view(past.shape[0], past.shape[2], -1).mT
