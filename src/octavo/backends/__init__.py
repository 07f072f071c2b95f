"""Backends: the only code that uses the hardware. Import only the one that you use: each has its own dependencies."""
