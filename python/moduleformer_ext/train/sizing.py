"""How large a model is worth training in a given time: chosen by the speed that is measured here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.plan import SAFETY


@dataclass(frozen=True)
class Size:
    """Options of a run that say how large its model and its steps are."""

    name: str
    options: Mapping[str, Any]
    """Fields of TrainConfig that replace a run's own."""
    steps: int
    """So many it takes to be ahead of the bigram model of the standard library, by what was measured of it."""

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The same run with this size."""
        return TrainConfig.from_dict({**config.to_dict(), **self.options})


@dataclass(frozen=True)
class Choice:
    """A size, and how many of its steps there is time for."""

    size: Size
    seconds_per_step: float
    steps: int

    @property
    def enough(self) -> bool:
        """Whether these are as many as it took to be ahead of the bigram model."""
        return self.steps >= self.size.steps

    @property
    def seconds_short(self) -> float:
        """How much more time the steps that are lacking would take."""
        return max(self.size.steps - self.steps, 0) * self.seconds_per_step / SAFETY


def choose_size(
    sizes: Sequence[Size], seconds_per_step: Callable[[Size], float], spare: Callable[[float, Size], float]
) -> Choice:
    """The first of `sizes`, which come largest first, that has time for its steps; if none has, the one that comes
    nearest to it, the larger one of equals.

    `seconds_per_step` measures a size, which is asked for only where no larger one will do. `spare` is the time that is
    left for the steps of a size, given that measurement. The choice depends on nothing else.
    """
    if not sizes:
        raise ValueError("choose_size: sizes must not be empty")
    choices = []
    for size in sizes:
        seconds = seconds_per_step(size)
        choices.append(Choice(size, seconds, max(int(SAFETY * spare(seconds, size) / seconds), 0)))
        if choices[-1].enough:
            return choices[-1]
    return max(choices, key=lambda choice: choice.steps / choice.size.steps)
