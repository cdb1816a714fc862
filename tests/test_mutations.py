"""Files as they should not be: every mutation of one is read, or refused in one line, never a traceback."""
import copy
import json
import random
import re

import pytest
import torch
from checkpoints import official_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_recipes import ROWS as SETS
from test_teachers import write_teacher_tokenizer

import cli
import data
import eval as nt_eval
import grade
import lora
import model as nt_model
import rollout
import trims
from cli import UserError
from compare import RunsOptions, compare, runs_command
from model import decoding_defaults
from sample import generate, read_prompts
from teacher import load_teacher_tokenizer

TINY, SHORT = nt_model.load("tiny"), dict(gen_len=8, block_len=8, cache="none", policy="static", per_step=8)
VALUES = [None, True, 0, -1, 3, 2.5, 1e30, float("nan"), "", "x", "\ud83d", [], [1], ["a"], [[1]], {}, {"a": 1}, 10**12]


def mutated(value, rng, depth=0):
    """A copy of a JSON value in which one thing, somewhere, is gone, changed or new."""
    value = copy.deepcopy(value)
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.2:
            del value[key]
        elif kind < 0.3:
            value["new"] = rng.choice(VALUES)
        else:
            value[key] = mutated(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.5:
        i = rng.randrange(len(value))
        value[i] = mutated(value[i], rng, depth + 1)
        return value
    return rng.choice(VALUES)


def write(file, value, rng):
    """As JSON; one in ten is cut short or holds a byte that is no text."""
    text = json.dumps(value).encode()
    kind = rng.random()
    file.write_bytes(text[:rng.randrange(len(text))] if kind < 0.05 else text + b"\xff" if kind < 0.1 else text)


def survives(read, what):
    try:
        read()
    except (UserError, OSError, SafetensorError, UnicodeError) as e:  # what cli.run_cli makes one line of
        assert str(e).strip(), what
    except Exception as e:
        pytest.fail(f"{what}: {type(e).__name__}: {e}")


def used_once(model, decodes):
    """What loads can be run, and be decoded with."""
    with torch.no_grad():
        model(torch.arange(5)[None])
    if decodes:
        generate(model, [torch.arange(5)], **decoding_defaults(model.cfg) | dict(gen_len=4))


def spoken(tok):
    ids = tok.prompt_ids("a <|im_end|>", "be brief").tolist() + tok.response_ids("b")
    assert isinstance(tok.decode(ids), str) and isinstance(b"".join(map(tok.bytes_of, ids)), bytes)


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "diffcoder", "a2d-bd3lm"])
def test_mutated_checkpoints(tmp_path, family):
    folder, rng = official_checkpoint(tmp_path, family), random.Random(family)
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[256, 255], temperature=0.1)))
    names = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json",
             "tokenizer.json" if family in ("llada", "diffcoder") else "vocab.json", "added_tokens.json"]
    for name in [n for n in names if (folder / n).exists()]:
        file = folder / name
        good = file.read_bytes()
        for number in range(18):
            write(file, mutated(json.loads(good), rng), rng)
            what = f"{family} {name} {number}: {file.read_bytes()[:300]}"
            survives(lambda: used_once(nt_model.load(folder), number % 6 == 0), what)
            if "index" not in name:
                survives(lambda: spoken(data.load_tokenizer(folder)), what)
        file.write_bytes(good)
    assert nt_model.load(folder) and data.load_tokenizer(folder)


def test_mutated_adapters(tmp_path):
    from conftest import random_model
    lora.save(lora.add(random_model(), 4, 8), tmp_path)
    file, rng = tmp_path / "adapter_config.json", random.Random(1)
    good = json.loads(file.read_text()) | dict(init_lora_weights=True, rank_pattern={}, megatron_core="x")
    for number in range(60):
        write(file, mutated(good, rng), rng)
        survives(lambda: used_once(lora.load(random_model(), tmp_path), number % 6 == 0), f"adapter {number}: {file.read_bytes()[:500]}")


