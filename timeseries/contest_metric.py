"""The scores of a forecasting competition, for a test that runs over all its series."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from .data_competition import CompetitionData


class ContestMetric(Metric):
    """sMAPE, MASE and OWA of the point forecasts of all series, as `CompetitionData.scores` has it.

    Batches have to come in the order of the test.
    """

    full_state_update = False
    forecasts: list[Tensor]

    def __init__(self, data: CompetitionData) -> None:
        super().__init__()
        self.data = data
        self.add_state("forecasts", default=[], dist_reduce_fx="cat")

    def update(self, forecasts: Tensor, truths: Tensor) -> None:
        """Take forecasts [b, T, 1]; the data knows the truths."""
        self.forecasts.append(forecasts[..., 0].cpu())

    def compute(self) -> dict[str, Tensor]:
        """The three by name."""
        found = self.data.scores(torch.cat(list(self.forecasts)).double().numpy())
        named = {"smape": found.smape, "mase": found.mase, "owa": found.owa}
        return {f"test_{name}": torch.tensor(value) for name, value in named.items()}
