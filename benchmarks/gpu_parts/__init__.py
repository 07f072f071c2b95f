"""The parts of benchmarks/gpu.py. Each runs in a process of its own, as a kernel's error ends its use of the GPU."""
