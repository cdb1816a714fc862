"""T3D: Trajectory self-distillation via Direct Discriminative Optimisation (arXiv 2602.12262).

The idea: decode problems token by token with the model itself, no ground truth, and train it on the states of
these trajectories so that few forwards suffice. Cross-entropy there (naive TD) covers every mode and averages
them; DDO discriminates instead: raise the likelihood ratio to a reference on the trajectory's tokens (real),
lower it on the reference's own guesses (fake). The reference is the student of a few steps ago.

    glossary (paper -> code)
    x0, pi         record["x0"], record["rank"]: pi_i is the 1-based rank within i's training block
    x_t            xt (B, L): the first j tokens of every block revealed, the others masked
    p_theta, p_ref logp, logp_ref (N,): log-probabilities of the rows' tokens under student and reference
    fake x0        x_hat (N,): drawn from p_ref's factorised prediction on the same x_t       (token_terms)
    ratio(x)       beta times the mean over the masked rows of log p_theta(x_i | x_t) - log p_ref(x_i | x_t)
    Eq. 5          --loss naive_td --lam 0: mean of -log p_theta(x0_i | x_t)                      (t3d_loss)
    Eq. 6          mean over states x_t of Eq. 7: drawn anew every epoch                       (make_batch)
    Eq. 7          real = -log sigma(ratio(x0)), fake = -alpha log(1 - sigma(ratio(x_hat)))      (t3d_loss)
    Eq. 8          path: -w_i log p_theta(x0_i | x_t)                                            (t3d_loss)
    Eq. 9          w_i = (B - pi_i + 1) / B, B the response tokens of i's block              (path_weights)
    Eq. 10         real + fake + lambda path (t3d_loss); App. C.1: rand_p; App. C.2: beta, refresh

What differs from the published code, and why: ids and order are stored together (it re-tokenises decoded
text); blocks count from position 0 in training as in decoding; the latest-decoded tokens are masked, as the
paper says (it masks the earliest). `--variant code` takes the code's choices. Eq. 8 is a mean over the masked
tokens here, so that lambda does not hang on the length; log-ratios are means too, `--logratio sum` is Eq. 7.
On models without blocks the whole response is one block.

    python t3d.py                                                # tiny model on a laptop CPU
    python t3d.py --model dream --data problems.jsonl            # one GPU
    torchrun --nproc_per_node=8 t3d.py --model sdar-4b         # the paper's math data, by preset
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as nt_eval
import lora
import model as nt_model
from data import example_rng, load_problems, load_tokenizer, read_trajectories, response_inputs, rollout
from model import UserError, by_chunks, run_cli


@dataclass
class Config:
    model: str = "tiny"  # preset name, hub id or directory
    revision: str = ""  # commit, branch or tag of a hub id
    out: str = ""  # output directory; default out/t3d-<model>
    overwrite: bool = False  # start anew in a directory that already holds a run
    seed: int = 0  # of the states, the fakes, the data order and the adapters
    # --- trajectories: the model's own, unfiltered
    data: str = "tiny"  # data set by name, or a .jsonl (answers are not used); see data.py --help
    n_problems: int = 0  # problems to collect on (0: all; tiny: 1000)
    max_prompt: int = 512  # problems with a longer prompt are left out, tokens
    allow_code_execution: bool = False  # only to record which rollouts on code problems are right
    trajectories: str = ""  # folder to collect into, which runs may share; default: the run's own
    gen_len: int = 256  # response length L, tokens
    block_len: int = 4  # decoding block of the rollouts, tokens; one token per forward
    collect_cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "none"  # of the rollouts
    collect_temperature: float = 0.1  # of the rollouts
    collect_seed: int = 0  # of the collector's draws
    collect_batch: int = 64  # problems decoded at once per rank
    # --- loss
    variant: Literal["paper", "code"] = "paper"  # code: fake argmax, and mask_order, state_dist, path code
    loss: Literal["t3d", "naive_td"] = "t3d"  # naive_td: Eq. 5 instead of DDO; --lam 0: alone
    train_block: int = 8  # block B of training on block-causal models (0: the model's own), tokens
    beta: float = 0.1  # scale of the log-ratio (App. C.2)
    alpha: float = 0.5  # weight of the fake term (code; Eq. 7 has 1)
    lam: float = 0.2  # lambda of Eq. 10 (0: no path term)
    logratio: Literal["mean", "sum"] = "mean"  # over the masked tokens (mean: code; sum: Eq. 7)
    fake: Literal["sample", "argmax", "expected"] = "sample"  # expected: -KL(p_ref, p_theta), no draw
    mask_order: Literal["paper", "code"] = "paper"  # paper: the latest-decoded are masked; code: the earliest
    state_dist: Literal["uniform", "code"] = "uniform"  # code: share r masked in {1, .75, .5, .25}, P ~ r^8
    path: Literal["paper", "code"] = "paper"  # weights of Eq. 9; code: first half of a block 3, second half 1
    rand_p: float = 0.1  # share of masked inputs that show a random token instead of the mask
    refresh: int = 10  # optimizer steps between refreshes of the reference
    # --- training
    full: bool = False  # train all weights instead of LoRA adapters
    lora_r: int = 128  # LoRA rank (the paper trains all weights)
    lora_alpha: int = 128  # LoRA alpha
    lora_dropout: float = 0.0  # LoRA dropout
    lr: float = 1e-5  # peak learning rate
    lr_schedule: Literal["constant", "cosine", "tail"] = "cosine"  # tail: linear to zero over the last 40%
    lr_floor: float = 0.1  # share of the peak that the schedules end at
    warmup_steps: int = 20  # linear warm-up
    weight_decay: float = 0.01  # AdamW
    clip: float = 1.0  # gradient norm
    batch_size: int = 256  # trajectories per optimizer step over all ranks
    micro_batch: int = 4  # trajectories per forward
    rounds: int = 1  # times to collect, each with the student of then; they share the steps
    epochs: int = 30  # passes over the trajectories, each with new states
    max_steps: int = 0  # stop after this many steps (0: epochs decide)
    save_every: int = 100  # steps between checkpoints, a multiple of refresh
    log_every: int = 10  # steps between log lines
    eval_problems: int = 300  # problems of the closing evaluation (tiny only; 0: none)
    fsdp: bool = False  # LoRA: shard the frozen base over ranks, where it does not fit (--full always does)
    checkpoint_blocks: bool = False  # keep only the inputs of blocks, compute the rest again: less memory
    compile: bool = False  # compile every block for training
    dry_run: bool = False  # print memory per GPU and the number of steps, load no weights


PRESETS = {
    "tiny": dict(gen_len=48, block_len=16, lora_r=32, lora_alpha=32, lr=1e-3, lr_schedule="tail",
                 lr_floor=0.0, warmup_steps=10, batch_size=64, micro_batch=64, max_steps=150, save_every=50,
                 eval_problems=128),
    "llada": dict(data="t3d-math", block_len=32),  # not in the paper
    "dream": dict(data="t3d-math", block_len=32),  # not in the paper
    "sdar": dict(data="t3d-math", full=True, collect_cache="exact", gen_len=1024),  # code: --data t3d-code
}


# --------------------------------------------------------------------------------------------------- the loss
def t3d_loss(logp, logp_ref, logp_fake, logp_fake_ref, path_w, example, n_examples, cfg):
    """The T3D objective over the masked rows of a batch -> scalar fp32, dict of its parts.

    All (N,) fp32: log-probability of the trajectory's token under student and reference; the same of the
    reference's guess (--fake expected: minus their KL, and 0); path_w the weights of Eq. 9; example int64,
    the row's example. Means over an example's rows, then over the n_examples of the global batch.
    """
    n = torch.zeros(int(example.max()) + 1, device=logp.device).index_add_(0, example, torch.ones_like(logp))

    def per_example(values, mean=True):
        total = torch.zeros_like(n).index_add_(0, example, values)
        return total / n.clamp(min=1) if mean else total
    path = -per_example(path_w * logp).sum() / n_examples  # Eq. 8
    if cfg.loss == "naive_td":
        naive = -per_example(logp).sum() / n_examples  # Eq. 5
        return naive + cfg.lam * path, dict(naive=naive.item(), path=path.item())
    here = (n > 0).float()  # an example without masked rows has no ratio
    ratio = cfg.beta * per_example(logp - logp_ref, cfg.logratio == "mean")
    ratio_fake = cfg.beta * per_example(logp_fake - logp_fake_ref, cfg.logratio == "mean")
    real = (F.softplus(-ratio) * here).sum() / n_examples  # Eq. 7: -log sigma(ratio)
    fake = cfg.alpha * (F.softplus(ratio_fake) * here).sum() / n_examples  # Eq. 7: -log(1 - sigma(ratio))
    loss = real + fake + cfg.lam * path  # Eq. 10
    return loss, dict(real=real.item(), fake=fake.item(), path=path.item())


def path_weights(pi, size, masked, cfg):
    """w (B, L) fp32 of Eq. 9. pi (B, L) 1-based rank within the block, size (B, L) of it, masked (B, L).

    code: the masked tokens of the first half of every block weigh 3 as a group and the others 1 (a group's
    weight is shared by its tokens; an empty group has none).
    """
    if cfg.path == "paper":
        return (size - pi + 1) / size  # Eq. 9
    early = masked & (2 * pi <= size)
    late = masked & ~early
    n, n_early, n_late = (m.sum(1, keepdim=True).float() for m in (masked, early, late))
    share = 3 * (n_early > 0) + (n_late > 0).float()
    w = torch.where(early, 3 / n_early.clamp(min=1), 1 / n_late.clamp(min=1))
    return w * n / share.clamp(min=1)  # the mean over the masked tokens is the mean over groups


# ---------------------------------------------------------------------------------------------- batch builder
def ranks_in_blocks(rank, n_prompt, block_len):
    """rank (B, L) int64 over the response, n_prompt list of prompt lengths -> pi, size (B, L) int64: the
    1-based rank within the position's block and the block's response tokens. block_len 0: one block.
    """
    L = rank.shape[1]
    start = torch.tensor(n_prompt)[:, None] * (block_len > 0)
    block = (start + torch.arange(L)) // (block_len or L)
    same = block[:, :, None] == block[:, None, :]
    pi = 1 + (same & (rank[:, None, :] < rank[:, :, None])).sum(-1)
    return pi, same.sum(-1)


def draw_mask(pi, size, block_len, cfg, rngs):
    """x_t: masked (B, L) bool. One number j of revealed tokens per example, the same in every block."""
    B = block_len or pi.shape[1]
    if cfg.state_dist == "code":
        share = np.array([1, .75, .5, .25])
        j = [B - round(B * float(rng.choice(share, p=share ** 8 / (share ** 8).sum()))) for rng in rngs]
    else:
        j = [int(rng.integers(B)) for rng in rngs]
    decoded = pi - 1 if cfg.mask_order == "paper" else size - pi  # (code) the earliest are masked
    masked = decoded >= torch.tensor(j)[:, None]
    # a response shorter than j: its last token, so that every example has a row
    return masked | (~masked.any(1, keepdim=True) & (decoded == decoded.max(1, keepdim=True).values))


def make_batch(records, rngs, cfg, model_cfg, vocabulary):
    """records -> dict: xt, x0 (B, L) int64, masked (B, L) bool, path_w (B, L) fp32, u (B, L) uniform numbers
    that draw the fakes, prompts as lists of ids. vocabulary: the ids that random tokens are drawn from.
    """
    x0, rank = torch.tensor([r["x0"] for r in records]), torch.tensor([r["rank"] for r in records])
    prompts = [r["prompt_ids"] for r in records]
    pi, size = ranks_in_blocks(rank, [len(p) for p in prompts], model_cfg.block_len)
    masked = draw_mask(pi, size, model_cfg.block_len, cfg, rngs)
    u, swap = (torch.tensor(np.array([rng.random(x0.shape[1]) for rng in rngs])) for _ in range(2))
    random = torch.tensor(np.array([rng.choice(vocabulary, x0.shape[1]) for rng in rngs]))
    hidden = torch.where(swap < cfg.rand_p, random, model_cfg.mask_id)  # App. C.1
    return dict(xt=torch.where(masked, hidden, x0), x0=x0, masked=masked, u=u.float(), prompts=prompts,
                path_w=path_weights(pi, size, masked, cfg).float())


def hidden_rows(model, b, device):
    """Hidden states (N, C) of the masked positions; a block-causal model sees clean blocks before noisy ones.
    """
    inputs, cols = response_inputs(model.cfg, b["prompts"], b["xt"], b["x0"] if model.cfg.block_len else None)
    row, j = b["masked"].nonzero(as_tuple=True)
    h = model.hidden(**{k: None if t is None else t.to(device) for k, t in inputs.items()})
    return h[row.to(device), cols[row, j].to(device)]


def token_terms(logits, ref_logits, x0, u, cfg, mask_id=None):
    """What t3d_loss takes of every row, (n, 4) fp32: log p_theta(x0), log p_ref(x0), log p_theta(x_hat),
    log p_ref(x_hat). logits, ref_logits (n, V), x0 (n,) int64, u (n,) uniform. A guess is never mask_id.
    """
    logp, ref = F.log_softmax(logits.float(), -1), F.log_softmax(ref_logits.float(), -1)
    if cfg.fake == "expected":  # the mean over x_hat ~ p_ref of the log-ratio is -KL(p_ref, p_theta)
        fake = [(ref.exp() * (logp - ref)).sum(-1), torch.zeros_like(u)]
    else:  # a draw: the token at which the distribution function passes u
        p_ref = ref.exp()
        if mask_id is not None:
            p_ref[:, mask_id] = 0
        cdf = p_ref.cumsum(-1)
        drawn = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1).clamp(max=ref.shape[-1] - 1)
        x_hat = p_ref.argmax(-1) if cfg.fake == "argmax" else drawn
        fake = [t.gather(1, x_hat[:, None])[:, 0] for t in (logp, ref)]
    return torch.stack([*(t.gather(1, x0[:, None])[:, 0] for t in (logp, ref)), *fake], 1)


@contextmanager
def swapped(model, ref):
    """Inside, the trained tensors of the model are those of ref: the reference of LoRA needs no second model.
    With --full, ref is one, frozen.
    """
    if not isinstance(ref, dict):
        yield ref
        return
    params = trainable(model)
    mine = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            p.data = ref[name]
        yield model
    finally:
        for name, p in params.items():
            p.data = mine[name]


def build_reference(cfg, model, device, dtype):
    """The first reference: a snapshot of the adapters, or with --full a frozen model, sharded alike."""
    if not cfg.full:
        return snapshot(model)
    ref = nt_model.load(cfg.model, "cpu" if shards(cfg) else device, dtype, cfg.revision)
    ref.cfg = model.cfg
    return for_training(cfg, ref.requires_grad_(False), device, False)


def reference_tensors(ref):
    if isinstance(ref, dict):
        return ref
    if nt_model.is_sharded(ref):
        ref.reshard()  # embedding and head are whole since its last forward
    return dict(ref.named_parameters())


def snapshot(model, into=None):
    """The trained tensors now; into: the reference's, overwritten, so that there are never two."""
    if into is None:
        return {name: p.detach().clone() for name, p in trainable(model).items()}
    for name, p in trainable(model).items():
        nt_model.local(into[name]).copy_(nt_model.local(p))
    return into


