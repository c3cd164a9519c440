"""Runs an op on DTensors: checks the arguments, chooses a strategy, moves what it wants elsewhere, computes on this
process's parts and wraps the results.

These are dispatch rules of torch.library, and not DTensor's register_sharding: a rule may look at values (whether
cu_seqlens are cut between sequences), change what is local (a layout of this process's tokens), return lists, and keep
intermediate results out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from moduleformer_ext.ops._dtensor.strategies import MEMBERS, Arguments, Backward, Plan, Rule, choose, tensors_of

_LIBRARY = torch.library.Library("moduleformer_ext", "FRAGMENT")


def register(rule: Rule) -> None:
    """Serve DTensors by this rule from now on."""
    for op in rule.ops:
        _serve(op, partial(_forward, rule))
    if rule.backward is not None:
        op, backward = rule.backward
        _serve(op, partial(_backward, rule, backward))


def refuse(op: str) -> None:
    """Say that an op, or an overload of it (`op.overload`), takes no DTensors."""

    def run(_function: Callable[..., Any], arguments: Arguments) -> None:
        name = _first(arguments)[0]
        raise NotImplementedError(
            f"{op.partition('.')[0]}: {MEMBERS.get(name, name)} must be a plain tensor, got a DTensor, for which it "
            "has no rule; call it with what this process has, such as tensor.to_local() of a replicated one"
        )

    _serve(op, run)


def _serve(op: str, run: Callable[[Callable[..., Any], Arguments], Any]) -> None:
    name, _, overload = op.partition(".")
    schema = getattr(getattr(torch.ops.moduleformer_ext, name), overload or "default")._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}

    def dispatch(_cls: type, function: Any, _types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        with torch.no_grad():
            return run(function, arguments)

    torch.library.register_torch_dispatch(f"moduleformer_ext::{op}", DTensor, dispatch, lib=_LIBRARY)


def _forward(rule: Rule, function: Callable[..., Any], arguments: Arguments) -> Any:
    arguments = _as_dtensors(rule, arguments, ())
    # The op's own checks, of the whole shapes; and the shapes of its results.
    whole = function(*(_on_meta(value) for value in arguments.values()))
    plan = _plan(rule, arguments)
    results = rule.compute(function, _local_parts(arguments, plan, plan.placements), plan)
    wrapped = [
        result
        if i in rule.local_results
        else _wrap(result, plan, [cast(Placement, s.result_placement(i)) for s in plan.chosen], meta.shape)
        for i, (result, meta) in enumerate(zip(_as_tuple(results), _as_tuple(whole), strict=True))
    ]
    return tuple(wrapped) if isinstance(whole, tuple) else wrapped[0]


def _backward(rule: Rule, backward: Backward, function: Callable[..., Any], arguments: Arguments) -> Any:
    local = [name for name, i in backward.results.items() if i in rule.local_results]
    arguments = _as_dtensors(rule, arguments, local)
    others = {**backward.gradients, **backward.results}
    # As the forward pass chose: by the arguments that it had.
    plan = _plan(rule, {name: value for name, value in arguments.items() if name not in others})

    def placements(name: str) -> list[Placement]:
        if name not in others:
            return plan.placements(name)
        ours = [cast(Placement, strategy.result_placement(others[name])) for strategy in plan.chosen]
        if name in backward.results:
            return ours
        return [Replicate() if isinstance(placement, Partial) else placement for placement in ours]

    results = rule.compute(function, _local_parts(arguments, plan, placements), plan)
    wrapped: list[Tensor] = []
    taken: dict[str, int] = {}
    for name, result in zip(backward.returns(arguments), results, strict=True):
        i = taken[name] = taken.get(name, -1) + 1
        of = tensors_of(arguments[name])
        if i < len(of) and result.dim() == of[i].dim():
            placed = [strategy.gradient_placement(name) for strategy in plan.chosen]
            result = _wrap(result, plan, placed, of[i].shape)
        wrapped.append(result)  # else it stands for a gradient that nobody asked for
    return type(results)(wrapped)


def _plan(rule: Rule, arguments: Arguments) -> Plan:
    mesh = _first(arguments)[1].device_mesh
    return Plan(mesh, choose(rule.strategies(arguments), arguments, mesh), arguments)


def _first(arguments: Arguments) -> tuple[str, DTensor]:
    """The first DTensor and its name."""
    return next(
        (name, tensor) for name in arguments for tensor in tensors_of(arguments[name]) if isinstance(tensor, DTensor)
    )


def _as_dtensors(rule: Rule, arguments: Arguments, local: Sequence[str]) -> Arguments:
    """The arguments, with plain tensors taken for replicated ones where the caller says so; those named are local."""
    first, like = _first(arguments)
    implicit = getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False)

    def check(name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != like.device_mesh:
                op, label = rule.label(arguments, name)
                raise ValueError(
                    f"{op}: {label} must be on {rule.label(arguments, first)[1]}'s mesh {like.device_mesh}, got "
                    f"{tensor.device_mesh}"
                )
            return tensor
        if implicit:
            return _wrap_whole(tensor, like.device_mesh)
        op, label = rule.label(arguments, name)
        raise ValueError(
            f"{op}: {label} must be a DTensor like {rule.label(arguments, first)[1]}, got a plain tensor; "
            "DTensor.from_local(tensor, mesh, [Replicate()]) is one that every process has"
        )

    return {name: value if name in local else _map(value, partial(check, name)) for name, value in arguments.items()}


def _wrap_whole(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [_map(element, function) for element in value]
    return value


def _on_meta(value: Any) -> Any:
    return _map(value, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))


def _local_parts(arguments: Arguments, plan: Plan, placements: Callable[[str], list[Placement]]) -> Arguments:
    """This process's part of every tensor. What is one tensor stays one: kernels know k that is v."""
    parts: dict[tuple[int, tuple[Placement, ...]], Tensor] = {}

    def part(wanted: tuple[Placement, ...], tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        key = (id(tensor), wanted)
        if key not in parts:
            parts[key] = tensor.redistribute(plan.mesh, wanted).to_local()
        return parts[key]

    return {
        name: _map(value, partial(part, tuple(placements(name)))) if tensors_of(value) else value
        for name, value in arguments.items()
    }


def _wrap(local: Tensor, plan: Plan, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    return DTensor.from_local(
        local, plan.mesh, placements, run_check=False, shape=shape, stride=_stride(shape, local.stride())
    )


def _stride(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor without gaps whose dimensions follow one another in memory as those of a part do."""
    stride, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (like[dim], -dim)):
        stride[dim] = step
        step *= max(shape[dim], 1)
    return tuple(stride)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
