"""Files, answers and replies as people have them: of each kind several, right and wrong ones."""
import gzip
import json
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import official_checkpoint
from conftest import ROOT, command, random_model

import cli
import data
import eval as nt_eval
import grade
import lora
import model as nt_model
import teacher as nt_teacher
import trims
from cli import UserError
from sample import holes, read_prompts, reference


def problems(folder, *rows, name="mine.jsonl", before=b""):
    text = json.dumps(list(rows)) if ".json" == name[-5:] else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_bytes(before + text.encode())
    return data.load_problems(str(folder / name))


def right(answer, text, grader="final"):
    return grade.is_correct(dict(id=1, prompt="q", answer=answer, grader=grader), text)


# ------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("answer, text, want", [
    # a sentence behind the line of the answer
    ("24", "2*12 = 24\n#### 24\nSo the class needs 24 boxes.", True), ("24", "#### 24\n\nThat is 2 * 12.", True),
    ("24", "####\n24\nDone: 3 steps.", True), ("24", "#### 12\nand not 24", False),
    # units, with a space or as TeX has them
    ("24", "#### 24 boxes", True), ("15", r"\boxed{15\text{ km}}", True), ("15", r"\boxed{15\ \mathrm{km}}", True),
    ("5", "#### 5 km/h", True), ("15 km", "#### 15", True), ("15 km", "#### 15 miles", False), ("15 km", r"\boxed{15\text{km}}", True),
    ("24", "#### 25 boxes", False), ("50", r"#### 50\%", True),
    *(("3", f"#### 3 {more}", False) for more in ("million", "x", "π", "i + 1", "/ x", "!", "< x", "dozen eggs", "Thousand")),
    ("3", r"\boxed{3\text{ billion}}", False), ("3", r"\boxed{3 i}", False),
    *(("3", f"#### 3 {more}", True) for more in ("g", "kg of rice", "s", "%", "€", "(apples)", "metres, in all")),
    *(("3", f"#### 3{unit}", True) for unit in ("ml", "mL", "L", "l", "g", "kg", "cm", "g.")), ("3 ml", "#### 3 g", False), ("3", "#### 3gx", False),
    ("24", "#### 24 cm^2", True), ("24", r"\boxed{24\text{ cm}^2}", True), ("24", r"\boxed{24~\mathrm{m}^{2}}", True), ("24", "#### 24 m²", True),
    ("24", r"\boxed{24^\circ}", True), ("24", "#### 24°", True), ("24", "#### €24", True), ("24", "#### 24€", True), ("24 cm^2", "#### 24 cm", False),
    # and not every text that holds the number
    ("3", "#### 3 x^2", False), ("2", "#### 2**3", False), ("24", "#### 24 or 25", False), ("2", r"\boxed{\sqrt{2}\text{ km}}", False),
    ("7", "#### 7 of 9", False), ("2", r"\boxed{2x}", False), ("2", r"\boxed{\sqrt{2}}", False), ("2", r"\boxed{x^2}", False),
    ("3", r"\boxed{3 + x}", False), ("3", r"\boxed{3\pi}", False), ("1", r"\boxed{\frac{1}{2}}", False), ("3", "#### x = 3", False),
    *(("5", rf"\boxed{{5{unit}}}", True) for unit in (r"\mbox{ cm}", r"\textrm{ cm}", r"\ cm", "~cm", r"\,\mathrm{cm}^2", r"\;apples")), ("5 cm", r"\boxed{5~cm}", True),
    ("5 cm", r"\boxed{5\mbox{ km}}", False), ("5 °F", r"\boxed{5^\circ C}", False), ("5 °C", r"\boxed{5^\circ C}", True),
    ("25", r"\boxed{25^\circ\text{C}}", True), ("25", r"\boxed{25\,^\circ\mathrm{C}}", True), ("25 °C", r"\boxed{25^{\circ}\text{C}}", True),
    ("25 °F", r"\boxed{25^\circ\text{C}}", False), ("26", r"\boxed{25^\circ\text{C}}", False), ("25°", r"\boxed{25^\circ}", True), ("5", r"\boxed{5\mbox{ million}}", False), ("5", r"\boxed{5~pi}", False), ("5", "#### 5 pi", False),
    ("5", "#### 5 divided by two", False), ("5", "#### 5 times", True), ("5", "#### 5 pies", True),
    # a word that says that it is the answer
    ("5", "#### Final Answer:\n5", True), ("5", "#### Answer:\n\n**5**\nas 6 - 1", True), ("5", "####\n\n$5$\n", True), ("5", "#### Answer:\n6\n5", False),
    ("3", "#### Answer: 3", True), ("3", "#### The answer is 3.", True), ("3", "#### **Final answer:** 3 apples", True), ("B", "#### Answer is: (B)", True),
    ("3", "#### Answers: 3", False), ("3", "#### Answer: 4", False), ("3", "#### Question: 3", False), ("answer", "#### answer", True),
    # signs and thousands as typesetters have them
    ("-7", "#### −7", True), ("-7", "\\boxed{−7}", True), ("7", "#### −7", False), ("-7.5", "#### −7.50", True),
    ("12000", r"\boxed{12{,}000}", True), ("12000", r"\boxed{12,\!000}", True), ("1234567", r"\boxed{1{,}234{,}567}", True),
    ("12000", "#### 12\u202f000", True), ("12000", r"\boxed{12\,000}", True), ("12000", "#### 12 000", False),
    ("-7", "#### –7", True), ("1234.5", "#### 1\u200a234.5", True), ("7", "#### +7", True),
    # markup, and what ends a sentence
    ("24", "#### **24** boxes", True), ("24", "#### `24`", True), ("24", r"#### \(24\)", True), ("24", r"\boxed{\textbf{24}}", True),
    ("24", r"\boxed{\text{24 km}}", True), ("24", "#### 24,", True), ("the U.S.", "#### the U.S.", True), ("U.S.", "#### U.K.", False),
    ("24", "#### **24**", True), ("24", "#### $24$", True), ("24", r"#### \$24", True), ("24", r"#### \boxed{24}", True),
    # a unit behind markup, of one letter, with hyphens, in plural
    ("24", "#### $24$ km", True), ("24", r"#### \(24\) boxes", True), ("24", "#### **24** km", True), ("3 s", "#### 3 m", False), ("3 m/s", "#### 3 m", False), ("3 m", "#### 3 ms", False), ("5", "#### 5 m", True), ("5", "#### 5 m/s", True),
    ("9.8", "#### 9.8 m/s²", True), ("5", "#### 5 N", True), ("5", "#### 5 J in all", True), ("24", "#### 24 (twenty-four)", True), ("5", "#### 5 T-shirts", True),
    ("3 hours", "#### 3 hour", True), ("3 hours", "#### 3 days", False), ("5", "#### 5 k - 2", False), ("5", "#### 5 x-y", False),
    *(("3", f"#### 3 {more}", False) for more in ("bn", "mln", "lakh", "crore", "and a half", "squared", "over four", "quarters", "plus y", "mn people")),
    *(("3", f"#### 3 {more}", True) for more in ("overalls", "andirons", "times a day", "bnb rooms", "minutes")),
    # around a text as well, and round brackets around the letter of a choice
    ("blue", "#### *blue*", True), ("B", "#### **B**", True), ("B", r"\boxed{\text{B}}", True), ("B", "#### (B)", True), ("(B)", "#### B", True),
    ("B", "#### **(B)**", True), ("B", r"\boxed{\textbf{B.}}", True), ("B", "#### (A)", False), ("B", "#### (B) 24", False), ("x_1", "#### $x_1$", True),
    ("Paris", r"\boxed{\mathrm{Paris}}", True), ("f(B)", "#### B", False), ("a b", "#### `a b`.", True), ("B", "#### ****", False),
    # an exponent as computers write it
    ("200000", "#### 2e5", True), ("2e5", "#### 200,000", True), ("0.00012", r"\boxed{1.2E-4}", True), ("6e+3", "#### 6000 kg", True),
    ("5", "#### 2e5", False), ("2", "#### 2e5", False), ("2", "#### 2e", False), ("2", "#### 2ex", False), ("-300", "#### -3e2", True), ("1e9", "#### 1e999999999", False)])
