"""Pointmap networks calibrated on a scene by their own, robustly aligned predictions (LoRA3D)."""
