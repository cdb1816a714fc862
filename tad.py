"""TAD: Temporal-Aware trajectory self-Distillation
(RUC and Ant Group, 2026; code: github.com/BHmingyang/TAD).

The idea: (1) the base model, shown the worked solution, decodes every training problem one token per forward;
wrong answers are dropped. (2) The student never sees the solution. At a state t of such a trajectory it
learns the tokens that are revealed within the next W forwards as hard labels (it may then reveal them
together), and everything later only as the teacher's soft distribution (so that it does not guess). The
teacher is the base model: LoRA off.

    glossary (paper -> code)
    s, s + y*            plain prompt, privileged prompt (the collector's, with the reference solution)
    trajectory (x0, pi)  record["x0"] (L,), record["order"] (L,): which forward revealed each position
    x_t                  xt (B, L): x0 where order < t, else MASK (data.state_at)
    N_t  Eq. 10          near (N,) bool: t <= order < t + W, cut at block edges for SDAR  (make_batch)
    D_t  Eq. 11          the other masked rows: order >= t + W
    L_near     Eq. 12    cross-entropy on x0; mean over near rows           (token_terms, tad_loss)
    L_distant  Eq. 13    tau^2 KL(teacher || student); mean over the others (token_terms, tad_loss)
    L          Eq. 14    L_near + lambda L_distant                          (tad_loss)
    lambda, tau          cfg.lam, cfg.tau

What differs from the published code, and why: one collector writes exactly what the trainer reads (tokens and
order instead of 160 snapshots); padding never hides a revealed EOS; all seven matrices of a block carry LoRA
in every family; gradients are divided by accumulation steps; the window rule the paper describes (--window
auto-quality, auto-speed) is built; graders do not reject fractions.

    python tad.py                                              # the whole story on a laptop CPU, tiny model
    python tad.py --model llada --data problems.jsonl          # one GPU
    torchrun --nproc_per_node=8 tad.py --model dream --allow_code_execution   # the paper's data, by preset
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
from contextlib import nullcontext
from dataclasses import dataclass, fields
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
from data import (example_rng, load_problems, load_tokenizer, pad_response, privileged_prompt,
                  read_trajectories, response_inputs, rollout, state_at)
from model import UserError, by_chunks, run_cli


@dataclass
class Config:
    model: str = "tiny"  # preset name, hub id or directory
    revision: str = ""  # commit, branch or tag of a hub id
    out: str = ""  # output directory; default out/tad-<model>
    overwrite: bool = False  # start anew in a directory that already holds a run
    seed: int = 0  # of the states drawn, the data order and the adapters
    # --- trajectories
    data: str = "tiny"  # data set by name, or a .jsonl with prompt, solution and answer; see data.py --help
    n_problems: int = 0  # problems to collect on (0: all; tiny: 1200)
    source: Literal["full", "no_privilege", "traj_random", "gt_random"] = "full"  # Table 4: what to train on
    allow_code_execution: bool = False  # run the tests of code problems on this machine
    trajectories: str = ""  # folder to collect into, which runs may share; default: the run's own
    gen_len: int = 256  # response length L, tokens
    block_len: int = 32  # decoding block, tokens
    collect_cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "none"  # of the collector
    collect_temperature: float = 0.0  # (code) LLaDA 0.7 for math, 0 for code; Dream 0.2
    collect_seed: int = 0  # of the collector's draws
    collect_batch: int = 64  # problems decoded at once per rank
    # --- loss
    window: str = "auto-speed"  # W in forwards, or auto-quality / auto-speed: measured on the trajectories
    lam: float = 1.0  # lambda of Eq. 14
    tau: float = 1.0  # temperature of the soft term
    near: Literal["ce", "kl", "none"] = "ce"  # loss of near tokens (Table 3)
    distant: Literal["kl", "ce", "none"] = "kl"  # loss of distant tokens (Table 3)
    teacher_prompt: Literal["privileged", "plain", "system"] = "privileged"  # seen by teacher; system: (code)
    # --- training
    full: bool = False  # train all weights (the teacher is then a frozen copy) instead of LoRA adapters
    lora_r: int = 128  # LoRA rank
    lora_alpha: int = 128  # LoRA alpha
    lora_dropout: float = 0.05  # LoRA dropout
    lr: float = 2e-5  # peak learning rate
    lr_schedule: Literal["constant", "cosine", "tail"] = "constant"  # tail: linear to zero over the last 40%
    lr_floor: float = 0.0  # share of the peak that the schedules end at
    warmup_steps: int = 0  # linear warm-up
    weight_decay: float = 0.01  # AdamW
    clip: float = 1.0  # gradient norm
    batch_size: int = 256  # (trajectory, state) pairs per optimizer step over all ranks
    micro_batch: int = 4  # pairs per forward
    states_per_trajectory: int = 0  # states drawn per trajectory and epoch (0: every state once)
    epochs: int = 1  # passes over the pairs
    max_steps: int = 0  # stop after this many steps (0: epochs decide)
    save_every: int = 100  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    eval_problems: int = 300  # problems of the closing evaluation (tiny only; 0: none)


PAPER = "gsm8k+prm12k+kodcode"  # running kodcode's tests needs --allow_code_execution
PRESETS = {
    "tiny": dict(gen_len=48, block_len=16, window="auto-quality", lora_r=32, lora_alpha=32,
                 lora_dropout=0.0, lr=1e-3, lr_schedule="tail", warmup_steps=10, batch_size=64,
                 micro_batch=64, max_steps=150, save_every=50, eval_problems=128),
    "llada": dict(data=PAPER, window="20", collect_temperature=0.7),
    "dream": dict(data=PAPER, collect_temperature=0.2),
    "sdar": dict(data=PAPER, block_len=4, collect_cache="exact"),  # its own block; not in the paper
}


RANDOM = ("traj_random", "gt_random")  # sources whose states are random masks


# --------------------------------------------------------------------------------------------------- the loss
def token_terms(student, teacher, x0, cfg):
    """What tad_loss takes of every row: cross-entropy on x0, and tau^2 KL(teacher || student) at temperature
    tau (0 without a teacher): (N, 2) fp32. student, teacher (N, V) logits, x0 (N,) int64.
    """
    ce = F.cross_entropy(student.float(), x0, reduction="none")  # -log p(x0_i | s, x_t)
    kl = torch.zeros_like(ce)
    if teacher is not None:
        log_q = F.log_softmax(teacher.float() / cfg.tau, -1)
        log_p = F.log_softmax(student.float() / cfg.tau, -1)
        kl = cfg.tau ** 2 * (log_q.exp() * (log_q - log_p)).sum(-1)
    return torch.stack([ce, kl], 1)


def tad_loss(ce, kl, near, example, n_examples, cfg):
    """The TAD objective over the masked rows of a batch -> scalar fp32, dict of its parts.

    ce, kl (N,) fp32 of token_terms, kl read only where the settings ask for it; near (N,) bool; example (N,)
    int64, which example a row belongs to. Each expectation is a mean over the tokens of one example and then
    over the n_examples of the global batch, so that neither micro-batches nor ranks change the gradient.
    """
    def mean_over_examples(values, rows):
        count = torch.zeros(int(example.max()) + 1, device=values.device).index_add_(0, example, rows.float())
        return (values * rows / count.clamp(min=1)[example]).sum() / n_examples

    term = {"ce": ce, "kl": kl, "none": torch.zeros_like(ce)}
    loss_near = mean_over_examples(term[cfg.near], near)  # Eq. 12
    loss_distant = mean_over_examples(term[cfg.distant], ~near)  # Eq. 13
    loss = loss_near + cfg.lam * loss_distant  # Eq. 14
    return loss, dict(near=loss_near.item(), distant=loss_distant.item())


# ---------------------------------------------------------------------------------------------- batch builder
def make_batch(examples, rngs, cfg, window, model_cfg):
    """examples: list of (record, t) -> dict of tensors: xt, x0, masked, near (B, L); prompts as lists of ids.

    Random-mask sources ignore t: every position is masked with probability u ~ U(0, 1], and all masked ones
    are near (plain cross-entropy, the standard objective with 1/t taken as 1 / masked fraction).
    """
    x0 = torch.tensor([r["x0"] for r, _ in examples])
    order = torch.tensor([r["order"] for r, _ in examples])
    t = torch.tensor([t for _, t in examples])[:, None]
    if cfg.source in RANDOM:
        u = np.array([1 - rng.random() for rng in rngs])[:, None]
        masked = torch.tensor(np.array([rng.random(x0.shape[1]) for rng in rngs]) < u)
        xt, near = torch.where(masked, model_cfg.mask_id, x0), masked
    else:
        xt, masked = state_at(x0, order, t, model_cfg.mask_id)
        near = masked & (order < t + window)  # Eq. 10; the rest of `masked` is Eq. 11
    if model_cfg.block_len and cfg.source not in RANDOM:  # SDAR: a window ends with the block being decoded
        start = torch.tensor([len(r["prompt_ids"]) for r, _ in examples])[:, None]
        block = (start + torch.arange(x0.shape[1])) // model_cfg.block_len
        near = near & (block == torch.where(masked, block, block.max()).amin(1, keepdim=True))
    return dict(xt=xt, x0=x0, masked=masked, near=near, plain=[r["prompt_ids"] for r, _ in examples])


def teacher_prompts(examples, cfg, tok):
    """The prompt the soft teacher sees, per example: lists of ids."""
    if cfg.teacher_prompt == "plain" or cfg.source == "no_privilege":  # the prompt of the collection
        return [r["prompt_ids"] for r, _ in examples]
    if cfg.teacher_prompt == "privileged":
        return [r.get("privileged_prompt_ids") or tok.prompt_ids(privileged_prompt(r)).tolist()
                for r, _ in examples]
    return [tok.prompt_ids(r["prompt"], system=f"\n\nReference Answer: {r['solution']}").tolist()
            for r, _ in examples]


def hidden_rows(model, prompts, xt, rows, device, x0=None):
    """Hidden states (N, C) of the chosen response positions; rows (B, L) bool.
    x0 (B, L): a block-causal model then sees clean blocks before every noisy one.
    """
    inputs, cols = response_inputs(model.cfg, prompts, xt, x0)
    row, j = rows.nonzero(as_tuple=True)
    h = model.hidden(**{k: None if t is None else t.to(device) for k, t in inputs.items()})
    return h[row.to(device), cols[row, j].to(device)]


def training_loss(model, teacher, examples, rngs, cfg, window, tok, device):
    """Batch -> loss of one micro-batch: a student forward,
    and a teacher forward where a row needs the soft term.
    """
    b = make_batch(examples, rngs, cfg, window, model.cfg)
    masked, near = b["masked"], b["near"]
    # a random mask leaves no state of decoding behind, so SDAR needs its training layout for it
    layout = bool(model.cfg.block_len) and cfg.source in RANDOM
    x0 = b["x0"][masked].to(device)
    h = hidden_rows(model, b["plain"], b["xt"], masked, device, b["x0"] if layout else None)
    soft = masked & ((near if cfg.near == "kl" else False) | (~near if cfg.distant == "kl" else False))
    if soft.any():  # the teacher reads only the examples that have such rows
        need = soft.any(1)
        chosen = [e for e, n in zip(examples, need.tolist()) if n]
        with torch.no_grad(), lora.off(model) if teacher is model else nullcontext():
            was_training = teacher.training
            rows = hidden_rows(teacher.eval(), teacher_prompts(chosen, cfg, tok), b["xt"][need],
                               soft[need], device, b["x0"][need] if layout else None)
            teacher.train(was_training)
        is_soft = soft[masked].to(device)
        h_teacher = torch.zeros_like(h, dtype=rows.dtype).masked_scatter(is_soft[:, None], rows)

        def terms(h, h_teacher, x0):
            with torch.no_grad():
                teacher_logits = teacher.head(h_teacher)
            return token_terms(model.head(h), teacher_logits, x0, cfg)
        ce, kl = by_chunks(terms, model.cfg.vocab_size, h, h_teacher, x0).unbind(1)
        kl = torch.where(is_soft, kl, 0)
    else:
        ce, kl = by_chunks(lambda h, x0: token_terms(model.head(h), None, x0, cfg), model.cfg.vocab_size,
                           h, x0).unbind(1)
    example = masked.nonzero()[:, 0].to(device)
    return tad_loss(ce, kl, near[masked].to(device), example, cfg.batch_size, cfg)


# ------------------------------------------------------------------------------------------- the window rule
@torch.no_grad()
def confidence_decay(model, records, device, n_records=64, n_states=8):
    """Mean p(x0_i | plain prompt, x_t) of the untrained student
    as a function of order_i - t -> (T,) fp32 numpy.

    The paper's Figure 3(b). States are spread evenly over each trajectory; the EOS tail is left out.
    """
    total, count = np.zeros(4096), np.zeros(4096)
    for r in records[:n_records]:
        x0, order = torch.tensor(r["x0"]), torch.tensor(r["order"])
        ts = torch.linspace(0, int(order.max()), n_states).long().unique()
        xt, masked = state_at(x0[None], order[None], ts[:, None], model.cfg.mask_id)
        masked = masked & (torch.arange(len(x0)) < nt_model.n_content(x0, model.cfg.eos_ids))
        logits = model.head(hidden_rows(model, [r["prompt_ids"]] * len(ts), xt, masked, device))
        p = logits.float().softmax(-1).cpu().gather(1, x0.expand_as(xt)[masked][:, None])[:, 0].numpy()
        offset = (order[None] - ts[:, None])[masked].numpy()
        np.add.at(total, offset, p)
        np.add.at(count, offset, 1)
    seen = np.flatnonzero(count)
    with np.errstate(invalid="ignore"):
        return total[:seen[-1] + 1] / count[:seen[-1] + 1]  # NaN where no token is that far away


def auto_window(decay, mode):
    """The smallest offset whose mean confidence is below 0.5 (auto-quality) or 0.2 (auto-speed);
    at least 1.
    """
    level = {"auto-quality": 0.5, "auto-speed": 0.2}[mode]
    below = np.flatnonzero(decay < level)
    return max(1, int(below[0]) if len(below) else len(decay))


def plot_decay(decay, window, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    fig, ax = plt.subplots(figsize=(6.4, 3.6), dpi=140)
    ax.plot(decay, marker="o", markersize=3)
    for level, name in ((0.5, "quality"), (0.2, "speed")):
        ax.axhline(level, color="grey", linewidth=0.8, linestyle="--")
        ax.annotate(f"{name}: {level}", (len(decay) - 1, level), ha="right", va="bottom", fontsize=8,
                    color="grey")
    ax.axvline(window, color="tab:red", linewidth=1, label=f"W = {window}")
    ax.set_xlabel("forwards until the token is revealed (order - t)")
    ax.set_ylabel("student's mean confidence in it")
    ax.set_ylim(0, 1)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def choose_window(cfg, model, records, out, rank, device):
    """W: the number given, or by the rule. The untrained student's decay is measured and drawn anyway."""
    fixed = cfg.window.isdigit()
    decay = confidence_decay(model, records, device)
    window = int(cfg.window) if fixed else auto_window(decay, cfg.window)
    if rank == 0:
        print(f"confidence by forwards ahead: {' '.join(f'{p:.2f}' for p in decay[:16])} ...  W = {window}")
        kept = dict(window=window, decay=[None if np.isnan(p) else round(float(p), 4) for p in decay])
        write_atomic(out / "window.json", json.dumps(kept) + "\n")
        plot_decay(decay, window, out / "window.png")
    return window


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
    """The run's trajectories: collected now as far as they are missing, wrong answers dropped."""
    n_problems = cfg.n_problems or (1200 if cfg.data == "tiny" else None)
    problems = load_problems(cfg.data, "train", n_problems)
    folder = Path(cfg.trajectories or out / "trajectories")
    rollout(model, tok, problems, folder, cfg.model, cfg.source != "no_privilege",
            cfg.collect_batch, cfg.allow_code_execution, gen_len=cfg.gen_len, block_len=cfg.block_len,
            policy="static", per_step=1, cache=cfg.collect_cache, temperature=cfg.collect_temperature,
            seed=cfg.collect_seed)
    barrier(world)
    wanted = {p["id"] for p in problems}  # a shared folder may hold more
    kept = [r for r in read_trajectories(folder) if r["correct"] and r["id"] in wanted]
    print(f"{len(kept)} of {len(problems)} trajectories are correct")
    if not kept:
        raise UserError(f"no trajectory in {folder} is correct: "
                        f"nothing to train on; check --data")
    if cfg.source == "gt_random":  # Table 4's first row: ground-truth text instead of the model's own
        solution = {p["id"]: tok.response_ids(p["solution"]) for p in problems}
        fits = [r for r in kept if len(solution[r["id"]]) <= cfg.gen_len]
        if len(fits) < len(kept):
            print(f"{len(kept) - len(fits)} solutions are longer than --gen_len {cfg.gen_len}: left out")
        kept = [{**r, "x0": pad_response(solution[r["id"]], cfg.gen_len, tok.eos_id)} for r in fits]
    return kept


