"""Decoding: a short reference that reads like the papers, and the batched, block-cached decoder
everything runs on.

    outs = generate(model, prompts, gen_len=48, block_len=16, policy="threshold", threshold=0.9, cache="dual")
    python sample.py --model tiny --prompt "..." --show           # or --picture order.png
    python sample.py --model tiny --prompts questions.jsonl       # or --interactive

A response of L tokens starts as L masks and is filled block by block. Every forward scores the masked
positions of the current block and the policy decides which of them to reveal:

    static      the `per_step` best, or the block in `steps` forwards   (LLaDA's sampler; 1 = token by token)
    threshold   the best, and all with confidence >= threshold (Fast-dLLM)
    factor      the n best, n the largest with c_n >= 1 - factor / (n + 1)  (Fast-dLLM)
    entropy     all with entropy < threshold nats, else the lowest          (d3LLM, TAD)
    dream       no blocks: `steps` forwards, each the share 1 - s/t of the masks (Dream's sampler)
    multiblock  several blocks at once, each by entropy < threshold (D2F, d3LLM, TAD): a block joins when the
                last one is `block_add` revealed, and gets at least one token per forward when it is the first
                unfinished one whose predecessor is `decoded` revealed

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
import json
import os
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (KVCache, UserError, attention_mask, default_device, family_of, load, n_content,
                   rope_angles, run_cli)


@dataclass(frozen=True)
class Decoding:
    gen_len: int = 256      # response length L, tokens
    block_len: int = 32     # block size K, tokens
    # what a forward reveals
    policy: Literal["static", "threshold", "factor", "entropy", "dream", "multiblock"] = "threshold"
    threshold: float = 0.9  # confidence (threshold), f (factor) or nats (entropy, multiblock)
    per_step: int = 1       # positions per forward of the static policy
    steps: int = 0          # static: forwards per block, instead of per_step; dream: in all (0: gen_len)
    eps: float = 1e-3       # dream: the last time
    block_add: float = 0.1  # multiblock: revealed share of the last block at which the next one joins
    decoded: float = 0.95   # multiblock: revealed share of its predecessor at which a block must progress
    cache_delay: int = 0    # multiblock, prefix cache: forwards between a block's end and its being cached
    refresh: int = 0        # multiblock, prefix cache: forwards between refreshes (0: when a block is cached)
    cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "dual"  # what a forward recomputes
    vicinity: int = 16      # tokens on either side of the block that the vicinity cache recomputes
    score: Literal["confidence", "entropy", "margin"] = "confidence"  # how static and dream rank positions
    temperature: float = 0.0  # of the token choice; 0 = greedy. Confidence is always taken at temperature 1
    top_p: float = 1.0      # nucleus of the token choice
    top_k: int = 0          # the token choice is among the k best (0: all)
    seed: int = 0           # of the token choice; prompt i draws from its own stream (seed, i)
    early_stop: bool = True  # end a row once everything before its first EOS is revealed

    def __post_init__(self):
        for name, hint in get_type_hints(Decoding).items():
            if get_args(hint) and getattr(self, name) not in get_args(hint):
                raise UserError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(get_args(hint))}")
        for name, least in (("gen_len", 1), ("block_len", 1), ("per_step", 1), ("steps", 0), ("vicinity", 0),
                            ("top_k", 0), ("block_add", 0), ("decoded", 0), ("cache_delay", 0),
                            ("refresh", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not (0 < self.top_p <= 1 and 0 <= self.temperature < float("inf") and 0 < self.eps < 1):
            raise UserError(f"top_p {self.top_p}, temperature {self.temperature}, eps {self.eps}: top_p must "
                            f"be in (0, 1], temperature finite and not negative, eps in (0, 1)")
        if self.policy == "dream":  # one block
            object.__setattr__(self, "block_len", self.gen_len)
        if self.policy == "multiblock" and self.cache not in ("none", "prefix"):
            raise UserError(f"cache {self.cache!r} with policy multiblock: choose none or prefix")

    @property
    def width(self):
        """Positions that a forward may reveal, from the start of the first unfinished block."""
        return self.gen_len if self.policy == "multiblock" else self.block_len


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
        return n_content(self.ids, eos_ids)


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
        choice = nucleus(choice / s.temperature, s.top_p)
        if 0 < s.top_k < choice.shape[-1]:
            kth = choice.topk(s.top_k, -1).values[..., -1:]
            choice = choice.masked_fill(choice < kth, -torch.inf)
        choice = choice - (-noise.log()).log()
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


def blocks_left(masked, s):
    """masked (B, L) bool -> masks left per block (B, n_blocks) fp32, and the blocks' sizes."""
    block = torch.arange(s.gen_len, device=masked.device) // s.block_len
    member = F.one_hot(block).float()  # (L, n_blocks)
    return masked.float() @ member, member.sum(0)


