import itertools
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from checkpoints import official_checkpoint
from conftest import CONFIGS, ROOT, all_weights, command, random_model
from safetensors.torch import load_file

import cli
import data
import eval as nt_eval
import lora
import model as nt_model
import run as training
import tad
from cli import UserError
from rollout import rollout
from tad import Config, auto_window, make_batch, tad_loss

TOK = data.load_tokenizer("tiny")


# -------------------------------------------------------------------------------------------------- the loss
LOGP = [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]  # student, 4 rows
LOGQ = [[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [0.2, 0.6, 0.2], [0.5, 0.25, 0.25]]  # teacher
X0 = [0, 2, 1, 1]
NEAR = [True, True, False, False]
EXAMPLE = [0, 0, 0, 1]  # example 0 has rows 0, 1, 2; example 1 has row 3


def loss(near="ce", distant="kl", lam=1.0, tau=1.0, teacher=True, n_examples=2):
    cfg = SimpleNamespace(near=near, distant=distant, lam=lam, tau=tau)
    terms = tad.token_terms(torch.tensor(LOGP).log(), torch.tensor(LOGQ).log() if teacher else None,
                            torch.tensor(X0), cfg)
    return tad_loss(*terms.unbind(1), torch.tensor(NEAR), torch.tensor(EXAMPLE), n_examples, cfg)


def kl(q, p):
    return sum(a * math.log(a / b) for a, b in zip(q, p))


CE = [-math.log(LOGP[i][X0[i]]) for i in range(4)]
KL = [kl(q, p) for q, p in zip(LOGQ, LOGP)]


@pytest.mark.parametrize("near, distant, lam, want", [
    # mean over example 0's two near rows, over 2 examples; example 0 has one distant row, example 1 one
    ("ce", "kl", 1.0, (CE[0] + CE[1]) / 2 / 2 + (KL[2] + KL[3]) / 2),
    ("ce", "kl", 0.5, (CE[0] + CE[1]) / 2 / 2 + 0.5 * (KL[2] + KL[3]) / 2),
    ("kl", "ce", 1.0, (KL[0] + KL[1]) / 2 / 2 + (CE[2] + CE[3]) / 2),
    ("none", "kl", 1.0, (KL[2] + KL[3]) / 2),
    ("ce", "none", 1.0, (CE[0] + CE[1]) / 2 / 2),
    ("kl", "kl", 2.0, (KL[0] + KL[1]) / 2 / 2 + 2 * (KL[2] + KL[3]) / 2),
    ("ce", "ce", 1.0, (CE[0] + CE[1]) / 2 / 2 + (CE[2] + CE[3]) / 2),
])
def test_loss_by_hand(near, distant, lam, want):
    assert abs(loss(near, distant, lam)[0].item() - want) < 1e-5


def test_temperature_by_hand():
    """tau = 2: probabilities proportional to square roots, times tau^2."""
    def soften(p):
        root = [math.sqrt(x) for x in p]
        return [x / sum(root) for x in root]
    want = 4 * sum(kl(soften(LOGQ[i]), soften(LOGP[i])) for i in (2, 3)) / 2
    assert abs(loss("none", "kl", tau=2.0)[0].item() - want) < 1e-5


def test_gradient_by_finite_differences():
    cfg = SimpleNamespace(near="ce", distant="kl", lam=0.7, tau=1.5)
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=g) for _ in range(2))

    def f(s):
        terms = tad.token_terms(s, teacher, torch.tensor(X0), cfg)
        return tad_loss(*terms.unbind(1), torch.tensor(NEAR), torch.tensor(EXAMPLE), 2, cfg)[0]
    student.requires_grad_()
    f(student).backward()
    for i, j in np.ndindex(4, 3):
        d = torch.zeros(4, 3)
        d[i, j] = 1e-2
        numeric = (f(student + d) - f(student - d)).item() / 2e-2
        assert abs(numeric - student.grad[i, j].item()) < 1e-3


