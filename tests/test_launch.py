"""ddp_launch.sh, memory and compiled blocks: what a launch on several machines is made of."""
import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import official_checkpoint
from conftest import CONFIGS, ROOT, random_model
from ranks import free_port

import data
import lora
import model as nt_model
import run as training
import t3d

SCRIPT = ["bash", str(ROOT / "ddp_launch.sh")]


def test_help_and_mistakes():
    shown = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--max-restarts" in shown.stdout and "sbatch" in shown.stdout
    for args, words in (([], "no script"), (["--gpu", "1", "tad.py"], "unknown option --gpu"),
                        (["--nodes", "2", "tad.py"], "--rdzv HOST:PORT"), (["--gpus"], "needs a value")):
        wrong = subprocess.run([*SCRIPT, *args], capture_output=True, text=True)
        assert wrong.returncode == 2 and words in wrong.stderr and "--help" in wrong.stderr
    assert len((ROOT / "ddp_launch.sh").read_text().splitlines()) <= 60


@pytest.mark.parametrize("nodes", ["2", "16", "abc", ""])
def test_overwrite_is_refused_on_several_nodes(tmp_path, monkeypatch, nodes):
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    with pytest.raises(nt_model.UserError, match="--overwrite on several nodes"):
        training.Run(t3d.Config(out=str(tmp_path), overwrite=True))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("text", ['{"model_type": "tiny"}', "[]", '{"model": "a", "data": "b"}'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, text, overwrite):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "weights").write_text("mine")
    with pytest.raises(nt_model.UserError, match="config.json is absent or not that of a run"):
        training.Run(t3d.Config(out=str(tmp_path), overwrite=overwrite))
    assert (tmp_path / "config.json").read_text() == text and (tmp_path / "weights").exists()


def test_two_nodes_train_one_model(tmp_path):
    """Two groups of torchrun that meet at one rendezvous, as two machines do; arguments pass through."""
    official_checkpoint(tmp_path / "base", "llada")
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps(dict(prompt=f"{n} + {n}?", solution=str(2 * n), answer=str(2 * n))) + "\n"
        for n in range(8)))
    command = [*SCRIPT, "--nodes", "2", "--gpus", "1", "--rdzv", f"localhost:{free_port()}", "--max-restarts",
               "0", str(ROOT / "trims.py"), "--model", str(tmp_path / "base"), "--data",
               str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "run"), "--gen_len", "8", "--max_steps",
               "2", "--trajectory_share", "0", "--batch_size", "4", "--micro_batch", "2", "--full"]
    env = {**os.environ, "PYTHON": sys.executable}
    nodes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for _ in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("saved " in s for s in said) == 1  # rank 0's
    written = list((tmp_path / "run/checkpoints/step-000002").glob("*.safetensors"))
    assert len(written) == 2  # each node wrote its rows
    trained, base = nt_model.load(tmp_path / "run/model"), nt_model.load(tmp_path / "base")
    assert not torch.equal(trained.embed.weight, base.embed.weight)
    row = data.read_jsonl(tmp_path / "run/log.jsonl")[-1]
    assert row["tok_per_s"] > 0 and 0 < row["data_wait"] < 1 and "tokens" not in row


# -------------------------------------------------------------------------------------------- one process
def with_adapters(**facts):
    model = lora.add(random_model(**facts), 4, 4)
    for _, m in lora.adapters(model):
        torch.nn.init.normal_(m.lora_B, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(m.lora_A, generator=torch.Generator().manual_seed(1))
    return model


def gradient(model, ids=torch.arange(24).view(2, 12)):
    """Of a student's forward, with the teacher's after it, as TAD runs them; three steps."""
    valid = torch.ones(ids.shape, dtype=torch.bool)
    valid[0, :3] = False
    out = torch.arange(ids.shape[1])[-5:].expand(len(ids), 5)  # as of a response
    for _ in range(3):
        loss = model.head(model.hidden(ids, valid, out=out)).float().logsumexp(-1).sum()
        with torch.no_grad(), lora.off(model):
            model.hidden(ids, valid, out=out)
        model.zero_grad()
        loss.backward()
    return torch.cat([p.grad.flatten() for p in training.trainable(model).values()])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_checkpointed_blocks_have_the_same_gradient(name):
    want, model = gradient(with_adapters(**CONFIGS[name])), with_adapters(**CONFIGS[name])
    model.checkpoint_blocks = True
    assert (gradient(model) - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("name, broken", [("plain", False), ("all", False), ("plain", True)])
def test_compiled_blocks_are_five_graphs(name, broken):
    """However many layers, steps, switches of the adapters: the student's first block, whose input has no
    gradient, its others, its last one, of which only the response goes on, and the teacher's others and last.
    broken: blocks that are compiled each for itself.
    """
    facts = dict(CONFIGS[name], num_hidden_layers=4)
    want, model, graphs = gradient(with_adapters(**facts)), with_adapters(**facts), []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=(lambda *args: capture(*args)) if broken else capture, fullgraph=True)
    got = gradient(model)
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert (len(graphs) > 5) if broken else (len(graphs) == 5), len(graphs)
    torch._dynamo.reset()


@pytest.mark.parametrize("name, broken", [("plain", False), ("all", False), ("plain", True)])
def test_compiled_blocks_stay_compiled_over_lengths_and_batches(monkeypatch, name, broken):
    """run.compile_blocks(), whose graphs hold for every shape. broken: for one shape each."""
    torch._dynamo.reset()
    facts = dict(CONFIGS[name], num_hidden_layers=3)
    model, plain, graphs = with_adapters(**facts), with_adapters(**facts), []
    inner = torch.nn.Module.compile

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, dynamic: inner(block, backend=capture, dynamic=dynamic and not broken))
    training.compile_blocks(model)
    for n, (rows, length) in enumerate([(2, 24), (3, 40), (5, 17)]):
        ids = torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(n))
        got, want = (gradient(each, ids) for each in (model, plain))
        assert (got - want).norm() <= 1e-5 * want.norm()
    assert (len(graphs) > 5) if broken else (len(graphs) == 5), len(graphs)
    torch._dynamo.reset()


def test_checkpointing_keeps_less(monkeypatch):
    """Bytes that autograd holds between forward and backward."""
    def held(again):
        model, seen = lora.add(random_model(num_hidden_layers=6), 4, 4), {}
        model.checkpoint_blocks = again
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            h = model.hidden(torch.randint(0, 30, (4, 64)))
        assert h.requires_grad
        return sum(seen.values())
    assert held(True) < held(False) / 5
