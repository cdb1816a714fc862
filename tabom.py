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
    L_recon       first term of Eq. 9: mean over Delta of -log p(x0 | U_t)               (tabom_loss)
    Eq. 6-7       why ranking: the KL to a Boltzmann distribution, and the order of entropies it asks for
    L_rank        Eq. 8: mean of the hinges over the pairs               (tabom_loss)
    L             Eq. 9: L_recon + lambda L_rank                         (tabom_loss)

What differs from the published code: token ids and their order are stored, no text is tokenised again; all
pairs of a segment are ranked at once; a segment shorter than W is normalised by its own counts; entropies can
be taken at each token's own step, as Eq. 5 has it. TDS, Eq. 10 and 11, is `python eval.py tds`.

    python tabom.py                                              # tiny model on a laptop CPU
    torchrun --nproc_per_node=8 tabom.py --model llada       # the paper's math data, by preset"""
from dataclasses import dataclass
from typing import Literal

from cli import UserError, refuse_if, run_cli  # first
import torch
import torch.nn.functional as F

import eval as nt_eval
import run
from data import TINY_TRAINING, example_rng, hidden_rows, load_problems, load_tokenizer, stacked
from model import by_chunks, n_content, response_blocks
from rollout import collect, only_correct


@dataclass
class Config(run.Options):
    seed: int = 0  # of the segments drawn, the data order and the adapters
    # --- trajectories
    data: str = "tiny"  # data set by name, or a .jsonl with prompt and answer; see data.py --help
    n_problems: int = 0  # problems to collect on (0: all; 1000 of a game)
    allow_code_execution: bool = False  # run the tests of code problems on this machine
    trajectories: str = ""  # folder to collect into, runs may share it; A+B: finished ones [the run's own]
    gen_len: int = 256  # response length L, tokens
    block_len: int = 32  # decoding block, tokens [block-causal: the model's own]; training has it, too
    collect_score: Literal["confidence", "entropy"] = "confidence"  # what the decoder ranks positions by
    collect_cache: Literal["none", "prefix", "dual", "vicinity", "exact"] = "none"  # of the collector
    collect_temperature: float = 0.0  # of the collector
    collect_top_p: float = 1.0  # of the collector
    collect_seed: int = 0  # of the collector's draws
    collect_batch: int = 64  # problems decoded at once per rank
    # --- loss
    window: int = 32  # W: tokens of a segment (0: everything that is left, Table 5's global segment)
    segment: Literal["window", "two_steps"] = "window"  # two_steps: between two random states (dInfer)
    lam: float = 1.0  # lambda of Eq. 9 (0: trajectory masking only)
    gamma: float = 0.2  # margin of the ranking, nats
    entropy_at: Literal["segment", "own_step"] = "segment"  # own_step: Eq. 5, W forwards: lower micro_batch
    eos_in_window: bool = False  # may the EOS tail of a response be in a segment (code)
    # --- training
    lora_r: int = 16  # LoRA rank
    lora_alpha: int = 16  # LoRA alpha
    lora_dropout: float = 0.0  # LoRA dropout
    lora_targets: str = "q_proj,v_proj"  # matrices that carry adapters, or all
    lr: float = 2e-5  # peak learning rate
    warmup_steps: int = 50  # linear warm-up
    weight_decay: float = 0.01  # AdamW
    batch_size: int = 32  # trajectories per optimizer step over all ranks
    micro_batch: int = 4  # trajectories per forward
    epochs: int = 5  # passes over the trajectories, each with a new segment


PRESETS = {
    "tiny": dict(TINY_TRAINING, window=16, lora_targets="all"),
    "llada": dict(data="prm12k", gamma=0.2, eos_in_window=True),  # math; code: --data ling-coder --gamma 0.3
    "dream": dict(data="prm12k", block_len=256, collect_score="entropy",  # as Dream decodes: no blocks
                  collect_temperature=0.1, collect_top_p=0.9, eos_in_window=True,
                  gamma=0.1),  # code: --data ling-coder --lam 2 --lr 1e-4
    "others": dict(data="prm12k", block_len=None, collect_cache=None),  # not in the paper
}


def tabom_loss(ce, entropy, in_segment, n_examples, cfg):
    """The TABOM objective over segments in the order they were revealed -> scalar fp32, dict of its parts.
    ce (N,) fp32: -log p(x0 | U_t) of the positions in a segment; entropy (N,) fp32, nats; in_segment (B, W),
    N True. Means over a segment's tokens and its pairs, then over the n_examples of the global batch."""
    zero = torch.zeros(in_segment.shape, device=ce.device)
    ce = zero.masked_scatter(in_segment, ce)  # (B, W)
    n_tokens = in_segment.sum(1)  # at least one, see draw_segment
    recon = (ce.sum(1) / n_tokens).sum() / n_examples
    h = zero.masked_scatter(in_segment, entropy)
    h_r, h_s = h[:, :, None], h[:, None, :]
    hinge = (h_r - h_s + cfg.gamma).clamp(min=0)  # (B, W, W)
    pair = (in_segment[:, :, None] & in_segment[:, None, :]).triu(1)  # r was revealed before s
    n_pairs = pair.sum((1, 2)).clamp(min=1)
    ranking = ((hinge * pair).sum((1, 2)) / n_pairs).sum() / n_examples  # Eq. 8
    return recon + cfg.lam * ranking, dict(recon=recon.item(), rank=ranking.item())  # Eq. 9


def entropy_of(logits):
    """Predictive entropy in nats: logits (N, V) -> (N,) fp32."""
    logp = F.log_softmax(logits.float(), -1)
    return -(logp.exp() * logp).sum(-1)


