"""The four losses against plain loops written from the papers' equations: values and gradients, fp64.

Every setting goes the whole way that a run goes: records, states, forwards, loss. The model is a stand-in whose
logits depend on all that a position may see, so that a wrong state is a wrong loss. Gradients are worked out by hand.
"""
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model as nt_model
import run
import t3d
import tabom
import tad
import trims

V, EOS, MASK = 8, 6, 7


@dataclass
class Facts:
    """What is read of a model's configuration."""
    block_len: int
    whole_blocks: bool
    mask_id: int = MASK
    eos_ids: tuple = (EOS,)
    pad_id: int = EOS
    vocab_size: int = V
    raw: dict = field(default_factory=dict)


class StandIn(torch.nn.Module):
    """Logits of position i: place[i], and of every token that it sees a row of `token`, by the share it has."""

    def __init__(self, rng, L, block_len, whole_blocks):
        super().__init__()
        self.place, self.token = (torch.nn.Parameter(torch.tensor(rng.normal(0, 1.5, shape)))
                                  for shape in ((L, V), (V, V)))
        self.head = torch.nn.Linear(V, V, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(V), requires_grad=False)
        self.embed = SimpleNamespace(weight=self.token)
        self.cfg = Facts(block_len, whole_blocks)


def block_of(cfg, prompt, i):
    """SDAR: blocks count from position 0, or from the response's first token where it begins a block."""
    return ((0 if cfg.whole_blocks else len(prompt)) + i) // cfg.block_len if cfg.block_len else 0


def seen(cfg, prompt, xt, clean, i):
    """How much of every token the position i sees: of the prompt, of its own block or what is before it."""
    counts = [0.0] * V
    for k, token in enumerate(prompt):
        counts[token] += 0.3 / (k + 1)
    for j, token in enumerate(xt):
        behind = block_of(cfg, prompt, i) - block_of(cfg, prompt, j)
        if behind >= 0:
            counts[clean[j] if clean and behind else token] += 1 / (j + 1)
    return counts


