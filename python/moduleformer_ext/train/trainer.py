"""The training loop's state and step: model, optimiser, history, random state and data position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from moduleformer_ext.data import LaneReader
from moduleformer_ext.distributed import ALONE, Processes, own_device
from moduleformer_ext.files import load_tensors, read_json, save_tensors, to_json, write_file
from moduleformer_ext.models import KVCache, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.shards import MODEL, has_shards, read_shards
from moduleformer_ext.nn import LayerCache
from moduleformer_ext.records import Natural, Record
from moduleformer_ext.surgery import ExpertUsage, routing_penalty, set_trainable
from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.optimizer import build_optimizer, learning_rate
from moduleformer_ext.train.precision import autocast

if TYPE_CHECKING:
    from moduleformer_ext.distributed.checkpoint import BackgroundWrite

TENSORS = "trainer.safetensors"
SCALARS = "trainer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


class StepResult(NamedTuple):
    """Measures of one optimiser step, over all processes."""

    loss: float
    """Cross-entropy, nats per token."""
    aux_loss: float
    """Sum over layers of the auxiliary loss, unweighted."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    load_entropy: float
    """Of the experts, in [0, 1]."""


class Scalars(Record):
    """The part of a checkpoint that is no tensor."""

    step: Natural
    steps: Natural
    position: Natural
    dtype: str


class Trainer:
    """One run in memory. `save` and `load` carry all of it: a continued run takes bitwise the same steps.

    `steps` is the length of the learning-rate schedule, `dtype` "fp32" or "bf16", `base` the weights to start from
    (default: random ones). The reader serves this process's lanes.
    """

    processes: Processes = ALONE

    def __init__(
        self,
        config: TrainConfig,
        model_config: MoLMConfig,
        reader: LaneReader,
        *,
        steps: int,
        dtype: str,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.reader = reader
        self.steps = steps
        self.dtype = dtype
        self.step = 0
        self.device = own_device(config.device)
        torch.manual_seed(config.seed)
        self.model = self._make_model(model_config, base).train()
        self.model.set_activation_checkpointing(config.activation_checkpointing)
        self.optimizer = build_optimizer(self.model, config)
        self._histories: list[KVCache | None] = [None] * config.micro_batches

    def _make_model(self, model_config: MoLMConfig, base: Mapping[str, Tensor] | None) -> MoLMForCausalLM:
        model = MoLMForCausalLM(model_config).to(self.device)
        if base is not None:
            model.load_state_dict(base)
        set_trainable(model, self.config.trainable, embedding=self.config.train_embedding)
        if self.config.compile:
            compile_blocks(model)
        return model

    @property
    def history(self) -> KVCache | None:
        """What this process's lanes remember."""
        caches = [cache for cache in self._histories if cache is not None]
        if len(caches) < 2:
            return caches[0] if caches else None
        return KVCache([_beside(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)])

    @history.setter
    def history(self, history: KVCache | None) -> None:
        parts = self.config.micro_batches
        if history is None or parts == 1:
            self._histories = [history] * parts
        else:
            assert history.batch_size is not None
            rows = torch.arange(history.batch_size, device=self.device).chunk(parts)
            self._histories = [history.select(each) for each in rows]

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self.reader.num_tokens * self.processes.size

    def take_step(self) -> StepResult:
        """Read the next segment of every lane and take one optimiser step on it."""
        rate = learning_rate(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = (block.to(self.device) for block in self.reader.next())
        parts = self.config.micro_batches
        loss, aux_loss, usage = 0.0, 0.0, ExpertUsage()
        for part, segment in enumerate(zip(inputs.chunk(parts), targets.chunk(parts), strict=True)):
            part_loss, part_aux_loss = self._backward(part, *segment, usage)
            loss, aux_loss = loss + part_loss / parts, aux_loss + part_aux_loss / parts
        loss, aux_loss, usage = self._over_processes(loss, aux_loss, usage)
        norm = self._clip()
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"train: the gradient of step {self.step} is not finite (loss {loss:g}); "
                f"a lower learning_rate than {self.config.learning_rate:g} may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return StepResult(loss, aux_loss, norm.item(), rate, usage.load_entropy())

    def _backward(self, part: int, inputs: Tensor, targets: Tensor, usage: ExpertUsage) -> tuple[float, float]:
        """Add the gradients of one micro-batch; its cross-entropy and routing loss."""
        with autocast(self.device, self.dtype):
            output = self.model(
                inputs,
                past_key_values=self._histories[part],
                use_cache=True,
                shift_labels=targets,
                skip_logits=True,
                output_routes=True,
            )
        loss, objective = output.cross_entropy, output.loss
        if self.config.routing_penalty:
            penalty = routing_penalty(self.model, output.routes, self.config.routing_penalty_kind)
            objective = objective + self.config.routing_penalty * penalty
        (objective / self.config.micro_batches).backward()
        self._histories[part] = output.past_key_values
        usage.add(output.routes)
        return loss.item(), output.aux_loss.item()

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is then clipped."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)

    def _over_processes(self, loss: float, aux_loss: float, usage: ExpertUsage) -> tuple[float, float, ExpertUsage]:
        return loss, aux_loss, usage

    def save(self, directory: Path) -> "BackgroundWrite | None":
        """Write the model, in its own format, and beside it the rest of the state. What is returned, if anything, is
        still at it.
        """
        self.model.save_pretrained(directory)
        tensors = {f"history.{name}": tensor for name, tensor in self._history_tensors().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._moments().items()}
        tensors |= {f"rng.{name}": state for name, state in self._random().items()}
        save_tensors(directory / TENSORS, tensors)
        self._write_scalars(directory)
        return None

    def _write_scalars(self, directory: Path) -> None:
        state = Scalars(step=self.step, steps=self.steps, position=self.reader.position, dtype=self.dtype)
        write_file(directory / SCALARS, to_json(state))

    def _read_scalars(self, directory: Path) -> Scalars:
        try:
            scalars = read_json(directory / SCALARS, Scalars)
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint: '{directory}' cannot be read: {error}") from error
        for name, stored_value, own in (("steps", scalars.steps, self.steps), ("dtype", scalars.dtype, self.dtype)):
            if stored_value != own:
                raise ValueError(f"checkpoint: '{directory}' has {name} {stored_value}, but the run has {own}")
        return scalars

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote, of one process or several; the trainer must have been made with the same
        configuration.
        """
        scalars = self._read_scalars(directory)
        try:
            tensors = _read_state(directory)
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint: '{directory}' cannot be read: {error}") from error
        if "rng.cpu" not in tensors:
            raise ValueError(f"checkpoint: '{directory}' must hold a random state (rng.cpu), got none")
        stored = MoLMForCausalLM.from_pretrained(directory).state_dict()
        check_matching(directory, _shapes(self.model.state_dict()), _shapes(stored))
        self.model.load_state_dict(stored)
        self._load_moments(directory, tensors, scalars.step)
        self._load_history(tensors)
        self._set_random(tensors)
        self.step = scalars.step
        self.reader.position = scalars.position

    def _random(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_random(self, tensors: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(tensors["rng.cpu"].clone())  # torch reads the storage from its beginning
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"].clone(), self.device)

    def _moments(self) -> dict[str, Tensor]:
        """AdamW's state; its step count is ours."""
        return {
            f"{moment}.{name}": self.optimizer.state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state
            for moment in MOMENTS
        }

    def _make_moments(self, step: int) -> None:
        """AdamW's state as it is after some steps, with moments of 0."""
        for parameter in self.model.parameters():
            if step and parameter.requires_grad:
                zeros = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=self.device), **zeros}

    def _load_moments(self, directory: Path, tensors: dict[str, Tensor], step: int) -> None:
        self._make_moments(step)
        prefix = "optimizer."
        stored = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        own = self._moments()
        check_matching(directory, *map(_shapes, (own, stored)))
        for name, moment in own.items():
            moment.copy_(stored[name])

    def _history_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for layer, cache in enumerate(self.history.layers if self.history else ()):
            tensors[f"{layer}.keys"] = cache.keys
            if cache.values is not None:
                tensors[f"{layer}.values"] = cache.values
        return tensors

    def _load_history(self, tensors: dict[str, Tensor]) -> None:
        caches = []
        for layer in range(self.model.config.n_layer):
            if (keys := tensors.get(f"history.{layer}.keys")) is not None:
                values = tensors.get(f"history.{layer}.values")
                values = None if values is None else values.to(self.device)
                caches.append(LayerCache.of(keys.to(self.device), values))
        self.history = KVCache(caches) if caches else None