def join_block(masked, n_blocks, s):
    """Multiblock: how many blocks take part in this forward, (B,) int64: at most one more than before."""
    left, size = blocks_left(masked, s)
    last = (n_blocks - 1)[:, None]
    revealed = ((size - left) / size).gather(1, last)[:, 0]
    return (n_blocks + (revealed >= min(s.block_add, 1.0))).clamp(max=left.shape[1])


def pick_multiblock(entropy, masked, block, masked_all, n_blocks, s):
    """Which positions of a window the multiblock policy reveals: (B, W) bool.
    entropy, masked (B, W); block (B, W) int64, the block a position is in; masked_all (B, L); n_blocks (B,).
    """
    left, size = blocks_left(masked_all, s)
    revealed = (size - left) / size
    open_ = masked & (block < n_blocks[:, None])
    reveal = open_ & (entropy < s.threshold)
    lowest = entropy.masked_fill(~open_, torch.inf).argmin(1, keepdim=True)
    none = open_.any(1) & ~reveal.any(1)
    reveal = reveal.scatter(1, lowest, reveal.gather(1, lowest) | none[:, None])
    must = F.pad(revealed[:, :-1] >= s.decoded, (1, 0), value=True) & (left > 0)
    must &= torch.arange(left.shape[1], device=left.device) < n_blocks[:, None]
    mine = open_ & (block == must.int().argmax(1)[:, None]) & must.any(1)[:, None]
    lowest = entropy.masked_fill(~mine, torch.inf).argmin(1, keepdim=True)
    stuck = mine.any(1) & ~(reveal & mine).any(1)
    return reveal.scatter(1, lowest, reveal.gather(1, lowest) | stuck[:, None])


# ---------------------------------------------------------------------------------------------- the reference
@torch.no_grad()
def reference(model, prompt, **settings):
    """Decode one prompt (P,) int64 with plain code and no cache: the oracle for `generate`.
    Returns an Output.

    The staleness of a cache is reproduced by running the canvas of the last refresh beside the present one.
    """
    s, cfg, P = Decoding(**settings), model.cfg, len(prompt)
    if s.policy == "multiblock":
        return reference_multiblock(model, prompt, s)
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
    return check_finite(Output(x[P:], order[P:], rank[P:], conf_at[P:], nfe, commits), 0)


