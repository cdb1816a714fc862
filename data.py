"""What a problem, a prompt and a record are: the tiny task, problems, tokenisers, trajectories, batches.
Wherever a script takes data: tiny or barter; a NAME of the list; NAME=FILE, a local copy of that set
(.jsonl, .json, .parquet, also .gz; a quoted pattern for several files); your own FILE with prompt, solution
and answer or tests, or with messages; FILE:prompt=question,answer=target, other names; or joined by +."""
import glob
import importlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Literal

from cli import UserError, option, read_jsonl, read_object, read_rows, run_cli, run_command, say  # first
import numpy as np
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import grade
from model import (FAMILIES, LENGTHS, ModelOptions, block_diffusion_layout, checkpoint_dir,
                   first_position, listed, read_config, token_positions)
from recipes import RECIPES, TEXTS, check_fields, recipe_problems

TINY_DECODING = FAMILIES["tiny"].decoding
TINY_LEN, TINY_BLOCK = TINY_DECODING["gen_len"], TINY_DECODING["block_len"]  # of a response, tokens
TINY_TRAINING = dict(  # what the methods that collect train the tiny model with
    gen_len=TINY_LEN, block_len=TINY_BLOCK, lora_r=32, lora_alpha=32, lr=1e-3, lr_schedule="tail",
    warmup_steps=10, batch_size=64, micro_batch=64, max_steps=150, save_every=50, eval_problems=128)
GAMES = FAMILIES["tiny"].tasks  # weights/NAME/game.py makes the problems of an embedded task
AVOIDED = {"train": ["dev", "test"], "dev": [], "test": ["dev"]}  # whose held-out prompts do not occur
OWN_FIELDS = ("id", *TEXTS, "answer", "tests", "setup", "messages")  # of a problem
CARRIED = "earlier raw question grader tests entry_point setup".split()  # into its record, where it has them
LISTS = "prompt_ids x0 order rank".split()  # of a record
RECORD_FIELDS = {**dict.fromkeys("id source prompt solution model".split(), str),
                 **dict.fromkeys(LISTS, list), "decoding": dict,
                 "nfe": int, "schema": int, "correct": (bool, type(None))}
SCHEMA = 1
MARK = "\ue000"  # in the place of a special token that a text spells out


def game(name):
    """The module of an embedded task: problem(split, index), example(index, n_drill), HELD_OUT."""
    return importlib.import_module(f"weights.{name}.game")


def game_problems(name, split, n):
    """The first n problems of an embedded task's split; no prompt occurs twice."""
    problems, index = {}, 0
    while len(problems) < n:
        row = game(name).problem(split, index)
        if row["prompt"] not in avoided(name, split):
            problems.setdefault(row["prompt"], row | dict(id=f"{name}-{split}-{index}", source=name))
        index += 1
    return list(problems.values())


@lru_cache
def avoided(name, split):
    """Prompts of other splits, which this one must not contain; the base's data avoid what train does."""
    return {p["prompt"] for other in AVOIDED[split]
            for p in game_problems(name, other, game(name).HELD_OUT)}


REFERENCE = dict(  # what the published collector says around a problem (TAD); code: where it has tests
    math="Question: {q}\nReference Answer: {a}\nAfter understanding the reference answer, please try to "
         "solve this problem using your own approach below and output a detailed solution process:",
    code="{q}\nReference Answer: {a}\nAfter understanding the reference solution, please try to solve this "
         "problem using your own approach below and just OUTPUT YOUR SOLUTION CODE, DON'T EXPLAIN IT:",
    tiny="reference answer : {a} . now solve it your own way : {q}")


def privileged_prompt(problem):
    """The user turn with the worked solution in it (TAD's collector); the plain one is problem['prompt']."""
    if not problem["solution"]:
        raise UserError(f"{problem['source']}: {problem['id']} has no solution, as this asks for: add it, "
                        f"or FILE:solution=NAME")
    code = grade.grader_of(problem) in ("code", "parses")
    kind = "tiny" if problem["source"] in GAMES else "code" if code else "math"
    return REFERENCE[kind].format(q=problem.get("question", problem["prompt"]), a=problem["solution"])