def check_config(cfg):
    fixed = cfg.window.isdigit() and int(cfg.window) > 0
    if not fixed and cfg.window not in ("auto-quality", "auto-speed"):
        raise UserError(f"--window {cfg.window!r}: give a positive number of forwards, "
                        f"auto-quality or auto-speed")
    if min(cfg.batch_size, cfg.micro_batch) < 1:
        raise UserError(f"--batch_size {cfg.batch_size}, --micro_batch {cfg.micro_batch}: at least 1 each")


def training_pairs(records, cfg, epoch):
    """The (record number, t) pairs of an epoch:
    every state of every trajectory, or a few drawn ones, shuffled.
    """
    pairs = []
    for n, r in enumerate(records):
        states = np.arange(max(r["order"]) + 1)
        if cfg.states_per_trajectory:
            n_drawn = min(cfg.states_per_trajectory, len(states))
            states = example_rng(cfg.seed, epoch, n).choice(states, n_drawn, False)
        pairs += [(n, int(t)) for t in states]
    return [pairs[i] for i in shuffled(len(pairs), cfg.seed, epoch)]


def main():
    cfg = parse_args(Config, PRESETS, __doc__)
    check_config(cfg)
    rank, world, device, dtype = setup(cfg)
    out = open_run(cfg, rank)
    barrier(world)
    final, evaluates = out / ("model" if cfg.full else "adapter"), cfg.eval_problems and cfg.data == "tiny"
    if (out / "results.jsonl" if evaluates else final).exists():
        print(f"{out} is finished already; --overwrite starts anew")
        return
    model = nt_model.load(cfg.model, device, torch.float32 if cfg.full else dtype, cfg.revision)
    tok = load_tokenizer(cfg.model, cfg.revision)

    # 1. trajectories of the base model with privileged information, and the window
    records = collect(cfg, model, tok, out, world)
    window = choose_window(cfg, model, records, out, rank, device)

    # 2. student and soft teacher: the same weights with LoRA off, or a frozen copy under --full
    torch.manual_seed(cfg.seed)
    if cfg.full:
        teacher = nt_model.load(cfg.model, device, dtype, cfg.revision).requires_grad_(False)
    else:
        teacher = lora.add(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
    opts = [torch.optim.AdamW(trainable(model).values(), lr=cfg.lr, weight_decay=cfg.weight_decay)]
    opts[0].param_groups[0]["peak_lr"] = cfg.lr
    first = load_checkpoint(out, model, opts)
    log(out, rank, first)

    # 3. training
    epoch, pairs = 0, training_pairs(records, cfg, 0)
    if len(pairs) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size} exceeds the data ({len(pairs)} states): lower it")
    per_epoch = len(pairs) // cfg.batch_size
    n_steps = cfg.max_steps or cfg.epochs * per_epoch
    model.train()
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, unit="step", desc="train",
               disable=rank != 0)
    for step in bar:
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)  # dropout
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            pairs = training_pairs(records, cfg, epoch)
        at = step % per_epoch * cfg.batch_size
        mine = range(at, at + cfg.batch_size)[rank::world]
        total = {}
        for i in range(0, len(mine), cfg.micro_batch):
            part = mine[i:i + cfg.micro_batch]
            examples = [(records[pairs[j][0]], pairs[j][1]) for j in part]
            rngs = [example_rng(cfg.seed, epoch, j) for j in part]
            loss, parts = training_loss(model, teacher, examples, rngs, cfg, window, tok, device)
            check_finite(loss, [r["id"] for r, _ in examples], out, step)
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

    # 4. the same problems, the same decoding rules: base against TAD
    if rank == 0 and evaluates:
        problems, protocol = load_problems("tiny", "dev", cfg.eval_problems), nt_eval.PROTOCOLS["tiny"]
        with lora.off(model) if teacher is model else nullcontext():
            base = nt_eval.curve(teacher, tok, problems, protocol, "base")
        nt_eval.report([("base", base), ("TAD", nt_eval.curve(model, tok, problems, protocol, "TAD"))], out)
    elif rank == 0:
        base = f"--model {cfg.model}" + (f" --revision {cfg.revision}" if cfg.revision else "")
        which = f"--model {final}" if cfg.full else f"{base} --adapter {final}"
        task = "" if cfg.data == "tiny" else " --task problems.jsonl"
        print(f"evaluate: python eval.py curve {which}{task} --gen_len {cfg.gen_len} "
              f"--block_len {cfg.block_len}")
    barrier(world)


if __name__ == "__main__":
    run_cli(main)
