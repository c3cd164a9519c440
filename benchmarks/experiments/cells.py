"""Trained models and measurements on disk: what is there is not done again, what was interrupted starts anew."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moduleformer_ext.files import load_tensors, new_directory, remove_partial, save_tensors, write_file
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

from .baselines import DenseConfig, DenseForCausalLM, Model, RotaryMixtureOfAttention, make_rotary_molm

Result = dict[str, Any]
Measured = TypeVar("Measured")
_RESULT, _MODEL, _WEIGHTS = "result.json", "model.json", "weights.safetensors"


def make_model(kind: str, config: MoLMConfig | DenseConfig) -> Model:
    """A new model: ``molm``, ``rotary`` (MoLM with softmax attention) or ``dense``."""
    if isinstance(config, DenseConfig):
        return DenseForCausalLM(config)
    return make_rotary_molm(config) if kind == "rotary" else MoLMForCausalLM(config)


class Cells:
    """The cells of all experiments below one folder; those of one name and seed are the same everywhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def trained(self, name: str, seed: int, train: Callable[[], tuple[Model, Result]]) -> Result:
        """The result of a training, which is done, and kept with its model, if it is not there yet."""
        path = self._path(name, seed)
        if not (path / _RESULT).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_partial(path.parent)
            print(f"training {name}, seed {seed}", flush=True)
            model, result = train()
            with new_directory(path) as scratch:
                _save_model(scratch, model)
                write_file(scratch / _RESULT, json.dumps(result, indent=1) + "\n")
        return json.loads((path / _RESULT).read_text())

    def measured(self, name: str, seed: int, measure: Callable[[], Result]) -> Result:
        """The result of a measurement, which is done if it is not there yet."""
        path = self._path(name, seed) / _RESULT
        if not path.exists():
            print(f"measuring {name}, seed {seed}", flush=True)
            result = measure()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(result, indent=1) + "\n")
        return json.loads(path.read_text())

    def model(self, name: str, seed: int) -> Model:
        """The model of a training that is there, in evaluation mode."""
        path = self._path(name, seed)
        about = json.loads((path / _MODEL).read_text())
        make = DenseConfig if about["kind"] == "dense" else MoLMConfig.from_dict
        model = make_model(about["kind"], make(**about["config"]) if make is DenseConfig else make(about["config"]))
        model.load_state_dict(load_tensors(path / _WEIGHTS))
        return model.eval()

    def _path(self, name: str, seed: int) -> Path:
        return self.root / name / f"seed-{seed}"


def _save_model(directory: Path, model: Model) -> None:
    if isinstance(model, MoLMForCausalLM):
        rotary = any(isinstance(module, RotaryMixtureOfAttention) for module in model.modules())
        about = {"kind": "rotary" if rotary else "molm", "config": model.config.to_dict()}
    else:
        about = {"kind": "dense", "config": dataclasses.asdict(model.config)}
    write_file(directory / _MODEL, json.dumps(about, indent=1) + "\n")
    save_tensors(directory / _WEIGHTS, model.state_dict())
