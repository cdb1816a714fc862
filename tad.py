"""TAD: Temporal-Aware trajectory self-Distillation (arXiv 2605.09536; code: github.com/BHmingyang/TAD).

The idea: (1) the base model, shown the worked solution, decodes every training problem one token per forward;
wrong answers are dropped. (2) The student never sees the solution. At a state t of such a trajectory it
learns the tokens that are revealed within the next W forwards as hard labels (it may then reveal them
together), and everything later only as the teacher's soft distribution (so that it does not guess). The
teacher is the base model: LoRA off.

    glossary (paper -> code)
    s, s + y*            plain prompt, privileged prompt (the collector's, with the reference solution)
    trajectory (x0, pi)  record["x0"] (L,), record["order"] (L,): which forward revealed each position
    x_t                  xt (B, L): x0 where order < t, else MASK (data.state_at)
    N_t  Eq. 10          near (B, L) bool: t <= order < t + W, cut at block edges for SDAR (make_batch)
    D_t  Eq. 11          the other masked positions: order >= t + W                       (make_batch)
    L_near     Eq. 12    cross-entropy on x0; mean over near rows           (token_terms, tad_loss)
    L_distant  Eq. 13    tau^2 KL(teacher || student); mean over the others (token_terms, tad_loss)
    L          Eq. 14    L_near + lambda L_distant                          (tad_loss)

What differs from the published code: one collector writes exactly what the trainer reads (tokens and order,
not 160 snapshots); padding never hides a revealed EOS; all seven matrices of a block carry LoRA; gradients
are divided by accumulation steps; the paper's window rule is built (--window auto-quality, auto-speed).

    python tad.py                                              # the whole story on a laptop CPU, tiny model
    torchrun --nproc_per_node=8 tad.py --model dream --allow_code_execution   # the paper's data, by preset"""
from dataclasses import dataclass
from typing import Literal

from cli import UserError, refuse_if, run_cli, say  # first
import numpy as np
import torch
import torch.nn.functional as F

import eval as nt_eval
import lora
import run
from data import (TINY_TRAINING, example_rng, hidden_rows, load_problems, load_tokenizer, privileged_ids,
                  stacked, state_at, teacher_rows)
from model import by_chunks, response_blocks
from rollout import collect, only_correct


@dataclass
class Config(run.Options):
    seed: int = 0  # of the states drawn, the data order and the adapters
    # --- trajectories
    data: str = "tiny"  # data set by name, or a .jsonl with prompt, solution and answer; see data.py --help
    n_problems: int = 0  # problems to collect on (0: all; 1000 of a game)
    source: Literal["full", "no_privilege", "traj_random", "gt_random"] = "full"  # Table 4: what to train on
    allow_code_execution: bool = False  # run the tests of code problems on this machine
    trajectories: str = ""  # folder to collect into, runs may share it; A+B: finished ones [the run's own]
    gen_len: int = 256  # response length L, tokens
    block_len: int = 32  # decoding block, tokens [block-causal: the model's own]; training has it, too
    collect_cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "none"  # of the collector
    collect_score: Literal["confidence", "entropy"] = "confidence"  # what it ranks positions by
    collect_temperature: float = 0.0  # (code) LLaDA 0.7 for math, 0 for code; Dream 0.2
    collect_top_p: float = 1.0  # (code) Dream 0.95
    collect_seed: int = 0  # of the collector's draws
    collect_batch: int = 64  # problems decoded at once per rank
    # --- loss
    window: str = "auto-speed"  # W in forwards, or auto-quality / auto-speed: measured on the trajectories
    lam: float = 1.0  # lambda of Eq. 14
    tau: float = 1.0  # temperature of the soft term
    near: Literal["ce", "kl", "none"] = "ce"  # loss of near tokens (Table 3)
    distant: Literal["kl", "ce", "none"] = "kl"  # loss of distant tokens (Table 3)
    teacher_prompt: Literal["collection", "privileged", "plain", "system"] = "collection"  # system: (code)
    # --- training
    lora_r: int = 128  # LoRA rank
    lora_alpha: int = 128  # LoRA alpha
    lora_dropout: float = 0.05  # LoRA dropout
    lora_targets: str = "all"  # matrices of a block that carry adapters, with commas, or all
    lr: float = 2e-5  # peak learning rate
    lr_schedule: Literal["constant", "cosine", "tail"] = "constant"  # tail: linear to zero over the last 40%
    warmup_steps: int = 0  # linear warm-up
    weight_decay: float = 0.01  # AdamW
    batch_size: int = 256  # (trajectory, state) pairs per optimizer step over all ranks
    micro_batch: int = 4  # pairs per forward
    states_per_trajectory: int = 0  # states drawn per trajectory and epoch (0: every state once)
    epochs: int = 1  # passes over the pairs


