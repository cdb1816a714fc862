"""Decoding: a short reference that reads like the papers, and the fast decoder that everything runs on.
    outs = generate(model, prompts, gen_len=48, block_len=16, policy="threshold", threshold=0.9, cache="none")
    python sample.py --model tiny --prompt "..." --show    # or --html a.html; --prompts FILE
A response of L tokens starts as L masks and is filled block by block. Every forward scores the masked
positions of the current block and the policy decides which of them to reveal: see `POLICIES` below, each with
the paper's rule above it. A policy of your own is one function and one entry there, nothing else.
The caches are Fast-dLLM's, dInfer's (vicinity) and SDAR's (exact). The first forward of a block runs over the
whole canvas, refreshes all keys and values, and also reveals. The following forwards recompute
    none        the whole canvas: exact, the oracle
    prefix      from the block's start to the end of the canvas; everything before is stale
    dual        the block only; everything before and after is stale
    vicinity    the block and `vicinity` tokens on either side
    exact       (block-causal models) the block only: nothing before depends on it. A finished block's keys
                are committed by the next block's first forward, which also runs over that block"""
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cli  # first
import torch
import torch.nn.functional as F

import data
import lora
from cli import UserError, option, run_cli
from layers import M_MMAP_THRESHOLD, for_decoding, linear, mallopt, with_linear
from model import (UNKNOWN, KVCache, ModelOptions, config_of, decoding_defaults, default_device, load,
                   first_position, in_blocks, in_first_block, local_weights, n_content, stale_hidden,
                   with_response)

CACHES = ("none", "prefix", "dual", "vicinity", "exact")
SCORES = ("confidence", "entropy", "margin")
COMPILE = dict(fullgraph=True, dynamic=False)  # a graph break is an error
STALE = 2**40  # forwards that no row has


@dataclass(frozen=True)
class Decoding:
    gen_len: int = 256      # response length L, tokens [256; tiny 48]
    block_len: int = 32     # block size K, tokens [32; tiny 16; SDAR: its own]
    policy: str = option("threshold", choices=lambda: POLICIES)  # rule of reveal [threshold; collect: static]
    threshold: float = 0.9  # confidence (threshold), f (factor) or nats (entropy, multiblock)
    per_step: int = 1       # positions per forward of the static policy
    steps: int = 0          # static: forwards per block, instead of per_step; dream: in all (0: gen_len)
    eps: float = 1e-3       # dream: the last time
    block_add: float = 0.1  # multiblock: revealed share of the last block at which the next one joins
    cache_delay: int = 0    # multiblock, prefix cache: forwards between a block's end and its being cached
    refresh: int = 0        # multiblock, prefix cache: forwards between refreshes (0: when a block is cached)
    cache: str = option("dual", choices=CACHES)  # what a forward recomputes [dual; tiny none; SDAR exact]
    vicinity: int = 16      # tokens on either side of the block that the vicinity cache recomputes
    score: str = option("confidence", choices=SCORES)  # how static and dream rank positions
    temperature: float = 0.0  # of the token choice; 0 = greedy. Confidence is always taken at temperature 1
    top_p: float = 1.0      # nucleus of the token choice
    top_k: int = 0          # the token choice is among the k best (0: all)
    seed: int = 0           # of the token choice; prompt i draws from its own stream (seed, i)
    no_eos: bool = False    # never choose an id that ends a response (LLaDA's logits_eos_inf)
    late_eos: bool = False  # static, threshold, factor, dream: such an id is revealed behind all others
    early_stop: bool = True  # end a row once everything before its first EOS is revealed

    def __post_init__(self):
        for name, allowed in dict(policy=POLICIES, cache=CACHES, score=SCORES).items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.block_len < 0:
            raise UserError(UNKNOWN)
        cli.check_numbers(vars(self))
        policy = POLICIES[self.policy]
        if self.policy == "threshold" and self.threshold >= 2:  # between 1 and 2: token by token
            raise UserError(f"threshold {self.threshold} is a confidence: it must be at most 1")
        if self.cache not in policy.caches:
            raise UserError(f"cache {self.cache!r}: policy {self.policy} takes {' or '.join(policy.caches)}")
        if self.late_eos and "late_eos" not in policy.reads:
            raise UserError(f"late_eos with policy {self.policy}, which does not read it: --no-late_eos")
        if policy.one_block:  # by vars(), since this class is frozen
            vars(self).update(block_len=self.gen_len)
        if not policy.whole_response:
            vars(self).update(cache_delay=0, refresh=0)

    @property
    def scored_len(self):
        """Positions that a forward may reveal, from the start of its window."""
        return self.gen_len if POLICIES[self.policy].whole_response else self.block_len


@dataclass
class Output:
    ids: torch.Tensor    # (L,) int64
    order: torch.Tensor  # (L,) int64, 0-based forward that revealed the position; -1: it was given
    rank: torch.Tensor   # (L,) int64, a permutation: order with ties broken by entropy, lowest first
    conf: torch.Tensor   # (L,) fp32, probability of the token when it was revealed (1 for a filled EOS tail)
    nfe: int             # forwards spent on this row, refreshes included

    def n_tokens(self, eos_ids):
        """Tokens before the first EOS: what TPF and tok/s count."""
        return n_content(self.ids, eos_ids)


