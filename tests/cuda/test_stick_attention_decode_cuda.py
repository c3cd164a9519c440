"""What concerns the CUDA kernels alone; tests/ops/test_stick_attention_decode.py runs on every device."""

import pytest
import torch
from decode_cases import case, check, decode
from devices import EMULATED


@pytest.mark.parametrize("shared", [False, True])
def test_under_any_schedule(device, schedule, shared):
    check(device, *case(new=3, dim=128, cache=500, dtype=torch.bfloat16, shared=shared), stick_epsilon=0.0)
    check(device, *case(kv_heads=1, dim=1024, cache=300, dtype=torch.bfloat16, shared=shared), scale=0.02)


def test_float64_is_for_the_cpu(device):
    q, k, v, lengths = case()
    with pytest.raises(ValueError, match="stick_attention_decode: q must be float32, bfloat16 or float16"):
        decode(device, q.double(), k.double(), v.double(), lengths)


@pytest.mark.skipif(not EMULATED, reason="counts are the emulator's")
class TestCounts:
    @staticmethod
    def launches(device, inputs, **options):
        import cudasim

        cudasim.reset_stats()
        decode(device, *inputs, scale=1.0, **options)
        return cudasim.stats()

    @staticmethod
    def traffic(launches):
        return 32 * sum(launch["global_load_sectors"] + launch["global_store_sectors"] for launch in launches)

    @pytest.mark.parametrize(
        ("kv_heads", "group", "dim", "cache", "shared"),
        [(8, 1, 64, 4096, False), (8, 2, 64, 4096, False), (8, 2, 128, 4096, False), (1, 2, 1024, 65536, True)],
    )
    def test_reads_the_cache_once(self, device, kv_heads, group, dim, cache, shared):
        q, k, v, lengths = case(
            batch=1,
            kv_heads=kv_heads,
            group=group,
            dim=dim,
            cache=cache,
            dtype=torch.bfloat16,
            shared=shared,
            lengths=[cache],
        )
        launches = self.launches(device, (q, k, v, lengths), stick_epsilon=0.0)
        assert len(launches) == 2
        assert self.traffic(launches) <= 1.1 * k.nbytes * (1 if shared else 2)
        for launch in launches:
            assert launch["shared_excess_wavefronts"] <= 0.2 * launch["shared_wavefronts"]

    def test_sticks_that_end_leave_the_cache_unread(self, device):
        q, k, v, lengths = case(
            batch=1, kv_heads=1, dim=1024, cache=8192, dtype=torch.bfloat16, shared=True, lengths=[8192]
        )
        launches = self.launches(device, (q / 32, k, v, lengths))
        assert self.traffic(launches) <= 2 * 64 * 1024 * 2
