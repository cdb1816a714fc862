"""T3D: Trajectory self-distillation via Direct Discriminative Optimisation (arXiv 2602.12262).

The idea: decode problems token by token with the model itself, no ground truth, and train it on the states of
these trajectories so that few forwards suffice. Cross-entropy there (naive TD) covers every mode and averages
them; DDO discriminates instead: raise the likelihood ratio to a reference on the trajectory's tokens (real),
lower it on the reference's own guesses (fake). The reference is the student of a few steps ago.

    glossary (paper -> code)
    x0, pi         record["x0"], record["rank"]: pi_i is the 1-based rank within i's training block
    x_t            xt (B, L): the first j tokens of every block revealed, the others masked
    p_theta, p_ref logp, logp_ref (N,): log-probabilities of the rows' tokens under student and reference
    fake x0        x_hat (N,): drawn from p_ref's factorised prediction on the same x_t
    ratio(x)       beta times the mean over the masked rows of log p_theta(x_i | x_t) - log p_ref(x_i | x_t)
    Eq. 5          naive_td: mean of -log p_theta(x0_i | x_t)                                    (t3d_loss)
    Eq. 6-7        real = -log sigma(ratio(x0)), fake = -alpha log(1 - sigma(ratio(x_hat)))      (t3d_loss)
    Eq. 8          path: -w_i log p_theta(x0_i | x_t)                                            (t3d_loss)
    Eq. 9          w_i = (K - pi_i + 1) / K, K the response tokens of i's block              (path_weights)
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
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
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
    n_problems: int = 0  # problems to collect on (0: all; tiny: 1200)
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
    loss: Literal["t3d", "naive_td"] = "t3d"  # naive_td: cross-entropy (Eq. 5) instead of DDO
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
    epochs: int = 30  # passes over the trajectories, each with new states
    max_steps: int = 0  # stop after this many steps (0: epochs decide)
    save_every: int = 100  # steps between checkpoints, a multiple of refresh
    log_every: int = 10  # steps between log lines
    eval_problems: int = 300  # problems of the closing evaluation (tiny only; 0: none)


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
    real = (F.softplus(-ratio) * here).sum() / n_examples  # Eq. 6, 7: -log sigma(ratio)
    fake = cfg.alpha * (F.softplus(ratio_fake) * here).sum() / n_examples  # Eq. 6, 7: -log(1 - sigma(ratio))
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
    """Inside, the trained tensors of the model are those of ref: the reference needs no second model."""
    params = trainable(model)
    mine = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            p.data = ref[name]
        yield
    finally:
        for name, p in params.items():
            p.data = mine[name]


def snapshot(model, into=None):
    """The trained tensors now; into: an older snapshot, overwritten, so that there are never two."""
    if into is None:
        return {name: p.detach().clone() for name, p in trainable(model).items()}
    for name, p in trainable(model).items():
        into[name].copy_(p.detach())
    return into


def training_loss(model, ref, records, rngs, cfg, vocabulary, device):
    """Trajectories -> loss of one micro-batch: one forward of the reference, one of the student."""
    b = make_batch(records, rngs, cfg, model.cfg, vocabulary)
    x0, u, path_w = (b[k][b["masked"]].to(device) for k in ("x0", "u", "path_w"))
    if cfg.loss == "naive_td":  # no reference
        logp = by_chunks(lambda h, x0: -F.cross_entropy(model.head(h).float(), x0, reduction="none"),
                         model.cfg.vocab_size, hidden_rows(model, b, device), x0)
        terms = logp[:, None].expand(-1, 4)
    else:
        with torch.no_grad(), swapped(model, ref):
            was_training, h_ref = model.training, hidden_rows(model.eval(), b, device)
            head_ref = model.head.weight.data
        model.train(was_training)
        terms = by_chunks(lambda h, h_ref, x0, u: token_terms(model.head(h), F.linear(h_ref, head_ref), x0, u,
                                                              cfg, model.cfg.mask_id),
                          model.cfg.vocab_size, hidden_rows(model, b, device), h_ref, x0, u)
    example = b["masked"].nonzero()[:, 0].to(device)
    return t3d_loss(*terms.unbind(1), path_w, example, cfg.batch_size, cfg)


# --- boilerplate: same in every method file ---
FREE = ("out", "overwrite", "save_every", "log_every", "eval_problems")  # may change when a run is continued


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
    """rank, world size, device, dtype. Under torchrun the process group is created here."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device, torch.bfloat16 if cuda else torch.float32