def pick_tokens(logits, cfg, s, noise=None):
    """logits, noise (..., V) -> token (never the mask), confidence, entropy in nats, score; all (...)."""
    logits = logits.float().clone() if s.no_eos else logits.float()
    for i in cfg.eos_ids * s.no_eos:
        logits[..., i] = -1e9  # a number: infinity times a probability of 0 is none
    lse = logits.logsumexp(-1, keepdim=True)
    entropy = lse[..., 0] - (logits - lse).exp_().mul_(logits).sum(-1)  # in place: arrays of (..., V)
    choice = logits.clone()
    choice[..., cfg.mask_id] = -torch.inf
    if s.temperature > 0:
        choice = nucleus(choice / s.temperature, s.top_p)
        if 0 < s.top_k < choice.shape[-1]:
            least = choice.topk(s.top_k, -1).values[..., -1:]
            choice = choice.masked_fill(choice < least, -torch.inf)
        choice = choice - (-noise.log()).log()  # Gumbel argmax
    token = choice.argmax(-1, keepdim=True)
    confidence = (logits.gather(-1, token) - lse).exp()[..., 0]
    score = confidence
    if s.score == "entropy":
        score = -entropy
    if s.score == "margin":
        first, second = (logits.topk(2, -1).values - lse).exp().unbind(-1)
        score = first - second
    if s.late_eos:
        ends = sum(token[..., 0] == i for i in cfg.eos_ids).bool()
        confidence, score = confidence.masked_fill(ends, 0), score.masked_fill(ends, -1e9)
    return token[..., 0], confidence, entropy, score


def nucleus(logits, top_p):
    """Keep the fewest tokens whose probability reaches top_p together; equal ones stay or go together."""
    if top_p >= 1:
        return logits
    p = logits.softmax(-1)
    least, above = torch.zeros_like(p[..., :1]), p.amax(-1, keepdim=True)
    for _ in range(24):  # bisection: no sort of the vocabulary, and it compiles
        middle = (least + above) / 2
        enough = torch.where(p >= middle, p, 0).sum(-1, keepdim=True) >= top_p
        least, above = torch.where(enough, middle, least), torch.where(enough, above, middle)
    return logits.masked_fill(p < least, -torch.inf)


def row_key(seed, stream):
    """The 32-bit key of a prompt's random numbers: the same alone and in any batch."""
    return (seed * 1_000_003 + stream) % 2**32


def uniform_noise(key, nfe, positions, n_vocab):
    """key, nfe (R, 1), positions (R, W) int64 -> uniform numbers in (0, 1), fp32 (R, W, V), no generator."""
    def mix(x):  # an integer hash of 32 bits, kept in int64
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return x ^ (x >> 15)
    stream = mix(mix(key) + nfe & 0xFFFFFFFF)
    index = positions[..., None] * n_vocab + torch.arange(n_vocab, device=key.device)
    x = mix(stream[..., None] ^ index)
    return ((x >> 9).float() + 0.5) / 2**23


@dataclass
class Forward:
    """What a policy decides from: the scores of W positions in R rows, and how far the rows are."""
    confidence: torch.Tensor  # (R, W) fp32, probability of the token that would be revealed
    entropy: torch.Tensor     # (R, W) fp32, of the predicted distribution, nats
    score: torch.Tensor       # (R, W) fp32, what Decoding.score says: higher is better
    masked: torch.Tensor      # (R, W) bool: the policy chooses among these
    index: torch.Tensor       # (R, W) int64, position in the response, which has those from 0 to L - 1
    response: torch.Tensor    # (R, L) bool, what is masked in the whole response
    threshold: torch.Tensor   # (R, 1) fp32
    tries: torch.Tensor       # (R, 1) int64, forwards that the window has had before
    memory: torch.Tensor      # (R, Policy.memory) int64, the policy's own; it may put a new tensor here


@dataclass(frozen=True)
class Policy:
    """A function that chooses, and what the decoders must know about it."""
    choose: Callable              # (Forward, Decoding) -> (R, W) bool: what to reveal; not for ever nothing
    reads: str = " ".join(Decoding.__annotations__)  # fields of Decoding that it, or its score, depends on
    memory: int = 0               # numbers that it keeps for a row between forwards; they begin as 0
    one_block: bool = False       # the response is one block
    whole_response: bool = False  # it chooses in all blocks that are not cached, not in one block only
    caches: tuple = CACHES        # those that it works with
    block_causal: bool = True     # it also works where earlier blocks do not see later ones
    known: Callable = lambda s, n_masked: None  # forwards that n_masked masks of a block take, where known


