"""TABOM: every number is worked out by hand here."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import official_checkpoint
from conftest import random_model

import data
import eval as nt_eval
import lora
import model as nt_model
import tabom
from tabom import Config, draw_segment, entropy_of, make_batch, tabom_loss

FACTS = SimpleNamespace(mask_id=9, eos_ids=(8,), pad_id=8, block_len=0)


def record(x0, rank, prompt=(1, 2, 3), order=None):
    return dict(id="r", x0=list(x0), rank=list(rank), order=list(order or rank), prompt_ids=list(prompt))


# ------------------------------------------------------------------------------------------------ the loss
def test_loss_by_hand():
    """Segments of 3 and 2 tokens, batch of 2. Ranking with gamma .2: h = (.5, .6, .1) has the hinges
    .5 - .6 + .2 = .1, .5 - .1 + .2 = .6, .6 - .1 + .2 = .7, mean 1.4 / 3; h = (.3, 1) has none.
    """
    p = torch.tensor([[.5, .3, .2], [.1, .7, .2], [.25, .25, .5], [.9, .05, .05], [.2, .2, .6]])
    x0 = torch.tensor([0, 1, 2, 0, 1])
    in_segment = torch.tensor([[True, True, True], [True, True, False]])
    entropy = torch.tensor([.5, .6, .1, .3, 1.0])
    ce = tabom.token_terms(p.log(), x0)[:, 0]
    recon = ((-math.log(.5) - math.log(.7) - math.log(.5)) / 3 + (-math.log(.9) - math.log(.2)) / 2) / 2
    for lam in (1.0, 2.0, 0.0):
        loss, parts = tabom_loss(ce, entropy, in_segment, 2, Config(lam=lam, gamma=0.2))
        assert abs(parts["recon"] - recon) < 1e-6 and abs(parts["rank"] - 1.4 / 3 / 2) < 1e-6
        assert abs(loss.item() - (recon + lam * 1.4 / 3 / 2)) < 1e-6
    # a margin of 1 catches the second segment too: .3 - 1 + 1 = .3
    parts = tabom_loss(ce, entropy, in_segment, 2, Config(gamma=1.0))[1]
    assert abs(parts["rank"] - ((.9 + 1.4 + 1.5) / 3 + .3) / 2) < 1e-6


def test_gradient_by_finite_differences():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=g, dtype=torch.float64).float().requires_grad_()
    x0, in_segment = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([[True] * 3, [True, True, False]])

    def loss(z):
        return tabom_loss(*tabom.token_terms(z, x0).unbind(1), in_segment, 2, Config(gamma=0.3))[0]
    loss(logits).backward()
    for i, j in ((0, 0), (1, 3), (2, 2), (3, 1), (4, 0)):
        step = torch.zeros_like(logits)
        step[i, j] = 1e-2
        with torch.no_grad():
            slope = (loss(logits + step) - loss(logits - step)) / 2e-2
        assert abs(slope.item() - logits.grad[i, j].item()) < 1e-3


def test_entropy_by_hand():
    p = torch.tensor([[.25, .15, .6], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(entropy_of(p.log()), torch.tensor([0.937631, math.log(3)]), atol=1e-5)


# ---------------------------------------------------------------------------------------------- segments
def test_segments_and_states_by_hand():
    """x0 = a b c d EOS EOS, revealed c, a, EOS(4), d, b, EOS(5). W = 2 among the content and the first EOS:
    (c a), (a 4), (4 d) or (d b).
    """
    r = record([10, 11, 12, 13, 8, 8], [1, 4, 0, 3, 2, 5])
    cfg, seen = Config(window=2), {}
    for i in range(60):
        chosen = draw_segment(r, cfg, FACTS, data.example_rng(0, 0, i))
        b = make_batch([r], [data.example_rng(0, 0, i)], cfg, FACTS)
        assert b["segment"].tolist() == [chosen] and b["in_segment"].all()
        seen[tuple(chosen)] = b["xt"][0].tolist()
    assert seen == {(2, 0): [9] * 6, (0, 4): [9, 9, 12, 9, 9, 9], (4, 3): [10, 9, 12, 9, 9, 9],
                    (3, 1): [10, 9, 12, 9, 8, 9]}
    tail = Config(window=2, eos_in_window=True)
    with_tail = {tuple(draw_segment(r, tail, FACTS, data.example_rng(0, 0, i))) for i in range(60)}
    assert with_tail == {*seen, (1, 5)}


def test_other_segments():
    r = record([10, 11, 12, 13, 8, 8], [1, 4, 0, 3, 2, 5])
    rngs = [data.example_rng(0, 0, i) for i in range(300)]
    everything = {tuple(draw_segment(r, Config(window=0), FACTS, g)) for g in rngs}
    assert everything == {(2, 0, 4, 3, 1), (0, 4, 3, 1), (4, 3, 1), (3, 1), (1,)}
    large = {tuple(draw_segment(r, Config(window=99), FACTS, g)) for g in rngs}
    assert large == {(2, 0, 4, 3, 1)}  # fewer than W left: what there is
    two = {tuple(draw_segment(r, Config(segment="two_steps"), FACTS, g)) for g in rngs}
    order = [2, 0, 4, 3, 1]
    assert two <= {tuple(order[i:j]) for i in range(5) for j in range(i + 1, 6)} and len(two) == 15
    # blocks of 4 from the prompt's start (3 tokens): position 0 is alone in its block, 1 to 4 share the next
    block = SimpleNamespace(**vars(FACTS) | dict(block_len=4, whole_blocks=False))
    cut = {tuple(draw_segment(r, Config(window=3), block, g)) for g in rngs}
    assert cut == {(2, 4), (0,), (4, 3, 1), (3, 1), (1,)}
    long = record(range(10, 60), range(50))  # a window longer than the response: every position is reached
    reached = {i for g in rngs for i in draw_segment(long, Config(window=64), block, g)}
    assert reached == set(range(50))


def test_short_segments_stand_beside_long_ones():
    long, short = record(range(10, 16), range(6)), record([10, 8, 8, 8, 8, 8], range(6))
    rngs = [data.example_rng(0, 0, i) for i in range(2)]
    b = make_batch([long, short], rngs, Config(window=4), FACTS)
    assert b["segment"][1].tolist() == [0, 1, -1, -1] and b["in_segment"].sum(1).tolist() == [4, 2]


def test_entropies_at_each_tokens_own_step(monkeypatch):
    """--entropy_at own_step equals one plain forward per token of the state before it; segment equals one
    forward in all.
    """
    model = random_model(vocab_size=40)
    r = record(np.random.default_rng(0).integers(0, 30, 6).tolist(), [3, 0, 5, 1, 4, 2], (1, 2, 3, 4))
    b = make_batch([r], [data.example_rng(0, 0, 0)], Config(window=4), model.cfg)
    segment = b["segment"][0].tolist()
    with torch.no_grad():
        row = torch.zeros(len(segment), dtype=torch.long)
        got = tabom.own_step_entropies(model, b, row, b["segment"][0])
        for i, h in zip(segment, got):
            xt = [x if k < r["rank"][i] else 39 for x, k in zip(r["x0"], r["rank"])]
            p = model(torch.tensor([r["prompt_ids"] + xt]))[0, 4 + i].softmax(-1)
            assert abs(h.item() + (p * p.log()).sum().item()) < 1e-4
        losses = {at: tabom.training_loss(model, b, Config(window=4, entropy_at=at, batch_size=1))[1]
                  for at in ("segment", "own_step")}
    assert losses["segment"]["recon"] == losses["own_step"]["recon"]
    assert losses["segment"]["rank"] != losses["own_step"]["rank"]
    monkeypatch.setattr(tabom, "own_step_entropies", None)  # not asked for where nothing is ranked
    tabom.training_loss(model, b, Config(window=4, entropy_at="own_step", batch_size=1, lam=0.0))


@pytest.mark.parametrize("at", ["segment", "own_step"])
@pytest.mark.parametrize("facts", [{}, dict(block_size=4)])
def test_the_ranking_reaches_the_weights(at, facts):
    """The slope of lambda times the ranking, by finite differences along its own gradient."""
    model = random_model(vocab_size=40, **facts)
    rng = np.random.default_rng(1)
    records = [record(rng.integers(0, 30, 8).tolist(), range(8), (1, 2, 3, 4)) for _ in range(3)]
    weight = model.blocks[1].q_proj.weight

    def ranking():
        cfgs = [Config(window=4, entropy_at=at, batch_size=3, gamma=2.0, lam=lam) for lam in (1.0, 0.0)]
        rngs = [[data.example_rng(0, 0, i) for i in range(3)] for _ in cfgs]
        return [tabom.training_loss(model, make_batch(records, r, cfg, model.cfg), cfg)[0]
                for r, cfg in zip(rngs, cfgs)]
    both, recon = ranking()
    grad = torch.autograd.grad(both, weight)[0] - torch.autograd.grad(recon, weight)[0]
    assert grad.norm() > 1e-4
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        weight += step
        up = ranking()
        weight -= 2 * step
        down = ranking()
    slope = ((up[0] - up[1]) - (down[0] - down[1])).item() / 2e-2
    assert abs(slope - grad.norm().item()) < 0.05 * grad.norm().item()


# --------------------------------------------------------------------------------------------------- TDS
def test_tds_by_hand():
    """Entropies of a model that looks at positions only: .2, .5, 1.1 and EOS. Revealed 1, then 0, EOS, 2:
    variances of (.2, .5, 1.1), then of (.2, 1.1), then fewer than two are left.
    """
    want = [0.2, 0.5, 1.1, 0.4]

    class Fixed(torch.nn.Module):
        cfg = SimpleNamespace(eos_ids=(2,), mask_id=3, pad_id=2, block_len=0)
        embed = torch.nn.Embedding(1, 1)

        def hidden(self, ids, valid, positions, out):
            assert out.tolist() == [list(range(ids.shape[1] - 4, ids.shape[1]))] * len(ids)
            return torch.tensor([[[h] for h in want]] * len(ids))

        def head(self, h):  # a distribution over 8 ids with entropy h: bisection in the share of the first
            lo, hi = torch.full_like(h, 1 / 8), torch.ones_like(h)
            for _ in range(60):
                p = (lo + hi) / 2
                e = -p * p.log() - (1 - p) * ((1 - p) / 7).log()
                lo, hi = torch.where(e > h, p, lo), torch.where(e > h, hi, p)
            return torch.cat([p, ((1 - p) / 7).expand(-1, 7)], 1).log()
    r = record([0, 1, 0, 2], [1, 0, 3, 2]) | dict(decoding={})
    curve = nt_eval.tds(Fixed(), r)
    assert np.isnan(curve[2:]).all()
    assert np.allclose(curve[:2], [np.var([.2, .5, 1.1]), np.var([.2, 1.1])], atol=1e-4)


# --------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_tabom_trains_two_steps_on_every_family(tmp_path, monkeypatch, family):
    folder = official_checkpoint(tmp_path / "base", family)
    lines = [f'{{"prompt": "{n} + {n}?", "answer": "x"}}' for n in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("grade.is_correct", lambda *_: True)
    args = ["--gen_len", "8", "--block_len", "4", "--window", "3", "--batch_size", "4", "--micro_batch", "2",
            "--max_steps", "2", "--lr", "1e-2"]
    monkeypatch.setattr("sys.argv", ["tabom.py", "--model", str(folder), "--data", str(tmp_path / "p.jsonl"),
                                     "--out", str(tmp_path / "run"), *args])
    tabom.main()
    adapters = lora.load(nt_model.load(folder), tmp_path / "run/adapter")
    assert {name.split(".")[-1] for name, _ in lora.adapters(adapters)} == {"q_proj", "v_proj"}
    ids = torch.randint(0, 250, (1, 9))
    assert not torch.equal(adapters(ids), nt_model.load(folder)(ids))


def test_bad_settings_are_one_line(monkeypatch, tmp_path):
    for args, words in ((["--window", "1"], "two tokens"), (["--segment", "two_steps"], "--lam 0")):
        monkeypatch.setattr("sys.argv", ["tabom.py", "--out", str(tmp_path / "x"), *args])
        with pytest.raises(nt_model.UserError, match=words):
            tabom.main()


def test_presets_collect_and_learn_as_the_paper_and_its_scripts():
    """Dream collects at its own temperature (Table 8); the recipes take the EOS tail into a window."""
    dream, llada, tiny = (Config(**tabom.PRESETS[family]) for family in ("dream", "llada", "tiny"))
    assert (dream.collect_temperature, dream.collect_top_p, dream.collect_score) == (0.1, 0.9, "entropy")
    assert (llada.collect_temperature, llada.collect_top_p) == (0.0, 1.0)
    assert dream.eos_in_window and llada.eos_in_window and not tiny.eos_in_window