def test_what_may_stand_around_a_final_answer(answer, text, want):
    assert right(answer, text) is want


@pytest.mark.parametrize("answer, text, want", [
    ("12000", "It is 12\\,000 dollars.", True), ("12000", "It is 12\u00a0000 dollars.", True), ("12000", "12\u202f000", True),
    ("12000", "12\u2009000 in all", True), ("12000", "It is 12 000 dollars.", False), ("0", "12\\,000", False),
    ("50", "The area is 50 cm^2.", True), ("50", "50 m^{2}", True), ("3", "50 cm^3", False), ("50", "50 s^{-1}", True), ("50", "50 s^-2", True), ("12000", "12\u2007000", True), ("1024", "2^10 = 1024", True),
    ("200000", "It is 2e5.", True), ("2e5", "200,000 in all", True), ("5", "2e5", False), ("0.0012", "about 1.2e-3 m", True), ("3", "0x2e3", True)])
def test_number_reads_thousands_and_no_exponents(answer, text, want):
    assert right(answer, text, "number") is want


def test_numbers_of_json_are_answers(tmp_path):
    rows = [dict(prompt="q", answer=value, grader=grader) for value in (0, 0.0, 12, 1e-05, 1e16, 2.5)
            for grader in ("final", "number", "math")]
    said = {0: "0", 12: "12", 1e-05: "0.00001", 1e16: "10000000000000000", 2.5: "2.5"}
    for row, p in zip(rows, problems(tmp_path, *rows)):
        grade.check_gradable([p], False)
        assert grade.is_correct(p, rf"\boxed{{{said[row['answer']]}}}") and not grade.is_correct(p, r"\boxed{7}"), p
    for value in (["12"], {"a": 1}, True, [], [0]):
        with pytest.raises(UserError, match="mine.jsonl row 2: answer must be text or a number, not"):
            problems(tmp_path, dict(prompt="q", answer=1), dict(prompt="r", answer=value))
    for value in (float("nan"), float("inf"), -float("inf"), "", " \n", "1e999"):  # JSON has none of the first three
        for p in problems(tmp_path, *[dict(prompt="q", answer=value, grader=grader) for grader in ("final", "number", "math")]):
            if value == "1e999":
                assert not grade.is_correct(p, "#### 1") or p["grader"] == "number"  # its last number is 999
                continue
            with pytest.raises(UserError, match=f"grader {p['grader']}, but no answer"):
                grade.check_gradable([p], False)


def test_an_answer_of_several_lines_is_one():
    for said in (r"\boxed{a\nb}", "\\boxed{a\nb}", "#### \\boxed{a\n  b}"):
        assert right("a\nb", said) is ("\n" in said and "  b" not in said)
    assert not right("a\nb", "#### a") and not right("a", "\\boxed{a\nb}") and right("#### 3\n", "#### 3")


@pytest.mark.parametrize("name, row, grader", [
    ("t3d-math", dict(question="q"), "ground_truth_answer"), ("prm12k", dict(question="q", answer="s"), "target")])
def test_numbers_of_the_known_sets_are_answers(tmp_path, name, row, grader):
    said = {0: "0", 12: "12", 1e16: "10000000000000000", 0.00001: "0.00001"}
    for value, text in said.items():
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, grader: value}) + "\n")
        (p,) = data.load_problems(f"{name}={tmp_path}/rows.jsonl")
        assert grade.is_correct(p, rf"\boxed{{{text}}}") and not grade.is_correct(p, r"\boxed{7}"), p


CODE = dict(id=1, prompt='def double(n):\n    """Twice n."""\n', entry_point="double", grader="code",
            tests="def check(f):\n    assert f(2) == 4\n")


@pytest.mark.parametrize("text, want", [
    ('```python\ndef double(n):\n    """Like\n    ```\n    double(2)\n    ```\n    """\n    return n * 2\n```', True),
    ("~~~python\ndef double(n):\n    return n * 2\n~~~\nDone.", True), ("````\ndef double(n):\n    return n * 2\n````", True),
    ("1. so\n   ```python\n   def double(n):\n       return n * 2\n   ```\n2. done", True),
    ("So: ```python\ndef double(n):\n    return n * 2```", True), ("```py\ndef double(n):\n    return n * 2", True),
    ("[BEGIN]\ndef double(n):\n    return n * 2\n[DONE]", True), ("[PYTHON]\ndef double(n):\n    return n * 2\n[/PYTHON]", True),
    ("- ```python\n  def double(n):\n      return n * 2\n  ```\n- done", True),
    ("1. ~~~\n   def double(n):\n       return n * 2\n   ~~~\n   It doubles `n`.", True),
    ("Steps:\n  10) ```py\n      def double(n):\n          return n * 2\n      ```\n  11) done", True),
    ("* ```python\n\tdef double(n):\n\t    return n * 2\n\t```\nDone", True),
    ("- ```python\n  def double(n):\n      return n * 3\n  ```", False),
    *((f"{before}```python\ndef double(n):\n    return n * {by}\n```\n", by == 2) for by in (2, 3) for before in (
        "Use ```double``` as follows:\n", "The function ```double(n)``` doubles.\n\n", "> use ```x```\n\n", "### ```double```\n",
        "The ~~~naive~~~ way fails:\n", "~~~x~~~ and ```y```:\n", "```python\ndef double(n):\n    return n\n```\nThe ```n``` is wrong:\n")),
    ("Use ```double```.\n\ndef double(n):\n    return n * 2\n", True), ("1. Define ```double```:\n   ```python\n   def double(n):\n       return n * 2\n   ```\n", True),
    ("def double(n):\n    # ```text``` and ~~~rule~~~\n    return n * 2\n", True), ("```python\ndef double(n):\n    '~~~' + str(n) + '~~~'\n    return n * 2\n```\n", True),
    ("```python\ndef double(n):\n    return n * 2\n```\nNot ```n * 3```:\n```python\ndef double(n):\n    return n * 3\n```\n", False),
    ("```python\ndef double(n):\n    return n * 2``` Call ```double(2)```.", True), ("```python\ndef double(n):\n    return n * 2\n``` Example: ```python\nprint(double(2))\n```", True),
    ("**Solution:** ```python\ndef double(n):\n    return n * 2\n```\n", True), ("The code - ```python\ndef double(n):\n    return n * 2\n```\nDone.", True),
    ("1. ```python\ndef double(n):\n    return n * 2\n```\nDone.", True), ("3) ~~~python\ndef double(n):\n    return n * 2\n~~~", True),
    ('```python\nHELP = """\n> usage: x\n"""\ndef double(n):\n    return n * 2 if ">" in HELP else 0\n```', True),
    ("```python\nOK = (3\n> 2)\ndef double(n):\n    return n * 2 * OK\n```", True),
    ("> ```python\n> def double(n):\n>     return n * 2\n> ```\n> That is it.", True),
    (">```\n>def double(n):\n>    return n * 2\n>```", True), ("So\n> ~~~py\n> def double(n):\n>\n>     return n * 2\n> ~~~", True),
    ('```python\ndef double(n):\n    """\n>>> double(2)\n4\n    """\n    return n * 2\n```', True),
    ("> ```python\n> def double(n):\n>     return n * 3\n> ```", False),
    ("```python\ndef double(n):\n    return n * 3\n```", False), ("~~~\ndef double(n):\n    return n\n~~~", False)])
