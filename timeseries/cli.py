"""`polyadapt timeseries ...`: its verbs."""

from __future__ import annotations

from ..core import domain_command

VERBS = {
    "fit": "adapt a frozen language model to time series, by a configuration",
    "validate": "measure an adapter file or a checkpoint on the validation windows",
    "test": "measure an adapter file or a checkpoint on all test windows",
    "predict": "classify, fill or judge the series of a file with an adapter file",
    "forecast": "forecast a table of your own, with an adapter file or by fitting one",
    "compare": "One-for-All and its baselines by horizon and seed, in one protocol",
    "export": "write the merged model for torch.export and ONNX, with its size and speed",
    "rank-stability": "measure how the first update of LoRA grows with its rank; a picture",
    "sites": "show where adapters would go on a backbone",
}


def main(argv: list[str]) -> int:
    """Run `polyadapt timeseries VERB ...` and return its exit code."""
    about = "Forecast, classify and mend time series with a frozen language model."
    return domain_command.run(__package__, about, VERBS, argv)
