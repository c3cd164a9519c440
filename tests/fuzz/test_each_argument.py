"""Every tensor of every operator is looked at: one on another device, of another type or layout is an error with its
name.
"""

import pytest
import torch
from cases import Recorder, run, tensors
from recipes import PUBLIC, Maker
from torch import Tensor
from torch.utils import _pytree as pytree


def recorded_calls():
    """A call of every operator, with all the tensors that it takes."""
    calls = {}
    for make in PUBLIC.values():
        for seed in range(12):
            call = make(Maker(seed))
            if call.differentiable:
                for t in tensors((call.args, call.kwargs)):
                    t.requires_grad_(t.is_floating_point())
            with Recorder() as recorder:
                run(call)
            for inner in recorder.calls:
                known = calls.get(inner.name)
                if known is None or len(tensors(inner.args)) > len(tensors(known.args)):
                    calls[inner.name] = inner
    return calls


CALLS = recorded_calls()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("change", ["meta", torch.int16, torch.complex64])
def test_each_tensor_is_checked(name, change):
    call = CALLS[name]
    leaves, spec = pytree.tree_flatten(call.args)
    op = name.split("::")[1].split(".")[0].removesuffix("_forward").removesuffix("_backward")
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        args = pytree.tree_unflatten([*leaves[:i], leaf.to(change), *leaves[i + 1 :]], spec)
        if change == "meta" and len(tensors(args)) == 1:
            continue  # a meta tensor alone is well served
        with pytest.raises(ValueError, match=rf"^{op}\w*: (block \d+: )?[\w.]+ must "):
            call.function(*args)


MEMBERS = {
    "offsets": "layout.offsets",
    "slot_order": "layout.slot_order",
    "position": "layout.position",
    "values": "weight.values",
    "scales": "weight.scales",
}
"""Of one argument in Python."""
LAYOUTS = {
    "layout Sparse": Tensor.to_sparse,
    "layout SparseCsr": Tensor.to_sparse_csr,
    "layout SparseBsc": lambda t: t.to_sparse_bsc((1, 1)),
    "layout Mkldnn": Tensor.to_mkldnn,
    r"a quantized one \(QInt8\)": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "a nested one": lambda t: torch.nested.nested_tensor([t, t]),
    r"(a nested one|layout Jagged)": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")  # torch calls some of them beta, and others deprecated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_each_layout_is_refused_by_name(name, layout):
    call = CALLS[name]
    leaves, spec = pytree.tree_flatten(call.args)
    schema = call.function._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, call.args, strict=False)}
    labels = [MEMBERS.get(key, key) for key, value in given.items() for _ in pytree.tree_leaves(value)]
    op = name.split("::")[1].split(".")[0].removesuffix("_forward").removesuffix("_backward")
    if op == "route_topk" and given["gate"] != "logits":
        op += f"_{given['gate']}"
    made = []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        try:
            made.append((i, LAYOUTS[layout](leaf.detach())))
        except (RuntimeError, ValueError, IndexError):
            continue  # torch has no such tensor of this shape or type
    if not made:
        pytest.skip("no tensor of the operator can lie so")
    for i, other in made:
        args = pytree.tree_unflatten([*leaves[:i], other, *leaves[i + 1 :]], spec)
        with pytest.raises(ValueError, match=rf"^{op}: {labels[i]} must be a dense tensor with strides, got {layout}$"):
            call.function(*args)
