from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from benchmarks.distributed.ranks import Ranks

torch.set_num_threads(1)
if not dist.is_available() or not dist.is_gloo_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes."""
    ranks = Ranks(2, tmp_path_factory.mktemp("pair") / "store", patience=120)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes."""
    ranks = Ranks(4, tmp_path_factory.mktemp("four") / "store", patience=120)
    yield ranks
    ranks.close()
