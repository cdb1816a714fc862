"""Is a response right? One function per kind of answer, which problem["grader"] names; without one it is
"code" where the problem has `tests`, else "final":
    final    the line behind the last '####', or the last \\boxed{}, or the last number: same text or number
    number   the last number of the response is the last number of the answer (GSM8K's flexible-extract)
    math     math-verify compares the whole response with the answer (LaTeX or plain text)
    code     the program in the response passes the tests (runner.py); needs --allow_code_execution
    parses   there are no tests: the response holds Python that parses (TABOM)"""
import ast
import logging
import os
import re
import threading
from concurrent import futures
from decimal import Decimal
from textwrap import dedent, indent

from cli import UserError, package, progress_bar
from runner import run_program

MATH = ("math_verify", "grader math needs math-verify: pip install math-verify")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NUMBER = re.compile(r"(?<!\^{)(?<!\^-)(?<!\^{-)(?:(?<![\w.)^])-?(?:[$€£]\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|"
                    r"\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\w))?|"
                    r"(?<![\w.)])-?[$€£]?\.\d+|(?<![\d^])\d+(?:\.\d+)?)")  # and none that is an exponent
SCALE = (r"(?!\s*(?i:hundred|thousand|[mb]illion|trillion|dozen|(?:[mb]n|mln|lakh|crore|and|over|plus|minus|"
         r"half|halves|thirds?|quarters?|squared|cubed|pi|divided)\b))")  # "3 million" is not 3
UNIT = (r"\s?\\?%|\s?[€£]|(?:[\s~]|\\[,;: ])*+(?:°|\^{?\\circ}?)\s?(?:[CF]|\\(?:text|mbox|"
        r"(?:text|math)rm){[CF]})?|(?:[\s~]|\\[,;: ])*+"
        rf"\\(?:text|mbox|(?:text|math)rm){{{SCALE}[^{{}}0-9]*}}(?:\^{{?\d}}?)?|\s(?:m|in|mi)\^{{?\d}}?|"
        r"\s?(?:[cdkm]m|[km]?g|m?[lL]|ft|yd|lbs?|oz|hrs?|mins?|mph|kWh|units?)(?:\^{?\d}?)?(?![\w^])|"
        rf"(?:[\s~]|\\[,;: ]){SCALE}\(?(?:[^\W\d_]{{2}}|[A-Z]-|[ghlmsAJKLNVW]\b)"
        r"(?:[^0-9=+*^\\-]|(?<=[^\W\d_])-(?=[^\W\d_]))*+")  # "2 x" has no unit
AROUND = r"(?:[*_`$\s]|\\[\[\]()]|(?i:(?:the )?(?:final )?answer(?: is|:)+))*+"  # markup, "Answer:"
BARE = re.compile(rf"\A{AROUND}(?:\\(?:text|math)(?:bf|it|rm|tt)?{{(.+)}}|\(([A-Z])\)|(.*?)){AROUND}\Z", re.S)
THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!]|[\u00a0\u2007-\u200a\u202f])(?=[0-9]{3}(?![0-9]))")
FENCE = re.compile(r"`{3,}+[^`\n]+`{3,}|~{3,}+[^~\n]+~{3,}|(^[ \t]*)?([-*+][ \t]+|\d{1,9}[.)][ \t]+)?"
                   r"(`{3,}+|~{3,}+)(?![^`~\n]+\3)[ \t]*(\w*)(?(1)[^\n]*|[#+-]*[ \t]*)\n(.*?)"  # a span or a
                   r"(?:^(?:(?(1)\1)(?(2)[ \t]*)| {0,3})\3|(?<=\S)\3|\Z)", re.M | re.S)  # block, or cut off
CODE = re.compile(r"^(?:@|(?:async )?def |class |import \w|from \S+ import |\w+ *=[^=]).*"  # at the margin,
                  r"(?:\n(?:[ \t)\]}].*)?)*", re.M)  # and what belongs to it
PROGRAMS = futures.ThreadPoolExecutor(CORES)  # its threads start with the first program


def grader_of(problem):
    return problem.get("grader") or ("code" if problem.get("tests") else "final")


def check_gradable(problems, allow_code):
    """UserError, before anything is decoded, if one of them cannot be graded or needs allow_code."""
    for problem in problems:
        grader, name = grader_of(problem), f"{problem.get('source', 'own')}: problem {problem.get('id')}"
        if grader not in GRADERS:
            raise UserError(f"{name}: no grader {grader!r}, there are {', '.join(GRADERS)}")
        need = "tests" if grader == "code" else "answer"
        absent = problem.get(need) in (None, [])
        absent = absent or str(problem[need]).strip() in ("", "nan", "inf", "-inf")
        if absent and grader != "parses":
            raise UserError(f"{name}: grader {grader}, but no {need}: add it, or FILE:{need}=NAME")
        if grader == "number" and last_number(str(problem["answer"])) is None:
            raise UserError(f"{name}: grader number, but no number in answer {problem['answer']!r}: mend it")
        if grader == "code" and not tests_of(problem):
            raise UserError(f"{name}: no assert in its tests runs: mend them (check() needs entry_point)")
        if grader == "math":
            package(*MATH)
        if grader == "code" and not allow_code:
            raise UserError(f"{name} is graded by running the code in the response: give "
                            f"--allow_code_execution if you may (docs/code-runner.md says what is contained)")


