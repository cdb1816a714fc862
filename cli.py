"""The ground floor: errors of one line, JSON lines, whole files, options that are fields of dataclasses."""
import argparse
import dataclasses
import functools
import gc
import gzip
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from safetensors import SafetensorError
from tqdm import tqdm

sys.stderr = sys.stderr or open(os.devnull, "w")  # `2>&-`
INTERRUPTED = "interrupted; the same command continues"
sys.excepthook = lambda kind, *error: (  # of a script that still imports
    print(INTERRUPTED, file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error))
interrupted = []  # what else comes of an interrupt: C code may raise an error of its own in its place


class UserError(ValueError):
    """Bad input: one line that names the thing, the value and the fix."""


def reason(error):
    """Of a library's error, its kind and first line."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:250]


def run_cli(main):
    """Bad input is one line on stderr and exit code 2, never a traceback; main may return an exit code."""
    sys.unraisablehook = come_again
    interrupted.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as behind nohup
        signal.signal(signal.SIGINT, interrupt)
    if "RANK" not in os.environ:  # a rank may be waiting for another, and then only the signal itself ends it
        signal.signal(signal.SIGTERM, interrupt)
    if hasattr(sys.stdout, "reconfigure"):  # a log then has the lines of both streams as they came
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        try:
            code = main()
        except SystemExit as e:  # all ranks end here, before the work is done
            code = e.code
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left that they could interrupt
            signal.signal(number, signal.SIG_DFL)
    except (KeyboardInterrupt, *interrupted):
        print("\n" * sys.stderr.isatty() + INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (UserError, OSError, SafetensorError, UnicodeError) as e:  # a full disk, half a character
        print("error:", *str(e).splitlines(), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not re.search("gloo|nccl|EADDRINUSE|Connection (closed|reset)", str(e), re.I):
            raise
        print("another rank has ended or did not answer; the same command continues", e, file=sys.stderr)
        sys.exit(1)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # without this order some processes abort when they exit
        distributed.barrier()
        distributed.destroy_process_group()
    if isinstance(code, (int, str)):
        sys.exit(code)


def interrupt(*_):
    interrupted.append(Exception)
    raise KeyboardInterrupt


def come_again(lost, usual=sys.unraisablehook):
    """An interrupt that ends where it came, in a __del__ say, comes once more."""
    if lost.exc_type is not KeyboardInterrupt:
        return usual(lost)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()


GIVEN = {}  # what the command line says; read_config() takes a block length from it that no file tells
CRC = ', "crc": "01234567"}'  # how a line of ours ends
SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
BOUNDS = {name: (least, most) for least, most, names in [  # of every numeric option
    (1, 2**17, "lora_r gen_len block_len per_step prompt_len max_prompt n_buckets turns score_batch"),
    (1, 10**7, "n batch_size micro_batch collect_batch save_every log_every epochs limit seeds"),
    (0, 10**7, "max_steps steps warmup_steps drill_steps eval_problems n_problems points window top_k "
               "states_per_trajectory train_block vicinity cache_delay refresh"),
    (0, 2**31, "seed collect_seed num_fewshot eos_in_loss"),
    (0, 1, "lr_floor warmup_ratio trajectory_share block_share p_context p_future rand_p"),
    (0, 0.999999, "lora_dropout beta2"),
    (1e-9, 1, "top_p collect_top_p t_min eps"),
    (0, 1e9, "temperature collect_temperature threshold thresholds block_add lam alpha gamma muon_lr "
             "weight_decay"),
    (1e-12, 1e9, "lr clip lora_alpha tau beta"),
] for name in names.split()}


def check_numbers(values):
    """UserError for a number in {name: value or list of values} outside its BOUNDS; NaN is outside."""
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            least, most = BOUNDS.get(name, (number, number))  # words have none
            if type(number) in (int, float) and not least <= number <= most:
                bound = f"at most {most:g}" if number > most else f"at least {least:g}"
                raise UserError(f"{name} is {number}: it must be {bound}")


def option(default=dataclasses.MISSING, **about):
    """A field that must be given (no default), has no dashes (positional), or choices."""
    about["required"] = default is dataclasses.MISSING
    return dataclasses.field(default=None if about["required"] else default, metadata=about)


def add_options(parser, cls, presets={}):
    """The fields of a dataclass as options. presets: {family: {field: value}}, shown by --help."""
    hints, comments = get_type_hints(cls), {}
    for base in reversed(cls.__mro__[:-1]):
        comments.update(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(base), re.M))
    for field in dataclasses.fields(cls):
        about, name = field.metadata, field.name
        kind, text = hints[name], comments.get(name, "")
        if type(None) in get_args(kind):  # X | None
            kind = get_args(kind)[0]
        names = ["--" + name] + ["-n", "--n_problems"] * (name == "n")  # --n is torchrun's, too
        differ = ", ".join(f"{family} {own[name]}" for family, own in presets.items() if name in own)
        values = "; ".join(str(value) for value in (field.default, differ) if value not in (None, ""))
        text += f" [{values}]" if values and not text.endswith("]") else ""
        settings = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"))  # absent unless given
        if about.get("positional"):
            names, settings["nargs"] = [name], None if about["required"] else "?"
        else:
            settings["required"] = about.get("required", False)
        if get_origin(kind) is list:
            settings["nargs"], kind = "+", get_args(kind)[0]
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            choices = about.get("choices") or get_args(kind) or None
            settings["choices"] = choices() if callable(choices) else choices
            settings["type"] = str if get_origin(kind) is Literal else kind
        parser.add_argument(*names, **settings)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists what there is")


def new_parser(doc):
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def refuse_if(useless, names, why):
    """UserError for an option of these names, in one text, that is given though it changes nothing."""
    for name in names.split() * bool(useless):
        if name in GIVEN:
            raise UserError(f"--{name} {why}: leave it out")


def given_to(parser):
    """What the command line says, {name: value}, its numbers checked."""
    given = vars(parser.parse_args())
    for name, value in given.items():  # "--" is none for argparse
        if value in ("", [], [""], "--", ["--"]):
            raise UserError(f"--{name} is empty (an unset variable?): give a value, or leave it out")
    check_numbers(given)
    GIVEN.clear()
    GIVEN.update(given)
    return given


def read_options(given, cls, *others):
    """-> [an instance of cls, and per other dataclass (Decoding) a dict of what was given of it]."""
    first, *rest = [{f.name: given[f.name] for f in dataclasses.fields(each) if f.name in given}
                    for each in (cls, *others)]
    return [cls(**first), *rest]


def parse(doc, *classes):
    """The command line of a script, see read_options; of one class the instance alone."""
    parser = new_parser(doc)
    for cls in classes:
        add_options(parser, cls)
    options = read_options(given_to(parser), *classes)
    return options if len(classes) > 1 else options[0]


def run_command(doc, commands):
    """Call one of {name: (function, dataclass, *others)}. Help: the docstring of dataclass or function."""
    parser = new_parser(doc)
    choose = parser.add_subparsers(dest="command", required=True)
    for name, (function, *classes) in commands.items():
        about = inspect.getdoc(*classes[:1] or [function])
        one = choose.add_parser(name, help=about, description=about, allow_abbrev=False)
        for cls in classes:
            add_options(one, cls)
    given = given_to(parser)
    function, *classes = commands[given["command"]]
    return function(*read_options(given, *classes) if classes else [])


def read_text(path, errors="strict"):
    """The text of a file, unpacked where its name ends in .gz."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            return f.read().decode("utf-8", errors).removeprefix("\ufeff").replace("\r\n", "\n")
    except (FileNotFoundError, NotADirectoryError):
        below = [d for d in sorted(Path(path).parent.glob("*")) if os.path.exists(d / Path(path).name)]
        fix = f"there is one in {below[0]}" if below else "correct the path, or copy the file there"
        raise UserError(f"no file {path}: {fix}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is not a whole .gz file ({e}): download it again") from None


