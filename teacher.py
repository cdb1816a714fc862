"""An autoregressive teacher: loading it, its negative log-likelihood per token, and TRIMS's difficulty.

Teacher and student may have different tokenisers: scores move through UTF-8 bytes (see `spread`).
"""
import hashlib
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from cli import UserError, read_jsonl
from data import Tokenizer, read_tokens
from model import FAMILIES, by_chunks, checkpoint_dir, n_content, token_positions
from rollout import Shard
from run import barrier


def load_teacher(name, device="cpu", dtype=torch.float32, revision=None):
    """Any `transformers` causal LM, frozen: TRIMS's teacher. Strict; remote code is never run."""
    from transformers import AutoModelForCausalLM
    folder = checkpoint_dir(name, revision)
    try:
        teacher, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, SafetensorError) as e:
        line = str(e).strip().split("\n")[0]
        raise UserError(f"{name} is not a causal LM that transformers loads: {line}") from None
    absent = [*sorted(info["missing_keys"]), *(key[0] for key in info["mismatched_keys"])]
    if absent:  # transformers only warns, and fills them with random numbers
        raise UserError(f"{name}: tensors are missing or of another shape: {absent[:3]} ({len(absent)})")
    return teacher.to(device).eval().requires_grad_(False)


def load_teacher_tokenizer(name, revision=None):
    """The tokeniser of an AR teacher, with the template of the family that has teachers and these tokens."""
    tokens = read_tokens(checkpoint_dir(name, revision, weights=False))
    families = [family for family in FAMILIES.values() if family.teachers]
    for family in families:
        tok = Tokenizer(*tokens, family.chat, eos_id=None)
        if not tok.lacking():
            tok.eos_id = tok.special[family.chat.end]
            return tok
    raise UserError(f"{name} has the special tokens of no chat template that a teacher may have: "
                    f"it must be {', or '.join(family.teachers for family in families)}")


@torch.no_grad()
def token_nll(teacher, ids, valid=None, metric="nll"):
    """-log p(ids[:, t] | ids[:, :t]) under a causal LM, or the entropy there, in nats: (B, T) fp32, 0 where
    nothing predicts. ids (B, T) int64; valid (B, T) bool, False = padding on either side.
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    positions = token_positions(valid)
    h = teacher.base_model(ids, attention_mask=valid.long(), position_ids=positions)[0]
    head = teacher.get_output_embeddings()

    def score(h, x):
        logp = head(h).float().log_softmax(-1)
        if metric == "entropy":
            return -(logp.exp() * logp).sum(-1)
        return -logp.gather(1, x[:, None])[:, 0]
    scored = valid[:, 1:] & valid[:, :-1]  # the head on these rows only, in chunks
    rows, targets = h[:, :-1][scored], ids[:, 1:][scored]
    nll = torch.zeros(scored.shape, device=ids.device)
    nll[scored] = by_chunks(score, teacher.config.vocab_size, rows, targets)
    return F.pad(nll, (1, 0))


def spread(values, teacher_bytes, student_bytes):
    """Scores of the teacher's tokens (m,) -> of the student's tokens of the same text (n,) float64: spread
    evenly over a token's bytes, then summed over those of the other. teacher_bytes (m,), student_bytes (n,).
    """
    ends, teacher_ends, sums = (
        np.cumsum([0, *counts])
        for counts in (student_bytes, teacher_bytes, values)
    )
    return np.diff(np.interp(ends, teacher_ends, sums))


def teacher_pieces(example, tok, teacher_tok):
    """One example -> the teacher's prompt ids and completion ids, and bytes per token of both sides."""
    content = example["x0"][:n_content(example["x0"], (tok.eos_id, tok.special[tok.chat.end]))]
    pieces = [tok.bytes_of(i) for i in content]
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:
        raise UserError(f"example {example['id']}: its completion is not UTF-8 text") from None
    ids = teacher_tok.encode(text) if text else []
    lengths = [len(teacher_tok.bytes_of(i)) for i in ids]
    if sum(lengths) != sum(map(len, pieces)):
        raise UserError(f"example {example['id']}: its completion has {sum(map(len, pieces))} bytes for the "
                        f"student and {sum(lengths)} for the teacher; normalise the text (NFC)")
    return teacher_tok.prompt_ids(example["prompt"]).tolist(), ids, lengths, [len(p) for p in pieces]


@torch.no_grad()
def difficulty(examples, tok, teacher, teacher_tok, metric):
    """Scores (L,) of every example's response tokens, in nats: lists of floats. The first EOS has that of the
    teacher's end token, the filling behind it NaN.
    """
    pieces = [teacher_pieces(e, tok, teacher_tok) for e in examples]
    rows = [prompt + ids + [teacher_tok.eos_id] for prompt, ids, _, _ in pieces]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), teacher_tok.eos_id)
    for padded, row in zip(ids, rows):
        padded[width - len(row):] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    valid = torch.arange(width) >= width - lengths
    scored = token_nll(teacher, ids.to(teacher.device), valid.to(teacher.device), metric)
    out = []
    for row, e, piece in zip(scored.cpu().double().numpy(), examples, pieces):
        _, completion, teacher_bytes, student_bytes = piece
        mine = row[width - len(completion) - 1:]
        if not np.isfinite(mine).all():
            raise UserError(f"the teacher's score of example {e['id']} is not finite: its weights hold NaN "
                            f"or overflow in this dtype")
        L, text = len(e["x0"]), spread(mine[:-1], teacher_bytes, student_bytes)
        scores = [*text, mine[-1]][:L]
        scores += [math.nan] * (L - len(scores))
        out.append(scores)
    return out


def score_examples(examples, tok, cfg, r):
    """The difficulty of every example, in order, kept in the folder of the run r: each rank scores its share,
    and an interrupted run goes on.
    """
    folder = r.out / "difficulty"
    folder.mkdir(exist_ok=True)

    def key(e):  # everything the scores depend on
        what = json.dumps([cfg.teacher, cfg.metric, e["prompt"], [int(i) for i in e["x0"]]])
        return hashlib.sha256(what.encode()).hexdigest()

    def read():
        return {row["key"]: row["scores"] for f in sorted(folder.glob("rank*.jsonl"))
                for row in read_jsonl(f, tolerant=True)}
    keys = [key(examples[i]) for i in range(len(examples))]
    done = read()
    barrier()  # all ranks have read the same shards before one appends
    left = [i for i in range(len(examples)) if keys[i] not in done]
    todo = left[r.rank::r.world]
    if todo:
        teacher_tok = load_teacher_tokenizer(cfg.teacher)
        teacher = load_teacher(cfg.teacher, r.device, r.dtype)
        shard = Shard(folder, r.rank, len(left), "example", "difficulty")
        for first in range(0, len(todo), cfg.score_batch):
            some, rows = todo[first:first + cfg.score_batch], []
            scored = difficulty([examples[i] for i in some], tok, teacher, teacher_tok, cfg.metric)
            for i, scores in zip(some, scored):
                rounded = [None if math.isnan(v) else round(v, 6) for v in scores]
                rows.append(dict(key=keys[i], scores=rounded))
            shard.append(rows)
        shard.bar.close()
    barrier()
    done = read()
    return [np.array(done[k], dtype=float).tolist() for k in keys]  # null is NaN
