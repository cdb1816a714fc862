"""Decoding: a short reference that reads like the papers, and the batched, block-cached decoder
everything runs on.

    outs = generate(model, prompts, gen_len=48, block_len=16, policy="threshold", threshold=0.9, cache="dual")
    python sample.py --model tiny --prompt "..." --show

A response of L tokens starts as L masks and is filled block by block. Every forward scores the masked
positions of the current block and the policy decides which of them to reveal:

    static      the `per_step` best, or the block in `steps` forwards   (LLaDA's sampler; 1 = token by token)
    threshold   the best, and all with confidence >= threshold (Fast-dLLM)
    factor      the n best, n the largest with c_n >= 1 - factor / (n + 1)  (Fast-dLLM)
    entropy     all with entropy < threshold nats, else the lowest          (d3LLM, TAD)
    dream       no blocks: `steps` forwards, each the share 1 - s/t of the masks (Dream's sampler)

The caches are Fast-dLLM's, dInfer's (vicinity) and SDAR's (exact). The first forward of a block runs over the
whole canvas and refreshes all keys and values (it counts as a forward, and it also reveals). The following
forwards recompute

    none        the whole canvas: exact, the oracle
    prefix      from the block's start to the end of the canvas; everything before is stale
    dual        the block only; everything before and after is stale
    vicinity    the block and `vicinity` tokens on either side
    exact       (block-causal models) the block only: nothing before depends on it. A finished block's keys
                are committed by the next block's first forward, which also runs over that block; `commits`
                counts the forwards that a decoder without this fusion spends on top of nfe

`order` is the index of the forward that revealed a position, `rank` breaks ties by predictive entropy (lowest
first), `nfe` counts the forwards spent on a row, refreshes included.
"""
import argparse
import os
from collections import deque
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import torch
from tqdm import tqdm

from model import (KVCache, UserError, attention_mask, default_device, family_of, load, rope_angles,
                   run_cli)


