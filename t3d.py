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

What differs from the published code: ids and order are stored, no text is tokenised again; blocks count from
position 0; the latest-decoded tokens are masked, as in the paper (--variant code: the earliest). From the
paper: Eq. 8 and the log-ratios are means over the masked tokens, alpha is 0.5, as in the code (Eq. 7: --alpha
1 --beta 1 --logratio sum --fake expected), and random tokens are those that occur in the trajectories.

    python t3d.py                                                # tiny model on a laptop CPU
    torchrun --nproc_per_node=8 t3d.py --model sdar-4b         # the paper's math data, by preset"""
from dataclasses import dataclass, replace
from typing import Literal

from cli import GIVEN, UserError, refuse_if, run_cli  # first
import numpy as np
import torch
import torch.nn.functional as F

import eval as nt_eval
import run
from data import (TINY_TRAINING, example_rng, hidden_rows, load_problems, load_tokenizer, stacked,
                  teacher_rows)
from model import by_chunks, config_of, n_content, response_blocks
from rollout import collect


@dataclass
class Config(run.Options):
    seed: int = 0  # of the states, the fakes, the data order and the adapters
    # --- trajectories: the model's own, unfiltered
    data: str = "tiny"  # data set by name, or a .jsonl (answers are not used); see data.py --help
    n_problems: int = 0  # problems to collect on (0: all; 1000 of a game)
    max_prompt: int = 512  # problems with a longer prompt are left out, tokens
    allow_code_execution: bool = False  # only to record which rollouts on code problems are right
    trajectories: str = ""  # folder to collect into, runs may share it; A+B: finished ones [the run's own]
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
    eos_in_loss: int = 0  # EOS behind an answer that are learned; rollouts then stop there (0: all that fit)
    rand_p: float = 0.1  # share of masked inputs that show a random token instead of the mask
    refresh: int = 10  # optimizer steps between refreshes of the reference
    # --- training
    lora_r: int = 128  # LoRA rank (the paper trains all weights)
    lora_alpha: int = 128  # LoRA alpha
    lora_dropout: float = 0.0  # LoRA dropout
    lora_targets: str = "all"  # matrices of a block that carry adapters, with commas, or all
    lr: float = 1e-5  # peak learning rate
    lr_floor: float = 0.1  # share of the peak that the schedules end at
    warmup_steps: int = 20  # linear warm-up
    weight_decay: float = 0.01  # AdamW
    batch_size: int = 256  # trajectories per optimizer step over all ranks
    micro_batch: int = 4  # trajectories per forward
    epochs: int = 30  # passes over the trajectories, each with new states


PRESETS = {
    "tiny": dict(TINY_TRAINING, lr_floor=0.0),
    "sdar": dict(data="t3d-math", full=True, collect_cache="exact", gen_len=1024,  # code: --data t3d-code
                 eos_in_loss=2),  # (code)
    "others": dict(data="t3d-math", block_len=None, train_block=0, collect_cache=None),  # not in the paper
}
CODE = dict(fake="argmax", mask_order="code", state_dist="code", path="code")  # --variant code


def t3d_loss(logp, logp_ref, logp_fake, logp_fake_ref, path_w, example, n_examples, cfg):
    """The T3D objective over the masked rows of a batch -> scalar fp32, dict of its parts.
    All (N,) fp32: log-probability of the trajectory's token under student and reference; the same of the
    reference's guess (--fake expected: minus their KL, and 0); path_w of Eq. 9. example (N,) int64: a row's
    example. Means over an example's rows, then over the n_examples of the global batch."""
    def total(values):
        return torch.zeros(int(example.max()) + 1, device=logp.device).index_add_(0, example, values)
    n = total(torch.ones_like(logp))

    def mean(values):
        return total(values) / n  # every example has masked rows, see draw_mask
    path = -mean(path_w * logp).sum() / n_examples  # Eq. 8
    if cfg.loss == "naive_td":
        naive = -mean(logp).sum() / n_examples  # Eq. 5
        return naive + cfg.lam * path, dict(naive=naive.item(), path=path.item())
    of_example = mean if cfg.logratio == "mean" else total
    ratio = cfg.beta * of_example(logp - logp_ref)
    ratio_fake = cfg.beta * of_example(logp_fake - logp_fake_ref)
    real = F.softplus(-ratio).sum() / n_examples  # Eq. 7: -log sigma(ratio)
    fake = cfg.alpha * F.softplus(ratio_fake).sum() / n_examples  # Eq. 7: -log(1 - sigma(ratio))
    loss = real + fake + cfg.lam * path  # Eq. 10
    return loss, dict(real=real.item(), fake=fake.item(), path=path.item())