def training_loss(model, ref, records, rngs, cfg, vocabulary, device):
    """Trajectories -> loss of one micro-batch: one forward of the reference, one of the student."""
    began = time.perf_counter()
    b = make_batch(records, rngs, cfg, model.cfg, vocabulary)
    data_s = time.perf_counter() - began
    x0, u, path_w = (b[k][b["masked"]].to(device) for k in ("x0", "u", "path_w"))
    if cfg.loss == "naive_td":  # no reference
        logp = by_chunks(lambda h, x0: -F.cross_entropy(model.head(h).float(), x0, reduction="none"),
                         model.cfg.vocab_size, hidden_rows(model, b, device), x0)
        terms = logp[:, None].expand(-1, 4)
    else:
        was_training = model.training
        with torch.no_grad(), swapped(model, ref) as frozen:
            h_ref = hidden_rows(frozen.eval(), b, device)
            head_ref = frozen.head.weight.data
        model.train(was_training)
        terms = by_chunks(lambda h, h_ref, x0, u: token_terms(model.head(h), F.linear(h_ref, head_ref), x0, u,
                                                              cfg, model.cfg.mask_id),
                          model.cfg.vocab_size, hidden_rows(model, b, device), h_ref, x0, u)
    example = b["masked"].nonzero()[:, 0].to(device)
    loss, parts = t3d_loss(*terms.unbind(1), path_w, example, cfg.batch_size, cfg)
    return loss, {**parts, "data_s": data_s}


