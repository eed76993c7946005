"""What papers report on the benchmarks: (MSE, MAE) of a model by data set and horizon.

Each at its paper's look-back, on its own backbone's weights, mostly as one seed, and with test
loaders of which several leave out the last batch: beside our numbers they are for orientation.
"""

from __future__ import annotations

from collections.abc import Mapping

Row = Mapping[int, tuple[float, float]]


def _row(horizons: tuple[int, ...], *pairs: tuple[float, float]) -> Row:
    return dict(zip(horizons, pairs, strict=True))


_LONG = (96, 192, 336, 720)

PEERS: Mapping[str, Mapping[str, Row]] = {
    "ETTh1": {
        "DLinear": _row(_LONG, (0.375, 0.399), (0.405, 0.416), (0.439, 0.443), (0.472, 0.490)),
        "PatchTST/64": _row(_LONG, (0.370, 0.400), (0.413, 0.429), (0.422, 0.440), (0.447, 0.468)),
        "TimesNet": _row(_LONG, (0.384, 0.402), (0.436, 0.429), (0.491, 0.469), (0.521, 0.500)),
        "GPT4TS": _row(_LONG, (0.376, 0.397), (0.416, 0.418), (0.442, 0.433), (0.477, 0.456)),
        "TIME-LLM": _row(_LONG, (0.362, 0.392), (0.398, 0.418), (0.430, 0.427), (0.442, 0.457)),
    },
    "ETTm1": {
        "DLinear": _row(_LONG, (0.299, 0.343), (0.335, 0.365), (0.369, 0.386), (0.425, 0.421)),
        "PatchTST/64": _row(_LONG, (0.293, 0.346), (0.333, 0.370), (0.369, 0.392), (0.416, 0.420)),
        "TimesNet": _row(_LONG, (0.338, 0.375), (0.374, 0.387), (0.410, 0.411), (0.478, 0.450)),
        "GPT4TS": _row(_LONG, (0.292, 0.346), (0.332, 0.372), (0.366, 0.394), (0.417, 0.421)),
        "TIME-LLM": _row(_LONG, (0.272, 0.334), (0.310, 0.358), (0.352, 0.384), (0.383, 0.411)),
    },
    "weather": {
        "DLinear": _row(_LONG, (0.176, 0.237), (0.220, 0.282), (0.265, 0.319), (0.323, 0.362)),
        "PatchTST/64": _row(_LONG, (0.149, 0.198), (0.194, 0.241), (0.245, 0.282), (0.314, 0.334)),
        "TimesNet": _row(_LONG, (0.172, 0.220), (0.219, 0.261), (0.280, 0.306), (0.365, 0.359)),
        "GPT4TS": _row(_LONG, (0.162, 0.212), (0.204, 0.248), (0.254, 0.286), (0.326, 0.337)),
        "TIME-LLM": _row(_LONG, (0.147, 0.201), (0.189, 0.234), (0.262, 0.279), (0.304, 0.316)),
    },
}
"""By the name of the file. One-for-All's paper prints means over the four horizons only."""

ONE_FOR_ALL: Mapping[str, tuple[float, float]] = {
    "ETTh1": (0.43, 0.43),
    "ETTh2": (0.36, 0.39),
    "ETTm1": (0.36, 0.38),
    "ETTm2": (0.26, 0.33),
    "weather": (0.23, 0.27),
}
"""Its table I (arXiv 2603.29756): MSE and MAE, means over 96, 192, 336 and 720."""