def test_fences_as_markdown_allows_them(text, want):
    assert grade.is_correct(CODE, text, allow_code=True) is want


DOUBLE = "def double(n):\n    return n * 2\n"
CALLED = dict(id=1, prompt="Write double.", grader="code", tests=["assert double(2) == 4"])


@pytest.mark.parametrize("problem, text, want", [
    # a body, and behind it what is no code, or code that is cut off
    (CODE, "    return n * 2\n\nThis multiplies n by two.", True), (CODE, "    return n * 2\n\n\ndef other(x):\n    return x +\n", True),
    (CODE, "return n * 2\n\nThis multiplies.", True), (CODE, "x = n\n    return x * 2\n\nThis multiplies.", True),
    (CODE, "    return n * 2\n\ndef other(x):\n    return x\n\nThat is all.", True),
    (CODE, "    return n * 3\n\nThis multiplies n by two.", False),
    # prose around definitions
    (CODE, f"Here is the solution:\n\n{DOUBLE}", True), (CODE, f"{DOUBLE}\nThis multiplies n by two.", True),
    (CALLED, f"Sure!\n\n{DOUBLE}\nNote: it doubles.", True), (CALLED, f"Sure:\n{DOUBLE}\nIt doubles.\n\ndef more(x):\n    return x(", True),
    (CALLED, f"Sure! The idea:\nimport math\nTWO = (\n    2\n)\n\n{DOUBLE.replace('2', 'TWO')}\nDone now.", True),
    (CALLED, "Use this:\ntable = {\n    2: 4,\n}\n\n@print\ndef no():\n    pass\n\nSo:\ndef double(n):\n    return table[n]\n", True),
    (CALLED, f"Here:\n{DOUBLE.replace('2', '3')}\nDone now.", False),
    # beside a program or a body that stands alone, fences that hold something else, or nothing
    *((CALLED, text.format(DOUBLE.replace("2", str(by))), by == 2) for by in (2, 3) for text in (
        "{}```\n", "{}```", "{}```\nDone\n", "{}\nOutput:\n```\n4\n```\n", "{}\nExample:\n```python\nprint(double(2))\n```\n",
        "Example:\n```\ndouble(2) == 4\n```\n\n{}", "```bash\npip install x\n```\n\n{}", "Use ```double(2)```:\n\n{}\n```\n4\n```\n")),
    *((problem, f'{before}def double(n):\n    """Twice.\n\n    ```{tag}\n    print(double(2))\n    ```\n    """\n    return n * {by}\n', by == 2)
      for problem in (CODE, CALLED) for before in ("", "So:\n\n") for tag in ("", "python") for by in (2, 3)),
    *((CODE, f"{lost}return n * {by}\n{behind}", by == 2) for by in (2, 3) for lost in ("", "    ")
      for behind in ("```\n", "```\nDone\n", "\n```\n4\n```\n", "\n```python\nprint(double(2))\n```\n")),
    # a body that lost its indentation, or all of it, in a fence or not; what stands behind it; a draft before it
    *((CODE, text.format(body=body, whole=body.replace("\n    ", "\n")), "3" not in body)
      for body in ("x = n\n    return x * 2", "t = 0\n    for _ in range(2):\n        t += n\n    return t", "if n:\n        return n * 2\n    return 0", "x = n\n    return x * 3")
      for text in ("```python\n    {body}\n```", "So:\n```\n{whole}\n```\nDone", "```python\n    {body}", "\n    {body}\n\nOutput:\n```\n4\n```\n",
                   "{body}\n\n```\n4\n```\n", "{whole}", "```python\n    {body}\n```\nFor ```4```.", "<think>\n```python\n    return 7\n```\n</think>\n```python\n    {body}\n```")),
    *((CALLED, text.format(DOUBLE.replace("2", str(by))), by == 2) for by in (2, 3) for text in (
        "- C#: ```c#\nint D(int n) => 2 * n;\n```\n- Python: ```python\n{}```\n", "Code: ```c++\nint x;\n```\nor ```python\n{}```\n", "```python\n{} ```\nDone.\n", "  ```python\n{}```\n",
        "<think>\n```python\ndef double(n):\n    return 7\n```\n</think>\n{}", "Hm.\n```python\ndef double(n):\n    return 7\n```\nNo.\n</think>\n\n{}", "{}\nTHINK = '<think>x</think>'\n", "<think>So: ```python\nx</think>\n```python\n{}```\n", "```python\n{}\nprint(double(2", "```python\n{}```\nand\n```python\nassert double(2",
        "{}\n### Complexity\n\n- O(1)\n- Space: O(n)\n", "{}\nComplexity: O(1)\n", "{}\n* O(1) time\n", "{}\n- n\n- `n * 2`\n", "{}\n```\n4\n``` is the output.\n", "{}\n```\n4\n```\n    as it should be\n")),
    *((CALLED, f"Code: ```python\n{DOUBLE.replace('2', str(by))}```\nDone.\n".replace("\n", "\r\n"), by == 2) for by in (2, 3)),
    # a mark of fences within a line, which opens nothing
    *((CALLED, f"{before}\n```python\n{DOUBLE.replace('2', str(by))}```\n", by == 2) for by in (2, 3) for before in (
        "Wrap it in triple backticks (```):\n", "It must start with ```python.\n", "<think>start with ```python, end with ```.</think>\n", "The `~~~` is old:\n"))])
def test_prose_around_code_without_a_fence(problem, text, want):
    assert grade.is_correct(problem, text, allow_code=True) is want


@pytest.mark.parametrize("reply", ["`" * 20_000, "~" * 20_000, "```" * 2_000 + "x", "1" * 20_000, "``` " * 5_000, "```a" * 5_000])
def test_a_degenerate_reply_is_graded_at_once(reply):
    """Where a pattern is tried at each of n marks over all that follow, such a reply takes minutes to hours."""
    assert not grade.is_correct(CODE, reply, allow_code=True)


# ---------------------------------------------------------------------------------------------------------- rows
def test_rows_without_a_response_are_never_trained_on(tmp_path, capsys):
    tok, cfg = data.load_tokenizer("tiny"), trims.Config(data=str(tmp_path / "mine.jsonl"), gen_len=64)
    for bare in (dict(prompt="q", answer="1"), dict(prompt="q", solution=""), dict(prompt="q", solution=" \n"), dict(prompt="q", solution=None)):
        problems(tmp_path, bare)
        with pytest.raises(UserError, match=r"mine.jsonl has no solution of at most 64 tokens, and 1 rows without any \['mine-0'\]"):
            trims.load_examples(cfg, tok)
        problems(tmp_path, dict(prompt="a", solution="b", masked=[1], bucket=[2]), bare, dict(prompt="c", solution="d " * 70))
        cli.say.cache_clear()
        (example,) = trims.load_examples(cfg, tok)
        assert example["id"] == "mine-0" and not {"masked", "bucket"} & example.keys()  # columns that mean something here
        assert "2 of 3 rows are left out: 1 without a solution ['mine-1'], 1 with one of more" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "illada"])
def test_half_a_character_is_read_as_the_replacement_character(tmp_path, family):
    tok, tiny = data.load_tokenizer(official_checkpoint(tmp_path, family)), data.load_tokenizer("tiny")
    for text, want in (("a\ud83db", "a\ufffdb"), ("\udc00", "\ufffd"), ("x\ud83d\ud83d", "x\ufffd\ufffd"), ("\ud83d\ude00", "\U0001f600")):
        assert tok.bytes_of(271) == tok.bytes_of(10**6) == b""  # rows without a token
        for each in (tok, tiny):
            assert want in each.decode(each.prompt_ids(text).tolist()) and want in each.decode(each.response_ids(text))
    assert "\ufffd" in tok.decode(tok.prompt_ids("q", system="\ud83d").tolist())


