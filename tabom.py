"""TABOM: Trajectory-Aware Boltzmann Modeling (arXiv 2605.11854).

The idea: decoding goes from easy to hard, standard training treats all tokens alike. So train on the
model's own trajectories: (1) mask a state the way decoding left it, and reconstruct the W tokens that were
revealed next; (2) rank them: a token that was revealed earlier must have the lower predictive entropy, by a
margin. The pairwise ranking is the tractable form of matching a Boltzmann distribution over revealed sets.

    glossary (paper -> code)
    tau           record["x0"], record["rank"] (L,): one index per position, ties within a forward by entropy
    U_t           the positions of xt that are not masked: rank below that of the segment's first (make_batch)
    Delta         segment (B, W) int64: the next W positions in the order they were revealed; -1 = none left
                  (draw_segment)
    h(r)  Eq. 5   entropy (B, W): predictive entropy in nats, at U_t (entropy_of) or at r's own step
                  (--entropy_at own_step; own_step_entropies)
    P             pair (B, W, W): both in Delta, r before s              (tabom_loss)
    gamma, lambda cfg.gamma, cfg.lam
    L_recon       first term of Eq. 9: mean over Delta of -log p(x0 | U_t)               (tabom_loss)
    Eq. 6-7       why ranking: the KL to a Boltzmann distribution, and the order of entropies it asks for
    L_rank        Eq. 8: mean of the hinges over the pairs               (tabom_loss)
    L             Eq. 9: L_recon + lambda L_rank                         (tabom_loss)

What differs from the published code, and why: token ids and their order are stored together (stored text is
not re-tokenised); all pairs of a segment are ranked at once instead of in a W x W loop; a segment shorter
than W is normalised by its own counts; entropies can be taken at each token's own step, as Eq. 5 has it.
TDS, Eq. 10 and 11, is eval.tds: `python eval.py tds`.

    python tabom.py                                              # tiny model on a laptop CPU
    python tabom.py --model dream --data problems.jsonl          # one GPU
    torchrun --nproc_per_node=8 tabom.py --model llada       # the paper's math data, by preset
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
from dataclasses import dataclass, fields
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
    out: str = ""  # output directory; default out/tabom-<model>
    overwrite: bool = False  # start anew in a directory that already holds a run
    seed: int = 0  # of the segments drawn, the data order and the adapters
    # --- trajectories
    data: str = "tiny"  # data set by name, or a .jsonl with prompt and answer; see data.py --help
    n_problems: int = 0  # problems to collect on (0: all; tiny: 1000)
    allow_code_execution: bool = False  # run the tests of code problems on this machine
    trajectories: str = ""  # folder to collect into, which runs may share; default: the run's own
    gen_len: int = 256  # response length L, tokens
    block_len: int = 32  # decoding block, tokens
    collect_score: Literal["confidence", "entropy"] = "confidence"  # what the decoder ranks positions by
    collect_cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "none"  # of the collector
    collect_temperature: float = 0.0  # of the collector
    collect_seed: int = 0  # of the collector's draws
    collect_batch: int = 64  # problems decoded at once per rank
    # --- loss
    window: int = 32  # W: tokens of a segment (0: everything that is left, Table 5's global segment)
    segment: Literal["window", "two_steps"] = "window"  # two_steps: between two random states (dInfer)
    lam: float = 1.0  # lambda of Eq. 9 (0: trajectory masking only)
    gamma: float = 0.2  # margin of the ranking, nats
    entropy_at: Literal["segment", "own_step"] = "segment"  # own_step: Eq. 5, W forwards: lower micro_batch
    eos_in_window: bool = False  # may the EOS tail of a response be in a segment
    # --- training
    full: bool = False  # train all weights instead of LoRA adapters
    lora_r: int = 16  # LoRA rank
    lora_alpha: int = 16  # LoRA alpha
    lora_dropout: float = 0.0  # LoRA dropout
    lora_targets: str = "q_proj,v_proj"  # matrices that carry adapters, or all
    lr: float = 2e-5  # peak learning rate
    lr_schedule: Literal["constant", "cosine", "tail"] = "cosine"  # tail: linear to zero over the last 40%
    lr_floor: float = 0.0  # share of the peak that the schedules end at
    warmup_steps: int = 50  # linear warm-up
    weight_decay: float = 0.01  # AdamW
    clip: float = 1.0  # gradient norm
    batch_size: int = 32  # trajectories per optimizer step over all ranks
    micro_batch: int = 4  # trajectories per forward
    epochs: int = 5  # passes over the trajectories, each with a new segment
    max_steps: int = 0  # stop after this many steps (0: epochs decide)
    save_every: int = 100  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    eval_problems: int = 300  # problems of the closing evaluation (tiny only; 0: none)
    fsdp: bool = False  # LoRA: shard the frozen base over ranks, where it does not fit (--full always does)
    checkpoint_blocks: bool = False  # keep only the inputs of blocks, compute the rest again: less memory
    compile: bool = False  # compile every block for training
    dry_run: bool = False  # print memory per GPU and the number of steps, load no weights


PRESETS = {
    "tiny": dict(gen_len=48, block_len=16, window=16, lora_r=32, lora_alpha=32, lora_targets="all", lr=1e-3,
                 lr_schedule="tail", warmup_steps=10, batch_size=64, micro_batch=64, max_steps=150,
                 save_every=50, eval_problems=128),
    "llada": dict(data="prm12k", gamma=0.2),  # math; code: --data ling-coder --gamma 0.3
    "dream": dict(data="prm12k", block_len=256, collect_score="entropy",  # as Dream decodes: no blocks
                  gamma=0.1),  # code: --data ling-coder --lam 2 --lr 1e-4
    "sdar": dict(data="prm12k", block_len=4, collect_cache="exact"),  # not in the paper
}


# --------------------------------------------------------------------------------------------------- the loss
def tabom_loss(ce, entropy, in_segment, n_examples, cfg):
    """The TABOM objective over segments in the order they were revealed -> scalar fp32, dict of its parts.

    ce (N,) fp32: -log p(x0 | U_t) of the positions in a segment, row by row; entropy (N,) fp32 in nats;
    in_segment (B, W) bool, N of them True. Means over a segment's tokens and over its pairs, then over the
    n_examples of the global batch.
    """
    ce, entropy = (torch.zeros(in_segment.shape, device=ce.device).masked_scatter(in_segment, t)
                   for t in (ce, entropy))
    recon = (ce.sum(1) / in_segment.sum(1).clamp(min=1)).sum() / n_examples
    earlier = torch.ones(entropy.shape[1], entropy.shape[1], dtype=torch.bool, device=entropy.device).triu(1)
    pair = in_segment[:, :, None] & in_segment[:, None, :] & earlier  # (B, W, W): r was revealed before s
    hinge = (entropy[:, :, None] - entropy[:, None, :] + cfg.gamma).clamp(min=0)  # h(r) - h(s) + gamma
    rank = ((hinge * pair).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)).sum() / n_examples  # Eq. 8
    return recon + cfg.lam * rank, dict(recon=recon.item(), rank=rank.item())  # Eq. 9


def entropy_of(logits):
    """Predictive entropy in nats: logits (N, V) -> (N,) fp32."""
    logp = F.log_softmax(logits.float(), -1)
    return -(logp.exp() * logp).sum(-1)


def token_terms(logits, x0):
    """What tabom_loss takes of every row: cross-entropy and entropy, (N, 2) fp32."""
    return torch.stack([F.cross_entropy(logits.float(), x0, reduction="none"), entropy_of(logits)], 1)


# ---------------------------------------------------------------------------------------------- batch builder
def draw_segment(record, cfg, model_cfg, rng):
    """The positions of one segment in the order they were revealed: list of ints, at least one.

    The first is drawn uniformly among those that leave a whole window. The EOS tail is left out unless
    cfg.eos_in_window. On block-causal models it is any position, and the segment keeps to its block.
    """
    L = len(record["x0"])  # the first EOS belongs to the content here
    n = L if cfg.eos_in_window else min(L, nt_model.n_content(record["x0"], model_cfg.eos_ids) + 1)
    order = sorted(range(n), key=lambda i: record["rank"][i])
    if cfg.segment == "two_steps":
        first, last = sorted(rng.choice(n + 1, 2, replace=False).tolist())
        chosen = order[first:last]
    else:
        window = cfg.window or n
        whole = cfg.window and not model_cfg.block_len  # a block is shorter than a window: any start will do
        first = int(rng.integers(max(0, n - window) + 1)) if whole else int(rng.integers(n))
        chosen = order[first:first + window]
    if model_cfg.block_len:
        block = [(len(record["prompt_ids"]) + i) // model_cfg.block_len for i in chosen]
        chosen = [i for i, b in zip(chosen, block) if b == block[0]]
    return chosen


def make_batch(records, rngs, cfg, model_cfg):
    """records -> dict of tensors: xt, x0 (B, L); segment (B, W) int64 positions in reveal order (-1: none);
    in_segment (B, W) bool; rank (B, L); prompts as lists of ids.

    Everything that was not revealed before the segment is masked in xt, the EOS tail included.
    """
    x0, rank = torch.tensor([r["x0"] for r in records]), torch.tensor([r["rank"] for r in records])
    chosen = [draw_segment(r, cfg, model_cfg, rng) for r, rng in zip(records, rngs)]
    W = max(map(len, chosen))
    segment = torch.tensor([c + [-1] * (W - len(c)) for c in chosen])
    began = rank.gather(1, segment[:, :1])  # the rank of the first position: what came before is known
    xt = torch.where(rank < began, x0, model_cfg.mask_id)
    return dict(xt=xt, x0=x0, segment=segment, in_segment=segment >= 0, rank=rank,
                prompts=[r["prompt_ids"] for r in records])


def hidden_rows(model, prompts, xt, row, pos, device):
    """Hidden states (N, C) of response positions pos (N,) in rows row (N,)."""
    inputs, cols = response_inputs(model.cfg, prompts, xt)
    h = model.hidden(**{k: None if t is None else t.to(device) for k, t in inputs.items()})
    return h[row.to(device), cols[row, pos].to(device)]


def own_step_entropies(model, b, device):
    """Eq. 5: h(r) in the state just before r was revealed: (N,) fp32, one forward row per token."""
    row, w = b["in_segment"].nonzero(as_tuple=True)
    pos = b["segment"][row, w]
    known = b["rank"][row] < b["rank"][row, pos][:, None]
    xt = torch.where(known, b["x0"][row], model.cfg.mask_id)
    prompts = [b["prompts"][r] for r in row]
    h = hidden_rows(model, prompts, xt, torch.arange(len(row)), pos, device)
    return by_chunks(lambda h: entropy_of(model.head(h)), model.cfg.vocab_size, h)


def training_loss(model, records, rngs, cfg, device):
    """Trajectories -> loss of one micro-batch."""
    began = time.perf_counter()
    b = make_batch(records, rngs, cfg, model.cfg)
    data_s = time.perf_counter() - began
    row, w = b["in_segment"].nonzero(as_tuple=True)
    pos = b["segment"][row, w]
    h = hidden_rows(model, b["prompts"], b["xt"], row, pos, device)
    ce, entropy = by_chunks(lambda h, x0: token_terms(model.head(h), x0), model.cfg.vocab_size, h,
                            b["x0"][row, pos].to(device)).unbind(1)
    if cfg.entropy_at == "own_step":
        entropy = own_step_entropies(model, b, device)
    loss, parts = tabom_loss(ce, entropy, b["in_segment"].to(device), cfg.batch_size, cfg)
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


def collect(cfg, model, tok, out, world):
    """The model's own trajectories, without privileged information; wrong answers dropped."""
    problems = problems_of(cfg)
    if len(problems) < cfg.batch_size:  # said before hours of decoding
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(problems)} problems)")
    folder = Path(cfg.trajectories or out / "trajectories")
    rollout(model, tok, problems, folder, cfg.model, False, cfg.collect_batch, cfg.allow_code_execution,
            gen_len=cfg.gen_len, block_len=cfg.block_len, policy="static", per_step=1,
            cache=cfg.collect_cache, score=cfg.collect_score, temperature=cfg.collect_temperature,
            seed=cfg.collect_seed)
    barrier(world)
    wanted = {p["id"] for p in problems}  # a shared folder may hold more
    kept = [r for r in read_trajectories(folder) if r["correct"] and r["id"] in wanted]
    print(f"{len(kept)} of {len(problems)} trajectories are correct")
    if not kept:
        raise UserError(f"no trajectory in {folder} is correct: "
                        f"nothing to train on; check --data")
    return kept