# --- boilerplate: same in every method file ---
FREE = ("out", "overwrite", "save_every", "log_every", "eval_problems", "fsdp", "checkpoint_blocks",
        "compile", "dry_run")  # may change when a run is continued
WRITING = []  # the thread that writes a checkpoint, if any, with what went wrong in it
STOP = threading.Event()  # set by SIGTERM while training


def parse_args(cls, presets, doc):
    """The fields of cls as command-line options.
    Precedence: field default < preset of the family < command line.
    """
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
    for f in fields(cls):
        hint, kw = get_type_hints(cls)[f.name], dict(default=argparse.SUPPRESS)
        kw["help"] = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        if hint is bool:
            kw["action"] = argparse.BooleanOptionalAction
        else:
            kw["type"], kw["choices"] = type(f.default), get_args(hint) or None
        ap.add_argument("--" + f.name, **kw)
    given = vars(ap.parse_args())
    family = nt_model.family_of(given.get("model", cls.model), given.get("revision"))
    return cls(**{**presets.get(family, {}), **given})


def setup(cfg):
    """rank, world size, device, dtype. Under torchrun, and to train all weights or shard on a GPU,
    the process group is created here.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if (world > 1 or (cuda and (cfg.full or cfg.fsdp))) and not dist.is_initialized():
        # ranks wait for each other's collection and the closing evaluation; torchrun sees the ones that died
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12), rank=rank,
                                world_size=world, store=None if world > 1 else dist.HashStore())
    return rank, world, device, torch.bfloat16 if cuda else torch.float32


def shards(cfg):
    """Is the model spread over the ranks? Otherwise each has all of it."""
    return (cfg.full or cfg.fsdp) and dist.is_initialized()


def for_training(cfg, model, device, train):
    """A model as the settings ask for it: activations computed again, compiled blocks, sharded."""
    model.checkpoint_blocks = cfg.checkpoint_blocks
    if cfg.compile:
        for block in model.blocks:
            block.compile()
    return nt_model.shard(model, device, train) if shards(cfg) else model


def open_run(cfg, rank):
    """The output directory, new or to be continued.
    Another configuration in it is an error, never overwritten.
    """
    out = Path(cfg.out or f"out/{Path(__file__).stem}-{Path(cfg.model).name}")
    if rank == 0:
        again = any(int(os.environ.get(f"{by}_RESTART_COUNT", 0)) for by in ("TORCHELASTIC", "SLURM"))
        if cfg.overwrite and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            raise UserError("--overwrite on several nodes: the nodes that did not fail cannot tell a restart "
                            "from a start; remove the directory instead")
        if cfg.overwrite and not again and (out / "config.json").exists():
            shutil.rmtree(out)
        now = {k: v for k, v in vars(cfg).items() if k not in FREE}
        if (out / "config.json").exists():
            old = nt_model.read_json(out / "config.json")
            differ = [f"{k} {old.get(k)!r} -> {now.get(k)!r}"
                      for k in {**old, **now} if old.get(k) != now.get(k)]
            if differ and (out / "checkpoints").exists():  # before, nothing is trained that could be mixed up
                raise UserError(f"{out} belongs to another configuration ({'; '.join(differ)}): "
                                f"choose another --out, or --overwrite")
        out.mkdir(parents=True, exist_ok=True)
        nt_model.write_whole(out / "config.json", json.dumps(now, indent=2) + "\n")
    return out


def barrier(world):
    if world > 1:
        dist.barrier()


def agreed(value, world):
    """Rank 0's value, on every rank."""
    values = [value]
    if world > 1:
        dist.broadcast_object_list(values)
    return values[0]


