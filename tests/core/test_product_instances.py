"""Which kernel serves a grouped product: the height of its tiles by shape, its row of the table by architecture."""

import ctypes

import pytest

FORWARD, INPUT_GRAD, HIDDEN_GRAD, WEIGHT_GRAD = range(4)
ALIGNED, UNALIGNED = 1, 0
# product, transposed, rows, aligned, arch, whether it runs on that alone.
SM80 = [
    (FORWARD, 0, 16, 1, 80, 0),
    (FORWARD, 0, 64, 1, 80, 0),
    (FORWARD, 0, 128, 1, 80, 0),
    (FORWARD, 0, 64, 0, 80, 0),
    (WEIGHT_GRAD, 0, 128, 1, 80, 0),
    (FORWARD, 1, 64, 1, 80, 0),
]
HOPPER = [(FORWARD, 0, 128, 1, 90, 1), (FORWARD, 1, 128, 1, 90, 1)]


@pytest.mark.parametrize(
    ("product", "aligned", "slots", "experts", "rows"),
    [
        (FORWARD, ALIGNED, 16 * 8, 8, 16),
        (FORWARD, ALIGNED, 17 * 8 - 1, 8, 16),
        (FORWARD, ALIGNED, 17 * 8, 8, 64),
        (FORWARD, ALIGNED, 64 * 8, 8, 64),
        (FORWARD, ALIGNED, 65 * 8, 8, 128),
        (FORWARD, ALIGNED, 0, 8, 16),
        (FORWARD, UNALIGNED, 1, 8, 64),
        (FORWARD, UNALIGNED, 1000 * 8, 8, 64),
        (INPUT_GRAD, ALIGNED, 8, 8, 64),
        (INPUT_GRAD, ALIGNED, 65 * 8, 8, 128),
        (HIDDEN_GRAD, ALIGNED, 64 * 8, 8, 64),
        (HIDDEN_GRAD, UNALIGNED, 65 * 8, 8, 64),
        (WEIGHT_GRAD, ALIGNED, 8, 8, 128),
        (WEIGHT_GRAD, UNALIGNED, 1000 * 8, 8, 64),
    ],
)
def test_height_of_tiles(library, product, aligned, slots, experts, rows):
    assert library.product_rows_of_tile(product, aligned, ctypes.c_int64(slots), ctypes.c_int64(experts)) == rows


@pytest.mark.parametrize(
    ("table", "product", "transposed", "rows", "aligned", "capability", "chosen"),
    [
        (SM80, FORWARD, 0, 128, ALIGNED, 80, SM80[2]),
        (SM80, FORWARD, 0, 128, ALIGNED, 86, SM80[2]),
        (SM80, FORWARD, 0, 16, ALIGNED, 90, SM80[0]),
        (SM80, FORWARD, 0, 64, UNALIGNED, 120, SM80[3]),
        (SM80, WEIGHT_GRAD, 0, 128, ALIGNED, 80, SM80[4]),
        (SM80, FORWARD, 0, 128, ALIGNED, 75, None),
        (SM80, FORWARD, 0, 128, UNALIGNED, 80, None),
        (SM80, HIDDEN_GRAD, 0, 128, ALIGNED, 80, None),
        (SM80, FORWARD, 1, 64, ALIGNED, 80, SM80[5]),
        (SM80, FORWARD, 1, 128, ALIGNED, 80, None),
        (HOPPER, FORWARD, 0, 128, ALIGNED, 90, HOPPER[0]),
        (HOPPER, FORWARD, 1, 128, ALIGNED, 90, HOPPER[1]),
        (HOPPER, FORWARD, 0, 128, ALIGNED, 89, None),
        (HOPPER, FORWARD, 0, 128, ALIGNED, 100, None),
        (HOPPER, WEIGHT_GRAD, 0, 128, ALIGNED, 90, None),
    ],
)
def test_the_row_that_the_device_runs(library, table, product, transposed, rows, aligned, capability, chosen):
    flat = (ctypes.c_int * 6 * len(table))(*[(ctypes.c_int * 6)(*row) for row in table])
    index = library.product_choose(flat, len(table), product, transposed, rows, aligned, capability)
    assert (table[index] if index >= 0 else None) == chosen
