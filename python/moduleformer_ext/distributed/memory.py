"""What one process of a training run holds in memory, calculated from the configuration alone.

`python -m moduleformer_ext.distributed.memory molm-4b-k2 --processes 8 64` prints it. Activations are not estimated:
the model runs on tensors without contents, and what autograd keeps is added up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moduleformer_ext.distributed.expert_parallel import BalancedExchange
from moduleformer_ext.distributed.sharding import DTYPES, Unit, blocks, units
from moduleformer_ext.distributed.traffic import sent_for_parameters, sent_for_tokens
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
    """Whole parameters at the peak, of what is outside of the layers, the unit that is computed with and the next one
    (with expert parallelism of a whole layer, own experts alone, and the next one without its experts); and the whole
    gradient of one unit."""
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
    expert_parallel: int = 1,
) -> MemoryPerProcess:
    """The memory of one of several processes.

    Args:
        lanes: of this process.
        micro_batches, recompute, gather_dtype, reshard, expert_parallel: as the options of training have them. Of
            uneven experts the most are counted that a process has; of tokens, that each process gets as many as it
            sends.
        autocast: the type of products, or None.

    Raises:
        ValueError: lanes that micro-batches do not divide, or processes that expert_parallel does not divide.
    """
    if processes % expert_parallel:
        raise ValueError(
            f"memory_per_process: expert_parallel must divide the {processes} processes, got {expert_parallel}"
        )
    if lanes % micro_batches:
        raise ValueError(f"memory_per_process: lanes must be a multiple of {micro_batches} micro-batches, got {lanes}")
    with FakeTensorMode():
        model = _model(config, gather_dtype)
        model.set_activation_checkpointing(recompute)
        if expert_parallel > 1:
            for layer in (layer for block in blocks(model) for layer in (block.attn.q_proj, block.mlpf)):
                layer.exchange = BalancedExchange(layer.gate.num_experts, expert_parallel)
        batch = lanes // micro_batches
        past, past_bytes = _past(config, batch, autocast)
        activations = _kept(lambda: _forward(model, batch, past, autocast), model)
        if recompute:
            x = torch.empty(batch, config.block_size, config.n_embd, dtype=gather_dtype, requires_grad=True)
            activations += _kept(lambda: _block(model.transformer.h[0], x, past, autocast), model)
    found = [_Sizes.of(unit, processes, expert_parallel) for unit in units(model, expert_parallel=expert_parallel > 1)]
    own = sum(unit.own for unit in found)
    return MemoryPerProcess(
        parameters=_FLOAT * own,
        gradients=_FLOAT * own,
        optimizer=2 * _FLOAT * own,
        gathered=0 if processes == 1 else _gathered(found, gather_dtype, reshard, config.n_layer),
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


class _Sizes(NamedTuple):
    """The elements of a unit on one process."""

    whole: int
    """While they are computed with."""
    own: int
    unit: Unit

    @classmethod
    def of(cls, unit: Unit, processes: int, expert_parallel: int) -> _Sizes:
        if not unit.spread:
            whole = sum(parameter.numel() for parameter in unit.parameters)
            return cls(whole, -(-whole // processes), unit)
        whole = sum(-(-p.shape[0] // expert_parallel) * p.shape[1:].numel() for p in unit.parameters)
        return cls(whole, -(-whole // (processes // expert_parallel)), unit)


def _gathered(found: list[_Sizes], gather_dtype: torch.dtype | None, reshard: bool, layers: int) -> int:
    size = _FLOAT if gather_dtype is None else gather_dtype.itemsize
    in_layers = [unit.whole for unit in found if unit.unit.in_layer]
    outside = sum(unit.whole for unit in found) - sum(in_layers)
    at_once = sum(in_layers)
    if reshard and any(unit.unit.spread for unit in found):
        each = len(in_layers) // layers
        of_layers = [in_layers[start : start + each] for start in range(0, len(in_layers), each)]
        at_once = max(map(sum, of_layers)) + (max(layer[-1] for layer in of_layers) if layers > 1 else 0)
    elif reshard:
        at_once = sum(sorted(in_layers)[-2:])
    return size * (outside + at_once) + _FLOAT * max(unit.whole for unit in found)


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
    parser.add_argument("--expert-parallel", type=int, default=1, metavar="N")
    given = parser.parse_args(words)
    names = [field.name for field in fields(MemoryPerProcess)]
    print("| processes | " + " | ".join(names) + " | total, GB | sent per step, GB |")
    print("|---" * (len(names) + 3) + "|")
    config = MoLMConfig.preset(given.preset)
    for processes in given.processes:
        memory = memory_per_process(
            config,
            processes,
            lanes=given.lanes,
            micro_batches=given.micro_batches,
            recompute=given.activation_checkpointing,
            autocast=DTYPES[given.dtype],
            gather_dtype=DTYPES[given.gather_dtype],
            reshard=not given.no_reshard,
            expert_parallel=given.expert_parallel,
        )
        cells = [getattr(memory, name) for name in names] + [memory.total, _sent(config, processes, given)]
        print(f"| {processes} | " + " | ".join(f"{cell / 1e9:.2f}" for cell in cells) + " |")


def _sent(config: MoLMConfig, processes: int, given: argparse.Namespace) -> float:
    """The fewest bytes of one process for one step; without what micro-batches gather again."""
    with torch.device("meta"):
        model = MoLMForCausalLM(config)
    gathered, rows = (_FLOAT if DTYPES[dtype] is None else 2 for dtype in (given.gather_dtype, given.dtype))
    spread = given.expert_parallel
    of_parameters = sent_for_parameters(
        model, processes, expert_parallel=spread, reshard=not given.no_reshard, size=gathered
    )
    recompute = given.activation_checkpointing
    tokens = given.lanes * config.block_size
    of_tokens = sent_for_tokens(config, tokens, expert_parallel=spread, recompute=recompute, size=rows)
    return sum(of_parameters.values()) + of_tokens


if __name__ == "__main__":
    main()
