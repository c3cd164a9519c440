"""The training state of one process among several: a part of the model, and a part of the lanes."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moduleformer_ext.data import LaneReader
from moduleformer_ext.distributed import Processes
from moduleformer_ext.distributed.checkpoint import BackgroundWrite, by_lanes, empty_by_lanes, load_shards, save_shards
from moduleformer_ext.distributed.sharding import DTYPES, draw_weights, fill, load_weights, shard_model
from moduleformer_ext.files import load_tensors, to_json, write_file
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.checkpoint import CONFIG_FILE, StoredWeights
from moduleformer_ext.models.shards import HISTORY, MODEL, RANDOM, described_shards, has_shards
from moduleformer_ext.surgery import ExpertUsage, set_trainable
from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.evaluation import total_usage
from moduleformer_ext.train.optimizer import mesh_of
from moduleformer_ext.train.trainer import TENSORS, Trainer, check_matching, compile_blocks

_OPTIMIZER = "optimizer."
_APART = 1_000_003
"""Between the seeds of two processes."""


class ShardedTrainer(Trainer):
    """A :class:`Trainer` whose methods all processes call together.

    The steps are those that one process takes with all lanes, up to the order of sums: the first weights, the data and,
    with ``routing_loss_over="batch"``, the loss are the same. What is drawn at random in training, dropout and sampled
    experts, is drawn by each process for its own lanes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: MoLMConfig,
        reader: LaneReader,
        processes: Processes,
        *,
        steps: int,
        dtype: str,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert processes.mesh is not None
        self.processes = processes
        self.mesh: DeviceMesh = processes.mesh
        self.expert_mesh: DeviceMesh | None = None
        if (experts := config.expert_parallel) > 1:
            shape = (processes.size // experts, experts)
            self.expert_mesh = init_device_mesh(self.mesh.device_type, shape, mesh_dim_names=("data", "expert"))
        super().__init__(config, model_config, reader, steps=steps, dtype=dtype, base=base)
        if config.routing_loss_over == "batch":
            self.model.set_routing_group(self.mesh.get_group())
        self._background = dist.new_group(backend="gloo") if config.background_checkpoints else None
        self._draw_apart(config.seed)

    def _make_model(self, model_config: MoLMConfig, base: Mapping[str, Tensor] | None) -> MoLMForCausalLM:
        config = self.config
        with torch.device("meta"):
            model = MoLMForCausalLM(model_config)
        set_trainable(model, config.trainable, embedding=config.train_embedding)
        if config.compile:
            compile_blocks(model)
        shard_model(
            model,
            self.mesh,
            expert_mesh=self.expert_mesh,
            gather_dtype=DTYPES[config.gather_dtype],
            reshard=config.reshard,
        )
        model.to_empty(device=self.device)
        if base is None:
            draw_weights(model)
        else:
            load_weights(model, base.__getitem__)
        return model

    def _draw_apart(self, seed: int) -> None:
        """The first process goes on as one alone would; each of the others has draws of its own."""
        if self.processes.rank:
            torch.manual_seed((seed + _APART * self.processes.rank) % 2**63)

    def _clip(self) -> Tensor:
        by_mesh: dict[object, list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
        norms = [get_total_norm([p.grad for p in part if p.grad is not None]) for part in by_mesh.values()]
        wholes = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = get_total_norm(wholes) if len(wholes) > 1 else wholes[0]
        for part in by_mesh.values():
            clip_grads_with_norm_(part, self.config.clip_norm, norm)
        return norm

    def _over_processes(self, loss: float, aux_loss: float, usage: ExpertUsage) -> tuple[float, float, ExpertUsage]:
        losses = self.processes.total([loss, aux_loss])
        loss, aux_loss = (value / self.processes.size for value in losses)
        return loss, aux_loss, total_usage(usage, self.processes)

    def save(self, directory: Path) -> BackgroundWrite | None:
        """Write this process's part of the state; the first one also writes the model's configuration."""
        if self.processes.is_first:
            write_file(directory / CONFIG_FILE, to_json(self.model.config.to_file()))
            self._write_scalars(directory)
        tensors = {f"{MODEL}{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        tensors |= {f"{_OPTIMIZER}{name}": moment for name, moment in self._moments().items()}
        tensors |= {f"{HISTORY}{name}": by_lanes(t, self.mesh) for name, t in self._history_tensors().items()}
        tensors |= {f"{RANDOM}{name}": by_lanes(state[None], self.mesh) for name, state in self._random().items()}
        return save_shards(directory, tensors, background=self._background)

    def load(self, directory: Path) -> None:
        """Continue from what any number of processes wrote."""
        scalars = self._read_scalars(directory)
        self._make_moments(scalars.step)
        if has_shards(directory):
            self._load_shards(directory, scalars.step)
        else:
            self._load_whole(directory)
        self.step = scalars.step
        self.reader.position = scalars.position

    def _load_shards(self, directory: Path, step: int) -> None:
        stored = described_shards(directory)
        own = {f"{MODEL}{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        own |= {f"{_OPTIMIZER}{name}": moment for name, moment in self._moments().items()}
        weights = {name: tensor.size for name, tensor in stored.items() if name.startswith((MODEL, _OPTIMIZER))}
        check_matching(directory, {name: tensor.shape for name, tensor in own.items()}, weights)
        history = {
            name: empty_by_lanes(tensor.size, tensor.properties.dtype, self.mesh)
            for name, tensor in stored.items()
            if name.startswith(HISTORY)
        }
        random = {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in stored.items()
            if name.startswith(RANDOM)
        }
        load_shards(directory, own | history | random)
        self._load_history({name: tensor.to_local() for name, tensor in history.items()})
        if self.processes.rank < len(random[f"{RANDOM}cpu"]):
            self._set_random({name: states[self.processes.rank] for name, states in random.items()})
        else:
            self._draw_apart(self.config.seed + step)

    def _load_whole(self, directory: Path) -> None:
        """From the checkpoint of one process without torchrun."""
        weights, tensors = StoredWeights(directory), load_tensors(directory / TENSORS)
        load_weights(self.model, weights.__getitem__)
        own = self._moments()
        stored = {name.removeprefix(_OPTIMIZER): t for name, t in tensors.items() if name.startswith(_OPTIMIZER)}
        check_matching(directory, *({name: t.shape for name, t in moments.items()} for moments in (own, stored)))
        for name, moment in own.items():
            fill(moment, stored[name])
        history = {name: tensor for name, tensor in tensors.items() if name.startswith(HISTORY)}
        self._load_history({name: tensor[self.processes.own_part(len(tensor))] for name, tensor in history.items()})
        if self.processes.is_first:
            self._set_random({name: tensor for name, tensor in tensors.items() if name.startswith(RANDOM)})