def test_micro_batches_sum_to_the_batch():
    """Losses are divided by the global number of examples: splitting the batch changes nothing."""
    model = lora.add(random_model(**VOCAB), 4, 4)
    cfg, examples = config(batch_size=4), [(record(i), t) for i, t in enumerate((0, 2, 5, 7))]
    rngs = [data.example_rng(0, 0, i) for i in range(4)]
    whole = tad.training_loss(model, model, batch_of(examples, cfg, 3, model, rngs), cfg)[0]
    singles = [batch_of(examples[i:i + 1], cfg, 3, model, rngs[i:i + 1]) for i in range(4)]
    parts = [tad.training_loss(model, model, single, cfg)[0] for single in singles]
    assert abs(whole.item() - sum(p.item() for p in parts)) < 1e-5


def batch_of(examples, cfg, window, model, rngs=None):
    """What main() builds of a micro-batch."""
    batch = make_batch(examples, rngs or [None] * len(examples), cfg, window, model.cfg)
    return {**batch, "teacher_prompts": tad.teacher_prompts([r for r, _ in examples], cfg, TOK, model.cfg)}


# --------------------------------------------------------------------------------------------- batch builder
VOCAB = dict(vocab_size=298, mask_token_id=297, eos_token_id=296, pad_token_id=296)


def config(**kw):
    return Config(**{"gen_len": 8, "block_len": 4, "batch_size": 4, **kw})


def record(seed, L=8):
    rng = np.random.default_rng(seed)
    order = rng.permutation(L).tolist()
    p = data.load_problems("tiny", "train", 4)[seed % 4]
    return dict(id=f"r{seed}", source="tiny", x0=rng.integers(0, 296, L).tolist(), order=order, rank=order,
                solution=p["solution"], prompt=p["prompt"], prompt_ids=TOK.prompt_ids(p["prompt"]).tolist(),
                privileged_prompt_ids=TOK.prompt_ids(data.privileged_prompt(p)).tolist())


def test_near_and_distant_by_hand():
    r = dict(id=0, x0=[10, 11, 12, 13, 14], order=[3, 0, 4, 1, 2], prompt_ids=[1, 2])
    mcfg = random_model(**VOCAB).cfg
    b = make_batch([(r, 1)], [None], config(), 2, mcfg)  # t = 1, W = 2: near are orders 1, 2; distant 3, 4
    assert b["xt"].tolist() == [[297, 11, 297, 297, 297]]
    assert b["masked"].tolist() == [[True, False, True, True, True]]
    assert b["near"].tolist() == [[False, False, False, True, True]]
    b = make_batch([(r, 3)], [None], config(), 20, mcfg)  # a window past the end: everything left is near
    assert b["near"].tolist() == [[True, False, True, False, False]] == b["masked"].tolist()


def test_block_causal_windows_end_with_the_block():
    """Blocks count from absolute position 0:
    with 2 prompt tokens and blocks of 4, the first holds two responses.
    """
    r = dict(id=0, x0=[10] * 6, order=[0, 1, 2, 3, 4, 5], prompt_ids=[1, 2])
    mcfg = random_model(**VOCAB, block_size=4).cfg
    near = [make_batch([(r, t)], [None], config(), 4, mcfg)["near"][0].tolist() for t in (0, 1, 2)]
    assert near[0] == [True, True, False, False, False, False]
    assert near[1] == [False, True, False, False, False, False]
    assert near[2] == [False, False, True, True, True, True]


@pytest.mark.parametrize("source", ["traj_random", "gt_random"])
def test_random_sources_mask_at_random_and_ignore_the_state(source):
    mcfg, cfg = random_model(**VOCAB).cfg, config(source=source)
    r = record(0, 400)
    share = []
    for i in range(200):
        b = make_batch([(r, 399)], [data.example_rng(0, 0, i)], cfg, 2, mcfg)
        assert torch.equal(b["near"], b["masked"])
        share.append(b["masked"].float().mean().item())
    assert abs(np.mean(share) - 0.5) < 0.07 and np.std(share) > 0.2  # t ~ U(0, 1]