def lr_frac(step, n_steps, cfg):
    """Share of the peak learning rate at a step (0-based): linear warm-up, then constant, cosine to the
    floor, or flat with a linear tail to it over the last 40% of the steps.
    """
    decay = 1.0
    if cfg.lr_schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - cfg.warmup_steps)
                                    / max(1, n_steps - cfg.warmup_steps)))
    elif cfg.lr_schedule == "tail":
        decay = min(1.0, (n_steps - step) / (0.4 * n_steps))
    return min(1.0, (step + 1) / max(1, cfg.warmup_steps)) * (cfg.lr_floor + (1 - cfg.lr_floor) * decay)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def micro_batches(chosen, length, cfg, rank, world):
    """This rank's share of a batch in micro-batches, as (indices, 1). Forwards are collective where the model
    is sharded, so every rank has equally many: a filler is (one index, 0), without weight.

    Several micro-batches are cut from the examples in order of length(index): little padding then.
    """
    chosen = [int(n) for n in chosen]
    if len(chosen) > cfg.micro_batch:
        chosen.sort(key=length)
    mine = chosen[rank::world]
    for at in range(0, -(-len(chosen) // world), cfg.micro_batch):
        part = mine[at:at + cfg.micro_batch]
        yield (part, 1) if part else (chosen[:1], 0)


def backward(model, loss, parts, weight, total, world):
    """The gradient of a micro-batch, and its parts of the loss added to total. Losses are divided by the
    global batch already; FSDP averages gradients over ranks, so these count world times.
    """
    averaged = any(isinstance(p, DTensor) for p in trainable(model).values())
    (loss * (weight * world if averaged else weight)).backward()
    for key, value in {"loss": loss.item(), **parts}.items():
        total[key] = total.get(key, 0.0) + weight * value


def optimizer_step(model, opts, frac, clip, world, total):
    """Sum over ranks, in one bucket, the gradients that FSDP has not summed, the parts of the loss, and
    whether to stop; clip by the global norm, step. Returns the norm, the sums, the ranks that are to stop.
    """
    params = list(trainable(model).values())
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    total = {**total, "stop": float(STOP.is_set())}
    if world > 1:
        grads = [p.grad for p in params if not isinstance(p, DTensor)]
        grads.append(torch.tensor(list(total.values()), device=params[0].device))
        bucket = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(bucket)
        for g, summed in zip(grads, bucket.split([g.numel() for g in grads])):
            g.copy_(summed.view_as(g))
        total = dict(zip(total, grads[-1].tolist()))
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["peak_lr"] * frac
        opt.step()
        opt.zero_grad()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm), total, total.pop("stop")


def pace(total, began, model, world):
    """Speed of the step that began then, over all ranks; takes tokens (of prompts and responses) and data_s
    out of total. data_wait: share of the time in which batches were built. mfu: of the 989 TFLOP/s of an H100
    or H200, at 4 (LoRA) or 6 FLOP per parameter and token; a teacher's forward is not counted.
    """
    seconds = time.perf_counter() - began
    tok_per_s = total.pop("tokens") / seconds
    speed = dict(tok_per_s=round(tok_per_s, 1), data_wait=round(total.pop("data_s") / (world * seconds), 4))
    if torch.cuda.is_available():
        speed["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if any(name in torch.cuda.get_device_name() for name in ("H100", "H200")):
            flop = 6 if model.embed.weight.requires_grad else 4
            n = sum(p.numel() for p in model.parameters())
            speed["mfu"] = round(tok_per_s / world * flop * n / 989e12, 4)
    return speed


def dry_run(cfg, n_examples, targets=lora.ALL, frozen_copy=False, scratch=False):
    """Print the number of steps and the memory that training takes, from config.json alone."""
    with torch.device("meta"):
        model = nt_model.Transformer(nt_model.config_of(cfg.model, cfg.revision))
        if not (cfg.full or scratch):
            lora.add(model, cfg.lora_r, cfg.lora_alpha, 0.0, targets)
    per_epoch = n_examples // cfg.batch_size
    print(f"at most {n_examples:,} examples: {per_epoch:,} steps per epoch, "
          f"{cfg.max_steps or cfg.epochs * per_epoch:,} steps in all")
    nt_model.print_memory(model, cfg, frozen_copy)


def checkpoint_tensors(model, opts, ref):
    """name -> tensor: the trained weights; "name/slot": the optimizer's state, and T3D's reference."""
    params = trainable(model)
    names = {p: name for name, p in params.items()}
    state = {f"{names[p]}/{slot}": t for opt in opts for p, slots in opt.state.items()
             for slot, t in slots.items()}
    return {**params, **state, **{f"{name}/reference": t for name, t in (ref or {}).items()}}


def save_checkpoint(out, step, model, opts, loss, rank, world, ref=None):
    """One folder per step, complete or absent: written under another name, synced, renamed. Kept are the last
    two and the one with the lowest loss, the mean since the checkpoint before.

    A thread writes while training goes on; every rank writes its rows, or rank 0 everything. Learning rate,
    data order and noise are functions of (seed, step), so the step number is all of their state.
    """
    finish_writing()
    root = out / "checkpoints"
    if rank == 0:
        shutil.rmtree(root / "tmp", ignore_errors=True)
        (root / "tmp").mkdir(parents=True)
    barrier(world)
    n_files = world if any(isinstance(p, DTensor) for p in trainable(model).values()) else 1
    if rank >= n_files:
        return
    tensors = {name: nt_model.local(t).to("cpu", copy=True).contiguous()
               for name, t in checkpoint_tensors(model, opts, ref).items()}
    failed = []

    def work():
        try:
            write_checkpoint(root, step, tensors, loss, rank, n_files)
        except Exception as e:  # told by finish_writing
            failed.append(e)
    thread = threading.Thread(target=work)  # no daemon: a run that ends with an error waits for it
    thread.start()
    WRITING.append((thread, failed))


def write_checkpoint(root, step, tensors, loss, rank, n_files):
    """This rank's file and its checksum; rank 0 waits for those of all, and completes the folder."""
    tmp = root / "tmp"
    file = tmp / f"rank-{rank:05d}.safetensors"
    save_file(tensors, file)
    sync(file)
    with open(file, "rb") as f:
        nt_model.write_whole(file.with_suffix(".sha256"), hashlib.file_digest(f, "sha256").hexdigest())
    if rank:
        return
    while len(list(tmp.glob("*.sha256"))) < n_files:
        time.sleep(0.05)
    sums = {f"{f.stem}.safetensors": f.read_text() for f in sorted(tmp.glob("*.sha256"))}
    (tmp / "checksums.json").write_text(json.dumps({"loss": loss, "files": sums}))
    sync(tmp / "checksums.json")
    sync(tmp)
    shutil.rmtree(root / f"step-{step:06d}", ignore_errors=True)
    tmp.rename(root / f"step-{step:06d}")
    sync(root)
    folders = sorted(root.glob("step-*"))
    best = min(folders, key=lambda f: intact(f, contents=False).get("loss", math.inf))
    for old in folders[:-2]:
        if old != best:
            shutil.rmtree(old)


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def finish_writing():
    """Wait until the last checkpoint is on disk."""
    while WRITING:
        thread, failed = WRITING.pop()
        thread.join()
        if failed:
            raise UserError(f"a checkpoint could not be written: {failed[0]}")


def intact(folder, contents=True):
    """What checksums.json says of a checkpoint, or {} where a byte is missing or wrong."""
    try:
        facts = json.loads((folder / "checksums.json").read_text())
        for name, wanted in facts["files"].items() if contents else ():
            with open(folder / name, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != wanted:
                    return {}
        return facts
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def newest_checkpoint(out):
    for folder in sorted((out / "checkpoints").glob("step-*"), reverse=True):
        if intact(folder):
            return folder
        print(f"warning: checkpoint {folder} is damaged, trying the one before", file=sys.stderr)


def load_checkpoint(out, model, opts, rank, world, ref=None):
    """Fill model, optimizer and reference from the newest intact checkpoint, whatever the number of ranks
    that wrote it; returns the step to go on with (0: none).
    """
    finish_writing()
    found = agreed(newest_checkpoint(out) if rank == 0 else None, world)
    if found is None:
        return 0
    files = [safe_open(f, framework="pt") for f in sorted(found.glob("rank-*.safetensors"))]
    params, names = trainable(model), set(files[0].keys())
    if {name for name in names if "/" not in name} != params.keys():
        raise UserError(f"{found} does not fit this model: use another --out")
    owner = {p: opt for opt in opts for group in opt.param_groups for p in group["params"]}
    for key in names:
        parts, (name, _, slot) = [f.get_tensor(key) for f in files], key.partition("/")
        p, whole = params[name], torch.cat(parts) if parts[0].ndim else parts[0]  # a shard is a range of rows
        if slot == "reference":
            nt_model.fill(ref[name], whole)
        elif slot:  # AdamW's step counts are on the CPU
            owner[p].state[p][slot] = torch.zeros_like(p) if whole.ndim else whole
            nt_model.fill(owner[p].state[p][slot], whole)
        else:
            nt_model.fill(p, whole)
    return int(found.name.split("-")[1])


def training_steps(first, n_steps, rank):
    """The steps, each with the progress bar. SIGTERM then ends the run after its step, with a checkpoint."""
    STOP.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, unit="step", desc="train",
               disable=rank != 0)
    try:
        yield from ((step, bar) for step in bar)
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(step, rank, world):
    """The end of a run that got SIGTERM (a preempted job): all ranks are at this step. Exit code 143."""
    finish_writing()
    barrier(world)
    if rank == 0:
        print(f"SIGTERM: stopped after step {step}; the same command continues", file=sys.stderr)
    return 128 + signal.SIGTERM


def save_final(cfg, model, final, rank):
    """The trained adapter, or the whole model with its tokeniser: written under another name, then renamed.
    Every rank calls it; rank 0 gets a plain copy of the model, the others None.
    """
    finish_writing()
    plain = lora.unsharded(model, keep=rank == 0)
    if rank != 0:
        return None
    tmp = final.with_name("tmp-" + final.name)
    shutil.rmtree(tmp, ignore_errors=True)
    if final.name == "adapter":
        lora.save(plain, tmp, base=cfg.model)
    else:
        nt_model.save(plain, tmp)
        nt_model.copy_tokenizer(cfg.model, tmp, cfg.revision)
    shutil.rmtree(final, ignore_errors=True)  # saved before, and killed during the closing evaluation
    tmp.rename(final)
    print(f"saved {final}")
    return plain


def log(out, rank, row):
    """Append one line to log.jsonl, with the seconds since the line before;
    a continued run first drops the lines of steps it will repeat (row = step).
    """
    now = time.perf_counter()
    if rank == 0 and isinstance(row, int):
        lines = (out / "log.jsonl").read_text().splitlines(True) if (out / "log.jsonl").exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= row]
        nt_model.write_whole(out / "log.jsonl", "".join(kept))
    elif rank == 0:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps({**row, "seconds": round(now - log.last, 3)}) + "\n")
    log.last = now