def reference_multiblock(model, prompt, s):
    """The multiblock policy for one prompt. With the prefix cache the forward recomputes everything from the
    first block that is not cached; a block is cached, with a refresh, `cache_delay` forwards after its end.
    """
    cfg, P, L = model.cfg, len(prompt), s.gen_len
    x = torch.cat([prompt, torch.full((L,), cfg.mask_id)])
    masked, block = torch.ones(L, dtype=torch.bool), torch.arange(L) // s.block_len
    order, rank, conf_at = torch.zeros(L).long(), torch.zeros(L).long(), torch.ones(L)
    gen, nfe, stop, n_blocks = row_generator(s.seed, 0), 0, False, torch.ones(1).long()
    finished_at, cached, refreshed, age = {}, 0, None, 0
    while masked.any() and not stop:
        if nfe:
            n_blocks = join_block(masked[None], n_blocks, s)
        before = cached
        while cached in finished_at and nfe - finished_at[cached] > s.cache_delay:
            cached += 1
        start = P + min(cached * s.block_len, L)
        if s.cache == "none" or refreshed is None or cached > before or (s.refresh and age >= s.refresh):
            refreshed, age = x.clone(), 0
            h = model.hidden(x[None])[0, start:]
        else:
            left = min(start, reach(s, cfg))
            h = stale_hidden(model, refreshed, x, start - left, P + L)[left:]
        age += 1
        noise = torch.rand(L, cfg.vocab_size, generator=gen)[: len(h)] if s.temperature > 0 else None
        token, conf, entropy, _ = pick_tokens(model.head(h), cfg, s, noise)
        at = start - P
        reveal = pick_multiblock(entropy[None], masked[None, at:], block[None, at:], masked[None], n_blocks,
                                 s)[0]
        n_known = int((~masked).sum())
        by_entropy = sorted(reveal.nonzero()[:, 0].tolist(), key=lambda i: (float(entropy[i]), i))
        for n, i in enumerate(by_entropy):
            x[start + i], conf_at[at + i], masked[at + i] = token[i], conf[i], False
            order[at + i], rank[at + i] = nfe, n_known + n
        for b in range(int(block[-1]) + 1):
            if not masked[block == b].any():
                finished_at.setdefault(b, nfe)
        nfe += 1
        stop = s.early_stop and fill_after_eos(x[P:], masked, order, rank, cfg.eos_ids, nfe - 1)
    return check_finite(Output(x[P:], order, rank, conf_at, nfe), 0)


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
def stream(model, prompts, batch_size=32, progress=False, streams=None, **settings):
    """Like generate, but yields (prompt index, Output) as rows finish; waiting prompts take their places.
    streams: the number of each prompt's random stream [its index].

    Every row of the batch stands at its own block and moves at its own pace. Greedy fp32 decoding gives each
    prompt what it gets alone. Raises UserError for a prompt that does not fit the model.
    """
    s = Decoding(**settings)
    check_prompts(model.cfg, prompts, s)
    waiting, batch = deque(range(len(prompts))), None
    bar = tqdm(total=len(prompts), unit="sample", desc="decode", disable=not progress, smoothing=0)
    n_tokens = n_forwards = 0
    if waiting:
        streams = range(len(prompts)) if streams is None else streams
        batch = Batch(model, prompts, s, min(batch_size, len(prompts)), streams)
    while batch is not None:
        for row in batch.finished():
            if batch.owner[row] is not None:
                out = batch.output(row)
                check_finite(out, batch.owner[row])
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
    if cfg.block_len and s.policy in ("multiblock", "dream"):
        raise UserError(f"policy {s.policy} is for bidirectional models: earlier blocks of a {cfg.family} "
                        f"model do not see later ones; choose threshold or static")
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


def check_finite(out, index):
    if not out.conf.isfinite().all():
        raise UserError(f"the model's logits for prompt {index} are not finite: its weights hold NaN or inf, "
                        f"or overflow in this dtype")
    return out


def row_generator(seed, index):
    """The random stream of prompt `index`: the same alone and in any batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


NEVER = 2**40  # a forward that never comes


class Batch:
    """S rows being decoded.
    Columns: [padding, prompt | response | one scratch column that nothing ever reads].
    """

    def __init__(self, model, prompts, s, n_rows, streams):
        self.model, self.cfg, self.prompts, self.s, self.streams = model, model.cfg, prompts, s, streams
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
        # multiblock: the forward at which each block was finished; forwards since the last refresh
        self.finished_at = torch.full((n_rows, -(-self.L // s.block_len)), NEVER, device=dev)
        self.age = torch.zeros_like(self.start)
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
        self.fresh[row], self.gens[row] = False, row_generator(self.s.seed, self.streams[index])
        self.tries[row] = self.blocks[row] = self.age[row] = 0
        self.finished_at[row] = NEVER

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
        K, canvas, cache = self.s.width, self.canvas[rows], self.s.cache
        if kind == "full":
            if self.cache is None:
                h = self.model.hidden(canvas, valid=self.valid[rows], positions=self.positions[rows])
            else:
                cols = torch.arange(canvas.shape[1], device=self.dev).expand(canvas.shape)
                h = self.model.hidden(canvas, cache=self.cache.select(rows), cols=cols)
                self.fresh[rows], self.age[rows] = True, 0
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
        shape = (self.s.width, self.cfg.vocab_size)
        return torch.stack([torch.rand(shape, generator=self.gens[r]) for r in rows.tolist()]).to(self.dev)

    def reveal(self, rows, h):
        """Score the rows' blocks, write the chosen tokens, then stop or advance rows that are done."""
        cols = self.window(rows, self.s.width)
        masked = self.masked[rows[:, None], cols]
        token, conf, entropy, score = pick_tokens(self.model.head(h), self.cfg, self.s, self.noise(rows))
        span = slice(self.P, self.P + self.L)
        reveal = self.choose(rows, cols, masked, conf, entropy, score)
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
        self.age[rows] += 1
        self.advance_multiblock(rows) if self.s.policy == "multiblock" else self.advance(rows)

    def choose(self, rows, cols, masked, conf, entropy, score):
        """The policy: which positions (N, W) of the windows to reveal."""
        began, everything = self.tries[rows] == 0, self.masked[rows, self.P:self.P + self.L]
        if self.s.policy == "multiblock":  # here `blocks` counts the blocks that take part
            joined = join_block(everything, self.blocks[rows].clamp(min=1), self.s)
            self.blocks[rows] = torch.where(began, 1, joined)
            block = (cols - self.P) // self.s.block_len
            return pick_multiblock(entropy, masked, block, everything, self.blocks[rows], self.s)
        self.n_block[rows] = torch.where(began, masked.sum(1), self.n_block[rows])
        self.blocks[rows] += began
        n = quota(self.s, masked.sum(1), self.n_block[rows], self.tries[rows])
        return pick_positions(conf, entropy, score, masked, self.s, n)

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

    def advance_multiblock(self, rows):
        """The window starts behind the leading blocks that were finished `cache_delay` forwards ago; their
        keys and values are refreshed when it moves.
        """
        s, nfe = self.s, self.nfe[rows]
        left, _ = blocks_left(self.masked[rows, self.P:self.P + self.L], s)
        done, at = left == 0, self.finished_at[rows]
        self.finished_at[rows] = torch.where(done & (at == NEVER), (nfe - 1)[:, None], at)
        cached = (nfe[:, None] - self.finished_at[rows] > s.cache_delay).long().cumprod(1).sum(1)
        start = self.P + (cached * s.block_len).clamp(max=self.L)
        self.fresh[rows] &= start == self.start[rows]
        if s.refresh:
            self.fresh[rows] &= self.age[rows] < s.refresh
        self.start[rows] = start


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


