"""The language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moduleformer_ext.models import checkpoint as files
from moduleformer_ext.models import generation
from moduleformer_ext.models.blocks import draw, make_block, redraw, routing_loss
from moduleformer_ext.models.cache import KVCache, Pair, StaticKVCache
from moduleformer_ext.models.config import MoLMConfig
from moduleformer_ext.models.state import HEADS, canonical_state, model_from_state
from moduleformer_ext.nn import BlockRoutes, LayerCache, Linear, StaticLayerCache, head_cross_entropy
from moduleformer_ext.nn.stack import decode_stack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from moduleformer_ext.models.generation import GenerationOptions


@dataclass(kw_only=True)
class MoLMOutput:
    """What the stack of blocks computed for input_ids [B, T]."""

    last_hidden_state: Tensor
    """[B, T, D], after the final norm."""
    aux_loss: Tensor | None = None
    """[] float32 (float64 for a float64 model): the routing loss summed over all routers of all layers, unweighted.
    None only with ``output_aux_loss=False`` and no labels."""
    past_key_values: KVCache | StaticKVCache | None = None
    """If ``use_cache``: past and new tokens. In training mode only the last ``config.history_length`` of them, unless
    the past is static."""
    hidden_states: tuple[Tensor, ...] | None = None
    """If ``output_hidden_states``: the input of every block and ``last_hidden_state``, n_layer + 1 tensors."""
    routes: list[BlockRoutes] | None = None
    """If ``output_routes``: per layer, how attention and feed-forward experts were chosen for the B·T tokens."""


@dataclass(kw_only=True)
class CausalLMOutput(MoLMOutput):
    """What the language model computed for input_ids [B, T]."""

    logits: Tensor | None
    """[B, T, V] float32; [B, N, V] with ``logits_at``. None with ``skip_logits``."""
    uncast_logits: Tensor | None
    """The same as the head made them, in the model's type."""
    cross_entropy: Tensor | None = None
    """If labels were given: [], the mean over them in nats, in the type of ``aux_loss``."""
    loss: Tensor | None = None
    """If labels were given: cross_entropy + aux_loss_weight · aux_loss."""


# As pytrees they go through DDP, FSDP and torch.export.
for _output in (MoLMOutput, CausalLMOutput):
    torch.export.register_dataclass(_output, serialized_type_name=f"moduleformer_ext.models.{_output.__name__}")


