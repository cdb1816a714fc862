"""Decoding: a short reference that reads like the papers, and the compiled, batched, block-cached decoder
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

Read `reference` first: the oracle. The batched decoder is one function of tensors, `step`, and a host loop,
`Batch`. A step is one forward and what it reveals, for all rows at once: shapes are fixed, nothing is read by
the host, so that it can be compiled, and captured as a CUDA graph. The host looks at the device once in
`sync_every` steps: finished rows leave, waiting prompts take their places, and rows whose block is full get
the forward that refreshes their keys.
"""
import argparse
import copy
import json
import os
import time
from collections import deque
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from tqdm import tqdm

from layers import for_decoding
from model import (KVCache, UserError, attention_mask, config_of, default_device, load, n_content,
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
    lse = logits.logsumexp(-1)
    entropy = lse - ((logits - lse[..., None]).exp() * logits).sum(-1)
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == cfg.mask_id
    choice = logits.masked_fill(is_mask, -torch.inf)
    if s.temperature > 0:
        choice = nucleus(choice / s.temperature, s.top_p)
        if 0 < s.top_k < choice.shape[-1]:
            kth = choice.topk(s.top_k, -1).values[..., -1:]
            choice = choice.masked_fill(choice < kth, -torch.inf)
        choice = choice - (-noise.log()).log()
    token = choice.argmax(-1)
    conf = (logits.gather(-1, token[..., None])[..., 0] - lse).exp()
    if s.score == "margin":
        top2 = (logits.topk(2, -1).values - lse[..., None]).exp()
        score = top2[..., 0] - top2[..., 1]
    else:
        score = -entropy if s.score == "entropy" else conf
    return token, conf, entropy, score


def row_key(seed, stream):
    """The 32-bit key of a prompt's random numbers: the same alone and in any batch."""
    return (seed * 1_000_003 + stream) % 2**32


def uniform_noise(key, nfe, positions, n_vocab):
    """Uniform numbers in (0, 1), fp32 (R, W, V), that hang on nothing but their arguments: no generator to
    keep per row, none to restore. key, nfe (R,), positions (R, W) int64.
    """
    def mix(x):  # an integer hash of 32 bits, kept in int64
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return x ^ (x >> 15)
    stream = mix(mix(key) + nfe & 0xFFFFFFFF)
    index = positions[..., None] * n_vocab + torch.arange(n_vocab, device=key.device)
    x = mix(stream[:, None, None] ^ index)
    return ((x >> 9).float() + 0.5) / 2**23


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


def place_of(value, among):
    """How many of the candidates `among` come before each position, in ascending value, ties left to right:
    0 for the first. value (R, W), among (R, W) bool -> (R, W) int64, meaningless outside `among`.
    """
    at = torch.arange(value.shape[1], device=value.device)
    a, b = value[:, None, :], value[:, :, None]
    return (among[:, None, :] & ((a < b) | (a == b) & (at[None, :] < at[:, None]))).sum(-1)


def pick_positions(conf, entropy, score, masked, s, n=None, threshold=None):
    """Which masked positions to reveal: (B, K) bool. n (B,): the quota of static and dream [per_step];
    threshold (B, 1) [s.threshold].
    Other policies reveal at least one per row that has any; ties go left to right.
    """
    threshold = s.threshold if threshold is None else threshold
    if s.policy == "entropy":
        score = -entropy
    elif s.policy in ("threshold", "factor"):
        score = conf
    place = place_of(-score, masked)
    if s.policy in ("static", "dream"):
        keep = place < (s.per_step if n is None else n[:, None])
    elif s.policy == "threshold":
        keep = (conf >= threshold) | (place == 0)
    elif s.policy == "entropy":
        keep = (entropy < threshold) | (place == 0)
    else:  # the n-th best (n = place + 1) passes if c_n >= 1 - f / (n + 1); n is the largest that passes
        passes = masked & (conf >= 1 - threshold / (place + 2))
        n, n_masked = torch.where(passes, place + 1, 1).amax(-1, keepdim=True), masked.sum(-1, keepdim=True)
        # the published code never leaves a single one
        keep = place < torch.where(n == n_masked - 1, n_masked, n)
    return keep & masked


def blocks_left(masked, s):
    """masked (B, L) bool -> masks left per block (B, n_blocks) fp32, and the blocks' sizes."""
    block = torch.arange(s.gen_len, device=masked.device)[:, None] // s.block_len
    n_blocks = -(-s.gen_len // s.block_len)
    member = (block == torch.arange(n_blocks, device=masked.device)).float()  # (L, n_blocks)
    return masked.float() @ member, member.sum(0)


def join_block(masked, n_blocks, s):
    """Multiblock: how many blocks take part in this forward, (B,) int64: at most one more than before."""
    left, size = blocks_left(masked, s)
    last = (n_blocks - 1)[:, None]
    revealed = ((size - left) / size).gather(1, last)[:, 0]
    return (n_blocks + (revealed >= min(s.block_add, 1.0))).clamp(max=left.shape[1])


def pick_multiblock(entropy, masked, block, masked_all, n_blocks, s, threshold=None):
    """Which positions of a window the multiblock policy reveals: (B, W) bool.
    entropy, masked (B, W); block (B, W) int64, the block a position is in; masked_all (B, L); n_blocks (B,);
    threshold (B, 1) [s.threshold].
    """
    left, size = blocks_left(masked_all, s)
    revealed = (size - left) / size
    open_ = masked & (block < n_blocks[:, None])
    reveal = open_ & (entropy < (s.threshold if threshold is None else threshold))
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
    s, P = Decoding(**settings), len(prompt)
    model = in_blocks(model, s.block_len)
    cfg = model.cfg
    if s.policy == "multiblock":
        return reference_multiblock(model, prompt, s)
    L, total = s.gen_len, P + s.gen_len
    x = torch.cat([prompt, torch.full((L,), cfg.mask_id)])
    masked = torch.arange(total) >= P
    order, rank, conf_at = torch.zeros(total).long(), torch.zeros(total).long(), torch.ones(total)
    nfe, stop = 0, False
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
            token, conf, entropy, score = pick_tokens(model.head(h), cfg, s, noise_of(cfg, s, nfe, lo, hi))
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
    nfe, stop, n_blocks = 0, False, torch.ones(1).long()
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
        noise = noise_of(cfg, s, nfe, start, P + L)
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


def noise_of(cfg, s, nfe, lo, hi):
    """The random numbers of prompt 0's forward `nfe` over its positions [lo, hi)."""
    if s.temperature == 0:
        return None
    key, positions = torch.tensor([row_key(s.seed, 0)]), torch.arange(lo, hi)[None]
    return uniform_noise(key, torch.tensor([nfe]), positions, cfg.vocab_size)[0]


def reach(s, cfg):
    """How many columns left of the block a window takes along: the vicinity, the last block (exact: its keys
    are committed now), and the left neighbour whose hidden state a shifted model needs.
    """
    return max({"vicinity": s.vicinity, "exact": s.block_len}.get(s.cache, 0), 1 if cfg.shift else 0)


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
def generate(model, prompts, batch_size=32, progress=False, compiled=None, sync_every=4, int8=False,
             **settings):
    """Decode prompts (list of 1-D int64 tensors of any lengths) -> list of Output, in order.
    See Decoding, stream.
    """
    outs = [None] * len(prompts)
    for i, out in stream(model, prompts, batch_size, progress, None, compiled, sync_every, int8, **settings):
        outs[i] = out
    return outs


@torch.no_grad()
def stream(model, prompts, batch_size=32, progress=False, streams=None, compiled=None, sync_every=4,
           int8=False, **settings):
    """Like generate, but yields (prompt index, Output) as rows finish; waiting prompts take their places.
    streams: the number of each prompt's random stream [its index]. compiled: run torch.compile's form of the
    step [on a GPU]; its shapes are the number of rows and the longest prompt, rounded up. sync_every:
    forwards between two looks of the host at the device; a row that needs its keys refreshed, or is finished,
    waits for the next look (on a CPU a look is free and 1 wastes nothing). int8: weights in 8 bits.

    Every row of the batch stands at its own block and moves at its own pace. Greedy fp32 decoding gives each
    prompt what it gets alone. Raises UserError for a prompt that does not fit the model.
    """
    s = Decoding(**settings)
    check_prompts(model.cfg, prompts, s)
    if not prompts:
        return
    prompts = [p.cpu() for p in prompts]
    streams = range(len(prompts)) if streams is None else streams
    model = in_blocks(model, s.block_len)
    yield from decode(Batch(model, prompts, s, batch_size, streams, compiled, sync_every, int8), progress)


@torch.no_grad()
def decode(batch, progress=False):
    """Run a batch over all of its prompts -> (prompt index, Output) as they finish."""
    waiting, n_tokens, n_forwards = deque(range(len(batch.prompts))), 0, 0
    began = time.perf_counter()
    bar = tqdm(total=len(waiting), unit="sample", desc="decode", disable=not progress, smoothing=0)
    while True:
        finished = batch.finished()  # the one place where the host waits for the device
        free = [row for row, owner in enumerate(batch.owner) if owner is None][:len(waiting)]
        batch.admit({row: waiting.popleft() for row in free})
        batch.run()  # the device is busy while the finished ones are looked at
        for i, out in finished:
            check_finite(out, i)
            n_tokens, n_forwards = n_tokens + out.n_tokens(batch.model.cfg.eos_ids), n_forwards + out.nfe
            bar.update()
            bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - began):.0f} tok/s, "
                                f"TPF {n_tokens / n_forwards:.2f}", refresh=False)
            yield i, out
        if not batch.busy():
            break
    bar.close()


