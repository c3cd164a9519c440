from collections.abc import Callable
from typing import Any

torch_version: str

def build_info() -> dict[str, object]: ...
def cuda_kernels() -> list[tuple[str, str, int]]: ...

# Every op of torch.ops.moduleformer_ext, under its name and with its schema as docstring.
def __getattr__(name: str) -> Callable[..., Any]: ...
