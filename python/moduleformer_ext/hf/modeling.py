"""MoLM's modules, under their published names, with the calling conventions of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from moduleformer_ext.hf.cache import ModuleFormerCache, ModuleFormerStaticCache, cache_layers
from moduleformer_ext.hf.config import ModuleFormerConfig
from moduleformer_ext.models.blocks import make_block, redraw, routing_loss
from moduleformer_ext.nn import Block, BlockRoutes, Linear, head_cross_entropy
from moduleformer_ext.nn.stack import decode_stack
from moduleformer_ext.types import RouteTopK

logger = logging.get_logger(__name__)

_fields = {field.name for field in dataclasses.fields(MoeModelOutputWithPast)}
CACHE = "cache" if "cache" in _fields else "past_key_values"
"""What outputs and generation call the cache; transformers 5.24 renamed it."""


@dataclass
class ModuleFormerModelOutput(MoeModelOutputWithPast):
    """``router_logits``: those of each layer's attention and feed-forward experts, 2 · n_layer tensors [B · T, E]."""

    aux_loss: Tensor | None = None
    """[]: the routing loss summed over all routers, unweighted, if it was asked for."""


class ModuleFormerBlock(GradientCheckpointingLayer, Block):
    """A block that transformers can recompute in the backward pass."""


class ModuleFormerPreTrainedModel(PreTrainedModel):
    """What all heads share."""

    config_class = ModuleFormerConfig
    config: ModuleFormerConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ModuleFormerBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"attn\.(mask|cum_weight)$"]
    _can_compile_fullgraph = True
    _input_embed_layer = "wte"
    _new_heads: ClassVar[tuple[str, ...]] = ()
    """What a checkpoint need not have."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        redraw(module, self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers, except that a checkpoint without some of the weights is an error.

        Raises:
            ValueError: weights are missing; the message lists them. Or parallel plans are asked for, which a MoLM has
                none of.
        """
        for option in ("tp_plan", "distributed_config"):
            if options.get(option) is not None:
                raise ValueError(f"{cls.__name__}.from_pretrained: {option} must be None for a MoLM; use fully_shard")
        model, info = super().from_pretrained(*args, output_loading_info=True, **options)
        if missing := sorted(set(info["missing_keys"]) - set(cls._new_heads)):
            source = args[0] if args else options.get("pretrained_model_name_or_path")
            raise ValueError(
                f"{cls.__name__}.from_pretrained: '{source}' must hold all weights of its configuration, lacks "
                f"{', '.join(missing)}"
            )
        return (model, info) if output_loading_info else model

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing: use_reentrant must be False for a MoLM, whose routing loss has no gradient "
                "through the other kind, got True"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)


class ModuleFormerModel(ModuleFormerPreTrainedModel):
    """Embedding, blocks and final norm; a call gives a :class:`ModuleFormerModelOutput`."""

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        molm = config.molm
        molm.require_whole_experts("ModuleFormerModel")
        self.wte = nn.Embedding(molm.vocab_size, molm.n_embd)
        self.drop = nn.Dropout(molm.embd_pdrop)
        self.h = nn.ModuleList(make_block(molm, layer, ModuleFormerBlock) for layer in range(molm.n_layer))
        self.ln_f = nn.LayerNorm(molm.n_embd, eps=molm.layer_norm_epsilon)
        self.gradient_checkpointing = False
        if config.router_dtype == "float32":
            self._keep_in_fp32_modules_strict = {"gate"}
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        output_aux_loss: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **options: Any,
    ) -> ModuleFormerModelOutput:
        """Read new tokens, [B, T] int64 or embedded [B, T, D].

        Args:
            attention_mask: [B, past + T], non-zero for tokens that may be attended to; beside a static cache also
                [B, capacity]. Padding may stand anywhere, and is still routed.
            position_ids: ignored, a MoLM has no positions.
            past_key_values, cache: two names of the cache, which is extended in place.
            output_aux_loss: compute the routing loss; by default where router logits are asked for.
            output_hidden_states: return the input of every block and the last state, n_layer + 1 tensors.
            output_router_logits: return those of every router.

        Raises:
            ValueError: arguments do not fit together, or attention weights are asked for, which are never formed.
            TypeError: a kind of cache that a MoLM cannot use.
        """
        if position_ids is not None:
            logger.warning_once("MoLM has no positions: position_ids are ignored.")
        if options.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("ModuleFormerModel: output_attentions must be False: attention weights are never formed")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("ModuleFormerModel: exactly one of input_ids and inputs_embeds must be given")
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"ModuleFormerModel: input_ids must be [batch, tokens], got shape {list(input_ids.shape)}")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_aux_loss is None:
            output_aux_loss = output_router_logits
        cache = _the_cache(past_key_values, cache)
        x = self.drop(self.wte(input_ids) if inputs_embeds is None else inputs_embeds)
        if use_cache and cache is None:
            cache = ModuleFormerCache(self.config.n_layer)
        layers = None if cache is None else cache_layers(cache, self.config.n_layer)
        if layers and self.gradient_checkpointing and self.training and not isinstance(cache, ModuleFormerCache):
            raise TypeError(
                "ModuleFormerModel: with gradient checkpointing the cache must be None or a ModuleFormerCache, got "
                f"{type(cache).__name__}"
            )
        _check_cache(cache, x)
        keep = _key_mask(attention_mask, x, cache)

        states: list[Tensor] = []
        routes: list[BlockRoutes] = []
        wants_routes = output_router_logits or output_aux_loss
        decoded = None
        if layers and not (wants_routes or output_hidden_states):
            decoded = decode_stack(self.h, x, [layer.past for layer in layers], keep, ModuleFormerBlock)
            if decoded is not None:
                x, presents = decoded
                for layer, present in zip(layers, presents, strict=True):
                    layer.store(present)
        for index, block in enumerate(self.h if decoded is None else ()):
            if index == self.config.n_layer:  # of a draft that exits early
                break
            if output_hidden_states:
                states.append(x)
            layer = layers[index] if layers else None
            x, route, present = block(x, layer.past if layer else None, keep, layer is not None, wants_routes)
            routes.append(route)
            if layer:
                layer.store(present)

        x = self.ln_f(x)
        return ModuleFormerModelOutput(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            router_logits=tuple(route.logits for block in routes for route in block) if output_router_logits else None,
            aux_loss=routing_loss(self.config.aux_loss_type, _routes_on(x.device, routes)) if output_aux_loss else None,
            **{CACHE: cache},
        )


