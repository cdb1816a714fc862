"""How weights/tiny-ar and weights/barter-ar were made: small causal LMs of `transformers` (Llama's architecture) on the
embedded tasks, the AR teachers that let `python trims.py` run offline.

    python weights/train_ar.py --out out/tiny-ar        # resumable: the same command continues
    python weights/train_ar.py --task barter --steps 1600 --out out/barter-ar
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
from model import token_positions  # noqa: E402


def batch_at(step, size, n_steps, tok, task):
    """Left-padded ids, which are real, and which carry loss: the response up to its first EOS."""
    rows = [data.game_example(tok, task, step * size + i, n_steps * size) for i in range(size)]
    whole = [torch.tensor(r["prompt_ids"] + r["x0"]) for r in rows]
    ids = pad_sequence(whole, batch_first=True, padding_value=-1, padding_side="left")
    valid = ids >= 0
    ids = ids.where(valid, tok.eos_id)
    answer = torch.zeros_like(valid)
    answer[:, -data.TINY_LEN:] = True
    tail = (ids == tok.eos_id) & answer
    return ids, valid, answer & (tail.cumsum(1) - tail.int() == 0)


def loss_of(model, ids, valid, scored):
    logits = model(ids, attention_mask=valid.long(), position_ids=token_positions(valid)).logits
    ce = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return ce[scored[:, 1:]].mean()


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--task", default="tiny", choices=data.GAMES)
    ap.add_argument("--out", default="out/tiny-ar")
    ap.add_argument("--steps", type=int, default=800)
    ap.add_argument("--batch_size", type=int, default=64)
    ap.add_argument("--lr", type=float, default=3e-3)
    args = ap.parse_args()
    out, half = Path(args.out), Path(args.out) / "half.pt"
    out.mkdir(parents=True, exist_ok=True)
    tok = data.load_tokenizer(args.task)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tok.eos_id + 2, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tok.eos_id, pad_token_id=tok.eos_id))
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    first = 0
    if half.exists():
        state = torch.load(half, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
    data.game("tiny").PRIVILEGED_SHARE = 0.0  # no solution in a prompt
    bar, seen = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step"), []
    for step in bar:
        frac = min(1, (step + 1) / 100, (args.steps - step) / (0.4 * args.steps))
        for group in opt.param_groups:
            group["lr"] = args.lr * frac
        loss = loss_of(model, *batch_at(step, args.batch_size, args.steps, tok, args.task))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        seen.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(seen[-50:]):.3f}", refresh=False)
        if (step + 1) % 250 == 0:
            torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), step=step + 1), half)
    model.bfloat16().save_pretrained(out)
    print(f"last 50 steps: {np.mean(seen[-50:]):.4f} nats per token")


if __name__ == "__main__":
    main()