def privileged_ids(tok, cfg, problem, prompt=None, system=""):
    """Ids (P,) of a prompt [the privileged one], behind padding: SDAR's blocks are those of the plain one."""
    plain = tok.prompt_ids(problem)
    prompt = prompt or privileged_prompt(problem)
    ids = tok.prompt_ids(problem | dict(prompt=prompt), system)
    missing = 0 if cfg.whole_blocks else len(plain) - len(ids)
    return F.pad(ids, (missing % (cfg.block_len or 1), 0), value=cfg.pad_id)


def game_example(tok, name, index, n, **drills):
    """Example `index` of n of an embedded task, a seeded game with a right response. drills: its base's."""
    prompt, shown, response, masked = game(name).example(index, **drills)
    if prompt in avoided(name, "train"):
        return game_example(tok, name, index + n, n, **drills)  # that is not drawn otherwise
    prompt = REFERENCE["tiny"].format(q=prompt, a=shown) if shown else prompt
    return dict(id=index, prompt=prompt, prompt_ids=tok.prompt_ids(prompt).tolist(),
                x0=tok.response_ids(response, TINY_LEN), masked=masked)


def load_problems(source, split="train", n=None):
    """Problems {id, source, prompt, ...} of a source, see the top; n of each joined one. A file is whole."""
    if source in GAMES:
        return game_problems(source, split, 1000 if n is None else n)
    name, local, path = source.partition("=")
    place = path if name in RECIPES else re.sub(r":\w+=[^/]*$", "", source)  # a + may be in a path
    if "+" in source and not glob.glob(place):
        problems = [p for part in source.split("+") for p in load_problems(part, split, n)]
    elif name in RECIPES:
        problems = recipe_problems(name, split, n, path if local else None)
    else:
        problems = own_problems(source)[:n]
    for p in problems:
        if type(p.get("answer")) is float:  # with all of its digits: str() may write an exponent
            p["answer"] = np.format_float_positional(p["answer"], trim="-")
    (most, times), = Counter(p["id"] for p in problems).most_common(1)
    if times > 1:
        raise UserError(f"{source} has the id {most!r} more than once: give each row one of its own")
    return problems


def own_problems(source):
    """The problems of a user's own file: FILE, or FILE:field=its name there,..."""
    path, names = source, {}
    given = re.fullmatch(r"(.+?):(\w+=[^=,]+(?:,\w+=[^=,]+)*)", source)
    if given and not os.path.isfile(source):
        path, names = given[1], dict(pair.split("=") for pair in given[2].split(","))
    if not os.path.isfile(path):
        raise UserError(f"no data {source!r}: give one of {', '.join([*GAMES, *RECIPES])}, "
                        f"or a .jsonl file (no directory) with prompt, solution, answer")
    unknown = sorted(names.keys() - OWN_FIELDS)
    if unknown:
        raise UserError(f"{source}: no field {unknown[0]!r} to fill; there are {', '.join(OWN_FIELDS)}")
    stem = re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", Path(path).name)
    problems = []
    for i, row in enumerate(read_rows(path)):
        where = f"{path} row {i + 1}"
        for name in names.values():
            if name not in row:
                raise UserError(f"{where} has no field {name!r} (there are {[*row][:9]}): correct "
                                f"FILE:{source.rpartition(':')[2]}")
        row.update({field: row[name] for field, name in names.items()})
        p = {"id": f"{stem}-{i}", "source": stem, "solution": "",
             **{key: value for key, value in row.items() if value is not None and key != "earlier"}}
        check_fields(p, where)
        if "messages" in p:
            p |= last_exchange(p, where)
        if not p.get("prompt", "").strip():
            raise UserError(f"{where}: 'prompt' is absent or empty; FILE:prompt=NAME takes one: {[*row][:9]}")
        problems.append(p | {"id": whole(str(p["id"]))})
    if not problems:
        raise UserError(f"{source} is empty: at least one problem is needed")
    return problems


