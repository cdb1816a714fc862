"""TRIMS: Trajectory-Ranked Instruction Masked Supervision (arXiv 2604.00666), and its baseline, standard
masked-diffusion training (MDLM SFT).

The idea: good parallel decoding settles the hard tokens first. One pass of an autoregressive teacher says how
hard every token of the data is, and a share of the random masks gives way to masks that follow that order,
hard tokens visible, easy ones masked. No trajectories are collected, and the loss stays as it is:

    loss = 1/L  sum over masked i of  1/t * -log p(x0_i | prompt, xt)      (LLaDA, arXiv 2502.09992, SFT)

    glossary (paper -> code)
    d_i           difficulty: -log p_teacher(x_i | s, x_<i), or the teacher's entropy (difficulty)
    b_i, K        bucket 1..n_buckets of equal mass over all tokens of the data; harder = lower      (buckets)
    k             threshold, uniform over 0..K-1: buckets <= k are context, the others future
    masking rule  P(i masked) = p_context if b_i <= k else p_future                          (trajectory_mask)
    x0            clean response (L,); xt noised, masked (L,) bool, t masking probability
    loss_w        1 / t, or 1 / masked fraction where no t exists (--trajectory_weight)       (mask_response);
                  make_batch divides it by L and the batch size

`--trajectory_share 0` is standard training: SFT on solutions or, with trajectories as --data, on own text.
Ours, since our copy of the paper lost them: trajectory_share 0.5 (0.75 cost the tiny model 9 points of
accuracy at 4 tokens per forward), LoRA alpha = r = 32 and weight decay 0.01 (neither changed its accuracy).

    python trims.py                                          # tiny model, tiny AR teacher, on a laptop CPU
    python trims.py --trajectory_share 0 --data out/tad-tiny/trajectories      # SFT on collected responses
    torchrun --nproc_per_node=8 trims.py --model dream           # s1K, by preset"""
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import UserError, refuse_if, run_cli, say  # first
import numpy as np
import torch
import torch.nn.functional as F

import eval as nt_eval
import model as nt_model
import run
from data import (GAMES, TINY_LEN, example_rng, fitting, game_example, hidden_rows, load_problems,
                  load_tokenizer, read_trajectories, stacked)
from teacher import load_teacher_tokenizer, score_examples


@dataclass
class Config(run.Options):
    seed: int = 0  # of the masks, the data order and the adapters
    data: str = "tiny"  # data set by name or a .jsonl with solutions, see data.py --help; or trajectories
    only_correct: bool = True  # leave out a folder's wrong trajectories (--no-only_correct: ReDi, SFT-SD)
    with_thinking: bool = False  # s1K: a problem's "thinking" (the reasoning trace) before its solution
    n_problems: int = 0  # examples to train on, the first ones (0: all; 2000 of a game)
    gen_len: int = 256  # response length L, tokens, EOS-filled; trajectories have their own, up to this one
    train_block: int = 0  # block of training on block-causal models (0: the model's own), tokens
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
    t_min: float = 0.001  # smallest masking probability
    lora_r: int = 32  # LoRA rank
    lora_alpha: int = 32  # LoRA alpha (not published)
    lora_dropout: float = 0.0  # LoRA dropout
    lora_targets: str = "all"  # matrices of a block that carry adapters, with commas, or all
    lr: float = 1e-4  # peak learning rate
    warmup_steps: int = 20  # linear warm-up
    warmup_ratio: float = 0.0  # share of all steps, instead of warmup_steps
    weight_decay: float = 0.01  # AdamW (not published)
    batch_size: int = 128  # examples per optimizer step over all ranks
    micro_batch: int = 32  # examples per forward
    epochs: int = 30  # passes over the data


PRESETS = {
    "tiny": dict(gen_len=48, teacher="tiny-ar", lr=1e-3, max_steps=200, batch_size=64, micro_batch=64),
    "others": dict(data="s1k", gen_len=1024, warmup_ratio=0.03),  # LLaDA and Dream, too
}


def mdlm_loss(logits, x0, loss_w):
    """Weighted cross-entropy of logits (N, V) on x0 (N,). loss_w (N,) carries 1/t, 1/L and 1/batch."""
    ce = F.cross_entropy(logits.float(), x0, reduction="none")
    return (loss_w * ce).sum()


