"""What one process of a training run holds in memory, calculated from the configuration alone.

`python -m moduleformer_ext.distributed.memory molm-4b-k2 --processes 8 64` prints it. Activations are not estimated:
the model runs on tensors without contents, and what autograd keeps is added up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moduleformer_ext.distributed.sharding import DTYPES, units
from moduleformer_ext.models import KVCache, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.presets import PRESETS
from moduleformer_ext.nn import LayerCache

_FLOAT = 4


@dataclass(frozen=True)
class MemoryPerProcess:
    """Bytes, as :class:`~moduleformer_ext.train.trainer.Trainer` and its sharded form use them."""

    parameters: int
    """Own part, in float32."""
    gradients: int
    """Own part, in float32."""
    optimizer: int
    """Own part of AdamW's two moments, in float32."""
    gathered: int
    """Whole parameters at the peak, of what is outside of the layers, the unit that is computed with and the next one;
    and the whole gradient of one unit."""
    activations: int
    """What autograd keeps of a micro-batch; with recomputation that of one layer, and the inputs of all. Autocast keeps
    the weights, too, in its type, unless they were gathered in it."""
    history: int
    """Keys and values of the past."""

    @property
    def total(self) -> int:
        """Of all these."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_per_process(
    config: MoLMConfig,
    processes: int,
    *,
    lanes: int,
    micro_batches: int = 1,
    recompute: bool = False,
    autocast: torch.dtype | None = torch.bfloat16,
    gather_dtype: torch.dtype | None = None,
    reshard: bool = True,
) -> MemoryPerProcess:
    """The memory of one of several processes.

    Args:
        lanes: of this process.
        micro_batches, recompute, gather_dtype, reshard: as the options of training have them.
        autocast: the type of products, or None.

    Raises:
        ValueError: lanes that micro-batches do not divide.
    """
    if lanes % micro_batches:
        raise ValueError(f"memory_per_process: lanes must be a multiple of {micro_batches} micro-batches, got {lanes}")
    with FakeTensorMode():
        model = _model(config, gather_dtype)
        model.set_activation_checkpointing(recompute)
        batch = lanes // micro_batches
        past, past_bytes = _past(config, batch, autocast)
        activations = _kept(lambda: _forward(model, batch, past, autocast), model)
        if recompute:
            x = torch.empty(batch, config.block_size, config.n_embd, dtype=gather_dtype, requires_grad=True)
            activations += _kept(lambda: _block(model.transformer.h[0], x, past, autocast), model)
    whole = _elements(model)
    own = -(-whole // processes)
    return MemoryPerProcess(
        parameters=_FLOAT * own,
        gradients=_FLOAT * own,
        optimizer=2 * _FLOAT * own,
        gathered=0 if processes == 1 else _gathered(model, gather_dtype, reshard),
        activations=activations,
        history=past_bytes * micro_batches,
    )


def _model(config: MoLMConfig, dtype: torch.dtype | None) -> MoLMForCausalLM:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        return MoLMForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)


def _forward(model: MoLMForCausalLM, batch: int, past: KVCache | None, autocast: torch.dtype | None) -> object:
    config = model.config
    tokens = torch.zeros(batch, config.block_size, dtype=torch.long)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(tokens, past_key_values=past, use_cache=True, shift_labels=tokens, skip_logits=True)
    return output, output.loss


def _block(block: nn.Module, x: Tensor, past: KVCache | None, autocast: torch.dtype | None) -> object:
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return block(x, None if past is None else past.layers[0], None, True)


def _kept(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps of a pass, parameters aside, each storage once."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes(), tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in storages.values())


def _past(config: MoLMConfig, batch: int, autocast: torch.dtype | None) -> tuple[KVCache | None, int]:
    """A full history, and its bytes."""
    if not config.history_length:
        return None, 0
    # Keys that are the tokens themselves come from a norm, which autocast leaves in float32.
    dtype = torch.float32 if autocast is None or config.identity_kv else autocast
    heads = (config.n_head, config.attention.hidden // config.n_head)

    def stored() -> Tensor:
        return torch.empty(batch, config.history_length, *heads, dtype=dtype)

    layers = [LayerCache.of(stored(), None if config.identity_kv else stored()) for _ in range(config.n_layer)]
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return KVCache(layers), sum(tensor.nbytes for tensor in tensors)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gathered(model: MoLMForCausalLM, gather_dtype: torch.dtype | None, reshard: bool) -> int:
    size = _FLOAT if gather_dtype is None else gather_dtype.itemsize
    found = units(model)
    elements = [sum(parameter.numel() for parameter in unit.parameters) for unit in found]
    in_layers = [count for unit, count in zip(found, elements, strict=True) if unit.in_layer]
    at_once = sum(sorted(in_layers)[-2:]) if reshard else sum(in_layers)
    return size * (sum(elements) - sum(in_layers) + at_once) + _FLOAT * max(elements)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m moduleformer_ext.distributed.memory", description=main.__doc__)
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--lanes", type=int, default=1, help="of one process")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--gather-dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--no-reshard", action="store_true")
    given = parser.parse_args(words)
    names = [field.name for field in fields(MemoryPerProcess)]
    print("| processes | " + " | ".join(names) + " | total, GB |")
    print("|---" * (len(names) + 2) + "|")
    for processes in given.processes:
        memory = memory_per_process(
            MoLMConfig.preset(given.preset),
            processes,
            lanes=given.lanes,
            micro_batches=given.micro_batches,
            recompute=given.activation_checkpointing,
            autocast=DTYPES[given.dtype],
            gather_dtype=DTYPES[given.gather_dtype],
            reshard=not given.no_reshard,
        )
        cells = [getattr(memory, name) for name in names] + [memory.total]
        print(f"| {processes} | " + " | ".join(f"{cell / 1e9:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