def last_exchange(row, where):
    """messages, [{role, content}] -> the user's last prompt, what was said before, the answer to it."""
    try:
        said = [[turn["role"] + "", turn["content"] + ""] for turn in row["messages"]]  # text, or an error
        solution = said.pop()[1] if said[-1][0] == "assistant" else row["solution"]
        role, prompt = said.pop()
    except (KeyError, TypeError, IndexError):
        role = None
    if role != "user" or {who for who, _ in said} - {"system", "user", "assistant"}:
        raise UserError(f"{where}: messages must be turns with role and content (text) of system, user and "
                        f"assistant, the last the user's or the assistant's, not {str(row['messages'])[:40]}")
    return dict(prompt=prompt, earlier=said, solution=solution)


def fitting(problems, tok, most, room, asked=None):
    """Problems whose prompt, or asked(problem), has at most `most` tokens; UserError for one above `room`."""
    kept = []
    for p in problems:
        n = len(tok.prompt_ids(p | dict(prompt=asked(p)) if asked else p))
        if room < n <= (most or n):
            way = f", shorten the prompt, or leave such out by --max_prompt {room}" * (room > 0)
            raise UserError(f"prompt {p['id']!r} has {n} tokens, of which model and gen_len allow {room}: "
                            f"lower gen_len{way}")
        kept += [p] * (n <= (most or n))
    if len(kept) < len(problems):
        say(f"{len(problems) - len(kept)} prompts are longer than --max_prompt {most}: left out")
    if not kept:
        raise UserError(f"no prompt of {len(problems)} is left: raise --max_prompt, or give a file with some")
    return kept


@dataclass
class Tokenizer:
    """What the rest of the code needs of a tokeniser, the same for every family."""
    encode: Callable  # text -> list of ids; never a special token, whatever the text says
    plain: dict       # id -> its UTF-8 bytes, of all tokens but the special ones
    special: dict     # special token -> id
    trimmed: bool     # a text has no white space around it
    chat: object      # OwnChat, or the tiny model's: prompt_ids, end_id, trims
    eos_id: int       # fills the tail of a response
    system: str = ""  # a turn before every prompt
    raw: bool = False  # prompts without the chat template
    mask_id: int = -1  # which no text may hold

    def __post_init__(self):
        self.written = {**self.plain, **{i: token.encode() for token, i in self.special.items()}}

    def decode(self, ids):
        """ids -> text; special tokens are written out, and an embedding row without a token as U+FFFD."""
        text = b"".join([self.written.get(i, b"\xff") for i in ids]).decode(errors="replace")
        return text.strip() if self.trimmed else text

    def bytes_of(self, i):
        """id -> its UTF-8 bytes; none for special tokens."""
        return self.plain.get(i, b"")

    def prompt_ids(self, asked, system=""):
        """A user's text, or a problem with earlier turns or `raw` -> (P,) int64 ids, ready for the answer."""
        asked = dict(prompt=asked) if isinstance(asked, str) else asked
        earlier, raw = asked.get("earlier", []), self.raw or asked.get("raw")
        system = "" if "system" in dict(earlier) else system or self.system  # a chat's own comes first
        turns = [("system", system)] * bool(system) + earlier + [("user", asked["prompt"])]
        return torch.tensor(self.checked(self.chat.prompt_ids(turns, raw), turns), dtype=torch.long)

    def response_ids(self, text, length=0):
        """A finished answer -> list of ids, the end of its turn included, EOS behind it up to a length."""
        ids = self.checked(self.encode(text.strip() if self.chat.trims else text), text) + [self.chat.end_id]
        return ids + [self.eos_id] * (length - len(ids))

    def checked(self, ids, text):
        if self.mask_id in ids:
            raise UserError(f"config.json: mask_token_id {self.mask_id} is in {str(text)[-40:]!r}, mend one")
        return ids