class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
    """The language model. ``logits`` are in the model's dtype, as in other models of transformers."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(config)
        self.transformer = ModuleFormerModel(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        output_router_logits: bool | None = None,
        skip_logits: bool | None = None,
        **options: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Read new tokens and predict the one after each; other arguments are those of :class:`ModuleFormerModel`.

        Args:
            labels: [B, T] int64; position t is scored against labels[:, t + 1], -100 is skipped. The loss is the mean
                cross-entropy, plus ``aux_loss_weight`` times the routing loss. With ``num_items_in_batch``, tokens of
                several calls, cross-entropies are divided by it, and each call's routing loss counts by its share.
            logits_to_keep: only the last so many positions, or those of an index tensor; 0 for all.
            skip_logits: beside labels, return None for logits and hold a chunk of them at a time; by default what
                the configuration says, in training mode. Where the head is more than its weight (adapters, hooks,
                quantisation), or ``loss_function`` another than of language models, they are made and dropped.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        weight = self.config.aux_loss_weight
        output = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            output_router_logits=output_router_logits,
            output_aux_loss=output_router_logits or (labels is not None and weight > 0),
            return_dict=True,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        state = output.last_hidden_state[:, kept]
        if skip_logits is None:
            skip_logits = self.config.skip_logits and self.training
        loss, logits = None, None
        if labels is None:
            logits = self.lm_head(state)
        else:
            if labels.shape != state.shape[:2]:
                raise ValueError(
                    f"ModuleFormerForCausalLM: labels must be {list(state.shape[:2])}, a label for each position that "
                    f"logits_to_keep keeps, got shape {list(labels.shape)}"
                )
            if skip_logits and self.loss_function is ForCausalLMLoss:
                loss = _loss_without_logits(self.lm_head, state, labels, **options)
            else:
                logits = self.lm_head(state)
                loss = self.loss_function(logits, labels, self.config.vocab_size, **options)
                logits = None if skip_logits else logits
            if weight > 0:
                loss = loss + weight * _share(labels, options.get("num_items_in_batch")) * output.aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=output.aux_loss,
            logits=logits,
            hidden_states=output.hidden_states,
            router_logits=output.router_logits,
            **{CACHE: output.get(CACHE)},
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **options: Any) -> Tensor | None:
        """The mask of a step with a static cache: [B, capacity], so that its shape never changes."""
        cache = _the_cache(options.get("past_key_values"), options.get("cache"))
        return attention_mask if attention_mask is None or cache is None else _pad(attention_mask, cache)

    def _prepare_position_ids_for_generation(self, *arguments: Any) -> None:
        """None: there are no positions."""

    def _prepare_model_inputs(self, *arguments: Any, **options: Any) -> tuple[Tensor, str, dict[str, Any]]:
        inputs, name, rest = super()._prepare_model_inputs(*arguments, **options)
        if inputs.shape[1] == 0:
            raise ValueError(f"generate: {name} must be [batch, tokens >= 1], got shape {list(inputs.shape)}")
        return inputs, name, rest

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE)
        if isinstance(given, ModuleFormerStaticCache) and given.layers[0].capacity < max_cache_length:
            raise ValueError(
                f"generate: the static cache must have room for {max_cache_length} tokens, prompt and new ones, got "
                f"capacity {given.layers[0].capacity}"
            )
        if given is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        kind = generation_config.cache_implementation
        if kind == "static":
            capacity = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs[CACHE] = ModuleFormerStaticCache(self.config.n_layer, capacity)
        elif kind in (None, "dynamic"):
            model_kwargs[CACHE] = ModuleFormerCache(self.config.n_layer, max_cache_length)
        else:
            raise ValueError(f"generate: cache_implementation must be 'dynamic' or 'static' for a MoLM, got {kind!r}")
        return None

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        """Refused: a paged cache is read by attention functions of transformers, which a MoLM does not call."""
        raise NotImplementedError(f"{type(self).__name__}: continuous batching is not supported; use generate")

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *arguments: Any, **options: Any) -> nn.Linear:
        resized = super()._get_resized_lm_head(old_lm_head, *arguments, **options)
        if type(resized) is type(old_lm_head):
            return resized
        head = Linear(resized.in_features, resized.out_features, bias=False, device="meta")
        head.weight = resized.weight
        return head


class ModuleFormerForSequenceClassification(GenericForSequenceClassification, ModuleFormerPreTrainedModel):
    """A linear map of the last token's state; without the routing loss."""

    base_model_prefix = "transformer"
    _new_heads = ("score.weight",)


