"""The house keeps its budgets, its doors are one-way, and nothing outside a clone is needed."""
import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

TOTAL = 6800
DENSITY, MEAN, FUNCTION, METHOD, WIDTH = 12.0, 11.5, 60, 350, 110
METHODS = {"tad", "t3d", "tabom", "trims"}
# a file imports from its own floor and those below
FLOORS = [{"cli", "runner"}, {"grade", "recipes", "model", "layers"}, {"lora", "data"}, {"run"}, {"sample"},
          {"rollout"}, {"teacher"}, {"eval"}, METHODS, {"tools"}]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])
FSTRING = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)  # Python 3.12
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_of(text):
    """-> tokens and code lines, without comments and docstrings."""
    docs, found, depth = docstring_lines(ast.parse(text)), [], 0
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        depth -= t.type == FSTRING[1]
        if not depth and t.type != FSTRING[0] and t.type not in LAYOUT and t.start[0] not in docs:
            found.append(t)  # of an f-string only its end: one token, as Python 3.11 counts
        depth += t.type == FSTRING[0]
    return len(found), len({t.start[0] for t in found})


def over_budget(files):
    """What is too large or too dense: a list of texts. files: {name: text}."""
    over, tokens, lines = [], 0, 0
    for name, text in files.items():
        n_tokens, n_lines = code_of(text)
        tokens, lines = tokens + n_tokens, lines + n_lines
        if n_tokens > DENSITY * n_lines:
            over.append(f"{name}: {n_tokens / n_lines:.1f} tokens per code line")
        if Path(name).stem in METHODS and text.count("\n") > METHOD:
            over.append(f"{name}: {text.count(chr(10))} lines")
        over += [f"{name}: wide: {line.strip()[:40]}" for line in text.splitlines() if len(line) > WIDTH]
        over += [f"{name}: {node.name} is long" for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION]
    if tokens > MEAN * lines:
        over.append(f"{tokens / lines:.2f} tokens per code line over all files")
    total = sum(text.count("\n") for text in files.values())
    return over + [f"{total} lines in all"] * (total > TOTAL)


def imported_by(text):
    nodes = list(ast.walk(ast.parse(text)))
    names = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module}


def wrong_doors(files):
    """Imports that go up, also local ones, and methods that import each other: a list of (file, import)."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    wrong = []
    for name, text in files.items():
        here = "tools" if name.startswith("tools/") else Path(name).stem
        fork = here not in floor  # of a method
        level = floor["tad"] if fork else floor[here]
        up = {x for x in imported_by(text) & floor.keys() if floor[x] > level}
        up |= (imported_by(text) & METHODS) - {here} if fork or here in METHODS else set()
        wrong += [(name, x) for x in sorted(up)]
    return wrong


@pytest.fixture(scope="module")
def files():
    return {str(f.relative_to(ROOT)): f.read_text() for f in FILES}


def test_budgets(files):
    assert not over_budget(files)


def test_imports_go_one_way(files):
    assert not wrong_doors(files)


def test_these_guards_see_what_is_broken(files):
    dense = "x = [(a, b, c) for a, b, c in zip(range(3), range(3), range(3)) if a == b]\n"
    assert any("tokens per code line" in text for text in over_budget({**files, "tad.py": dense}))
    assert any("lines in all" in text for text in over_budget({**files, "more.py": "x = 1\n" * TOTAL}))
    assert any("is long" in text for text in over_budget({"a.py": "def f():\n" + "    x = 1\n" * FUNCTION}))
    assert over_budget({"tad.py": "x = 1\n" * (METHOD + 1)}) == ["tad.py: 351 lines"]
    assert wrong_doors({"cli.py": "def f():\n    from model import load\n"}) == [("cli.py", "model")]
    assert not wrong_doors({"mine.py": "import run\n"}) and wrong_doors({"mine.py": "import tools\n"})
    assert wrong_doors({"tad.py": "import t3d\n", "eval.py": "from tools import compare\n"}) == [
        ("tad.py", "t3d"), ("eval.py", "tools")]


def test_no_test_waits_for_a_file_outside_the_clone():
    for file in ROOT.glob("tests/*.py"):
        text = file.read_text()
        assert not re.search(r"skipif\([^)]*exists\(\)", text), file
        assert "shared" + "/fixtures" not in text and '"shared"' + " /" not in text, file


def test_it_is_not_a_package():
    """No module called model or data lands in site-packages, and no message names a package of this name."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"] == {"py-modules": []}
    for file in FILES:
        assert not re.search(r"install '?nanotraj", file.read_text()), file
