"""Specialise frozen backbones with small adapter sets: attach, train, store, switch, mix, merge."""

__version__ = "0.1.0"
