"""Evaluation for a while, after which every module is as it was."""

from __future__ import annotations

from types import TracebackType

from torch import nn


class EvaluationMode:
    """A context manager in which all modules of a model are in evaluation mode; each then gets its own mode back.

    It may be entered again and again, which costs little where nothing is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._training: list[list[nn.Module]] = []

    def __enter__(self) -> None:
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        self._training.append(training)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module in self._training.pop():
            module.training = True
