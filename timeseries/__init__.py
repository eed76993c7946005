"""Time series on a frozen language model: forecasts, classes, anomalies and gaps.

`network` is what is adapted (window -> patches -> frozen blocks -> frozen head), `backbones` names
the blocks, `adapters` holds the two published recipes, `aims` says what is predicted, `task` trains
it and `cli` puts all of it behind `polyadapt timeseries`. Import from the modules: this file loads
nothing.
"""