def in_blocks(model, block_len):
    """The model with blocks of block_len, if it is block-causal: decoding decides who sees whom, as in SDAR's
    own sampler. Weights are shared.
    """
    if model.cfg.block_len in (0, block_len):
        return model
    twin = copy.copy(model)
    twin.cfg = replace(model.cfg, block_len=block_len)
    return twin


def check_prompts(cfg, prompts, s):
    if s.cache == "exact" and not cfg.block_len:
        raise UserError(f"cache 'exact' is for block-causal models (SDAR): a {cfg.family} model attends to "
                        f"later blocks; choose none, prefix, dual or vicinity")
    if cfg.block_len and s.policy in ("multiblock", "dream"):
        raise UserError(f"policy {s.policy} is for bidirectional models: earlier blocks of a {cfg.family} "
                        f"model do not see later ones; choose threshold or static")
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


NEVER = 2**30  # a forward that never comes


@dataclass
class Rows:
    """R rows that are being decoded, T columns each: [padding, prompt | response | columns nobody reads]."""
    # fixed while a prompt is decoded
    valid: torch.Tensor        # (R, T) bool, prompt and response
    positions: torch.Tensor    # (R, T) int64, from the first prompt token
    key: torch.Tensor          # (R,) int64, of its random numbers
    threshold: torch.Tensor    # (R, 1) fp32; a tensor, so that a curve over thresholds compiles once
    # what a forward changes
    canvas: torch.Tensor       # (R, T) int64, the tokens
    masked: torch.Tensor       # (R, T) bool
    order: torch.Tensor        # (R, T) int64, like rank and conf see Output
    rank: torch.Tensor
    conf: torch.Tensor         # (R, T) fp32
    start: torch.Tensor        # (R,) int64, first column of the block
    nfe: torch.Tensor          # (R,) int64
    tries: torch.Tensor        # (R,) int64, forwards in this block so far
    n_block: torch.Tensor      # (R,) int64, masks of the block when it began
    blocks: torch.Tensor       # (R,) int64, blocks entered; multiblock: blocks that take part
    fresh: torch.Tensor        # (R,) bool: the stored keys outside the window are as the cache wants them
    age: torch.Tensor          # (R,) int64, forwards since they were stored
    finished_at: torch.Tensor  # (R, n_blocks) int64, multiblock: the forward that finished a block

    @staticmethod
    def new(prompts, keys, s, cfg, P, T):
        """prompts: list of 1-D int64 tensors -> their rows, on the CPU. The response starts at column P."""
        R, L = len(prompts), s.gen_len
        first = P - torch.tensor([len(p) for p in prompts])[:, None]
        cols, zero = torch.arange(T).expand(R, T), torch.zeros(R, dtype=torch.long)
        canvas = torch.full((R, T), cfg.pad_id)
        for row, prompt in zip(canvas, prompts):
            row[P - len(prompt):P], row[P:P + L] = prompt, cfg.mask_id
        # block-causal blocks count from the first prompt token, so the first one may hold prompt tokens
        start = P - ((P - first[:, 0]) % s.block_len if cfg.block_len else zero)
        return Rows(valid=(cols >= first) & (cols < P + L), positions=(cols - first).clamp(min=0),
                    key=torch.tensor(keys), threshold=torch.full((R, 1), float(s.threshold)),
                    canvas=canvas, masked=(cols >= P) & (cols < P + L),
                    order=torch.zeros(R, T, dtype=torch.long), rank=torch.zeros(R, T, dtype=torch.long),
                    conf=torch.ones(R, T), start=start, nfe=zero, tries=zero, n_block=zero, blocks=zero,
                    fresh=zero > 0, age=zero, finished_at=torch.full((R, -(-L // s.block_len)), NEVER))

    def items(self):
        return [(name, getattr(self, name)) for name in Rows.__dataclass_fields__]

    def select(self, rows):
        return Rows(**{name: t[rows] for name, t in self.items()})

    def window(self, width, left=0):
        """Columns (R, left + width): from `left` before each row's block start. What runs past the end lands
        on the last column, which nobody reads.
        """
        cols = self.start[:, None] + torch.arange(-left, width, device=self.start.device)
        return cols.clamp(max=self.canvas.shape[1] - 1)


def step(model, x, cache, s, P, rows, width):
    """One forward and what it reveals, written into the Rows x in place: tensors of fixed shapes in and out,
    nothing that the host must wait for. A row that has nothing to do in it stays as it is.

    rows (N,) int64: over the whole canvas of these rows of x, whose keys and values are stored in the cache
    (if there is one). rows None: over `width` columns of every row, from its block's start (and the columns
    left of it that the cache or the shift asks for). Only the first s.width of them are scored.
    """
    old = x if rows is None else x.select(rows)
    new = Rows(**dict(old.items()))  # the functions below put new tensors into it
    act, scored = old.masked.any(1), old.window(min(width, s.width))
    if rows is None:
        act, left = act & old.fresh, reach(s, model.cfg)
        cols = old.window(width, left)
        h = model.hidden(old.canvas.gather(1, cols), cache=cache, cols=cols)[:, left:left + scored.shape[1]]
    else:
        h = model.hidden(old.canvas, valid=old.valid, positions=old.positions, cache=cache, rows=rows,
                         out=scored)
        new.fresh, new.age = torch.ones_like(old.fresh), torch.zeros_like(old.age)
    reveal(model, new, s, P, scored, h)
    if rows is not None:  # a row that is repeated to fill up is written with one and the same result
        at = torch.arange(len(rows), device=rows.device)
        first = torch.where(rows == rows[0], 0, at)
    for name, t in new.items():
        was = getattr(old, name)
        if t is not was:
            t = torch.where(act.view(-1, *[1] * (t.ndim - 1)), t, was)
            if rows is None:
                getattr(x, name).copy_(t)
            else:
                getattr(x, name)[rows] = t[first]


def reveal(model, x, s, P, cols, h):
    """Score the columns cols (R, W) with their hidden states h (R, W, C), reveal what the policy chooses, and
    move on where a block is full. Replaces tensors of x.
    """
    span, masked = slice(P, P + s.gen_len), x.masked.gather(1, cols)
    noise = (uniform_noise(x.key, x.nfe, x.positions.gather(1, cols), model.cfg.vocab_size)
             if s.temperature > 0 else None)
    token, conf, entropy, score = pick_tokens(model.head(h), model.cfg, s, noise)
    chosen = choose(x, s, P, cols, masked, conf, entropy, score)
    rank = s.gen_len - x.masked[:, span].sum(1, keepdim=True) + place_of(entropy, chosen)

    def put(name, value):
        t = getattr(x, name)
        setattr(x, name, t.scatter(1, cols, torch.where(chosen, value, t.gather(1, cols))))
    put("canvas", token)
    put("conf", conf)
    put("order", x.nfe[:, None])
    put("rank", rank)
    put("masked", torch.zeros_like(masked))
    if s.early_stop:
        stop_at_eos(x, span, model.cfg.eos_ids)
    x.nfe, x.tries, x.age = x.nfe + 1, x.tries + 1, x.age + 1
    advance_multiblock(x, s, P) if s.policy == "multiblock" else advance(x, s)


def choose(x, s, P, cols, masked, conf, entropy, score):
    """The policy: which columns (R, W) of the windows to reveal."""
    began, everything = x.tries == 0, x.masked[:, P:P + s.gen_len]
    if s.policy == "multiblock":
        x.blocks = torch.where(began, 1, join_block(everything, x.blocks.clamp(min=1), s))
        block = (cols - P) // s.block_len
        return pick_multiblock(entropy, masked, block, everything, x.blocks, s, x.threshold)
    x.n_block, x.blocks = torch.where(began, masked.sum(1), x.n_block), x.blocks + began
    n = quota(s, masked.sum(1), x.n_block, x.tries)
    return pick_positions(conf, entropy, score, masked, s, n, x.threshold)


def stop_at_eos(x, span, eos_ids):
    """Everything before the first EOS revealed:
    the masked rest becomes EOS at this forward, ranked left to right.
    """
    masked, ids = x.masked[:, span], x.canvas[:, span]
    is_eos = sum(ids == i for i in eos_ids).bool() & ~masked
    before = F.pad(is_eos.cumsum(1)[:, :-1], (1, 0)) == 0  # not behind an EOS
    fill = masked & (is_eos.any(1) & ~(masked & before).any(1))[:, None]
    rank = (~masked).sum(1, keepdim=True) + fill.cumsum(1) - 1
    for name, value in (("canvas", eos_ids[0]), ("order", x.nfe[:, None]), ("rank", rank), ("masked", False)):
        t = getattr(x, name)
        inside = torch.where(fill, value, t[:, span])
        setattr(x, name, torch.cat([t[:, :span.start], inside, t[:, span.stop:]], 1))


def advance(x, s):
    """Rows whose block is full move on; their keys and values are to be refreshed."""
    full = ~x.masked.gather(1, x.window(s.block_len)).any(1)
    x.start, x.tries = x.start + full * s.block_len, x.tries * ~full
    if s.cache != "exact":
        x.fresh = x.fresh & ~full


def advance_multiblock(x, s, P):
    """The window starts behind the leading blocks that were finished `cache_delay` forwards ago; the keys and
    values are to be refreshed when it moves.
    """
    nfe, (left, _) = x.nfe[:, None], blocks_left(x.masked[:, P:P + s.gen_len], s)
    x.finished_at = torch.where((left == 0) & (x.finished_at == NEVER), nfe - 1, x.finished_at)
    cached = (nfe - x.finished_at > s.cache_delay).long().cumprod(1).sum(1)
    start = P + (cached * s.block_len).clamp(max=s.gen_len)
    x.fresh = x.fresh & (start == x.start)
    if s.refresh:
        x.fresh = x.fresh & (x.age < s.refresh)
    x.start = start


COMPILE = dict(fullgraph=True, dynamic=False)  # a graph break is an error


def power_of_two(n):
    """The smallest one that is not below n."""
    return 1 << (n - 1).bit_length()


class Batch:
    """The rows of a batch, the cache, and the host's picture of them as of its last look."""

    def __init__(self, model, prompts, s, batch_size, streams, compiled=None, sync_every=4, int8=False):
        self.model, self.prompts, self.s, self.streams = for_decoding(model, int8), prompts, s, streams
        self.dev, self.sync_every, self.int8 = model.embed.weight.device, sync_every, int8
        cuda = self.dev.type == "cuda"
        self.compiled = cuda if compiled is None else compiled
        n_rows, T = len(prompts), max(len(p) for p in prompts) + reach(s, model.cfg) + s.gen_len + 1
        if self.compiled:  # prompts in any number and of many lengths, few shapes
            n_rows, T = power_of_two(n_rows), -(-T // 32) * 32
        n_rows = min(batch_size, n_rows)
        self.P = T - s.gen_len - 1  # where the responses begin
        empty = Rows.new([prompts[0][:0]] * n_rows, [0] * n_rows, s, model.cfg, self.P, T)
        empty.masked &= False
        self.rows = Rows(**{name: t.to(self.dev).clone() for name, t in empty.items()})
        self.cache = None
        if s.cache != "none":
            self.cache = KVCache(model.cfg, self.rows.valid, self.rows.positions, model.embed.weight.dtype)
        self.owner = [None] * n_rows     # prompt in each row; None: the row is free
        self.stale = [False] * n_rows    # rows that need a forward over the whole canvas
        self.start = [self.P] * n_rows   # first column of the row's block
        self.left = [0] * n_rows         # masks in it
        self.forwards = self.looks = 0   # what was run; how often the host waited for the device
        self.step = step
        if self.compiled:
            # a graph for every shape and setting; beyond the limit fullgraph=True raises
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
            self.step = torch.compile(step, **COMPILE)
        self.graphs = {} if self.compiled and cuda else None  # (rows, width) -> CUDA graph of the step
        self.pool = torch.cuda.graph_pool_handle() if self.graphs is not None else None

    def busy(self):
        return any(owner is not None for owner in self.owner)

    def finished(self):
        """Look at the device -> [(prompt index, Output)] of the rows that are finished; they are free now."""
        x, span = self.rows, slice(self.P, self.P + self.s.gen_len)
        if not self.busy():
            return []
        left = x.masked.gather(1, x.window(self.s.block_len)).sum(1)
        facts = torch.stack([x.masked.any(1), ~x.fresh, x.start, left, x.nfe, x.blocks], 1).int()
        ids, order, rank = (t[:, span].int() for t in (x.canvas, x.order, x.rank))
        table = torch.cat([facts, ids, order, rank, x.conf[:, span].view(torch.int32)], 1)
        table = table.to("cpu")  # one copy: the device is asked once
        self.looks += 1
        live, self.stale, self.start, self.left, nfe, blocks = table[:, :6].T.tolist()
        outs = []
        for row, index in enumerate(self.owner):
            if index is not None and not live[row]:
                ids, order, rank, conf = table[row, 6:].view(4, -1).clone()
                prefill = len(self.prompts[index]) >= self.s.block_len
                commits = blocks[row] + prefill if self.s.cache == "exact" else 0
                outs.append((index, Output(ids.long(), order.long(), rank.long(), conf.view(torch.float32),
                                           nfe[row], commits)))
                self.owner[row] = None
        return outs

    def admit(self, places):
        """places {row: prompt index}: put waiting prompts into free rows."""
        if not places:
            return
        prompts = [self.prompts[i] for i in places.values()]
        keys = [row_key(self.s.seed, self.streams[i]) for i in places.values()]
        T, rows = self.rows.canvas.shape[1], torch.tensor(list(places)).to(self.dev, non_blocking=True)
        new = Rows.new(prompts, keys, self.s, self.model.cfg, self.P, T)
        for name, t in new.items():
            getattr(self.rows, name)[rows] = t.to(self.dev, non_blocking=True)
        for row, index in places.items():
            partial = len(self.prompts[index]) % self.s.block_len if self.model.cfg.block_len else 0
            self.owner[row], self.stale[row], self.start[row] = index, True, self.P - partial
            self.left[row] = min(self.s.block_len - partial, self.s.gen_len)

    def run(self):
        """Forwards up to the next look. First the rows that need it refresh their keys (one forward over the
        whole canvas, which also reveals), then all go on in their windows.
        """
        busy = [row for row, owner in enumerate(self.owner) if owner is not None]
        if not busy:
            return
        stale = busy if self.cache is None else [row for row in busy if self.stale[row]]
        # what every row can use; the rows with fresh keys have no part in the refresh
        n = max(self.sync_every, min(self.sure(row) + bool(stale and row not in stale) for row in busy))
        width = self.width(min(self.start[row] for row in busy))
        rows = self.numbers(stale) if stale else None
        for i in range(n):
            refresh = self.cache is None or (stale and i == 0)
            self.forward(rows if refresh else None, self.s.width if refresh else width)

    def sure(self, row):
        """Forwards that the row's block certainly takes: the static policy has a fixed trip count."""
        if self.s.policy != "static" or self.s.early_stop:
            return 1
        per_forward = -(-self.s.block_len // self.s.steps) if self.s.steps else self.s.per_step
        return -(-self.left[row] // per_forward)

    def width(self, start):
        """Columns of a window, from the block's start on: for the prefix cache those to the end of the canvas
        for the slowest row, which stands at `start`; by doubling, so that there are few widths.
        """
        K, s = self.s.block_len, self.s
        if s.cache != "prefix":
            return K + (s.vicinity if s.cache == "vicinity" else 0)
        while K < self.P + s.gen_len - start:
            K *= 2
        return min(K, s.gen_len + (s.block_len if self.model.cfg.block_len else 0))

    def numbers(self, rows):
        """Row numbers as a tensor whose length is no reason to compile again: at least two if there are two,
        and for CUDA graphs a power of two; the first one is repeated to fill up.
        """
        n = len(rows)
        if self.compiled:
            n = min(max(2, n if self.graphs is None else power_of_two(n)), len(self.owner))
        numbers = torch.tensor(rows + rows[:1] * (n - len(rows))).to(self.dev, non_blocking=True)
        if self.compiled and n > 1:
            torch._dynamo.mark_dynamic(numbers, 0)
        return numbers

    def forward(self, rows, width):
        """One step, see there; on a GPU the second and later ones of a shape replay a CUDA graph."""
        self.forwards += 1
        step = partial(self.step, self.model, self.rows, self.cache, self.s, self.P)
        key = (None if rows is None else len(rows), width)
        if self.graphs is None:
            return step(rows, width)
        if key not in self.graphs:  # the first time it is compiled, and warms up
            self.graphs[key] = None
            return step(rows, width)
        if self.graphs[key] is None:
            graph, kept = torch.cuda.CUDAGraph(), None if rows is None else rows.clone()
            with torch.cuda.graph(graph, pool=self.pool):  # they replay one after the other
                step(kept, width)
            self.graphs[key] = graph, kept
        graph, kept = self.graphs[key]
        if kept is not None:
            kept.copy_(rows)
        graph.replay()


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
    forward that revealed it on (by that forward where out.conf is None), masks stay white.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'nanotraj[plot]'") from None
    L = len(out.ids)
    known = out.order[None] <= torch.arange(out.nfe)[:, None]  # (nfe, L)
    color = out.order / max(1, out.nfe - 1) if out.conf is None else out.conf
    grid = torch.where(known, color.expand(out.nfe, L), torch.nan)
    fig, ax = plt.subplots(figsize=(min(12, 2 + L / 12), min(9, 1.5 + out.nfe / 10)), dpi=140)
    shown = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    new = [(int(t), i) for i, t in enumerate(out.order)]
    ax.scatter([i for _, i in new], [t for t, _ in new], s=6, c="tab:red", marker="s", label="revealed here")
    ax.set_xlabel("response position")
    ax.set_ylabel("forward")
    ax.set_title(title or f"{L} positions in {out.nfe} forwards", fontsize=10)
    ax.legend(loc="upper right", fontsize=7)
    fig.colorbar(shown, label="revealed: 0 first, 1 last" if out.conf is None else "confidence when revealed")
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------- commands
def decode_one(model, tok, args, settings, how):
    """--prompt: one prompt, shown and drawn as asked."""
    import data
    prompt = args.prompt or data.load_problems("tiny", "test", 1)[0]["prompt"]
    out = generate(model, [tok.prompt_ids(prompt)], **how, **settings)[0]
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


def decode_file(model, tok, args, settings, how):
    """--prompts: one line per finished prompt is appended to --to; the same command continues an interrupted
    run. A file that holds anything else is refused.
    """
    import data
    source, to = Path(args.prompts), Path(args.to or Path(args.prompts).with_suffix(".responses.jsonl"))
    rows = read_prompts(source)
    made_by = dict(model=str(args.model), revision=model.revision, adapter=args.adapter, decoding=settings,
                   int8=args.int8)
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
        for n, out in stream(model, prompts, args.batch_size, progress=True, streams=todo, **how,
                             **settings):
            k = out.n_tokens(model.cfg.eos_ids)
            f.write(json.dumps(dict(rows[todo[n]], response=tok.decode(out.ids[:k].tolist()), tokens=k,
                                    nfe=out.nfe, **made_by)) + "\n")
            f.flush()
    print(f"{len(todo)} responses written to {to}" + (f", {len(done)} were there" if done else ""))


def interactive(model, tok, settings, how):
    """--interactive: a prompt per line; an empty line or end of file ends."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        try:
            out = generate(model, [tok.prompt_ids(line)], **how, **settings)[0]
        except UserError as e:  # a prompt too long: the next one may fit
            print(f"error: {e}")
            continue
        n = out.n_tokens(model.cfg.eos_ids)
        print(f"{tok.decode(out.ids[:n].tolist())}\n[{n} tokens in {out.nfe} forwards]")


def decoding_options(ap):
    """The fields of Decoding as command-line options without defaults."""
    for f in fields(Decoding):
        kw = dict(default=argparse.SUPPRESS, help=f"[{f.default}]")
        if isinstance(f.default, bool):
            ap.add_argument("--" + f.name, action=argparse.BooleanOptionalAction, **kw)
        else:
            choices = get_args(get_type_hints(Decoding)[f.name]) or None
            ap.add_argument("--" + f.name, type=type(f.default), choices=choices, **kw)


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
    ap.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile [on a GPU]")
    ap.add_argument("--sync_every", type=int, default=4,
                    help="forwards between two looks of the host at the device [4]")
    ap.add_argument("--int8", action="store_true",
                    help="weights in 8 bits while decoding (its speed has not been measured on a GPU)")
    ap.add_argument("--bench", nargs="?", const="", metavar="SHAPE",
                    help="measure --model, or random weights in the shape of llada-8b, dream-7b, sdar-4b, "
                    "llada-60m")
    ap.add_argument("--prompt_len", type=int, default=128, help="of --bench's random prompts [128]")
    ap.add_argument("--profile", action="store_true", help="with --bench: where the time goes")
    decoding_options(ap)
    args = ap.parse_args()
    if args.bench:
        import bench
        cfg = bench.shape(args.bench)
    else:
        cfg = config_of(args.model, args.revision)
    family_defaults = {"tiny": data.TINY_DECODING,
                       "sdar": dict(block_len=cfg.block_len, cache="exact")}.get(cfg.family, {})
    given = {f.name: getattr(args, f.name) for f in fields(Decoding) if hasattr(args, f.name)}
    settings = vars(Decoding(**{**family_defaults, **given}))
    for path in filter(None, (args.to, args.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"no directory {Path(path).parent} to write {path} to")
    if args.picture and not args.picture.endswith(".png"):
        raise UserError(f"--picture {args.picture}: give a name that ends with .png")
    for name in ("batch_size", "sync_every", "prompt_len"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be at least 1")

    def load_model():
        model = load(args.model, *default_device(), args.revision)
        return lora.load(model, args.adapter) if args.adapter else model
    if args.bench is not None:
        import bench
        return bench.main(args, settings, load_model)
    model = load_model()
    tok = data.load_tokenizer(args.model, args.revision)
    how = dict(compiled=args.compiled, sync_every=args.sync_every, int8=args.int8)
    if args.interactive:
        interactive(model, tok, settings, how)
    elif args.prompts:
        decode_file(model, tok, args, settings, how)
    else:
        decode_one(model, tok, args, settings, how)


if __name__ == "__main__":
    run_cli(main)
