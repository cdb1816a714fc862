"""TRIMS: Trajectory-Ranked Instruction Masked Supervision (arXiv 2604.00666), and its baseline, standard
masked-diffusion training (MDLM SFT).

The idea: good parallel decoding settles the hard tokens first. So no trajectories are collected: one pass of
an autoregressive teacher says how hard every token of the data is, and a share of the random masks gives way
to masks that follow that order, hard tokens visible, easy ones masked. The loss stays as it is:

    loss = 1/L  sum over masked i of  1/t * -log p(x0_i | prompt, xt)      (LLaDA, arXiv 2502.09992, SFT)

    glossary (paper -> code)
    d_i           difficulty: -log p_teacher(x_i | s, x_<i), or the teacher's entropy (difficulty)
    b_i, K        bucket 1..n_buckets of equal mass over all tokens of the data; harder = lower      (buckets)
    k             threshold, uniform over 0..K-1: buckets <= k are context, the others future
    masking rule  P(i masked) = p_context if b_i <= k else p_future                          (trajectory_mask)
    x0            clean response (L,); xt noised, masked (L,) bool, t masking probability
    loss_w        1 / t, or 1 / masked fraction where no t exists (--trajectory_weight)       (mask_response);
                  make_batch divides it by L and the batch size

`--trajectory_share 0` is standard training: SFT on ground truth, or on a model's own responses with --data =
a trajectory folder; the embedded base model was made this way. All responses are EOS-filled to one length, so
LLaDA's normalisation (by a response's own length) and the batch's token count are the same number.

Not published, and chosen on the tiny model (trained on its own responses, 200 steps of 16, lr 1e-3; accuracy
at 4 tokens per forward on 300 dev problems, one run each, standard error 2.6): trajectory_share 0.5, the
largest within error of none (0: 75.0%, 0.25: 71.7, 0.5: 72.7, 0.75: 63.7, 1: 55.0); LoRA alpha = r = 32 (16:
69.7, 64: 71.7); weight decay 0.01 (0: 72.7, 0.1: 73.0).

Teacher and student may have different tokenisers: scores move through UTF-8 bytes (see `spread`).

    python trims.py                                          # tiny model, tiny AR teacher, on a laptop CPU
    python trims.py --trajectory_share 0                     # SFT on ground truth
    python trims.py --trajectory_share 0 --data out/tad-tiny/trajectories      # SFT on collected responses
    python trims.py --model llada --data problems.jsonl      # one GPU; teacher Qwen/Qwen3-8B
    torchrun --nproc_per_node=8 trims.py --model dream           # s1K, by preset
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
import unicodedata
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
from data import (TINY_DECODING, TinySFT, appended, drop_torn_line, example_rng, load_problems,
                  load_teacher_tokenizer, load_tokenizer, pad_response, read_jsonl, read_trajectories,
                  response_inputs)
from model import UserError, by_chunks, run_cli


@dataclass
class Config:
    model: str = "tiny"  # preset name, hub id or directory
    revision: str = ""  # commit, branch or tag of a hub id
    out: str = ""  # output directory; default out/trims-<model>
    overwrite: bool = False  # start anew in a directory that already holds a run
    seed: int = 0  # of the masks, the data order and the initial weights
    init: Literal["model", "scratch"] = "model"  # scratch: the model's config, fresh weights, all trained
    data: str = "tiny"  # data set by name or a .jsonl with solutions, see data.py --help; or trajectories
    only_correct: bool = True  # leave out a folder's wrong trajectories (--no-only_correct: ReDi, SFT-SD)
    with_thinking: bool = False  # s1K: a problem's "thinking" (the reasoning trace) before its solution
    n_examples: int = 2000  # how many of the tiny examples there are; 0: every step draws new ones
    drill_steps: int = 0  # opening steps on drills of the tiny task (see data.TinySFT)
    gen_len: int = 256  # response length L, tokens, EOS-filled
    # --- trajectory-aware masks
    trajectory_share: float = 0.5  # share of samples with such a mask (0 = standard MDLM); not published
    teacher: str = "Qwen/Qwen3-8B"  # AR teacher: hub id or directory of a causal LM
    metric: Literal["nll", "entropy"] = "nll"  # difficulty of a token under the teacher
    n_buckets: int = 8  # K
    ordering: Literal["descending", "ascending", "random"] = "descending"  # hard first (paper), easy first
    p_context: float = 0.05  # masking probability of tokens in buckets up to k
    p_future: float = 0.95  # masking probability of the others
    trajectory_weight: Literal["mean", "none"] = "mean"  # loss weight: 1 / masked fraction, or 1
    score_batch: int = 16  # examples per teacher forward
    # --- standard masks
    block_share: float = 0.0  # share of samples masked as in block decoding: earlier clean, later all masked
    block_len: int = 32  # block size of those samples, tokens
    t_min: float = 0.001  # smallest masking probability
    full: bool = False  # train all weights instead of LoRA adapters
    lora_r: int = 32  # LoRA rank
    lora_alpha: int = 32  # LoRA alpha (not published)
    lora_dropout: float = 0.0  # LoRA dropout
    lr: float = 1e-4  # peak learning rate
    muon_lr: float = 0.0  # Muon's learning rate for the blocks' matrices; 0: AdamW everywhere
    lr_schedule: Literal["constant", "cosine", "tail"] = "cosine"  # tail: linear to zero over the last 40%
    lr_floor: float = 0.0  # share of the peak that the schedules end at
    warmup_steps: int = 20  # linear warm-up
    warmup_ratio: float = 0.0  # share of all steps, instead of warmup_steps
    weight_decay: float = 0.01  # AdamW (not published)
    beta2: float = 0.999  # AdamW
    clip: float = 1.0  # gradient norm
    batch_size: int = 128  # examples per optimizer step over all ranks
    micro_batch: int = 32  # examples per forward
    epochs: int = 30  # passes over the data
    max_steps: int = 0  # stop after this many steps (0: epochs decide)
    save_every: int = 250  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    eval_problems: int = 200  # problems of the closing evaluation (tiny only; 0: none)
    fsdp: bool = False  # LoRA: shard the frozen base over ranks, where it does not fit (--full always does)
    checkpoint_blocks: bool = False  # keep only the inputs of blocks, compute the rest again: less memory
    compile: bool = False  # compile every block for training
    dry_run: bool = False  # print memory per GPU and the number of steps, load no weights


PRESETS = {
    "tiny": dict(gen_len=48, block_len=16, teacher="tiny-ar", lr=1e-3, max_steps=200, batch_size=64,
                 micro_batch=64),
    "llada": dict(data="s1k", gen_len=1024, warmup_ratio=0.03),
    "dream": dict(data="s1k", gen_len=1024, warmup_ratio=0.03),
    "sdar": dict(data="s1k", gen_len=1024, warmup_ratio=0.03, block_len=4),  # not in the paper
}


# --------------------------------------------------------------------------------------------------- the loss
def mdlm_loss(logits, x0, loss_w):
    """Weighted cross-entropy of the masked rows. logits (N, V), x0 (N,) int64, loss_w (N,) -> scalar fp32.

    loss_w carries 1/t, 1/L and 1/batch, so that the sum over rows, micro-batches and ranks is the MDLM loss.
    """
    ce = F.cross_entropy(logits.float(), x0, reduction="none")
    return (loss_w * ce).sum()


# ------------------------------------------------------------------------------------------------- difficulty
def spread(values, teacher_bytes, student_bytes):
    """Scores of the teacher's tokens -> scores of the student's tokens of the same text: (n,) float64.

    Each teacher token's score is spread evenly over its bytes; a student token sums those of its bytes.
    values (m,); teacher_bytes (m,), student_bytes (n,): UTF-8 bytes per token, of equal total.
    """
    edges, total = (np.concatenate([[0], np.cumsum(v)]) for v in (teacher_bytes, values))
    return np.diff(np.interp(np.concatenate([[0], np.cumsum(student_bytes)]), edges, total))


def teacher_pieces(example, tok, teacher_tok):
    """One example -> the teacher's prompt ids and completion ids, and bytes per token of both sides."""
    content = example["x0"][:nt_model.n_content(example["x0"], (tok.eos_id, tok.special[tok.chat.end]))]
    pieces = [tok.bytes_of(i) for i in content]
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:
        raise UserError(f"example {example['id']}: its completion is not UTF-8 text") from None
    ids = teacher_tok.encode(text) if text else []
    lengths = [len(teacher_tok.bytes_of(i)) for i in ids]
    if sum(lengths) != sum(map(len, pieces)):
        raise UserError(f"example {example['id']}: its completion has {sum(map(len, pieces))} bytes for the "
                        f"student and {sum(lengths)} for the teacher; normalise the text (NFC)")
    return teacher_tok.prompt_ids(example["prompt"]).tolist(), ids, lengths, [len(p) for p in pieces]


