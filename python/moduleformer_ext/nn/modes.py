"""Evaluation for a while, after which every module is as it was."""

from __future__ import annotations

from operator import attrgetter
from types import TracebackType

from torch import nn

_TRAINING = attrgetter("training")


class EvaluationMode:
    """A context manager in which all modules of a model are in evaluation mode; each then gets its own mode back.

    It may be entered again and again, which costs little where nothing is in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._training: list[list[nn.Module]] = []

    def __enter__(self) -> None:
        training = list(filter(_TRAINING, self._modules))
        for module in training:
            module.training = False
        self._training.append(training)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module in self._training.pop():
            module.training = True