def read_json(path, text=None):  # text: of a file that has been read
    text = read_text(path) if text is None else text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}): repair it, or copy it again") from None


def read_object(path, optional=True):
    """The object in a JSON file; {} if there is no such file and it is optional."""
    table = read_json(path) if path.exists() or not optional else {}
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold an object, not {str(table)[:40]!r}: repair it")
    return table


def read_jsonl(path, ours=False, mend=False, growing=False, sealed=False, **kinds):
    """Objects of a .jsonl. ours: line_of()'s, all if sealed; mend: cut bad ones; growing: the last may be."""
    text, rows, whole = read_text(path, "replace" if ours else "strict"), [], ""
    if not ours and re.match(r"\s*\[", text):  # a list, whatever it is called
        return read_json(path, text)
    for i, line in enumerate(text.split("\n"), 1):
        try:
            rows += [row_of(line, kinds, sealed) if ours else json.loads(line)] if line.strip() else []
            whole += line + "\n" * bool(line)
            sealed = sealed or CRC[:10] in line
        except (ValueError, RecursionError) as e:
            torn = i > text.count("\n")  # the last one, which is no news
            if growing and torn:
                break
            fault = f"{path} line {i} is not valid JSON or is damaged ({e}): {line[:60]!r}"
            if not mend:
                raise UserError(f"{fault}; repair it: a file has objects, one per line or a list") from None
            if not torn:
                print(f"warning: {fault}; it is made again, and kept in {path}.damaged", file=sys.stderr)
            with open(f"{path}.damaged", "ab") as f:
                f.write(f"{line}\n".encode())
    if mend and whole != text:
        write_whole(path, whole)
    return rows