@torch.no_grad()
def difficulty(examples, tok, teacher, teacher_tok, metric, device):
    """Scores (L,) of every example's response tokens, in nats: a list of float lists. The first EOS has that
    of the teacher's end token; the EOS filling behind it has none (NaN).
    """
    pieces = [teacher_pieces(e, tok, teacher_tok) for e in examples]
    rows = [prompt + ids + [teacher_tok.eos_id] for prompt, ids, _, _ in pieces]
    width = max(map(len, rows))
    ids = torch.tensor([[teacher_tok.eos_id] * (width - len(r)) + r for r in rows])
    valid = torch.arange(width) >= width - torch.tensor([len(r) for r in rows])[:, None]
    scored = nt_model.token_nll(teacher, ids.to(device), valid.to(device), metric).cpu().double().numpy()
    out = []
    for row, e, (_, completion, teacher_bytes, student_bytes) in zip(scored, examples, pieces):
        mine = row[width - len(completion) - 1:]
        if not np.isfinite(mine).all():
            raise UserError(f"the teacher's score of example {e['id']} is not finite: its weights hold NaN "
                            f"or overflow in this dtype")
        scores = [*spread(mine[:-1], teacher_bytes, student_bytes), mine[-1]][:len(e["x0"])]
        out.append(scores + [math.nan] * (len(e["x0"]) - len(scores)))
    return out