def test_teacher_prompts():
    r, FACTS = record(1), random_model(**VOCAB).cfg
    assert tad.teacher_prompts([r], config(teacher_prompt="plain"), TOK, FACTS) == [r["prompt_ids"]]
    assert tad.teacher_prompts([r], config(), TOK, FACTS) == [r["privileged_prompt_ids"]]
    assert tad.teacher_prompts([r], config(source="no_privilege"), TOK, FACTS) == [r["prompt_ids"]]
    explicit = config(source="no_privilege", teacher_prompt="privileged")  # what is given counts
    assert tad.teacher_prompts([r], explicit, TOK, FACTS) == [r["privileged_prompt_ids"]]
    plain = {key: value for key, value in r.items() if key != "privileged_prompt_ids"}
    shown = TOK.prompt_ids(data.privileged_prompt(r)).tolist()
    assert tad.teacher_prompts([plain], explicit, TOK, FACTS) == [shown] != [r["prompt_ids"]]  # collected without it
    system = tad.teacher_prompts([r], config(teacher_prompt="system"), TOK, FACTS)[0]
    assert len(system) > len(r["prompt_ids"]) and system[-len(r["prompt_ids"]) + 1:] == r["prompt_ids"][1:]


@pytest.mark.parametrize("name", ["plain", "block", "whole", "all"])
def test_blocks_behind_the_solution_are_those_behind_the_plain_prompt(tmp_path, name):
    """What is collected there passes through states of the student's own decoding only: one block is open."""
    model = random_model(**{**CONFIGS[name], **VOCAB, "max_position_embeddings": 256})
    K, problems = model.cfg.block_len, data.load_problems("tiny", "train", 6)
    records = rollout(model, TOK, problems, tmp_path / "folder", "x", privileged=True, graded=False, gen_len=8,
                      block_len=K or 4, policy="static", per_step=1, cache="none")
    shifted = 0
    for r in records:
        plain, shown = r["prompt_ids"], TOK.prompt_ids(data.privileged_prompt(r)).tolist()
        first = 0 if model.cfg.whole_blocks or not K else len(plain)
        missing = (len(plain) - len(shown)) % K if first else 0
        shifted += missing > 0
        assert r["privileged_prompt_ids"] == missing * [model.cfg.pad_id] + shown
        block = [(first + i) // (K or 4) for i in range(8)]
        for t in range(8):
            left = [i for i in range(8) if r["order"][i] >= t]
            assert all(i in left for i in range(8) if block[i] > block[left[0]])
        bare = {key: value for key, value in r.items() if key != "privileged_prompt_ids"}
        asked = [tad.teacher_prompts([bare], config(source="no_privilege", teacher_prompt=kind), TOK, model.cfg)[0]
                 for kind in ("privileged", "system")]
        assert asked[0] == r["privileged_prompt_ids"]
        assert not first or all((len(ids) - len(plain)) % K == 0 for ids in asked)
    assert (shifted > 0) == (name in ("block", "all"))


def test_an_epoch_is_every_state_once():
    records = [record(0), record(1)]
    pairs = tad.training_pairs(records, config(), 0)
    assert sorted(pairs) == [(n, t) for n in (0, 1) for t in range(8)]
    few, later = (tad.training_pairs(records, config(states_per_trajectory=3), epoch) for epoch in (0, 1))
    assert len(few) == len(set(few)) == 6 and few != later
    orders = [training.batch_of(step, len(pairs), config(batch_size=16))[1].tolist() for step in (0, 1)]
    assert orders[0] != orders[1] and all(sorted(order) == [*range(16)] for order in orders)


# ---------------------------------------------------------------------------------- teacher, window, families
def test_the_soft_teacher_is_the_base_on_the_privileged_prompt():
    """The distant term computed by hand:
    one example, base logits on [privileged | xt], student on [plain | xt].
    """
    model = lora.add(random_model(**VOCAB), 4, 4)
    for _, m in lora.adapters(model):
        m.lora_B.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    r, t, W = record(2), 3, 2
    cfg = config(batch_size=1, near="none")
    got = tad.training_loss(model, model, batch_of([(r, t)], cfg, W, model), cfg)[0]
    xt = torch.tensor([r["x0"][i] if r["order"][i] < t else 297 for i in range(8)])
    distant = [i for i in range(8) if r["order"][i] >= t + W]
    with torch.no_grad():
        student = model(torch.cat([torch.tensor(r["prompt_ids"]), xt])[None])[0, -8:].log_softmax(-1)
        base = random_model(**VOCAB)
        ids = torch.cat([torch.tensor(r["privileged_prompt_ids"]), xt])
        teacher = base(ids[None])[0, -8:].log_softmax(-1)
    want = np.mean([(teacher[i].exp() * (teacher[i] - student[i])).sum().item() for i in distant])
    assert abs(got.item() - want) < 1e-4


def test_teacher_runs_only_where_distant_tokens_exist(monkeypatch):
    model = lora.add(random_model(**VOCAB), 4, 4)
    rows, inner = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **kw: rows.append(len(ids)) or inner(ids, **kw))
    examples = [(record(0), 0), (record(1), 7), (record(2), 6)]
    cfg = config(batch_size=3)
    tad.training_loss(model, model, batch_of(examples, cfg, 2, model), cfg)
    assert rows == [3, 1]  # only the first example has tokens more than W = 2 forwards away
    rows.clear()
    cfg = config(batch_size=3, distant="none")
    tad.training_loss(model, model, batch_of(examples, cfg, 2, model), cfg)
    assert rows == [3]


