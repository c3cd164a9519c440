"""What a row of attention does not see cannot reach it, forward or backward: not as a number, not as NaN or infinity.

Each test poisons with NaN or infinity what a query or a key has nothing to do with, and asks for the result that it has
without poison; or poisons one element, and asks for NaN in what does depend on it, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from stick_cases import inputs
from torch import Tensor

from moduleformer_ext.ops import stick_attention, stick_attention_decode

POISONED = [("first", torch.nan), ("middle", torch.inf), ("last", -torch.inf), ("last", torch.nan)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Named:
    """Dataclasses named by what is not their default."""

    def __str__(self) -> str:
        default = type(self)()
        return " ".join(f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n)) or "plain"


@dataclass(frozen=True)
class Case(Named):
    batch: int = 1
    t_q: int = 70
    t_k: int = 70
    heads: int = 1
    group: int = 1
    dim: int = 64
    dtype: torch.dtype = torch.float32
    shared: bool = False  # K is V
    attend_current: bool = True
    masked: str = ""  # "left" (as padding to the left), "scattered"
    packed: tuple[tuple[int, int], ...] = ()  # lengths of q and k
    epsilon: float | None = None
    mean: float = -2.0  # of the logits: sticks last for some tens of keys


CASES = [
    Case(),
    Case(dtype=torch.bfloat16, group=2, t_q=40),
    Case(dtype=torch.float16, attend_current=False, epsilon=0.0, mean=0.0),
    Case(dtype=torch.float64, heads=2, t_q=33, t_k=100),
    Case(batch=2, masked="left", heads=2),
    Case(masked="scattered", dtype=torch.bfloat16, attend_current=False),
    Case(masked="scattered", shared=True, group=3, t_q=20, t_k=90, epsilon=0.0),
    Case(packed=((30, 30), (0, 0), (1, 20), (50, 66)), heads=2),
    Case(packed=((9, 9), (40, 41)), dtype=torch.bfloat16, shared=True, attend_current=False),
    Case(dim=128, t_q=5, t_k=130, group=4),
    Case(dim=128, dtype=torch.bfloat16, masked="scattered", epsilon=0.0, mean=0.0),
    Case(dim=8, t_q=1, t_k=40),
    Case(dim=328, shared=True, t_q=20, t_k=40, masked="scattered"),
    Case(dim=1024, shared=True, t_q=17, t_k=36, dtype=torch.bfloat16, attend_current=False),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@dataclass(frozen=True)
class Operands:
    """q and grad_o [B, T_q, H, G, D], grad_remainder without D, k and v [B, T_k, H, D]; v is None where K is V."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    grad_o: Tensor
    grad_remainder: Tensor


@dataclass(frozen=True)
class Results:
    """As the operands: with the batch in front, and heads apart."""

    o: Tensor
    remainder: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor | None


def lengths(case: Case) -> tuple[int, int]:
    if not case.packed:
        return case.t_q, case.t_k
    return sum(q for q, _ in case.packed), sum(k for _, k in case.packed)


@cache
def operands(case: Case) -> Operands:
    t_q, t_k = lengths(case)
    sizes = (case.batch, t_q, t_k, case.heads, case.group, case.dim)
    q, k, v = inputs(*sizes, case.dtype, shared=case.shared, mean=case.mean)
    q = q.unflatten(2, (case.heads, case.group))
    generator = torch.Generator().manual_seed(1)
    grad_o = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    grad_remainder = torch.randn(q.shape[:-1], generator=generator, dtype=torch.float64).to(wide)
    return Operands(q, k, v, grad_o, grad_remainder)


@cache
def padding_mask(case: Case) -> Tensor | None:
    if not case.masked:
        return None
    if case.masked == "left":
        padding = torch.arange(case.batch)[:, None] * 45 + 10
        return torch.arange(case.t_k) >= padding
    return torch.rand(case.batch, case.t_k, generator=torch.Generator().manual_seed(2)) < 0.7