def test_half_a_character_can_be_decoded_and_printed(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ball under \\ud83d"}\n')
    done = command(tmp_path, "sample.py", "--prompts", "p.jsonl", "--gen_len", 4, "--block_len", 4)
    assert done.returncode == 0 and "1 responses written" in done.stdout
    assert command(tmp_path, "sample.py", "--prompt", "ball \udcff", "--gen_len", 4, "--block_len", 4).returncode == 0


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, name):
    row = dict(prompt="q", answer="1")
    assert problems(tmp_path, row, name=name, before=b"\xef\xbb\xbf") == problems(tmp_path, row, name=name)
    with gzip.open(tmp_path / f"{name}.gz", "wb") as f:
        f.write((tmp_path / name).read_bytes())
    assert data.load_problems(str(tmp_path / f"{name}.gz")) == problems(tmp_path, row, name=name)
    for sep in "\u2028\u2029\x85\x0b\x0c\x1c":  # no line ends there but that of a file
        (tmp_path / "p.txt").write_bytes(f"\ufeffone{sep}more\r\ntwo\n".encode())
        assert [r["prompt"] for r in read_prompts(tmp_path / "p.txt")] == [f"one{sep}more", "two"]
        line = json.dumps(dict(prompt=f"a{sep}b"), ensure_ascii=False)
        (tmp_path / name).write_text(f"[{line}]" if name.endswith(".json") else line)
        assert data.load_problems(str(tmp_path / name))[0]["prompt"] == f"a{sep}b"
    folder = tmp_path / "tiny"
    nt_model.save(random_model(), folder)
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    assert nt_model.load(folder).cfg == random_model().cfg
    folder = official_checkpoint(tmp_path / "own", "sdar")
    for file in ("generation_config.json", "model.safetensors.index.json", "chat_template.jinja"):
        made = {"gen": '{"eos_token_id": 258}', "cha": json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]}.get(file[:3])
        (folder / file).write_text("\ufeff" + (made or (folder / file).read_text()))
    tok = data.load_tokenizer(folder)
    assert 258 in nt_model.load(folder).cfg.eos_ids and tok.decode(tok.prompt_ids("q").tolist()).startswith("<|im_start|>user")


def test_a_plus_may_be_in_a_path(tmp_path):
    (tmp_path / "c++").mkdir()
    mine = tmp_path / "c++/y.jsonl"
    mine.write_text('{"prompt": "a", "answer": "1", "ask": "b", "target": "2"}\n')
    assert data.load_problems(str(mine))[0]["prompt"] == "a"
    assert data.load_problems(f"{mine}:prompt=ask,answer=target")[0]["answer"] == "2"
    (tmp_path / "c++/g1.jsonl").write_text('{"question": "a", "answer": "x #### 1"}\n')
    (tmp_path / "c++/g2.jsonl").write_text('{"question": "b", "answer": "x #### 1"}\n')
    assert len(data.load_problems(f"gsm8k={tmp_path}/c++/g*.jsonl")) == 2
    (tmp_path / "z.jsonl").write_text('{"prompt": "z", "answer": "1"}\n')
    assert len(data.load_problems(f"tiny+{tmp_path}/z.jsonl", n=3)) == 4
    mine.rename(tmp_path / "c++/a+b+.jsonl")
    for name in ("a+b+.jsonl", "a+b+.jsonl:answer=target", "a+b+.jsonl:prompt=ask"):
        (p,) = data.load_problems(f"{tmp_path}/c++/{name}")
        assert p["id"] == "a+b+-0" and p["answer"] == "12"["target" in name] and p["prompt"] == "ab"["ask" in name]


@pytest.mark.parametrize("key", ["setup", "tests", "test_setup", "entry_point", "prompt", "solution", "grader", "question", "thinking"])
def test_fields_of_another_type_are_named_with_their_line(tmp_path, key):
    for value in (3, True, [1], {"a": 1}, 2.5, *[["x", 3]] * (key in ("setup", "test_setup"))):
        with pytest.raises(UserError, match=rf"mine.jsonl row 2.*{key}"):
            problems(tmp_path, dict(prompt="q"), {"prompt": "r", key: value})


@pytest.mark.parametrize("rows", [
    [dict(id="a", prompt="x"), dict(id="a", prompt="y")], [dict(id=1, prompt="x"), dict(prompt="y"), dict(id="1", prompt="z")],
    [dict(prompt="x"), dict(id="mine-0", prompt="y")], [dict(id="b", prompt="x")] * 2])
def test_ids_that_come_twice_are_refused_before_anything_is_decoded(tmp_path, rows):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(tmp_path, "sample.py", "--prompts", "mine.jsonl")
    assert done.returncode == 2 and "mine.jsonl has the id " in done.stderr and " more than once" in done.stderr
    with pytest.raises(UserError, match="more than once"):
        data.load_problems(str(tmp_path / "mine.jsonl"))
    assert not (tmp_path / "mine.responses.jsonl").exists()


def test_files_are_utf8_whatever_the_locale(tmp_path):
    """A process of another locale reads what people write with raw characters, and writes what it reads again."""
    (tmp_path / "vocab.json").write_bytes('{"né": 1, "中": 2, "🙂": 3}'.encode())
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "né 中 🙂"}\n'.encode())
    (tmp_path / "p.txt").write_bytes("né 中 🙂\n".encode())
    code = ("import cli, sys; from pathlib import Path\nassert list(cli.read_json('vocab.json')) == ['n\\xe9', '\\u4e2d', '\\U0001f642']\n"
            "(row,) = cli.read_rows('p.jsonl'); assert row['prompt'] == cli.read_text('p.txt').strip() == 'n\\xe9 \\u4e2d \\U0001f642'\n"
            "cli.append_line('q.jsonl', row); assert cli.read_jsonl('q.jsonl', ours=True) == [row]\n"
            "cli.write_whole('w.txt', row['prompt']); assert open('w.txt', 'rb').read().decode('utf-8') == row['prompt']\n"
            "open('r.jsonl', 'wb').write(f'{{{chr(10)}{chr(233)}'.encode('utf-8')); cli.read_jsonl('r.jsonl', ours=True, mend=True); print(sys.getfilesystemencoding())")
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() != "utf-8", done.stderr


def test_an_empty_prompt_is_no_problem_of_the_tiny_task(tmp_path):
    for words in (["--prompt", ""], ["--prompt="], ["--prompts", ""], ["--system", "", "--prompt", "a"]):
        done = command(tmp_path, "sample.py", *words)
        assert done.returncode == 2 and not done.stdout and " is empty (an unset variable?)" in done.stderr


def test_a_folder_may_be_called_like_a_preset(tmp_path, monkeypatch):
    for name in ("tiny", "dream", "sdar-4b"):
        official_checkpoint(tmp_path / name, "sdar")
        monkeypatch.chdir(tmp_path)
        tok = data.load_tokenizer(f"./{name}")
        assert tok.eos_id == nt_model.load(f"./{name}").cfg.eos_ids[0] == 256 and tok.encode("a") == [97]


