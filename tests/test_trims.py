import importlib
import json
import runpy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import SPECIALS, official_checkpoint, write_bpe
from conftest import ROOT, random_model
from transformers import LlamaConfig, LlamaForCausalLM

import data
import lora
import model as nt_model
import run as training
import trims
from teacher import difficulty, load_teacher, load_teacher_tokenizer, spread, token_nll
from trims import Config, make_batch, mask_response, mdlm_loss

CFG = SimpleNamespace(t_min=0.001, batch_size=2)


def test_loss_by_hand():
    """Two masked tokens of a response of 4 with t = 0.5, batch of 2: (1/t) (1/L) (1/B) sum of -log p."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    w = torch.full((2,), 1 / 0.5 / 4 / 2)
    want = (-math.log(0.25) - math.log(0.8)) / 0.5 / 4 / 2
    assert abs(mdlm_loss(p.log(), torch.tensor([1, 2]), w).item() - want) < 1e-6


def test_loss_gradient_by_finite_differences():
    """Through both kinds of mask weights: 1/t of a standard mask and 1 / masked fraction of a ranked one."""
    g = torch.Generator().manual_seed(0)
    logits, x0 = torch.randn(5, 4, generator=g), torch.tensor([0, 3, 1, 2, 2])
    cfg = Config(n_buckets=2, p_context=0.0, p_future=1.0)
    _, ranked = trims.trajectory_mask([1, 1, 2, 2, 2, 2], cfg, np.random.default_rng(1))
    assert set(ranked) <= {1.0, 6 / 4}  # k = 0: all six are masked; k = 1: four of them
    w = torch.tensor([1 / 0.3, 1 / 0.3, *ranked[:3]]).float() / 6 / 2
    leaf = logits.clone().requires_grad_()
    mdlm_loss(leaf, x0, w).backward()
    eps = 1e-3
    for i in range(5):
        for v in range(4):
            up, down = logits.double().clone(), logits.double().clone()
            up[i, v] += eps
            down[i, v] -= eps
            plain = [sum(w[r].item() * (z[r].exp().sum().log() - z[r, x0[r]]).item() for r in range(5))
                     for z in (up, down)]  # written out, in fp64
            assert abs((plain[0] - plain[1]) / (2 * eps) - leaf.grad[i, v].item()) < 1e-4


def test_mdlm_masks_have_the_right_rate_and_weight():
    shares = []
    for i in range(500):
        masked, w = mask_response({"x0": [0] * 64}, CFG, data.example_rng(0, 0, i))
        t = 1 / w[0]
        assert np.allclose(w, w[0]) and abs(masked.mean() - t) < 5 * math.sqrt(t * (1 - t) / 64) + 1e-9
        shares.append(t)
    assert abs(np.mean(shares) - 0.5) < 0.05 and min(shares) < 0.05 and max(shares) > 0.95


def test_how_the_tiny_model_was_masked():
    """Half as in block decoding: what is before the current block is clean, what is behind it masked; drills."""
    mask = runpy.run_path(str(ROOT / "weights/train.py"))["mask_response"]
    cfg = SimpleNamespace(t_min=0.001, block_share=1.0, block_len=4)
    for i in range(50):
        masked, w = mask({"x0": [0] * 16}, cfg, data.example_rng(0, 0, i))
        current = np.flatnonzero(w)
        assert len(current) == 4 and current[0] % 4 == 0
        assert not masked[:current[0]].any() and masked[current[-1] + 1:].all()
    cfg.block_share = 0.0
    for i in range(5):
        for ours, theirs in zip(mask({"x0": [0] * 16}, cfg, data.example_rng(0, 0, i)),
                                mask_response({"x0": [0] * 16}, cfg, data.example_rng(0, 0, i))):
            assert np.array_equal(ours, theirs)
    masked, w = mask({"x0": [0] * 4, "masked": [True, False, False, True]}, cfg, data.example_rng(0, 0, 0))
    assert masked.tolist() == [True, False, False, True] and w.tolist() == [2.0] * 4


def test_noise_depends_on_seed_epoch_and_example_only():
    a, b = (mask_response({"x0": [0] * 32}, CFG, data.example_rng(0, 1, 7)) for _ in range(2))
    other = mask_response({"x0": [0] * 32}, CFG, data.example_rng(0, 2, 7))
    assert np.array_equal(a[0], b[0]) and not np.array_equal(a[0], other[0])


def test_batch_layout():
    examples = [{"id": 0, "prompt_ids": [1, 2, 3], "x0": [4, 5, 6, 7]},
                {"id": 1, "prompt_ids": [1], "x0": [8, 9, 9, 9]}]
    same = data.example_rng(0, 0, 1)
    t, drawn = CFG.t_min + (1 - CFG.t_min) * same.random(), same.random(4)
    rngs = [data.example_rng(0, 0, i) for i in range(2)]
    facts = SimpleNamespace(mask_id=99, pad_id=0, block_len=0)
    b = make_batch(examples, rngs, CFG, facts)
    x0, masked, w = b["x0"], b["masked"], b["loss_w"]
    inputs, cols = data.response_inputs(facts, b["prompts"], b["xt"])
    ids, valid = inputs["ids"], inputs["valid"]
    assert cols.tolist() == [[3, 4, 5, 6]] * 2
    assert x0.tolist() == [[4, 5, 6, 7], [8, 9, 9, 9]] and valid.tolist()[1][:3] == [False, False, True]
    hidden = [u < t for u in drawn]
    assert masked[1].tolist() == hidden and True in hidden and False in hidden
    assert ids[1].tolist() == [0, 0, 1, *(99 if m else x for m, x in zip(hidden, [8, 9, 9, 9]))]
    assert w[1].tolist() == pytest.approx([1 / t / 4 / 2] * 4)  # over the length, over a batch of two


def test_block_causal_models_train_behind_clean_blocks():
    """Block of 2, prompt of 3: [p0 p1 | p2 x | x x | x (noisy) | p2 x | x x | x (clean)]."""
    facts, cfg = random_model(block_size=2).cfg, SimpleNamespace(**{**vars(CFG), "batch_size": 1})
    example = {"id": 0, "prompt_ids": [1, 2, 3], "x0": [4, 5, 6, 7]}
    b = make_batch([example], [data.example_rng(0, 0, 0)], cfg, facts)
    inputs, cols = data.response_inputs(facts, b["prompts"], b["xt"], b["x0"])
    noisy = [39 if m else x for m, x in zip(b["masked"][0].tolist(), [4, 5, 6, 7])]
    assert inputs["ids"].tolist() == [[1, 2, 3, *noisy, 3, 4, 5, 6, 7]] and 39 in noisy
    assert inputs["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6]]
    assert cols.tolist() == [[3, 4, 5, 6]]
    sees = [inputs["attn_mask"][0, q].nonzero()[:, 0].tolist() for q in (1, 3, 5, 8)]
    assert sees == [[0, 1], [0, 1, 2, 3], [0, 1, 4, 5, 7, 8], [0, 1, 7, 8]]


def test_expected_loss_is_an_upper_bound_for_a_uniform_model():
    """With uniform predictions the MDLM loss is log V in expectation, whatever t is drawn."""
    total = []
    for i in range(300):
        b = make_batch([{"id": 0, "prompt_ids": [1], "x0": [2] * 64}] * 2,
                       [data.example_rng(0, i, j) for j in range(2)], CFG,
                       SimpleNamespace(mask_id=9, pad_id=0, block_len=0))
        x0, masked, w = b["x0"], b["masked"], b["loss_w"]
        total.append(mdlm_loss(torch.zeros(int(masked.sum()), 10), x0[masked], w[masked]).item())
    assert abs(np.mean(total) - math.log(10)) < 0.1


def test_learning_rate_schedules():
    def frac(step, schedule, warmup=0, floor=0.0):
        return training.lr_frac(step, 100, SimpleNamespace(lr_schedule=schedule, warmup_steps=warmup,
                                                           lr_floor=floor))
    assert frac(0, "constant", 10) == 0.1 and frac(50, "constant", 10) == 1
    assert frac(10, "cosine", 10) == 1 and abs(frac(55, "cosine", 10) - 0.5) < 1e-9
    assert abs(frac(100, "cosine", 10, 0.1) - 0.1) < 1e-9 and abs(frac(55, "cosine", 10, 0.1) - 0.55) < 1e-9
    assert frac(60, "tail") == 1 and abs(frac(80, "tail") - 0.5) < 1e-9


def test_presets_and_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["trims.py", "--lr", "0.5", "--no-full"])
    cfg = training.parse(Config, trims.PRESETS, "")
    assert (cfg.lr, cfg.gen_len, cfg.clip) == (0.5, 48, 1.0)  # command line > preset > field
    monkeypatch.setattr("sys.argv", ["trims.py", "--help"])
    with pytest.raises(SystemExit):
        training.parse(Config, trims.PRESETS, "doc")


@pytest.mark.parametrize("method", ["tad", "t3d", "tabom", "trims"])
def test_a_family_that_no_paper_trains_has_the_preset_of_others(tmp_path, monkeypatch, method):
    """Never another family's: an 8B model must not train on the shell game."""
    module = importlib.import_module(method)
    for name, family in (("tiny", "tiny"), (official_checkpoint(tmp_path / "a", "dream"), "dream"),
                         (official_checkpoint(tmp_path / "b", "sdar"), "sdar"), ("a2d-0.6b", "a2d"), ("illada", "illada")):
        monkeypatch.setattr("sys.argv", [f"{method}.py", "--model", str(name)])
        want = module.PRESETS.get(family, module.PRESETS["others"])
        cfg = training.parse(module.Config, module.PRESETS, "")
        assert cfg.model == str(name) and {key: getattr(cfg, key) for key in want} == want
        assert (cfg.data == "tiny") == (family == "tiny")