def test_mutated_rows(tmp_path):
    good = dict(id="a", prompt="1 + 1?", solution="2", answer="2", tests=["assert True"], setup="x = 1",
                entry_point="f", question="q", thinking="t", grader="code", raw=True, test_setup="y = 2")
    chat = dict(messages=[dict(role=role, content="x") for role in ("system", "user", "assistant", "user", "assistant")], answer="x")
    tok, rng, file = data.load_tokenizer("tiny"), random.Random(2), tmp_path / "rows.jsonl"
    raw = dict(prompt="a", raw=True, earlier=None)
    for number in range(160):
        rows = [good, mutated(raw if number % 8 == 1 else chat if number % 4 == 3 else good, rng), {**good, "id": "c"}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = trims.Config(data=str(file), gen_len=64, with_thinking=number % 2 == 0)
        for read in (lambda: trims.load_examples(cfg, tok), lambda: read_prompts(file), lambda: used(file, tok)):
            survives(read, f"row {number}: {rows[1]}")


def used(file, tok):
    """What is done with a row before and after its decoding, but for running programs."""
    protocol = dict(prompt="{question} Think. {prompt}")
    problems = data.fitting(data.load_problems(str(file)), tok, None, 500, lambda p: nt_eval.wording(p, protocol))
    for p in problems:
        tok.prompt_ids(p)
        if p["solution"]:
            data.privileged_prompt(p)
        grade.check_gradable([p], True)
        if grade.grader_of(p) == "code":
            grade.tests_of(p), grade.programs(p, "def f():\n    return 1")
        else:
            grade.is_correct(p, "#### 1")


def test_mutated_results(tmp_path, monkeypatch):
    """What compare.py reads, and the lines of a picture of before; now and then the picture is drawn."""
    point = dict(label="base", rule="threshold 0.9", ids=["a", "b"], correct=[1, 0], tokens=[5, 6], nfe=[4, 4], seconds=1.0,
                 run=dict(tds=0.5, train_s=3.0, collect_s=2), provenance=dict(task="tiny"), folder="x")
    lines, rng, drawn = [1.0, 0.5, float("nan")], random.Random(3), []
    draw = nt_eval.draw
    monkeypatch.setattr(nt_eval, "draw", lambda *picture: drawn.append(1) or len(drawn) % 20 or draw(*picture))
    monkeypatch.setattr(compare, "__defaults__", (5, ""))  # redraws
    for number in range(300):
        rows = [point, point | dict(rule="1 per forward"), point | dict(label=rng.choice(["base", "TAD"]))]
        rows = [json.loads(cli.line_of(row)) for row in rows]  # with their checksums
        rows[2] = mutated(rows[2], rng)
        rng.shuffle(rows)
        rows = rows[:rng.randint(1, 3)]
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        survives(lambda: runs_command(RunsOptions([tmp_path], out=tmp_path / "out")), f"results {number}: {rows}")
        line = json.loads(cli.line_of(dict(label="TAD", values=lines)))
        write(tmp_path / "window.jsonl", mutated(line, rng) if number % 3 else line, rng)
        what = f"picture {number}: {(tmp_path / 'window.jsonl').read_bytes()}"
        survives(lambda: nt_eval.report({"new": [1.0]}, "x", "y", tmp_path / "window.png"), what)
    assert len(drawn) > 100


def test_mutated_teacher_tokenisers(tmp_path):
    for kind in ("llama3", "gemma"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text('{"model_type": "llama"}')
        folder, rng = write_teacher_tokenizer(tmp_path / kind, kind), random.Random(kind)
        for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            good = file.read_bytes()
            for number in range(20):
                write(file, mutated(json.loads(good), rng), rng)
                survives(lambda: spoken(load_teacher_tokenizer(folder)), f"{kind} {file.name} {number}: {file.read_bytes()[-300:]}")
            file.write_bytes(good)
        spoken(load_teacher_tokenizer(folder))


WRONG = {  # file, key -> values that it cannot have, among them none
    "config.json": dict(
        vocab_size=[None, "x", 0, 2.5], num_hidden_layers=[None, -1, []], num_attention_heads=[0, 5, "4"], hidden_size=[None, 1e30],
        num_key_value_heads=[0, -1, "2"], rms_norm_eps=[None, "x", -1], rope_theta=[None, "x", 0], mask_token_id=["x", -1, 10**6, 256],
        eos_token_id=[None, [], "x", [10**6]], pad_token_id=["x", -1], model_type=["x", None], hidden_act=["gelu", 3],
        rope_scaling=[3, dict(rope_type="yarn")], rope_parameters=[dict(rope_type="linear")], tie_word_embeddings=["x", -1],
        attention_bias=[True, "x"], layer_types=[["sliding_attention"]], block_size=["x", -4, 2.5], head_dim=[3, "x"]),
    "generation_config.json": dict(eos_token_id=["x", -1, [10**6]]),
    "tokenizer_config.json": dict(added_tokens_decoder=[3, "x", [1]], mask_token=[dict(a=1), [1], dict(content=[1])]),
    "adapter_config.json": dict(r=[0, "4", None, -1], lora_alpha=[None, "x", -1], lora_dropout=["x", -1, None, 1.5, 1], peft_type=["IA3", None],
                                use_dora=[True], modules_to_save=[["head"]], rank_pattern=[dict(q=1)], new_setting=[3], bias=["all"])}


@pytest.mark.parametrize("name", list(WRONG))
def test_refusals_name_file_key_value_and_what_to_do(tmp_path, name):
    folder = official_checkpoint(tmp_path, "sdar")
    if name == "adapter_config.json":
        from conftest import random_model
        lora.save(lora.add(random_model(), 4, 8), tmp_path)
    file = folder / name
    good = json.loads(file.read_text()) if file.exists() else {}
    for key, values in WRONG[name].items():
        for value in values:
            file.write_text(json.dumps(good | {key: value}))
            with pytest.raises(UserError) as refused:
                lora.load(random_model(), tmp_path) if name == "adapter_config.json" else nt_model.load(folder)
            said = str(refused.value)
            assert name in said and key in said and "\n" not in said, (key, value, said)
            assert name == "tokenizer_config.json" or repr(value).strip("[]") in said, (key, value, said)
            assert any(verb in said for verb in ("is needed", "add", "correct", "copy", "choose", "merge the", "supported are")), (key, value, said)
    file.write_text(json.dumps(good))
    assert nt_model.load(folder)


def test_refusals_of_tensors_name_file_tensor_and_what_to_do(tmp_path):
    folder = official_checkpoint(tmp_path / "model", "sdar")
    good = {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = good[name]
    index = folder / "model.safetensors.index.json"
    for tensors, words in ((good | {name: wrong[:-1]}, "hidden_size"), (good | {name: wrong.T.contiguous()}, "asks for"),
                           ({k: t for k, t in good.items() if k != name}, "missing"), (good | {name.replace("up", "down_up"): wrong.clone()}, "unexpected"),
                           (good | {name: wrong.to(torch.int8)}, "torch.int8: quantised; take"), (good | {name: wrong.to(torch.float8_e4m3fn)}, "quantised; take")):
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError) as refused:
            nt_model.load(folder)
        said = str(refused.value)
        assert str(folder) in said and "up_proj.weight" in said and words in said and re.search("copy both again|take the model", said), said
    (folder / "model.safetensors").unlink()
    save_file(good, folder / "model-1.safetensors")
    save_file({name: wrong}, folder / "model-2.safetensors")
    for table, words in (({}, "has no weight_map"), (dict(weight_map=3), "has no weight_map"), (dict(weight_map={"a": "b.safetensors"}), "has no b.safetensors"),
                         (dict(weight_map=dict(a="model-1.safetensors", b="model-2.safetensors")), f"an earlier file holds {name}, too")):
        index.write_text(json.dumps(table))
        with pytest.raises(UserError, match=re.escape(words)) as refused:
            nt_model.load(folder)
        assert str(folder) in str(refused.value) and re.search("download or copy", str(refused.value)), refused.value


@pytest.mark.parametrize("row, source, words", [
    (dict(prompt="a"), "mine: problem mine-0", "no answer: add it, or FILE:answer=NAME"), (dict(prompt="a", answer=1, grader="sum"), "mine: problem mine-0", "'sum', there are"),
    (dict(prompt="a", answer="x", grader="number"), "mine: problem mine-0", "answer 'x': mend it"), (dict(prompt="a", tests="assert f()"), "mine: problem mine-0", "give --allow_code_execution"),
    (dict(prompt=3), "mine.jsonl row 1", "prompt must be text (a chat: messages), not '3'"), (dict(question="a"), "mine.jsonl row 1", "FILE:prompt=NAME takes one: ['question']"),
    (dict(prompt="a", raw="yes"), "mine.jsonl row 1", "raw must be true or false, not 'yes'"), (dict(prompt="a", messages=[3]), "mine.jsonl row 1", "messages must be turns"),
    (dict(prompt="a", answer=1, tests=[3]), "mine.jsonl row 1", "lists of texts, not [3]"), ([3], "mine.jsonl row 1", "is not an object: '3'; repair it")])
def test_refusals_of_rows_name_file_row_and_what_to_do(tmp_path, row, source, words):
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as refused:
        grade.check_gradable(data.load_problems(str(tmp_path / "mine.jsonl")), False)
    assert source in str(refused.value) and words in str(refused.value)


@pytest.mark.parametrize("name", [name for name in SETS if name != "gsm-symbolic"])
def test_mutated_rows_of_known_sets(tmp_path, name):
    """NAME=FILE: a row is used, or left out and counted; none is a traceback, here or where it is trained on or graded."""
    good = next(row for row, problem in SETS[name] if problem)
    tok, rng, file = data.load_tokenizer("tiny"), random.Random(name), tmp_path / "rows.jsonl"
    nothing = [good | {key: value} for key in good for value in (None, [], ["x"], 3, "", {"a": 1}, True)]
    for number, row in enumerate([*nothing, *(mutated(good, rng) for _ in range(40))]):
        file.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        for read in (lambda: used(f"{name}={file}", tok), lambda: trims.load_examples(trims.Config(data=f"{name}={file}", gen_len=64), tok),
                     lambda: rollout.rollout(TINY, tok, data.load_problems(f"{name}={file}"), tmp_path / f"kept-{number}", "tiny", graded=False, **SHORT)
                     if number % 9 == 0 else None):
            survives(read, f"{name} {number}: {row}")


def test_a_row_of_a_known_set_that_cannot_be_used_is_left_out(tmp_path, capsys):
    for name, key, values in (("math500", "problem", [None, 3, ""]), ("humaneval", "entry_point", [["f"], 3]), ("s1k", "attempt", [["2"], {}]),
                              ("humaneval", "test", ["def check(f):\n    pass\n", "assert (", 3]), ("mbpp", "test_list", [["x = 1"], [3]])):
        good = next(row for row, problem in SETS[name] if problem)
        for value in values:
            (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {key: value}) + "\n")
            cli.say.cache_clear()
            assert len(data.load_problems(f"{name}={tmp_path}/x.jsonl")) == 1
            assert re.search("left out: 1 (malformed|without an answer, or tests that check something)", capsys.readouterr().err), (name, key, value)
    good = next(row for row, problem in SETS["humaneval"] if problem)
    (tmp_path / "x.jsonl").write_text(json.dumps(good | dict(canonical_solution=None)) + "\n")
    (problem,) = data.load_problems(f"humaneval={tmp_path}/x.jsonl")
    assert problem["solution"] == ""


@pytest.mark.parametrize("tests, more", [
    ("def check(candidate):\n    assert candidate(2) == 4", {}), ("assert f(2)==4)", {}), (["f(2) == 4"], {}), ("```python\nassert f(2) == 4\n```", {}),
    ("import sys\nif f(2) != 4: print(1)", {}), ("  assert f(2) == 4", {}), ("def check(f):\n    pass", dict(entry_point="f"))])
def test_tests_that_check_nothing_are_said_before_decoding(tmp_path, tests, more):
    (tmp_path / "mine.jsonl").write_text(json.dumps(dict(prompt="a", tests=tests, **more)) + "\n")
    with pytest.raises(UserError, match="mine: problem mine-0: no assert in its tests runs: mend them"):
        grade.check_gradable(data.load_problems(f"{tmp_path}/mine.jsonl"), True)