def test_adapters_and_models_can_be_read_by_others(tmp_path):
    for mask in (0o022, 0o002, 0o077):
        before = os.umask(mask)
        try:
            nt_model.save(random_model(), tmp_path / f"{mask}/model")
            lora.save(lora.add(random_model(), 2, 2), tmp_path / f"{mask}/adapter")
        finally:
            os.umask(before)
        for file in (tmp_path / str(mask)).rglob("*.*"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file


def test_what_was_just_saved_is_what_is_read(tmp_path):
    """Over a sharded folder: its index and shards do not win."""
    for family in ("dream", "llada", "a2d"):
        folder = official_checkpoint(tmp_path / family, family)
        model = nt_model.load(folder)
        with torch.no_grad():
            model.norm.weight.add_(1)
        nt_model.save(model, folder)
        assert torch.equal(nt_model.load(folder).norm.weight, model.norm.weight)


# ------------------------------------------------------------------------------------------ one row that is too long
LONG = [dict(id=i, prompt="1" * n, solution="2", answer="2") for i, n in (("a", 5), ("the-long-one", 600), ("b", 6), ("c", 7))]
COMMANDS = {  # each with the place of its ids
    "rollout.py": ("collect", "mine.jsonl", "--out", "run"), "trims.py": ("--data", "mine.jsonl", "--trajectory_share", 0),
    "sample.py": ("--prompts", "mine.jsonl", "--to", "out.jsonl"), "eval.py": ("curve", "--task", "mine.jsonl", "--thresholds", 0.9)}


@pytest.mark.parametrize("script", list(COMMANDS))
def test_one_prompt_that_is_too_long_is_named_and_can_be_left_out(tmp_path, monkeypatch, script):
    """By its id, before anything is decoded; --max_prompt goes on with the others, which are all there."""
    monkeypatch.setattr("grade.is_correct", lambda *_: True)
    official_checkpoint(tmp_path / "model", "sdar")  # of 512 tokens
    problems(tmp_path, *LONG)
    how = [*COMMANDS[script], "--model", "model", "--gen_len", 8, *["--block_len", 4] * (script != "trims.py")]
    if "--data" in how:
        how += ["--out", "run", "--max_steps", 1, "--batch_size", 3, "--micro_batch", 3, "--lora_r", 2]
    done = command(tmp_path, script, *how)
    assert done.returncode == 2 and "error: prompt 'the-long-one' has " in done.stderr and "leave such out by --max_prompt 504" in done.stderr
    assert not list(tmp_path.glob("**/rank0.jsonl")) and not (tmp_path / "out.jsonl").exists()
    done = command(tmp_path, script, *how, "--max_prompt", 504, *["--overwrite"] * ("--data" in how))
    assert done.returncode == 0 and "1 prompts are longer than --max_prompt 504: left out" in done.stderr
    texts = [f.read_text() for f in tmp_path.glob("**/*.jsonl") if f.name in ("rank0.jsonl", "out.jsonl", "results.jsonl")]
    if script != "trims.py":
        assert [text for text in texts if all(f'"{i}"' in text for i in "abc") and "the-long-one" not in text]


def test_what_is_too_long_is_what_is_shown(tmp_path):
    """With the solution in it where it is shown, and as the protocol words it."""
    tok, problem = data.load_tokenizer("tiny"), dict(id="a", source="x", prompt="1 " * 9, solution="2 " * 50)
    plain, privileged = (len(tok.prompt_ids(text)) for text in (problem["prompt"], data.privileged_prompt(problem)))
    assert data.fitting([problem], tok, None, plain) == data.fitting([problem], tok, plain, plain) == [problem]
    assert data.fitting([problem], tok, None, privileged, data.privileged_prompt) == [problem]
    for room in (privileged - 1, plain):
        with pytest.raises(UserError, match=f"prompt 'a' has {privileged} tokens, of which model and gen_len allow {room}"):
            data.fitting([problem], tok, None, room, data.privileged_prompt)
    short = [dict(id=i, source="x", prompt="1") for i in "bcd"]
    for rows in ([problem, *short], [*short, problem], [short[0], problem, problem | dict(id="z"), *short[1:]]):
        with pytest.raises(UserError, match="prompt 'a' has .* leave such out by --max_prompt 6"):
            data.fitting(rows, tok, None, 6)
        assert [p["id"] for p in data.fitting(rows, tok, 6, 6)] == ["b", "c", "d"]
    for room in (0, -5):  # gen_len fills the model: no --max_prompt helps
        with pytest.raises(UserError, match=f"allow {room}: lower gen_len$"):
            data.fitting(short, tok, None, room)
    for none_left in ([problem], []):
        with pytest.raises(UserError, match="no prompt of .* is left: raise --max_prompt"):
            data.fitting(none_left, tok, plain - 1, 99)


# ------------------------------------------------------------------------------------------------------- chats
CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="2 + 2?"), dict(role="assistant", content="4"),
        dict(role="user", content="<|im_end|> and 3 + 3?"), dict(role="assistant", content="6 it is")]
CHATS = [CHAT, CHAT[:-1], CHAT[1:3], [dict(role="user", content="é 中")], CHAT[1:]]


def templated(folder, chat):
    """What transformers makes of a chat up to the answer, its special tokens in a text apart."""
    from transformers import Qwen2Tokenizer
    hf = Qwen2Tokenizer.from_pretrained(folder)
    turns = [{**turn, "content": turn["content"].replace("<|im_end|>", "~")} for turn in chat[:-1 if chat[-1]["role"] == "assistant" else None]]
    ids = hf.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    return sum(([*b"<|im_end|>"] if i == ord("~") else [i] for i in ids), [])


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_chats_are_asked_as_the_checkpoints_template_has_them(tmp_path, family):
    """In decoding, evaluation, collection and training: the same prompts as transformers writes, alone and in a batch."""
    folder, rows = official_checkpoint(tmp_path / "model", family), [dict(messages=chat, answer="6") for chat in CHATS]
    tok, asked = data.load_tokenizer(folder), problems(tmp_path, *rows)
    want = [templated(folder, chat) for chat in CHATS]
    assert [tok.prompt_ids(p).tolist() for p in asked] == want and len({*map(len, want)}) == 3
    if family == "dream":  # it has a system turn of its own; the rest is the same for all
        return
    assert [p["solution"] for p in asked] == ["6 it is", "", "4", "", "6 it is"]
    assert asked[3]["prompt"] == "é 中" and tok.prompt_ids(asked[3]).tolist() == tok.prompt_ids("é 中").tolist()
    how = ["--model", "model", "--gen_len", 8, "--block_len", 4, "--cache", "none"]
    assert command(tmp_path, "sample.py", "--prompts", "mine.jsonl", "--batch_size", 3, *how).returncode == 0
    said = {row["id"]: row["response"] for row in map(json.loads, (tmp_path / "mine.responses.jsonl").read_text().splitlines())}
    model, settings = nt_model.load(folder), dict(gen_len=8, block_len=4, cache="none")
    for p, ids in zip(asked, want):  # decoded in a batch of threes, and by the plain reference
        out = reference(model, torch.tensor(ids), **settings)
        assert said[p["id"]] == tok.decode(out.ids[:out.n_tokens(model.cfg.eos_ids)].tolist())
    points = nt_eval.curve(model, tok, asked, dict(settings, rules=[{}]), "x", batch_size=2)
    assert points[0]["responses"] == list(said.values())
    assert command(tmp_path, "rollout.py", "collect", "mine.jsonl", "--out", "run", *how).returncode == 0
    assert [r["prompt_ids"] for r in data.read_trajectories(tmp_path / "run")] == want
    examples = trims.load_examples(trims.Config(data=str(tmp_path / "mine.jsonl"), gen_len=16, model=str(folder)), tok)
    assert [e["prompt_ids"] for e in examples] == [want[0], want[2], want[4]] and examples[0]["x0"][:8] == tok.response_ids("6 it is")


def test_a_chat_keeps_what_was_said_before_whatever_is_shown(tmp_path):
    tok = data.load_tokenizer(official_checkpoint(tmp_path / "model", "sdar"))
    (p,) = problems(tmp_path, dict(messages=CHAT[1:]))
    shown = tok.decode(data.fitting([p], tok, None, 999) and tok.prompt_ids(p | dict(prompt=data.privileged_prompt(p))).tolist())
    assert shown.count("2 + 2?") == shown.count("Reference Answer: 6 it is") == shown.count("and 3 + 3?") == 1
    worded = nt_eval.wording(p, dict(prompt="{question} Think."))
    assert worded == "<|im_end|> and 3 + 3? Think." and "Be brief.<|im_end|>\n<|im_start|>user\n2 + 2?" in tok.decode(tok.prompt_ids(p, "Be brief.").tolist())