def token_terms(logits, x0):
    """What tabom_loss takes of every row: cross-entropy and entropy, (N, 2) fp32."""
    return torch.stack([F.cross_entropy(logits.float(), x0, reduction="none"), entropy_of(logits)], 1)


def draw_segment(record, cfg, model_cfg, rng):
    """The positions of one segment in the order they were revealed: list of ints, at least one. Its start is
    drawn so that a whole window fits; on block-causal models any, and the segment ends with its block."""
    L = len(record["x0"])  # the first EOS belongs to the content here
    n = L if cfg.eos_in_window else min(L, n_content(record["x0"], model_cfg.eos_ids) + 1)
    order = sorted(range(n), key=lambda i: record["rank"][i])
    if cfg.segment == "two_steps":
        first, last = sorted(rng.choice(n + 1, 2, replace=False))
    else:
        whole = cfg.window and not model_cfg.block_len  # a block is shorter than a window: any start will do
        first = rng.integers(max(0, n - cfg.window) + 1 if whole else n)
        last = first + (cfg.window or n)
    chosen = order[first:last]
    if model_cfg.block_len:
        block = response_blocks(model_cfg, [record["prompt_ids"]], L)[0].tolist()
        chosen = [i for i in chosen if block[i] == block[chosen[0]]]
    return chosen


def make_batch(records, rngs, cfg, model_cfg):
    """records -> dict of xt, x0, rank (B, L); segment (B, W) int64 positions in reveal order (-1: none),
    in_segment (B, W) bool; prompts; ids. What was not revealed before the segment is masked, EOS tail too."""
    x0, rank, names = stacked(records, "x0", "rank")
    chosen = [draw_segment(r, cfg, model_cfg, rng) for r, rng in zip(records, rngs)]
    W = max(map(len, chosen))
    segment = torch.tensor([c + [-1] * (W - len(c)) for c in chosen])
    began = rank.gather(1, segment[:, :1])  # the rank of the first position: what came before is known
    xt = torch.where(rank < began, x0, model_cfg.mask_id)
    return dict(names, xt=xt, x0=x0, segment=segment, in_segment=segment >= 0, rank=rank)


def own_step_entropies(model, b, row, position):
    """Eq. 5: h(r) (N,) fp32 just before r, at row, position (N,), was revealed: a forward row per token."""
    rank = b["rank"][row]
    known = rank < rank.gather(1, position[:, None])
    xt = torch.where(known, b["x0"][row], model.cfg.mask_id)
    prompts = [b["prompts"][r] for r in row]
    h = hidden_rows(model, prompts, xt, (torch.arange(len(row)), position))
    return by_chunks(lambda h: entropy_of(model.head(h)), model.cfg.vocab_size, h)


def training_loss(model, b, cfg):
    """Batch -> loss of one micro-batch: a forward, and one row per token more for --entropy_at own_step."""
    row, w = b["in_segment"].nonzero(as_tuple=True)
    position = b["segment"][row, w]
    h = hidden_rows(model, b["prompts"], b["xt"], (row, position))
    x0 = b["x0"][row, position].to(h.device)
    terms = by_chunks(lambda h, x0: token_terms(model.head(h), x0), model.cfg.vocab_size, h, x0)
    ce, entropy = terms.unbind(1)
    if cfg.lam and cfg.entropy_at == "own_step":
        entropy = own_step_entropies(model, b, row, position)
    return tabom_loss(ce, entropy, b["in_segment"].to(h.device), cfg.batch_size, cfg)


def main():
    cfg = run.parse(Config, PRESETS, __doc__)
    if cfg.window == 1 and cfg.lam:
        raise UserError(f"--window {cfg.window}: ranking needs two tokens or more (0: all that is left)")
    if cfg.segment == "two_steps" and cfg.lam:
        raise UserError(f"--segment two_steps with --lam {cfg.lam}: these are not ranked; give --lam 0")
    refuse_if(cfg.segment == "two_steps", "window", "is not for --segment two_steps")
    refuse_if(not cfg.lam, "gamma entropy_at", "is for a ranking, with --lam above 0")
    problems = load_problems(cfg.data, "train", cfg.n_problems or None)
    r = run.Run(cfg, problems)  # ranks, device, the folder: new or to be continued
    base, tok = r.load(), load_tokenizer(cfg.model, cfg.revision)

    # 1. trajectories of the base model, without privileged information; wrong answers dropped
    run.steps_per_epoch(len(problems), cfg)  # an error before hours of decoding
    records = only_correct(collect(cfg, base, tok, problems, r.out))
    del base

    # 2. student
    torch.manual_seed(cfg.seed)
    model = r.for_training(r.load(to_train=True))
    optimizer = run.adamw(run.trainable(model).values(), cfg)

    # 3. training
    n_steps = cfg.max_steps or cfg.epochs * run.steps_per_epoch(len(records), cfg)

    def build(numbers):  # a micro-batch of the epoch that the loop is in
        rngs = [example_rng(cfg.seed, epoch, n) for n in numbers]
        return make_batch([records[n] for n in numbers], rngs, cfg, model.cfg)
    for step in r.steps(model, [optimizer], n_steps):
        epoch, chosen = run.batch_of(step, len(records), cfg)
        for batch in r.micro_batches(chosen, lambda n: len(records[n]["prompt_ids"]), build):
            loss, parts = training_loss(model, batch, cfg)
            r.backward(loss, parts)
        r.update()  # sum over ranks, clip, AdamW at this step's learning rate

    # 4. the same problems, the same decoding rules: base against TABOM
    nt_eval.closing(r, r.save(model), tok, "TABOM")


if __name__ == "__main__":
    run_cli(main)