def test_auto_window_by_hand():
    decay = np.array([0.9, 0.7, 0.49, 0.6, 0.3, 0.19])
    assert auto_window(decay, "auto-quality") == 2 and auto_window(decay, "auto-speed") == 5
    assert auto_window(np.array([0.4, 0.3]), "auto-quality") == 1
    assert auto_window(np.array([0.9, np.nan, 0.6, 0.4]), "auto-quality") == 3  # unseen offsets do not count
    assert auto_window(np.array([0.9, 0.8]), "auto-speed") == 2  # never below: everything is near


def test_confidence_decay_by_hand():
    """Against a plain loop over single states, EOS tail excluded."""
    model, r = random_model(**VOCAB), record(3) | dict(id="own-3", source="own", decoding={})
    r["x0"][5:] = [296, 296, 296]
    got = nt_eval.confidence_decay(model, [r])
    sums = {}
    for t in range(8):
        xt = torch.tensor([r["x0"][i] if r["order"][i] < t else 297 for i in range(8)])
        p = model(torch.cat([torch.tensor(r["prompt_ids"]), xt])[None])[0, -8:].softmax(-1)
        for i in range(5):
            if r["order"][i] >= t:
                sums.setdefault(r["order"][i] - t, []).append(p[i, r["x0"][i]].item())
    for offset, ps in sums.items():
        assert abs(got[offset] - np.mean(ps)) < 1e-5


@pytest.mark.parametrize("name", list(CONFIGS))
def test_one_step_on_every_kind_of_model(name):
    """Each kind of attention and head collects, trains and lowers its loss on the batch it trained on."""
    model = random_model(scale=1.0, **{**CONFIGS[name], **VOCAB})
    lora.add(model, 8, 8)
    examples = [(record(i), i) for i in range(4)]
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss, _ = tad.training_loss(model, model, batch_of(examples, config(), 4, model), config())
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------- the command line
def checkpoint(tmp_path):
    """A small random checkpoint that decodes: the whole command runs on it in seconds."""
    folder = tmp_path / "random"
    nt_model.save(random_model(max_position_embeddings=160, **VOCAB), folder)
    nt_model.copy_tokenizer("tiny", folder)
    return folder


def problems_any_answer(tmp_path, model_dir):
    """Problems whose answer is what the random model says, so that its trajectories pass the filter."""
    model, problems = nt_model.load(model_dir), data.load_problems("tiny", "train", 12)
    records = rollout(model, TOK, problems, tmp_path / "probe", "x", privileged=True, gen_len=8,
                           block_len=4, policy="static", per_step=1, cache="none")
    rows = {r["id"]: r for r in records}
    file = tmp_path / "problems.jsonl"
    with open(file, "w") as f:
        for p in problems:
            x0 = rows[p["id"]]["x0"]
            f.write(json.dumps({**p, "answer": str(x0)}) + "\n")
    return file


def tad_args(model_dir, out, *extra):
    return ["--model", str(model_dir), "--data", "tiny", "--n_problems", "12", "--gen_len", "8",
            "--block_len", "4", "--batch_size", "8", "--micro_batch", "4", "--max_steps", "12",
            "--save_every", "3", "--log_every", "1", "--lora_r", "4", "--lora_dropout", "0.1",
            "--eval_problems", "0", "--window", "2", "--out", str(out), *extra]


@pytest.fixture
def graded_right(monkeypatch, tmp_path):
    """A random model answers nothing: let the filter pass, here and in a process that runs the file."""
    import grade
    monkeypatch.setattr(grade, "is_correct", lambda *_: True)
    file = tmp_path / "lenient.py"
    file.write_text("import runpy, grade\ngrade.is_correct = lambda *_: True\n"
                    f"runpy.run_path({str(ROOT / 'tad.py')!r}, run_name='__main__')")
    return file


