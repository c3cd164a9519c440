"""Benchmarks of the CUDA kernels: ``make bench-gpu`` or ``python -m benchmarks.gpu``. Needs a GPU.

The races of ``benchmarks/ops`` on the default CUDA device, with whatever of the other libraries is installed there,
timed with CUDA events on a flushed L2 cache.
"""