def check_config(cfg):
    if min(cfg.batch_size, cfg.micro_batch) < 1:
        raise UserError(f"--batch_size {cfg.batch_size}, --micro_batch {cfg.micro_batch}: at least 1 each")
    if cfg.window < 0 or (cfg.window == 1 and cfg.lam):
        raise UserError(f"--window {cfg.window}: ranking needs segments of two tokens or more "
                        f"(0: all that is left)")
    if cfg.segment == "two_steps" and cfg.lam:
        raise UserError(f"--segment two_steps with --lam {cfg.lam}: compressed transitions are not ranked; "
                        f"give --lam 0")


def main():
    cfg = parse_args(Config, PRESETS, __doc__)
    check_config(cfg)
    targets = lora.ALL if cfg.lora_targets == "all" else tuple(cfg.lora_targets.split(","))
    if cfg.dry_run:
        return dry_run(cfg, len(problems_of(cfg)), targets)
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
    if not cfg.full:
        lora.add(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, targets)
    model = for_training(cfg, model, device, cfg.full)
    opts = [torch.optim.AdamW(trainable(model).values(), lr=cfg.lr, weight_decay=cfg.weight_decay)]
    opts[0].param_groups[0]["peak_lr"] = cfg.lr
    first = load_checkpoint(out, model, opts, rank, world)
    log(out, rank, first)
    if len(records) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(records)} trajectories): "
                        f"lower it")
    per_epoch = len(records) // cfg.batch_size
    n_steps = cfg.max_steps or cfg.epochs * per_epoch
    model.train()
    losses = []
    for step, bar in training_steps(first, n_steps, rank):
        began = time.perf_counter()
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)  # dropout
        epoch, at = divmod(step, per_epoch)
        chosen = shuffled(len(records), cfg.seed, epoch)[at * cfg.batch_size:(at + 1) * cfg.batch_size]
        total = {}
        for ns, weight in micro_batches(chosen, lambda n: len(records[n]["prompt_ids"]), cfg, rank, world):
            part, rngs = [records[n] for n in ns], [example_rng(cfg.seed, epoch, n) for n in ns]
            loss, parts = training_loss(model, part, rngs, cfg, device)
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
        if (step + 1) % cfg.save_every == 0 or step + 1 == n_steps or stop:
            save_checkpoint(out, step + 1, model, opts, np.mean(losses), rank, world)
            losses = []
        if stop:
            return stopped(step + 1, rank, world)
    model = save_final(cfg, model, final, rank)

    # 3. the same problems, the same decoding rules: base against TABOM
    if rank == 0 and evaluates:
        problems, protocol = load_problems("tiny", "dev", cfg.eval_problems), nt_eval.PROTOCOLS["tiny"]
        base = nt_model.load(cfg.model, device, dtype, cfg.revision)
        nt_eval.report([("base", nt_eval.curve(base, tok, problems, protocol, "base")),
                        ("TABOM", nt_eval.curve(model, tok, problems, protocol, "TABOM"))], out)
        nt_eval.report_tds([("base", base), ("TABOM", model)], records[:64], out)
    elif rank == 0:
        name = f"--model {cfg.model}" + (f" --revision {cfg.revision}" if cfg.revision else "")
        which = f"--model {final}" if cfg.full else f"{name} --adapter {final}"
        task = "" if cfg.data == "tiny" else " --task problems.jsonl"
        print(f"evaluate: python eval.py curve {which}{task} --gen_len {cfg.gen_len} "
              f"--block_len {cfg.block_len}")
    barrier(world)


if __name__ == "__main__":
    run_cli(main)