def path_weights(pi, size, masked, cfg):
    """w (B, L) fp32 of Eq. 9. pi (B, L) 1-based rank within the block, size (B, L) of it, masked (B, L).
    code: a block's masked first half weighs 3 as a group and the others 1; its tokens share it equally."""
    if cfg.path == "paper":
        return (size - pi + 1) / size  # Eq. 9
    early = masked & (2 * pi <= size)
    late = masked & ~early
    n, n_early, n_late = (m.sum(1, keepdim=True).float() for m in (masked, early, late))
    share = 3 * (n_early > 0) + (n_late > 0).float()
    w = torch.where(early, 3 / n_early.clamp(min=1), 1 / n_late.clamp(min=1))
    return w * n / share  # the mean over the masked tokens is the mean over groups


def ranks_in_blocks(rank, block):
    """rank, block (B, L): the number of its block -> pi, size (B, L): 1-based rank in block, its tokens."""
    same = block[:, :, None] == block[:, None, :]
    pi = 1 + (same & (rank[:, None, :] < rank[:, :, None])).sum(-1)
    return pi, same.sum(-1)


def draw_mask(pi, size, block_len, cfg, rngs):
    """x_t: masked (B, L) bool. One number j of revealed tokens per example, the same in every block."""
    B = block_len or pi.shape[1]
    if cfg.state_dist == "code":
        share = np.array([1, .75, .5, .25])
        p = share ** 8
        p /= p.sum()
        j = [B - round(B * float(rng.choice(share, p=p))) for rng in rngs]
    else:
        j = [int(rng.integers(B)) for rng in rngs]
    decoded = pi - 1 if cfg.mask_order == "paper" else size - pi  # (code) the earliest are masked
    masked = decoded >= torch.tensor(j)[:, None]
    short = ~masked.any(1, keepdim=True)  # a response shorter than j: its last token, so that it has a row
    return masked | (short & (decoded == decoded.amax(1, keepdim=True)))


def make_batch(records, rngs, cfg, model_cfg, vocabulary):
    """records -> dict: xt, x0 (B, L) int64, masked (B, L) bool, path_w (B, L) fp32, u (B, L) uniform numbers
    that draw the fakes; prompts, lists of token ids; ids. vocabulary: what random tokens are drawn from."""
    x0, rank, names = stacked(records, "x0", "rank")
    L = x0.shape[1]
    pi, size = ranks_in_blocks(rank, response_blocks(model_cfg, names["prompts"], L))
    if cfg.eos_in_loss:  # EOS behind the learned ones are neither masked nor learned
        ends = torch.tensor([n_content(x, model_cfg.eos_ids) for x in x0])[:, None]
        behind = torch.arange(L) >= ends + cfg.eos_in_loss
        pi = pi.masked_fill(behind, 0)
        size = size.masked_fill(behind, -1)
    masked = draw_mask(pi, size, model_cfg.block_len, cfg, rngs)
    u = np.array([rng.random(L) for rng in rngs])
    swap = np.array([rng.random(L) for rng in rngs])
    random = np.array([rng.choice(vocabulary, L) for rng in rngs])
    shown = torch.tensor(np.where(swap < cfg.rand_p, random, model_cfg.mask_id))  # App. C.1
    xt = torch.where(masked, shown, x0)
    path_w = path_weights(pi, size, masked, cfg).float()
    return dict(names, xt=xt, x0=x0, masked=masked, path_w=path_w, u=torch.tensor(u).float())


def token_terms(logits, ref_logits, x0, u, cfg, mask_id=None):
    """(n, 4) fp32: log p_theta(x0), log p_ref(x0), and the same of the guess x_hat, never mask_id."""
    logp = F.log_softmax(logits.float(), -1)
    if ref_logits is None:  # naive TD reads the first only
        return logp.gather(1, x0[:, None]).expand(-1, 4)
    ref = F.log_softmax(ref_logits.float(), -1)
    def of(ids):
        return [t.gather(1, ids[:, None])[:, 0] for t in (logp, ref)]
    p_ref = ref.exp()
    if mask_id is not None:
        p_ref[:, mask_id] = 0
    if cfg.fake == "expected":  # the mean over x_hat ~ p_ref of the log-ratio: -KL(p_ref, p_theta)
        fake = [(p_ref * (logp - ref)).sum(-1) / p_ref.sum(-1), torch.zeros_like(u)]
    else:  # a draw: the token at which the distribution function passes u
        cdf = p_ref.cumsum(-1)
        passed = cdf <= u[:, None] * cdf[:, -1:]
        drawn = passed.sum(-1).clamp(max=ref.shape[-1] - 1)
        x_hat = p_ref.argmax(-1) if cfg.fake == "argmax" else drawn
        fake = of(x_hat)
    return torch.stack([*of(x0), *fake], 1)


