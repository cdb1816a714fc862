"""An autoregressive teacher: loading it, its NLL per token, TRIMS's difficulty, whatever its tokeniser."""
import hashlib
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from cli import UserError, reason
from data import OwnChat, Tokenizer, byte_table, tiny_tokens
from model import by_chunks, checkpoint_dir, local_weights, n_content
from rollout import Shard
from run import check_alike, read_shards

PROBE = "Aé 中🙂\n  x\t<b> ²12"  # a tokeniser that keeps this keeps any text


def load_teacher(name, device="cpu", dtype=torch.float32):
    """Any `transformers` causal LM, frozen: TRIMS's teacher. Strict; remote code is never run."""
    from transformers import AutoModelForCausalLM
    folder = checkpoint_dir(name)
    try:
        teacher, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    except Exception as e:  # of a different type for each kind of file
        raise UserError(f"--teacher {name}: give a causal LM that transformers loads: {reason(e)}") from None
    absent = [*sorted(info["missing_keys"]), *(key[0] for key in info["mismatched_keys"])]
    if absent:  # transformers only warns, and fills them with random numbers
        raise UserError(f"{name}: tensors are missing, or not as config.json says: {absent[:3]}; copy both")
    return teacher.to(device).requires_grad_(False)  # in eval mode


def load_teacher_tokenizer(name):
    """The tokeniser and the chat template of an AR teacher, as `transformers` reads them; no remote code."""
    from transformers import AutoTokenizer
    folder = checkpoint_dir(name, weights=False)
    tokens = tiny_tokens(folder)
    if tokens:
        return Tokenizer(*tokens, tokens[-1].end_id)
    def encode(text):  # SentencePiece may write a space before it
        return hf.encode(text, add_special_tokens=False, split_special_tokens=True)
    try:
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tables, ids = [byte_table(hf, level) for level in (True, False)], encode(PROBE)
        fits = [t for t in tables if b"".join(t[i] for i in ids).removeprefix(b" ") == PROBE.encode()]
    except Exception as e:  # of a different type for each kind of file
        raise UserError(f"--teacher {name}: copy or install what its tokeniser needs: {reason(e)}") from None
    chat = OwnChat(f"--teacher {name}", hf, encode, False, hf.eos_token_id)  # without a thought
    if not fits or chat.end_id is None:
        raise UserError(f"--teacher {name}: what its {type(hf).__name__} makes of a text cannot be told, "
                        f"byte by byte, or not how an answer ends: choose another teacher")
    return Tokenizer(encode, fits[0], {}, False, chat, chat.end_id)


@torch.no_grad()
def token_nll(teacher, ids, metric="nll"):
    """-log p(ids[:, t] | ids[:, :t]) under a causal LM, or the entropy there, in nats: (B, T) fp32, 0 for the
    first token. ids (B, T) int64, padded on the right, where no token before it looks."""
    rows = teacher.get_input_embeddings().num_embeddings
    if ids.max() >= rows:
        raise UserError(f"{teacher.name_or_path}: {rows} embeddings, tokeniser up to {ids.max()}: copy both")
    def score(ids):
        logp = teacher(ids).logits[:, :-1].float().log_softmax(-1)
        if metric == "entropy":
            return -(logp.exp() * logp).sum(-1)
        return F.nll_loss(logp.transpose(1, 2), ids[:, 1:], reduction="none")
    return F.pad(by_chunks(score, rows * ids.shape[1], ids), (1, 0))


def check_length(teacher, name, ids):
    most = getattr(teacher.config, "max_position_embeddings", None) or math.inf
    if len(ids) > most:
        raise UserError(f"{name}: {len(ids)} tokens, the teacher takes {most}: --max_prompt, --gen_len")