def compile_blocks(model: MoLMForCausalLM) -> None:
    """``torch.compile`` the attention and the experts of each layer, where they are; before a model is sharded."""
    for block in model.transformer.h:
        for part in (block.attn, block.mlpf):
            cast(nn.Module, part).compile()


def _beside(layers: Sequence[LayerCache]) -> LayerCache:
    """The sequences of several caches in one."""
    values = [layer.values for layer in layers if layer.values is not None]
    return LayerCache.of(torch.cat([layer.keys for layer in layers]), torch.cat(values) if values else None)


def _read_state(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but the model's."""
    if not has_shards(directory):
        return load_tensors(directory / TENSORS)
    tensors = read_shards(directory, lambda name: not name.startswith(MODEL))
    for name in ("rng.cpu", "rng.cuda"):
        if name in tensors:
            tensors[name] = tensors[name][0]
    return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_matching(directory: Path, own: Mapping[str, torch.Size], stored: Mapping[str, torch.Size]) -> None:
    """Different names or shapes are an error."""
    different = sorted(own.keys() ^ stored.keys())
    different += sorted(name for name in own.keys() & stored.keys() if own[name] != stored[name])
    if different:
        raise ValueError(
            f"checkpoint: '{directory}' is of another model; these are missing or of another shape: "
            f"{', '.join(different[:5])}{', ...' if len(different) > 5 else ''}"
        )