def buckets(scores, n_buckets, ordering, seed=0):
    """Scores (N, L), NaN = EOS filling -> buckets 1..n_buckets, N lists: quantiles over all the tokens."""
    scores = np.array(scores)
    known = ~np.isnan(scores)
    draw = np.random.default_rng(seed).permutation(known.sum())  # not data order, which would rank the files
    keys = {"descending": -scores[known], "ascending": scores[known], "random": draw}[ordering]
    place = np.argsort(np.lexsort((draw, keys)))  # equal scores: at random
    bucket = np.full(scores.shape, 1 if ordering == "ascending" else n_buckets)
    bucket[known] = 1 + place * n_buckets // len(place)
    return bucket.tolist()


def trajectory_mask(bucket, cfg, rng):
    """The masking rule -> masked (L,) bool, loss_w (L,) before the normalisation over L. bucket: L ints."""
    bucket, k = np.asarray(bucket), rng.integers(cfg.n_buckets)  # uniform over 0..K-1
    p = np.where(bucket <= k, cfg.p_context, cfg.p_future)
    masked = rng.random(len(bucket)) < p
    weight = len(bucket) / max(1, masked.sum()) if cfg.trajectory_weight == "mean" else 1.0
    return masked, np.full(len(bucket), weight)


def mask_response(example, cfg, rng):
    """-> masked (L,) bool, loss_w (L,) = 1/t before 1/L."""
    if "bucket" in example and rng.random() < cfg.trajectory_share:
        return trajectory_mask(example["bucket"], cfg, rng)
    L, t = len(example["x0"]), cfg.t_min + (1 - cfg.t_min) * rng.random()
    return rng.random(L) < t, np.full(L, 1 / t)


def make_batch(examples, rngs, cfg, model_cfg):
    """-> dict of xt, x0 (B, L) int64, masked (B, L) bool, loss_w (B, L) fp32; prompts, lists of ids; ids."""
    x0, names = stacked(examples, "x0")
    noise = [mask_response(e, cfg, rng) for e, rng in zip(examples, rngs)]
    masked, loss_w = (torch.tensor(np.array(part)) for part in zip(*noise))
    return dict(names, xt=torch.where(masked, model_cfg.mask_id, x0), x0=x0, masked=masked,
                loss_w=loss_w.float() / (x0.shape[1] * cfg.batch_size))


def training_loss(model, b, cfg):
    """Batch -> loss of one micro-batch, and no parts."""
    at = (b["masked"] & (b["loss_w"] > 0)).nonzero(as_tuple=True)  # rows, positions; weight 0: only masked
    clean = b["x0"] if model.cfg.block_len else None  # SDAR: every noisy block stands behind clean ones
    h = hidden_rows(model, b["prompts"], b["xt"], at, clean)
    x0, loss_w = b["x0"][at].to(h.device), b["loss_w"][at].to(h.device)
    loss = nt_model.by_chunks(lambda h, x0, w: mdlm_loss(model.head(h), x0, w)[None], model.cfg.vocab_size,
                              h, x0, loss_w)
    return loss.sum(), {}


