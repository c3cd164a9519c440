"""Arguments that may not be what an op expects: a valid call with some leaves replaced, or what its schema allows."""

from __future__ import annotations

from typing import Any

import torch
from recipes import Maker
from torch import Tensor
from torch.utils import _pytree as pytree

INTEGERS = (-(2**62), -(2**31), -1, 0, 1, 2, 3, 7, 2**24, 2**31 - 1, 2**31, 2**32, 2**62)
LARGE = 2**40
NUMBERS = (0.0, -0.0, 1.0, -1e-3, 1e300, float("inf"), float("-inf"), float("nan"))
WORDS = (
    "",
    "token",
    "slot",
    "expert",
    "linear",
    "mlp",
    "gmm",
    "logits",
    "softmax_topk",
    "swiglu",
    "gelu",
    "\0",
    "é" * 99,
)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool)


def other_tensor(m: Maker, t: Tensor) -> Tensor:
    """One thing about a tensor changed."""
    if t.numel() >= LARGE:
        return t
    dim = m.random.randrange(t.dim()) if t.dim() else 0
    kind = m.random.choice(
        ("meta", "dtype", "shorter", "longer", "empty", "one", "fewer", "more", "repeat", "overlap", "strides",
         "values", "values", "values", "grad", "large", "random")
    )  # fmt: skip
    if kind == "meta":
        return t.to("meta")
    if kind == "dtype":
        return t.to(m.random.choice(TYPES))
    if kind == "grad" and t.is_floating_point():
        return t.detach().clone().requires_grad_()
    if kind == "fewer" and t.dim():
        return t.select(dim, 0) if t.shape[dim] else t.sum(dim).to(t.dtype)
    if kind == "more":
        return t.unsqueeze(dim)
    if kind == "random":
        return m.normal(*(m.size() for _ in range(m.random.randint(0, 5)))).to(t.dtype)
    if kind == "values" and t.numel():
        return other_values(m, t)
    if not t.dim() or t.is_meta:
        return t
    if kind == "shorter":
        return t.narrow(dim, 0, max(t.shape[dim] - 1, 0))
    if kind == "longer":
        return torch.cat([t, t.narrow(dim, 0, min(t.shape[dim], 1))], dim)
    if kind == "empty":
        return t.narrow(dim, 0, 0)
    if kind == "one":
        return t.reshape(-1)[:1]
    if kind == "repeat" and t.shape[dim]:
        return t.narrow(dim, 0, 1).expand_as(t)
    if kind == "overlap" and t.numel():
        # Several dimensions with stride 1, inside the tensor's own memory.
        flat = t.reshape(-1).contiguous()
        strides = [1 if sum(t.shape) - t.dim() < flat.numel() else 0] * t.dim()
        return flat.as_strided(t.shape, strides)
    if kind == "strides":
        return m.strided(t)
    if kind == "large":  # a view of one element: no memory is taken for it
        shape = list(t.shape)
        shape[dim] = LARGE
        return t.new_zeros([1] * t.dim()).expand(shape)
    return t


def other_values(m: Maker, t: Tensor) -> Tensor:
    """Some elements, or all, replaced by what hurts most."""
    t = t.detach().clone()
    if t.is_meta:
        return t
    if t.is_floating_point():
        value = m.random.choice((float("nan"), float("inf"), -float("inf"), torch.finfo(t.dtype).max, 0.0))
    elif t.dtype == torch.bool:
        value = m.chance()
    else:
        bounds = torch.iinfo(t.dtype)
        value = min(max(m.random.choice(INTEGERS), bounds.min), bounds.max)
    if m.chance(0.3):
        return t.fill_(value)
    flat = t.reshape(-1)
    if m.chance(0.3) and flat.numel() > 1:
        return flat.flip(0).reshape(t.shape)
    flat[m.random.randrange(flat.numel())] = value
    return flat.reshape(t.shape)


def other_value(m: Maker, value: Any) -> Any:
    if isinstance(value, Tensor):
        return other_tensor(m, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return m.random.choice(INTEGERS)
    if isinstance(value, float):
        return m.random.choice(NUMBERS)
    if isinstance(value, str):
        return m.random.choice(WORDS)
    return m.random.choice((m.normal(m.size(), m.size()), m.random.choice(NUMBERS), m.random.choice(WORDS), None))


def mutate(m: Maker, arguments: Any) -> Any:
    """A tree of arguments with one to three leaves replaced, or a list in it made longer or shorter."""
    if m.chance(0.1):
        arguments = resize_lists(m, arguments)
    leaves, spec = pytree.tree_flatten(arguments)
    for _ in range(m.random.choice((1, 1, 2, 3)) if leaves else 0):
        i = m.random.randrange(len(leaves))
        leaves[i] = other_value(m, leaves[i])
    return pytree.tree_unflatten(leaves, spec)


def resize_lists(m: Maker, arguments: Any) -> Any:
    args, kwargs = arguments
    args = [m.random.choice((a[:-1], [*a, *a[-1:]], [])) if isinstance(a, list) and m.chance() else a for a in args]
    return args, kwargs


def from_schema(m: Maker, schema: torch._C.FunctionSchema) -> list[Any]:
    """Anything that the types of a schema allow; the way to an op that no recipe reaches."""

    def tensor() -> Tensor:
        shape = [m.size() for _ in range(m.random.randint(0, 4))]
        dtype = m.random.choice((m.dtype, m.dtype, m.dtype, torch.int32, torch.bool))
        values = m.normal(*shape, dtype=dtype)
        return other_tensor(m, values) if m.chance(0.2) else values

    draw = {
        "Tensor": tensor,
        "int": lambda: m.random.choice(INTEGERS),
        "float": lambda: m.random.choice(NUMBERS),
        "bool": m.chance,
        "str": lambda: m.random.choice(WORDS),
    }

    def value(kind: str) -> Any:
        if kind.startswith("Optional["):
            return None if m.chance() else value(kind.removeprefix("Optional[").removesuffix("]"))
        if kind.startswith("List["):
            inner = kind.removeprefix("List[").removesuffix("]")
            return [value(inner) for _ in range(m.random.randint(0, 4))]
        return draw[kind]()

    return [value(str(argument.type)) for argument in schema.arguments]