@pytest.mark.parametrize("full", [False, True])
def test_sigkill_during_training_is_bit_identical(tmp_path, graded_right, full):
    model_dir, words = checkpoint(tmp_path), all_weights if full else list
    final = "model/model.safetensors" if full else "adapter/adapter_model.safetensors"
    whole = command(tmp_path, "tad.py", *words(tad_args(model_dir, tmp_path / "whole")))
    assert whole.returncode == 0, whole.stderr
    out, kills = tmp_path / "killed", 0
    for seen in (4, 8):
        [run] = ranks.start(1, graded_right, *words(tad_args(model_dir, out)), log=tmp_path / "said")
        deadline = time.time() + 120
        while time.time() < deadline and run.is_alive():  # kill it after `seen` logged steps
            if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= seen:
                break
            time.sleep(0.002)
        kills += run.is_alive()
        run.kill()
        run.join()
    assert kills >= 1
    assert command(tmp_path, "tad.py", *words(tad_args(model_dir, out))).returncode == 0
    a, b = load_file(tmp_path / "whole" / final), load_file(out / final)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    done = command(tmp_path, "tad.py", *words(tad_args(model_dir, out)))
    assert done.returncode == 0 and "finished already" in done.stderr
    again = command(tmp_path, "tad.py", *words(tad_args(model_dir, out)), "--eval_problems", "2")
    assert again.returncode == 0, again.stderr  # saved before; only the closing evaluation is left


