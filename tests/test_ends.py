"""Runs that end too early, for many reasons: one line says so, and the same command ends in the same bytes."""
import json

import pytest
from small_runs import METHODS, Runs

import run as training


@pytest.fixture
def runs(tmp_path, monkeypatch, capsys):
    return Runs(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite(runs, method):
    """At the first step, in the middle and at the last; the run goes on from the step before."""
    assert runs(method, "whole") == (0, [])
    out = runs.folder / "broken"
    for bad_step, value in ((0, "nan"), (3, "inf"), (5, "-inf")):
        with runs.patch.context() as patch:
            inner = training.Run.update

            def update(self):
                if self.step == bad_step:
                    p = list(training.trainable(self.model).values())[-1]
                    p.grad.view(-1)[-1] = float(value)
                inner(self)
            patch.setattr(training.Run, "update", update)
            code, said = runs(method, "broken")
        assert code == 2 and len(said) == 1 and f"at step {bad_step}:" in said[0], said
        facts = json.loads((out / "nonfinite-rank0.json").read_text())
        assert facts["step"] == bad_step and len(facts["ids"]) == 4
        newest = training.newest_checkpoint(out)
        assert newest is None if bad_step == 0 else newest.name == f"step-{bad_step:06d}"
        assert not (out / "adapter").exists()
    assert runs(method, "broken") == (0, [])
    assert runs.adapter("broken") == runs.adapter("whole")
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [*range(1, 7)]
