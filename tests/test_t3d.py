"""T3D: every number is worked out by hand here."""
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import official_checkpoint
from conftest import ROOT, random_model

import data
import lora
import model as nt_model
import rollout
import run as training
import t3d
from t3d import Config, draw_mask, make_batch, path_weights, ranks_in_blocks, t3d_loss, token_terms

FACTS = SimpleNamespace(mask_id=9, eos_ids=(8,), pad_id=8, block_len=0)


def record(x0, rank, prompt=(1, 2, 3)):
    return dict(id="r", x0=list(x0), rank=list(rank), order=list(rank), prompt_ids=list(prompt))


def sigma(x):
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------ the loss
# example 0 has two masked rows, example 1 one. p_theta and p_ref over three tokens:
P = [[.5, .3, .2], [.1, .7, .2], [.25, .25, .5]]
Q = [[.4, .4, .2], [.2, .2, .6], [.3, .1, .6]]
X0, X_HAT = [0, 1, 2], [1, 2, 2]  # u = .5, .9, .95 draws x_hat from Q; argmax would be 0, 2, 2
EXAMPLE, W = [0, 0, 1], [1.0, 0.5, 0.75]


def terms(cfg, u=(.5, .9, .95)):
    return token_terms(torch.tensor(P).log(), torch.tensor(Q).log(), torch.tensor(X0), torch.tensor(u), cfg)


def log_ratio(ids):
    return [math.log(P[i][t] / Q[i][t]) for i, t in enumerate(ids)]


@pytest.mark.parametrize("fake, logratio", itertools.product(["sample", "argmax", "expected"],
                                                             ["mean", "sum"]))
@pytest.mark.parametrize("beta, alpha, lam", [(0.1, 0.5, 0.2), (2.0, 1.0, 0.0)])
def test_loss_by_hand(fake, logratio, beta, alpha, lam):
    cfg = Config(fake=fake, logratio=logratio, beta=beta, alpha=alpha, lam=lam)
    real = log_ratio(X0)
    if fake == "expected":  # -KL(q, p) of every row
        wrong = [sum(q * math.log(p / q) for p, q in zip(P[i], Q[i])) for i in range(3)]
    else:
        wrong = log_ratio(X_HAT if fake == "sample" else [0, 2, 2])
    n = 2 if logratio == "mean" else 1
    delta = [beta * (real[0] + real[1]) / n, beta * real[2]]
    delta_hat = [beta * (wrong[0] + wrong[1]) / n, beta * wrong[2]]
    want_real = sum(-math.log(sigma(d)) for d in delta) / 2
    want_fake = alpha * sum(-math.log(1 - sigma(d)) for d in delta_hat) / 2
    ce = [-math.log(P[i][X0[i]]) for i in range(3)]
    want_path = ((1.0 * ce[0] + 0.5 * ce[1]) / 2 + 0.75 * ce[2]) / 2
    loss, parts = t3d_loss(*terms(cfg).unbind(1), torch.tensor(W), torch.tensor(EXAMPLE), 2, cfg)
    assert abs(parts["real"] - want_real) < 1e-5 and abs(parts["fake"] - want_fake) < 1e-5
    assert abs(parts["path"] - want_path) < 1e-5
    assert abs(loss.item() - (want_real + want_fake + lam * want_path)) < 1e-5


def test_naive_td_by_hand():
    cfg = Config(loss="naive_td", lam=0.5)
    ce = [-math.log(P[i][X0[i]]) for i in range(3)]
    want = ((ce[0] + ce[1]) / 2 + ce[2]) / 2 + 0.5 * ((ce[0] + 0.5 * ce[1]) / 2 + 0.75 * ce[2]) / 2
    loss = t3d_loss(*terms(cfg).unbind(1), torch.tensor(W), torch.tensor(EXAMPLE), 2, cfg)[0]
    assert abs(loss.item() - want) < 1e-5


@pytest.mark.parametrize("settings", [dict(), dict(fake="argmax", logratio="sum"), dict(fake="expected"),
                                      dict(loss="naive_td")])
def test_gradient_by_finite_differences(settings):
    cfg = Config(beta=1.0, **settings)
    g = torch.Generator().manual_seed(0)
    student, ref = torch.randn(3, 4, generator=g, requires_grad=True), torch.randn(3, 4, generator=g)

    def loss(z):
        rows = token_terms(z, ref, torch.tensor(X0), torch.tensor([.2, .5, .8]), cfg)
        return t3d_loss(*rows.unbind(1), torch.tensor(W), torch.tensor(EXAMPLE), 2, cfg)[0]
    loss(student).backward()
    for i, j in np.ndindex(3, 4):
        d = torch.zeros(3, 4)
        d[i, j] = 1e-2
        with torch.no_grad():
            numeric = (loss(student + d) - loss(student - d)).item() / 2e-2
        assert abs(numeric - student.grad[i, j].item()) < 1e-3


