"""How weights/tiny and weights/barter were made: standard masked-diffusion training from fresh weights, on new examples
of the game at every step. Drills say themselves what is hidden. Muon for the blocks' matrices, where it learns in fewer
steps.

    python weights/train.py --out out/tiny             # resumable: the same command continues
    python weights/train.py --model barter --lr 2e-3 --max_steps 8000 --drill_steps 6000 --out out/barter
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import model as nt_model  # noqa: E402
import run  # noqa: E402
import trims  # noqa: E402
from cli import run_cli  # noqa: E402


@dataclass
class Config(trims.Config):
    eval_problems: int = 0  # what it can do is measured by eval.py, see docs/checkpoints.md
    trajectory_share: float = 0.0  # standard masks
    gen_len: int = 48  # response length L, tokens
    block_share: float = 0.5  # share of samples masked as in block decoding: earlier clean, later all masked
    block_len: int = 16  # block size of those samples, tokens
    drill_steps: int = 100  # opening steps on drills
    max_steps: int = 1300  # steps, each of new examples
    lr: float = 1e-3  # peak learning rate
    lr_schedule: str = "tail"  # linear to zero over the last 40%
    muon_lr: float = 0.02  # Muon's learning rate
    warmup_steps: int = 50  # linear warm-up
    beta2: float = 0.95  # AdamW
    batch_size: int = 64  # examples per optimizer step over all ranks
    micro_batch: int = 64  # examples per forward


standard_mask = trims.mask_response


def mask_response(example, cfg, rng):
    """-> masked (L,) bool, loss_w (L,) before 1/L: a drill's own mask, a standard one, or a state of block decoding."""
    if example.get("masked"):  # a drill: the mean of its cross-entropies counts
        masked = np.array(example["masked"])
        return masked, np.full(len(masked), len(masked) / masked.sum())
    masked, loss_w = standard_mask(example, cfg, rng)
    if rng.random() < cfg.block_share:
        # the loss then counts the current block only, scaled up to the whole length
        block = np.arange(len(masked)) // cfg.block_len
        current = rng.integers(block[-1] + 1)
        loss_w = np.where(block == current, loss_w * len(masked) / (block == current).sum(), 0.0)
        masked = (block > current) | ((block == current) & masked)
    return masked, loss_w


def main():
    cfg = run.parse(Config, {"others": {}}, __doc__)
    trims.mask_response = mask_response  # what make_batch asks
    r = run.Run(cfg, whole=True)
    tok = data.load_tokenizer(cfg.model)
    torch.manual_seed(cfg.seed)
    fresh = nt_model.Transformer(nt_model.config_of(cfg.model)).init_weights()
    model = r.for_training(fresh.to(r.device))
    params = run.trainable(model)
    matrices = {name: p for name, p in params.items() if p.ndim == 2 and name.startswith("blocks")}
    rest = [p for name, p in params.items() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr=cfg.muon_lr, weight_decay=cfg.weight_decay)
    optimizers = [run.adamw(rest, cfg, (0.9, cfg.beta2)), muon]
    n_examples, n_drill = cfg.max_steps * cfg.batch_size, cfg.drill_steps * cfg.batch_size

    def build(numbers):
        rngs = [data.example_rng(cfg.seed, 0, n) for n in numbers]
        return trims.make_batch([drawn[n] for n in numbers], rngs, cfg, model.cfg)

    for step in r.steps(model, optimizers, cfg.max_steps):
        chosen = range(step * cfg.batch_size, (step + 1) * cfg.batch_size)
        drawn = {n: data.game_example(tok, cfg.model, n, n_examples, n_drill=n_drill) for n in chosen}
        for batch in r.micro_batches(chosen, lambda n: len(drawn[n]["prompt_ids"]), build):
            loss, parts = trims.training_loss(model, batch, cfg)
            r.backward(loss, parts)
        r.update()
    r.save(model)


if __name__ == "__main__":
    run_cli(main)