def is_correct(problem, text, allow_code=False):
    """text: the response up to its first EOS -> bool. UserError, see above: no code runs unasked."""
    check_gradable([problem], allow_code)
    return GRADERS[grader_of(problem)](problem, text)


def submit(problem, text, allow_code=False, pool=PROGRAMS):
    """is_correct as a Future: a program runs beside the caller, the rest is graded before this returns."""
    if grader_of(problem) == "code":
        check_gradable([problem], allow_code)
        return pool.submit(GRADERS["code"], problem, text)
    done = futures.Future()
    done.set_result(is_correct(problem, text))
    return done


def grade_all(problems, texts, allow_code=False):
    """is_correct of each pair -> list of bool: programs in threads, a formula takes milliseconds."""
    check_gradable(problems, allow_code)  # before the first program starts
    pool = futures.ThreadPoolExecutor(CORES)
    try:
        jobs = [submit(*pair, allow_code, pool) for pair in zip(problems, texts, strict=True)]
        list(progress_bar(futures.as_completed(jobs), "grade", len(jobs), unit="problem"))
        return [job.result() for job in jobs]
    finally:
        pool.shutdown(cancel_futures=True)  # ctrl-c does not wait for what has not begun


def typed(text):
    """A minus and thousands as a keyboard has them, however they are set."""
    return THOUSANDS.sub(",", re.sub("[\u2212\u2013]", "-", text))


def last_number(text):
    """-> Decimal or None. '$1,234.50' is one number; a minus after a digit, a letter or a bracket is none."""
    found = NUMBER.findall(typed(text))
    return Decimal(re.sub(r"[$€£,\s]", "", found[-1])) if found else None


def boxed(text):
    """What the last \\boxed{...}, \\fbox{...} (braces balanced) or \\boxed 7 holds; None if it is cut off."""
    rest = ["", *re.split(r"\\(?:boxed|fbox)\s*", text)[1:]][-1]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if not depth:
            return rest[1:i].strip()


def final_answer(text):
    """What grader final compares, without a period behind it and markup around it; '' if there is nothing."""
    head, mark, tail = text.rpartition("####")
    found = boxed(tail) or re.sub(rf"\A{AROUND}", "", tail).partition("\n")[0] if mark else boxed(text)
    if found is None:
        number = last_number(text)
        found = "" if number is None else f"{number:f}"
    found = " ".join(found.splitlines()).strip().rstrip(".,;。 ").replace("\\$", "$")
    return BARE.sub(r"\1\2\3", found).rstrip(".,;")


def amount(text):
    """'$1,234.50' or '15\\text{ km}' -> number, letters of its unit; other text: NaN, equal to nothing."""
    found = re.fullmatch(rf"\+?({NUMBER.pattern})(?:[*_`$]|\\[)\]])*+({UNIT})?", typed(text))
    unit = re.sub(r"\\circ|\\[a-z]+|[^a-z0-9]|(?<=\w\w)s\b", "", (found and found[2] or "").lower())
    return (last_number(found[1]), unit) if found else (Decimal("NaN"), "")


def final_correct(problem, text):
    """Same text, or the same number ('1,234.50' and '$1234.5 in all'), and not of two units."""
    wanted = " ".join(str(problem["answer"]).splitlines())
    given, wanted = final_answer(text), final_answer("####" + wanted)
    (a, unit), (b, other) = amount(given), amount(wanted)
    return given != "" and (given == wanted or a == b and (not unit or not other or unit == other))


def math_correct(problem, text):
    """math-verify on the whole response, without percent signs: few versions of its parser read them."""
    library = package(*MATH)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports every expression it gives up on
    alarms = os.name == "posix" and threading.current_thread() is threading.main_thread()
    seconds = 5 if alarms else None  # its time limits are alarms, and those are for main threads
    wanted, text = (re.sub(r"\\?%", "", t).strip() for t in (str(problem["answer"]), text))
    if not re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", wanted):
        wanted = f"\\boxed{{{wanted}}}"
    gold, given = (library.parse(t, parsing_timeout=seconds) for t in (wanted, text))
    return library.verify(gold, given, timeout_seconds=seconds)


def statements(source):
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # it does not parse


