"""README and docs keep their budgets, render as they are meant, and their links, options and examples work."""
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

README_LINES, README_BYTES, DOC_LINES, WIDTH = 200, 12_288, 150, 120
README, DOCS = ROOT / "README.md", sorted(ROOT.glob("docs/*.md"))
PAGES = [README, *DOCS, ROOT / "BENCH.md"]
MAKEFILE = (ROOT / "Makefile").read_text()
MARKDOWN = MarkdownIt("commonmark").enable("table")
COMMAND = re.compile(r"\b(?:python3?|torchrun|make|bash|sbatch|pip) "
                     r"(?:\S+\.(?:py|sh)\b|-[mc] |--|(?:demo|test|check|install)\b)")
SCRIPTS = sorted(f.name for f in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
                 if "\n    run_cli(" in f.read_text())
WITH_COMMANDS = {"sweep.py", "compare.py", "data.py", "eval.py", "lora.py", "rollout.py"}
TERMS = {"TPF": "tokens per forward", "AUP": "area under accuracy", "TDS": "predictive entropies",
         "DDO": "discriminative optimisation", " W ": "forwards"}


# ------------------------------------------------------------------------------------------ reading a page
def inline(text):
    """What a reader sees outside blocks of code: (type, token) of texts, code spans, links and pictures."""
    for token in MARKDOWN.parse(text):
        yield from token.children or []


def running_text(text):
    return "\n".join(t.content if t.type == "text" else " " for t in inline(text))


def blocks(text, info=None):
    """Blocks of code: those with this word after ```, or all."""
    return [t.content for t in MARKDOWN.parse(text)
            if t.type == "fence" and info in (None, t.info) or t.type == "code_block" and info is None]


