"""Loads the native extension once, and says in words what to do when it cannot be loaded."""

import torch

try:
    import moduleformer_ext._C as _C
except ImportError as error:
    raise ImportError(
        f"moduleformer_ext's native extension cannot be loaded with torch {torch.__version__}: {error}. It is built "
        "against one torch release: after installing or changing torch, build it again with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source directory (`make build` in a "
        "checkout)."
    ) from error


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


if _release(_C.torch_version) != _release(torch.__version__):
    raise ImportError(
        f"moduleformer_ext was built against torch {_C.torch_version}, but torch {torch.__version__} is installed, "
        "and torch promises no binary compatibility between releases. Build it again: `pip install "
        "--no-build-isolation --force-reinstall --no-deps .` in the source directory (`make build` in a checkout)."
    )


def build_info() -> dict[str, object]:
    """How the extension was built and what it runs with: versions, instruction sets, kernels, CUDA library."""
    info = dict(_C.build_info())
    others = {"build_info", "cuda_kernels"}
    info["kernels"] = " ".join(name for name in dir(_C) if callable(getattr(_C, name)) and name not in others)
    return info


def cuda_kernels() -> list[tuple[str, str, int]]:
    """The kernels of the CUDA library: (op, name, architecture) each. 80 is sm_80 and newer, 90 is sm_90a alone. No GPU
    is looked for."""
    return _C.cuda_kernels()