def spread(values, teacher_bytes, student_bytes):
    """Scores of the teacher's tokens (m,) -> of the student's (n,): spread evenly over bytes, then summed."""
    ends, teacher_ends, sums = (np.cumsum([0, *x]) for x in (student_bytes, teacher_bytes, values))
    kept = np.diff(teacher_ends, prepend=-1) > 0  # a token of no bytes counts with the next
    return np.diff(np.interp(ends, teacher_ends[kept], sums[kept]))


def teacher_pieces(example, tok, teacher_tok):
    """One example -> the teacher's prompt ids and completion ids, and bytes per token of both sides."""
    content = example["x0"][:n_content(example["x0"], (tok.eos_id, tok.chat.end_id))]
    pieces = list(map(tok.bytes_of, content))
    said = b"".join(pieces)
    ids = teacher_tok.encode(said.decode(errors="replace")) if said else []
    written = list(map(teacher_tok.bytes_of, ids))
    teacher_bytes = list(map(len, written))
    text = b"".join(written)
    if text == b" " + said:  # SentencePiece's own space
        teacher_bytes[0] -= 1
    elif text != said:
        raise UserError(f"example {example['id']}: its completion is not UTF-8 text, or the teacher's "
                        f"tokeniser changes it; normalise the text (NFC)")
    return teacher_tok.prompt_ids(example).tolist(), ids, teacher_bytes, list(map(len, pieces))


def difficulty(examples, tok, teacher, teacher_tok, metric):
    """Every example's L scores in nats; the first EOS has that of the teacher's end token, the rest NaN."""
    pieces = [teacher_pieces(e, tok, teacher_tok) for e in examples]
    rows = [torch.tensor(prompt + ids + [teacher_tok.eos_id]) for prompt, ids, *_ in pieces]
    for e, row in zip(examples, rows):
        check_length(teacher, f"example {e['id']}", row)
    scored = token_nll(teacher, pad_sequence(rows, batch_first=True).to(teacher.device), metric)
    out = []
    for row, e, piece in zip(scored.cpu().double().numpy(), examples, pieces):
        prompt, completion, teacher_bytes, student_bytes = piece
        mine = row[len(prompt):][:len(completion) + 1]
        if not np.isfinite(mine).all():
            raise UserError(f"the teacher's score of example {e['id']} is not finite: its weights hold NaN "
                            f"or overflow in this dtype")
        L = len(e["x0"])
        text = spread(mine[:-1], teacher_bytes, student_bytes)
        filled = [*text, mine[-1]] + [math.nan] * L
        out.append(filled[:L])
    return out


def score_examples(examples, tok, teacher_tok, cfg, r):
    """difficulty() of every example, kept in the folder of the run r: an interrupted run goes on."""
    folder = r.out / "difficulty"
    folder.mkdir(exist_ok=True)
    weights = local_weights(cfg.teacher)
    def read():
        return read_shards(folder, "rank*.jsonl", "key", r.rank, r.world, scores=list)
    def key(e):  # everything the scores depend on
        asked = e["prompt"], e["x0"], *e.get("earlier", []), e.get("raw")
        what = json.dumps([weights, cfg.teacher, cfg.metric, *asked])
        return hashlib.sha256(what.encode()).hexdigest()
    keys = list(map(key, examples))
    check_alike("the examples", keys)
    done = read()
    left = [(k, e) for k, e in zip(keys, examples) if k not in done]
    todo = left[r.rank::r.world]
    if todo:
        teacher = load_teacher(cfg.teacher, r.device, r.dtype)
        shard = Shard(folder, r.rank, len(todo), "example", "difficulty")
        for first in range(0, len(todo), cfg.score_batch):
            some_keys, some = zip(*todo[first:first + cfg.score_batch])
            scored = difficulty(some, tok, teacher, teacher_tok, cfg.metric)
            rounded = [[None if math.isnan(v) else round(v, 6) for v in scores] for scores in scored]
            shard.append([dict(key=k, scores=scores) for k, scores in zip(some_keys, rounded)])
        shard.bar.close()
    done = read()
    return np.array([done[k]["scores"] for k in keys], dtype=float)  # null is NaN