PAPER = "gsm8k+prm12k+kodcode"  # running kodcode's tests needs --allow_code_execution
PRESETS = {
    "tiny": dict(TINY_TRAINING, window="auto-quality", lora_dropout=0.0, n_problems=500),
    "llada": dict(data=PAPER, window="20", collect_temperature=0.7),  # speed; quality: --window 8
    "dream": dict(data=PAPER, collect_score="entropy", collect_temperature=0.2,
                  collect_top_p=0.95),  # quality: --window 6
    "others": dict(data=PAPER, block_len=None, collect_cache=None),  # not in the paper
}
RANDOM = ("traj_random", "gt_random")  # sources whose states are random masks
LEVEL = {"auto-quality": 0.5, "auto-speed": 0.2}  # W: where the mean confidence falls below it


def token_terms(student, teacher, x0, cfg):
    """Rows of logits (N, V), x0 (N,) -> (N, 2) fp32: cross-entropy on x0, tau^2 KL(teacher || student)."""
    ce = F.cross_entropy(student.float(), x0, reduction="none")  # -log p(x0_i | s, x_t)
    kl = torch.zeros_like(ce)
    if teacher is not None:
        log_q = F.log_softmax(teacher.float() / cfg.tau, -1)
        log_p = F.log_softmax(student.float() / cfg.tau, -1)
        kl = cfg.tau ** 2 * (log_q.exp() * (log_q - log_p)).sum(-1)
    return torch.stack([ce, kl], 1)


def tad_loss(ce, kl, near, example, n_examples, cfg):
    """The TAD objective over masked rows -> scalar fp32, dict of its parts. ce, kl (N,) fp32; near (N,) bool;
    example (N,) int64: a row's. Means over an example's tokens, then over n_examples of the global batch."""
    def mean_over_examples(values, rows):
        count = torch.zeros(n_examples, device=values.device).index_add_(0, example, rows.float())
        n_rows = count.clamp(min=1)[example]  # (N,) rows of the same example
        return (values * rows / n_rows).sum() / n_examples
    term = {"ce": ce, "kl": kl, "none": torch.zeros_like(ce)}
    loss_near = mean_over_examples(term[cfg.near], near)  # Eq. 12
    loss_distant = mean_over_examples(term[cfg.distant], ~near)  # Eq. 13
    loss = loss_near + cfg.lam * loss_distant  # Eq. 14
    return loss, dict(near=loss_near.item(), distant=loss_distant.item())


def make_batch(examples, rngs, cfg, window, model_cfg):
    """[(record, t)] -> dict of xt, x0, masked, near (B, L); prompts, lists of token ids; ids. RANDOM sources
    mask each position with probability u ~ U(0, 1]; all are near, their mean stands for the weight 1/u."""
    x0, order, names = stacked([r for r, _ in examples], "x0", "order")
    t = torch.tensor([t for _, t in examples])[:, None]
    if cfg.source in RANDOM:
        drawn = [1 - rng.random() > rng.random(x0.shape[1]) for rng in rngs]  # u, then a number per position
        near = masked = torch.tensor(np.array(drawn))
        xt = torch.where(masked, model_cfg.mask_id, x0)
    else:
        xt, masked = state_at(x0, order, t, model_cfg.mask_id)
        near = masked & (order < t + window)  # Eq. 10; the rest of `masked` is Eq. 11
        if model_cfg.block_len:  # a window ends with the block being decoded, the first that has a mask
            block = response_blocks(model_cfg, names["prompts"], x0.shape[1])
            near = near & (block == torch.where(masked, block, block.max()).amin(1, keepdim=True))
    return dict(names, xt=xt, x0=x0, masked=masked, near=near)