def _the_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "ModuleFormerModel: only one of past_key_values and cache, two names of one thing, may be given"
        )
    return past_key_values if cache is None else cache


def _check_cache(cache: Cache | None, x: Tensor) -> None:
    """Refuse a cache of ours that has no room for the first tokens, or that a model of another type has filled."""
    if not isinstance(cache, (ModuleFormerCache, ModuleFormerStaticCache)):
        return
    layer, length = cache.layers[0], x.shape[1]
    if isinstance(cache, ModuleFormerStaticCache) and not layer.is_initialized and layer.capacity < length:
        raise ValueError(
            f"ModuleFormerModel: the capacity of the static cache must be at least {length}, the tokens to read, got "
            f"{layer.capacity}"
        )
    if layer.is_initialized and layer.keys.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"ModuleFormerModel: the cache must be of the model's type, {x.dtype}, got {layer.keys.dtype}; a cache "
            "serves the model that filled it"
        )


def _key_mask(mask: Tensor | None, x: Tensor, cache: Cache | None) -> Tensor | None:
    """The mask as blocks take it: [B, keys] bool."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"ModuleFormerModel: attention_mask must be [batch, past + new tokens], got {got}")
    batch, length = x.shape[:2]
    past = cache.layers[0].past if isinstance(cache, ModuleFormerStaticCache) else None
    if past is not None:
        mask, keys, meaning = _pad(mask, cast(Cache, cache)), past.capacity, "batch, at most the capacity of the cache"
    else:
        keys, meaning = length + (0 if cache is None else cache.get_seq_length()), "batch, past + new tokens"
        if isinstance(cache, ModuleFormerStaticCache):
            mask = mask[:, :keys]
    if mask.shape != (batch, keys):
        raise ValueError(
            f"ModuleFormerModel: attention_mask must be [{batch}, {keys}] ({meaning}), got {list(mask.shape)}"
        )
    return mask.bool()


def _pad(mask: Tensor, cache: Cache) -> Tensor:
    """Up to the capacity of a static cache: what is not filled is not looked at."""
    return F.pad(mask, (0, max(0, cache.layers[0].capacity - mask.shape[1])), value=1)


def _loss_without_logits(
    head: nn.Module,
    state: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """What transformers' loss of language models makes of head(state)."""
    if shift_labels is None:
        state, shift_labels = state[:, :-1], labels[:, 1:]
    reduction: Literal["mean", "sum"] = "mean" if num_items_in_batch is None else "sum"
    shift_labels = shift_labels.to(state.device)
    loss = head_cross_entropy(head, state, shift_labels, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The part of a batch's predictions that are made here."""
    if num_items_in_batch is None:
        return 1.0
    here = (labels[:, 1:] != -100).sum()
    return here / (num_items_in_batch.to(here.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _routes_on(device: torch.device, routes: list[BlockRoutes]) -> list[BlockRoutes]:
    """What the routing loss is made of, where layers are on several devices."""
    if all(route.counts.device == device for block in routes for route in block):
        return routes
    return [BlockRoutes(*(RouteTopK(*(t.to(device) for t in route)) for route in block)) for block in routes]