def score_examples(examples, tok, cfg, out, rank, world, device, dtype):
    """The difficulty of every example, computed once and kept in out/difficulty; each rank scores its share
    and an interrupted run goes on -> list of float lists, in order.
    """
    folder = out / "difficulty"
    folder.mkdir(exist_ok=True)

    def key(e):  # everything the scores hang on
        what = json.dumps([cfg.teacher, cfg.metric, e["prompt"], [int(i) for i in e["x0"]]])
        return hashlib.sha256(what.encode()).hexdigest()

    def read():
        rows = [r for f in sorted(folder.glob("rank*.jsonl")) for r in read_jsonl(f, tolerant=True)]
        return {r["key"]: r["scores"] for r in rows}
    keys = [key(examples[i]) for i in range(len(examples))]
    done, shard = read(), folder / f"rank{rank}.jsonl"
    barrier(world)  # all ranks have read the same shards before one appends
    left = [i for i in range(len(examples)) if keys[i] not in done]
    todo = left[rank::world]
    if todo:
        teacher = nt_model.load_teacher(cfg.teacher, device, dtype)
        teacher_tok = load_teacher_tokenizer(cfg.teacher)
        drop_torn_line(shard)
        seen = {f: f.stat().st_size for f in folder.glob("*.jsonl")}
        bar = tqdm(total=len(left), unit="example", desc="difficulty", disable=rank != 0)
        last = time.perf_counter()
        with open(shard, "a") as f, open(shard.with_suffix(".seconds"), "a") as spent:
            for at in range(0, len(todo), cfg.score_batch):
                some = todo[at:at + cfg.score_batch]
                part = [examples[i] for i in some]
                scored = difficulty(part, tok, teacher, teacher_tok, cfg.metric, device)
                for i, e, scores in zip(some, part, scored):
                    scores = [None if math.isnan(v) else round(v, 6) for v in scores]
                    f.write(json.dumps(dict(id=str(e["id"]), key=keys[i], scores=scores)) + "\n")
                f.flush()
                os.fsync(f.fileno())
                now = time.perf_counter()
                spent.write(f"{now - last:.4f}\n")
                last = now
                bar.update(len(part) + (appended(folder, shard, seen) if rank == 0 else 0))
        bar.close()
    barrier(world)
    done = read()
    return [[math.nan if v is None else v for v in done[k]] for k in keys]


