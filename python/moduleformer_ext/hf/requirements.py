"""What has to be installed."""

from __future__ import annotations

import importlib.util
from importlib import metadata

OLDEST_TRANSFORMERS = (5, 17)


def check() -> None:
    """Raise an ImportError that says what to install unless transformers is here and new enough."""
    needed = ".".join(map(str, OLDEST_TRANSFORMERS))
    advice = "install it with: pip install 'moduleformer_ext[hf]'"
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"moduleformer_ext.hf: needs transformers >= {needed}, found none; {advice}")
    found = metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRANSFORMERS:
        raise ImportError(f"moduleformer_ext.hf: needs transformers >= {needed}, found {found}; {advice}")