# ------------------------------------------------------------------------------------- difficulty and buckets
def test_scores_move_through_bytes_by_hand():
    """Teacher: 'ab' 2 nats, 'c' 3, 'def' 6; student: 'a' 'bcd' 'ef'."""
    got = spread([2.0, 3.0, 6.0], [2, 1, 3], [1, 3, 2])
    assert np.allclose(got, [1, 1 + 3 + 2, 4]) and abs(got.sum() - 11) < 1e-12
    same = [0.1, 5.0, 0.0, 2.5]
    assert np.allclose(spread(same, [1, 4, 2, 3], [1, 4, 2, 3]), same)  # identity
    smile = "🙂".encode()  # four bytes: two tokens of the teacher, four of the student
    assert np.allclose(spread([4.0, 8.0], [3, 1], [1] * len(smile)), [4 / 3] * 3 + [8])
    rng = np.random.default_rng(0)
    for _ in range(50):  # the total is kept whatever the cuts; special tokens of the student have no bytes
        total = int(rng.integers(1, 60))
        cuts = [np.diff([0, *sorted(rng.integers(0, total + 1, rng.integers(0, 20)).tolist()), total])
                for _ in range(2)]
        cuts[0] = cuts[0][cuts[0] > 0]
        values = rng.exponential(size=len(cuts[0]))
        got = spread(values, *cuts)
        assert abs(got.sum() - values.sum()) < 1e-9 and (got >= -1e-12).all()
        assert (got[cuts[1] == 0] == 0).all()