def check_finite(loss, ids, out, step):
    """A non-finite loss stops the run with the ids of its batch saved; nothing trained so far is touched."""
    if not torch.isfinite(loss):
        (out / "nonfinite.json").write_text(
            json.dumps({"step": step, "loss": str(loss.item()), "ids": ids}) + "\n")
        raise UserError(f"the loss is {loss.item()} at step {step}: the batch's ids are in "
                        f"{out / 'nonfinite.json'}; lower --lr or look at these examples")


@lru_cache(maxsize=1)
def shuffled(n, seed, epoch):
    """The order of an epoch's n examples."""
    return np.random.default_rng([seed, epoch]).permutation(n)
# --- end boilerplate ---


def problems_of(cfg):
    return load_problems(cfg.data, "train", cfg.n_problems or (1000 if cfg.data == "tiny" else None))


def collect(cfg, model, tok, out, world, round_=0):
    """The model's own rollouts, one token per forward; no ground truth, no filter.
    Every later round of --rounds has a folder of its own.
    """
    problems = problems_of(cfg)
    found = len(problems)
    problems = [p for p in problems if len(tok.prompt_ids(p["prompt"])) <= cfg.max_prompt]
    if len(problems) < found:
        print(f"{found - len(problems)} prompts are longer than --max_prompt {cfg.max_prompt}: left out")
    if len(problems) < cfg.batch_size:  # said before hours of decoding
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(problems)} problems)")
    folder, name = Path(cfg.trajectories or out / "trajectories"), cfg.model
    if round_:
        folder, name = out / f"trajectories-round-{round_}", f"{cfg.model}, trained for {round_} rounds"
    rollout(model, tok, problems, folder, name, False, cfg.collect_batch, cfg.allow_code_execution,
            graded=False, gen_len=cfg.gen_len,
            block_len=model.cfg.block_len if round_ and model.cfg.block_len else cfg.block_len,
            policy="static", per_step=1,
            cache=cfg.collect_cache, temperature=cfg.collect_temperature, seed=cfg.collect_seed)
    barrier(world)
    wanted = {p["id"] for p in problems}  # a shared folder may hold more
    return [r for r in read_trajectories(folder) if r["id"] in wanted]