def buckets(scores, n_buckets, ordering, seed=0):
    """Scores of all completions (lists of floats, NaN = EOS filling) -> buckets 1..n_buckets (lists of ints).

    Quantiles over all tokens: equal mass, also where scores tie (a stable sort splits ties in data order).
    descending: the hardest tokens are in bucket 1. EOS filling belongs to the easiest bucket.
    """
    flat = np.concatenate([np.asarray(s, dtype=np.float64) for s in scores])
    known = np.flatnonzero(~np.isnan(flat))
    if ordering == "random":
        place = np.random.default_rng(seed).permutation(len(known))
    else:
        keys = -flat[known] if ordering == "descending" else flat[known]
        place = np.empty(len(known), dtype=np.int64)
        place[np.argsort(keys, kind="stable")] = np.arange(len(known))
    bucket = np.full(len(flat), 1 if ordering == "ascending" else n_buckets)
    bucket[known] = 1 + place * n_buckets // len(known)
    return [part.tolist() for part in np.split(bucket, np.cumsum([len(s) for s in scores])[:-1])]


# ---------------------------------------------------------------------------------------------- batch builder
def trajectory_mask(bucket, cfg, rng):
    """The masking rule: i is masked with p_context if its bucket <= k, else with p_future -> masked (L,)
    bool, loss_w (L,) before the normalisation over L. bucket: L ints.
    """
    bucket, k = np.asarray(bucket), rng.integers(cfg.n_buckets)  # uniform over 0..K-1
    p = np.where(bucket <= k, cfg.p_context, cfg.p_future)
    masked = rng.random(len(bucket)) < p
    weight = len(bucket) / max(1, masked.sum()) if cfg.trajectory_weight == "mean" else 1.0
    return masked, np.full(len(bucket), weight)


def mask_response(example, cfg, rng, origin=0):
    """One example's noise -> masked (L,) bool, loss_w (L,) = 1/t, before the normalisation over L.
    origin: how many tokens of the first block are prompt (block-causal models count from the prompt's start).
    """
    if "bucket" in example and rng.random() < cfg.trajectory_share:
        return trajectory_mask(example["bucket"], cfg, rng)
    L, t = len(example["x0"]), cfg.t_min + (1 - cfg.t_min) * rng.random()
    if "masked" in example:  # a drill says itself what is hidden; its mean cross-entropy counts
        masked = np.array(example["masked"])
        return masked, np.full(L, L / masked.sum())
    masked, loss_w = rng.random(L) < t, np.full(L, 1 / t)
    if rng.random() < cfg.block_share:
        # the loss then counts the current block only, scaled up to the whole length
        block = (origin + np.arange(L)) // cfg.block_len
        current = rng.integers(block[-1] + 1)
        loss_w = np.where(block == current, loss_w * L / (block == current).sum(), 0.0)
        masked = (block > current) | ((block == current) & masked)
    return masked, loss_w


def make_batch(examples, rngs, cfg, model_cfg):
    """examples: list of {prompt_ids, x0} -> inputs of model.hidden() (a dict), cols (B, L) int64 of the noisy
    response in them, x0 (B, L), masked (B, L), loss_w (B, L).
    """
    x0 = torch.tensor([e["x0"] for e in examples])
    origins = [len(e["prompt_ids"]) % cfg.block_len if model_cfg.block_len else 0 for e in examples]
    noise = [mask_response(e, cfg, rng, o) for e, rng, o in zip(examples, rngs, origins)]
    masked = torch.tensor(np.array([m for m, _ in noise]))
    loss_w = torch.tensor(np.array([w for _, w in noise])).float()
    # SDAR: every noisy block stands behind clean ones
    inputs, cols = response_inputs(model_cfg, [e["prompt_ids"] for e in examples],
                                   torch.where(masked, model_cfg.mask_id, x0),
                                   x0 if model_cfg.block_len else None)
    return inputs, cols, x0, masked, loss_w / (x0.shape[1] * cfg.batch_size)