def open_run(cfg, rank):
    """The output directory, new or to be continued.
    Another configuration in it is an error, never overwritten.
    """
    out = Path(cfg.out or f"out/{Path(__file__).stem}-{Path(cfg.model).name}")
    if rank == 0:
        if cfg.overwrite and (out / "config.json").exists():
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
        write_atomic(out / "config.json", json.dumps(now, indent=2) + "\n")
    return out


def write_atomic(path, text):
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def barrier(world):
    if world > 1:
        dist.barrier()


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


def optimizer_step(model, opts, frac, clip, world):
    """Sum gradients over ranks (losses are already divided by the global batch), clip, step.
    Returns the norm.
    """
    params = list(trainable(model).values())
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world > 1:  # all of them in one bucket
        bucket = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(bucket)
        for p, total in zip(params, bucket.split([p.numel() for p in params])):
            p.grad.copy_(total.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["peak_lr"] * frac
        opt.step()
        opt.zero_grad()
    return float(norm)


def save_checkpoint(out, step, model, opts):
    """One folder per step, complete or absent: written under another name, synced, renamed.
    The last two are kept.

    Learning rate, data order and noise are functions of (seed, step),
    so the step number is all of their state.
    """
    root, tmp = out / "checkpoints", out / "checkpoints" / "tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file({k: p.detach().cpu().contiguous() for k, p in trainable(model).items()},
              tmp / "model.safetensors")
    torch.save([opt.state_dict() for opt in opts], tmp / "optimizer.pt")
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in tmp.iterdir()}
    (tmp / "checksums.json").write_text(json.dumps(sums))
    for f in [*tmp.iterdir(), tmp]:
        fd = os.open(f, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    shutil.rmtree(root / f"step-{step:06d}", ignore_errors=True)
    tmp.rename(root / f"step-{step:06d}")
    for old in sorted(root.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(out, model, opts):
    """Fill model and optimizer from the newest intact checkpoint;
    returns the step to go on with (0: none).
    """
    for folder in sorted((out / "checkpoints").glob("step-*"), reverse=True):
        try:
            sums = json.loads((folder / "checksums.json").read_text())
            intact = all(hashlib.sha256((folder / n).read_bytes()).hexdigest() == s for n, s in sums.items())
        except (OSError, ValueError):
            intact = False
        if not intact:
            print(f"warning: checkpoint {folder} is damaged, trying the one before", file=sys.stderr)
            continue
        stored, params = load_file(folder / "model.safetensors"), trainable(model)
        if stored.keys() != params.keys():
            raise UserError(f"{folder} does not fit this model: use another --out")
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(stored[name])
        states = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        for opt, state in zip(opts, states):
            opt.load_state_dict(state)
        return int(folder.name.split("-")[1])
    return 0


def save_final(cfg, model, final, rank):
    """The trained adapter, or the whole model with its tokeniser:
    written under another name, then renamed.
    """
    if rank != 0:
        return
    tmp = final.with_name("tmp-" + final.name)
    shutil.rmtree(tmp, ignore_errors=True)
    if final.name == "adapter":
        lora.save(model, tmp, base=cfg.model)
    else:
        nt_model.save(model, tmp)
        nt_model.copy_tokenizer(cfg.model, tmp, cfg.revision)
    shutil.rmtree(final, ignore_errors=True)  # saved before, and killed during the closing evaluation
    tmp.rename(final)
    print(f"saved {final}")


def log(out, rank, row):
    """Append one line to log.jsonl, with the seconds since the line before;
    a continued run first drops the lines of steps it will repeat (row = step).
    """
    now = time.perf_counter()
    if rank == 0 and isinstance(row, int):
        lines = (out / "log.jsonl").read_text().splitlines(True) if (out / "log.jsonl").exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= row]
        write_atomic(out / "log.jsonl", "".join(kept))
    elif rank == 0:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps({**row, "seconds": round(now - log.last, 3)}) + "\n")
    log.last = now


def over_ranks(total, world):
    """Sums of every rank's parts of the loss; a rank without examples has none."""
    gathered = [total]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, total)
    return {k: sum(part.get(k, 0.0) for part in gathered) for part in gathered for k in part}


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


