"""The training loop's state and step: model, optimiser, history, random state and data position."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moduleformer_ext.data import LaneReader
from moduleformer_ext.files import load_tensors, read_json, save_tensors, to_json, write_file
from moduleformer_ext.models import KVCache, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import LayerCache
from moduleformer_ext.records import Natural, Record
from moduleformer_ext.surgery import load_entropy, routing_penalty, set_trainable
from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.optimizer import build_optimizer, learning_rate
from moduleformer_ext.train.precision import autocast

_TENSORS = "trainer.safetensors"
_SCALARS = "trainer.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StepResult(NamedTuple):
    """Measures of one optimiser step."""

    loss: float
    """Cross-entropy, nats per token."""
    aux_loss: float
    """Sum over layers of the auxiliary loss, unweighted."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    load_entropy: float
    """Of the experts, in [0, 1]."""


class _Scalars(Record):
    step: Natural
    steps: Natural
    position: Natural
    dtype: str


class Trainer:
    """One run in memory. `save` and `load` carry all of it: a continued run takes bitwise the same steps.

    `steps` is the length of the learning-rate schedule, `dtype` "fp32" or "bf16", `base` the weights to start from
    (default: random ones).
    """

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
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = MoLMForCausalLM(model_config).to(self.device).train()
        if base is not None:
            self.model.load_state_dict(base)
        set_trainable(self.model, config.trainable, embedding=config.train_embedding)
        self.optimizer = build_optimizer(self.model, config)
        self.history: KVCache | None = None

    def take_step(self) -> StepResult:
        """Read the next segment of every lane and take one optimiser step on it."""
        rate = learning_rate(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = (block.to(self.device) for block in self.reader.next())
        with autocast(self.device, self.dtype):
            output = self.model(inputs, past_key_values=self.history, use_cache=True, output_routes=True)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
        objective = loss + self.model.config.aux_loss_weight * output.aux_loss
        if self.config.routing_penalty:
            penalty = routing_penalty(self.model, output.routes, self.config.routing_penalty_kind)
            objective = objective + self.config.routing_penalty * penalty
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"train: the gradient of step {self.step} is not finite (loss {loss.item():g}); "
                f"a lower learning_rate than {self.config.learning_rate:g} may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.history = output.past_key_values
        self.step += 1
        return StepResult(loss.item(), output.aux_loss.item(), norm.item(), rate, load_entropy(output.routes))

    def save(self, directory: Path) -> None:
        """Write the model, in its own format, and beside it the rest of the state."""
        self.model.save_pretrained(directory)
        tensors = {f"history.{name}": tensor for name, tensor in self._history_tensors().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._moments().items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        save_tensors(directory / _TENSORS, tensors)
        state = _Scalars(step=self.step, steps=self.steps, position=self.reader.position, dtype=self.dtype)
        write_file(directory / _SCALARS, to_json(state))

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote; the trainer must have been made with the same configuration."""
        try:
            scalars = read_json(directory / _SCALARS, _Scalars)
            tensors = load_tensors(directory / _TENSORS)
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint: '{directory}' cannot be read: {error}") from error
        for name, stored_value, own in (("steps", scalars.steps, self.steps), ("dtype", scalars.dtype, self.dtype)):
            if stored_value != own:
                raise ValueError(f"checkpoint: '{directory}' has {name} {stored_value}, but the run has {own}")
        if "rng.cpu" not in tensors:
            raise ValueError(f"checkpoint: '{directory / _TENSORS}' has no random state")
        stored = MoLMForCausalLM.from_pretrained(directory).state_dict()
        _check_matching(directory, self.model.state_dict(), stored)
        self.model.load_state_dict(stored)
        self._load_moments(directory, tensors, scalars.step)
        self._load_history(tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step = scalars.step
        self.reader.position = scalars.position

    def _moments(self) -> dict[str, Tensor]:
        """AdamW's state; its step count is ours."""
        return {
            f"{moment}.{name}": self.optimizer.state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state
            for moment in _MOMENTS
        }

    def _load_moments(self, directory: Path, tensors: dict[str, Tensor], step: int) -> None:
        for parameter in self.model.parameters():
            if step and parameter.requires_grad:
                zeros = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **zeros}
        prefix = "optimizer."
        stored = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        own = self._moments()
        _check_matching(directory, own, stored)
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


def _check_matching(directory: Path, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Different names or shapes are an error."""
    different = sorted(own.keys() ^ stored.keys())
    different += sorted(name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape)
    if different:
        raise ValueError(
            f"checkpoint: '{directory}' is of another model; these are missing or of another shape: "
            f"{', '.join(different[:5])}{', ...' if len(different) > 5 else ''}"
        )