def collect_round(cfg, model, tok, out, world, round_, began, device, dtype):
    """The trajectories of a later round: of the student as the round begins. A run that is continued within
    the round finds them in its folder.
    """
    finish_writing()
    wanted = {p["id"] for p in problems_of(cfg) if len(tok.prompt_ids(p["prompt"])) <= cfg.max_prompt}
    found = {r["id"] for r in read_trajectories(out / f"trajectories-round-{round_}")}
    if not began and not wanted <= found:
        raise UserError(f"{out}/trajectories-round-{round_} is not complete, and the weights it began with "
                        f"are gone: choose another --out, or --overwrite")
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # records are on disk as they finish: stop at once
    records = collect(cfg, lora.unsharded(model, device, dtype).eval(), tok, out, world, round_)
    signal.signal(signal.SIGTERM, before)
    model.train()
    return records


def check_config(cfg):
    """The settings that are used: the code's choices under --variant code."""
    if min(cfg.batch_size, cfg.micro_batch, cfg.refresh, cfg.rounds) < 1:
        raise UserError(f"--batch_size {cfg.batch_size}, --micro_batch {cfg.micro_batch}, "
                        f"--refresh {cfg.refresh}, --rounds {cfg.rounds}: at least 1 each")
    if cfg.save_every % cfg.refresh:  # a continued run then starts with a fresh reference, as the first did
        raise UserError(f"--save_every {cfg.save_every} must be a multiple of --refresh {cfg.refresh}")
    if not 0 <= cfg.rand_p <= 1:
        raise UserError(f"--rand_p {cfg.rand_p} is a probability")
    if cfg.variant == "code":
        if cfg.fake == "expected" or cfg.logratio == "sum":
            raise UserError(f"--variant code has fake argmax and logratio mean, not {cfg.fake} and "
                            f"{cfg.logratio}: give the switches one by one instead")
        return replace(cfg, fake="argmax", mask_order="code", state_dist="code", path="code", logratio="mean")
    return cfg


