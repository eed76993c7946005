"""Operations in one pass over memory: a reference in PyTorch, a Triton kernel, an op of torch.

`<op>.py` holds the reference, the checks of its arguments and the registration; `<op>_triton.py`
the kernels, imported at the first call on a GPU: neither the core nor a CPU needs Triton.
"""