def test_fakes_are_drawn_from_the_reference():
    n = 20000
    u = (torch.arange(n) + 0.5) / n
    ref = torch.tensor(Q[1]).log().expand(n, 3)
    rows = token_terms(torch.zeros(n, 3), ref, torch.zeros(n).long(), u, Config())
    share = [(rows[:, 3] - math.log(q)).abs().lt(1e-5).float().mean().item() for q in (.2, .6)]
    assert abs(share[0] - .4) < 1e-3 and abs(share[1] - .6) < 1e-3  # two tokens have .2


# ------------------------------------------------------------------------------------- states and weights
def test_ranks_within_blocks_by_hand():
    """Prompt of 3, blocks of 4 from position 0: response positions (0), (1 2 3 4), (5)."""
    rank = torch.tensor([[3, 5, 0, 4, 1, 2]])
    pi, size = ranks_in_blocks(rank, (3 + torch.arange(rank.shape[1])[None]) // 4)
    assert pi.tolist() == [[1, 4, 1, 3, 2, 1]] and size.tolist() == [[1, 4, 4, 4, 4, 1]]
    pi, size = ranks_in_blocks(rank, torch.zeros_like(rank))  # one block
    assert pi.tolist() == [[4, 6, 1, 5, 2, 3]] and size.tolist() == [[6] * 6]


def test_path_weights_by_hand():
    pi, size = torch.tensor([[1, 4, 1, 3, 2, 1]]), torch.tensor([[1, 4, 4, 4, 4, 1]])
    every = torch.ones_like(pi, dtype=torch.bool)
    w = path_weights(pi, size, every, Config())
    assert torch.allclose(w, torch.tensor([[1, .25, 1, .5, .75, 1]]))  # (B - pi + 1) / B
    # the code: of the masked 1, 2, 3 (pi 4, 1, 3 of 4) only position 2 is in the first half
    masked = torch.tensor([[False, True, True, True, False, False]])
    w = path_weights(pi, size, masked, Config(path="code"))
    ce = torch.tensor([[9., 1., 2., 5., 9., 9.]])
    assert abs((w * ce)[masked].mean().item() - (3 * 2 + (1 + 5) / 2) / 4) < 1e-6
    only_late = torch.tensor([[False, True, False, True, False, False]])
    w = path_weights(pi, size, only_late, Config(path="code"))
    assert abs((w * ce)[only_late].mean().item() - 3) < 1e-6


def test_states_by_hand():
    """One block of 4, ranks 2 0 3 1: j revealed tokens for j = 0..3; the paper masks the latest."""
    pi, size = torch.tensor([[3, 1, 4, 2]]), torch.full((1, 4), 4)

    def states(**settings):
        rngs = [data.example_rng(0, 0, i) for i in range(80)]
        return {tuple(draw_mask(pi, size, 0, Config(**settings), [rng])[0].tolist()) for rng in rngs}
    X, o = True, False
    assert states() == {(X, X, X, X), (X, o, X, X), (X, o, X, o), (o, o, X, o)}
    assert states(mask_order="code") == {(X, X, X, X), (X, X, o, X), (o, X, o, X), (o, X, o, o)}
    rngs = [data.example_rng(0, 0, i) for i in range(2000)]
    full = np.mean([draw_mask(pi, size, 0, Config(state_dist="code"), [rng]).all().item() for rng in rngs])
    assert abs(full - 1 / (1 + .75 ** 8 + .5 ** 8 + .25 ** 8)) < 0.02  # 91%
    short = ranks_in_blocks(torch.tensor([[1, 0]]), torch.zeros(1, 2))  # two tokens in blocks of 8: never without a row
    assert all(draw_mask(*short, 8, Config(), [data.example_rng(0, 0, i)]).any() for i in range(40))


@pytest.mark.parametrize("mask_mass", [0.05, 0.3, 0.47, 0.9])
def test_the_expected_fake_is_the_mean_of_the_sampled_ones(mask_mass):
    """Also where the reference would like the mask id, which no fake ever is."""
    rest = 1 - mask_mass
    q = torch.tensor([0.6 * rest, 0.3 * rest, 0.1 * rest, mask_mass]).log()
    p, n = torch.tensor([0.2, 0.3, 0.3, 0.2]).log(), 20_000
    u = (torch.arange(n) + 0.5) / n
    rows = token_terms(p.expand(n, 4), q.expand(n, 4), torch.zeros(n).long(), u, Config(), mask_id=3)
    sampled = (rows[:, 2] - rows[:, 3]).mean().item()
    cfg = Config(fake="expected")
    exact = token_terms(p[None], q[None], torch.tensor([0]), u[:1], cfg, mask_id=3)[0]
    by_hand = sum(w * (p[i] - q[i]).item() for i, w in enumerate((0.6, 0.3, 0.1)))
    assert abs(exact[2] - exact[3] - by_hand) < 1e-5 and abs(sampled - by_hand) < 1e-3


def test_the_eos_tail_behind_some_is_not_learned():
    """x0 = a b EOS EOS EOS EOS EOS EOS: with two in the loss, positions 4 to 7 are shown, and never masked."""
    facts = SimpleNamespace(**{**vars(FACTS), "eos_ids": (8,)})
    r = [record([10, 11, 8, 8, 8, 8, 8, 8], [0, 5, 1, 4, 2, 3, 7, 6]), record([8] * 8, range(8)),
         record(range(20, 28), range(8))]
    seen, rngs = torch.zeros(3, 8, dtype=torch.bool), [data.example_rng(0, 0, i) for i in range(120)]
    for order in ("paper", "code"):
        cfg = Config(eos_in_loss=2, rand_p=0.0, mask_order=order)
        for i in range(0, 120, 3):
            b = make_batch(r, rngs[i:i + 3], cfg, facts, [5])
            assert b["masked"].any(1).all() and torch.equal(b["xt"][~b["masked"]], b["x0"][~b["masked"]])
            seen |= b["masked"]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [[0, 1, 2, 3], [0, 1], list(range(8))]
    every = [make_batch(r, [data.example_rng(0, 1, i) for i in range(3)], Config(eos_in_loss=n), facts, [5])[
        "masked"] for n in (0, 8, 99)]
    assert torch.equal(every[0], every[1]) and torch.equal(every[0], every[2])  # all that fit
    assert t3d.PRESETS["sdar"]["eos_in_loss"] == 2 and "eos_in_loss" not in t3d.PRESETS["tiny"]


def test_random_tokens_are_ids_that_the_data_holds(tmp_path, monkeypatch):
    """The tiny vocabulary has 294 ids, its problems use few of them; no special token is drawn."""
    drawn, inner = [], t3d.make_batch

    def noted(records, rngs, cfg, facts, vocabulary):
        drawn.append((records, vocabulary))
        return inner(records, rngs, cfg, facts, vocabulary)
    monkeypatch.setattr(t3d, "make_batch", noted)
    monkeypatch.setattr("sys.argv", ["t3d.py", *"--n_problems 8 --max_steps 1 --batch_size 8 --micro_batch 8".split(),
                                     "--eval_problems", "0", "--out", str(tmp_path / "run")])
    t3d.main()
    records, vocabulary = drawn[0]
    tok = data.load_tokenizer("tiny")
    held = {i for r in records for i in r["prompt_ids"] + r["x0"]}
    assert set(vocabulary) == held - set(tok.special.values()) and len(vocabulary) < 40


def test_random_tokens_stand_where_masks_would():
    r = [record(range(20, 60), range(40)) for _ in range(50)]
    b = make_batch(r, [data.example_rng(0, 0, i) for i in range(50)], Config(rand_p=0.3), FACTS, [5, 6])
    shown = b["xt"][b["masked"]]
    assert set(shown.tolist()) == {5, 6, 9} and abs((shown != 9).float().mean().item() - 0.3) < 0.05
    assert torch.equal(b["xt"][~b["masked"]], b["x0"][~b["masked"]])
    b = make_batch(r, [data.example_rng(0, 0, i) for i in range(50)], Config(rand_p=0.0), FACTS, [5, 6])
    assert (b["xt"][b["masked"]] == 9).all()


@pytest.mark.parametrize("facts", [{}, dict(block_size=4)])
def test_the_reference_is_the_student_at_first_and_then_stays(facts):
    """With ref = student both ratios are 0, so real = -log 1/2 and fake = -alpha log 1/2; a changed student
    has other ratios, and the swap leaves it as it was.
    """
    model = lora.add(random_model(**facts), 4, 4)
    rng = np.random.default_rng(0)
    records = [record(rng.integers(0, 30, 8).tolist(), rng.permutation(8).tolist()) for _ in range(3)]

    def parts():
        rngs, cfg = [data.example_rng(0, 0, i) for i in range(3)], Config(batch_size=3)
        batch = make_batch(records, rngs, cfg, model.cfg, list(range(30)))
        return t3d.training_loss(model, ref, batch, cfg)[1]
    ref = training.Reference(SimpleNamespace(whole=False), model)
    same = parts()
    assert abs(same["real"] - math.log(2)) < 1e-5 and abs(same["fake"] - 0.5 * math.log(2)) < 1e-5
    for _, m in lora.adapters(model):
        torch.nn.init.normal_(m.lora_B)
    before = {name: p.detach().clone() for name, p in training.trainable(model).items()}
    other = parts()
    assert abs(other["real"] - math.log(2)) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in training.trainable(model).items())
    with ref.in_place_of(model):
        assert all(torch.equal(p, ref.tensors()[name]) for name, p in training.trainable(model).items())
    ref.refresh(model)
    assert all(torch.equal(p, ref.tensors()[name]) for name, p in training.trainable(model).items())