def parses(text):
    """Is a reply's Python (its fenced blocks, all closed, else the whole text) valid and more than words?"""
    blocks = re.findall(r"```[ \t]*(\w*)[^\n]*\n(.*?)```", text, re.S)
    code = ([body for tag, body in blocks if tag.lower() in ("python", "py", "python3")]
            or [body for tag, body in blocks if not tag] or [text] * (not blocks))
    bodies = [statements(body) for body in code]
    if text.count("```") % 2 or None in bodies:
        return False
    words = (ast.Expr, ast.AnnAssign)  # 'Answer: 4' parses too
    return any(not isinstance(s, words) or isinstance(s.value, ast.Call) for s in sum(bodies, []))


def joined(source):
    return source if isinstance(source, str) else "\n".join(map(str, source or ()))


def programs(problem, text):
    """The programs a reply may mean, best first: the text, the last fenced block that defines what the tests
    ask for, definitions beside blocks, a body, a block; each first behind the prompt's head (HumanEval)."""
    text = re.sub(r"(?m)(?s:\A.*</think>\s*\n)|\A\s*\n|\r$|^(?:\[/?(?:BEGIN|DONE|PYTHON)\]|"
                  r">(?!>) ?(?=(?:.*\n>)*.*(?:```|~~~)))", "", text)
    blocks = [dedent(code) for *_, tag, code in FENCE.findall(text)
              if tag.lower() in ("", "py", "python", "python3") and code.strip()]
    entry, prompt = problem.get("entry_point"), problem.get("prompt", "")
    tests = joined(problem["tests"])
    called = set(re.findall(r"\b([A-Za-z_]\w*)\(", tests)) - set(re.findall(r"\bdef +(\w+)", tests))
    name = "|".join(map(re.escape, [entry] if entry else called)) or "(?!)"  # (?!) matches nothing
    defines = re.compile(rf"^(?:(?:async )?def|class) +(?:{name})\b|^(?:{name}) *=", re.M).search
    wanted = list(filter(defines, reversed(blocks)))  # not parsed: it is generated code
    heads = [dedent(code) for *_, code in FENCE.findall(prompt)] + [prompt]
    head = next(filter(defines, heads if entry else ()), None)
    blocks.sort(key=lambda code: ("return" not in code, -len(code)))  # `wanted` come again, in vain
    parts = map(CODE.findall, [*wanted, FENCE.sub("\n #", text)])
    loose = filter(defines, ("".join(some) for each in parts for some in (each, each[:-1])))  # it may be cut
    body = re.match(r".*(?:\n(?:[ \t].*)?)*", text)[0]
    first = [body] * bool(re.match(r"[ \t]|return |.*\n[ \t]", text))
    found = [text, *wanted, *loose, *first, *blocks, body]
    if head:  # the indentation of the first line, or of all, may be lost
        found = [form for code in found for form in (
            f"{head}\n{code}", f"{head}\n    {code}", f"{head}\n{indent(code, '    ')}", code)]
    return found


def tests_of(problem):
    """setup, then tests: assertions, check() of entry_point, test functions, classes; '' if none checks."""
    source = joined(problem.get("setup") or problem.get("test_setup")) + "\n" + joined(problem["tests"])
    body = statements(source) or []
    defined = {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
               or isinstance(n, ast.ClassDef) and n.name.startswith("Test")}
    calls = sum(map(calls_of, defined.values()), [])
    if "check" in defined and (problem.get("entry_point") or "").isidentifier():
        calls.append(f"check({problem['entry_point']})")
    source = "\n".join([source, *calls])
    top = ran = [n for n in statements(source) or [] if not hasattr(n, "name")]
    for _ in range(3):  # and what these name, what that names ...
        named = {getattr(n, "id", None) for part in ran for n in ast.walk(part)}
        ran = top + [node for name, node in defined.items() if name in named]
    used = {getattr(n, "attr", getattr(n, "id", "assert" * isinstance(n, (ast.Assert, ast.Raise))))
            for part in ran for n in ast.walk(part)}
    checks = any(re.match("assert|raises$", name) for name in used)
    return source if checks else ""


def calls_of(node):
    """Source that runs a test function, or each of a class: unittest's run themselves, others are set up."""
    if isinstance(node, ast.ClassDef):
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        tests = [name for name in methods if name.startswith("test")]
        if node.bases:
            return [f"{node.name}({name!r}).debug()" for name in tests]
        setup = methods.get("setup_method")
        before = f"one.setup_method({'None' if len(setup.args.args) > 1 else ''}); " if setup else ""
        return [f"one = {node.name}(); {before}one.{name}()" for name in tests]
    run = "__import__('asyncio').run" * isinstance(node, ast.AsyncFunctionDef)
    return [f"{run}({node.name}())"] if node.name.startswith("test") else []


GRADERS = dict(
    final=final_correct,
    number=lambda problem, text: last_number(text) == last_number(str(problem["answer"])),
    math=math_correct,
    code=lambda problem, text: run_program(programs(problem, text), tests_of(problem)).passed,
    parses=lambda problem, text: parses(text))
