"""The parts of benchmarks/gpu.py. Each runs in a process of its own, because an error of a kernel ends its use of the GPU."""
