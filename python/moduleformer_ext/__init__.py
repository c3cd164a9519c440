"""ModuleFormer's modular language models (MoLM) with native kernels for PyTorch.

``moduleformer_ext.ops`` holds the kernels as functions, ``moduleformer_ext.reference`` the same functions in plain
PyTorch, ``moduleformer_ext.models`` the language models. Importing the package itself loads nothing native.
"""

from moduleformer_ext._version import __version__

__all__ = ["__version__"]