def picture(out, path, title=""):
    """Reveal order as PNG: positions across, forwards down; a token is coloured by its confidence from the
    forward that revealed it on, masks stay white.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'nanotraj[plot]'") from None
    L = len(out.ids)
    known = out.order[None] <= torch.arange(out.nfe)[:, None]  # (nfe, L)
    grid = torch.where(known, out.conf.expand(out.nfe, L), torch.nan)
    fig, ax = plt.subplots(figsize=(min(12, 2 + L / 12), min(9, 1.5 + out.nfe / 10)), dpi=140)
    shown = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    new = [(int(t), i) for i, t in enumerate(out.order)]
    ax.scatter([i for _, i in new], [t for t, _ in new], s=6, c="tab:red", marker="s", label="revealed here")
    ax.set_xlabel("response position")
    ax.set_ylabel("forward")
    ax.set_title(title or f"{L} positions in {out.nfe} forwards", fontsize=10)
    ax.legend(loc="upper right", fontsize=7)
    fig.colorbar(shown, label="confidence when revealed")
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------- commands
def decode_one(model, tok, args, settings):
    """--prompt: one prompt, shown and drawn as asked."""
    import data
    prompt = args.prompt or data.load_problems("tiny", "test", 1)[0]["prompt"]
    out = generate(model, [tok.prompt_ids(prompt)], **settings)[0]
    n = out.n_tokens(model.cfg.eos_ids)
    print(f"prompt   {prompt}")
    if args.show:
        words = [tok.decode([i]).strip() or "∅" for i in out.ids.tolist()]
        print(show(out, words, args.show))
    print(f"response {tok.decode(out.ids[:n].tolist())}")
    print(f"{n} tokens in {out.nfe} forwards: {n / out.nfe:.2f} tokens per forward")
    if args.picture:
        picture(out, args.picture)
        print(f"written: {args.picture}")


def read_prompts(source):
    """A .jsonl (field prompt, id optional) or a text file, one prompt per line -> rows with id and prompt."""
    import data
    if not source.is_file():
        raise UserError(f"no file {source}: --prompts takes a .jsonl or a text file")
    try:
        text = source.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{source} is not UTF-8 text") from None
    rows = (data.read_jsonl(source) if source.suffix == ".jsonl"
            else [dict(prompt=line) for line in text.splitlines() if line.strip()])
    if not rows or not all(isinstance(r, dict) and isinstance(r.get("prompt"), str) for r in rows):
        raise UserError(f"{source}: every line needs a prompt, and there must be one")
    rows = [{"id": f"{source.stem}-{i}", **r} for i, r in enumerate(rows)]
    if not all(isinstance(r["id"], (str, int)) for r in rows):
        raise UserError(f"{source}: an id must be a text or a number")
    return rows


def decode_file(model, tok, args, settings):
    """--prompts: one line per finished prompt is appended to --to; the same command continues an interrupted
    run. A file that holds anything else is refused.
    """
    import data
    source, to = Path(args.prompts), Path(args.to or Path(args.prompts).with_suffix(".responses.jsonl"))
    rows = read_prompts(source)
    made_by = dict(model=str(args.model), revision=model.revision, adapter=args.adapter, decoding=settings)
    done = data.read_jsonl(to, tolerant=True) if to.exists() else []
    prompt_of = {r["id"]: r["prompt"] for r in rows}
    for r in done:
        same = isinstance(r, dict) and all(r.get(k) == v for k, v in made_by.items())
        if not same or prompt_of.get(r.get("id")) != r.get("prompt"):
            raise UserError(f"{to} holds responses of another model, other settings or other prompts: "
                            f"choose another --to or remove it")
    data.drop_torn_line(to)
    finished = {r["id"] for r in done}
    todo = [i for i, r in enumerate(rows) if r["id"] not in finished]
    with open(to, "a") as f:
        prompts = [tok.prompt_ids(rows[i]["prompt"]) for i in todo]
        for n, out in stream(model, prompts, args.batch_size, progress=True, streams=todo, **settings):
            k = out.n_tokens(model.cfg.eos_ids)
            f.write(json.dumps(dict(rows[todo[n]], response=tok.decode(out.ids[:k].tolist()), tokens=k,
                                    nfe=out.nfe, **made_by)) + "\n")
            f.flush()
    print(f"{len(todo)} responses written to {to}" + (f", {len(done)} were there" if done else ""))


def interactive(model, tok, settings):
    """--interactive: a prompt per line; an empty line or end of file ends."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        try:
            out = generate(model, [tok.prompt_ids(line)], **settings)[0]
        except UserError as e:  # a prompt too long: the next one may fit
            print(f"error: {e}")
            continue
        n = out.n_tokens(model.cfg.eos_ids)
        print(f"{tok.decode(out.ids[:n].tolist())}\n[{n} tokens in {out.nfe} forwards]")