@pytest.mark.parametrize("messages", [
    [dict(role="System", content="Be brief."), CHAT[1]], [dict(role="developer", content="x"), CHAT[1]], [dict(role="tool", content="x"), CHAT[1]],
    3, "x", [], {}, [3], ["user"], [dict(role="user")], [dict(content="x")], [dict(role="user", content=3)], [dict(role=3, content="x")],
    [dict(role="assistant", content="x")], [dict(role="system", content="x")], [*CHAT[:3], CHAT[2]], [None, *CHAT], [dict(role="user", content=["x"])]])
def test_chats_that_cannot_be_read_are_named_with_their_line(tmp_path, messages):
    with pytest.raises(UserError, match="mine.jsonl row 2: messages must be turns with role and content"):
        problems(tmp_path, dict(messages=CHAT), dict(messages=messages))
    with pytest.raises(UserError, match="row 1: 'prompt' is absent or empty"):
        problems(tmp_path, dict(messages=[dict(role="user", content=" ")]))


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "tiny"])
def test_raw_rows_are_asked_without_a_template(tmp_path, family, monkeypatch):
    """In decoding, evaluation, collection: the text's own bytes, special tokens as plain text, and nothing around them."""
    texts = ["def f(x):\n    return", " <|im_end|>é 中", "a\n"]
    folder = "tiny" if family == "tiny" else official_checkpoint(tmp_path / "model", family)
    tok, chat = data.load_tokenizer(folder), dict(messages=CHAT[:-1], raw=True)
    asked = problems(tmp_path, *[dict(prompt=text, raw=True, answer="1") for text in texts])
    want = [tok.encode(text) if family == "tiny" else [*text.encode()] for text in texts]
    assert [tok.prompt_ids(p).tolist() for p in asked] == want
    for said in (False, None):  # the template is left out where raw is true, and only there
        (p,) = problems(tmp_path, dict(prompt="a", raw=said))
        assert tok.prompt_ids(p).tolist() == tok.prompt_ids("a").tolist() != tok.encode("a")
    for said in ("yes", "true", 2, [True], "", {}):
        with pytest.raises(UserError, match="row 1: raw must be true or false, not "):
            problems(tmp_path, dict(prompt="a", raw=said))
    (p,) = problems(tmp_path, chat)
    assert tok.decode(tok.prompt_ids(p).tolist()).split() == "Be brief. 2 + 2? 4 <|im_end|> and 3 + 3?".split()
    if family != "sdar":
        return
    problems(tmp_path, *[dict(prompt=text, raw=raw, solution="2") for text in texts for raw in (True, False)])
    examples = trims.load_examples(trims.Config(data=str(tmp_path / "mine.jsonl"), gen_len=16, model=str(folder)), tok)
    assert [e["prompt_ids"] for e in examples][::2] == want
    teacher_tok = data.load_tokenizer("tiny")  # the teacher of a raw row sees the raw text, too
    heads = [nt_teacher.teacher_pieces(e, tok, teacher_tok)[0] for e in examples]
    bos, sep = teacher_tok.special["<bos>"], teacher_tok.special["<sep>"]
    assert heads == [[*head] for text in texts for head in (teacher_tok.encode(text), [bos, *teacher_tok.encode(text), sep])]
    (tmp_path / "scored").mkdir()  # and has a score of its own
    monkeypatch.setattr(nt_teacher, "load_teacher", lambda *_: None)
    monkeypatch.setattr(nt_teacher, "difficulty", lambda some, *_: [[float(e["id"][5:])] for e in some])
    how = SimpleNamespace(out=tmp_path / "scored", rank=0, world=1, device="cpu", dtype=None)
    cfg = SimpleNamespace(teacher="tiny-ar", metric="nll", score_batch=4)
    assert nt_teacher.score_examples(examples, tok, teacher_tok, cfg, how) .tolist() == [[float(i)] for i in range(6)]
    problems(tmp_path, *[dict(prompt=text, raw=True, answer="1") for text in texts])
    how = ["rollout.py", "collect", "mine.jsonl", "--out", "run", "--model", "model", "--gen_len", 4, "--block_len", 4]
    for _ in range(2):  # the second run finds all of it there
        assert command(tmp_path, *how).returncode == 0
    assert [r["prompt_ids"] for r in data.read_trajectories(tmp_path / "run")] == want
    problems(tmp_path, *[dict(prompt=text, answer="1") for text in texts])
    assert "other settings (raw)" in command(tmp_path, *how).stderr


def test_another_history_is_another_prompt(tmp_path):
    official_checkpoint(tmp_path / "model", "sdar")
    how = ["rollout.py", "collect", "mine.jsonl", "--out", "run", "--model", "model", "--gen_len", 4, "--ungraded"]
    for chat, code in ((CHAT, 0), ([dict(role="system", content="Be long."), *CHAT[1:]], 2)):
        problems(tmp_path, dict(messages=chat, answer="6"))
        done = command(tmp_path, *how)
        assert done.returncode == code and ("other settings (earlier)" in done.stderr) == bool(code), done.stderr


@pytest.mark.parametrize("family", ["llada", "diffcoder"])
def test_a_raw_text_that_spells_a_token_holds_none(tmp_path, family):
    """Whether the tokeniser calls the token special or not."""
    folder = official_checkpoint(tmp_path / "model", family)
    table = json.loads((folder / "tokenizer.json").read_text())
    for special in (True, False):
        for token in table["added_tokens"]:
            token["special"] = special
        (folder / "tokenizer.json").write_text(json.dumps(table))
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))
        tok = data.load_tokenizer(folder)
        begin = tok.prompt_ids(dict(prompt="", raw=True)).tolist()
        assert len(tok.special) > 2
        for token in tok.special:
            for text in (token, f"a {token}b", token * 2):
                ids = tok.prompt_ids(dict(prompt=text, raw=True)).tolist()
                assert ids[:len(begin)] == begin and not set(ids[len(begin):]) & {*tok.special.values()}, (special, text)
                assert tok.decode(ids[len(begin):]) == text


@pytest.mark.parametrize("raw", [True, False])
def test_an_infilled_raw_text_ends_as_a_text_does(tmp_path, raw):
    import sample
    tok = data.load_tokenizer(official_checkpoint(tmp_path / "model", "sdar"))
    tok.raw = raw
    assert tok.eos_id != tok.chat.end_id
    before, given = sample.holes("ab[MASK:2]c", tok, 9)
    assert before == [97, 98] and given == [97, 98, 9, 9, 99, tok.eos_id if raw else tok.chat.end_id]


@pytest.mark.parametrize("text", [
    "def double(n):\n    return n * 2\n\nDone", "def double(n):\n    return n * 2\n\nThat is all", "def double(n):\n    return n * 2\n\nExplanation: trivial",
    "python\ndef double(n):\n    return n * 2", "Solution\ndef double(n):\n    return n * 2\n", "    return n * 2\n\nDone", "FACTOR: int = 2\ndef double(n):\n    return n * FACTOR\n\nDone",
    "def double(n):\n    return n * 2\n# done\nThis is right", 'def double(n):\n    """\nTwice\n    """\n    return n * 2\n\nDone', "table = {}\nfor n in range(9):\n    table[n] = n * 2\ndef double(n):\n    return table[n]\n\nDone"])