def load_examples(cfg, tok):
    """The data as a sequence of {id, prompt_ids, x0}."""
    if cfg.data == "tiny":
        return TinySFT(tok, cfg.n_examples or cfg.max_steps * cfg.batch_size,
                       cfg.drill_steps * cfg.batch_size)
    if Path(cfg.data).is_dir():
        records = [r for r in read_trajectories(cfg.data) if r["correct"] or not cfg.only_correct]
        if not records:
            raise UserError(f"{cfg.data} holds no correct trajectory: nothing to train on "
                            f"(--no-only_correct takes the others too)")
        if tok.prompt_ids(records[0]["prompt"]).tolist() != records[0]["prompt_ids"]:
            raise UserError(f"{cfg.data} was collected with {records[0]['model']}, whose tokeniser or chat "
                            f"template is not that of {cfg.model}: collect with this model")
        return records
    problems = load_problems(cfg.data)
    if cfg.with_thinking and not all("thinking" in p for p in problems):
        raise UserError(f"--with_thinking: not every line of {cfg.data} has the field 'thinking'")

    def completion(p):
        text = f"{p['thinking']}\n{p['solution']}" if cfg.with_thinking else p["solution"]
        return tok.response_ids(unicodedata.normalize("NFC", text))
    responses = [(p, completion(p)) for p in problems]
    fits = [(p, ids) for p, ids in responses if len(ids) <= cfg.gen_len]
    if len(fits) < len(problems):
        print(f"{len(problems) - len(fits)} of {len(problems)} responses are longer than --gen_len "
              f"{cfg.gen_len} tokens: left out")
    if not fits:
        raise UserError(f"no response of {cfg.data} has at most {cfg.gen_len} tokens: raise --gen_len")
    return [dict(id=p["id"], prompt=p["prompt"], prompt_ids=tok.prompt_ids(p["prompt"]).tolist(),
                 x0=pad_response(ids, cfg.gen_len, tok.eos_id)) for p, ids in fits]


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


