from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Tiny tensors: more threads would only wait for one another. Cells set their own number."""
    set_threads(1)