def command_lines(text):
    """Lines of the blocks of code, continued ones as one; and the code spans."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    return lines + [t.content for t in inline(text) if t.type == "code_inline"]


def anchors(text):
    """What GitHub makes of the headings."""
    found = set()
    tokens = MARKDOWN.parse(text)
    for opened, heading in zip(tokens, tokens[1:]):
        if opened.type == "heading_open":
            title = "".join(t.content for t in heading.children)
            found.add(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    return found


# ------------------------------------------------------------------------------------------ the guards
def over_budget(text, lines, size=None):
    found = [f"{n} lines"] if (n := text.count("\n")) > lines else []
    if size and len(text.encode()) > size:
        found.append(f"{len(text.encode())} bytes")
    return found + [f"line {i}" for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]


def stray_commands(text):
    return COMMAND.findall(running_text(text))


def dead_links(text, folder):
    dead = []
    for token in inline(text):
        target = token.attrs.get("href") or token.attrs.get("src")
        if not target or target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else None
        if file and not file.exists() or anchor and anchor not in anchors(file.read_text() if file else text):
            dead.append(target)
    return dead


@lru_cache
def help_of(script, command=""):
    if script.endswith(".sh"):
        return subprocess.run(["bash", str(ROOT / script), "--help"], capture_output=True, text=True).stdout
    file = next(ROOT / folder / script for folder in ("", "tools", "tests") if (ROOT / folder / script).exists())
    out, before = io.StringIO(), sys.argv
    sys.argv = [script, *([command] if command else []), "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def options(script, command=""):
    """The --options that a script, or one of its commands, has in its help."""
    return set(re.findall(r"--[\w-]+", help_of(script, command)))


@lru_cache
def every_option():
    found = options("ddp_launch.sh")
    for script in SCRIPTS:
        several = re.search(r" \{([\w,]+)\} \.\.\.", help_of(script)) if script in WITH_COMMANDS else None
        for command in several[1].split(",") if several else ["", "paper"] if script == "sweep.py" else [""]:
            found |= options(script, command)
    return found


def uses(line):
    """(script, its command or "", its options) of a line; script "" for options that stand alone."""
    script, command, found, result = None, "", [], []
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # not a command
        words = line.split()
    for word in words:
        if " " in word:
            result += uses(word)
        elif re.fullmatch(r"[\w./-]+\.(py|sh)", word):
            if script:
                result.append((script, command, found))
            script, command, found = word, "", []
        elif word.startswith("--"):
            found.append(word.partition("=")[0])
        elif Path(script or "").name in WITH_COMMANDS and not command and not found and word.isalpha():
            command = word
    if script:
        return [*result, (script, command, found)]
    alone = re.match(r"--[\w-]+", line)  # an option by itself; pip, torchrun and sbatch have their own
    return result + ([("", "", found)] if alone else [])


def unknown_options(text):
    wrong = []
    for line in command_lines(text):
        for script, command, found in uses(line):
            name = {"mine.py": "tad.py"}.get(Path(script).name, Path(script).name)  # the fork of README
            name = script if script.startswith("weights/") else name
            if script and not any((ROOT / folder / name).exists() for folder in ("", "tools", "tests")):
                wrong.append(script)
            elif found:
                known = options(name, command) if script else every_option()
                wrong += [f"{script} {command} {option}" for option in found if option not in known]
        wrong += [target for target in re.findall(r"\bmake (\w+)", line)
                  if line.startswith(("make", "PIP_")) and f"\n{target}:" not in MAKEFILE]
    return wrong


def unexplained(text):
    """Terms whose first use has no explanation in its paragraph."""
    paragraphs = [re.sub(r"\s+", " ", p) for p in text.split("\n\n")]
    first = {term: next((p for p in paragraphs if term in p), "") for term in TERMS}
    return [term for term, p in first.items() if p and TERMS[term] not in p]


# ------------------------------------------------------------------------------------------ the tests
def test_budgets():
    assert not over_budget(README.read_text(), README_LINES, README_BYTES)
    for page in DOCS:
        assert not over_budget(page.read_text(), DOC_LINES), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page(page):
    text = page.read_text()
    assert not stray_commands(text)
    assert not dead_links(text, page.parent)
    assert not unknown_options(text)
    named = [t.content for t in inline(text) if t.type == "code_inline"]
    for path in (name for name in named if re.fullmatch(r"(tests|tools|weights|assets|docs)/[\w./-]*", name)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_terms_are_explained_where_they_first_stand(page):
    assert not unexplained(page.read_text())


def test_these_guards_see_what_is_broken():
    lost_indent = "python tad.py --model llada  # 1 GPU\n    bash ddp_launch.sh tad.py\n    torchrun tad.py\n"
    assert len(stray_commands(lost_indent)) == 3 and not stray_commands("    " + lost_indent)
    assert not stray_commands("We make the table again with `python eval.py`, in Python and bash.\n")
    assert over_budget("x\n" * 3, 2) == ["3 lines"]
    assert over_budget("x" * 121, 2, 99) == ["121 bytes", "line 1"]
    text = "# A b-c: `d`\n[1](#a-b-c-d) [2](#no) [3](README.md#no) [4](none.md) ![5](no.png) [6](README.md)\n"
    assert dead_links(text, ROOT) == ["#no", "README.md#no", "none.md", "no.png"]
    assert unknown_options("    python tad.py --lr 1 --no_such 2  # --not this\n") == ["tad.py  --no_such"]
    assert unknown_options("    python eval.py curve --tasks x\n") == ["eval.py curve --tasks"]
    assert unknown_options("`--int8`, `--batch_size 2`\n") == ["  --int8"]
    assert unknown_options("    python gone.py\n    make nothing\n") == ["gone.py", "nothing"]
    assert unknown_options('    sbatch --nodes 2 --wrap "bash ddp_launch.sh --gpu 2 tad.py --lr 1"\n') == [
        "ddp_launch.sh  --gpu"]
    assert unexplained("The TPF.\n\nTPF is tokens per forward.\n") == ["TPF"]


def test_the_python_example_gives_right_answers():
    (code,) = blocks(README.read_text(), "python")
    assert code.count("\n") <= 10
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    lines = out.getvalue().splitlines()
    assert [line.split(" forwards:")[0] for line in lines] == ["True 48"] * 4


def test_the_terminal_excerpt_is_real(monkeypatch, capsys):
    (shown,) = blocks(README.read_text(), "text")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--show"])
    import_module("sample").main()
    real = capsys.readouterr().out.splitlines()
    found = [next(i for i, line in enumerate(real)
                  if (line.startswith(cut) if (cut := one.removesuffix("…")) != one else line == one))
             for one in shown.splitlines()]
    assert found == sorted(set(found))


def test_the_fork_example(tmp_path):
    """The copy, the diff and the first command of README; out/ has what a run leaves."""
    text = README.read_text()
    (diff,) = blocks(text, "diff")
    commands = [line for line in command_lines(text) if "mine.py" in line]
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in ("weights", "assets"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert commands[0] == "cp tad.py mine.py"
    method = (tmp_path / "tad.py").read_text()
    old, new = (line[1:] for line in diff.splitlines())
    assert diff[0] == "-" and method.count(old + "\n") == 1
    (tmp_path / "mine.py").write_text(method.replace(old, new))
    words = shlex.split(commands[1], comments=True)
    done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "trial" / "adapter").is_dir()