@dataclass(frozen=True)
class Decoding:
    gen_len: int = 256      # response length L, tokens
    block_len: int = 32     # block size K, tokens
    # what a forward reveals
    policy: Literal["static", "threshold", "factor", "entropy", "dream"] = "threshold"
    threshold: float = 0.9  # confidence (threshold), f (factor) or nats (entropy)
    per_step: int = 1       # positions per forward of the static policy
    steps: int = 0          # static: forwards per block, instead of per_step; dream: in all (0: gen_len)
    eps: float = 1e-3       # dream: the last time
    cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "dual"  # what a forward recomputes
    vicinity: int = 16      # tokens on either side of the block that the vicinity cache recomputes
    score: Literal["confidence", "entropy", "margin"] = "confidence"  # how static and dream rank positions
    temperature: float = 0.0  # of the token choice; 0 = greedy. Confidence is always taken at temperature 1
    top_p: float = 1.0      # nucleus of the token choice
    seed: int = 0           # of the token choice; prompt i draws from its own stream (seed, i)
    early_stop: bool = True  # end a row once everything before its first EOS is revealed

    def __post_init__(self):
        for name, hint in get_type_hints(Decoding).items():
            if get_args(hint) and getattr(self, name) not in get_args(hint):
                raise UserError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(get_args(hint))}")
        for name, least in (("gen_len", 1), ("block_len", 1), ("per_step", 1), ("steps", 0), ("vicinity", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.policy == "dream":  # one block
            object.__setattr__(self, "block_len", self.gen_len)


@dataclass
class Output:
    ids: torch.Tensor    # (L,) int64
    order: torch.Tensor  # (L,) int64, 0-based forward that revealed the position
    rank: torch.Tensor   # (L,) int64, a permutation: order with ties broken by entropy
    conf: torch.Tensor   # (L,) fp32, probability of the token when it was revealed (1 for a filled EOS tail)
    nfe: int             # forwards spent on this row
    commits: int = 0     # exact cache: the prefill and commits that were fused into them

    def n_tokens(self, eos_ids):
        """Tokens before the first EOS: what TPF and tok/s count."""
        is_eos = torch.isin(self.ids, torch.tensor(eos_ids))
        return int(is_eos.int().argmax()) if is_eos.any() else len(self.ids)


# --------------------------------------------------------------------------------------- one forward's choice
def pick_tokens(logits, cfg, s, noise=None):
    """logits (..., V) -> token, confidence, entropy in nats, score; all (...). The mask id is never picked.

    noise (..., V) uniform in (0, 1) drives sampling at temperature > 0 (Gumbel argmax).
    """
    logits = logits.float()
    logp = logits - logits.logsumexp(-1, keepdim=True)
    entropy = -(logp.exp() * logp).sum(-1)
    choice = logits.clone()
    choice[..., cfg.mask_id] = -torch.inf
    if s.temperature > 0:
        choice = nucleus(choice / s.temperature, s.top_p) - (-noise.log()).log()
    token = choice.argmax(-1)
    conf = logp.gather(-1, token[..., None])[..., 0].exp()
    if s.score == "margin":
        top2 = logp.topk(2, -1).values.exp()
        score = top2[..., 0] - top2[..., 1]
    else:
        score = -entropy if s.score == "entropy" else conf
    return token, conf, entropy, score


def nucleus(logits, top_p):
    """Keep the smallest set of tokens whose probability reaches top_p (the best one always stays)."""
    if top_p >= 1:
        return logits
    sorted_logits, index = logits.sort(dim=-1, descending=True, stable=True)
    p = sorted_logits.softmax(-1)
    outside = p.cumsum(-1) - p >= top_p
    return logits.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf)


def quota(s, n_masked, n_block, i):
    """How many positions the static and dream policies reveal in forward i of a block: (B,) int64.
    n_masked: masks in the block now; n_block: when it began. All (B,) int64.
    """
    if s.policy == "dream":  # in fp32, as the published code rounds
        steps = s.steps or s.gen_len
        t = torch.linspace(1, s.eps, steps + 1, device=i.device)
        i = i.clamp(max=steps - 1)
        return torch.where(i == steps - 1, n_masked, (n_masked * (1 - t[i + 1] / t[i])).long())
    if s.steps:  # LLaDA: equal shares, the first forwards take the remainder
        return n_block // s.steps + (i < n_block % s.steps)
    return torch.full_like(n_masked, s.per_step)


def pick_positions(conf, entropy, score, masked, s, n=None):
    """Which masked positions to reveal: (B, K) bool. n (B,): the quota of static and dream [per_step].
    Other policies reveal at least one per row that has any; ties go left to right.
    """
    if s.policy == "entropy":
        score = -entropy
    elif s.policy in ("threshold", "factor"):
        score = conf
    place = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    if s.policy in ("static", "dream"):
        keep = place < (s.per_step if n is None else n[:, None])
    elif s.policy == "threshold":
        keep = (conf >= s.threshold) | (place == 0)
    elif s.policy == "entropy":
        keep = (entropy < s.threshold) | (place == 0)
    else:  # the n-th best (n = place + 1) passes if c_n >= 1 - f / (n + 1); n is the largest that passes
        passes = masked & (conf >= 1 - s.threshold / (place + 2))
        n, n_masked = torch.where(passes, place + 1, 1).amax(-1, keepdim=True), masked.sum(-1, keepdim=True)
        # the published code never leaves a single one
        keep = place < torch.where(n == n_masked - 1, n_masked, n)
    return keep & masked


# ---------------------------------------------------------------------------------------------- the reference
@torch.no_grad()
def reference(model, prompt, **settings):
    """Decode one prompt (P,) int64 with plain code and no cache: the oracle for `generate`.
    Returns an Output.

    The staleness of a cache is reproduced by running the canvas of the last refresh beside the present one.
    """
    s, cfg, P = Decoding(**settings), model.cfg, len(prompt)
    L, total = s.gen_len, P + s.gen_len
    x = torch.cat([prompt, torch.full((L,), cfg.mask_id)])
    masked = torch.arange(total) >= P
    order, rank, conf_at = torch.zeros(total).long(), torch.zeros(total).long(), torch.ones(total)
    gen, nfe, stop = row_generator(s.seed, 0), 0, False
    first = P - P % s.block_len if cfg.block_len else P  # block-causal blocks count from absolute position 0
    commits = int(s.cache == "exact" and first > 0)
    for lo in range(first, total, s.block_len):
        hi, refreshed, began = min(lo + s.block_len, total), None, nfe
        n_block = masked[lo:hi].sum()
        commits += int(s.cache == "exact" and not stop)
        while masked[lo:hi].any() and not stop:
            if s.cache in ("none", "exact") or refreshed is None:
                refreshed = x.clone()
                h = model.hidden(x[None])[0, lo:hi]
            else:
                left = min(lo, reach(s, cfg))
                end = {"dual": hi, "prefix": total, "vicinity": min(hi + s.vicinity, total)}[s.cache]
                h = stale_hidden(model, refreshed, x, lo - left, end)[left:][: hi - lo]
            noise = (torch.rand(s.block_len, cfg.vocab_size, generator=gen)[: hi - lo]
                     if s.temperature > 0 else None)
            token, conf, entropy, score = pick_tokens(model.head(h), cfg, s, noise)
            n = quota(s, masked[lo:hi].sum()[None], n_block[None], torch.tensor([nfe - began]))
            reveal = pick_positions(conf[None], entropy[None], score[None], masked[None, lo:hi], s, n)[0]
            n_known = int((~masked[P:]).sum())
            by_entropy = sorted(reveal.nonzero()[:, 0].tolist(), key=lambda i: (float(entropy[i]), i))
            for n, i in enumerate(by_entropy):
                x[lo + i], conf_at[lo + i], masked[lo + i] = token[i], conf[i], False
                order[lo + i], rank[lo + i] = nfe, n_known + n
            nfe += 1
            stop = s.early_stop and fill_after_eos(x[P:], masked[P:], order[P:], rank[P:],
                                                   cfg.eos_ids, nfe - 1)
    return Output(x[P:], order[P:], rank[P:], conf_at[P:], nfe, commits)


def reach(s, cfg):
    """How many columns left of the block a window takes along: the vicinity, and the left neighbour whose
    hidden state a shifted model needs.
    """
    return max(s.vicinity if s.cache == "vicinity" else 0, 1 if cfg.shift else 0)


def fill_after_eos(ids, masked, order, rank, eos_ids, now):
    """If everything before the first EOS is revealed, the masked rest becomes EOS at forward `now`.
    In place, (L,).
    """
    hit = [i for i in range(len(ids)) if not masked[i] and int(ids[i]) in eos_ids]
    if not hit or masked[: hit[0]].any():
        return False
    n_known = int((~masked).sum())
    for n, i in enumerate(masked.nonzero()[:, 0].tolist()):
        ids[i], order[i], rank[i], masked[i] = eos_ids[0], now, n_known + n, False
    return True


def stale_hidden(model, old, new, lo, hi):
    """Hidden rows [lo, hi) of canvas `new` (T,)
    when all keys and values outside come from canvas `old` (T,).
    """
    cfg, pos = model.cfg, torch.arange(len(new))[None]
    valid = torch.ones_like(pos, dtype=torch.bool)
    mask = attention_mask(cfg, pos, pos, pos, pos, valid)
    cos, sin = rope_angles(cfg, pos)
    h_old, h = model.embed(old[None]), model.embed(new[None, lo:hi])
    for block in model.blocks:
        _, k_old, v_old = block.qkv(h_old, cos, sin)
        q, k, v = block.qkv(h, cos[:, :, lo:hi], sin[:, :, lo:hi])
        k = torch.cat([k_old[:, :, :lo], k, k_old[:, :, hi:]], 2)
        v = torch.cat([v_old[:, :, :lo], v, v_old[:, :, hi:]], 2)
        h, h_old = block.mix(h, q, k, v, mask[:, lo:hi]), block(h_old, cos, sin, mask)
    h = model.norm(h)[0]
    return torch.cat([h[:1], h[:-1]]) if cfg.shift else h


# ---------------------------------------------------------------------------------------- the batched decoder
def generate(model, prompts, batch_size=32, progress=False, **settings):
    """Decode prompts (list of 1-D int64 tensors of any lengths) -> list of Output, in order.
    See Decoding, stream.
    """
    outs = [None] * len(prompts)
    for i, out in stream(model, prompts, batch_size, progress, **settings):
        outs[i] = out
    return outs


@torch.no_grad()
def stream(model, prompts, batch_size=32, progress=False, **settings):
    """Like generate, but yields (prompt index, Output) as rows finish; waiting prompts take their places.

    Every row of the batch stands at its own block and moves at its own pace. Greedy fp32 decoding gives each
    prompt what it gets alone. Raises UserError for a prompt that does not fit the model.
    """
    s = Decoding(**settings)
    check_prompts(model.cfg, prompts, s)
    waiting, batch = deque(range(len(prompts))), None
    bar = tqdm(total=len(prompts), unit="sample", desc="decode", disable=not progress, smoothing=0)
    n_tokens = n_forwards = 0
    if waiting:
        batch = Batch(model, prompts, s, min(batch_size, len(prompts)))
    while batch is not None:
        for row in batch.finished():
            if batch.owner[row] is not None:
                out = batch.output(row)
                n_tokens, n_forwards = n_tokens + out.n_tokens(model.cfg.eos_ids), n_forwards + out.nfe
                bar.update()
                bar.set_postfix_str(f"TPF {n_tokens / max(1, n_forwards):.2f}", refresh=False)
                yield batch.owner[row], out
            batch.admit(row, waiting.popleft() if waiting else None)
        if all(owner is None for owner in batch.owner):
            break
        batch.step()
    bar.close()


def check_prompts(cfg, prompts, s):
    if s.cache == "exact" and not cfg.block_len:
        raise UserError(f"cache 'exact' is for block-causal models (SDAR): a {cfg.family} model attends to "
                        f"later blocks; choose none, prefix, dual or vicinity")
    if cfg.block_len and s.block_len % cfg.block_len:
        raise UserError(f"block_len {s.block_len} must be a multiple of the model's own block "
                        f"of {cfg.block_len}")
    for i, p in enumerate(prompts):
        if p.ndim != 1:
            raise UserError(f"prompt {i} has shape {tuple(p.shape)}: "
                            f"each prompt is a 1-D tensor of token ids")
        if len(p) + s.gen_len > cfg.max_len:
            raise UserError(f"prompt {i} has {len(p)} tokens; with gen_len {s.gen_len} that exceeds "
                            f"the model's {cfg.max_len}: shorten the prompt or gen_len")
        if len(p) and not 0 <= int(p.min()) <= int(p.max()) < cfg.vocab_size:
            raise UserError(f"prompt {i} holds token ids outside 0..{cfg.vocab_size - 1}: wrong tokeniser?")


def row_generator(seed, index):
    """The random stream of prompt `index`: the same alone and in any batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


class Batch:
    """S rows being decoded.
    Columns: [padding, prompt | response | one scratch column that nothing ever reads].
    """

    def __init__(self, model, prompts, s, n_rows):
        self.model, self.cfg, self.prompts, self.s = model, model.cfg, prompts, s
        self.dev, self.L = model.embed.weight.device, s.gen_len
        self.left = reach(s, self.cfg)
        self.P = max(len(p) for p in prompts) + self.left
        shape, dev = (n_rows, self.P + self.L + 1), self.dev
        self.canvas = torch.full(shape, self.cfg.pad_id, device=dev)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=dev)
        self.valid = torch.zeros(shape, dtype=torch.bool, device=dev)
        self.positions = torch.zeros(shape, dtype=torch.long, device=dev)
        self.order, self.rank = (torch.zeros(shape, dtype=torch.long, device=dev) for _ in range(2))
        self.conf = torch.ones(shape, device=dev)
        self.start = torch.zeros(n_rows, dtype=torch.long, device=dev)  # first column of the row's block
        self.nfe = torch.zeros(n_rows, dtype=torch.long, device=dev)
        # forwards in this block so far, its masks when it began, and how many blocks were entered
        self.tries, self.n_block, self.blocks = (torch.zeros_like(self.start) for _ in range(3))
        # keys and values outside the window are as the cache wants them
        self.fresh = torch.zeros(n_rows, dtype=torch.bool, device=dev)
        self.owner, self.gens, self.forwards = [None] * n_rows, [None] * n_rows, 0
        self.eos = torch.tensor(self.cfg.eos_ids, device=dev)
        self.cache = None
        if s.cache != "none":
            self.cache = KVCache(self.cfg, self.valid, self.positions, model.embed.weight.dtype)

    def admit(self, row, index):
        """Put prompt `index` (None: nothing) into a row."""
        self.owner[row] = index
        self.masked[row] = False
        if index is None:
            return
        prompt, P = self.prompts[index].to(self.dev), self.P
        cols = torch.arange(self.canvas.shape[1], device=self.dev)
        first = P - len(prompt)
        self.canvas[row] = self.cfg.pad_id
        self.canvas[row, first:P], self.canvas[row, P:P + self.L] = prompt, self.cfg.mask_id
        self.masked[row] = (cols >= P) & (cols < P + self.L)
        self.valid[row] = (cols >= first) & (cols < P + self.L)
        self.positions[row] = (cols - first).clamp(min=0)
        self.order[row], self.rank[row], self.conf[row], self.nfe[row] = 0, 0, 1.0, 0
        # block-causal blocks count from the row's first real token, so the first one may hold prompt tokens
        self.start[row] = P - (len(prompt) % self.s.block_len if self.cfg.block_len else 0)
        self.fresh[row], self.gens[row] = False, row_generator(self.s.seed, index)
        self.tries[row] = self.blocks[row] = 0

    def finished(self):
        """Rows with nothing left to reveal (empty rows too)."""
        return (~self.masked.any(1)).nonzero()[:, 0].tolist()

    def output(self, row):
        span = slice(self.P, self.P + self.L)
        parts = (t[row, span].cpu().clone() for t in (self.canvas, self.order, self.rank, self.conf))
        prompt = self.prompts[self.owner[row]]
        commits = int(self.blocks[row]) + (len(prompt) >= self.s.block_len) if self.s.cache == "exact" else 0
        return Output(*parts, int(self.nfe[row]), commits)

    def step(self):
        """One forward for every live row: over the whole canvas where keys must be refreshed, else over a
        window; under the exact cache, over the last block and the new one where a block begins.
        """
        live, began = self.masked.any(1), self.tries == 0
        if self.s.cache == "exact":
            groups = dict(full=~self.fresh, commit=self.fresh & began, window=self.fresh & ~began)
        else:
            stale = ~self.fresh if self.cache is not None else torch.ones_like(live)
            groups = dict(full=stale, window=~stale)
        for kind, group in groups.items():
            rows = (group & live).nonzero()[:, 0]
            if len(rows):
                self.reveal(rows, self.hidden(rows, kind))
                self.forwards += 1

    def window(self, rows, width, left=0):
        """Columns (N, left + width): from `left` before each row's block start;
        whatever runs past the end lands on the scratch column.
        """
        cols = self.start[rows, None] + torch.arange(-left, width, device=self.dev)
        return cols.clamp(max=self.canvas.shape[1] - 1)

    def hidden(self, rows, kind):
        """Hidden states (N, K, C) of the rows' blocks."""
        K, canvas, cache = self.s.block_len, self.canvas[rows], self.s.cache
        if kind == "full":
            if self.cache is None:
                h = self.model.hidden(canvas, valid=self.valid[rows], positions=self.positions[rows])
            else:
                cols = torch.arange(canvas.shape[1], device=self.dev).expand(canvas.shape)
                h = self.model.hidden(canvas, cache=self.cache.select(rows), cols=cols)
                self.fresh[rows] = True
            block = self.window(rows, K)
            return h.gather(1, block[..., None].expand(-1, -1, h.shape[-1]))
        left = self.left + (K if kind == "commit" else 0)
        width = {"prefix": max(K, self.P + self.L - int(self.start[rows].min())),
                 "vicinity": K + self.s.vicinity}.get(cache, K)
        cols = self.window(rows, width, left)
        h = self.model.hidden(canvas.gather(1, cols), cache=self.cache.select(rows), cols=cols)
        return h[:, left:left + K]

    def noise(self, rows):
        if self.s.temperature == 0:
            return None
        shape = (self.s.block_len, self.cfg.vocab_size)
        return torch.stack([torch.rand(shape, generator=self.gens[r]) for r in rows.tolist()]).to(self.dev)

    def reveal(self, rows, h):
        """Score the rows' blocks, write the chosen tokens, then stop or advance rows that are done."""
        cols = self.window(rows, self.s.block_len)
        masked = self.masked[rows[:, None], cols]
        token, conf, entropy, score = pick_tokens(self.model.head(h), self.cfg, self.s, self.noise(rows))
        began = self.tries[rows] == 0
        self.n_block[rows] = torch.where(began, masked.sum(1), self.n_block[rows])
        self.blocks[rows] += began
        n = quota(self.s, masked.sum(1), self.n_block[rows], self.tries[rows])
        reveal = pick_positions(conf, entropy, score, masked, self.s, n)
        span = slice(self.P, self.P + self.L)
        n_known = self.L - self.masked[rows, span].sum(1)
        # 0, 1, ... within a forward
        tie = entropy.masked_fill(~reveal, torch.inf).argsort(dim=1, stable=True).argsort(1)
        r, k = reveal.nonzero(as_tuple=True)
        where = rows[r], cols[r, k]
        self.canvas[where], self.conf[where] = token[r, k], conf[r, k]
        self.order[where], self.rank[where] = self.nfe[rows[r]], n_known[r] + tie[r, k]
        self.masked[where] = False
        if self.s.early_stop:
            self.stop_at_eos(rows)
        self.nfe[rows] += 1
        self.tries[rows] += 1
        self.advance(rows)

    def stop_at_eos(self, rows):
        """Everything before the first EOS revealed:
        the masked rest becomes EOS at this forward, ranked left to right.
        """
        span = slice(self.P, self.P + self.L)
        masked = self.masked[rows, span]
        is_eos = torch.isin(self.canvas[rows, span], self.eos) & ~masked
        first_eos = torch.where(is_eos.any(1), is_eos.int().argmax(1), self.L)
        first_masked = torch.where(masked.any(1), masked.int().argmax(1), self.L)
        fill = masked & (first_eos < first_masked)[:, None]
        n_known = self.L - masked.sum(1, keepdim=True)
        r, k = fill.nonzero(as_tuple=True)
        where = rows[r], k + self.P
        self.canvas[where], self.order[where] = self.eos[0], self.nfe[rows[r]]
        self.rank[where] = (n_known + fill.long().cumsum(1) - 1)[r, k]
        self.masked[where] = False

    def advance(self, rows):
        """Rows whose block is full move on; their keys and values are refreshed by the next forward."""
        full = ~self.masked[rows[:, None], self.window(rows, self.s.block_len)].any(1)
        self.start[rows] += full * self.s.block_len
        self.tries[rows] *= ~full
        if self.s.cache != "exact":
            self.fresh[rows] &= ~full


# --------------------------------------------------------------------------------------------------- terminal
def show(out, tokens, by="confidence"):
    """The decoding as text, one line per forward:
    masks as dots, tokens coloured by confidence or reveal step.
    """
    color = "NO_COLOR" not in os.environ
    palette = [196, 202, 208, 214, 220, 190, 154, 118, 82, 46]  # red ... green
    lines = []
    for t in range(out.nfe):
        words = []
        for i, word in enumerate(tokens):
            if out.order[i] > t:
                words.append("·" * max(1, len(word)))
            elif not color:
                words.append(word.upper() if out.order[i] == t else word)
            else:
                level = (float(out.conf[i]) if by == "confidence"
                         else 1 - int(out.order[i]) / max(1, out.nfe - 1))
                bold = "1;" if out.order[i] == t else ""
                words.append(f"\033[{bold}38;5;{palette[min(9, int(level * 10))]}m{word}\033[0m")
        lines.append(f"{t + 1:3d} | " + " ".join(words))
    return "\n".join(lines)


def main():
    import data
    import lora
    ap = argparse.ArgumentParser(description="Decode one prompt.")
    ap.add_argument("--model", default="tiny", help="preset name, hub id or directory [tiny]")
    ap.add_argument("--revision", help="commit, branch or tag of a hub id")
    ap.add_argument("--adapter", help="directory of a trained LoRA adapter to decode with")
    ap.add_argument("--prompt", help="user turn; default: a problem of the tiny task's test split")
    ap.add_argument("--show", nargs="?", const="confidence", choices=["confidence", "step"],
                    help="draw every forward, coloured by confidence or by reveal step")
    for f in fields(Decoding):
        kw = dict(default=argparse.SUPPRESS, help=f"[{f.default}]")
        if isinstance(f.default, bool):
            ap.add_argument("--" + f.name, action=argparse.BooleanOptionalAction, **kw)
        else:
            choices = get_args(get_type_hints(Decoding)[f.name]) or None
            ap.add_argument("--" + f.name, type=type(f.default), choices=choices, **kw)
    args = ap.parse_args()
    family = family_of(args.model, args.revision)
    family_defaults = {"tiny": data.TINY_DECODING, "sdar": dict(block_len=4, cache="exact")}.get(family, {})
    given = {f.name: getattr(args, f.name) for f in fields(Decoding) if hasattr(args, f.name)}
    settings = {**family_defaults, **given}
    model = load(args.model, *default_device(), args.revision)
    tok = data.load_tokenizer(args.model, args.revision)
    if args.adapter:
        lora.load(model, args.adapter)
    prompt = args.prompt or data.load_problems("tiny", "test", 1)[0]["prompt"]
    out = generate(model, [tok.prompt_ids(prompt)], **settings)[0]
    n = out.n_tokens(model.cfg.eos_ids)
    print(f"prompt   {prompt}")
    if args.show:
        words = [tok.decode([i]).strip() or "∅" for i in out.ids.tolist()]
        print(show(out, words, args.show))
    print(f"response {tok.decode(out.ids[:n].tolist())}")
    print(f"{n} tokens in {out.nfe} forwards: {n / out.nfe:.2f} tokens per forward")


if __name__ == "__main__":
    run_cli(main)