def whole(text):
    """A text in which half a character, which JSON can hold, is U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class OwnChat:
    """A checkpoint's own chat template, run in Jinja's sandbox. hf: its tokeniser; encode: of a text."""
    def __init__(self, name, hf, encode, thinks, eos_id):
        self.name, self.hf, self.encode, self.thinks = name, hf, encode, thinks
        special = {i: token.content for i, token in hf.added_tokens_decoder.items() if token.special}
        longest_first = sorted([*special.values(), MARK], key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)))
        answered = self.render([("user", "a"), ("assistant", " OK ")]) if hf.chat_template else " OK "
        self.trims = " OK " not in answered  # white space around a text is dropped
        ends = hf.encode(answered.rpartition("OK")[2], add_special_tokens=False)
        ends = [i for i in ends if i in special]
        self.end_id = (ends + [eos_id])[0]  # behind an answer

    def render(self, turns, **settings):
        """[(role, text)] as a text, unless told otherwise."""
        said = [dict(role=role, content=text) for role, text in turns]
        settings = dict(tokenize=False, enable_thinking=self.thinks) | settings
        try:
            return whole(self.hf.apply_chat_template(said, **settings)).removeprefix("\ufeff")
        except Exception as e:  # whatever a template raises
            raise UserError(f"{self.name}: its chat_template fails ({e}) with the roles "
                            f"{[who for who, _ in turns]}: mend it or the row {str(turns)[-70:]}") from None

    @property
    def system(self):
        """The system text that the template adds by itself."""
        before, _, behind = self.render([("system", "(here)"), ("user", "a")]).partition("(here)")
        own = self.render([("user", "a")])
        fits = own.startswith(before) and own.endswith(behind)
        return own[len(before):len(own) - len(behind)] if fits else ""

    def prompt_ids(self, turns, raw=False):
        """Turns, the answer open -> list of ids; a text writes no special token. raw: without a template."""
        if raw or not self.hf.chat_template:  # a base model: the texts, on lines of their own
            text = "\n".join(text for _, text in turns) + "\n" * (not raw)
            return self.hf.encode("") + self.encode(text)  # BOS, where it has one, and no other token
        hidden = [(role, self.special.sub(MARK, text)) for role, text in turns]
        text = self.render(hidden, add_generation_prompt=True)
        first, *rest = text.split(MARK)
        ids = self.hf.encode(first, add_special_tokens=False)
        written = [token for _, said in turns for token in self.special.findall(said)]
        said = [whole(content) for who, content in hidden if who != "assistant"]  # of it, thoughts may go
        dropped = [content for content in said if content.strip() not in text]
        if dropped or len(rest) != len(written):
            raise UserError(f"{self.name}: its chat_template alters {str(dropped + written)[:40]}: repair it")
        for token, piece in zip(written, rest):
            ids += self.encode(token) + self.hf.encode(piece, add_special_tokens=False)
        return ids


def load_tokenizer(name, revision=None):
    """A checkpoint's tokeniser; no remote code is run. Raises UserError if it is absent or does not fit."""
    folder = checkpoint_dir(name, revision, weights=False)
    cfg = read_config(folder)
    tok = Tokenizer(*tiny_tokens(folder) or bpe_tokens(folder, cfg), cfg.eos_ids[0], mask_id=cfg.mask_id)
    if max(tok.written) >= cfg.vocab_size:
        raise UserError(f"{folder}: the tokeniser has ids up to {max(tok.written)}, "
                        f"the model's embedding only {cfg.vocab_size} rows: copy both of one model")
    tok.prompt_ids("a")  # an error before anything long
    return tok