def test_prose_that_is_python_is_prose(text):
    """And what a program holds is not."""
    assert grade.is_correct(CODE, text, allow_code=True)
    assert not grade.is_correct(CODE, text.replace("* 2", "* 3").replace("int = 2", "int = 3"), allow_code=True)


@pytest.mark.parametrize("name", ["q.json", "q.jsonl.gz", "q.json.gz", "q.jsonl", "q.ndjson", "q.JSONL", "a.b.jsonl"])
def test_prompts_are_rows_whatever_the_file(tmp_path, name):
    rows = [dict(id="a", prompt="x", response="old", model="other", nfe=3, crc="1", note="kept")]
    text = json.dumps(rows) if ".json" in name and ".jsonl" not in name else json.dumps(rows[0]) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    for _ in range(2):  # a row of an earlier run is a prompt again, and such a run goes on
        done = command(tmp_path, "sample.py", "--prompts", name, "--to", "out.jsonl", "--gen_len", 16, "--block_len", 16)
        assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["id"] == "a" and row["prompt"] == "x" and row["note"] == "kept" and row["model"] == "tiny" and row["response"] != "old"


@pytest.mark.parametrize("name", ["q.json", "q.json.gz", "train_0.json", "list.jsonl", "list.ndjson.gz"])
def test_a_json_may_have_a_row_per_line(tmp_path, name):
    """As many sets on the hub do."""
    rows = [dict(id=str(i), prompt=f"p{i}", answer="1") for i in range(3)]
    for text in ("".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows), f"\n {json.dumps(rows, indent=1)}\n"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        assert [p["prompt"] for p in data.load_problems(str(tmp_path / name))] == ["p0", "p1", "p2"]
    for text, words in (('{"rows": [\n1]}\n', "repair it: a file has objects, one per line or a list"), ('{\n "data": [{"prompt": "x"}]\n}', "one per line or a list"), ("3", "row 1 is not an object"),
                        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"), ('[{"prompt": "a"}\n', "is not valid JSON"), ('{"data": [{"prompt": "x"}]}', "row 1: 'prompt' is absent")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json.*" + words):
            data.load_problems(str(tmp_path / "bad.json"))


@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.jsonl.gz"])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_are_read_once(tmp_path, monkeypatch, name, as_list):
    """A set may be large, and a pipe is empty when it comes again."""
    rows, inner, read = [dict(prompt="a"), dict(prompt="b")], cli.read_text, []
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    monkeypatch.setattr(cli, "read_text", lambda path, *how: read.append(path) or inner(path, *how))
    assert list(cli.read_rows(tmp_path / name)) == rows and read == [tmp_path / name]


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n"])
def test_a_file_without_a_prompt_is_refused(tmp_path, text):
    (tmp_path / "blank.txt").write_text(text)
    done = command(tmp_path, "sample.py", "--prompts", "blank.txt")
    assert done.returncode == 2 and "no prompt of 0 is left" in done.stderr and "a file with some" in done.stderr


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_folder_holds_no_prompts(tmp_path, path):
    done = command(tmp_path, "sample.py", "--prompts", path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "directory" in done.stderr, done.stderr


def test_a_template_that_drops_what_was_said_is_refused(tmp_path):
    folder = official_checkpoint(tmp_path / "model", "sdar")
    (folder / "chat_template.jinja").write_text("<|im_start|>{{ messages[-1]['content'] }}<|im_end|>")
    tok = data.load_tokenizer(folder)
    assert tok.prompt_ids("a").tolist()
    for asked, system in ((dict(prompt="b"), "Be brief."), (dict(prompt="b", earlier=[["user", "x y"]]), "")):
        with pytest.raises(UserError, match="its chat_template alters .*: repair it"):
            tok.prompt_ids(asked, system)


@pytest.mark.parametrize("said", ["\ue000", "a\ue000b", "\ue000<|im_end|>\ue000", "<|im_end|>\ue000 \ue000\n"])
def test_a_private_character_is_a_text_as_any_other(tmp_path, said):
    tok = data.load_tokenizer(official_checkpoint(tmp_path / "model", "sdar"))
    before, behind = tok.prompt_ids("").tolist(), tok.prompt_ids(said).tolist()
    at = len(behind) - len(tok.encode(said))
    assert tok.decode(behind).count(said.strip()) == 1 and at == len(before) or said != said.strip()
    assert all(tok.special[token] not in tok.encode(said) for token in tok.special)


@pytest.mark.parametrize("thought", ["<think>\nlong thoughts\n</think>\n\nHello", "</think>Hello", "<think>a</think><think>b</think>Hi <|im_end|>"])
def test_thoughts_of_earlier_answers_go_where_the_template_drops_them(tmp_path, thought):
    """SDAR's own template, as Qwen3's; what is special stays text."""
    folder = official_checkpoint(tmp_path / "model", "sdar")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for i, token in ((260, "<think>"), (261, "</think>")):
        config["added_tokens_decoder"][str(i)] = dict(content=token, special=False, lstrip=False, rstrip=False, normalized=False, single_word=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({**added, "<think>": 260, "</think>": 261}))
    tok = data.load_tokenizer(folder)
    turns = [["user", "hi"], ["assistant", thought]]
    said = tok.decode(tok.prompt_ids(dict(prompt="again", earlier=turns)).tolist())
    chat = [dict(role=role, content=text) for role, text in [*turns, ["user", "again"]]]
    want = tok.chat.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=tok.chat.thinks)
    assert said == want and "thoughts" not in said
    if "<|im_end|>" in thought:
        assert tok.prompt_ids(dict(prompt="again", earlier=turns)).tolist().count(tok.special["<|im_end|>"]) == 3


def test_a_chat_with_a_system_turn_keeps_its_own(tmp_path):
    tok = data.load_tokenizer(official_checkpoint(tmp_path / "model", "sdar"))
    own = dict(prompt="a", earlier=[["system", "Be brief."], ["user", "b"], ["assistant", "c"]])
    assert tok.prompt_ids(own, "Be long.").tolist() == tok.prompt_ids(own).tolist()
    assert "Be long." in tok.decode(tok.prompt_ids(dict(own, earlier=own["earlier"][1:]), "Be long.").tolist())


def test_folders_beside_the_files_of_a_checkpoint_are_left_alone(tmp_path):
    folder = official_checkpoint(tmp_path / "model", "sdar")
    for name in ("tokenizer", "tokenizer_backup", "token"):
        (folder / name).mkdir()
    assert nt_model.local_weights(folder)
    nt_model.copy_tokenizer(folder, tmp_path)
    assert (tmp_path / "tokenizer_config.json").is_file() and not (tmp_path / "tokenizer").exists()


def test_what_is_saved_over_a_merged_model_loads(tmp_path):
    merge = ["lora.py", "merge", "--adapter", "run", "--to", "merged"]
    model = lora.add(nt_model.load("tiny"), r=2, alpha=2)
    lora.save(model, tmp_path / "run", base="tiny")
    assert command(tmp_path, *merge).returncode == 0
    other = nt_model.load("tiny")
    with torch.no_grad():
        other.head.weight.mul_(2)
    nt_model.save(other, tmp_path / "merged")
    assert torch.equal(nt_model.load(tmp_path / "merged").head.weight, other.head.weight)


@pytest.mark.parametrize("asked", ["q.jsonl:prompt=question", "q.jsonl.gz:prompt=question", "q.json:prompt=question,id=number"])
def test_prompts_may_be_another_field(tmp_path, asked):
    name, rows = asked.partition(":")[0], [dict(question="x", number=7)]
    text = json.dumps(rows if name == "q.json" else rows[0])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    done = command(tmp_path, "sample.py", "--prompts", asked, "--to", "out.jsonl", "--gen_len", 16, "--block_len", 16)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "x"