def training_loss(model, ref, b, cfg):
    """Batch -> loss of one micro-batch: one forward of the reference, if any, one of the student."""
    at = b["masked"].nonzero(as_tuple=True)  # (N,) rows, (N,) positions
    clean = b["x0"] if model.cfg.block_len else None  # block-causal: clean blocks stand before noisy ones
    rows = (b["prompts"], b["xt"], at, clean)
    device = model.embed.weight.device
    x0, u, path_w = (b[k][at].to(device) for k in ("x0", "u", "path_w"))
    of_ref = []
    if ref:
        with ref.in_place_of(model) as frozen:
            of_ref = [teacher_rows(frozen, *rows)]
            head_ref = frozen.head.weight.data

    def terms(h, x0, u, h_ref=None):
        ref_logits = None if h_ref is None else F.linear(h_ref, head_ref)
        return token_terms(model.head(h), ref_logits, x0, u, cfg, model.cfg.mask_id)
    values = by_chunks(terms, model.cfg.vocab_size, hidden_rows(model, *rows), x0, u, *of_ref)
    return t3d_loss(*values.unbind(1), path_w, at[0].to(device), cfg.batch_size, cfg)


def check_config(cfg):
    """The settings that are used: the code's under --variant code, but what the command line gives."""
    if not cfg.refresh:
        raise UserError("--refresh 0: the reference is refreshed every so many steps: give 1 or more")
    if cfg.variant == "code":
        cfg = replace(cfg, **{name: value for name, value in CODE.items() if name not in GIVEN})
    return cfg


def main():
    cfg = check_config(run.parse(Config, PRESETS, __doc__))
    refuse_if(cfg.loss == "naive_td", "alpha beta logratio fake refresh", "is for --loss t3d")
    refuse_if(not cfg.lam, "path", "is for a --lam above 0")
    refuse_if("eos_in_loss" in GIVEN and not config_of(cfg.model, cfg.revision).block_len, "eos_in_loss",
              f"is for block-causal models: {cfg.model} would see the EOS behind, and so the length")
    problems = load_problems(cfg.data, "train", cfg.n_problems or None)
    run.steps_per_epoch(len(problems), cfg)  # an error before hours of decoding
    r = run.Run(cfg, problems)  # ranks, device, the folder: new or to be continued
    base, tok = r.load(), load_tokenizer(cfg.model, cfg.revision)

    # 1. trajectories of the base model, without ground truth or filter
    records = collect(cfg, base, tok, problems, r.out, graded=False, early_stop=cfg.eos_in_loss > 0)
    del base

    # 2. student and reference
    torch.manual_seed(cfg.seed)
    model = r.for_training(r.load(to_train=True))
    ref = None if cfg.loss == "naive_td" else run.Reference(r, model)
    r.teachers = ref is not None
    optimizer = run.adamw(run.trainable(model).values(), cfg)

    # 3. training
    n_steps = cfg.max_steps or cfg.epochs * run.steps_per_epoch(len(records), cfg)
    seen = np.concatenate([x["prompt_ids"] + x["x0"] for x in records])  # other ids may never be trained
    vocabulary = np.setdiff1d(seen, list(tok.special.values()))

    def between_refreshes(step):  # the reference, for a checkpoint; none where the next step refreshes it
        if ref and step % cfg.refresh:
            return ref.tensors()

    def build(numbers):  # a micro-batch of the epoch that the loop is in
        rngs = [example_rng(cfg.seed, epoch, n) for n in numbers]
        return make_batch([records[n] for n in numbers], rngs, cfg, model.cfg, vocabulary)
    for step in r.steps(model, [optimizer], n_steps, between_refreshes):
        if step % cfg.refresh == 0 and ref:
            ref.refresh(model)
        epoch, chosen = run.batch_of(step, len(records), cfg)
        for batch in r.micro_batches(chosen, lambda n: len(records[n]["prompt_ids"]), build):
            loss, parts = training_loss(model, ref, batch, cfg)
            r.backward(loss, parts)
        r.update()  # sum over ranks, clip, AdamW at this step's learning rate

    # 4. the same problems, the same decoding rules: base against T3D
    nt_eval.closing(r, r.save(model), tok, "T3D")


if __name__ == "__main__":
    run_cli(main)
