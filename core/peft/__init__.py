"""PEFT folders: read to PEFT's outputs, written so that PEFT gives ours."""
