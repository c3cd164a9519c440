"""Models over several processes, on PyTorch's own engine: FSDP2, DeviceMesh, distributed checkpoints."""

from moduleformer_ext.distributed.sharding import draw_weights, load_weights, shard_model

__all__ = ["draw_weights", "load_weights", "shard_model"]
