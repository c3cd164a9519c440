"""AdamW and its learning-rate schedule."""

import math

import torch
from torch import nn

from moduleformer_ext.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and embeddings, and spares biases, norms and scalars."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meshes = dict.fromkeys(map(mesh_of, parameters))  # fused steps are of one mesh
    groups = [
        {"params": [p for p in parameters if (p.ndim >= 2) == decays and mesh_of(p) == mesh], "weight_decay": weight}
        for decays, weight in ((True, config.weight_decay), (False, 0.0))
        for mesh in meshes
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def mesh_of(parameter: nn.Parameter) -> object:
    """The processes that a parameter is sharded over; None where it is whole."""
    return getattr(parameter, "device_mesh", None)  # DTensors take long to import


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` of `steps` (from 0): linear warm-up to the peak, then half a cosine."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