@cache
def sight(case: Case) -> Tensor:
    """[B, T_q, T_k] bool: which keys a query sees."""
    t_q, t_k = lengths(case)
    sees = torch.zeros(case.batch, t_q, t_k, dtype=torch.bool)
    begin_q = begin_k = 0
    for rows, keys in case.packed or ((t_q, t_k),):
        newest = torch.arange(keys - rows, keys)[:, None] - int(not case.attend_current)
        block = torch.arange(keys) <= newest
        sees[:, begin_q : begin_q + rows, begin_k : begin_k + keys] = block
        begin_q, begin_k = begin_q + rows, begin_k + keys
    mask = padding_mask(case)
    return sees if mask is None else sees & mask[:, None]


def run(case: Case, x: Operands, device: torch.device) -> Results:
    options: dict = {"attend_current": case.attend_current, "stick_epsilon": case.epsilon}
    if case.masked:
        options["key_padding_mask"] = padding_mask(case).to(device)
    if case.packed:
        for name, of in (("cu_seqlens_q", 0), ("cu_seqlens_k", 1)):
            ends = torch.tensor([pair[of] for pair in case.packed]).cumsum(0)
            options[name] = torch.cat([torch.zeros(1), ends]).int().to(device)

    def leaf(t: Tensor) -> Tensor:
        return (t[0] if case.packed else t).detach().to(device, copy=True).requires_grad_()

    leaves = [leaf(t) for t in (x.q, x.k, x.v) if t is not None]
    o, remainder = stick_attention(*leaves, **options, return_remainder=True)
    with torch.no_grad():
        grads = [leaf(x.grad_o), leaf(x.grad_remainder)]
    results = [o, remainder, *torch.autograd.grad([o, remainder], leaves, grads)]
    cpu = [(t[None] if case.packed else t).detach().cpu() for t in results]
    return Results(*cpu, *[None] * (5 - len(cpu)))


@cache
def clean(case: Case, device: torch.device) -> Results:
    return run(case, operands(case), device)


def assert_same(case: Case, actual: Tensor, expected: Tensor, what: str) -> None:
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def poisoned(case: Case, needed: dict[str, Tensor], poison: float) -> Operands:
    """The operands with poison outside of what is needed: per operand, a bool that broadcasts to it without D."""
    x = operands(case)

    def poison_outside(name: str) -> Tensor | None:
        t = getattr(x, name)
        if t is None:
            return None
        keep = needed.get(name, torch.tensor(False))
        while name != "grad_remainder" and keep.dim() not in (0, t.dim()):
            keep = keep[..., None]
        return torch.where(keep, t, torch.full_like(t, poison))

    return Operands(*map(poison_outside, ("q", "k", "v", "grad_o", "grad_remainder")))