class MoLM(nn.Module):
    """Embedding, blocks and final norm of a ModuleFormer language model.

    Args:
        config: the model's description. Weights start as in the published training: linear and embedding weights
            N(0, initializer_range), expert matrices U(-1/in, 1/in), gmm centroids N(0, 1), biases and temperatures 0.
    """

    def __init__(self, config: MoLMConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.routing_group: ProcessGroup | None = None
        """The processes over whose tokens together the routing loss is taken; None: over this process's own."""
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(make_block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(lambda module: draw(module, config.initializer_range))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | StaticKVCache | Sequence[Pair] | None = None,
        use_cache: bool = False,
        *,
        output_aux_loss: bool = True,
        output_hidden_states: bool = False,
        output_routes: bool = False,
    ) -> MoLMOutput:
        """Read new tokens. Arguments are those of :meth:`MoLMForCausalLM.forward`."""
        if input_ids.dim() != 2:
            raise ValueError(f"MoLM: input_ids must be [batch, tokens], got shape {list(input_ids.shape)}")
        past = self._as_cache(past_key_values, input_ids.shape[0])
        keep = self._as_key_mask(attention_mask, input_ids, past)

        x = self.drop(self.wte(input_ids))
        states: list[Tensor] = []
        routes: list[BlockRoutes] = []
        presents: list[LayerCache | StaticLayerCache] = []
        wants_routes = output_aux_loss or output_routes
        decoded = None
        if past is not None and not (wants_routes or output_hidden_states):
            decoded = decode_stack(self.h, x, past.layers, keep)
        if decoded is not None:
            x, presents = decoded
        for layer, block in enumerate(self.h if decoded is None else ()):
            if output_hidden_states:
                states.append(x)
            arguments = (x, None if past is None else past.layers[layer], keep, use_cache, wants_routes)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, route, present = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, route, present = block(*arguments)
            routes.append(route)
            if use_cache:
                presents.append(present)
        x = self.ln_f(x)
        states.append(x)

        return MoLMOutput(
            last_hidden_state=x,
            aux_loss=routing_loss(self.config.aux_loss_type, routes, self.routing_group) if output_aux_loss else None,
            past_key_values=self._remember(past, presents) if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            routes=routes if output_routes else None,
        )

    @classmethod
    def from_reference(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoLM:
        """The model below the head of a published checkpoint, which may be a classifier's (``score.weight``).

        Arguments, result and errors are those of :meth:`MoLMForCausalLM.from_reference`; the head stays in
        ``state_dict``.
        """
        state = {name.removeprefix("transformer."): t for name, t in state_dict.items() if name not in HEADS}
        return model_from_state(cls, MoLMConfig.from_reference(config).replace(tie_word_embeddings=False), state)

    def _remember(
        self, past: KVCache | StaticKVCache | None, presents: list[LayerCache | StaticLayerCache]
    ) -> KVCache | StaticKVCache:
        if isinstance(past, StaticKVCache):
            return past
        cache = KVCache(cast("list[LayerCache]", presents))
        return cache.last(self.config.history_length) if self.training else cache

    def _as_cache(
        self, past: KVCache | StaticKVCache | Sequence[Pair] | None, batch: int
    ) -> KVCache | StaticKVCache | None:
        if past is None:
            return None
        if not isinstance(past, (KVCache, StaticKVCache)):
            identity_kv = self.config.identity_kv
            past = KVCache.from_pairs(past, n_head=self.config.n_head, identity_kv=identity_kv)
        if len(past) != len(self.h):
            raise ValueError(f"MoLM: past_key_values must have {len(self.h)} layers, got {len(past)}")
        if past.batch_size not in (None, batch):
            raise ValueError(
                f"MoLM: past_key_values must have the batch size of input_ids ({batch}), got {past.batch_size}"
            )
        return past

    def _as_key_mask(
        self, mask: Tensor | None, input_ids: Tensor, past: KVCache | StaticKVCache | None
    ) -> Tensor | None:
        if mask is None:
            return None
        batch, keys = input_ids.shape
        if isinstance(past, StaticKVCache):
            keys, meaning = past.capacity, "batch, capacity of the past"
        else:
            keys, meaning = keys + (0 if past is None else past.length), "batch, past + new tokens"
        if mask.shape != (batch, keys):
            raise ValueError(f"MoLM: attention_mask must be [{batch}, {keys}] ({meaning}), got {list(mask.shape)}")
        return mask.bool()


class MoLMForCausalLM(nn.Module):
    """A ModuleFormer language model with its head.

    Parameters are named and shaped as in the published checkpoints.

    Example:
        >>> model = MoLMForCausalLM(MoLMConfig.preset("molm-nano"))
        >>> tokens = torch.randint(1024, (1, 16))
        >>> output = model(tokens, labels=tokens)
        >>> output.logits.shape
        torch.Size([1, 16, 1024])
        >>> output.loss.backward()
        >>> model.eval().generate(tokens, max_new_tokens=4).shape
        torch.Size([1, 20])
    """

    def __init__(self, config: MoLMConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = MoLM(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        draw(self.lm_head, config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KVCache | StaticKVCache | Sequence[Pair] | None = None,
        use_cache: bool = False,
        *,
        shift_labels: Tensor | None = None,
        skip_logits: bool = False,
        logits_at: Tensor | None = None,
        output_aux_loss: bool = True,
        output_hidden_states: bool = False,
        output_routes: bool = False,
    ) -> CausalLMOutput:
        """Read new tokens and predict the one after each.

        Args:
        input_ids: [B, T] int64, the new tokens.
        attention_mask: [B, past + T], non-zero for tokens that may be attended to. Padding, on either side, is still
        routed and counted by the routing loss.
        labels: [B, T] int64, usually input_ids themselves: position t is scored against labels[:, t + 1]; -100 is
        skipped.
        past_key_values: what an earlier call returned. No gradient flows into it.
        use_cache: return ``past_key_values`` for the next call. In training mode it is the history of
        Transformer-XL, cut to ``config.history_length`` tokens; in evaluation mode nothing is cut.
        shift_labels: [B, T] int64, in place of labels: position t is scored against shift_labels[:, t].
        skip_logits: return no logits. The loss is then :func:`moduleformer_ext.ops.linear_cross_entropy`, which
        never holds them as a whole; where the head is more than its weight (adapters, hooks, quantisation) they are
        made and dropped.
        logits_at: [B, N] int64, the only positions of each sequence to compute logits for.
        output_aux_loss: return the routing loss. Decoding saves a tenth of its time without.
        output_hidden_states: return the input of every block.
        output_routes: return every routing decision.

        Raises:
        ValueError: shapes do not fit together.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("MoLMForCausalLM: labels must be None where shift_labels are given, got both")
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"MoLMForCausalLM: {name} must have the shape of input_ids {list(input_ids.shape)}, "
                    f"got {list(given.shape)}"
                )
            if given is not None and logits_at is not None:
                raise ValueError(f"MoLMForCausalLM: logits_at must be None where {name} are given, got both")
        target = shift_labels if labels is None else labels[:, 1:]
        if skip_logits and logits_at is not None:
            raise ValueError("MoLMForCausalLM: logits_at must be None with skip_logits, got both")
        output = self.transformer(
            input_ids,
            attention_mask,
            past_key_values,
            use_cache,
            output_aux_loss=output_aux_loss or target is not None,
            output_hidden_states=output_hidden_states,
            output_routes=output_routes,
        )
        state = output.last_hidden_state
        if logits_at is not None:
            state = state.gather(1, logits_at[:, :, None].expand(-1, -1, state.shape[2]))
        uncast_logits = None if skip_logits else self.lm_head(state)
        logits = None if uncast_logits is None else uncast_logits.float()
        cross_entropy = loss = None
        if target is not None:
            length = target.shape[1]  # without the last position where the labels are not shifted
            if logits is None:
                cross_entropy = head_cross_entropy(self.lm_head, state[:, :length], target)
            else:
                # Summed in the published order: float32 sums in another order differ in the seventh digit.
                cross_entropy = F.cross_entropy(logits[:, :length].flatten(0, 1), target.flatten())
            loss = cross_entropy = cross_entropy.to(output.aux_loss.dtype)
            if self.config.aux_loss_weight > 0:
                loss = loss + self.config.aux_loss_weight * output.aux_loss
        return CausalLMOutput(
            last_hidden_state=output.last_hidden_state,
            aux_loss=output.aux_loss,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            routes=output.routes,
            logits=logits,
            uncast_logits=uncast_logits,
            cross_entropy=cross_entropy,
            loss=loss,
        )

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Unpack[GenerationOptions]) -> Tensor:
        """Continue prompts; see :func:`moduleformer_ext.models.generation.generate`."""
        return generation.generate(self, input_ids, max_new_tokens, **options)

    def generate_stream(
        self, input_ids: Tensor, max_new_tokens: int, **options: Unpack[GenerationOptions]
    ) -> Iterator[Tensor]:
        """Continue prompts token by token; see :func:`moduleformer_ext.models.generation.generate_stream`."""
        return generation.generate_stream(self, input_ids, max_new_tokens, **options)

    def reset_parameters(self) -> None:
        """Draw all weights anew, for example after ``to_empty`` of a model made on the meta device."""
        for module in self.modules():
            redraw(module, self.config.initializer_range)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Trade a second forward pass of every block for the memory of its activations."""
        self.transformer.activation_checkpointing = enabled

    def set_routing_group(self, group: ProcessGroup | None) -> None:
        """Take the routing loss of the whole batch where it is split over processes, each of which sees a part of it.

        Every pass that returns ``aux_loss`` then has one all-reduce of a few numbers per expert, which all processes of
        the group take part in. ``aux_loss`` is the same on all of them, and gradients that are averaged over the group,
        as DDP and FSDP do, are those of one process with the whole batch. None: each process takes the loss of its own
        tokens, the mean of which is another function.
        """
        self.transformer.routing_group = group

    @classmethod
    def from_state(
        cls,
        config: MoLMConfig,
        state_dict: Mapping[str, Tensor],
        *,
        copy: bool = True,
        dtype: torch.dtype | None = None,
    ) -> MoLMForCausalLM:
        """The model of ``config`` with exactly these weights, in evaluation mode; see
        :func:`moduleformer_ext.models.state.model_from_state` for arguments and errors.
        """
        if "score.weight" in state_dict and "lm_head.weight" not in state_dict:
            raise ValueError(
                "from_reference: state_dict must hold a language model, got a sequence classifier's (score.weight and "
                "no lm_head.weight); MoLM.from_reference reads the model below that head, a Linear without bias on "
                "last_hidden_state"
            )
        model = model_from_state(cls, config, state_dict, copy=copy, dtype=dtype)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_reference(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MoLMForCausalLM:
        """A model with published weights, from the fields of a config.json and all tensors; as :meth:`from_state`."""
        return cls.from_state(MoLMConfig.from_reference(config), state_dict)

    def to_reference(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(config, state dict) as published.

        The tensors are the model's own, detached; see :func:`moduleformer_ext.models.state.canonical_state`.
        """
        state = canonical_state(self)
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        return self.config.to_reference(), state

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config and weights; see :func:`moduleformer_ext.models.checkpoint.save_pretrained`."""
        files.save_pretrained(self, directory)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> MoLMForCausalLM:
        """Read a directory that :meth:`save_pretrained` wrote, or one of a published MoLM as it is downloaded; see
        :func:`moduleformer_ext.models.checkpoint.read_pretrained`.

        Args:
            dtype: convert the weights; by default they keep the type they are stored in.
            device: where the weights go.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing; the message says which.
            ValueError: the weights do not fit the configuration or are of several types; the message lists the
                tensors.
        """
        config, state = files.read_pretrained(directory)
        try:
            model = cls.from_state(config, state, copy=False, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"from_pretrained: '{directory}': {error}") from error
        return model.to(device)