def test_buckets_by_hand():
    nan = float("nan")
    scores = [[3.0, 0.0, 1.0, nan], [0.0, 2.0, 0.0, 0.0]]
    # hard first: 3, 2, 1 | 0, 0 | 0, 0, ties drawn by the seed; 7 tokens in 3 buckets: 3 + 2 + 2
    drawn = [trims.buckets(scores, 3, "descending", seed) for seed in range(40)]
    for (a, b, c, filling), (d, e, f, g) in drawn:
        assert (a, c, filling, e) == (1, 1, 3, 1) and sorted([b, d, f, g]) == [2, 2, 3, 3]
    assert len({str(b) for b in drawn}) == 6  # every way to split four equal scores
    assert trims.buckets(scores, 3, "descending", 5) == drawn[5]
    for (a, b, c, filling), (d, e, f, g) in [trims.buckets(scores, 3, "ascending", seed) for seed in range(9)]:
        assert (a, c, filling, e) == (3, 2, 1, 3) and sorted([b, d, f, g]) == [1, 1, 1, 2]
    shuffled = [trims.buckets(scores, 3, "random", seed) for seed in range(20)]
    assert len({str(b) for b in shuffled}) > 5 and all(b[0][3] == 3 for b in shuffled)
    many = trims.buckets([[0.0] * 800], 8, "descending")[0]
    assert [many.count(b) for b in range(1, 9)] == [100] * 8  # equal mass although everything ties
    files = trims.buckets([[0.0] * 200 + [1.0 + i for i in range(50)]] * 4, 8, "descending")
    means = [np.mean(part[:200]) for part in files]  # neither the place in the data nor in the response counts
    assert max(means) - min(means) < 0.5
    halves = [np.mean([part[i] for part in files for i in where]) for where in (range(100), range(100, 200))]
    assert abs(halves[0] - halves[1]) < 0.3


