"""Instructions that are made to do nothing, and a device with fewer multiprocessors."""

import ctypes

import numpy as np
import pytest
from conftest import Buffer, compile_cuda

import cudasim

EXCHANGE = "_Z8exchangeILb1EEvPi"


@pytest.fixture(scope="module")
def so():
    return compile_cuda("faults.cu")


def exchange(so):
    o = Buffer(np.zeros(256, np.int32))
    return so.f_exchange(o, 1), o.get()[:128].tolist()


def test_a_dropped_barrier_is_a_race(so):
    expected = list(range(127, -1, -1))
    assert exchange(so) == (0, expected) and cudasim.race_count() == 0
    assert cudasim.count_instructions(EXCHANGE, "bar.sync") == 1
    with cudasim.dropped(EXCHANGE, "bar.sync", 0) as barrier:
        assert exchange(so)[0] == 0
    assert barrier.reached == 4  # warps
    assert cudasim.race_count() >= 1
    cudasim.reset_races()
    assert exchange(so) == (0, expected) and cudasim.race_count() == 0


def test_what_is_not_there_is_not_dropped(so):
    with pytest.raises(ValueError, match="no kernel named nothing"):
        cudasim.count_instructions("nothing", "bar.sync")
    assert cudasim.count_instructions(EXCHANGE, "mbarrier") == 0
    with (
        pytest.raises(IndexError, match="has 1 instructions bar.sync, asked for index 1"),
        cudasim.dropped(EXCHANGE, "bar.sync", 1),
    ):
        pass


def test_multiprocessors():
    def said():
        n = ctypes.c_int()
        assert cudasim.lib().cudaDeviceGetAttribute(ctypes.byref(n), 16, 0) == 0
        return n.value

    of_the_product = said()
    assert of_the_product > 80
    assert cudasim.set_multiprocessors(3) == 0
    assert said() == 3
    assert cudasim.set_multiprocessors(0) == 3
    assert said() == of_the_product
