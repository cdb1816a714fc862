"""A folder to train from scratch in: a byte-level BPE of gsm-symbolic's training texts and random weights of LLaDA's kind.

    python weights/new_base.py --width 192 --layers 4 --out out/gsm-new
    python trims.py --model out/gsm-new --full --data gsm-symbolic --trajectory_share 0 --gen_len 192 --lr 2e-3 \\
        --lr_schedule tail --warmup_steps 50 --max_steps 2000 --batch_size 32 --micro_batch 32 --out out/gsm-base

The second command is plain masked diffusion training (random masks, no teacher); docs/data.md says what came of it.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli  # noqa: E402, first
import data  # noqa: E402
import model as nt_model  # noqa: E402

SPECIALS = ["<|endoftext|>", "<|mdm_mask|>"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default="out/gsm-new")
    ap.add_argument("--vocab_size", type=int, default=2048)  # more than the 256 bytes
    ap.add_argument("--width", type=int, default=256)
    ap.add_argument("--layers", type=int, default=6)
    args = ap.parse_args()
    out = Path(args.out)
    if out.exists():
        raise cli.UserError(f"--out {out} is there: choose another folder")

    table = Tokenizer(models.BPE())
    table.pre_tokenizer = pre_tokenizers.Sequence([  # numbers digit by digit
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    table.decoder = decoders.ByteLevel()
    texts = [f"{p['prompt']}\n{p['solution']}" for p in data.load_problems("gsm-symbolic", "train")]
    table.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=args.vocab_size - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    table.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    out.mkdir(parents=True)
    table.save(str(out / "tokenizer.json"))
    eos, mask = map(table.token_to_id, SPECIALS)
    (out / "tokenizer_config.json").write_text(json.dumps(dict(eos_token=SPECIALS[0])))

    raw = dict(model_type="llada", vocab_size=args.vocab_size, embedding_size=args.vocab_size, d_model=args.width, n_heads=4,
               n_kv_heads=4, n_layers=args.layers, mlp_hidden_size=3 * args.width, max_sequence_length=512, rms_norm_eps=1e-5,
               rope_theta=1e4, weight_tying=False, mask_token_id=mask, eos_token_id=eos, pad_token_id=eos)
    model = nt_model.Transformer(nt_model.config_from_json(raw)).init_weights(torch.Generator().manual_seed(0))
    nt_model.save(model, out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {table.get_vocab_size()} tokens")


if __name__ == "__main__":
    cli.run_cli(main)