@pytest.mark.parametrize(("which", "poison"), POISONED)
def test_a_query_depends_on_nothing_it_does_not_see(case, which, poison, device):
    sees = sight(case)
    row = {"first": 0, "middle": sees.shape[1] // 2, "last": sees.shape[1] - 1}[which]
    at = (case.batch - 1, row, case.heads - 1, case.group - 1)
    b, i, h, g = at
    query = torch.zeros(*sees.shape[:2], case.heads, case.group, dtype=torch.bool)
    query[b, i, h, g] = True
    key = torch.zeros(case.batch, sees.shape[2], case.heads, dtype=torch.bool)
    key[b, sees[b, i], h] = True
    needed = {"q": query, "k": key, "v": key, "grad_o": query, "grad_remainder": query}
    actual, expected = run(case, poisoned(case, needed, poison), device), clean(case, device)
    for name in ("o", "remainder", "dq"):
        assert_same(case, getattr(actual, name)[at], getattr(expected, name)[at], name)


@pytest.mark.parametrize(("which", "poison"), POISONED)
def test_the_gradient_of_a_key_depends_on_no_row_that_does_not_see_it(case, which, poison, device):
    sees = sight(case)
    j = {"first": 0, "middle": sees.shape[2] // 2, "last": sees.shape[2] - 1}[which]
    b, h = case.batch - 1, case.heads - 1
    rows = sees[b, :, j]
    query = torch.zeros(*sees.shape[:2], case.heads, case.group, dtype=torch.bool)
    query[b, rows, h] = True
    key = torch.zeros(case.batch, sees.shape[2], case.heads, dtype=torch.bool)
    key[b, sees[b, rows].any(0), h] = True
    needed = {"q": query, "k": key, "v": key, "grad_o": query, "grad_remainder": query}
    actual, expected = run(case, poisoned(case, needed, poison), device), clean(case, device)
    for name in ("dk", "dv"):
        if getattr(actual, name) is not None:
            assert_same(case, getattr(actual, name)[b, j, h], getattr(expected, name)[b, j, h], name)


def with_nan(case: Case, name: str, at: tuple[int, ...]) -> Operands:
    tensor = getattr(operands(case), name).clone()
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    tensor.view(bits)[at] = -1  # every bit set: the NaN that is likeliest to get lost in arithmetic on bits
    return replace(operands(case), **{name: tensor})


def assert_nan(case: Case, actual: Tensor, expected: Tensor, where: Tensor, what: str) -> None:
    """NaN there, elsewhere as without poison."""
    assert actual[where].isnan().all(), f"{what}: a NaN that is seen is missing"
    assert_same(case, actual[~where], expected[~where], what)


@pytest.fixture
def patient(case: Case) -> Case:
    """The case without early exit, which may spare a row what lies beyond the end of its stick."""
    return replace(case, epsilon=0.0)


def middle_key(case: Case) -> tuple[int, int]:
    """The batch and the index of a key that some query sees."""
    b = case.batch - 1
    seen = sight(case)[b].any(0).nonzero()[:, 0]
    return b, int(seen[len(seen) // 2])


def test_queries_that_see_a_nan_value_keep_it(patient, device):
    case, (b, j), h = patient, middle_key(patient), patient.heads - 1
    expected = clean(case, device)
    where = torch.zeros_like(expected.o, dtype=torch.bool)
    where[b, sight(case)[b, :, j], h, :, 3] = True
    name = "k" if case.shared else "v"
    if case.shared:  # its logits are NaN too
        where[b, sight(case)[b, :, j], h] = True
    actual = run(case, with_nan(case, name, (b, j, h, 3)), device)
    assert_nan(case, actual.o, expected.o, where, "o")
    assert_nan(case, actual.dq, expected.dq, where.any(-1, keepdim=True).expand_as(where), "dq")


def test_queries_that_see_a_nan_key_keep_it(patient, device):
    case, (b, j), h = patient, middle_key(patient), patient.heads - 1
    expected = clean(case, device)
    where = torch.zeros_like(expected.remainder, dtype=torch.bool)
    where[b, sight(case)[b, :, j], h] = True
    actual = run(case, with_nan(case, "k", (b, j, h, 3)), device)
    assert_nan(case, actual.remainder, expected.remainder, where, "remainder")
    for name in ("o", "dq"):
        assert_nan(case, getattr(actual, name), getattr(expected, name), where[..., None].expand_as(expected.o), name)


@pytest.mark.parametrize("name", ["q", "grad_o", "grad_remainder"])
def test_a_nan_of_a_query_reaches_the_keys_it_sees(patient, name, device):
    case, h, g = patient, patient.heads - 1, patient.group - 1
    b, j = middle_key(case)
    i = int(sight(case)[b, :, j].nonzero()[0])
    expected = clean(case, device)
    query = torch.zeros_like(expected.o, dtype=torch.bool)
    query[b, i, h, g] = True
    key = torch.zeros_like(expected.dk, dtype=torch.bool)
    key[b, sight(case)[b, i], h] = True
    actual = run(case, with_nan(case, name, (b, i, h, g, *([] if name == "grad_remainder" else [3]))), device)
    untouched = torch.zeros_like(query)
    assert_nan(case, actual.o, expected.o, query if name == "q" else untouched, "o")
    assert_nan(case, actual.dq, expected.dq, query, "dq")
    assert_nan(case, actual.dk, expected.dk, key, "dk")
    if actual.dv is not None:
        of_value = {"q": key, "grad_remainder": torch.zeros_like(key)}.get(name)
        if of_value is None:
            of_value = key & (torch.arange(case.dim) == 3)
        assert_nan(case, actual.dv, expected.dv, of_value, "dv")


@dataclass(frozen=True)
class Decode(Named):
    new: int = 1
    heads: int = 2
    group: int = 1
    dim: int = 64
    dtype: torch.dtype = torch.float32
    shared: bool = False
    attend_current: bool = True
    masked: bool = False
    epsilon: float | None = None
    cached: tuple[int, ...] = (130, 3)  # keys per sequence, the new ones included
    room: int = 150


DECODES = [
    Decode(),
    Decode(masked=True, new=3, group=2, dtype=torch.bfloat16),
    Decode(masked=True, shared=True, dim=128, attend_current=False, epsilon=0.0),
    Decode(new=2, group=4, dtype=torch.float16, attend_current=False, epsilon=0.0),
    Decode(masked=True, new=4, dtype=torch.float64, dim=40),
    Decode(new=2, group=2, dim=1024, dtype=torch.bfloat16, shared=True, cached=(40,), room=48),
]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("decode", DECODES, ids=str)
def test_a_decoded_query_depends_on_nothing_it_does_not_see(decode, poison, device):
    batch = len(decode.cached)
    sizes = (batch, decode.new, decode.room, decode.heads, decode.group, decode.dim)
    q, k, v = inputs(*sizes, decode.dtype, shared=decode.shared, mean=-2.0)
    q = q.unflatten(2, (decode.heads, decode.group))
    cached = torch.tensor(decode.cached, dtype=torch.int32)
    mask = torch.rand(batch, decode.room, generator=torch.Generator().manual_seed(3)) < 0.7 if decode.masked else None
    newest = cached[:, None] - decode.new + torch.arange(decode.new) - int(not decode.attend_current)
    sees = torch.arange(decode.room) <= newest[..., None]  # [B, new, room]
    if mask is not None:
        sees &= mask[:, None]

    def attend(q, k, v):
        on = [None if t is None else t.to(device) for t in (q, k, v, cached)]
        o, remainder = stick_attention_decode(
            *on,
            attend_current=decode.attend_current,
            key_padding_mask=None if mask is None else mask.to(device),
            stick_epsilon=decode.epsilon,
            return_remainder=True,
        )
        return o.cpu(), remainder.cpu()

    def outside(t, needed):
        return None if t is None else torch.where(needed[..., None], t, torch.full_like(t, poison))

    expected = attend(q, k, v)
    for b in range(batch):
        for i in {0, decode.new - 1}:
            at = (b, i, decode.heads - 1, decode.group - 1)
            query = torch.zeros(q.shape[:-1], dtype=torch.bool)
            query[at] = True
            key = torch.zeros(k.shape[:-1], dtype=torch.bool)
            key[b, sees[b, i], decode.heads - 1] = True
            actual = attend(outside(q, query), outside(k, key), outside(v, key))
            for name, value, truth in zip(("o", "remainder"), actual, expected, strict=True):
                tolerance = TOLERANCE[decode.dtype]
                torch.testing.assert_close(
                    value[at], truth[at], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
                )
            if sees[b, i].any():
                seen = int(sees[b, i].nonzero()[-1])
                for tensors in ((q, k.clone(), v), (q, k, None if v is None else v.clone())):
                    target = tensors[1] if tensors[1] is not k else tensors[2]
                    if target is None:
                        continue
                    target[b, seen, decode.heads - 1] = torch.nan
                    assert attend(*tensors)[0][at].isnan().all(), "a NaN that is seen is missing"