def tiny_tokens(folder):
    """The tiny model's vocab.json -> Tokenizer's fields but the last, or None if it is another's."""
    table = {} if (folder / "tokenizer.json").exists() else read_object(folder / "vocab.json")
    if not isinstance(table.get("words"), list):  # a BPE's "words" is a token
        return None
    pieces = [bytes([b]) for b in range(256)] + [b" " + word.encode() for word in table["words"]]
    special = {token: i for i, token in enumerate(table["special"], len(pieces))}
    ranks = {piece: i for i, piece in enumerate(pieces)}
    bpe = tiktoken.Encoding("tiny", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    def encode(text):
        return bpe.encode((" " + text.strip()).rstrip())
    def prompt_ids(turns, raw=False):
        ids = [i for _, text in turns for i in encode(text)]
        return ids if raw else [special["<bos>"], *ids, special["<sep>"]]
    chat = SimpleNamespace(prompt_ids=prompt_ids, end_id=special["<eos>"], trims=False, system="")
    return encode, dict(enumerate(pieces)), special, True, chat


def bpe_tokens(folder, cfg):
    """The same of a byte-level BPE: tokenizer.json, or vocab.json and merges.txt, read as Qwen2's are."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer  # slow to import
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else Qwen2Tokenizer
    try:
        hf = kind.from_pretrained(folder)
        table = hf.backend_tokenizer
        bare = tokenizers.Tokenizer(table.model)  # without added tokens: text never becomes one
        bare.normalizer, bare.pre_tokenizer = table.normalizer, table.pre_tokenizer
        special = {t.content: i for i, t in table.get_added_tokens_decoder().items()}
        vocab, table = bare.get_vocab(), byte_table(hf, True)
        plain = {i: table[i] for token, i in vocab.items() if special.get(token) != i}
        complete = {bytes([b]) for b in range(128)} <= set(plain.values())
        repeated = len(set(vocab.values())) < len(vocab)
        last = bare.id_to_token(max(plain))
        cut = kind is Qwen2Tokenizer and bare.model.tokenize(last)[1:]  # its merge is not there
        shared = set(special.values()) & set(plain)
        if cut or not complete or repeated or shared:
            raise ValueError(f"not one id per token, bytes are missing, or no merge gives {last!r}")
    except Exception as e:  # the libraries raise many kinds
        raise UserError(f"{folder} has no tokeniser: neither tokenizer.json nor vocab.json and merges.txt is "
                        f"a byte-level BPE, or tokenizer_config.json is wrong ({e}): copy them") from None
    def encode(text):
        return bare.encode(whole(text), add_special_tokens=False).ids
    chat = OwnChat(folder, hf, encode, FAMILIES[cfg.family].thinks, cfg.eos_ids[0])
    if chat.end_id not in cfg.eos_ids:
        raise UserError(f"{folder}: its chat_template ends an answer with the id {chat.end_id}, which is no "
                        f"eos_token_id {cfg.eos_ids}: add it to config.json")
    if not hf.chat_template:
        say(f"{folder} has no chat_template: a prompt is plain text")
    return encode, plain, special, False, chat


def byte_table(hf, byte_level):
    """{id: the UTF-8 bytes it stands for}, if hf is a byte-level BPE, or else SentencePiece's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    byte_of = {char: bytes([b]) for b, char in bytes_to_unicode().items()}
    added = {token.content for token in hf.added_tokens_decoder.values()}
    def meaning(piece):
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        if byte_level and piece not in added:
            return b"".join(byte_of.get(char, b"\xff") for char in piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
    return {i: meaning(piece) for piece, i in hf.get_vocab().items()}


def example_rng(seed, epoch, index):
    """The noise of one example: depends on neither world size, batch size nor resuming."""
    return np.random.default_rng([seed, epoch, index])


def stacked(examples, *fields):
    """Of each field a (B, L) tensor; and what every batch names: {prompts, lists of token ids; ids}."""
    names = dict(prompts=[e["prompt_ids"] for e in examples], ids=[e["id"] for e in examples])
    return *(torch.tensor([e[field] for e in examples]) for field in fields), names


def response_inputs(model_cfg, prompts, xt, x0=None):
    """Lists of ids, noisy xt (B, L) -> hidden()'s arguments; cols (B, L) of xt. x0: clean blocks to see."""
    if x0 is not None:
        return block_diffusion_layout(model_cfg, prompts, xt, x0)
    rows = [torch.tensor(prompt + noisy) for prompt, noisy in zip(prompts, xt.tolist())]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    ids = F.pad(ids, (-ids.shape[1] % LENGTHS, 0), value=-1)
    valid = ids >= 0  # (B, T)
    cols = torch.arange(ids.shape[1])[-xt.shape[1]:].expand(xt.shape)
    first = first_position(model_cfg, valid.sum(1, keepdim=True) - xt.shape[1])
    ids = ids.where(valid, model_cfg.pad_id)
    positions = token_positions(valid) + first
    return dict(ids=ids, valid=None if valid.all() else valid, positions=positions), cols


def hidden_rows(model, prompts, xt, where, x0=None):
    """Hidden states (N, C) of the positions where = rows (N,) of xt (B, L), columns (N,): one forward."""
    device, (row, position) = model.embed.weight.device, where
    inputs, inputs["out"] = response_inputs(model.cfg, prompts, xt, x0)
    h = model.hidden(**{k: None if t is None else t.to(device) for k, t in inputs.items()})
    return h[row.to(device), position.to(device)]


@torch.no_grad()
def teacher_rows(teacher, *args):
    """hidden_rows() of a model that is not trained here: in eval mode, without a gradient."""
    was_training = teacher.training
    h = hidden_rows(teacher.eval(), *args)
    teacher.train(was_training)
    return h


def state_at(x0, order, t, mask_id):
    """The canvas after t forwards: x0 where order < t, else MASK. All (..., L). Returns xt, masked."""
    masked = order >= t
    return torch.where(masked, mask_id, x0), masked


def read_trajectories(path, growing=False):
    """All records of a folder (every rank's shard) or of one .jsonl, checked, in a fixed order (by id)."""
    records, path = {}, Path(path)
    if (path / "trajectories").is_dir():
        raise UserError(f"{path} is a run's folder: give {path / 'trajectories'}")
    for shard in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
        for i, r in enumerate(read_jsonl(shard, ours=True, growing=growing, **RECORD_FIELDS)):
            if r["schema"] != SCHEMA:
                raise UserError(f"{shard} record {i + 1}: schema {r['schema']}, not {SCHEMA}: collect again")
            L = len(r["x0"])
            numbers = sum(map(r.get, LISTS), [])
            valid = all(type(i) is int and i >= 0 for i in numbers) and sorted(r["rank"]) == [*range(L)]
            if not (valid and r["nfe"] > 0 and 0 < L == len(r["order"])):
                raise UserError(f"{shard} record {i + 1} is inconsistent: x0, order and rank must have one "
                                f"length, rank be a permutation, nfe positive: collect again")
            records[r["id"]] = r
    return [records[key] for key in sorted(records)]


def list_sets():
    """the data sets by name"""
    for name, recipe in RECIPES.items():
        print(f"{name:13} {recipe.grader:7} {recipe.hub:36} {recipe.note}")


@dataclass
class Show:
    """problems as the model and its privileged teacher see them"""
    path: str = option("tiny", positional=True)  # data, see above
    n: int = 3  # how many
    split: Literal["train", "dev", "test"] = "train"  # of a data set


def show(args):
    for p in load_problems(args.path, args.split, args.n):
        privileged = privileged_prompt(p) if p["solution"] else "(there is no solution)"
        for name, value in (p | dict(grader=grade.grader_of(p), privileged=privileged)).items():
            print(f"  {name:<10} " + "\n".join(map(str, listed(value))).replace("\n", "\n" + 13 * " "))


@dataclass
class Stats(ModelOptions, Show):
    """lengths and graders"""
    path: str = option(positional=True)  # data, see above
    n: int | None = None  # the first n only


def stats(args):
    problems = load_problems(args.path, args.split, args.n)
    tok = load_tokenizer(args.model, args.revision)
    kinds = Counter(grade.grader_of(p) for p in problems)
    print(f"{'problems':<16} {len(problems)}: " + ", ".join(f"{k} graded by {g}" for g, k in kinds.items()))
    spread("prompt tokens", [len(tok.prompt_ids(p)) for p in problems])
    spread("solution tokens", [len(tok.response_ids(p["solution"])) for p in problems if p["solution"]])


def spread(name, values):
    if values:
        low, q5, median, q95, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
        print(f"{name:<16} mean {np.mean(values):.1f}, least {low:.0f}, 5% {q5:.0f}, half {median:.0f}, "
              f"95% {q95:.0f}, most {high:.0f}")


COMMANDS = {"list": (list_sets,), "show": (show, Show), "stats": (stats, Stats)}

if __name__ == "__main__":
    run_cli(lambda: run_command(__doc__, COMMANDS))