def set_block(model, cfg):
    """Block-causal models train in blocks of --train_block tokens; a saved model then names that block, an
    adapter does not: decode with --block_len.
    """
    if model.cfg.block_len and cfg.train_block:
        model.cfg = replace(model.cfg, block_len=cfg.train_block,
                            raw={**model.cfg.raw, "block_size": cfg.train_block})


def main():
    cfg = check_config(parse_args(Config, PRESETS, __doc__))
    if cfg.dry_run:
        return dry_run(cfg, len(problems_of(cfg)), frozen_copy=cfg.loss != "naive_td")
    rank, world, device, dtype = setup(cfg)
    out = open_run(cfg, rank)
    barrier(world)
    final, evaluates = out / ("model" if cfg.full else "adapter"), cfg.eval_problems and cfg.data == "tiny"
    if agreed((out / "results.jsonl" if evaluates else final).exists(), world):
        print(f"{out} is finished already; --overwrite starts anew")
        return
    model = nt_model.load(cfg.model, device, dtype, cfg.revision)
    tok = load_tokenizer(cfg.model, cfg.revision)

    # 1. trajectories of the base model
    records = collect(cfg, model, tok, out, world)

    # 2. training
    torch.manual_seed(cfg.seed)
    if shards(cfg):  # from the files to its ranks, block by block
        model = nt_model.load(cfg.model, "cpu", dtype, cfg.revision)
    set_block(model, cfg)
    if not cfg.full:
        lora.add(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
    model = for_training(cfg, model, device, cfg.full)
    ref = None if cfg.loss == "naive_td" else build_reference(cfg, model, device, dtype)
    opts = [torch.optim.AdamW(trainable(model).values(), lr=cfg.lr, weight_decay=cfg.weight_decay)]
    opts[0].param_groups[0]["peak_lr"] = cfg.lr
    first = load_checkpoint(out, model, opts, rank, world, ref and reference_tensors(ref))
    log(out, rank, first)
    if len(records) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(records)} trajectories): "
                        f"lower it")
    per_epoch = len(records) // cfg.batch_size
    n_steps = cfg.max_steps or cfg.epochs * per_epoch
    vocabulary = np.setdiff1d(np.arange(tok.n_vocab), [*tok.special.values(), model.cfg.mask_id])
    per_round, round_ = -(-n_steps // cfg.rounds), 0
    model.train()
    losses = []
    for step, bar in training_steps(first, n_steps, rank):
        began = time.perf_counter()
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)  # dropout
        if step // per_round != round_:
            round_ = step // per_round
            records = collect_round(cfg, model, tok, out, world, round_, step % per_round == 0, device, dtype)
        if step % cfg.refresh == 0 and cfg.loss != "naive_td":
            snapshot(model, reference_tensors(ref))
        epoch, at = divmod(step, per_epoch)
        chosen = shuffled(len(records), cfg.seed, epoch)[at * cfg.batch_size:(at + 1) * cfg.batch_size]
        total = {}
        for ns, weight in micro_batches(chosen, lambda n: len(records[n]["prompt_ids"]), cfg, rank, world):
            part, rngs = [records[n] for n in ns], [example_rng(cfg.seed, epoch, n) for n in ns]
            loss, parts = training_loss(model, ref, part, rngs, cfg, vocabulary, device)
            check_finite(loss, [r["id"] for r in part], out, step)
            parts["tokens"] = sum(len(r["prompt_ids"]) + len(r["x0"]) for r in part)
            backward(model, loss, parts, weight, total, world)
        frac = lr_frac(step, n_steps, cfg)
        norm, total, stop = optimizer_step(model, opts, frac, cfg.clip, world, total)
        losses.append(total["loss"])
        speed = pace(total, began, model, world)
        bar.set_postfix(loss=total["loss"], **speed, refresh=False)
        if (step + 1) % cfg.log_every == 0 or step + 1 == n_steps:
            log(out, rank, dict(step=step + 1, **total, grad_norm=norm, lr_frac=frac, **speed))
        if 0 in ((step + 1) % cfg.save_every, (step + 1) % per_round) or step + 1 == n_steps or stop:
            between = ref and (step + 1) % cfg.refresh  # after SIGTERM only: else it is refreshed first
            save_checkpoint(out, step + 1, model, opts, np.mean(losses), rank, world,
                            reference_tensors(ref) if between else None)
            losses = []
        if stop:
            return stopped(step + 1, rank, world)
    model = save_final(cfg, model, final, rank)

    # 3. the same problems, the same decoding rules: base against T3D
    if rank == 0 and evaluates:
        problems, protocol = load_problems("tiny", "dev", cfg.eval_problems), nt_eval.PROTOCOLS["tiny"]
        base = nt_model.load(cfg.model, device, dtype, cfg.revision)
        nt_eval.report([("base", nt_eval.curve(base, tok, problems, protocol, "base")),
                        ("T3D", nt_eval.curve(model, tok, problems, protocol, "T3D"))], out)
    elif rank == 0:
        name = f"--model {cfg.model}" + (f" --revision {cfg.revision}" if cfg.revision else "")
        which = f"--model {final}" if cfg.full else f"{name} --adapter {final}"
        task = "" if cfg.data == "tiny" else " --task problems.jsonl"
        print(f"evaluate: python eval.py curve {which}{task} --gen_len {cfg.gen_len} "
              f"--block_len {model.cfg.block_len or cfg.block_len}")
    barrier(world)


if __name__ == "__main__":
    run_cli(main)
