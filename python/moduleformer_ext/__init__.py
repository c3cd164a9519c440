"""ModuleFormer's modular language models (MoLM) with native kernels for PyTorch."""