# --------------------------------------------------------------------------------------------- whole runs
def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["t3d.py", *map(str, args)])
    t3d.main()


SMALL = ["--gen_len", "8", "--block_len", "4", "--batch_size", "4", "--micro_batch", "2", "--lr", "1e-2"]


@pytest.mark.parametrize("family, full", [("llada", False), ("dream", False), ("sdar", True),
                                          ("sdar", False)])
def test_t3d_trains_two_steps_on_every_family(tmp_path, monkeypatch, family, full):
    folder = official_checkpoint(tmp_path / "base", family)
    lines = [f'{{"prompt": "{n} + {n}?", "answer": "x"}}' for n in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    run(monkeypatch, "--model", folder, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run", *SMALL,
        "--max_steps", "2", "--full" if full else "--no-full")
    base, ids = nt_model.load(folder), torch.randint(0, 250, (1, 9))
    if full:  # trained in blocks of 8, and decodes in them
        trained = nt_model.load(tmp_path / "run/model")
        assert trained.cfg.block_len == 8
    else:
        trained = lora.load(nt_model.load(folder), tmp_path / "run/adapter")
    assert not torch.equal(trained(ids), base(ids))


@pytest.mark.parametrize("refresh, full", [(2, True), (3, False)])
def test_a_run_refreshes_its_reference_at_every_so_many_steps(tmp_path, monkeypatch, refresh, full):
    inner, then, used = t3d.training_loss, [], []

    def noted(model, ref, *args):
        then.append({name: p.detach().clone() for name, p in training.trainable(model).items()})
        used.append({name: t.detach().clone() for name, t in ref.tensors().items()})
        return inner(model, ref, *args)
    monkeypatch.setattr(t3d, "training_loss", noted)
    folder = official_checkpoint(tmp_path / "base", "sdar")
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{n}?", "answer": "x"}}\n' for n in range(4)))
    run(monkeypatch, "--model", folder, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run", *SMALL,
        "--micro_batch", 4, "--max_steps", 5, "--refresh", refresh, "--save_every", 6, "--warmup_steps", 0,
        "--full" if full else "--no-full")
    for step, of_ref in enumerate(used):
        for name, p in then[step - step % refresh].items():
            assert torch.equal(of_ref[name], p), (step, name)
    name = next(name for name, p in then[0].items() if not torch.equal(p, then[4][name]))
    assert len(used) == 5 and not torch.equal(then[0][name], then[1][name])


@pytest.mark.parametrize("save_every", [2, 3])
def test_interrupted_training_is_bit_identical(tmp_path, monkeypatch, save_every):
    """At a step that refreshes the reference, and between two of them: a checkpoint then holds it."""
    common = ["--n_problems", 8, "--eval_problems", 0, "--max_steps", 6, "--refresh", 2, "--save_every", save_every,
              "--gen_len", 16, "--batch_size", 4]
    run(monkeypatch, "--out", tmp_path / "whole", *common)
    inner = training.Run.save_checkpoint

    def save_and_die(self, step, *args):
        inner(self, step, *args)
        if step == 6 - save_every:
            raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training.Run, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(m, "--out", tmp_path / "cut", *common)
    run(monkeypatch, "--out", tmp_path / "cut", *common)
    a, b = ((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


def test_a_guess_is_never_the_mask():
    """The mask has 90% under the reference: draws and argmax fall on the others."""
    ref, n = torch.tensor([[.06, .04, .9]]).log().expand(50, 3), 50
    u = (torch.arange(n) + 0.5) / n
    for fake, zeros in (("sample", 30), ("argmax", 50)):  # 6 : 4 once the mask is out
        rows = token_terms(torch.zeros(n, 3), ref, torch.zeros(n).long(), u, Config(fake=fake), mask_id=2)
        guessed = rows[:, 3].exp()
        assert (guessed < 0.1).all() and int((guessed > 0.05).sum()) == zeros


def test_a_shared_folder_long_prompts_and_small_data(monkeypatch, tmp_path):
    """Runs that share trajectories decode once; a run takes only its own problems' records."""
    common = ["--trajectories", tmp_path / "shared", "--eval_problems", 0, "--max_steps", 1, "--gen_len", 16,
              "--batch_size", 4, "--refresh", 50]
    run(monkeypatch, "--out", tmp_path / "a", "--n_problems", 8, "--seed", 1, *common)
    before = (tmp_path / "shared/rank0.jsonl").read_bytes()
    seen, inner = [], t3d.training_loss
    real = t3d.collect
    monkeypatch.setattr(t3d, "collect", lambda *a, **kw: seen.append(real(*a, **kw)) or seen[-1])
    run(monkeypatch, "--out", tmp_path / "b", "--n_problems", 5, "--seed", 2, *common)
    assert len(seen[0]) == 5 and (tmp_path / "shared/rank0.jsonl").read_bytes() == before
    assert rollout.collection_seconds(tmp_path / "shared") > 0 and inner is t3d.training_loss
    for extra, words in ((["--max_prompt", "10"], "is left: raise --max_prompt"),
                         (["--n_problems", "3"], "exceeds the data .3 examples"),
                         (["--collect_seed", "9"], "other settings .seed")):
        with pytest.raises(nt_model.UserError, match=words):
            run(monkeypatch, "--out", tmp_path / "c", *common, *extra)


def test_answers_are_not_needed(monkeypatch, tmp_path, capsys):
    """Rows without one are decoded, and those with one are graded; where grades are asked for, all need one."""
    rows = [dict(prompt=f"ball under red . {n}", **more) for n, more in enumerate(
        [{}, dict(answer="red"), dict(solution="red ."), dict(answer=""), dict(tests="assert f(1)"), dict(answer="blue")])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run", "--gen_len", 16, "--batch_size", 6,
        "--micro_batch", 6, "--max_steps", 1, "--eval_problems", 0)
    graded = [type(r["correct"]) for r in data.read_trajectories(tmp_path / "run/trajectories")]
    assert graded == [type(None), bool, type(None), type(None), type(None), bool]
    collect = ["rollout.py", "collect", str(tmp_path / "p.jsonl"), "--gen_len", "16", "--out", str(tmp_path / "c")]
    for more, code in (([], 2), (["--ungraded"], 0)):
        monkeypatch.setattr(sys, "argv", collect + more)
        if code:
            with pytest.raises(nt_model.UserError, match="no answer"):
                rollout.cli.run_command("", rollout.COMMANDS)
        else:
            rollout.cli.run_command("", rollout.COMMANDS)
            assert "holds 6 of 6 problems" in capsys.readouterr().out


def test_variants_and_bad_settings(monkeypatch, tmp_path):
    cfg = t3d.check_config(Config(variant="code"))
    assert (cfg.fake, cfg.mask_order, cfg.state_dist, cfg.path) == ("argmax", "code", "code", "code")
    monkeypatch.setattr(sys, "argv", "t3d.py --variant code --path paper --fake expected --logratio sum".split())
    cfg = t3d.check_config(training.parse(Config, t3d.PRESETS, ""))  # what is given goes before the variant's
    assert (cfg.fake, cfg.mask_order, cfg.state_dist, cfg.path, cfg.logratio) == ("expected", "code", "code", "paper", "sum")
    for args, words in ((["--refresh", "0"], "give 1 or more"), (["--rand_p", "2"], "rand_p is 2.0: it must be at most 1"),
                        (["--eos_in_loss", "2"], "for block-causal models"), (["--batch_size", "0"], "at least 1")):
        with pytest.raises(nt_model.UserError, match=words):
            run(monkeypatch, "--out", tmp_path / "x", *args)


def test_the_docstring_names_every_equation():
    text = (ROOT / "t3d.py").read_text()
    assert all(f"Eq. {n}" in text for n in (5, 6, 7, 8, 9, 10)) and "2602.12262" in text
