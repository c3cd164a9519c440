"""ModuleFormer's language model written out token by token and expert by expert, in float64.

Nothing of the package is used: this is the second opinion that the model is tested against. Parameters go by their
published names, and are differentiable through everything here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]
Past = list[tuple[Tensor, Tensor]]


@dataclass
class Result:
    hidden_states: list[Tensor]
    logits: Tensor
    aux_loss: Tensor
    past: Past


def gate_logits(params: Parameters, gate: str, gate_type: str, x: Tensor) -> Tensor:
    if gate_type == "linear":
        return params[f"{gate}.w_gate.0.weight"] @ x
    if gate_type == "mlp":
        hidden = params[f"{gate}.w_gate.0.weight"] @ x + params[f"{gate}.w_gate.0.bias"]
        return params[f"{gate}.w_gate.3.weight"] @ (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
    z = params[f"{gate}.w_gate.weight"] @ x
    z = z / z.norm()
    centroids = params[f"{gate}.expert_centroids"]
    return (centroids / centroids.norm(dim=1, keepdim=True)) @ z * params[f"{gate}.temperature"][0].exp()


def route(params: Parameters, gate: str, config: Mapping[str, Any], k: int, tokens: Tensor) -> tuple[Any, Tensor]:
    """Per token the chosen (expert, gate) pairs; and the layer's auxiliary loss."""
    choices, probs, z_terms, counts = [], [], [], None
    for x in tokens:
        logits = gate_logits(params, gate, config["gate_type"], x)
        p = logits.exp() / logits.exp().sum()
        counts = torch.zeros_like(p) if counts is None else counts
        best = sorted(range(len(p)), key=lambda e, p=p: (-p[e].item(), e))[:k]
        for e in best:
            counts[e] += 1
        choices.append([(e, p[e]) for e in best])
        probs.append(p)
        z_terms.append(logits.exp().sum().log() ** 2)
    p = torch.stack(probs)
    if config["aux_loss_type"] == "mi":
        mean = p.mean(0)
        return choices, -((p * p.log()).sum(1).mean() - (mean * (mean + 1e-8).log()).sum())
    # the share of slots is a float32 number in the published loss
    share = (counts.float() / counts.float().sum()).double()
    switch = len(counts) * (p.sum(0) / p.sum() * share).sum()
    return choices, switch + 0.1 * torch.stack(z_terms).mean()


def activation(config: Mapping[str, Any], h: Tensor) -> Tensor:
    if config["activation_function"] == "gelu_new":
        return 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return h.clamp(min=0)


def layer_norm(params: Parameters, name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


def attention(
    params: Parameters, name: str, config: Mapping[str, Any], x: Tensor, keep: Tensor | None, past: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    batch, length, _ = x.shape
    k_att, heads = config["k_att"], config["n_head"]
    identity = config["att_hidden"] == config["n_embd"] and heads == 1
    choices, aux = route(params, f"{name}.q_proj.gate", config, k_att, x.flatten(0, 1))
    keys = x if identity else x @ params[f"{name}.k_proj.weight"].T + params[f"{name}.k_proj.bias"]
    values = x if identity else x @ params[f"{name}.v_proj.weight"].T + params[f"{name}.v_proj.bias"]
    if past is not None:
        keys = torch.cat([past[0].detach(), keys], 1)
        values = torch.cat([past[1].detach(), values], 1)
    before = keys.shape[1] - length
    width = config["att_hidden"] // heads

    rows = []
    for b in range(batch):
        for i in range(length):
            y = torch.zeros_like(x[b, i])
            for expert, gate in choices[b * length + i]:
                query = x[b, i] @ params[f"{name}.q_proj.experts.weight"][expert]
                outputs = []
                for h in range(heads):
                    part = slice(h * width, (h + 1) * width)
                    left, out = torch.ones((), dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
                    for j in range(before + i, -1, -1):
                        if keep is not None and not keep[b, j]:
                            continue
                        score = query[part] @ keys[b, j, part] / width**0.5
                        out = out + left * torch.sigmoid(score) * values[b, j, part]
                        left = left * torch.sigmoid(-score)
                    outputs.append(out)
                y = y + gate * (torch.cat(outputs) @ params[f"{name}.q_proj.output_experts.weight"][expert])
            rows.append(y)
    return torch.stack(rows).view_as(x), aux, (keys.detach(), values.detach())


def feed_forward(params: Parameters, name: str, config: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.flatten(0, 1)
    choices, aux = route(params, f"{name}.gate", config, config["k_mlp"], tokens)
    rows = []
    for token, chosen in zip(tokens, choices, strict=True):
        y = torch.zeros_like(token)
        for expert, gate in chosen:
            hidden = activation(config, token @ params[f"{name}.experts.weight"][expert])
            y = y + gate * (hidden @ params[f"{name}.output_experts.weight"][expert])
        rows.append(y)
    return torch.stack(rows).view_as(x), aux


def language_model(
    params: Parameters,
    config: Mapping[str, Any],
    input_ids: Tensor,
    keep: Tensor | None = None,
    past: Past | None = None,
) -> Result:
    x = params["transformer.wte.weight"][input_ids]
    states, aux_loss, present = [], torch.zeros((), dtype=x.dtype), []
    for i in range(config["n_layer"]):
        states.append(x)
        layer = f"transformer.h.{i}"
        normed = layer_norm(params, f"{layer}.ln_1", x)
        y, aux, kv = attention(params, f"{layer}.attn", config, normed, keep, past and past[i])
        x, aux_loss = x + y, aux_loss + aux
        y, aux = feed_forward(params, f"{layer}.mlpf", config, layer_norm(params, f"{layer}.ln_2", x))
        x, aux_loss = x + y, aux_loss + aux
        present.append(kv)
    x = layer_norm(params, "transformer.ln_f", x)
    return Result([*states, x], x @ params["lm_head.weight"].T, aux_loss, present)


def loss(result: Result, config: Mapping[str, Any], labels: Tensor) -> Tensor:
    logits = result.logits.float()[:, :-1].flatten(0, 1)
    entropy = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    return entropy.double() + config["aux_loss_weight"] * result.aux_loss