def place_of(score, among):
    """Places 0, 1, ... (R, W) of the candidates `among` (R, W) bool, best score first, ties left to right."""
    score = score.masked_fill(~among, -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def at_least_one(chosen, score, among):
    """`chosen`, and where a row has chosen none of `among`, the best of these, the leftmost of equals."""
    none = ~(chosen & among).any(1, keepdim=True)
    best = score.masked_fill(~among, -torch.inf).argmax(1, keepdim=True)
    return chosen | (torch.zeros_like(chosen).scatter(1, best, none) & among)


def static_policy(now, s):  # LLaDA's generate(): the `per_step` best, or a block in `steps` forwards
    n = s.per_step
    if s.steps:  # equal shares of the block, and the first forwards take what remains
        in_response = (now.index >= 0) & (now.index < s.gen_len)
        size = in_response.sum(1, keepdim=True)
        n = size // s.steps + (now.tries < size % s.steps)
    return place_of(now.score, now.masked) < n


def static_forwards(s, n_masked):
    """The static policy takes a fixed number of forwards, unless an EOS may end the row before."""
    per_forward = math.ceil(s.block_len / s.steps) if s.steps else s.per_step
    return None if s.early_stop else math.ceil(n_masked / per_forward)


def threshold_policy(now, s):  # Fast-dLLM: all with c >= threshold, and the best one in any case
    return at_least_one(now.confidence >= now.threshold, now.confidence, now.masked)


def factor_policy(now, s):  # Fast-dLLM: the n best, n >= 1 the largest with c_n >= 1 - f / (n + 1)
    n = place_of(now.confidence, now.masked) + 1  # the position is the n-th best
    passes = now.masked & (now.confidence >= 1 - now.threshold / (n + 1))
    n_best = torch.where(passes, n, 1).amax(1, keepdim=True)
    n_masked = now.masked.sum(1, keepdim=True)
    all_but_one = n_best == n_masked - 1  # the published code then reveals the last one, too
    return (n <= n_best) | all_but_one


def entropy_policy(now, s):  # d3LLM, TAD: all with H < threshold, or the lowest one
    return at_least_one(now.entropy < now.threshold, -now.entropy, now.masked)


def dream_policy(now, s):  # Dream's: from time t to s the share 1 - s / t of the masks, all at the last step
    steps = s.steps or s.gen_len
    t = torch.linspace(1, s.eps, steps + 1, device=now.masked.device)  # fp32, as the published code rounds
    i = now.tries.clamp(max=steps - 1)
    share = 1 - t[i + 1] / t[i]
    n_masked = now.masked.sum(1, keepdim=True)
    n = torch.where(i == steps - 1, n_masked, (n_masked * share).long())
    return place_of(now.score, now.masked) < n


def multiblock_policy(now, s):  # D2F, d3LLM, TAD: several blocks at once; memory: how many take part
    masks = by_block(now.response, s).sum(2)  # (R, blocks)
    size = by_block(torch.ones_like(now.response), s).sum(2)
    revealed = (size - masks) / size
    last = (now.memory - 1).clamp(min=0)  # first one block, and one more when it is `block_add` revealed
    joins = revealed.gather(1, last) >= min(s.block_add, 1.0)
    now.memory = (now.memory.clamp(min=1) + joins).clamp(max=masks.shape[1])
    block = now.index // s.block_len  # (R, W)
    candidates = now.masked & (block < now.memory)  # of them all with H < threshold, or the lowest one
    reveal = candidates & (now.entropy < now.threshold)
    reveal = at_least_one(reveal, -now.entropy, candidates)
    first = block.masked_fill(~candidates, s.gen_len).amin(1, keepdim=True)  # in which one is revealed, too
    return at_least_one(reveal, -now.entropy, candidates & (block == first))


def by_block(x, s):
    """x (R, W) -> (R, blocks, K), the last block filled up with zeros."""
    missing = -x.shape[1] % s.block_len
    return F.pad(x, (0, missing)).unflatten(1, (-1, s.block_len))


POLICIES = {
    "static": Policy(static_policy, "block_len per_step steps score late_eos", known=static_forwards),
    "threshold": Policy(threshold_policy, "block_len threshold late_eos"),  # above 1: one per forward
    "factor": Policy(factor_policy, "block_len threshold late_eos"),
    "entropy": Policy(entropy_policy, "block_len threshold"),
    "dream": Policy(dream_policy, "steps eps score late_eos", one_block=True, block_causal=False),
    "multiblock": Policy(multiblock_policy, "block_len threshold block_add cache_delay refresh", memory=1,
                         whole_response=True, caches=("none", "prefix"), block_causal=False),
}


def check_used(*decodings):
    """UserError for an option of the command line that none of the decodings depends on."""
    used = {*"gen_len policy cache temperature seed no_eos late_eos early_stop".split()}
    for s in decodings:
        reads = {*POLICIES[s.policy].reads.split(), s.cache}  # a cache's width has its name: vicinity
        if s.steps:
            reads -= {"per_step"}
        if s.cache == "none":
            reads -= {"cache_delay", "refresh"}
        if s.temperature:
            reads |= {"top_p", "top_k"}
        used |= reads
    needs = dict(vicinity="cache vicinity", per_step="policy static without --steps",
                 top_p="a temperature above 0", top_k="a temperature above 0",
                 refresh="policy multiblock, cache prefix", cache_delay="policy multiblock, cache prefix")
    for name in Decoding.__annotations__:
        readers = [policy for policy, entry in POLICIES.items() if name in entry.reads.split()]
        wanted = needs.get(name, f"policy {' or '.join(readers)}")
        cli.refuse_if(name not in used, name, f"is for {wanted}; here policy {s.policy}, cache {s.cache}")


def choose(model, h, s, key, nfe, positions, *state):
    """States h (R, W, C) -> tokens (R, W), the Forward, chosen (R, W). state: of Forward, `masked` on."""
    noise = None
    if s.temperature > 0:
        noise = uniform_noise(key, nfe, positions, model.cfg.vocab_size)
    token, *scores = pick_tokens(model.head(h), model.cfg, s, noise)
    now = Forward(*scores, *state)
    return token, now, POLICIES[s.policy].choose(now, s) & now.masked


@torch.no_grad()
def reference(model, prompt, **settings):
    """Decode one prompt (P,) int64 with plain code and no cache -> Output: the oracle for `generate`."""
    s = Decoding(**settings)
    policy = POLICIES[s.policy]
    model = in_blocks(model, s.block_len)
    cfg = model.cfg
    P, x = with_response(prompt, cfg, s.gen_len)
    total, masked = len(x), x == cfg.mask_id
    order, conf = masked.long() - 1, torch.ones(total)
    revealed = (~masked).nonzero()[P:, 0].tolist()
    key = torch.tensor([[row_key(s.seed, 0)]])
    threshold = torch.tensor([[s.threshold]])
    memory = torch.zeros(1, policy.memory).long()
    positions = (torch.arange(total) + first_position(cfg, P))[None]
    start = P - in_first_block(cfg, P)
    nfe = tries = 0
    refreshed = None
    while masked.any():
        end = total if policy.whole_response else min(start + s.block_len, total)
        if s.cache in ("none", "exact") or refreshed is None:
            refreshed, refreshed_at = x.clone(), nfe
            h = model.hidden(x[None], positions=positions)[:, start:end]
        else:
            left = min(start, reach(s, cfg))
            stop = {"dual": end, "prefix": total, "vicinity": min(end + s.vicinity, total)}[s.cache]
            h = stale_hidden(model, refreshed, x, positions, slice(start - left, stop))
            h = h[:, left:left + end - start]
        window = torch.arange(start, end)[None]
        token, now, chosen = choose(model, h, s, key, torch.tensor([[nfe]]), positions[:, start:end],
                                    masked[window], window - P, masked[None, P:], threshold,
                                    torch.tensor([[tries]]), memory)
        memory, at = now.memory, window[chosen]
        x[at] = token[chosen]
        conf[at] = now.confidence[chosen]
        order[at] = nfe
        masked[at] = False
        revealed += at[now.entropy[chosen].argsort(stable=True)].tolist()  # the lowest first
        first_eos = P + n_content(x[P:], cfg.eos_ids)
        if s.early_stop and (policy.whole_response or not masked[:first_eos].any()):
            at = first_eos + masked[first_eos:].nonzero()[:, 0]  # they become EOS
            x[at] = cfg.eos_ids[0]
            order[at] = nfe
            masked[at] = False
            revealed += at.tolist()
        nfe += 1
        tries += 1
        for at in range(start, total, s.block_len):  # the window moves behind full blocks
            block = slice(at, at + s.block_len)
            if masked[block].any() or nfe - order[block].max() <= s.cache_delay:
                break
            start, tries, refreshed = block.stop, 0, None
        if s.refresh and nfe - refreshed_at >= s.refresh:
            refreshed = None
    rank = torch.tensor(revealed).argsort()  # the place of each position in this list
    return Output(x[P:], order[P:], rank, conf[P:], nfe)


def reach(s, cfg):
    """Columns left of the block that a window takes along: keys to commit, a shifted model's neighbour."""
    return max({"vicinity": s.vicinity, "exact": s.block_len}.get(s.cache, 0), int(cfg.shift))


def generate(model, prompts, batch_size=32, **options):
    """Decode a list of prompts (P,) int64 -> list of Output. options: those of stream, fields of Decoding.
    A prompt's first mask, if any, begins its response, of which only masks are decoded; EOS follows."""
    return [out for _, out in sorted(stream(model, prompts, batch_size, **options))]


def stream(model, prompts, batch_size=32, progress=False, streams=None, compiled=None, sync_every=0,
           **settings):
    """Like generate, but yields (prompt index, Output) as rows finish; waiting prompts take their places.
    streams: of random numbers, one per prompt [its index]. compiled: torch.compile the step [on a GPU].
    sync_every: forwards between two looks at the device, for which a finished row waits [4; on a CPU 1]."""
    s = Decoding(**settings)
    if prompts:
        yield from decode(Batch(model, prompts, s, batch_size, streams, compiled, sync_every), progress)


@torch.no_grad()
def decode(batch, progress=False):
    """Run a batch over all of its prompts -> (prompt index, Output) as they finish."""
    waiting = iter(range(len(batch.prompts)))
    bar = cli.progress_bar(None, "decode", len(batch.prompts), progress, unit="sample", smoothing=0)
    while True:
        finished = batch.finished()  # the one place where the host waits for the device
        free = [row for row, owner in enumerate(batch.owner) if owner is None]
        batch.admit(dict(zip(free, waiting)))
        batch.run()  # the device is busy while the finished ones are looked at
        bar.update(len(finished))
        for i, out in finished:
            if not out.conf.isfinite().all():
                raise UserError(f"the model's logits for prompt {i} are not finite: its weights hold NaN or "
                                f"inf, or overflow in this dtype")
            yield i, out
        if not batch.busy():
            break
    bar.close()


def check_prompts(cfg, prompts, s):
    if s.cache == "exact" and not cfg.block_len:
        raise UserError(f"cache 'exact' is for block-causal models (SDAR): a {cfg.family} model attends to "
                        f"later blocks; choose none, prefix, dual or vicinity")
    if cfg.block_len and not POLICIES[s.policy].block_causal:
        raise UserError(f"policy {s.policy} is for bidirectional models: earlier blocks of a {cfg.family} "
                        f"model do not see later ones; choose threshold or static")
    for i, p in enumerate(prompts):
        n = n_content(p, [cfg.mask_id])
        if len(p) > n + s.gen_len:
            raise UserError(f"prompt {i} holds {len(p) - n} tokens of its response: raise gen_len")
        if n + s.gen_len > cfg.max_len:
            raise UserError(f"prompt {i} has {n} tokens; with gen_len {s.gen_len} that exceeds "
                            f"the model's {cfg.max_len}: shorten the prompt or gen_len")
        if len(p) and (p.min() < 0 or p.max() >= cfg.vocab_size):
            raise UserError(f"prompt {i} holds token ids outside 0..{cfg.vocab_size - 1}: wrong tokeniser?")


@dataclass
class Rows:
    """R rows that are being decoded, T columns each: [padding, prompt | response | a column nobody reads]."""
    valid: torch.Tensor      # (R, T) bool, prompt and response; no forward changes it and the next three
    positions: torch.Tensor  # (R, T) int64, from the first prompt token
    key: torch.Tensor        # (R, 1) int64, of its random numbers
    threshold: torch.Tensor  # (R, 1) fp32; a tensor, so that a curve over thresholds compiles once
    canvas: torch.Tensor     # (R, T) int64, the tokens
    masked: torch.Tensor     # (R, T) bool
    order: torch.Tensor      # (R, T) int64, see Output
    conf: torch.Tensor       # (R, T) fp32, see Output
    entropy: torch.Tensor    # (R, T) fp32, when the position was revealed; infinite in a filled EOS tail
    start: torch.Tensor      # (R, 1) int64, the window's first column: of the block, or of what is not cached
    nfe: torch.Tensor        # (R, 1) int64
    tries: torch.Tensor      # (R, 1) int64, forwards of the window so far
    memory: torch.Tensor     # (R, Policy.memory) int64
    age: torch.Tensor        # (R, 1) int64, forwards since its keys were stored, or STALE

    @staticmethod
    def new(prompts, s, cfg, T):
        """prompts: (length, ids and those of a response, random stream) -> rows of T columns, on the CPU."""
        P = T - 1 - s.gen_len
        length = torch.tensor([[n] for n, *_ in prompts])
        column = torch.arange(T).expand(len(prompts), T)
        position, used = column - P + length, column < T - 1
        canvas = torch.full_like(column, cfg.pad_id)
        for row, (n, ids, _) in zip(canvas, prompts):
            row[P - n:-1] = torch.as_tensor(ids)
        masked = used & (column >= P) & (canvas == cfg.mask_id)
        zero, ones = torch.zeros_like(length), torch.ones(column.shape)
        return Rows(valid=used & (position >= 0),
                    positions=position.clamp(min=0) + first_position(cfg, length),
                    key=torch.tensor([[row_key(s.seed, stream)] for *_, stream in prompts]),
                    threshold=zero + float(s.threshold),
                    canvas=canvas, masked=masked, order=masked.long() - 1, conf=ones, entropy=ones * math.inf,
                    start=zero + P - in_first_block(cfg, length), nfe=zero, tries=zero,
                    memory=zero.repeat(1, POLICIES[s.policy].memory), age=zero + STALE)

    def window(self, width, left=0):
        """Columns (R, left + width) from `left` before the window; the last stands for all behind it."""
        columns = self.start + torch.arange(-left, width, device=self.start.device)
        return columns.clamp(max=self.canvas.shape[1] - 1)


ROWS = tuple(Rows.__annotations__)  # torch 2.11 cannot trace vars() of an object


def step(model, x, cache, s, rows, width, finish):  # finish: conclude(), below
    """One forward and what it reveals, written into the Rows x: tensors of fixed shapes, nothing that the
    host must wait for. A row that has nothing to do in it stays as it is. rows (N,) int64: over the whole
    canvas of these rows of x, whose keys go into the cache, if any. rows None: over `width` columns from
    each row's window start (and `reach` columns left of it). Only the first s.scored_len are scored."""
    before = x if rows is None else Rows(*(getattr(x, name)[rows] for name in ROWS))
    active = before.masked.any(1, keepdim=True)
    scored = before.window(min(width, s.scored_len))
    if rows is None:
        active = active & (before.age < (s.refresh or STALE))
        left = reach(s, model.cfg)
        columns = before.window(width, left)
        h = model.hidden(before.canvas.gather(1, columns), cache=cache, cols=columns)
        h = h[:, left:left + scored.shape[1]]
    else:
        h = model.hidden(before.canvas, valid=before.valid, positions=before.positions, cache=cache,
                         rows=rows, out=scored)
    finish(model, x, s, rows, before, active, scored, h)


def conclude(model, x, s, rows, before, active, scored, h):
    """The end of a step: what the states h (R, W, C) of the scored columns reveal, written into x."""
    after = Rows(*(getattr(before, name) for name in ROWS))  # the same tensors; a change is a new tensor
    if rows is not None:
        after.age = torch.zeros_like(before.age)  # copies of the first row, which fill up, write its result
        source = torch.where(rows == rows[0], 0, torch.arange(len(rows), device=rows.device))
    reveal(model, after, s, scored, h)
    advance(after, s)
    for name in ROWS:
        old, new, target = (getattr(of, name) for of in (before, after, x))
        if new is old:
            continue
        result = torch.where(active, new, old)
        if rows is None:
            target.copy_(result)
        else:
            target[rows] = result[source]


def reveal(model, x, s, columns, h):
    """Score the columns (R, W) with their hidden states h (R, W, C) and reveal what the policy chooses."""
    P = x.canvas.shape[1] - 1 - s.gen_len
    positions = x.positions.gather(1, columns)
    token, now, chosen = choose(model, h, s, x.key, x.nfe, positions, x.masked.gather(1, columns),
                                columns - P, x.masked[:, P:-1], x.threshold, x.tries, x.memory)
    x.memory = now.memory
    known = dict(canvas=token, conf=now.confidence, entropy=now.entropy, order=x.nfe, masked=False)
    for name, value in known.items():
        whole = getattr(x, name)
        inside = torch.where(chosen, value, whole.gather(1, columns))
        setattr(x, name, whole.scatter(1, columns, inside))
    if not s.early_stop:
        return
    is_eos = ~x.masked & sum(x.canvas == i for i in model.cfg.eos_ids).bool()
    is_eos[:, :P] = False
    behind = is_eos.cumsum(1) > 0  # an EOS, or behind one
    fill = x.masked & behind
    if not POLICIES[s.policy].whole_response:  # else at once, as d3LLM does
        fill &= ~(x.masked & ~behind).any(1, keepdim=True)  # where all before the first EOS is revealed
    x.canvas = torch.where(fill, model.cfg.eos_ids[0], x.canvas)
    x.order = torch.where(fill, x.nfe, x.order)
    x.masked = x.masked & ~fill


def advance(x, s):
    """After a forward: windows move behind their first blocks that are full, and the keys become stale."""
    x.nfe = x.nfe + 1
    columns = x.window(s.gen_len + s.block_len)  # also of the last block
    full = ~by_block(x.masked.gather(1, columns), s).any(2)  # (R, blocks)
    full_at = by_block(x.order.gather(1, columns), s).amax(2)
    passed = full & (x.nfe - full_at > s.cache_delay)
    n_passed = passed.long().cumprod(1).sum(1, keepdim=True)
    stays = n_passed == 0
    x.start = x.start + n_passed * s.block_len
    x.tries = (x.tries + 1) * stays
    committed = n_passed == (s.cache == "exact")  # a block that was given whole may lie between
    x.age = torch.where(stays | committed, x.age + 1, STALE)


class Batch:
    """The rows of a batch, the cache, and the host's picture of them as of its last look."""
    def __init__(self, model, prompts, s, batch_size, streams=None, compiled=None, sync_every=0):
        check_prompts(model.cfg, prompts, s)
        self.dev = model.embed.weight.device
        self.sync_every = sync_every if sync_every > 0 else 4 if self.dev.type == "cuda" else 1
        self.compiled = self.dev.type == "cuda" if compiled is None else compiled
        self.model = in_blocks(for_decoding(model), s.block_len)
        self.s = s
        given = (with_response(p.cpu(), self.model.cfg, s.gen_len) for p in prompts)
        streams = streams or range(len(prompts))  # lists: no tensor is read later
        self.prompts = [(n, ids.tolist(), stream) for (n, ids), stream in zip(given, streams)]
        n_rows, T = len(prompts), max(map(len, prompts)) + reach(s, model.cfg) + s.gen_len + 1
        if self.compiled:  # prompts in any number and of many lengths, few shapes
            n_rows = 1 << (n_rows - 1).bit_length()  # the next power of two
            T = 32 * math.ceil(T / 32)
        n_rows = min(batch_size, n_rows)
        lean = n_rows == 1 and model.only_decodes
        mallopt(M_MMAP_THRESHOLD, 1 << (19 if lean else 25))  # large arrays of one prompt are given back
        self.P = T - s.gen_len - 1  # where the responses begin
        empty = Rows.new([(0, model.cfg.eos_ids[:1] * s.gen_len, 0)] * n_rows, s, self.model.cfg, T)
        self.rows = Rows(*(t.to(self.dev).clone() for t in vars(empty).values()))
        self.cache = None
        if s.cache != "none":
            dtype = model.embed.weight.dtype
            self.cache = KVCache(self.model.cfg, self.rows.valid, self.rows.positions, dtype)
        self.owner = [None] * n_rows     # prompt in each row; None: the row is free
        self.fresh = [False] * n_rows    # its keys are as the cache wants them: no refresh now
        self.start = [self.P] * n_rows   # first column of the row's window
        self.left = [0] * n_rows         # masks in its first block
        self.forwards = self.looks = 0   # what was run; how often the host waited for the device
        self.capture = self.compiled and self.dev.type == "cuda"
        whole, end = step, conclude
        if self.compiled:  # a graph for every shape and setting; beyond the limit fullgraph=True raises
            limits = torch._dynamo.config
            limits.recompile_limit = limits.accumulated_recompile_limit = 1000
        if self.capture:  # its parts, in seconds instead of minutes; a CUDA graph holds the whole step
            end = torch.compile(conclude, **COMPILE)
            self.model = with_linear(self.model, linear)  # a copy: others may decode eagerly
            for block in self.model.blocks:
                block.compile(**COMPILE)
        elif self.compiled:
            whole = torch.compile(step, **COMPILE)
        self.step = partial(whole, self.model, self.rows, self.cache, s, finish=end)
        self.graphs = {}  # (rows, width) -> None after the first time, and then the step as a CUDA graph
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None

    def busy(self):
        """The rows that hold a prompt."""
        return [row for row, owner in enumerate(self.owner) if owner is not None]

    def finished(self):
        """Look at the device -> [(prompt index, Output)] of the rows that are finished; they are free now."""
        if not self.busy():
            return []
        x, s = self.rows, self.s
        live = x.masked.any(1, keepdim=True)
        left = x.masked.gather(1, x.window(s.block_len)).sum(1, keepdim=True)
        facts = [live, x.age < (s.refresh or STALE), x.start, left, x.nfe]
        wanted = x.canvas, x.order, x.conf, x.entropy
        results = [t[:, self.P:-1] for t in wanted]
        table = torch.cat([t.double() for t in facts + results], 1).to("cpu")  # one copy; fp64 holds all
        self.looks += 1
        live, self.fresh, self.start, self.left, nfe = table[:, :len(facts)].long().T.tolist()
        results = table[:, len(facts):].unflatten(1, (len(results), s.gen_len))
        outs = []
        for row in self.busy():
            if live[row]:
                continue
            index, self.owner[row] = self.owner[row], None
            ids, order = results[row, :2].long()
            conf, entropy = results[row, 2:].float()
            revealed = entropy.argsort(stable=True)  # the positions, and then in the order of their reveal
            revealed = revealed[order[revealed].argsort(stable=True)]
            outs.append((index, Output(ids, order, revealed.argsort(), conf, nfe[row])))
        return outs

    def admit(self, places):
        """places {row: prompt index}: put waiting prompts into free rows."""
        if not places:
            return
        s, cfg = self.s, self.model.cfg
        prompts = [self.prompts[index] for index in places.values()]
        for (row, index), (n, ids, _) in zip(places.items(), prompts):
            shared = in_first_block(cfg, n)
            self.owner[row], self.fresh[row] = index, False
            self.start[row] = self.P - shared
            self.left[row] = ids[n - shared:n - shared + s.block_len].count(cfg.mask_id)
        new = Rows.new(prompts, s, cfg, self.rows.canvas.shape[1])
        rows = torch.tensor(list(places)).to(self.dev, non_blocking=True)
        for name, t in vars(new).items():
            getattr(self.rows, name)[rows] = t.to(self.dev, non_blocking=True)

    def run(self):
        """`sync_every` forwards, or those that are known to be needed; the first refreshes stale keys."""
        s, known, busy = self.s, POLICIES[self.s.policy].known, self.busy()
        if not busy:
            return
        stale = [row for row in busy if self.cache and not self.fresh[row]]
        n, blocks = self.sync_every, [known(s, self.left[row]) for row in busy]
        if None not in blocks:
            n = max(n, min(blocks))
            if not self.cache or s.cache == "exact":  # a row goes on into its next blocks
                end = self.P + s.gen_len - s.block_len
                blocks = [k + known(s, max(0, end - self.start[row])) for k, row in zip(blocks, busy)]
            n = min(n, max(blocks))
        if stale:
            self.forward(self.row_numbers(stale), s.scored_len)
        rows, width = None, self.window_width(min(self.start[row] for row in busy))
        if not self.cache:
            rows, width = self.row_numbers(busy), s.scored_len
        for _ in range(n - bool(stale)):
            self.forward(rows, width)

    def window_width(self, start):
        """Columns of a window; prefix: to the canvas's end for the slowest row, at `start`, in few widths."""
        s, width = self.s, self.s.block_len
        if s.cache == "vicinity":
            width += s.vicinity
        if s.cache == "prefix":
            while width < self.P + s.gen_len - start:
                width *= 2
            width = min(width, s.gen_len + (s.block_len if self.model.cfg.block_len else 0))
        return width

    def row_numbers(self, rows):
        """As a tensor, filled up with the first one to a length that is no reason to compile again."""
        n = len(rows)
        if self.capture:
            n = 1 << (n - 1).bit_length()  # the next power of two
        if self.compiled:
            n = min(max(n, 2), len(self.owner))
        numbers = torch.tensor(rows + rows[:1] * (n - len(rows))).to(self.dev, non_blocking=True)
        if self.compiled and not self.capture and n > 1:
            torch._dynamo.mark_dynamic(numbers, 0)
        return numbers

    def forward(self, rows, width):
        """One step, see there; on a GPU the second and later ones of a shape replay a CUDA graph."""
        self.forwards += 1
        shape = (None if rows is None else len(rows), width)
        if not self.capture or shape not in self.graphs:  # the first time it is compiled, and warms up
            self.graphs[shape] = None
            return self.step(rows, width)
        if self.graphs[shape] is None:
            graph, kept = torch.cuda.CUDAGraph(), None if rows is None else rows.clone()
            with torch.cuda.graph(graph, pool=self.pool):  # they replay one after the other
                self.step(kept, width)
            self.graphs[shape] = graph, kept
        graph, kept = self.graphs[shape]
        if kept is not None:
            kept.copy_(rows)
        graph.replay()


def show(out, tokens):
    """The decoding as text, a line per forward: masks are dots, tokens are coloured by confidence."""
    palette = [196, 202, 208, 214, 220, 190, 154, 118, 82, 46]  # red ... green
    colors = [palette[min(9, int(10 * p))] for p in out.conf.tolist()]
    lines = []
    for t in range(out.nfe):
        words = []
        for word, at, color in zip(tokens, out.order.tolist(), colors):
            if at > t:
                word = "·" * len(word)
            elif "NO_COLOR" in os.environ or not sys.stdout.isatty():
                word = word.upper() if at == t else word
            else:
                word = f"\033[{'1;' if at == t else ''}38;5;{color}m{word}\033[0m"
            words.append(word)
        lines.append(f"{t + 1:3d} | {' '.join(words)}")
    return "\n".join(lines)


def page(outs, tok, eos_ids, prompt, path):
    """Decodings {name: Output} of a prompt -> one HTML file to step through, which needs no network."""
    sides = [dict(name=name, nfe=out.nfe, n=out.n_tokens(eos_ids), order=out.order.tolist(),
                  conf=out.conf.tolist(), tokens=[tok.decode([i]) for i in out.ids.tolist()])
             for name, out in outs.items()]
    held = json.dumps(dict(prompt=prompt, sides=sides)).replace("<", "\\u003c")  # no text ends the script
    template = cli.read_text(Path(__file__).with_name("assets") / "decoding.html")
    cli.write_whole(path, template.replace("DECODINGS", held))
    print(f"written: {path}")


@dataclass
class AdaptedModel(ModelOptions):
    adapter: str = ""  # directory of a trained LoRA adapter to decode with


@dataclass
class Options(AdaptedModel):
    """decode one prompt, or a file of prompts"""
    prompt: str = ""  # user turn [a problem of the tiny task]
    system: str = ""  # system turn before it, and before each of --prompts
    raw: bool = False  # all of these without the chat template
    infill: str = ""  # the response, in which only [MASK], or [MASK:8] of 8 tokens, is decoded
    show: bool = False  # draw each forward in colour
    html: str = ""  # page to write in which you step through the forwards; with --adapter also the base's
    prompts: str = ""  # file of prompts: .jsonl, or text with one per line
    max_prompt: int | None = None  # leave out --prompts that are longer, tokens
    to: str = ""  # where the responses of --prompts FILE.txt go [FILE.responses.jsonl]
    batch_size: int = 32  # prompts decoded at once
    compiled: bool | None = None  # torch.compile [on a GPU]


def load_both(args):
    """-> the model that is asked for, on this rank's own GPU and with its adapter, and its tokeniser."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    adapter = getattr(args, "adapter", "")
    model = load(args.model, *default_device(), args.revision, only_decodes=not adapter)
    if adapter:
        lora.load(model, adapter)
    return model, data.load_tokenizer(args.model, args.revision)


def holes(infill, tok, mask_id):
    """A response with holes -> ids of the text before the first one, and of all: [MASK:8] is eight masks."""
    pieces = re.split(r"\[MASK(?::([1-9]\d{0,3}))?\]", infill)  # text, number of masks, text ...
    if len(pieces) == 1 or "[MASK:" in "".join(pieces[::2]):
        raise UserError(f"--infill {infill!r} needs [MASK], or [MASK:8] for eight tokens")
    ids = [[mask_id] * int(p or 1) if i % 2 else tok.checked(tok.encode(p), p)
           for i, p in enumerate(pieces)]
    end = tok.eos_id if tok.raw else tok.chat.end_id
    return ids[0], [*sum(ids, []), end]


def response_of(out, tok, eos_ids, before=()):
    """What is kept of an Output: its text behind ids of `before`, its decoded tokens, the forwards."""
    ids = out.ids[:out.n_tokens(eos_ids)].tolist()
    decoded = out.order[:len(ids)] >= 0  # others were given
    return dict(response=tok.decode([*before, *ids]), tokens=int(decoded.sum()), nfe=out.nfe)


def decode_one(model, tok, prompt, args, settings):
    """Print the response to a prompt, and what --show and --html ask for."""
    ids, before = tok.prompt_ids(prompt), []
    if args.infill:
        before, given = holes(args.infill, tok, model.cfg.mask_id)
        ids = torch.tensor(ids.tolist() + given)
    (out,) = generate(model, [ids], compiled=args.compiled, **settings)
    if args.show:
        words = [tok.decode([i]).strip() or "∅" for i in out.ids.tolist()]
        print(show(out, words))
    response, n, nfe = response_of(out, tok, model.cfg.eos_ids, before).values()
    print(f"response {response}\n{n} tokens in {nfe} forwards: {n / nfe:.2f} tokens per forward")
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        outs = {"model": out}
        if lora.adapters(model):
            with lora.off(model):
                (base,) = generate(model, [ids], compiled=args.compiled, **settings)
            outs = {"base": base, "trained": out}
        page(outs, tok, model.cfg.eos_ids, f"{prompt}\n{args.infill}".strip(), args.html)


def read_prompts(source):
    """A .jsonl of problems, whose answers are not used, or a text with a prompt per line -> rows."""
    if re.search(r"\.(jsonl|JSONL|ndjson|json|parquet|csv|tsv|xlsx)(\.gz)?(:\w+=[^/]*)?$", source.name):
        return data.load_problems(str(source))
    lines = [line for line in cli.read_text(source).split("\n") if line.strip()]
    return [dict(id=f"{source.stem}-{i}", prompt=line) for i, line in enumerate(lines)]


def decode_file(model, tok, args, settings):
    """--prompts: append a line per finished prompt to --to, or continue such a file, but no other one."""
    room = model.cfg.max_len - settings["gen_len"]
    rows = data.fitting(read_prompts(Path(args.prompts)), tok, args.max_prompt, room)
    to = Path(args.to or Path(args.prompts).with_suffix(".responses.jsonl"))
    made_by = dict(model=args.model, revision=model.revision, adapter=args.adapter,
                   weights=list(map(local_weights, (args.model, args.adapter))),
                   decoding=settings | dict(system=args.system, raw=args.raw))
    written = [*made_by, "response", "tokens", "nfe", "crc"]  # a row of an earlier run has these, too
    rows = [{key: row[key] for key in row if key not in written} for row in rows]
    ours = {r["id"]: r | made_by for r in rows}  # what a line of this run says
    cli.check_apart([args.prompts], [to])
    to.parent.mkdir(parents=True, exist_ok=True)
    to.touch()
    there = cli.read_jsonl(to, True, growing=True)
    if not all(row.get("id") in ours and row | ours[row["id"]] == row for row in there):
        raise UserError(f"{to} is of another model, settings or prompts: choose another --to or remove it")
    cli.read_jsonl(to, True, mend=True)
    done = {row["id"] for row in there}
    todo = [i for i, r in enumerate(rows) if r["id"] not in done]
    prompts = [tok.prompt_ids(rows[i]) for i in todo]
    for i, out in stream(model, prompts, args.batch_size, True, todo, args.compiled, **settings):
        cli.append_line(to, rows[todo[i]] | response_of(out, tok, model.cfg.eos_ids) | made_by)
    print(f"{len(todo)} responses written to {to}, {len(done)} were there")


def main():
    args, given = cli.parse(__doc__, Options, Decoding)
    cli.refuse_if(args.prompts, "prompt infill show html", "is for one prompt")
    cli.refuse_if(not args.prompts, "to max_prompt batch_size", "is for --prompts")
    if args.prompts and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--prompts is the work of one process: start it without torchrun")
    if args.html and Path(args.html).is_dir():
        raise UserError(f"--html {args.html} is a directory: name a file")
    defaults = decoding_defaults(config_of(args.model, args.revision))
    defaults["no_eos"] = bool(args.infill)  # behind a hole the text goes on
    decoding = Decoding(**defaults | given)
    check_used(decoding)
    model, tok = load_both(args)
    tok.system, tok.raw = args.system, args.raw
    if args.prompts:
        return decode_file(model, tok, args, vars(decoding))
    prompt = args.prompt or data.load_problems("tiny", "test", 1)[0]["prompt"]
    print(f"prompt   {prompt}")
    decode_one(model, tok, prompt, args, vars(decoding))


if __name__ == "__main__":
    run_cli(main)