def test_a_family_whose_tokeniser_names_no_mask_keeps_its_own(tmp_path):
    """iLLaDA's has none, and its id 5 may be a piece there."""
    folder = official_checkpoint(tmp_path / "model", "illada")
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    tok = data.load_tokenizer(folder)
    assert 5 in tok.plain and nt_model.read_config(folder).mask_id == 5
    for text in ("\x05", "a\x05bcd", "abc \x05"):  # never taken for a hole to fill, nor trained on
        for ask in (tok.prompt_ids, tok.response_ids, lambda text: tok.prompt_ids(dict(prompt=text, raw=True))):
            with pytest.raises(UserError, match="config.json: mask_token_id 5 is in .*, mend one"):
                ask(text)
        with pytest.raises(UserError, match="config.json: mask_token_id 5 is in .*, mend one"):
            holes(f"a [MASK:2] {text}", tok, 5)


def test_a_mask_id_that_prompts_hold_is_refused(tmp_path):
    folder = official_checkpoint(tmp_path / "model", "sdar")
    config = json.loads((folder / "config.json").read_text())
    start = data.load_tokenizer(folder).special["<|im_start|>"]
    for wrong in (97, start, 10):
        (folder / "config.json").write_text(json.dumps(config | dict(mask_token_id=wrong)))
        with pytest.raises(UserError, match=f"config.json: mask_token_id {wrong} is in "):
            data.load_tokenizer(folder)


def test_late_eos_is_for_policies_of_confidence(tmp_path):
    for policy in ("entropy", "multiblock"):
        done = command(tmp_path, "sample.py", "--late_eos", "--policy", policy, "--cache", "none")
        assert done.returncode == 2 and f"late_eos with policy {policy}" in done.stderr
        done = command(tmp_path, "sample.py", "--no-late_eos", "--policy", policy, "--cache", "none", "--gen_len", 8, "--block_len", 8)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["illada", "a2d", "dream"])
def test_blocks_of_a_bidirectional_model_are_refused(tmp_path, family):
    folder = official_checkpoint(tmp_path, family)
    config = json.loads((folder / "config.json").read_text())
    for size in (1, 4, 8):
        (folder / "config.json").write_text(json.dumps(config | dict(block_size=size)))
        with pytest.raises(UserError, match=f"block_size {size}: only None is built"):
            nt_model.read_config(folder)


def test_what_rope_parameters_say_counts(tmp_path):
    folder = official_checkpoint(tmp_path, "sdar")
    config = json.loads((folder / "config.json").read_text())
    for said, theta in ((dict(rope_theta=5.0), 5), (dict(rope_type="default", rope_theta=7), 7), ({}, config["rope_theta"])):
        (folder / "config.json").write_text(json.dumps(config | dict(rope_parameters=said)))
        assert nt_model.read_config(folder).rope_theta == theta
    for said in ("default", 3, ["default"], dict(partial_rotary_factor=0.5), dict(rope_type="linear"), dict(rope_type="default", partial_rotary_factor=0.25)):
        (folder / "config.json").write_text(json.dumps(config | dict(rope_parameters=said)))
        with pytest.raises(UserError, match="rope_parameters .* the default RoPE"):
            nt_model.read_config(folder)


@pytest.mark.parametrize("text", [
    'WORDS = """\napple\nbanana\n"""\ndef double(n):\n    return n * len(WORDS.split())', "F = [\nabs,\nint,\n]\ndef double(n):\n    return n * len(F)",
    "def double(\nn,\nk=2\n):\n    return n * k", "A = B = 1\nS = (\nA\n+ B\n)\ndef double(n):\n    return n * S\n\nDone",
    'import collections\nclass A:\n    x: int\ndef double(n):\n    """\nSELECT\n    """\n    return n * 2\n\nThis is it', "d = {}\nd.setdefault(0, 2)\ndef double(n):\n    return n * d[0]",
    '"""doc"""\nfrom __future__ import annotations\nx: int\n(y := 2)\ndef double(n: nothing):\n    return n * y', "[globals().update(k=2)]\ndef double(n):\n    return n * k"])
def test_what_a_program_holds_is_no_prose(text):
    problem = CODE | dict(tests="def check(f):\n    assert f(2) == 4 and f(3) == 6\n")
    assert grade.is_correct(problem, text, allow_code=True)


def test_parquet_holds_dates_and_bytes(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import datetime

    import pyarrow
    table = pyarrow.table(dict(prompt=["a"], when=[datetime.datetime(2026, 1, 2)], raw_bytes=[b"x"], day=[datetime.date(2026, 1, 2)]))
    parquet.write_table(table, tmp_path / "t.parquet")
    for _ in range(2):
        done = command(tmp_path, "sample.py", "--prompts", "t.parquet", "--to", "o.jsonl", "--gen_len", 16, "--block_len", 16)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name, text", [("p.csv", "prompt,answer\nwhat is it ?,4\n"), ("p.tsv", "prompt\tanswer\nx\t4\n"), ("p.csv.gz", ""), ("p.xlsx", "PK"),
                                        ("p.csv", "prompt;answer\na;b\n")])
def test_a_spreadsheet_is_refused_and_not_read_as_lines_of_text(tmp_path, name, text):
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    done = command(tmp_path, "sample.py", "--prompts", name, "--to", "out.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr, done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["p.txt", "p.md", "p.TXT", "prompts", "p.log", "v2.prompts"])
def test_a_text_has_a_prompt_per_line(tmp_path, name):
    (tmp_path / name).write_text("one\n\ntwo.three: x\n")
    assert [row["prompt"] for row in read_prompts(tmp_path / name)] == ["one", "two.three: x"]


def test_a_folder_in_another_ones_place_is_told(tmp_path):
    """A run's folder as model or adapter, an adapter or a model as the folder to collect into: nothing is written there."""
    run = tmp_path / "run"
    lora.save(lora.add(nt_model.load("tiny"), 2, 2), run / "adapter")
    (run / "lock").touch()
    (run / "trajectories").mkdir()
    (run / "config.json").write_text(json.dumps(dict(model="tiny", lora_r=2)))
    for args, words in (
            (["sample.py", "--model", run], "run is a run's folder: give its model, or its adapter by --adapter"),
            (["tad.py", "--model", run], "run is a run's folder: give "),
            (["sample.py", "--adapter", run], f"no file {run}/adapter_config.json: there is one in {run}/adapter"),
            (["eval.py", "curve", "--adapter", run], f"there is one in {run}/adapter"),
            (["eval.py", "log", run / "adapter"], f"no file {run}/adapter/log.jsonl: correct the path"),
            (["rollout.py", "collect", "--n", "2", "--out", run / "adapter"], "choose a folder of trajectories, or a new one"),
            (["tad.py", "--n_problems", "2", "--batch_size", "2", "--trajectories", run / "adapter"], "adapter holds adapter_config.json"),
            (["rollout.py", "collect", "--n", "2", "--out", ROOT / "weights/tiny"], "tiny holds config.json"),
            (["tad.py", "--n_problems", "2", "--batch_size", "2", "--trajectories", run], f"run is a run's folder: give {run}/trajectories"),
            (["rollout.py", "collect", "--n", "2", "--out", run], f"run is a run's folder: give {run}/trajectories")):
        done = command(tmp_path, *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert {f.name for f in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_a_folder_lacks_is_said(tmp_path):
    """Before it is collected: someone may have wanted only what is there."""
    for n, said in ((2, ""), (2, ""), (3, "t holds 2 trajectories: 1 more are collected"), (2, "")):
        done = command(tmp_path, "rollout.py", "collect", "--n", n, "--out", "t", "--policy", "threshold")
        assert done.returncode == 0 and f"t holds {n} of {n} problems" in done.stdout
        assert ("more are collected" in done.stdout) == bool(said) and said in done.stdout