def teacher_prompts(records, cfg, tok, model_cfg):
    """The prompt the soft teacher sees, per record: lists of ids."""
    kind = cfg.teacher_prompt
    if kind == "plain" or kind == "collection" and cfg.source == "no_privilege":
        return [r["prompt_ids"] for r in records]
    if kind != "system":
        return [r.get("privileged_prompt_ids") or privileged_ids(tok, model_cfg, r).tolist()
                for r in records]
    system = f"{tok.chat.system}\n\nReference Answer: "  # behind the family's own, in one turn
    return [privileged_ids(tok, model_cfg, r, r["prompt"], system + r["solution"]).tolist() for r in records]


def soft_rows(teacher, b, cfg, x0):
    """[the teacher's hidden states (N, C) of the masked rows, 0 where no soft term is asked for], or []."""
    masked, near = b["masked"], b["near"]
    soft = masked & torch.where(near, cfg.near == "kl", cfg.distant == "kl")
    read = soft.any(1)
    if not read.any():
        if not run.is_sharded(teacher) or "teacher_prompts" not in b:
            return []
        read = ~read  # a sharded forward is collective: a rank without such rows takes part
    prompts = [prompt for prompt, some in zip(b["teacher_prompts"], read) if some]
    with lora.off(teacher):  # no change to --full's frozen copy
        h = teacher_rows(teacher, prompts, b["xt"][read], soft[read].nonzero(as_tuple=True),
                         None if x0 is None else x0[read])
    is_soft = soft[masked].to(h.device)[:, None]
    return [h.new_zeros(len(is_soft), h.shape[1]).masked_scatter(is_soft, h)]


def training_loss(model, teacher, b, cfg):
    """Batch -> loss of one micro-batch. teacher: the model, whose LoRA is then off, or its frozen copy."""
    at = b["masked"].nonzero(as_tuple=True)  # (N,) rows, (N,) positions
    clean = b["x0"] if model.cfg.block_len and cfg.source in RANDOM else None  # SDAR's training layout
    h = hidden_rows(model, b["prompts"], b["xt"], at, clean)
    x0, near, example = (t.to(h.device) for t in (b["x0"][at], b["near"][at], at[0]))

    def terms(h, x0, h_teacher=None):
        with torch.no_grad():
            teacher_logits = None if h_teacher is None else teacher.head(h_teacher)
        return token_terms(model.head(h), teacher_logits, x0, cfg)
    values = by_chunks(terms, model.cfg.vocab_size, h, x0, *soft_rows(teacher, b, cfg, clean))
    return tad_loss(*values.unbind(1), near, example, cfg.batch_size, cfg)


def auto_window(decay, mode):
    """The smallest offset whose mean confidence is below the mode's level; at least 1."""
    below = np.flatnonzero(decay < LEVEL[mode])
    return max(1, int(below[0]) if len(below) else len(decay))


def choose_window(cfg, model, records, r):
    """W: the number given, or by the rule. The untrained student's decay is measured and drawn anyway."""
    decay = nt_eval.confidence_decay(model, records)
    window = int(cfg.window) if cfg.window.isdecimal() else auto_window(decay, cfg.window)
    if r.rank == 0:
        print(f"W = {window} of {len(decay)} forwards")
        lines = {f"student, W = {window}": decay}
        key = "privileged_prompt_ids"
        asked = [x | {"prompt_ids": x[key]} for x in records if key in x]
        if asked:  # Fig. 3(a)
            lines["teacher, shown the solution"] = nt_eval.confidence_decay(model, asked)
        lines |= {f"{mode}: {level}": [level] * len(decay) for mode, level in LEVEL.items()}
        nt_eval.report(lines, "forwards until the token is revealed", "mean confidence in it",
                       r.out / "window.png")
    return run.agreed(window)