def line_of(row):
    """A line for a .jsonl of ours. Its last field is a checksum of what stands before it."""
    text = json.dumps(row)[:-1]
    return f'{text}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def row_of(line, kinds, sealed):
    """Its object; not sealed: it may lack the checksum. ValueError if it is damaged. kinds: of fields."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    crc = row.pop("crc", None)
    if (sealed or crc is not None) and crc != f"{zlib.crc32(line[:-len(CRC)].encode()):08x}":
        raise ValueError("not as it was written")
    wrong = [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
    if wrong:
        raise ValueError(f"{wrong[0]} is absent or of another type")
    return row


def read_rows(path):
    """The objects of a .jsonl, .json or .parquet file, the first two also with .gz."""
    if str(path).endswith(".parquet"):
        parquet = package("pyarrow.parquet", f"{path}: reading .parquet needs pyarrow: pip install pyarrow")
        try:
            for batch in parquet.ParquetFile(path).iter_batches():  # a set may not fit into memory
                yield from json.loads(json.dumps(batch.to_pylist(), default=str))  # dates and bytes, too
        except (ValueError, OSError) as e:  # pyarrow's own are kinds of these
            raise UserError(f"{path} is not a whole .parquet file ({e}): copy it again") from None
        return
    for i, row in enumerate(read_jsonl(path)):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {i + 1} is not an object: {str(row)[:60]!r}; repair it")
        yield row


def append_line(path, *rows):
    """One or more lines of a .jsonl, on the disk when this returns."""
    with open(path, "ab") as f:
        f.write("".join(map(line_of, rows)).encode())
        f.flush()  # all of it, or an error
        os.fsync(f.fileno())


def write_whole(path, text):
    """Under another name, then renamed: whole and on the disk, or absent."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, "utf-8")
    sync(tmp)
    os.replace(tmp, path)
    sync(path.parent)


@contextmanager
def whole_folder(path):
    """A folder to fill; it gets its name when all of it is on the disk, with the checksums of its files."""
    tmp = path.with_name(path.name + ".unfinished-nanotraj")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    yield tmp
    files = sorted(tmp.iterdir())
    write_whole(tmp / SUMS, "".join(f"{sha256(file)}  {file.name}\n" for file in files))
    for place in (*files, tmp):
        sync(place)
    shutil.rmtree(path, ignore_errors=True)
    tmp.rename(path)
    sync(path.parent)


def check_sums(folder):
    """UserError if a file that whole_folder() wrote is not as it was."""
    lines = read_text(folder / SUMS).splitlines() if (folder / SUMS).is_file() else []
    for checksum, name in ((line[:64], line[66:]) for line in lines):
        if not (folder / name).is_file() or sha256(folder / name) != checksum:
            raise UserError(f"{folder / name} is not as it was written: make it again; or remove "
                            f"{folder / SUMS} if you changed it")


def lock(file):
    """-> what to keep while no other process may lock it; UserError if one has."""
    import fcntl  # not on Windows, where grading runs
    held = open(file, "a")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{file.parent} is in use by another run: wait, or choose another folder") from None
    except OSError as e:
        say(f"warning: {file} cannot be locked ({e}): start no second run there")
    return held


def check_apart(values, paths):
    """UserError if a value (a path, A+B, NAME=FILE, FILE:a=b, a pattern) is inside of one of the paths."""
    inside = list(map(os.path.realpath, paths))
    for value in map(str, values):
        for part in {value, *re.split(r"[+=:]|[*?[].*", value)}:
            if any(Path(os.path.realpath(part)).is_relative_to(path) for path in inside):
                raise UserError(f"{value} lies in what this command would replace: choose another folder")


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def package(name, otherwise):
    """A module of a package that few need. Raises UserError, which says `otherwise`, where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(otherwise) from None


@functools.cache
def say(text):
    """Print to stderr, on rank 0 only and each text once."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


class LogLines(io.TextIOBase):
    """A log file as a progress bar sees it: a line each time, and nothing that moves a cursor."""
    def write(self, text):
        line = re.sub(r"\x1b\[A|[\r\n]", "", text).strip()
        if line:
            print(line, file=sys.stderr, flush=True)


def progress_bar(rows=None, what="", total=None, asked=True, **settings):
    """tqdm on rank 0; where stderr is no terminal, a line every 30 seconds, and none of what takes less."""
    if not sys.stderr.isatty():
        settings.update(file=LogLines(), ncols=0, miniters=1, mininterval=30, delay=30)
    shown = asked and os.environ.get("RANK", "0") == "0"
    return tqdm(rows, what, total, leave=False, disable=not shown, **settings)