def test_the_masking_rule():
    """k is uniform over 0..K-1; buckets up to k are masked with p_context, the others with p_future."""
    bucket, cfg = [1, 2, 3, 4] * 50, Config(n_buckets=4, p_context=0.0, p_future=1.0)
    states = {tuple(trims.trajectory_mask(bucket, cfg, data.example_rng(0, 0, i))[0][:4]) for i in range(60)}
    assert states == {tuple(b > k for b in range(1, 5)) for k in range(4)}  # all masked occurs, none does not
    cfg, rates = Config(n_buckets=4), {b: [] for b in range(1, 5)}
    for i in range(600):
        masked, w = trims.trajectory_mask(bucket, cfg, data.example_rng(0, 1, i))
        assert np.allclose(w, len(bucket) / masked.sum())  # the mean over masked tokens
        for b in rates:
            rates[b].append(masked[b - 1::4].mean())
    # bucket b is context when k >= b: (4 - b) of the four k
    want = {b: ((4 - b) * .05 + b * .95) / 4 for b in rates}
    assert all(abs(np.mean(rates[b]) - want[b]) < 0.03 for b in rates)
    cfg = Config(trajectory_weight="none")
    assert (trims.trajectory_mask(bucket, cfg, data.example_rng(0, 0, 0))[1] == 1).all()


def test_share_draws_the_standard_mask_for_the_rest():
    example = {"x0": [0] * 64, "bucket": [1] * 32 + [8] * 32}
    cfg = Config(trajectory_share=0.3, p_context=0.0, p_future=1.0, n_buckets=8)
    n = 0
    for i in range(400):
        masked, _ = mask_response(example, cfg, data.example_rng(0, 0, i))
        n += bool(masked[32:].all() and (masked[:32].all() or not masked[:32].any()))
    assert abs(n / 400 - 0.3) < 0.07


def test_teacher_scores_land_on_the_students_tokens(monkeypatch):
    """The tiny teacher and model share a tokeniser: a score is the teacher's NLL of that very token; the
    first EOS has the end token's; filling has none; the phrases, drawn at random, are the hard tokens.
    """
    monkeypatch.setattr(data.game("tiny"), "PRIVILEGED_SHARE", 0.0)
    tok, teacher_tok = data.load_tokenizer("tiny"), load_teacher_tokenizer("tiny-ar")
    teacher, examples = load_teacher("tiny-ar"), [data.game_example(tok, "tiny", i, 6) for i in range(6)]
    scores = difficulty(examples, tok, teacher, teacher_tok, "nll")
    for e, s in zip(examples, scores):
        ids = torch.tensor([e["prompt_ids"] + e["x0"]])
        nll = token_nll(teacher, ids)[0, len(e["prompt_ids"]):]
        n = e["x0"].index(tok.eos_id)
        assert np.allclose(s[:n + 1], nll[:n + 1], atol=1e-4) and np.isnan(s[n + 1:]).all()
        phrases = np.array(s[:4 * data.game("tiny").N_SWAPS]).reshape(-1, 4)
        assert phrases[:, 0].mean() > 0.5 and phrases[:, 1:].mean() < 0.1
    entropy = difficulty(examples, tok, teacher, teacher_tok, "entropy")
    assert abs(entropy[0][0] - math.log(3)) < 0.02 and entropy[0][:8] != scores[0][:8]
    broken = {**examples[0], "x0": [0xC3] + examples[0]["x0"][1:]}  # half a character
    with pytest.raises(nt_model.UserError, match="not UTF-8"):
        difficulty([broken], tok, teacher, teacher_tok, "nll")


