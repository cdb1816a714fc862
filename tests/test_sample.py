import argparse
import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from checkpoints import official_checkpoint
from conftest import CONFIGS, FIXTURES, prompts_of, random_model

import cli
import data
import model as nt_model
import sample
from model import UserError
from sample import Decoding, Forward, generate, pick_tokens, reference

POLICIES = {"static1": dict(policy="static", per_step=1), "static3": dict(policy="static", per_step=3),
            "threshold": dict(policy="threshold", threshold=0.5),
            "factor": dict(policy="factor", threshold=1.0),
            "entropy": dict(policy="entropy", threshold=1.0),
            "margin": dict(policy="static", per_step=2, score="margin")}


def same(a, b):
    return (torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order) and torch.equal(a.rank, b.rank)
            and a.nfe == b.nfe)


# ---------------------------------------------------------------------------- options that change nothing
OTHER = dict(threshold=0.9, per_step=2, steps=2, eps=0.4, block_add=0.9, cache_delay=2, refresh=2, vicinity=1,
             score="entropy", top_p=0.3, top_k=1, late_eos=True, block_len=6)


@pytest.mark.parametrize("policy", sample.POLICIES)
def test_an_option_is_refused_exactly_where_it_changes_nothing(monkeypatch, policy):
    """What the decoder itself makes of another value, over caches and temperatures, is the oracle."""
    always = {"gen_len", "policy", "cache", "temperature", "seed", "no_eos", "early_stop"}
    assert {*Decoding.__annotations__} == always | {*OTHER}
    models = [random_model(seed=seed, scale=4.0, eos_token_id=[38, *range(0, 38, 3)]) for seed in range(12)]
    prompts = [p // 3 * 3 + 1 for p in prompts_of([2, 9, 5])]
    outs = functools.cache(lambda number, *settings: generate(models[number], prompts, **dict(settings)))

    def differ(number, before, after):
        return not all(map(same, outs(number, *before.items()), outs(number, *after.items())))
    for cache, temperature, steps in [("none", 0.0, 3), ("none", 1.5, 0), ("prefix", 0.0, 0), ("vicinity", 0.0, 0)]:
        if cache not in sample.POLICIES[policy].caches:
            continue
        settings = dict(policy=policy, cache=cache, temperature=temperature, gen_len=10, block_len=4, steps=steps,
                        threshold=0.02 if policy == "multiblock" else 0.4, early_stop=False)
        for name, value in OTHER.items():
            changed = settings | {name: value}
            monkeypatch.setattr(cli, "GIVEN", {name: value})
            try:
                sample.check_used(Decoding(**changed))
            except UserError as e:
                if name == "late_eos":  # in Python, too
                    assert str(e).startswith(f"late_eos with policy {policy}, which does not read it")
                    continue
                assert str(e).startswith(f"--{name} is for ") and str(e).endswith(f"; here policy {policy}, cache {cache}: leave it out")
                wanted = re.fullmatch(r"--\w+ is for policy ((?:\w+ or )*\w+); .*", str(e))  # without more conditions
                assert not wanted or policy not in wanted[1].split(" or "), e
                assert not differ(0, settings, changed), (name, settings)
            else:
                assert any(differ(number, settings, changed) for number in range(len(models))), (name, settings)


def test_an_own_policy_may_read_any_option(monkeypatch):
    """Also through a helper, or as functools.partial: nothing is told of it, so nothing is refused."""
    for choose in (lambda now, s: sample.static_policy(now, s), functools.partial(sample.static_policy)):
        monkeypatch.setitem(sample.POLICIES, "mine", sample.Policy(choose))
        monkeypatch.setattr(cli, "GIVEN", dict(per_step=4, threshold=0.2, late_eos=True))
        sample.check_used(Decoding(policy="mine", per_step=4, late_eos=True))


def test_options_of_a_curve_count_where_any_point_reads_them(monkeypatch):
    monkeypatch.setattr(cli, "GIVEN", dict(per_step=2, threshold=0.5, label="x"))
    sample.check_used(Decoding(policy="static"), Decoding(policy="threshold"))
    for policy, name in (("static", "threshold"), ("threshold", "per_step")):
        with pytest.raises(UserError, match=f"--{name} "):
            sample.check_used(Decoding(policy=policy))


# ------------------------------------------------------------------------ the choice of positions, by hand
def choose(s, masked, conf=None, entropy=None, tries=0, memory=()):
    """One row that is its whole response -> what the policy of s reveals, and its memory behind it."""
    masked = torch.tensor([masked])
    zeros = torch.zeros(masked.shape)
    conf = zeros if conf is None else torch.tensor([conf])
    now = Forward(conf, zeros if entropy is None else torch.tensor([entropy]), conf, masked,
                  torch.arange(masked.shape[1])[None], masked, torch.tensor([[s.threshold]]),
                  torch.tensor([[tries]]), torch.tensor([memory], dtype=torch.long))
    chosen = sample.POLICIES[s.policy].choose(now, s) & masked
    return chosen[0].tolist(), now.memory[0].tolist()


def positions(conf, masked, entropy=None, **settings):
    return choose(Decoding(**settings), masked, conf, entropy)[0]


def test_static_takes_the_best_and_breaks_ties_left_to_right():
    assert positions([.2, .9, .9, .5], [True] * 4, policy="static", per_step=1) == [False, True, False, False]
    assert positions([.2, .9, .9, .5], [True, False, True, True], policy="static", per_step=2) == [
        False, False, True, True]


def test_threshold_takes_all_above_and_at_least_one():
    assert positions([.91, .9, .89], [True] * 3, policy="threshold", threshold=0.9) == [True, True, False]
    assert positions([.3, .4, .2], [True] * 3, policy="threshold", threshold=0.9) == [False, True, False]


def test_entropy_takes_all_below_and_at_least_one():
    keep = positions([.5] * 4, [True, True, True, False], [0.4, 0.6, 0.2, 0.1],
                     policy="entropy", threshold=0.5)
    assert keep == [True, False, True, False]
    keep = positions([.5] * 3, [True] * 3, [0.9, 0.7, 0.8], policy="entropy", threshold=0.5)
    assert keep == [False, True, False]


def test_factor_takes_the_largest_n_that_passes():
    # sorted .95, .7, .4, .1 against the bounds .5, .667, .75, .8: n = 2
    assert positions([.4, .95, .7, .1], [True] * 4, policy="factor", threshold=1.0) == [
        False, True, True, False]
    # .6 >= .5 passes n = 1, .6 < .667 fails n = 2
    assert positions([.6, .6, .6], [True] * 3, policy="factor", threshold=1.0) == [True, False, False]
    # n = 1 fails (.45 < .5): still one position
    assert positions([.45, .3, .2], [True] * 3, policy="factor", threshold=1.0) == [True, False, False]
    # n = 2 of 3: the published code reveals the last one with them
    assert positions([.4, .95, .7], [True] * 3, policy="factor", threshold=1.0) == [True, True, True]


def test_token_confidence_entropy_and_margin_by_hand():
    cfg = nt_model.config_from_json(dict(
        model_type="tiny", vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=8, rope_theta=1e4, rms_norm_eps=1e-6, mask_token_id=2,
        eos_token_id=1))
    p = torch.tensor([0.25, 0.15, 0.6])  # the mask id has the largest probability and must not be picked
    token, conf, entropy, score = pick_tokens(p.log()[None], cfg, Decoding(score="margin"))
    assert token.item() == 0 and abs(conf.item() - 0.25) < 1e-6
    assert abs(entropy.item() - 0.937631) < 1e-5  # -(.25 ln .25 + .15 ln .15 + .6 ln .6)
    assert abs(score.item() - 0.35) < 1e-6


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert sample.nucleus(logits, 0.6).isfinite().tolist() == [True, True, False, False]
    assert sample.nucleus(logits, 0.5).isfinite().tolist() == [True, False, False, False]
    assert sample.nucleus(logits, 0.01).isfinite().tolist() == [True, False, False, False]


# --------------------------------------------------------------- batched = alone = reference, every family
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_batch_equals_alone_equals_reference(name, policy):
    model, prompts = random_model(**CONFIGS[name]), prompts_of([2, 9, 5, 12])
    turn = list(CONFIGS).index(name) + list(POLICIES).index(policy)
    for i, cache in enumerate(("none", "prefix", "dual")):
        early_stop = (turn + i) % 2 == 0  # each with each cache, each policy and each model
        settings = dict(gen_len=10, block_len=4, cache=cache, early_stop=early_stop, **POLICIES[policy])
        outs = generate(model, prompts, batch_size=3, **settings)
        for prompt, out in zip(prompts, outs):
            assert same(out, generate(model, [prompt], **settings)[0]), (cache, early_stop, len(prompt))
            assert same(out, reference(model, prompt, **settings)), (cache, early_stop, len(prompt))
            assert sorted(out.rank.tolist()) == list(range(10))
            assert model.cfg.mask_id not in out.ids


@pytest.mark.parametrize("name", list(CONFIGS))
def test_more_caches_and_schedules(name):
    """The vicinity and exact caches, quotas that do not divide the block, Dream's schedule."""
    model, prompts = random_model(**CONFIGS[name]), prompts_of([2, 9, 5])
    quick, quota = dict(policy="threshold", threshold=0.5), dict(policy="static", steps=3)
    cases = [dict(cache="vicinity", vicinity=3, **quick), dict(cache="vicinity", vicinity=30, **quota),
             dict(cache="dual", **quota)]
    if model.cfg.block_len:
        cases += [dict(cache="exact", **quick), dict(cache="exact", **quota)]
    else:
        cases += [dict(cache="none", policy="dream", steps=4, score="entropy"),
                  dict(cache="dual", policy="dream", steps=13)]
    for case, early_stop in itertools.product(cases, (True, False)):
        settings = dict(gen_len=10, block_len=4, early_stop=early_stop, **case)
        outs = generate(model, prompts, batch_size=2, **settings)
        for prompt, out in zip(prompts, outs):
            ref = reference(model, prompt, **settings)
            assert same(out, ref), (case, early_stop, len(prompt))
            if case["cache"] == "exact":  # nothing is approximate about it
                assert same(out, generate(model, [prompt], **{**settings, "cache": "none"})[0])
    with pytest.raises(UserError, match="block-causal"):
        generate(random_model(), prompts, cache="exact")


@pytest.mark.parametrize("name", ["plain", "shift", "grouped"])
def test_multiblock(name):
    model, prompts = random_model(**CONFIGS[name]), prompts_of([2, 9, 5])
    for more in (dict(threshold=1.0), dict(threshold=0.3, block_add=0.5),
                 dict(threshold=1.5, block_add=0.0), dict(threshold=1.0, block_add=1.0)):
        reuse = dict(cache="prefix"), dict(cache="prefix", cache_delay=2, refresh=2)
        for cached, early_stop in itertools.product((dict(cache="none"), *reuse), (True, False)):
            settings = dict(gen_len=14, block_len=4, policy="multiblock", early_stop=early_stop,
                            **more)
            settings.update(cached)
            outs = generate(model, prompts, batch_size=2, **settings)
            for prompt, out in zip(prompts, outs):
                assert same(out, reference(model, prompt, **settings)), (more, cached, early_stop)
            if more.get("block_add") == 1.0 and cached["cache"] == "none":  # one block after the other
                alone = {**settings, "policy": "entropy"}
                assert all(same(out, generate(model, [p], **alone)[0]) for p, out in zip(prompts, outs))
    with pytest.raises(UserError, match="bidirectional"):
        generate(random_model(block_size=4), prompts, policy="multiblock", block_len=4, cache="none")
    with pytest.raises(UserError, match="bidirectional"):
        generate(random_model(block_size=4), prompts, policy="dream", gen_len=8, cache="none")
    with pytest.raises(UserError, match="none or prefix"):
        generate(model, prompts, policy="multiblock", cache="dual")


def published_multiblock(model, prompt, s, decoded):
    """What TAD's evaluation code does, in blocks that it keeps a state of: when a block may be revealed in, and when it
    must be (its predecessor is `decoded` revealed); with the early stop of d3LLM's -> ids, order, forwards.
    """
    P, L, K = len(prompt), s.gen_len, s.block_len
    x = torch.cat([prompt, torch.full((L,), model.cfg.mask_id)])
    order, blocks, nfe = torch.full((L,), -1), [], 0

    def progress(b):
        return 1 - blocks[b]["masks"] / K if b >= 0 else 1.0

    def begin():
        blocks.append(dict(masks=K, must=progress(len(blocks) - 1) >= decoded))
    begin()
    while (x == model.cfg.mask_id).any():
        for b, block in enumerate(blocks):
            block["must"] = block["must"] or progress(b - 1) >= decoded
        if len(blocks) * K < L and progress(len(blocks) - 1) >= s.block_add:
            begin()
        masked = (x == model.cfg.mask_id)[P:]
        masked[len(blocks) * K:] = False
        token, _, entropy, _ = pick_tokens(model(x[None])[0, P:], model.cfg, s)
        entropy = entropy.masked_fill(~masked, math.inf)
        chosen = entropy < s.threshold
        chosen[entropy.argmin()] = True
        for b, block in enumerate(blocks):
            if block["must"] and block["masks"]:  # the first of these
                part = slice(b * K, (b + 1) * K)
                if not chosen[part].any():
                    chosen[b * K + entropy[part].argmin()] = True
                break
        x[P:][chosen] = token[chosen]
        order[chosen] = nfe
        ends = [i for i in range(L) if x[P + i] in model.cfg.eos_ids]
        if s.early_stop and ends:
            behind = (x[P:] == model.cfg.mask_id) & (torch.arange(L) > ends[0])  # it also replaces what was revealed there
            x[P:][behind], order[behind] = model.cfg.eos_ids[0], nfe
        for b, block in enumerate(blocks):
            block["masks"] = int((x[P + b * K:P + (b + 1) * K] == model.cfg.mask_id).sum())
        nfe += 1
    return x[P:], order, nfe


@torch.no_grad()
@pytest.mark.parametrize("threshold, block_add", [(0.0, 0.1), (0.3, 0.1), (1.0, 0.0), (0.5, 0.3)])
def test_multiblock_is_the_published_one(threshold, block_add):
    """Whose second number, the share of a block at which the next one must progress, changes nothing: the first block
    with a mask stands behind full ones.
    """
    stopped = 0
    for seed, prompt in itertools.product(range(2, 5), prompts_of([5, 2])):
        ids, end = [], 38
        for early_stop in (False, True):  # then at a token of which the first stands far behind
            model = random_model(seed=seed, eos_token_id=[38, end])
            s = Decoding(gen_len=16, block_len=4, policy="multiblock", threshold=threshold, block_add=block_add, cache="none",
                         early_stop=early_stop)
            [out] = generate(model, [prompt], **vars(s))
            assert same(out, reference(model, prompt, **vars(s)))
            for decoded in (0.0, 0.95):
                ids, order, nfe = published_multiblock(model, prompt, s, decoded)
                assert torch.equal(out.ids, ids) and torch.equal(out.order, order) and out.nfe == nfe, (seed, decoded)
            end = max(set(ids.tolist()), key=ids.tolist().index)
            stopped += early_stop and int(out.order[-1]) < out.nfe - 1
    assert stopped


def test_multiblock_by_hand():
    """Three blocks of 2. Who joins: block 2 when half of block 1 is revealed. Who must progress: block 1."""
    s = Decoding(gen_len=6, block_len=2, policy="multiblock", threshold=0.5, block_add=0.5,
                 cache="none")
    masked, entropy = [False, True, True, True, True, True], [.1] * 6
    assert choose(s, [True] * 6, None, entropy, memory=[0])[1] == [1]  # the first forward
    assert choose(s, masked, None, entropy, memory=[1])[1] == [2]
    assert choose(s, masked, None, entropy, memory=[2])[1] == [2]

    def pick(*entropy):
        chosen = choose(s, masked, None, list(entropy), memory=[2])[0]
        return [i for i in range(6) if chosen[i]]
    assert pick(.1, .4, .9, .3, .1, .1) == [1, 3]  # below the threshold, in the blocks that take part
    assert pick(.1, .8, .9, .3, .1, .1) == [1, 3]  # block 0 must progress although block 1 does
    assert pick(.1, .8, .6, .9, .1, .1) == [1, 2]  # nobody below it: the lowest of all, and block 0's own


def test_quotas_by_hand():
    """LLaDA: 10 masks in 4 forwards are 3 + 3 + 2 + 2. Dream: 16 masks, 4 steps, t = 1, .75025, .5005,
    .25075: int(16 * .24975) = 3, int(13 * .33289) = 4, int(9 * .49900) = 4, and the rest.
    """
    def run(n_block, **settings):
        s, left, took = Decoding(**{"gen_len": n_block, "block_len": n_block, **settings}), n_block, []
        while left:
            chosen, _ = choose(s, [i < left for i in range(n_block)], tries=len(took))
            took.append(sum(chosen))
            left -= took[-1]
        return took
    assert run(10, policy="static", steps=4) == [3, 3, 2, 2]
    assert run(10, policy="static", per_step=5) == [5, 5]
    assert run(16, policy="dream", steps=4, gen_len=16) == [3, 4, 4, 5]
    assert run(16, policy="dream", gen_len=16)[0] == 0  # int(16 * 0.0624375) = int(0.999)


@pytest.mark.parametrize("name", ["shift", "block"])
def test_a_policy_is_one_entry(monkeypatch, capsys, name):
    """Every second masked position from the right, with a memory of its forwards: both decoders, batches, the
    checks and the command line know it by its entry alone.
    """
    def every_second(now, s):
        now.memory = now.memory + 1
        from_right = now.masked.flip(1).cumsum(1).flip(1)
        return from_right % 2 == now.memory % 2

    policy = sample.Policy(every_second, memory=1, caches=("none", "dual"))
    monkeypatch.setitem(sample.POLICIES, "every_second", policy)
    model, prompts = random_model(**CONFIGS[name]), prompts_of([2, 9, 5, 12])
    for cache, early_stop in itertools.product(policy.caches, (True, False)):
        settings = dict(gen_len=10, block_len=4, cache=cache, early_stop=early_stop, policy="every_second",
                        threshold=1.5)
        outs = generate(model, prompts, batch_size=3, **settings)
        for prompt, out in zip(prompts, outs):
            assert same(out, generate(model, [prompt], **settings)[0])
            assert same(out, reference(model, prompt, **settings))
    if not model.cfg.block_len:  # the first block of 4: two, one and one
        assert sorted(out.order.tolist()[:4]) == [0, 0, 1, 2]
    for bad, match in ((dict(cache="prefix"), "none or dual"), (dict(threshold=-1), "threshold is -1")):
        with pytest.raises(UserError, match=match):
            Decoding(**{**settings, **bad})
    parser = argparse.ArgumentParser()
    cli.add_options(parser, Decoding)
    assert parser.parse_args(["--policy", "every_second"]).policy == "every_second"
    with pytest.raises(SystemExit):
        parser.parse_args(["--policy", "every-second"])
    assert "every_second" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Threshold", "entropie", ""])
def test_an_unknown_policy_is_refused(name):
    for decode in (lambda: Decoding(policy=name), lambda: generate(random_model(), [], policy=name),
                   lambda: reference(random_model(), prompts_of([3])[0], policy=name)):
        with pytest.raises(UserError, match="static, threshold, factor, entropy, dream, multiblock"):
            decode()


def with_commits(out, n_prompt, block_len):
    """Forwards of a decoder that commits separately: one more for the prompt's blocks and one for each block."""
    return out.nfe + (n_prompt >= block_len) + -(-(n_prompt % block_len + len(out.ids)) // block_len)


def test_exact_cache_runs_over_two_blocks(monkeypatch):
    """The last block, whose keys are committed by this, and the current one: a commit costs no forward."""
    model, prompts = random_model(block_size=4), prompts_of([8, 5])
    settings = dict(gen_len=16, block_len=4, policy="static", early_stop=False, cache="exact", batch_size=2)
    outs, shapes = count_forwards(monkeypatch, model, prompts, **settings)
    canvas = 8 + 4 + 16 + 1
    assert shapes == [(2, canvas)] + [(2, 8)] * 15
    assert [with_commits(out, n, 4) for out, n in zip(outs, (8, 5))] == [1 + 16 + 4, 1 + 16 + 5]


def test_sampling_draws_the_same_in_any_batch():
    model, prompts = random_model(scale=1.0), prompts_of([5, 8, 2])
    settings = dict(gen_len=8, block_len=4, temperature=1.0, top_p=0.9, seed=3)
    outs = generate(model, prompts, batch_size=2, **settings)
    again = generate(model, prompts, batch_size=3, **settings)
    other = generate(model, prompts, **{**settings, "seed": 4})
    assert all(same(a, b) for a, b in zip(outs, again))
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(outs, other))
    rest = dict(sample.stream(model, prompts[1:], streams=[1, 2], **settings))  # a continued run
    assert all(same(rest[i], outs[i + 1]) for i in range(2))
    assert same(outs[0], reference(model, prompts[0], **settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_draws_what_the_reference_draws(name):
    """Also where prompts do not fill their last block, whose positions then begin elsewhere (whole)."""
    model, prompts = random_model(scale=1.0, **CONFIGS[name]), prompts_of([5, 6, 7, 8, 9])
    settings = dict(gen_len=8, block_len=model.cfg.block_len or 4, threshold=0.5, cache="none", temperature=1.0)
    outs = generate(model, prompts, batch_size=3, **settings)
    for i, (prompt, out) in enumerate(zip(prompts, outs)):
        (alone,) = [out for _, out in sample.stream(model, [prompt], streams=[i], **settings)]
        assert same(alone, out)
        (first,) = generate(model, [prompt], **settings)  # its stream is 0, as the reference's
        assert same(first, reference(model, prompt, **settings))


def test_top_k_draws_among_the_k_best():
    model, prompts = random_model(scale=1.0), prompts_of([5, 8, 2])
    settings = dict(gen_len=8, block_len=4, temperature=1.0, cache="none")
    greedy, best, free = (generate(model, prompts, **{**settings, **more})
                          for more in (dict(temperature=0.0), dict(top_k=1), dict(top_k=3)))
    assert all(same(a, b) for a, b in zip(greedy, best))  # the best one of one
    assert not all(same(a, b) for a, b in zip(greedy, free))
    logits = torch.tensor([[0.1, 3.0, 2.0, 1.0, 0.5, 9.0]])  # id 5 is the mask
    cfg = Scripted([[1 / 6] * 6]).cfg
    drawn = {pick_tokens(logits, cfg, Decoding(temperature=5.0, top_k=2), torch.rand(
        1, 6, generator=torch.Generator().manual_seed(i)))[0].item() for i in range(50)}
    assert drawn == {1, 2}


def test_any_batch_composition():
    """Random families, prompts, policies, caches and batch sizes: every prompt gets what it gets alone,
    unless two scores are closer than 1e-4 (none was in these draws).
    """
    rng = np.random.default_rng(0)
    differ = 0
    for draw in range(24):
        name = list(CONFIGS)[draw % len(CONFIGS)]
        model = random_model(seed=draw, **CONFIGS[name])
        caches = ["none", "prefix", "dual", "vicinity"] + ["exact"] * bool(model.cfg.block_len)
        settings = dict(gen_len=int(rng.integers(1, 14)), block_len=4, cache=str(rng.choice(caches)),
                        vicinity=int(rng.integers(0, 6)), early_stop=bool(rng.integers(2)),
                        **POLICIES[str(rng.choice(list(POLICIES)))])
        prompts = prompts_of(rng.integers(1, 16, rng.integers(2, 9)).tolist(), seed=draw)
        mixed = rng.permutation(len(prompts)).tolist()
        outs = generate(model, [prompts[i] for i in mixed], batch_size=int(rng.integers(1, 9)), **settings)
        differ += sum(not same(out, generate(model, [prompts[i]], **settings)[0])
                      for i, out in zip(mixed, outs))
    assert differ == 0


def count_forwards(monkeypatch, model, prompts, **settings):
    """(forwards of the model, rows in each) of one generate call."""
    rows, inner = [], nt_model.Transformer.hidden
    monkeypatch.setattr(nt_model.Transformer, "hidden", lambda self, ids, *a, **kw:
                        rows.append(ids.shape) or inner(self, ids, *a, **kw))
    outs = generate(model, prompts, **settings)
    monkeypatch.undo()
    return outs, rows


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_batch_is_really_one(monkeypatch, cache):
    """Total forwards stay near those of the slowest row; one-by-one decoding would need the sum."""
    model, prompts = random_model(), prompts_of([4, 9, 6, 7, 5, 8, 3, 6])
    settings = dict(gen_len=16, block_len=4, policy="threshold", threshold=0.5, cache=cache, batch_size=8)
    outs, shapes = count_forwards(monkeypatch, model, prompts, sync_every=4, **settings)
    nfes, n_blocks = [out.nfe for out in outs], 4
    # a row waits up to three forwards for the host's next look: when it is finished, and at a block's end
    waits = 3 if cache == "none" else 3 * n_blocks
    assert max(nfes) <= len(shapes) <= max(nfes) + waits < sum(nfes)
    if cache == "none":  # a finished row is forwarded until the next look, not longer
        assert sum(rows for rows, _ in shapes) <= sum(nfes) + 3 * len(prompts)
        eager = count_forwards(monkeypatch, model, prompts, **settings)[1]  # as a CPU does
        assert len(eager) == max(nfes) and sum(rows for rows, _ in eager) == sum(nfes)
    one_by_one = sum(len(count_forwards(monkeypatch, model, [p], **settings)[1]) for p in prompts)
    assert one_by_one >= sum(nfes)  # the broken version this guard is for: it would not pass the line above


@pytest.mark.parametrize("name", ["plain", "shift", "block"])
@pytest.mark.parametrize("sync_every", [1, 4])
def test_no_forward_reveals_nothing_where_the_number_is_known(monkeypatch, name, sync_every):
    """The static policy that stops at no EOS: at any look-ahead, and at one look for several forwards."""
    model, prompts, idle = random_model(**CONFIGS[name]), prompts_of([4, 9, 6, 7, 5]), []
    inner = sample.Batch.forward

    def forward(batch, rows, width):
        before = batch.rows.masked.sum()
        inner(batch, rows, width)
        idle.append(bool(batch.rows.masked.sum() == before))
    monkeypatch.setattr(sample.Batch, "forward", forward)
    for cache in ["none", "prefix", "dual", "vicinity"] + ["exact"] * (name == "block"):
        for own in (dict(), dict(per_step=3), dict(steps=2), dict(gen_len=13, per_step=2), dict(block_len=16)):
            settings = dict(gen_len=16, block_len=4, policy="static", early_stop=False, cache=cache) | own
            batch = sample.Batch(model, prompts, Decoding(**settings), 3, sync_every=sync_every)
            outs = dict(sample.decode(batch))
            assert len(outs) == 5 and not any(idle), (settings, idle)
            if name != "block":  # whose prompts end inside a block
                assert batch.forwards == 2 * outs[0].nfe and len(set(out.nfe for out in outs.values())) == 1
                assert batch.looks <= 2 + 2 * math.ceil(16 / settings["block_len"])
            idle.clear()


def test_cached_forwards_are_narrow(monkeypatch):
    model, prompts = random_model(), prompts_of([4, 9])
    settings = dict(gen_len=16, block_len=4, policy="static", batch_size=2)
    width = {c: [s[1] for s in count_forwards(monkeypatch, model, prompts, cache=c, **settings)[1]]
             for c in ("none", "prefix", "dual")}
    canvas = 9 + 16 + 1
    assert set(width["none"]) == {canvas}
    assert sorted(set(width["dual"])) == [4, canvas]
    assert width["dual"].count(canvas) == 4  # one refresh per block
    assert max(w for w in width["prefix"] if w != canvas) == 16 and min(width["prefix"]) == 4


def test_waiting_prompts_take_free_places(monkeypatch):
    model, prompts = random_model(), prompts_of(range(1, 13))
    settings = dict(gen_len=8, block_len=4, policy="threshold", threshold=0.4, cache="none", early_stop=True,
                    sync_every=1)
    outs, shapes = count_forwards(monkeypatch, model, prompts, batch_size=3, **settings)
    alone = [generate(model, [p], **settings)[0] for p in prompts]
    assert all(same(a, b) for a, b in zip(outs, alone))
    assert max(s[0] for s in shapes) == 3
    # the batch stays full
    assert len(shapes) < sum(out.nfe for out in outs) / 3 + max(out.nfe for out in outs)


# ------------------------------------------------------------------------------------ order, rank, early stop
class Scripted(torch.nn.Module):
    """A model whose logits depend on the position only: decoding can be worked out by hand. P = 2, V = 6."""
    only_decodes = False

    def __init__(self, table):
        super().__init__()
        self.cfg = nt_model.config_from_json(dict(
            model_type="tiny", vocab_size=6, hidden_size=6, intermediate_size=4, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=32, rope_theta=1e4, rms_norm_eps=1e-6,
            mask_token_id=5, eos_token_id=4))
        self.embed = torch.nn.Embedding(6, 6)
        self.table = torch.tensor(table).log()  # (L, V)

    def hidden(self, ids, valid=None, cache=None, positions=None, out=None, **_):
        at = (positions - 2).clamp(0, len(self.table) - 1)
        return self.table[at if out is None else at.gather(1, out)]

    def head(self, h):
        return h


def distribution(token, p):
    rest = (1 - p) / 5
    return [p if i == token else rest for i in range(6)]


def test_order_rank_and_nfe_by_hand():
    table = [distribution(1, 0.6), distribution(2, 0.95), distribution(3, 0.5), distribution(0, 0.97)]
    out = generate(Scripted(table), [torch.tensor([0, 0])], gen_len=4, block_len=4,
                   policy="threshold", threshold=0.9, cache="none")[0]
    # forward 0 reveals positions 1 and 3 (3 is surer: rank 0), then 0 (best of the rest), then 2
    assert out.ids.tolist() == [1, 2, 3, 0] and out.order.tolist() == [1, 0, 2, 0]
    assert out.rank.tolist() == [2, 1, 3, 0] and out.nfe == 3


def test_early_stop_fills_the_tail_at_the_forward_that_completed_the_answer():
    table = [distribution(1, 0.6), distribution(4, 0.95), distribution(3, 0.5), distribution(0, 0.4)]
    settings = dict(gen_len=4, block_len=4, policy="threshold", threshold=0.9, cache="none")
    out = generate(Scripted(table), [torch.tensor([0, 0])], **settings)[0]
    # forward 0: the EOS at position 1; forward 1: position 0, and with it the answer is complete
    assert out.ids.tolist() == [1, 4, 4, 4] and out.order.tolist() == [1, 0, 1, 1] and out.nfe == 2
    assert out.rank.tolist() == [1, 0, 2, 3] and out.n_tokens((4,)) == 1
    full = generate(Scripted(table), [torch.tensor([0, 0])], early_stop=False, **settings)[0]
    assert full.ids.tolist() == [1, 4, 3, 0] and full.nfe == 4 and full.n_tokens((4,)) == 1


@torch.no_grad()
def by_hand(model, prompt, L, K, no_eos, late_eos, P=None):
    """LLaDA's generate(), a token per forward, with its two ways to put off the end of a response. P: where it begins, if given."""
    eos, tail = list(model.cfg.eos_ids), model.cfg.eos_ids[0] if P else model.cfg.mask_id
    P = P or len(prompt)
    x = torch.cat([prompt, torch.full((P + L - len(prompt),), tail)])
    for first in range(P, P + L, K):
        while (x[first:first + K] == model.cfg.mask_id).any():
            logits = model(x[None])[0].double()
            if no_eos:
                logits[:, eos] = -torch.inf
            p = logits.softmax(-1)
            logits[:, model.cfg.mask_id] = -torch.inf
            token = logits.argmax(-1)
            confidence = p.gather(1, token[:, None])[:, 0]
            if late_eos:
                confidence[torch.isin(token, torch.tensor(eos))] = -1
            inside = (torch.arange(len(x)) >= first) & (torch.arange(len(x)) < first + K)
            confidence[(x != model.cfg.mask_id) | ~inside] = -2
            best = confidence.argmax()
            x[best] = token[best]
    return x[P:]


@pytest.mark.parametrize("no_eos, late_eos", [(False, False), (True, False), (False, True), (True, True)])
def test_the_end_of_a_response_can_be_put_off(no_eos, late_eos):
    """As LLaDA's generate() does, on the tiny model, alone and in batches; both decoders."""
    tiny, tok = nt_model.load("tiny"), data.load_tokenizer("tiny")
    problems = data.load_problems("tiny", "dev", 2)  # from 40 or 32 tokens of the solution on: 46 in all
    prompts = [torch.tensor(tok.prompt_ids(p["prompt"]).tolist() + tok.encode(p["solution"])[:n]) for p, n in zip(problems, (40, 32))]
    settings = dict(gen_len=16, block_len=8, policy="static", cache="none", early_stop=False, no_eos=no_eos, late_eos=late_eos)
    outs, ends = generate(tiny, prompts, batch_size=2, **settings), 0
    for prompt, out in zip(prompts, outs):
        assert same(out, reference(tiny, prompt, **settings)) and same(out, generate(tiny, [prompt], **settings)[0])
        want = by_hand(tiny, prompt, 16, 8, no_eos, late_eos)
        assert out.ids.tolist() == want.tolist()
        at = [i for i, token in enumerate(out.ids.tolist()) if token in tiny.cfg.eos_ids]
        ends += len(at)
        if late_eos:  # in its block, none before a token that ends nothing
            for b in range(2):
                orders = out.order[8 * b:8 * b + 8].tolist()
                late = [o for i, o in enumerate(orders) if 8 * b + i in at]
                assert not late or min(late) > max([o for i, o in enumerate(orders) if 8 * b + i not in at], default=-1)
    assert (ends == 0) == no_eos
    for rule in (dict(policy="threshold", threshold=0.7, cache="dual"), dict(policy="factor"), dict(policy="dream", steps=6)):
        for prompt, out in zip(prompts, generate(tiny, prompts, **{**settings, **rule})):
            assert same(out, reference(tiny, prompt, **{**settings, **rule})), rule


INFILLED = [("plain", dict(cache="none", policy="static")), ("plain", dict(cache="dual", policy="threshold", threshold=0.5)),
            ("plain", dict(cache="vicinity", vicinity=3, policy="static", steps=2)), ("shift", dict(cache="prefix", policy="static")),
            ("plain", dict(cache="none", policy="dream", steps=5)), ("block", dict(cache="exact", policy="static")),
            ("plain", dict(cache="prefix", policy="multiblock", threshold=1.0, cache_delay=2, refresh=2)),
            ("whole", dict(cache="exact", policy="threshold", threshold=0.5))]


@pytest.mark.parametrize("name, case", INFILLED)
def test_what_is_given_of_a_response_stays_and_only_masks_are_decoded(name, case):
    """In a batch with plain prompts, alone, and by the plain uncached reference (with the cache's stale keys where it has any)."""
    model, prompts = random_model(**CONFIGS[name]), prompts_of([2, 9, 5, 12])
    M, eos = model.cfg.mask_id, model.cfg.eos_ids[0]
    given = [[M, 3, M, 4, 5, M, M, 6], [M, *range(11), 7, M], [], [M] + 9 * [5] + 2 * [M]]  # blocks of 4, some given whole
    both = [torch.cat([p, torch.tensor(g, dtype=torch.long)]) for p, g in zip(prompts, given)]
    settings = dict(gen_len=14, block_len=4, no_eos=True, **case)
    for prompt, g, out in zip(both, given, generate(model, both, batch_size=3, **settings)):
        assert same(out, reference(model, prompt, **settings)) and same(out, generate(model, [prompt], **settings)[0])
        want = g + [eos] * (14 - len(g)) if g else [M] * 14
        assert [M if order >= 0 else i for i, order in zip(out.ids.tolist(), out.order.tolist())] == want
        assert M not in out.ids and sorted(out.rank.tolist()) == list(range(14))
        assert case["policy"] != "static" or "steps" in case or out.nfe == want.count(M)  # none is spent on what is given
        if case["cache"] == "exact":
            assert same(out, reference(model, prompt, **settings | dict(cache="none")))
    with pytest.raises(UserError, match="prompt 0 holds 3 tokens of its response: raise gen_len"):
        generate(model, [torch.tensor([5, M, 5, M])], **settings | dict(gen_len=2))


def infilled(monkeypatch, capsys, prompt, text, *options):
    """--infill on the command line -> the response, how many tokens were decoded."""
    monkeypatch.setattr("sys.argv", ["sample.py", "--prompt", prompt, "--infill", text, *map(str, options)])
    sample.main()
    said = re.search(r"response (.*)\n(\d+) tokens in", capsys.readouterr().out, re.S)
    return said[1], int(said[2])


def test_infilling_from_the_command_line(monkeypatch, capsys):
    """The given text stays, and the masks alone are counted."""
    texts = {"then in [MASK] . [MASK:11] then in red .": 12, "[MASK][MASK] red . [MASK] [MASK:2] gold": 5, "ball at [MASK]": 1, "[MASK:4] #### red": 4}
    prompt = data.load_problems("tiny", "dev", 1)[0]["prompt"]
    for text, n in texts.items():
        pieces = [piece.strip() for piece in re.split(r"\[MASK[:\d]*\]", text) if piece.strip()]
        response, decoded = infilled(monkeypatch, capsys, prompt, text)
        assert re.search(".*".join(map(re.escape, pieces)), response) and decoded == n and "eos" not in response
    with pytest.raises(UserError, match="prompt 0 holds 100 tokens of its response: raise gen_len"):
        infilled(monkeypatch, capsys, "a", "a [MASK:99]")
    for bad in ("then in red", "[mask]", "a [MASK:0] b", "[MASK] [MASK:0]", "[MASK: 8] [MASK]", "[MASK:12345]"):
        with pytest.raises(UserError, match=r"needs \[MASK\], or \[MASK:8\] for eight tokens"):
            infilled(monkeypatch, capsys, "a", bad)


def test_infilling_equals_a_loop_by_hand_on_the_tiny_model():
    """A token per forward, no end of a response among them; alone, in a batch, and by the reference."""
    tiny, tok = nt_model.load("tiny"), data.load_tokenizer("tiny")
    M, end, settings = tiny.cfg.mask_id, tok.chat.end_id, dict(gen_len=24, block_len=8, policy="static", cache="none", no_eos=True)
    asked = [tok.prompt_ids(p["prompt"]) for p in data.load_problems("tiny", "dev", 4)]
    given = [[M, *tok.encode("in red . then"), M, M, end], [M] * 9 + tok.encode("red gold"), [*[M] * 3, end], [M, *tok.encode("." * 11), M, M, end]]
    prompts = [torch.tensor(p.tolist() + g) for p, g in zip(asked, given)]
    for p, prompt, out in zip(asked, prompts, generate(tiny, prompts, batch_size=3, **settings)):
        assert out.ids.tolist() == by_hand(tiny, prompt, 24, 8, True, False, len(p)).tolist()
        assert same(out, reference(tiny, prompt, **settings)) and same(out, generate(tiny, [prompt], **settings)[0])


def test_chats_system_turns_and_raw_texts_equal_a_loop_by_hand_on_the_tiny_model():
    """In one batch: each is decoded from the ids that are written out here."""
    tiny, tok = nt_model.load("tiny"), data.load_tokenizer("tiny")
    bos, sep, (text, more) = tok.special["<bos>"], tok.special["<sep>"], (p["prompt"] for p in data.load_problems("tiny", "dev", 2))
    said = [["user", more], ["assistant", "in red ."]]
    asked = [tok.prompt_ids(dict(prompt=text, earlier=said)), tok.prompt_ids(text, "swap red"), tok.prompt_ids(dict(prompt=text, raw=True)),
             tok.prompt_ids(dict(prompt=text, earlier=said, raw=True), "swap red")]
    words = [tok.encode(t) for t in (text, more, "in red .", "swap red")]
    want = [[bos, *words[1], *words[2], *words[0], sep], [bos, *words[3], *words[0], sep], words[0], [*words[3], *words[1], *words[2], *words[0]]]
    assert [ids.tolist() for ids in asked] == want
    outs = generate(tiny, asked, batch_size=3, gen_len=8, block_len=4, policy="static", cache="none", early_stop=False)
    for ids, out in zip(want, outs):
        assert out.ids.tolist() == by_hand(tiny, torch.tensor(ids), 8, 4, False, False).tolist()


@pytest.mark.parametrize("family", ["sdar", "dream", "a2d-bd3lm"])
def test_infilling_of_families(tmp_path, family, monkeypatch, capsys):
    """What is given comes back to the character; it stands on the page, too."""
    official_checkpoint(tmp_path / "m", family)
    texts = {"ab [MASK:3] cd ": 3, "é[MASK][MASK:2]中": 3, "[MASKED] x [MASK] y": 1, "[MASK:20]": 20, " [MASK:5]\n  [MASK]": 6}
    how = "--model", tmp_path / "m", "--gen_len", 24, "--block_len", 4, "--html", tmp_path / "a.html"
    for text, n in texts.items():
        pattern = ".+".join(map(re.escape, re.split(r"(?:\[MASK(?::\d+)?\])+", text)))
        response, decoded = infilled(monkeypatch, capsys, "hi", text, *how)
        assert re.fullmatch(pattern, response, re.S) and decoded == n
        assert json.dumps(f"hi\n{text}".strip())[1:-1] in (tmp_path / "a.html").read_text()
    with pytest.raises(UserError, match="prompt 0 has 6"):
        infilled(monkeypatch, capsys, "hi", "x" * 600 + "[MASK]", *how)


def test_the_empty_prompt():
    """Every position is alike before the first reveal, so the first block is revealed at once: a choice among
    equal scores would hang on rounding.
    """
    for name in CONFIGS:
        model, empty = random_model(**CONFIGS[name]), torch.tensor([], dtype=torch.long)
        for cache in ("none", "prefix", "dual"):
            settings = dict(gen_len=6, block_len=4, policy="static", per_step=4, cache=cache,
                            early_stop=False)
            out, ref = generate(model, [empty], **settings)[0], reference(model, empty, **settings)
            assert torch.equal(out.ids, ref.ids) and torch.equal(out.order, ref.order) and out.nfe == ref.nfe


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt():
    model = random_model()
    model.head.weight.data[5] = torch.nan
    for policy in ("static", "threshold", "multiblock"):
        with pytest.raises(UserError, match="prompt 0 are not finite"):
            generate(model, prompts_of([3]), gen_len=8, block_len=4, policy=policy, cache="none")


@pytest.mark.parametrize("ids", [[3, 10**6], [-1], [5, -7, 5], [2**40]])
def test_tokens_that_the_model_lacks_are_an_error_that_names_the_prompt(ids):
    with pytest.raises(UserError, match="prompt 1 holds token ids outside .*wrong tokeniser"):
        generate(random_model(), [*prompts_of([3]), torch.tensor(ids)], gen_len=8, block_len=4)


def test_eos_in_the_prompt_does_not_stop():
    model = random_model()
    prompt = torch.tensor([38, 38, 1, 38])
    out = generate(model, [prompt], gen_len=8, block_len=4)[0]
    assert same(out, reference(model, prompt, gen_len=8, block_len=4)) and out.nfe >= 1


# --------------------------------------------------------------------------------- the official samplers
LLADA = FIXTURES / "llada_A"


def llada_settings(case):
    """Our settings for one case of samplers.json."""
    was, name = case["settings"], case["name"]
    cache = "prefix" if "prefix" in name else "dual" if "dual" in name else "none"
    settings = dict(gen_len=was["gen_length"], block_len=was["block_length"], cache=cache, early_stop=False)
    if was.get("factor"):
        return dict(settings, policy="factor", threshold=was["factor"])
    if was.get("threshold"):
        return dict(settings, policy="threshold", threshold=was["threshold"])
    return dict(settings, policy="static", per_step=was["gen_length"] // was["steps"])


@pytest.mark.parametrize("compiled", [False, True])
def test_llada_official_samplers(compiled, graphs):
    """Same ids and number of forwards as LLaDA's generate(), Fast-dLLM's three and its factor mode."""
    model = nt_model.load(LLADA)
    useless = 0
    for case in json.loads((LLADA / "samplers.json").read_text())["cases"]:
        if compiled and re.search("block16|steps8|factor_generate_(p|with_prefix)|fast_prefix_.*thr0.9", case["name"]):
            continue  # a graph takes seconds: each rule and each cache is there once
        settings, rows = llada_settings(case), case["settings"]["prompt"]
        real = case["settings"].get("attention_mask", [[1] * len(p) for p in rows])
        prompts = [torch.tensor([i for i, r in zip(p, m) if r]) for p, m in zip(rows, real)]
        outs = generate(model, prompts, compiled=compiled, **settings)
        for prompt, out, want in zip(prompts, outs, case["ids"]):
            assert out.ids.tolist() == want[-len(out.ids):], case["name"]
            assert same(out, reference(model, prompt, **settings)), case["name"]
            # with a threshold Fast-dLLM's cached loops run a useless forward
            # on a block that its refresh has filled
            spare = case["forwards"] - out.nfe
            excused = "thr0.9" in case["name"] and settings["cache"] != "none"
            assert spare == 0 or (spare == 1 and excused), case["name"]
            useless += spare
    assert useless <= 3 and bool(graphs) == compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_dreams_official_sampler(compiled, graphs):
    """diffusion_generate(): same ids and forwards for entropy, maskgit_plus, topk_margin; batches too."""
    model, n = nt_model.load(FIXTURES / "dream_A"), 0
    score = dict(entropy="entropy", maskgit_plus="confidence", topk_margin="margin")
    for case in json.loads((FIXTURES / "dream_A/samplers.json").read_text())["cases"]:
        was, rows = case["settings"], case["settings"]["prompt"]
        if not case["name"].startswith("official") or compiled and "steps8" in case["name"]:
            continue
        real = was.get("attention_mask", [[1] * len(p) for p in rows])
        prompts = [torch.tensor([i for i, r in zip(p, m) if r]) for p, m in zip(rows, real)]
        settings = dict(gen_len=16, policy="dream", steps=was["steps"], eps=was["eps"], cache="none",
                        score=score[was["alg"]], early_stop=False)
        outs = generate(model, prompts, compiled=compiled, **settings)
        for prompt, out, want in zip(prompts, outs, case["ids"]):
            assert out.ids.tolist() == want[-16:] and out.nfe == case["forwards"], case["name"]
            assert same(out, reference(model, prompt, **settings))
            n += 1
    assert n == (11 if compiled else 13) and bool(graphs) == compiled


def ranked_in_fp64(logits, cfg, s, noise=None, inner=pick_tokens):
    """pick_tokens(), its score as precise as the official code's softmax in fp64: 1 - 1e-7 is below 1 - 1e-8."""
    token, confidence, entropy, _ = inner(logits, cfg, s, noise)
    others = (logits.double() - logits.double().gather(-1, token[..., None])).exp().scatter(-1, token[..., None], 0)
    return token, confidence, entropy, -others.sum(-1)


@pytest.mark.parametrize("fp64", [False, True])
@pytest.mark.parametrize("name, n_cases, n_ties", [("a2d_mdlm_A", 5, 0), ("a2d_qwen2_mdlm_A", 5, 1), ("illada_A", 7, 0)])
def test_samplers_of_whole_canvases(monkeypatch, name, n_cases, n_ties, fp64):
    """dllm's MDLMSampler where its quota is LLaDA's (a block takes equal steps), LLaDA's generate() for iLLaDA.
    Where confidences are equal in fp32 the leftmost goes first here: so do one case's, and none's in fp64.
    """
    if fp64:
        monkeypatch.setattr(sample, "pick_tokens", ranked_in_fp64)
    model, n, ties = nt_model.load(FIXTURES / name), 0, 0
    for case in json.loads((FIXTURES / name / "samplers.json").read_text())["cases"]:
        was, rows = case["settings"], case["settings"]["prompt"]
        block_len = was.get("block_size") or was["block_length"]
        steps = was["steps"] * block_len // 16  # of a block
        if "var_generate" in case["name"] or ("block_size" in was and block_len % steps):
            continue  # a canvas that grows; round(masks left / steps left) instead of base and remainder
        real = was.get("attention_mask") or [[1] * len(p) for p in rows]
        prompts = [torch.tensor([i for i, r in zip(p, m) if r]) for p, m in zip(rows, real)]
        settings = dict(gen_len=16, block_len=block_len, policy="static", steps=steps, cache="none", early_stop=False)
        outs = generate(model, prompts, **settings)
        for i, (prompt, out) in enumerate(zip(prompts, outs)):
            want = case["ids"][i][len(rows[i]):][:16]
            assert out.nfe == case["forwards"] and same(out, reference(model, prompt, **settings)), case["name"]
            ties += out.ids.tolist() != want
            n += 1
    assert n == n_cases and ties == (0 if fp64 else n_ties)


@pytest.mark.parametrize("name, compiled, fp64", [
    ("a2d_bd3lm_A", False, False), ("a2d_bd3lm_A", True, False), ("diffcoder_A", False, False), ("diffcoder_A", False, True)])
def test_samplers_of_blocks(monkeypatch, name, compiled, fp64, graphs):
    """dllm's BD3LMSampler and Stable-DiffCoder's generate_block(): same ids, unequal prompts in one batch too;
    their forward over the prompt and the ones that commit a block are fused here.
    """
    if fp64:
        monkeypatch.setattr(sample, "pick_tokens", ranked_in_fp64)
    model, n, ties = nt_model.load(FIXTURES / name), 0, 0
    for case in json.loads((FIXTURES / name / "samplers.json").read_text())["cases"]:
        was = case["settings"]
        rule = dict(policy="static", steps=was["steps"] // 4)
        if was.get("threshold"):
            rule = dict(policy="threshold", threshold=was["threshold"])
        prompts = [torch.tensor(p) for p in was["prompt"]]
        settings = dict(gen_len=16, block_len=4, early_stop=False, **rule)
        for cache in ("exact", "none")[:1 if compiled else 2]:
            outs = generate(model, prompts, cache=cache, compiled=compiled, **settings)
            for prompt, out, ids in zip(prompts, outs, case["ids"]):
                want = ids[-(-len(prompt) // 4) * 4 if model.cfg.whole_blocks else len(prompt):]
                stop = want.index(was["eos_id"]) if "stop" in case["name"] else 16
                ties += out.ids.tolist()[:stop] != want[:stop]
                assert same(out, reference(model, prompt, cache=cache, **settings)), case["name"]
                if stop == 16 and model.cfg.whole_blocks:
                    assert out.nfe + 4 == case["forwards"], case["name"]
                if stop == 16 and not model.cfg.whole_blocks:
                    assert with_commits(out, len(prompt), 4) == case["forwards"], case["name"]
                n += 1
    assert n == (14 if model.cfg.whole_blocks else 12) // (1 + compiled) and bool(graphs) == compiled
    assert ties == (2 if name == "diffcoder_A" and not fp64 else 0)  # of one case, with either cache


@pytest.mark.parametrize("compiled", [False, True])
def test_sdars_official_sampler(compiled, graphs):
    """block_diffusion_generate(), static and dynamic: same ids; its prefill and commits are fused here."""
    model, n = nt_model.load(FIXTURES / "sdar_A"), 0
    for case in json.loads((FIXTURES / "sdar_A/samplers.json").read_text())["cases"]:
        was = case["settings"]
        if "sequential" in case["name"]:
            continue
        rule = (dict(policy="threshold", threshold=was["confidence_threshold"]) if "dynamic" in case["name"]
                else dict(policy="static", steps=was["denoising_steps"]))
        prompt = torch.tensor(was["prompt"]).reshape(-1)
        want = torch.tensor(case["ids"]).reshape(-1)
        settings = dict(gen_len=len(want) - len(prompt), block_len=was["block_length"], early_stop=False,
                        **rule)
        caches = ("exact", "none") if not compiled else ("none",) if rule["policy"] == "static" else ("exact",)
        for cache in caches:
            out = generate(model, [prompt], cache=cache, compiled=compiled, **settings)[0]
            assert out.ids.tolist() == want[len(prompt):].tolist(), case["name"]
            assert same(out, reference(model, prompt, cache=cache, **settings))
            assert with_commits(out, len(prompt), was["block_length"]) == case["forwards"], case["name"]
            n += 1
    assert n == (8 if compiled else 16) and bool(graphs) == compiled


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_decoding_decides_who_sees_whom_in_a_block_causal_model(cache):
    """A model that names blocks of 4, decoded in blocks of 8, is one that names blocks of 8 (T3D trains in 8
    and its Table 1 decodes in both), and not the one of 4.
    """
    four, eight = random_model(**CONFIGS["block"]), random_model(**{**CONFIGS["block"], "block_size": 8})
    prompts, rule = prompts_of([5, 11]), dict(gen_len=16, policy="static", per_step=2, cache=cache)
    a, b = (generate(m, prompts, block_len=8, **rule) for m in (four, eight))
    c = [reference(four, p, block_len=8, **rule) for p in prompts]
    d = generate(four, prompts, block_len=4, **rule)
    for w, x, y, z in zip(a, b, c, d):
        assert torch.equal(w.ids, x.ids) and torch.equal(w.order, x.order) and torch.equal(w.ids, y.ids)
        assert not torch.equal(w.order, z.order)
    assert four.cfg.block_len == 4  # it is not changed
