"""The CUDA backend: Triton kernels for NVIDIA GPUs, with PyTorch for memory, streams and graphs.

`backend.load` and `backend.footprint` are its entry points; importing this package imports neither Triton nor PyTorch.
"""
