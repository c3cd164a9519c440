import subprocess

import torch
from cases import OPERATORS, Recorder, run
from fuzz import fuzz
from recipes import PUBLIC, Maker

import moduleformer_ext.ops


def test_a_few_hundred_cases():
    problems = fuzz(0, 400)
    assert not problems, "\n".join(["repeat one with tests/fuzz/fuzz.py --first SEED --cases 1", *problems])


def test_every_public_op_has_a_recipe():
    public = {name for name in moduleformer_ext.ops.__all__ if callable(getattr(moduleformer_ext.ops, name))}
    assert set(PUBLIC) == public


def test_recipes_reach_every_operator():
    reached = set()
    for make in PUBLIC.values():
        call = make(Maker(1))
        with Recorder() as recorder:
            run(call)
            with torch.inference_mode():
                run(call)
            if call.differentiable:
                call.args[0].requires_grad_()
                run(call)
        reached |= {call.name for call in recorder.calls}
    assert reached == set(OPERATORS)


def test_a_crash_is_told_with_its_seed(monkeypatch):
    crash = subprocess.CompletedProcess([], -11, "seed 3: wrong, with seed 4 in it\nseed 5: wrong\n", "")
    fine = subprocess.CompletedProcess([], 0, "", "")
    runs = iter([crash, fine])

    def child(command, **_):
        result = next(runs)
        with open(command[-1], "w") as report:
            report.write("7")
        return result

    monkeypatch.setattr(subprocess, "run", child)
    assert fuzz(0, 10) == [
        "seed 3: wrong, with seed 4 in it\n",
        "seed 5: wrong\n",
        "seed 7: the process ended with status -11\n",
    ]