def hidden_rows(model, prompts, xt, where, clean=None):
    """In place of data.hidden_rows: the stand-in's logits of the rows."""
    counts = [seen(model.cfg, prompts[row], xt[row].tolist(), None if clean is None else clean[row].tolist(), i)
              for row, i in zip(*(w.tolist() for w in where))]
    return model.place[where[1]] + torch.tensor(counts).reshape(-1, V) @ model.token


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """All in fp64, also what a loss would compute in fp32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    for module in (data, tad, t3d, tabom, trims):
        monkeypatch.setattr(module, "hidden_rows", hidden_rows)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------ what the loops are made of
def log_softmax(z):
    top = max(z)
    total = math.log(sum(math.exp(x - top) for x in z)) + top
    return [x - total for x in z]


class Loops:
    """A model in plain numbers, the loss so far, and its gradient."""

    def __init__(self, model):
        self.cfg, self.place, self.token = model.cfg, model.place.tolist(), model.token.tolist()
        self.loss = 0.0
        self.d_place, self.d_token = ([[0.0] * V for _ in rows] for rows in (self.place, self.token))

    def row(self, prompt, xt, clean, i):
        """-> i, what it sees, its logits."""
        counts = seen(self.cfg, prompt, xt, clean, i)
        return i, counts, [self.place[i][v] + sum(counts[u] * self.token[u][v] for u in range(V)) for v in range(V)]

    def add(self, row, weight, term):
        """weight times a term (value, derivative by the row's logits)."""
        value, by_logit = term
        self.loss += weight * value
        self.slope(row, weight, by_logit)

    def slope(self, row, weight, by_logit):
        i, counts, _ = row
        for v in range(V):
            self.d_place[i][v] += weight * by_logit[v]
            for u in range(V):
                self.d_token[u][v] += weight * counts[u] * by_logit[v]


def cross_entropy(z, x):
    logp = log_softmax(z)
    return -logp[x], [math.exp(logp[v]) - (v == x) for v in range(V)]


def divergence(teacher, z, tau):
    """tau^2 KL(teacher || student) at temperature tau."""
    log_q, log_p = (log_softmax([x / tau for x in logits]) for logits in (teacher, z))
    value = tau * tau * sum(math.exp(q) * (q - p) for q, p in zip(log_q, log_p))
    return value, [tau * (math.exp(p) - math.exp(q)) for q, p in zip(log_q, log_p)]


def entropy(z):
    logp = log_softmax(z)
    h = -sum(math.exp(x) * x for x in logp)
    return h, [-math.exp(x) * (x + h) for x in logp]


def agree(loops, model, loss, what):
    """Value and gradient, up to the rounding of fp64."""
    model.zero_grad()
    loss.backward()
    assert abs(loss.item() - loops.loss) < 1e-9 * (1 + abs(loops.loss)), (what, loss.item(), loops.loss)
    for found, want in ((model.place.grad, loops.d_place), (model.token.grad, loops.d_token)):
        found = torch.zeros(len(want), V) if found is None else found
        torch.testing.assert_close(found, torch.tensor(want), rtol=1e-8, atol=1e-10, msg=lambda m: f"{what}: {m}")


def drawn(seed, monkeypatch, block_lens=(0, 0, 4, 3)):
    """-> a generator of choices, one of numbers, the model, its records; every third setting by small chunks."""
    pick, rng = random.Random(seed), np.random.default_rng(seed)
    L = pick.choice([5, 6, 8, 11])
    model = StandIn(rng, L, pick.choice(block_lens), pick.random() < 0.3)
    size = 4 * V * 2 if seed % 3 == 0 else 2**26
    monkeypatch.setattr(nt_model.by_chunks, "__kwdefaults__", {"chunk_bytes": size})
    records = []
    for number in range(pick.choice([1, 2, 3])):
        n = pick.randrange(L + 1)
        x0 = rng.integers(0, EOS, n).tolist() + [EOS] * (L - n)
        rank = rng.permutation(L).tolist()
        at_once = pick.choice([1, 1, 2])
        records.append(dict(
            id=number, x0=x0, rank=rank, order=[r // at_once for r in rank],
            prompt_ids=(ids := rng.integers(0, EOS, pick.randrange(1, 7)).tolist()),
            prompt="".join(chr(ord("a") + i) for i in ids), solution="so" * pick.randrange(4),
            privileged_prompt_ids=rng.integers(0, EOS, pick.randrange(1, 9)).tolist()))
    return pick, rng, model, records


def micro_batches(pick, examples):
    """The batch whole, or in two parts."""
    cut = pick.choice([0, pick.randrange(len(examples))])
    return [part for part in (examples[:cut], examples[cut:]) if part]


def for_training(cfg, *models):
    """Models as a run prepares them: in the blocks of --train_block, if they have blocks."""
    r = SimpleNamespace(cfg=cfg, whole=True, shards=False, device=torch.device("cpu"))
    for model in models:
        made = run.Run.for_training(r, model)
        assert made.cfg.block_len == (model.cfg.block_len and (cfg.train_block or model.cfg.block_len))
        assert made.place is model.place and made.token is model.token
        yield made


def rows_of(b, k):
    """Of example k of a batch: its prompt, xt, x0 and masked."""
    return b["prompts"][k], *(b[key][k].tolist() for key in ("xt", "x0", "masked"))


# ------------------------------------------------------------------------------------------------------- TAD
def tad_loops(loops, teacher, b, states, cfg, window):
    """Eq. 10 to 14 of a micro-batch whose examples are at `states`; a random mask is taken as it came."""
    for k, (record, t) in enumerate(states):
        prompt, xt, x0, masked = rows_of(b, k)
        L, is_random = len(x0), cfg.source in tad.RANDOM
        if not is_random:
            masked = [record["order"][i] >= t for i in range(L)]
            assert xt == [MASK if masked[i] else record["x0"][i] for i in range(L)]
        clean = x0 if loops.cfg.block_len and is_random else None
        near, distant = [], []
        for i in range(L):
            if masked[i]:
                first = next(j for j in range(L) if masked[j])
                in_block = block_of(loops.cfg, prompt, i) == block_of(loops.cfg, prompt, first)
                is_near = is_random or (record["order"][i] < t + window and in_block)
                (near if is_near else distant).append(i)
        for rows, kind, weight in ((near, cfg.near, 1), (distant, cfg.distant, cfg.lam)):
            for i in rows:
                row = loops.row(prompt, xt, clean, i)
                if kind == "ce":
                    term = cross_entropy(row[2], x0[i])
                elif kind == "kl":
                    of_teacher = teacher.row(b["teacher_prompts"][k], xt, clean, i)
                    term = divergence(of_teacher[2], row[2], cfg.tau)
                if kind != "none":
                    loops.add(row, weight / len(rows) / cfg.batch_size, term)


def spelled(text):
    return [(ord(c) - ord("a")) % EOS for c in text]


LETTERS = SimpleNamespace(  # a tokeniser: the system turn and the user's, a token per character
    chat=SimpleNamespace(system="be brief"),
    prompt_ids=lambda asked, system="": torch.tensor(spelled(system) + spelled(asked["prompt"])))


def teacher_prompt(record, cfg, model_cfg):
    if cfg.teacher_prompt == "system":
        ids = spelled("be brief\n\nReference Answer: " + record["solution"]) + record["prompt_ids"]
        while model_cfg.block_len and not model_cfg.whole_blocks and (
                len(ids) % model_cfg.block_len != len(record["prompt_ids"]) % model_cfg.block_len):
            ids = [EOS] + ids
        return ids
    plain = cfg.teacher_prompt == "plain" or (cfg.teacher_prompt == "collection" and cfg.source == "no_privilege")
    return record["prompt_ids" if plain else "privileged_prompt_ids"]


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_tad(monkeypatch, first):
    for seed in range(first, first + 25):
        pick, rng, model, records = drawn(seed, monkeypatch)
        near, distant = pick.choice([(n, d) for n in ("ce", "kl", "none") for d in ("kl", "ce", "none")][:-1])
        source = pick.choice(["full", "no_privilege", "full", *tad.RANDOM]) if near != "none" else "full"
        cfg = tad.Config(near=near, distant=distant, source=source, lam=pick.choice([0, 0.3, 1, 2.5]),
                         tau=pick.choice([0.6, 1, 2]), batch_size=pick.choice([len(records), 5]),
                         teacher_prompt=pick.choice(["collection", "privileged", "plain", "system"]))
        window = pick.choice([1, 2, 3, 20])
        teacher = StandIn(rng, len(records[0]["x0"]), model.cfg.block_len, model.cfg.whole_blocks)
        loops, loss = Loops(model), 0
        for part in micro_batches(pick, [(r, pick.randrange(max(r["order"]) + 1)) for r in records]):
            rngs = [np.random.default_rng([seed, k]) for k in range(len(part))]
            b = tad.make_batch(part, rngs, cfg, window, model.cfg)
            b["teacher_prompts"] = tad.teacher_prompts([r for r, _ in part], cfg, LETTERS, model.cfg)
            assert b["teacher_prompts"] == [teacher_prompt(r, cfg, model.cfg) for r, _ in part]
            tad_loops(loops, Loops(teacher), b, part, cfg, window)
            loss = loss + tad.training_loss(model, teacher, b, cfg)[0]
        agree(loops, model, loss, (seed, cfg))


# ------------------------------------------------------------------------------------------------------- T3D
def legal_state(ranks, size, masked, B, cfg, learned):
    """Is the mask one of the states that the paper, or its code, draws: j tokens of every block revealed?"""
    last = [s - r for r, s in zip(ranks, size)] if cfg.mask_order == "code" else [r - 1 for r in ranks]
    numbers = range(B) if cfg.state_dist == "uniform" else [B - round(B * r) for r in (1, .75, .5, .25)]
    for j in numbers:
        state = [ok and k >= j for k, ok in zip(last, learned)]
        if not any(state):  # shorter than j: what would be revealed last
            most = max(k for k, ok in zip(last, learned) if ok)
            state = [ok and k == most for k, ok in zip(last, learned)]
        if state == masked:
            return True
    return False


def t3d_loops(loops, ref, b, records, cfg):
    """Eq. 5 to 10 of a micro-batch, given which state was drawn and by which number a guess."""
    n_examples, block_len = cfg.batch_size, loops.cfg.block_len
    for k, record in enumerate(records):
        prompt, xt, x0, masked = rows_of(b, k)
        L = len(x0)
        end = x0.index(EOS) if EOS in x0 else L
        learned = [not cfg.eos_in_loss or i < end + cfg.eos_in_loss for i in range(L)]
        blocks = [block_of(loops.cfg, prompt, i) for i in range(L)]
        together = [[j for j in range(L) if blocks[j] == blocks[i]] for i in range(L)]
        ranks = [1 + sum(record["rank"][j] < record["rank"][i] for j in together[i]) for i in range(L)]
        size = list(map(len, together))
        assert legal_state(ranks, size, masked, block_len or L, cfg, learned)
        for i in range(L):
            hidden = xt[i] == MASK or (cfg.rand_p > 0 and xt[i] in (0, 1, 2))
            assert hidden if masked[i] else xt[i] == x0[i]
        clean = x0 if block_len else None
        at = [i for i in range(L) if masked[i]]
        rows = [loops.row(prompt, xt, clean, i) for i in at]

        early = [2 * ranks[i] <= size[i] for i in at]
        groups = 3 * any(early) + (not all(early))
        for row, i, is_early in zip(rows, at, early):  # Eq. 8 and 9, or the code's two groups
            w = (size[i] - ranks[i] + 1) / size[i] / len(at)
            if cfg.path == "code":
                w = (3 / sum(early) if is_early else 1 / (len(at) - sum(early))) / groups
            loops.add(row, cfg.lam * w / n_examples, cross_entropy(row[2], x0[i]))
        if cfg.loss == "naive_td":  # Eq. 5
            for row, i in zip(rows, at):
                loops.add(row, 1 / len(at) / n_examples, cross_entropy(row[2], x0[i]))
            continue

        scale = cfg.beta / (len(at) if cfg.logratio == "mean" else 1)
        ratio = ratio_fake = 0.0
        slopes = []  # of the two log-ratios by the logits
        for row, i in zip(rows, at):
            logp, log_q = (log_softmax(r[2]) for r in (row, ref.row(prompt, xt, clean, i)))
            p, q = ([math.exp(x) for x in log] for log in (logp, log_q))
            ratio += scale * (logp[x0[i]] - log_q[x0[i]])
            q = [0 if v == MASK else q[v] for v in range(V)]
            total = sum(q)
            guess = [q[v] / total for v in range(V)]  # --fake expected: its mean over all draws
            if cfg.fake == "argmax":
                guess = [float(v == max(range(V), key=q.__getitem__)) for v in range(V)]
            elif cfg.fake == "sample":
                u = b["u"][k][i].item()
                x_hat = next(v for v in range(V) if sum(q[:v + 1]) / total > u)
                guess = [float(v == x_hat) for v in range(V)]
            ratio_fake += scale * sum(g * (a - c) for g, a, c in zip(guess, logp, log_q) if g)
            slopes.append(([(v == x0[i]) - p[v] for v in range(V)], [guess[v] - p[v] for v in range(V)]))

        def sigma(x):
            return 1 / (1 + math.exp(-x))
        loops.loss += (-math.log(sigma(ratio)) - cfg.alpha * math.log(1 - sigma(ratio_fake))) / n_examples  # Eq. 7
        for row, (real, fake) in zip(rows, slopes):
            loops.slope(row, -(1 - sigma(ratio)) * scale / n_examples, real)
            loops.slope(row, cfg.alpha * sigma(ratio_fake) * scale / n_examples, fake)


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_t3d(monkeypatch, first):
    for seed in range(1000 + first, 1025 + first):
        pick, rng, model, records = drawn(seed, monkeypatch, (0, 4, 4, 8))
        loss_kind, code = pick.choice(["t3d", "t3d", "t3d", "naive_td"]), pick.random() < 0.2
        choices = {} if code else dict(
            fake=pick.choice(["sample", "argmax", "expected"]), logratio=pick.choice(["mean", "sum"]),
            mask_order=pick.choice(["paper", "code"]), state_dist=pick.choice(["uniform", "code"]),
            path=pick.choice(["paper", "code"]))
        cfg = t3d.check_config(t3d.Config(
            loss=loss_kind, variant="code" if code else "paper", lam=pick.choice([0, 0.2, 1.5]),
            beta=pick.choice([0.1, 1.3]), alpha=pick.choice([0.5, 1]),
            rand_p=pick.choice([0, 0.1, 0.6]), batch_size=pick.choice([len(records), 4]),
            train_block=pick.choice([0, 3, 4, 8]), **choices))
        cfg.eos_in_loss = pick.choice([0, 0, 1, 2]) if model.cfg.block_len else 0  # the command refuses others
        if cfg.eos_in_loss:  # what stands behind the first EOS was never decoded: from left to right
            for r in records:
                n = r["x0"].index(EOS) + 1 if EOS in r["x0"] else len(r["x0"])
                r["rank"] = rng.permutation(n).tolist() + list(range(n, len(r["x0"])))
        frozen = StandIn(rng, len(records[0]["x0"]), model.cfg.block_len, model.cfg.whole_blocks)
        model, frozen = for_training(cfg, model, frozen)
        ref = SimpleNamespace(in_place_of=lambda student, copy=frozen: nullcontext(copy))
        loops, loss = Loops(model), 0
        for part in micro_batches(pick, records):
            rngs = [np.random.default_rng([seed, r["id"]]) for r in part]
            b = t3d.make_batch(part, rngs, cfg, model.cfg, [0, 1, 2])
            t3d_loops(loops, Loops(frozen), b, part, cfg)
            loss = loss + t3d.training_loss(model, ref if loss_kind == "t3d" else None, b, cfg)[0]
        agree(loops, model, loss, (seed, cfg))


@pytest.mark.parametrize("refresh", [1, 2, 3, 5])
def test_t3d_over_steps(monkeypatch, refresh):
    """The reference is the student of the last step that --refresh divides, adapters or all weights."""
    for seed in range(1500 + 10 * refresh, 1505 + 10 * refresh):
        pick, rng, model, records = drawn(seed, monkeypatch, (0, 4))
        cfg = t3d.Config(refresh=refresh, beta=1.3, batch_size=len(records), rand_p=0)
        whole = seed % 2 == 1
        r = SimpleNamespace(whole=whole, load=lambda to_train: StandIn(rng, *model.place.shape[:1], 0, False),
                            for_training=lambda copy, frozen: setattr(copy, "cfg", model.cfg) or copy)
        ref, then = run.Reference(r, model), {}
        for step in range(7):
            if step % cfg.refresh == 0:
                ref.refresh(model)
            then[step] = Loops(model)  # plain numbers
            rngs = [np.random.default_rng([seed, step, record["id"]]) for record in records]
            b = t3d.make_batch(records, rngs, cfg, model.cfg, [0, 1, 2])
            loops = Loops(model)
            t3d_loops(loops, then[max(s for s in then if s % refresh == 0)], b, records, cfg)
            agree(loops, model, t3d.training_loss(model, ref, b, cfg)[0], (seed, step))
            with torch.no_grad():
                for p in (model.place, model.token):
                    p -= 0.3 * p.grad


# ----------------------------------------------------------------------------------------------------- TABOM
def legal_segments(record, cfg, model_cfg):
    """Every list of positions that a segment may be, in the order of their reveal."""
    L, prompt = len(record["x0"]), record["prompt_ids"]
    end = record["x0"].index(EOS) + 1 if EOS in record["x0"] else L  # the first EOS is content
    n = L if cfg.eos_in_window else end
    order = sorted(range(n), key=lambda i: record["rank"][i])
    blocks = bool(model_cfg.block_len)
    if cfg.segment == "two_steps":
        found = [order[a:b] for a in range(n) for b in range(a + 1, n + 1)]
    else:
        W = min(cfg.window or n, n)
        last = n - W if cfg.window and not blocks else n - 1
        found = [order[a:a + W] for a in range(last + 1)]
    if blocks:
        found = [[i for i in s if block_of(model_cfg, prompt, i) == block_of(model_cfg, prompt, s[0])] for s in found]
    return found


def tabom_loops(loops, b, records, cfg):
    """Eq. 8 and 9 of a micro-batch, given which segments were drawn."""
    for k, record in enumerate(records):
        segment = [i for i in b["segment"][k].tolist() if i >= 0]
        assert segment in legal_segments(record, cfg, loops.cfg)
        rank, x0, prompt = record["rank"], record["x0"], record["prompt_ids"]

        def before(i):  # the state in which i was revealed
            return [x if rank[j] < rank[i] else MASK for j, x in enumerate(x0)]
        rows = [loops.row(prompt, before(segment[0]), None, i) for i in segment]
        for row, i in zip(rows, segment):
            loops.add(row, 1 / len(segment) / cfg.batch_size, cross_entropy(row[2], x0[i]))
        if cfg.entropy_at == "own_step":  # Eq. 5
            rows = [loops.row(prompt, before(i), None, i) for i in segment]
        h = [entropy(row[2]) for row in rows]
        pairs = [(r, s) for s in range(len(segment)) for r in range(s)]
        for r, s in pairs:
            hinge, weight = h[r][0] - h[s][0] + cfg.gamma, cfg.lam / len(pairs) / cfg.batch_size
            if hinge > 0:
                loops.loss += weight * hinge
                loops.slope(rows[r], weight, h[r][1])
                loops.slope(rows[s], -weight, h[s][1])


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_tabom(monkeypatch, first):
    for seed in range(2000 + first, 2020 + first):
        pick, rng, model, records = drawn(seed, monkeypatch)
        cfg = tabom.Config(
            window=pick.choice([0, 2, 3, 32]), segment=pick.choice(["window", "window", "two_steps"]),
            lam=pick.choice([0, 1, 2.5]), gamma=pick.choice([0, 0.1, 0.3]),
            entropy_at=pick.choice(["segment", "own_step"]), eos_in_window=pick.random() < 0.5,
            batch_size=pick.choice([len(records), 4]))
        loops, loss = Loops(model), 0
        for part in micro_batches(pick, records):
            rngs = [np.random.default_rng([seed, r["id"]]) for r in part]
            b = tabom.make_batch(part, rngs, cfg, model.cfg)
            tabom_loops(loops, b, part, cfg)
            loss = loss + tabom.training_loss(model, b, cfg)[0]
        agree(loops, model, loss, (seed, cfg))


# ----------------------------------------------------------------------------------------------------- TRIMS
def drawn_mask(example, cfg, rng):
    """-> masked and the loss weight of each position, from the same draws: t, then the positions."""
    L = len(example["x0"])
    if "bucket" in example and rng.random() < cfg.trajectory_share:
        k = rng.integers(cfg.n_buckets)
        p = [cfg.p_context if bucket <= k else cfg.p_future for bucket in example["bucket"]]
        masked = [u < chance for u, chance in zip(rng.random(L), p)]
        return masked, [1 / max(1, sum(masked)) if cfg.trajectory_weight == "mean" else 1 / L] * L
    t = cfg.t_min + (1 - cfg.t_min) * rng.random()
    return [u < t for u in rng.random(L)], [1 / t / L] * L


def equal_mass(scores, found, cfg):
    """Buckets of equal mass in the order of the scores; what has no score is with the easiest."""
    known = [(s, b) for row, of_row in zip(scores, found) for s, b in zip(row, of_row) if not math.isnan(s)]
    filling = {b for row, of_row in zip(scores, found) for s, b in zip(row, of_row) if math.isnan(s)}
    assert filling <= {1 if cfg.ordering == "ascending" else cfg.n_buckets}
    sizes = [sum(b == k for _, b in known) for k in range(1, cfg.n_buckets + 1)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == len(known)
    sign = {"descending": 1, "ascending": -1, "random": 0}[cfg.ordering]
    assert all(sign * s >= sign * other for s, b in known for other, c in known if b < c)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_trims(monkeypatch, first):
    for seed in range(3000 + first, 3020 + first):
        pick, rng, model, records = drawn(seed, monkeypatch, (0, 0, 4))
        cfg = trims.Config(
            trajectory_share=pick.choice([0, 0.5, 1]),
            n_buckets=pick.choice([2, 4, 8]), ordering=pick.choice(["descending", "ascending", "random"]),
            p_context=pick.choice([0, 0.05]), p_future=pick.choice([0.95, 1]),
            trajectory_weight=pick.choice(["mean", "none"]), t_min=pick.choice([0.001, 0.3]),
            train_block=pick.choice([0, 0, 3, 8]),
            batch_size=pick.choice([len(records), 4]))
        scores = [[math.nan if x == EOS and record["x0"].index(EOS) < i else round(rng.exponential(), 1)
                   for i, x in enumerate(record["x0"])] for record in records]
        for record, of_record in zip(records, found := trims.buckets(scores, cfg.n_buckets, cfg.ordering, seed)):
            if cfg.trajectory_share:
                record["bucket"] = of_record
        equal_mass(scores, found, cfg)
        model, = for_training(cfg, model)
        loops, loss = Loops(model), 0
        for part in micro_batches(pick, records):
            rngs, same = ([np.random.default_rng([seed, r["id"]]) for r in part] for _ in range(2))
            b = trims.make_batch(part, rngs, cfg, model.cfg)
            for k, record in enumerate(part):
                prompt, xt, x0, masked = rows_of(b, k)
                want, weight = drawn_mask(record, cfg, same[k])
                assert masked == want and xt == [MASK if m else x for m, x in zip(want, record["x0"])]
                for i in range(len(x0)):
                    if masked[i] and weight[i]:
                        row = loops.row(prompt, xt, x0 if model.cfg.block_len else None, i)
                        loops.add(row, weight[i] / cfg.batch_size, cross_entropy(row[2], x0[i]))
            loss = loss + trims.training_loss(model, b, cfg)[0]
        agree(loops, model, loss, (seed, cfg))