def collect(cfg, model, tok, out, world):
    """The model's own rollouts, one token per forward; no ground truth, no filter."""
    n_problems = cfg.n_problems or (1200 if cfg.data == "tiny" else None)
    problems = load_problems(cfg.data, "train", n_problems)
    found = len(problems)
    problems = [p for p in problems if len(tok.prompt_ids(p["prompt"])) <= cfg.max_prompt]
    if len(problems) < found:
        print(f"{found - len(problems)} prompts are longer than --max_prompt {cfg.max_prompt}: left out")
    if len(problems) < cfg.batch_size:  # said before hours of decoding
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(problems)} problems)")
    folder = Path(cfg.trajectories or out / "trajectories")
    rollout(model, tok, problems, folder, cfg.model, False, cfg.collect_batch, cfg.allow_code_execution,
            graded=False, gen_len=cfg.gen_len, block_len=cfg.block_len, policy="static", per_step=1,
            cache=cfg.collect_cache, temperature=cfg.collect_temperature, seed=cfg.collect_seed)
    barrier(world)
    wanted = {p["id"] for p in problems}  # a shared folder may hold more
    return [r for r in read_trajectories(folder) if r["id"] in wanted]


def check_config(cfg):
    """The settings that are used: the code's choices under --variant code."""
    if min(cfg.batch_size, cfg.micro_batch, cfg.refresh) < 1:
        raise UserError(f"--batch_size {cfg.batch_size}, --micro_batch {cfg.micro_batch}, "
                        f"--refresh {cfg.refresh}: at least 1 each")
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
    rank, world, device, dtype = setup(cfg)
    out = open_run(cfg, rank)
    barrier(world)
    final, evaluates = out / ("model" if cfg.full else "adapter"), cfg.eval_problems and cfg.data == "tiny"
    if (out / "results.jsonl" if evaluates else final).exists():
        print(f"{out} is finished already; --overwrite starts anew")
        return
    model = nt_model.load(cfg.model, device, torch.float32 if cfg.full else dtype, cfg.revision)
    tok = load_tokenizer(cfg.model, cfg.revision)

    # 1. trajectories of the base model
    records = collect(cfg, model, tok, out, world)

    # 2. training
    torch.manual_seed(cfg.seed)
    set_block(model, cfg)
    if not cfg.full:
        lora.add(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
    opts = [torch.optim.AdamW(trainable(model).values(), lr=cfg.lr, weight_decay=cfg.weight_decay)]
    opts[0].param_groups[0]["peak_lr"] = cfg.lr
    first = load_checkpoint(out, model, opts)
    log(out, rank, first)
    if len(records) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(records)} trajectories): "
                        f"lower it")
    per_epoch = len(records) // cfg.batch_size
    n_steps = cfg.max_steps or cfg.epochs * per_epoch
    vocabulary = np.setdiff1d(np.arange(tok.n_vocab), [*tok.special.values(), model.cfg.mask_id])
    ref = None
    model.train()
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, unit="step", desc="train",
               disable=rank != 0)
    for step in bar:
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)  # dropout
        if step % cfg.refresh == 0 and cfg.loss != "naive_td":
            ref = snapshot(model, ref)  # checkpoints fall on these steps: a continued run starts here too
        epoch, at = divmod(step, per_epoch)
        chosen = shuffled(len(records), cfg.seed, epoch)[at * cfg.batch_size:(at + 1) * cfg.batch_size]
        mine = chosen[rank::world]
        total = {}
        for i in range(0, len(mine), cfg.micro_batch):
            part = [records[n] for n in mine[i:i + cfg.micro_batch]]
            rngs = [example_rng(cfg.seed, epoch, int(n)) for n in mine[i:i + cfg.micro_batch]]
            loss, parts = training_loss(model, ref, part, rngs, cfg, vocabulary, device)
            check_finite(loss, [r["id"] for r in part], out, step)
            loss.backward()
            for key, value in {"loss": loss.item(), **parts}.items():
                total[key] = total.get(key, 0.0) + value
        frac = lr_frac(step, n_steps, cfg)
        norm = optimizer_step(model, opts, frac, cfg.clip, world)
        bar.set_postfix_str(f"loss {total.get('loss', math.nan):.3f}", refresh=False)
        if (step + 1) % cfg.log_every == 0 or step + 1 == n_steps:
            log(out, rank, dict(step=step + 1, **over_ranks(total, world), grad_norm=norm, lr_frac=frac))
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == n_steps):
            save_checkpoint(out, step + 1, model, opts)
    save_final(cfg, model, final, rank)

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
