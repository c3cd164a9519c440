"""The model of tools/cuda_roofline.py: sums and maxima of what was counted."""

import pytest


def launch(**changes):
    counts = {"warp_instructions": 0, "shared_wavefronts": 0, "mma_flops": 0}
    counts |= {"unique_bytes_read": 0, "unique_bytes_written": 0}
    return {**counts, **changes, "issued": {"sfu": changes.pop("sfu", 0)}}


def test_each_resource_has_its_rate(roofline):
    gpu = roofline.Gpu("one", "sm_80", 10, 1e9, 1e12, 1e11)
    found = roofline.bounds(
        launch(
            warp_instructions=4e10,
            sfu=5e9,
            shared_wavefronts=1e10,
            mma_flops=1e12,
            unique_bytes_read=6e10,
            unique_bytes_written=4e10,
        ),
        gpu,
    )
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert len(found) == 5


def test_launches_add_up_and_the_longest_tells_what_bounds(roofline):
    gpu = roofline.Gpu("one", "sm_80", 1, 1e9, 1e12, 1e9)
    seconds, resource = roofline.least_seconds([launch(warp_instructions=4e9), launch(unique_bytes_read=3e9)], gpu)
    assert seconds == pytest.approx(4.0)
    assert resource == "memory"


def test_table_names_every_gpu_and_calls_itself_a_model(roofline):
    text = roofline.table({"a case": [launch(mma_flops=1e9)]})
    assert all(gpu.name in text for gpu in roofline.GPUS)
    assert text.count("tensor cores") == len(roofline.GPUS)
    assert "MODEL" in roofline.__doc__