def load_examples(cfg, tok):
    """The data as a list of {id, prompt_ids, x0}."""
    most, folder = nt_model.config_of(cfg.model, cfg.revision).max_len, Path(cfg.data).is_dir()
    refuse_if(not folder, "only_correct", f"is for trajectories, a folder, and {cfg.data} is none")
    refuse_if(folder or cfg.data in GAMES, "with_thinking", "is for data with the field 'thinking'")
    if cfg.data in GAMES:
        if cfg.gen_len != TINY_LEN:
            raise UserError(f"--gen_len {cfg.gen_len}: responses of {cfg.data} have {TINY_LEN} tokens")
        n = cfg.n_problems or 2000
        examples = [game_example(tok, cfg.data, i, n) for i in range(n)]
        return fitting(examples, tok, cfg.max_prompt, most - cfg.gen_len)
    if folder:
        records = [r for r in read_trajectories(cfg.data) if r["correct"] or not cfg.only_correct]
        if not records:
            raise UserError(f"{cfg.data} holds no correct trajectory: --no-only_correct takes the others too")
        if tok.prompt_ids(records[0]).tolist() != records[0]["prompt_ids"]:
            raise UserError(f"{cfg.data} was collected with {records[0]['model']}, whose tokeniser or chat "
                            f"template is not that of {cfg.model}: collect with this model")
        lengths = sorted({len(r["x0"]) for r in records})
        if lengths[1:] or lengths[0] > cfg.gen_len:
            raise UserError(f"{cfg.data} has responses of {lengths} tokens: one length is needed, at most "
                            f"--gen_len {cfg.gen_len}; choose another folder, or raise --gen_len")
        return fitting(records, tok, cfg.max_prompt, most - lengths[0])
    problems = fitting(load_problems(cfg.data), tok, cfg.max_prompt, most - cfg.gen_len)
    if cfg.with_thinking and not all("thinking" in p for p in problems):
        raise UserError(f"--with_thinking: not every line of {cfg.data} has the field 'thinking'")
    fits = []
    for p in problems:
        text = f"{p['thinking']}\n{p['solution']}" if cfg.with_thinking else p["solution"]
        ids = tok.response_ids(unicodedata.normalize("NFC", text), cfg.gen_len)
        if p["solution"].strip() and len(ids) <= cfg.gen_len:
            fits.append(dict(id=p["id"], prompt=p["prompt"], x0=ids, earlier=p.get("earlier", []),
                             **{k: p[k] for k in ["raw"] if k in p}, prompt_ids=tok.prompt_ids(p).tolist()))
    bare = [p["id"] for p in problems if not p["solution"].strip()]
    if n_left := len(problems) - len(fits):
        say(f"{n_left} of {len(problems)} rows are left out: {len(bare)} without a solution {bare[:1]}, "
            f"{n_left - len(bare)} with one of more than {cfg.gen_len} tokens (--gen_len)")
    if not fits:
        raise UserError(f"{cfg.data} has no solution of at most {cfg.gen_len} tokens, and {len(bare)} rows "
                        f"without any {bare[:1]}: raise --gen_len, fill in solution, or FILE:solution=NAME")
    return fits


def main():
    cfg = run.parse(Config, PRESETS, __doc__)
    refuse_if(not cfg.trajectory_share, "teacher metric n_buckets ordering p_context p_future "
              "trajectory_weight score_batch", "is for a --trajectory_share above 0")
    tok = load_tokenizer(cfg.model, cfg.revision)
    teacher_tok = load_teacher_tokenizer(cfg.teacher) if cfg.trajectory_share else None
    examples = load_examples(cfg, tok)[:cfg.n_problems or None]
    [teacher_tok.prompt_ids(e) for e in examples * bool(teacher_tok)]  # an error before weights are loaded
    per_epoch = run.steps_per_epoch(len(examples), cfg)  # an error before hours of scoring
    r = run.Run(cfg, examples)  # ranks, device, the folder: new or to be continued
    torch.manual_seed(cfg.seed)
    model = r.for_training(r.load(to_train=True))

    # 1. how hard the teacher finds the examples' tokens
    n_steps = cfg.max_steps or cfg.epochs * per_epoch
    cfg.warmup_steps = max(1, round(cfg.warmup_ratio * n_steps)) if cfg.warmup_ratio else cfg.warmup_steps
    if cfg.trajectory_share:
        scores = score_examples(examples, tok, teacher_tok, cfg, r)
        ranked = buckets(scores, cfg.n_buckets, cfg.ordering, cfg.seed)
        examples = [dict(e, bucket=b) for e, b in zip(examples, ranked)]

    # 2. training
    optimizer = run.adamw(run.trainable(model).values(), cfg)

    def build(numbers):  # a micro-batch of the epoch that the loop is in
        rngs = [example_rng(cfg.seed, epoch, n) for n in numbers]
        return make_batch([examples[n] for n in numbers], rngs, cfg, model.cfg)
    for step in r.steps(model, [optimizer], n_steps):
        epoch, chosen = run.batch_of(step, len(examples), cfg)
        for batch in r.micro_batches(chosen, lambda n: len(examples[n]["prompt_ids"]), build):
            loss, parts = training_loss(model, batch, cfg)
            r.backward(loss, parts)
        r.update()  # sum over ranks, clip, AdamW at this step's learning rate

    # 3. the same problems, the same decoding rules: base against TRIMS
    nt_eval.closing(r, r.save(model), tok, "TRIMS" if cfg.trajectory_share else "SFT")


if __name__ == "__main__":
    run_cli(main)
