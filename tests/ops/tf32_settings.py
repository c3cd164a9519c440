"""The ways to allow torch to round the operands of float32 products to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import backends

SETTINGS = {
    "fp32_precision": (backends, "tf32"),
    "cudnn.fp32_precision": (backends.cudnn, "tf32"),  # of all of CUDA
    "cuda.matmul.fp32_precision": (backends.cuda.matmul, "tf32"),
    "cuda.matmul.allow_tf32": (backends.cuda.matmul, True),
}


@contextmanager
def tf32(setting: str) -> Iterator[None]:
    owner, value = SETTINGS[setting]
    setattr(owner, setting.rsplit(".", 1)[-1], value)
    try:
        yield
    finally:
        # The older setting says "ieee" to the newer one when it is taken back; "none" is the default.
        backends.cuda.matmul.allow_tf32 = False
        for owner in (backends.cuda.matmul, backends.cudnn, backends):
            owner.fp32_precision = "none"