def trajectories(cfg, model, tok, problems, out):
    """Of the base model, which is shown the worked solution; wrong answers dropped."""
    privileged = cfg.source != "no_privilege"
    kept = only_correct(collect(cfg, model, tok, problems, out, privileged=privileged))
    if cfg.source != "gt_random":
        return kept
    solution = {p["id"]: tok.response_ids(p["solution"], cfg.gen_len) for p in problems}  # Table 4, first row
    fits = [k for k in kept if len(solution[k["id"]]) <= cfg.gen_len]
    if len(fits) < len(kept):
        say(f"{len(kept) - len(fits)} solutions are longer than --gen_len {cfg.gen_len}: left out")
    return [{**k, "x0": solution[k["id"]]} for k in fits]


def training_pairs(records, cfg, epoch):
    """The (record number, t) pairs of an epoch: every state of every trajectory, or a few drawn."""
    pairs = []
    for n, r in enumerate(records):
        states = np.arange(max(r["order"]) + 1)
        if cfg.states_per_trajectory:
            n_drawn = min(cfg.states_per_trajectory, len(states))
            states = example_rng(cfg.seed, epoch, n).choice(states, n_drawn, False)
        pairs += [(n, int(t)) for t in states]
    return pairs


def main():
    cfg = run.parse(Config, PRESETS, __doc__)
    if cfg.window not in LEVEL and (not cfg.window.lstrip("0").isdecimal() or len(cfg.window) > 6):
        raise UserError(f"--window {cfg.window!r}: a positive number of forwards, {' or '.join(LEVEL)}")
    if cfg.near == "none" and (cfg.distant == "none" or cfg.source in RANDOM):
        raise UserError(f"--near none --distant {cfg.distant}: nothing is left to learn from")
    soft = "kl" in (cfg.near, cfg.source not in RANDOM and cfg.distant)
    refuse_if(not soft, "tau teacher_prompt", "is for a kl term")
    refuse_if(cfg.source in RANDOM, "distant lam", f"is for distant tokens: --source {cfg.source} has none")
    refuse_if(cfg.distant == "none", "lam", "is for distant tokens, which --distant none leaves out")
    problems = load_problems(cfg.data, "train", cfg.n_problems or None)
    n_states = min(cfg.states_per_trajectory or cfg.gen_len, cfg.gen_len)  # at most
    run.steps_per_epoch(len(problems) * n_states, cfg)  # an error before hours of decoding
    r = run.Run(cfg, problems)  # ranks, device, the folder: new or to be continued
    r.teachers = soft
    base, tok = r.load(), load_tokenizer(cfg.model, cfg.revision)

    # 1. trajectories of the base model with privileged information, and the window
    records = trajectories(cfg, base, tok, problems, r.out)
    window = choose_window(cfg, base, records, r)
    del base

    # 2. student and soft teacher: the same weights with LoRA off, or a frozen copy under --full
    torch.manual_seed(cfg.seed)
    model = teacher = r.for_training(r.load(to_train=True))
    if cfg.full and r.teachers:
        teacher = r.for_training(r.load(to_train=True), frozen=True)
    optimizer = run.adamw(run.trainable(model).values(), cfg)

    # 3. training
    epoch, pairs = 0, training_pairs(records, cfg, 0)  # (record number, t)
    n_steps = cfg.max_steps or cfg.epochs * run.steps_per_epoch(len(pairs), cfg)

    def build(numbers):  # a micro-batch: some of the epoch's pairs
        examples = [(records[n], t) for n, t in (pairs[i] for i in numbers)]
        rngs = [example_rng(cfg.seed, epoch, i) for i in numbers]
        batch = make_batch(examples, rngs, cfg, window, model.cfg)
        if r.teachers:
            batch["teacher_prompts"] = teacher_prompts([x for x, _ in examples], cfg, tok, model.cfg)
        return batch
    for step in r.steps(model, [optimizer], n_steps):
        now, chosen = run.batch_of(step, len(pairs), cfg)
        if now != epoch:
            epoch = now
            pairs = training_pairs(records, cfg, epoch)
        for batch in r.micro_batches(chosen, lambda i: len(records[pairs[i][0]]["prompt_ids"]), build):
            loss, parts = training_loss(model, teacher, batch, cfg)
            r.backward(loss, parts)
        r.update()  # sum over ranks, clip, AdamW at this step's learning rate

    # 4. the same problems, the same decoding rules: base against TAD
    nt_eval.closing(r, r.save(model), tok, "TAD")


if __name__ == "__main__":
    run_cli(main)