def test_damaged_checkpoint_falls_back(tmp_path, graded_right):
    model_dir, out = checkpoint(tmp_path), tmp_path / "run"
    assert command(tmp_path, "tad.py", *tad_args(model_dir, out)).returncode == 0
    want = load_file(out / "adapter/adapter_model.safetensors")
    steps = sorted((out / "checkpoints").glob("step-*"))
    assert [s.name for s in steps] == ["step-000009", "step-000012"]
    (newest,) = steps[-1].glob("rank-00000-of-00001*")
    newest.write_bytes(newest.read_bytes()[:-1])
    for file in (out / "adapter").iterdir():
        file.unlink()
    (out / "adapter").rmdir()
    again = command(tmp_path, "tad.py", *tad_args(model_dir, out))
    assert again.returncode == 0 and "damaged" in again.stderr
    got = load_file(out / "adapter/adapter_model.safetensors")
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_bad_input_is_one_line_and_exit_2(tmp_path, graded_right):
    model_dir, out = checkpoint(tmp_path), tmp_path / "run"
    assert command(tmp_path, "tad.py", *tad_args(model_dir, out)).returncode == 0
    (tmp_path / "empty.jsonl").write_text("")
    broken = tmp_path / "broken"
    nt_model.save(random_model(**VOCAB), broken)
    nt_model.copy_tokenizer("tiny", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    cases = {
        "another configuration (lr": tad_args(model_dir, out, "--lr", "0.5"),
        "no model 'tinny'": tad_args("tinny", tmp_path / "a"),
        "corrupt or cut short": tad_args(broken, tmp_path / "b"),
        "is empty": tad_args(model_dir, tmp_path / "c", "--data", "empty.jsonl"),
        "of which model and gen_len allow 10": tad_args(model_dir, tmp_path / "d", "--gen_len", "150"),
        "--window 'auto': a positive number of": tad_args(model_dir, tmp_path / "e", "--window", "auto"),
        "--near none --distant none": tad_args(model_dir, tmp_path / "j", "--near", "none", "--distant", "none"),
        "save_every is 0: it must be at least 1": tad_args(model_dir, tmp_path / "k", "--save_every", "0"),
        "unrecognized arguments: --lrr": tad_args(model_dir, tmp_path / "f", "--lrr", "1"),
        "invalid float value: 'fast'": tad_args(model_dir, tmp_path / "g", "--lr", "fast"),
        "invalid choice: 'mse'": tad_args(model_dir, tmp_path / "h", "--near", "mse"),
        "look at these examples, or start anew": tad_args(model_dir, tmp_path / "i", "--lr", "1e9", "--clip", "1e9",
                                    "--window", "8"),
    }
    for words, args in cases.items():
        run = command(tmp_path, "tad.py", *args)
        assert run.returncode == 2, (words, run.stderr)
        assert words in run.stderr and "Traceback" not in run.stderr, (words, run.stderr)
    nonfinite = tmp_path / "i/nonfinite-rank0.json"
    assert nonfinite.exists() and json.loads(nonfinite.read_text())["ids"]
    assert (out / "adapter").exists()  # nothing finished was touched
    shard, want = out / "trajectories/rank0.jsonl", (out / "adapter/adapter_model.safetensors").read_bytes()
    shard.write_text("{torn\n" + shard.read_text())
    (out / "adapter").rename(out / "gone")
    run = command(tmp_path, "tad.py", *tad_args(model_dir, out))
    assert run.returncode == 0 and "line 1 is not valid JSON or is damaged" in run.stderr
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == want


def test_the_window_is_measured_on_every_data_set(monkeypatch):
    """Records come sorted by id, one data set behind the other; of one alone it is the first 64, as ever."""
    seen = []
    monkeypatch.setattr(nt_eval, "along_trajectory", lambda model, r, steps: seen.append(r["id"]) or [
        (torch.zeros(1), torch.zeros(1, dtype=torch.long), None)])
    for sources, most in ((["gsm8k"], 64), (["gsm8k", "prm12k"], 32), (["gsm8k", "kodcode", "prm12k"], 22)):
        kinds = itertools.cycle(["train-{}", "local-{}", "test/algebra/{}"])  # each source names its rows otherwise
        records = sorted((dict(id=f"{name}-{kind.format(i)}", source=name, order=[0, 1])
                          for name, kind in zip(sources, kinds) for i in range(100)), key=lambda r: r["id"])
        seen.clear()
        nt_eval.confidence_decay(None, records)
        counts = [sum(id.startswith(name) for id in seen) for name in sources]
        assert sum(counts) == 64 and max(counts) == most
        assert len(sources) > 1 or seen == [r["id"] for r in records[:64]]


@pytest.mark.parametrize("block_len, joined", [(None, False), (8, False), (16, False), (16, True), (None, True)])
def test_a_block_causal_model_trains_in_the_blocks_that_it_decoded(tmp_path, monkeypatch, block_len, joined):
    """Before the first block with a mask all is revealed, behind it nothing: states that decoding visits."""
    folder = official_checkpoint(tmp_path / "base", "sdar")
    rows = [dict(prompt=f"{n}?" + "." * n, solution="so" * n, answer="x") for n in range(1, 5)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, inner = [], tad.training_loss

    def noted(model, teacher, b, cfg):
        K = block_len or 4
        assert model.cfg.block_len == K
        block = nt_model.response_blocks(model.cfg, b["prompts"], b["xt"].shape[1])
        for number, masked, plain, shown in zip(block, b["masked"], b["prompts"], b["teacher_prompts"]):
            now = int(number[masked].min())
            assert masked[number > now].all() and not masked[number < now].any() and (len(shown) - len(plain)) % K == 0
            seen.append(now)
        return inner(model, teacher, b, cfg)
    monkeypatch.setattr(tad, "training_loss", noted)
    monkeypatch.setattr(tad, "only_correct", lambda records: records)
    words = [*map(str, ("tad.py", "--model", folder, "--data", tmp_path / "p.jsonl", "--gen_len", 32, "--max_steps", 8,
                        "--batch_size", 8, "--micro_batch", 8, "--lora_r", 2, "--out", tmp_path / "run"))]
    given = ["--block_len", str(block_len)] if block_len else []
    if joined:  # finished folders, collected before; nothing says now in which blocks
        both = [str(tmp_path / name) for name in "ab"]
        for name, n in zip(both, (0, 2)):
            (tmp_path / "half.jsonl").write_text("".join(json.dumps(row | dict(id=row["prompt"])) + "\n" for row in rows[n:n + 2]))
            model, tok = nt_model.load(folder), data.load_tokenizer(folder)
            rollout(model, tok, data.load_problems(str(tmp_path / "half.jsonl")), name, str(folder), privileged=True, gen_len=32,
                    block_len=block_len or 4, cache="exact", policy="static", per_step=1)
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row | dict(id=row["prompt"])) + "\n" for row in rows))
        given = ["--trajectories", "+".join(both)]
    monkeypatch.setattr("sys.argv", words + given)
    tad.main()
    assert len(set(seen)) > 1 and len(seen) == 64