def main():
    import data
    import lora
    ap = argparse.ArgumentParser(description="Decode one prompt, a file of prompts, or what you type. "
                                 "In brackets the defaults; tiny (48, 16, none) and SDAR (block 4, exact) "
                                 "models have their own gen_len, block_len, cache.")
    ap.add_argument("--model", default="tiny", help="preset name, hub id or directory [tiny]")
    ap.add_argument("--revision", help="commit, branch or tag of a hub id")
    ap.add_argument("--adapter", help="directory of a trained LoRA adapter to decode with")
    ap.add_argument("--prompt", help="user turn; default: a problem of the tiny task's test split")
    ap.add_argument("--show", nargs="?", const="confidence", choices=["confidence", "step"],
                    help="draw every forward, coloured by confidence or by reveal step")
    ap.add_argument("--picture", help="PNG of the reveal order to write")
    ap.add_argument("--prompts", help="file of prompts: .jsonl, or text with one per line")
    ap.add_argument("--to", help="responses of --prompts [FILE.responses.jsonl]")
    ap.add_argument("--batch_size", type=int, default=32, help="prompts decoded at once [32]")
    ap.add_argument("--interactive", action="store_true", help="read prompts from the terminal")
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
    settings = vars(Decoding(**{**family_defaults, **given}))
    for path in filter(None, (args.to, args.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"no directory {Path(path).parent} to write {path} to")
    if args.picture and not args.picture.endswith(".png"):
        raise UserError(f"--picture {args.picture}: give a name that ends with .png")
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}: it must be at least 1")
    model = load(args.model, *default_device(), args.revision)
    tok = data.load_tokenizer(args.model, args.revision)
    if args.adapter:
        lora.load(model, args.adapter)
    if args.interactive:
        interactive(model, tok, settings)
    elif args.prompts:
        decode_file(model, tok, args, settings)
    else:
        decode_one(model, tok, args, settings)


if __name__ == "__main__":
    run_cli(main)
