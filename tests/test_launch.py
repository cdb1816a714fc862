"""ddp_launch.sh, rounds, memory and compiled blocks: what a launch on several machines is made of."""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from checkpoints import official_checkpoint
from conftest import CONFIGS, ROOT, random_model

import data
import lora
import model as nt_model
import t3d
import tad
from model import UserError

SCRIPT = ["bash", str(ROOT / "ddp_launch.sh")]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_help_and_mistakes():
    shown = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--max-restarts" in shown.stdout and "sbatch" in shown.stdout
    for args, words in (([], "no script"), (["--gpu", "1", "tad.py"], "unknown option --gpu"),
                        (["--nodes", "2", "tad.py"], "--rdzv HOST:PORT")):
        wrong = subprocess.run([*SCRIPT, *args], capture_output=True, text=True)
        assert wrong.returncode == 2 and words in wrong.stderr and "--help" in wrong.stderr
    assert len((ROOT / "ddp_launch.sh").read_text().splitlines()) <= 60


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
    newest = json.loads((tmp_path / "run/checkpoints/step-000002/checksums.json").read_text())
    assert len(newest["files"]) == 2  # each node wrote its rows
    trained, base = nt_model.load(tmp_path / "run/model"), nt_model.load(tmp_path / "base")
    assert not torch.equal(trained.embed.weight, base.embed.weight)
    row = data.read_jsonl(tmp_path / "run/log.jsonl")[-1]
    assert row["tok_per_s"] > 0 and 0 < row["data_wait"] < 1 and "tokens" not in row


# -------------------------------------------------------------------------------------------- one process
def test_rounds_collect_with_the_student_and_continue(tmp_path, monkeypatch):
    """Three rounds; interrupted in the second's collection and training, the same weights come out."""
    folder, final = official_checkpoint(tmp_path / "base", "sdar"), "adapter/adapter_model.safetensors"
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{n}?", "answer": "x"}}\n' for n in range(6)))

    def run(name, *extra):
        args = ["t3d.py", "--model", folder, "--data", tmp_path / "p.jsonl", "--out", tmp_path / name,
                "--no-full", "--gen_len", "8", "--block_len", "4", "--batch_size", "4", "--lr", "1e-2",
                "--max_steps", "6", "--rounds", "3", "--refresh", "2", "--save_every", "4",
                "--warmup_steps", "0", *extra]
        monkeypatch.setattr("sys.argv", [str(a) for a in args])
        return t3d.main()
    run("whole")
    rounds = [data.read_trajectories(tmp_path / "whole" / f"trajectories{r}") for r in
              ("", "-round-1", "-round-2")]
    assert [len(r) for r in rounds] == [6, 6, 6]
    assert [r[0]["decoding"]["block_len"] for r in rounds] == [4, 8, 8]  # the student's block
    assert rounds[0][0]["model"] != rounds[1][0]["model"] and "2 rounds" in rounds[2][0]["model"]
    assert any(a["x0"] != b["x0"] for a, b in zip(rounds[0], rounds[1]))  # another model decoded
    inner = data.grade.is_correct

    def dies(problem, text, seen=[]):
        seen.append(1)
        if len(seen) == 9:  # in the third record of the second round
            raise KeyboardInterrupt
        return inner(problem, text)
    with monkeypatch.context() as m:
        m.setattr(data.grade, "is_correct", dies)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert len(data.read_trajectories(tmp_path / "cut/trajectories-round-1")) == 2
    with monkeypatch.context() as m:  # SIGTERM within the round
        m.setattr(t3d, "check_finite", lambda loss, ids, out, step: step == 2 and t3d.STOP.set())
        assert run("cut") == 143
    run("cut")
    a, b = ((tmp_path / name / final).read_bytes() for name in ("whole", "cut"))
    assert a == b
    for file in (tmp_path / "cut/adapter", tmp_path / "cut/trajectories-round-2"):
        file.rename(file.with_name("gone-" + file.name))
    newest = tmp_path / "cut/checkpoints/step-000006"
    newest.rename(newest.with_name("gone"))
    (tmp_path / "cut/checkpoints/step-000004").rename(newest.with_name("step-000005"))
    with pytest.raises(UserError, match="not complete, and the weights it began with are gone"):
        run("cut")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_checkpointed_and_compiled_blocks_have_the_same_gradient(name):
    """Compiled with a backend that only captures: one graph per use, no more as adapters go on and off."""
    ids, valid = torch.randint(0, 30, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    valid[0, :3] = False
    grads = {}
    for kind in ("plain", "checkpointed", "compiled"):
        model = lora.add(random_model(**CONFIGS[name]), 4, 4)
        for _, m in lora.adapters(model):
            torch.nn.init.normal_(m.lora_B, generator=torch.Generator().manual_seed(0))
            torch.nn.init.normal_(m.lora_A, generator=torch.Generator().manual_seed(1))
        model.checkpoint_blocks = kind == "checkpointed"
        graphs = []
        if kind == "compiled":
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)
        for _ in range(3):  # student and teacher, as TAD runs them
            loss = model.head(model.hidden(ids, valid)).float().logsumexp(-1).sum()
            with torch.no_grad(), lora.off(model):
                model.hidden(ids, valid)
            model.zero_grad()
            loss.backward()
        grads[kind] = torch.cat([p.grad.flatten() for p in tad.trainable(model).values()])
        assert len(graphs) == (2 if kind == "compiled" else 0), len(graphs)
    for kind in ("checkpointed", "compiled"):
        assert (grads[kind] - grads["plain"]).norm() <= 1e-5 * grads["plain"].norm()


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


def test_dry_run_loads_no_weights(tmp_path, monkeypatch, capsys):
    folder = official_checkpoint(tmp_path / "base", "dream")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 1?", "solution": "2", "answer": "2"}\n' * 8)
    for module, extra, steps in ((tad, [], "8 examples: 1 steps"), (t3d, [], "8 examples: 2 steps")):
        args = [module.__file__, "--model", str(folder), "--data", str(tmp_path / "p.jsonl"), "--dry_run",
                "--out", str(tmp_path / "run"), "--batch_size", "8" if module is tad else "4",
                *(["--states_per_trajectory", "1"] if module is tad else []), "--full", *extra]
        monkeypatch.setattr("sys.argv", args)
        assert module.main() is None
        said = capsys.readouterr().out
        assert steps in said and "GiB per GPU" in said and not (tmp_path / "run").exists()


def test_memory_of_real_shapes(capsys):
    """Weights, gradients and AdamW of LLaDA-8B, counted by hand: 16 bytes a parameter over 8 GPUs, and bf16
    of what is gathered; LoRA: 2 bytes a parameter.
    """
    import bench
    shape = bench.SHAPES["llada-8b"]
    with torch.device("meta"):
        model = nt_model.Transformer(shape)
    n, block = 8_015_581_184, sum(p.numel() for p in model.blocks[0].parameters())
    cfg = tad.Config(full=True)
    nt_model.print_memory(model, cfg, frozen_copy=False)
    row = capsys.readouterr().out.splitlines()[-2].split()
    gathered = 2 * (2 * block + n - shape.n_layer * block)
    want = [(4 * n / 8 + gathered), 4 * n / 8, 8 * n / 8]
    assert row[0] == "8" and [float(x) for x in row[1:4]] == [round(w / 2**30, 1) for w in want]
    nt_model.print_memory(lora.add(model, 128, 128), tad.Config(), frozen_copy=True)
    row = capsys.readouterr().out.splitlines()[-2].split()
    assert float(row[1]) == round((2 * n + 4 * (sum(p.numel() for p in model.parameters()) - n)) / 2**30, 1)