@pytest.mark.parametrize("family, block_len", [("sdar", 8), ("sdar", 0), ("a2d-bd3lm", 16), ("llada", 8)])
def test_blocks_of_training_are_those_that_are_asked_for(tmp_path, monkeypatch, family, block_len):
    """As t3d.py has them, for its SFT and ReDi rows; a bidirectional model has none."""
    folder, seen, inner = official_checkpoint(tmp_path / "base", family), [], trims.training_loss
    own = nt_model.load(folder).cfg.block_len
    lines = [json.dumps(dict(prompt=f"{n}?", solution=f"e {n}", answer="")) for n in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(trims, "training_loss", lambda model, *args: seen.append(model.cfg.block_len) or inner(model, *args))
    monkeypatch.setattr("sys.argv", [str(word) for word in [
        "trims.py", "--model", folder, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run", "--full", "--gen_len", 16,
        "--batch_size", 4, "--max_steps", 1, "--trajectory_share", 0, "--train_block", block_len]])
    trims.main()
    assert set(seen) == {own and (block_len or own)} == {nt_model.load(tmp_path / "run/model").cfg.block_len}


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_trims_trains_two_steps_on_every_family_with_another_tokeniser(tmp_path, monkeypatch, family):
    """A teacher in Qwen's format with its own tokeniser; difficulty is computed once and read again."""
    folder = official_checkpoint(tmp_path / "base", family)
    teacher = tmp_path / "teacher"
    LlamaForCausalLM(LlamaConfig(vocab_size=272, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(teacher)
    write_bpe(teacher, SPECIALS["dream"])
    (teacher / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")))
    lines = [json.dumps(dict(prompt=f"{n}?", solution=f"e\u0301 {n} 🙂", answer="")) for n in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    args = ["trims.py", "--model", folder, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run",
            "--teacher", teacher, "--gen_len", 16, "--batch_size", 4, "--micro_batch", 2,
            "--max_steps", 2, "--lr", 1e-2, "--trajectory_share", 1.0, "--n_buckets", 3]
    monkeypatch.setattr("sys.argv", [str(a) for a in args])
    trims.main()
    rows = data.read_jsonl(tmp_path / "run/difficulty/rank0.jsonl")
    assert len({r["key"] for r in rows}) == 6  # of text, teacher and metric: other data are scored anew
    text = [v for v in rows[0]["scores"] if v is not None]
    assert len(rows) == 6 and len(text) == len("\u00e9 0 🙂".encode()) + 1  # NFC, a token per byte, the EOS
    adapted = lora.load(nt_model.load(folder), tmp_path / "run/adapter")
    ids = torch.randint(0, 250, (1, 9))
    assert not torch.equal(adapted(ids), nt_model.load(folder)(ids))
    monkeypatch.setattr("teacher.load_teacher", lambda *a: pytest.fail("scored twice"))
    monkeypatch.setattr("sys.argv", [str(a) for a in [*args, "--overwrite", "--max_steps", 1]])
    (tmp_path / "run/difficulty").rename(tmp_path / "kept")
    with pytest.raises(pytest.fail.Exception, match="scored twice"):
        trims.main()  # a new run computes its own
    (tmp_path / "run/difficulty/rank0.jsonl").write_text((tmp_path / "kept/rank0.jsonl").read_text())
    monkeypatch.setattr("sys.argv", [str(a) for a in [*args, "--max_steps", 1]])
    trims.main()  # reads them


def test_bad_settings_are_one_line(monkeypatch, tmp_path):
    for args, words in ((["--trajectory_share", "2"], "trajectory_share is 2.0: it must be at most 1"),
                        (["--n_buckets", "0"], "at least 1"),
                        (["--n_problems", "9"], "exceeds the data"), (["--gen_len", "20"], "have 48 tokens"),
                        (["--max_prompt", "3"], "raise --max_prompt")):
        monkeypatch.setattr("sys.argv", ["trims.py", "--out", str(tmp_path / "x"), *args])
        with pytest.raises(nt_model.UserError, match=words):
            trims.main()


def test_trajectories_obey_the_lengths_that_are_asked_for(tmp_path):
    tok, problems = data.load_tokenizer("tiny"), data.load_problems("tiny", "train", 4)
    problems[2]["prompt"] = problems[2]["prompt"][:40]
    def records(n, L):
        return [dict(id=f"{L}-{p['id']}", source="tiny", prompt=p["prompt"], prompt_ids=tok.prompt_ids(p).tolist(), x0=[1] * L,
                     order=[*range(L)], rank=[*range(L)], nfe=L, solution="", answer="", correct=True, model="tiny", decoding={},
                     schema=1) for p in problems[:n]]
    for name, rows in dict(one=records(4, 48), mixed=records(2, 48) + records(2, 50), other=records(1, 50)).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("{}\n")
    (tmp_path / "run/trajectories").symlink_to(tmp_path / "one")
    with pytest.raises(nt_model.UserError, match="run is a run's folder: give .*run/trajectories"):
        trims.load_examples(Config(data=str(tmp_path / "run"), gen_len=48), tok)
    assert len(trims.load_examples(Config(data=str(tmp_path / "one"), gen_len=48), tok)) == 4
    lengths = sorted(len(tok.prompt_ids(p)) for p in problems)
    short = trims.load_examples(Config(data=str(tmp_path / "one"), gen_len=48, max_prompt=lengths[0]), tok)
    assert len(short) == 1 and len(short[0]["prompt_ids"]) == lengths[0] < lengths[1]
    assert len(trims.load_examples(Config(data=str(tmp_path / "one"), gen_len=100), tok)[0]["x0"]) == 48
    for name, gen_len in (("one", 20), ("mixed", 48), ("mixed", 50), ("other", 48)):
        with pytest.raises(nt_model.UserError, match="responses of .* one length is needed"):
            trims.load_examples(Config(data=str(tmp_path / name), gen_len=gen_len), tok)


@pytest.mark.parametrize("words, steps", [("--warmup_ratio 0.03 --max_steps 10", 1), ("--warmup_ratio 0.03 --max_steps 1", 1),
                                          ("--warmup_ratio 0.5 --max_steps 10", 5), ("--max_steps 10", 20)])
def test_a_share_of_few_steps_is_one_step_of_warm_up(monkeypatch, tmp_path, words, steps):
    def stop(run, *_):
        raise StopIteration(run.cfg.warmup_steps)
    monkeypatch.setattr(training.Run, "steps", stop)
    monkeypatch.setattr("sys.argv", ["trims.py", "--trajectory_share", "0", "--n_problems", "64", "--out", str(tmp_path / "x"),
                                     *words.split()])
    with pytest.raises(StopIteration) as stopped:
        trims.main()
    assert stopped.value.value == steps


def test_data_of_another_tokeniser_and_thinking_that_is_absent(tmp_path):
    tok = data.load_tokenizer("tiny")
    problem = data.load_problems("tiny", "train", 1)[0]
    record = dict(id="a", source="tiny", prompt=problem["prompt"], prompt_ids=[1, 2, 3], x0=[1, 2],
                  order=[0, 1], rank=[0, 1], nfe=2, solution="", answer="", correct=True, model="other",
                  decoding={}, schema=1)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/rank0.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(nt_model.UserError, match="collected with other"):
        trims.load_examples(Config(data=str(tmp_path / "t")), tok)
    row = dict(prompt="swap", solution="red .", answer="red", thinking="blue .")
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    cfg = Config(data=str(tmp_path / "p.jsonl"), gen_len=8)
    for flag, words in ((False, "red ."), (True, "blue .\nred .")):
        cfg.with_thinking = flag
        x0 = trims.load_examples(cfg, tok)[0]["x0"]
        assert tok.decode([i for i in x0 if i != tok.eos_id]) == words
    del row["thinking"]
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(nt_model.UserError, match="thinking"):
        trims.load_examples(cfg, tok)
