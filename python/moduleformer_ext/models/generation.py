"""Decoding: one token after another, with the cache allocated once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.models.cache import KVCache
from moduleformer_ext.nn import EvaluationMode

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moduleformer_ext.models.modeling import MoLMForCausalLM


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of :func:`generate_stream`, which explains them."""

    attention_mask: Tensor | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    generator: torch.Generator | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row of logits [B, V]; [B] int64.

    Args:
        temperature: divides the logits; 0 takes the most likely token, as the smallest ones in effect do.
        top_k: keep only the k most likely tokens.
        top_p: keep only the fewest most likely tokens whose probabilities add up to at least p (after top_k).
        generator: source of randomness.

    Raises:
        ValueError: an option that is out of range; the message names it.
        FloatingPointError: a row whose largest logit is not finite, as those of NaN weights.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"sample: temperature must be >= 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p must be in (0, 1], got {top_p}")
    largest, likeliest = logits.max(-1)
    if not math.isfinite(largest.sum().item()):  # of infinities and NaN no sum is finite
        raise FloatingPointError("sample: logits must be finite, got NaN or an infinite one")
    if temperature == 0:
        return likeliest
    # Differences to the largest, in float64: divided by any temperature that a float can be, it stays 0.
    scaled = (logits - largest[:, None]).double() / temperature
    probs, tokens = scaled.softmax(-1).float().sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probs = torch.cat([probs[:, :top_k], torch.zeros_like(probs[:, top_k:])], dim=-1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)


def generate_stream(
    model: MoLMForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts [B, T] and yield the next token of every sequence, [B] int64, as soon as it is known.

    Args:
        model: it is in evaluation mode while a token is computed; in between all its modules have their own modes.
        max_new_tokens: stop after so many.
        attention_mask: [B, T], zero for padding, which may be on either side: there are no positions to disturb.
        temperature, top_k, top_p: see :func:`sample`; the default is greedy.
        seed: draw with a generator of this seed; or pass a ``generator`` on the model's device.
        eos_token_id: one or several, each of which ends a sequence; the configuration's by default. The stream ends
            when all sequences have ended.
        pad_token_id: yielded for sequences that have ended; the first ``eos_token_id`` by default.

    Raises:
        ValueError: an option that is out of range or does not fit the prompts; the message names it.
        FloatingPointError: logits that are not finite.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"generate: input_ids must be [batch, tokens >= 1], got shape {list(input_ids.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    if seed is not None and generator is not None:
        raise ValueError("generate: seed and generator exclude one another")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"generate: attention_mask must be {list(input_ids.shape)} like input_ids, "
                f"got {list(attention_mask.shape)}"
            )
        if not attention_mask.bool().any(-1).all():
            raise ValueError("generate: attention_mask must keep at least one token of every sequence")
    if seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(seed)
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return _stream(
        model,
        input_ids,
        max_new_tokens,
        None if attention_mask is None else F.pad(attention_mask.bool(), (0, max_new_tokens), value=True),
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator},
        torch.tensor(ends, dtype=torch.long, device=input_ids.device) if ends else None,
        pad_token_id if pad_token_id is not None or not ends else ends[0],
    )


@torch.no_grad()
def _stream(
    model: MoLMForCausalLM,
    tokens: Tensor,
    max_new_tokens: int,
    mask: Tensor | None,
    sampling: dict[str, Any],
    ends: Tensor | None,
    pad: int | None,
) -> Iterator[Tensor]:
    batch, length = tokens.shape
    cache = KVCache.empty(model.config.n_layer, capacity=length + max_new_tokens)
    finished = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    newest: Tensor | None = _last_kept(mask, tokens)[:, None]
    evaluating = EvaluationMode(model)
    for step in range(max_new_tokens):
        seen = None if mask is None else mask[:, : length + step]
        with evaluating:  # not around the yield: what the caller does meanwhile, another stream too, is the caller's
            output = model(tokens, seen, None, cache, use_cache=True, logits_at=newest, output_aux_loss=False)
        cache = output.past_key_values
        token = sample(output.logits[:, 0], **sampling)
        if ends is not None and pad is not None:
            token = token.where(~finished, pad)
            finished = finished | torch.isin(token, ends)
        yield token
        if ends is not None and bool(finished.all()):
            return
        tokens = token[:, None]
        newest = None


def _last_kept(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Where each prompt ends [B]."""
    batch, length = tokens.shape
    if mask is None:
        return torch.full((batch,), length - 1, device=tokens.device)
    positions = torch.arange(length, device=tokens.device)
    return positions.where(mask[:, :length], 0).amax(-1)


def generate(
    model: MoLMForCausalLM, input_ids: Tensor, max_new_tokens: int, **options: Unpack[GenerationOptions]
) -> Tensor:
    """Continue prompts [B, T]; the prompts and what follows them, [B, T + new]. Options: :func:`generate_stream`."""
    stream = generate_stream(model, input_ids, max_new_tokens, **options)
    return torch.cat([input_ids, *(token[:, None] for token in stream)], dim=1)
