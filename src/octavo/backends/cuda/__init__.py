"""The CUDA backend: Triton kernels for NVIDIA GPUs, with PyTorch for memory, streams and graphs."""
