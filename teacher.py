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
from data import Tokenizer, left_padded, read_tokens
from model import FAMILIES, by_chunks, checkpoint_dir, n_content, token_positions
from rollout import Shard
from run import barrier, check_alike, mend_shards


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
    return teacher.to(device).requires_grad_(False)  # in eval mode


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
    valid = ids >= 0 if valid is None else valid
    h = teacher.base_model(ids, attention_mask=valid.long(), position_ids=token_positions(valid))[0]
    head = teacher.get_output_embeddings()

    def score(h, x):
        logp = head(h).float().log_softmax(-1)
        if metric == "entropy":
            return -(logp.exp() * logp).sum(-1)
        return F.nll_loss(logp, x, reduction="none")
    scored = valid[:, 1:] & valid[:, :-1]  # the head on these rows only, in chunks
    nll = torch.zeros(scored.shape, device=ids.device)
    nll[scored] = by_chunks(score, teacher.config.vocab_size, h[:, :-1][scored], ids[:, 1:][scored])
    return F.pad(nll, (1, 0))


def spread(values, teacher_bytes, student_bytes):
    """Scores of the teacher's tokens (m,) -> of the student's (n,): spread evenly over bytes, then summed."""
    ends, teacher_ends, sums = (np.cumsum([0, *x]) for x in (student_bytes, teacher_bytes, values))
    return np.diff(np.interp(ends, teacher_ends, sums))


def teacher_pieces(example, tok, teacher_tok):
    """One example -> the teacher's prompt ids and completion ids, and bytes per token of both sides."""
    content = example["x0"][:n_content(example["x0"], (tok.eos_id, tok.special[tok.chat.end]))]
    pieces = list(map(tok.bytes_of, content))
    student_bytes = list(map(len, pieces))
    try:
        text = b"".join(pieces).decode()
    except UnicodeDecodeError:
        raise UserError(f"example {example['id']}: its completion is not UTF-8 text") from None
    ids = teacher_tok.encode(text) if text else []
    teacher_bytes = [len(teacher_tok.bytes_of(i)) for i in ids]
    if sum(teacher_bytes) != sum(student_bytes):
        raise UserError(f"example {example['id']}: its completion has {sum(student_bytes)} bytes for the "
                        f"student and {sum(teacher_bytes)} for the teacher; normalise the text (NFC)")
    return teacher_tok.prompt_ids(example["prompt"]).tolist(), ids, teacher_bytes, student_bytes


@torch.no_grad()
def difficulty(examples, tok, teacher, teacher_tok, metric):
    """Every example's L scores in nats; the first EOS has that of the teacher's end token, the rest NaN."""
    pieces = [teacher_pieces(e, tok, teacher_tok) for e in examples]
    rows = [torch.tensor(prompt + ids + [teacher_tok.eos_id]) for prompt, ids, *_ in pieces]
    ids, valid = left_padded(rows, teacher_tok.eos_id)
    scored = token_nll(teacher, ids.to(teacher.device), valid.to(teacher.device), metric)
    out = []
    for row, e, piece in zip(scored.cpu().double().numpy(), examples, pieces):
        _, completion, teacher_bytes, student_bytes = piece
        mine = row[-len(completion) - 1:]
        if not np.isfinite(mine).all():
            raise UserError(f"the teacher's score of example {e['id']} is not finite: its weights hold NaN "
                            f"or overflow in this dtype")
        L = len(e["x0"])
        text = spread(mine[:-1], teacher_bytes, student_bytes)
        filled = [*text, mine[-1]] + [math.nan] * L
        out.append(filled[:L])
    return out


def score_examples(examples, tok, cfg, r):
    """difficulty() of every example, kept in the folder of the run r: an interrupted run goes on."""
    folder = r.out / "difficulty"
    folder.mkdir(exist_ok=True)

    def read():
        return {row["key"]: row["scores"] for f in sorted(folder.glob("rank*.jsonl"))
                for row in read_jsonl(f, True, key=str, scores=list)}

    def key(e):  # everything the scores depend on
        what = json.dumps([cfg.teacher, cfg.metric, e["prompt"], e["x0"]])
        return hashlib.sha256(what.encode()).hexdigest()
    examples = [examples[i] for i in range(len(examples))]
    keys = list(map(key, examples))
    check_alike("the examples", keys)
    mend_shards(folder.glob("rank*.jsonl"), r.rank, r.world)
    done = read()
    barrier()  # all ranks have read the same shards before one appends
    left = [(k, e) for k, e in zip(keys, examples) if k not in done]
    todo = left[r.rank::r.world]
    if todo:
        teacher_tok = load_teacher_tokenizer(cfg.teacher)
        teacher = load_teacher(cfg.teacher, r.device, r.dtype)
        shard = Shard(folder, r.rank, len(todo), "example", "difficulty")
        for first in range(0, len(todo), cfg.score_batch):
            some_keys, some = zip(*todo[first:first + cfg.score_batch])
            scored = difficulty(some, tok, teacher, teacher_tok, cfg.metric)
            rounded = [[None if math.isnan(v) else round(v, 6) for v in scores] for scores in scored]
            shard.append([dict(key=k, scores=scores) for k, scores in zip(some_keys, rounded)])
        shard.bar.close()
    barrier()
    done = read()
    return [np.array(done[k], dtype=float).tolist() for k in keys]  # null is NaN