def test_a_model_that_only_decodes_collects_twice_in_other_blocks(tmp_path):
    """Its weights are packed once, of the model itself and not of its twin in blocks of 8."""
    folder = official_checkpoint(tmp_path / "base", "sdar")
    model, tok = nt_model.load(folder, only_decodes=True), data.load_tokenizer(folder)
    rows = [dict(id=f"r{n}", source="own", prompt="?" * n, solution="so", answer="x") for n in range(1, 6)]
    for n in (2, 3, 5):
        records = rollout(model, tok, rows[:n], tmp_path / "records", str(folder), privileged=True, gen_len=16, block_len=8,
                          cache="exact", policy="static", per_step=1)
        assert len(records) == n
        assert all((len(r["privileged_prompt_ids"]) - len(r["prompt_ids"])) % 8 == 0 for r in records)


@pytest.mark.parametrize("words, n_loaded, teachers", [
    ("--full", 3, 1), ("--full --distant none", 2, 0), ("--full --source traj_random", 2, 0), ("--source gt_random", 2, 0),
    ("--full --near kl --source traj_random", 3, 1)])
def test_a_teacher_that_no_term_asks_for_is_not_loaded(tmp_path, monkeypatch, words, n_loaded, teachers):
    loaded, ran, inner = [], [], nt_model.load
    monkeypatch.setattr(nt_model, "load", lambda *args, **kw: loaded.append(1) or inner(*args, **kw))
    steps = training.Run.steps
    monkeypatch.setattr(training.Run, "steps", lambda r, *args: ran.append(r.teachers) or steps(r, *args))
    monkeypatch.setattr("sys.argv", ["tad.py", "--n_problems", "2", "--batch_size", "2", "--micro_batch", "2", "--max_steps", "1",
                                     "--eval_problems", "0", "--out", str(tmp_path / "run"), *words.split()])
    tad.main()
    assert len(loaded) == n_loaded and ran == [teachers]


def test_records_of_an_option_that_is_no_more_are_continued(tmp_path):
    """Of a changed one they are not."""
    tiny, problems = nt_model.load("tiny"), data.load_problems("tiny", "train", 3)
    how = dict(policy="static", per_step=1, **data.TINY_DECODING)
    rollout(tiny, TOK, problems[:2], tmp_path, "tiny", **how)
    rows = cli.read_jsonl(tmp_path / "rank0.jsonl", ours=True)
    lines = [cli.line_of(row | dict(decoding=row["decoding"] | dict(decoded=0.95))) for row in rows]
    (tmp_path / "rank0.jsonl").write_text("".join(lines))
    assert len(rollout(tiny, TOK, problems, tmp_path, "tiny", **how)) == 3
    with pytest.raises(UserError, match=r"other settings \(top_k\)"):
        rollout(tiny, TOK, problems, tmp_path, "tiny", **how, top_k=2)


def test_several_finished_folders_are_read_together(tmp_path):
    """Collected with other settings, as the paper's code does it; only the problems that are asked for."""
    tiny, problems = nt_model.load("tiny"), data.load_problems("tiny", "train", 5)
    for name, some, temperature in (("a", problems[:2], 0.7), ("b", problems[2:], 0.0)):
        rollout(tiny, TOK, some, tmp_path / name, "tiny", privileged=True, temperature=temperature,
                policy="static", per_step=1, **data.TINY_DECODING)
    cfg = config(gen_len=48, block_len=16, trajectories=f"{tmp_path}/a+{tmp_path}/b")
    both = tad.trajectories(cfg, tiny, TOK, problems, tmp_path)
    assert {r["id"] for r in both} <= {p["id"] for p in problems} and len(both) >= 3
    assert {r["decoding"]["temperature"] for r in both} == {0.0, 0.7}
    few = tad.trajectories(cfg, tiny, TOK, problems[1:3], tmp_path)
    assert {r["id"] for r in few} <= {p["id"] for p in problems[1:3]}
    with pytest.raises(UserError, match="none has none of tiny with gen_len 48: collect them"):
        cfg.trajectories = f"{tmp_path}/none+{tmp_path}/nowhere"
        tad.trajectories(cfg, tiny, TOK, problems, tmp_path)