def build_model(cfg, device, dtype):
    torch.manual_seed(cfg.seed)
    if cfg.init == "scratch":
        raw = nt_model.read_json(nt_model.checkpoint_dir(cfg.model, cfg.revision) / "config.json")
        return nt_model.Transformer(nt_model.config_from_json(raw)).init_weights().to(device)
    model = nt_model.load(cfg.model, "cpu" if shards(cfg) else device, dtype, cfg.revision)
    if not cfg.full:
        lora.add(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
    return model


def build_optimizers(cfg, model):
    """AdamW; from scratch, Muon for the matrices inside the blocks,
    where it learns in fewer steps (measured).
    """
    params, betas = trainable(model), (0.9, cfg.beta2)
    muon = [p for n, p in params.items() if cfg.muon_lr and p.ndim == 2 and n.startswith("blocks")]
    rest = [p for p in params.values() if not any(p is q for q in muon)]
    opts = [torch.optim.AdamW(rest, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)]
    if muon and any(isinstance(p, DTensor) for p in muon):
        raise UserError("--muon_lr needs whole matrices on every rank: leave out --full "
                        "(--init scratch trains all weights without it)")
    if muon:
        opts.append(torch.optim.Muon(muon, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for opt in opts:
        for group in opt.param_groups:
            group["peak_lr"] = group["lr"]
    return opts


def check_config(cfg):
    for name in ("trajectory_share", "p_context", "p_future", "block_share"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: it must be between 0 and 1")
    if min(cfg.n_buckets, cfg.batch_size, cfg.micro_batch, cfg.score_batch) < 1:
        raise UserError(f"--n_buckets {cfg.n_buckets}, --batch_size {cfg.batch_size}, --micro_batch "
                        f"{cfg.micro_batch}, --score_batch {cfg.score_batch}: at least 1 each")
    if cfg.trajectory_share and cfg.data == "tiny" and not cfg.n_examples:
        raise UserError("--n_examples 0 draws new examples at every step, which no teacher can rank "
                        "beforehand: give --trajectory_share 0, or a number of examples")


def main():
    cfg = parse_args(Config, PRESETS, __doc__)
    check_config(cfg)
    if cfg.dry_run:
        return dry_run(cfg, len(load_examples(cfg, load_tokenizer(cfg.model, cfg.revision))),
                       scratch=cfg.init == "scratch")
    rank, world, device, dtype = setup(cfg)
    out = open_run(cfg, rank)
    barrier(world)
    model_family = nt_model.family_of(cfg.model, cfg.revision)
    whole = cfg.full or cfg.init == "scratch"
    final, evaluates = out / ("model" if whole else "adapter"), cfg.eval_problems and model_family == "tiny"
    if agreed((out / "results.jsonl" if evaluates else final).exists(), world):
        print(f"{out} is finished already; --overwrite starts anew")
        return
    tok, model = load_tokenizer(cfg.model, cfg.revision), build_model(cfg, device, dtype)
    examples = load_examples(cfg, tok)
    if len(examples) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(examples)} examples)")
    if cfg.trajectory_share:
        scores = score_examples(examples, tok, cfg, out, rank, world, device, dtype)
        ranked = buckets(scores, cfg.n_buckets, cfg.ordering, cfg.seed)
        examples = [{**examples[i], "bucket": b} for i, b in enumerate(ranked)]
    model = for_training(cfg, model, device, whole)
    opts = build_optimizers(cfg, model)
    first = load_checkpoint(out, model, opts, rank, world)
    log(out, rank, first)

    per_epoch = len(examples) // cfg.batch_size
    n_steps = cfg.max_steps or cfg.epochs * per_epoch
    cfg = replace(cfg, warmup_steps=round(cfg.warmup_ratio * n_steps) or cfg.warmup_steps)
    model.train()
    losses = []
    for step, bar in training_steps(first, n_steps, rank):
        began = time.perf_counter()
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)  # dropout
        epoch, at = divmod(step, per_epoch)
        chosen = np.arange(at * cfg.batch_size, (at + 1) * cfg.batch_size)
        if cfg.data != "tiny" or cfg.n_examples:  # endless data need no shuffling
            chosen = shuffled(len(examples), cfg.seed, epoch)[chosen]
        total = {}
        for part, weight in micro_batches(chosen, lambda n: len(examples[n]["prompt_ids"]), cfg, rank, world):
            rngs = [example_rng(cfg.seed, epoch, n) for n in part]
            waited = time.perf_counter()
            drawn = [examples[n] for n in part]
            inputs, *batch = make_batch(drawn, rngs, cfg, model.cfg)
            parts = dict(data_s=time.perf_counter() - waited,
                         tokens=sum(len(e["prompt_ids"]) + cfg.gen_len for e in drawn))
            cols, x0, masked, loss_w = (t.to(device) for t in batch)
            h = model.hidden(**{k: None if t is None else t.to(device) for k, t in inputs.items()})
            row, j = (masked & (loss_w > 0)).nonzero(as_tuple=True)
            loss = by_chunks(lambda h, x0, w: mdlm_loss(model.head(h), x0, w)[None], model.cfg.vocab_size,
                             h[row, cols[row, j]], x0[row, j], loss_w[row, j]).sum()
            check_finite(loss, [e["id"] for e in drawn], out, step)
            backward(model, loss, parts, weight, total, world)
        frac = lr_frac(step, n_steps, cfg)
        norm, total, stop = optimizer_step(model, opts, frac, cfg.clip, world, total)
        losses.append(total["loss"])
        speed = pace(total, began, model, world)
        bar.set_postfix(loss=total["loss"], **speed, refresh=False)
        if (step + 1) % cfg.log_every == 0 or step + 1 == n_steps:
            log(out, rank, dict(step=step + 1, **total, grad_norm=norm, lr_frac=frac, **speed))
        if (step + 1) % cfg.save_every == 0 or step + 1 == n_steps or stop:
            save_checkpoint(out, step + 1, model, opts, np.mean(losses), rank, world)
            losses = []
        if stop:
            return stopped(step + 1, rank, world)
    model = save_final(cfg, model, final, rank)

    if rank == 0 and evaluates:
        label = "base" if cfg.init == "scratch" else "TRIMS" if cfg.trajectory_share else "SFT"
        problems = load_problems("tiny", "dev", cfg.eval_problems)
        models = [(label, model)]
        if cfg.init == "model":  # the same problems and rules for the model it started from
            models = [("base", nt_model.load(cfg.model, device, dtype, cfg.revision)), *models]
        nt_eval.report([(name, nt_eval.curve(m, tok, problems, nt_eval.PROTOCOLS["tiny"], name))
                        for name, m in models], out)
        if cfg.trajectory_share:
            nt_eval.report_trajectory_nll(models, nt_model.load_teacher(cfg.teacher, device, dtype),
                                          load_teacher_tokenizer(cfg.teacher), tok, problems[:40],
                                          TINY_DECODING, out)
    barrier(world)


if __name__ == "__main__":
    run_cli(main)
