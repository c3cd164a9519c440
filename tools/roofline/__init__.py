"""A model of the steady state of the CUDA kernels' main loops (tools/cuda_roofline.py)."""
