"""The embedded model, and the commands a newcomer runs."""
import contextlib
import json
import shutil

import pytest
from conftest import ROOT, command
from safetensors.torch import load_file, save_file
from html.parser import HTMLParser
from types import SimpleNamespace
from unittest import mock

import torch

import cli
import data
import eval as nt_eval
import lora
import model as nt_model
import sample
import trims
from sample import generate, reference, show
from teacher import load_teacher

TINY = nt_model.load("tiny")
TOK = data.load_tokenizer("tiny")
SETTINGS = dict(gen_len=data.TINY_LEN, block_len=data.TINY_BLOCK)


def test_embedded_model_solves_the_task_token_by_token_only():
    problems = data.load_problems("tiny", "dev", 48)
    protocol = dict(SETTINGS, policy="static", cache="none",
                    rules=[{}, dict(block_len=48, per_step=48), dict(per_step=4)])
    by_token, at_once, four = nt_eval.curve(TINY, TOK, problems, protocol, "tiny")
    assert nt_eval.accuracy(by_token)[0] > 95 and nt_eval.accuracy(at_once)[0] < 30
    assert nt_eval.accuracy(four)[0] < 50 and nt_eval.tpf(four) < 4
    assert set(at_once["nfe"]) == {1}


@pytest.mark.parametrize("policy", [dict(policy="static"), dict(policy="threshold", threshold=0.9)])
def test_embedded_model_decodes_as_the_reference(policy):
    prompts = [TOK.prompt_ids(p["prompt"]) for p in data.load_problems("tiny", "dev", 2)]
    for cache in ("none", "prefix", "dual"):
        outs = generate(TINY, prompts, cache=cache, **SETTINGS, **policy)
        for prompt, out in zip(prompts, outs):
            ref = reference(TINY, prompt, cache=cache, **SETTINGS, **policy)
            assert out.ids.tolist() == ref.ids.tolist() and out.order.tolist() == ref.order.tolist()
            assert out.nfe == ref.nfe


def test_size_of_the_weights():
    assert sum(f.stat().st_size for f in (ROOT / "weights/tiny").iterdir()) < 4e6


def test_show_draws_every_forward(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = generate(TINY, [TOK.prompt_ids(data.load_problems("tiny", "dev", 1)[0]["prompt"])], **SETTINGS)[0]
    words = [TOK.decode([i]).strip() or "∅" for i in out.ids.tolist()]
    lines = show(out, words).split("\n")
    assert len(lines) == out.nfe and "·" in lines[0] and "·" not in lines[-1]
    for t, line in enumerate(lines):  # new tokens are in capitals, known ones plain, masked ones dots
        drawn = line.split(" | ")[1].split(" ")
        assert [w.startswith("·") for w in drawn] == [o > t for o in out.order.tolist()]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\033[" in show(out, words)


def test_sample_command(tmp_path):
    ok = command(tmp_path, "sample.py", "--prompt", data.load_problems("tiny", "dev", 1)[0]["prompt"], "--show")
    assert ok.returncode == 0 and "tokens per forward" in ok.stdout and "####" in ok.stdout
    for args, words in ((["--prompt", "ball " * 300], "exceeds the model's"),
                        (["--model", "tinny"], "no model"),
                        (["--policy", "greedy"], "invalid choice"), (["--gen_len", "0"], "at least 1"),
                        (["--top_p", "0", "--temperature", "1"], "top_p is 0.0: it must be at least"),
                        (["--temperature", "-1"], "temperature is -1.0: it must be at least 0"),
                        (["--html", "/dev/null/x.html"], "/dev/null"),
                        *((["--html", place], "is a directory: name a file") for place in (".", "/", "/tmp")),
                        (["--adapter", "nowhere"], "no file")):
        bad = command(tmp_path, "sample.py", *args)
        assert bad.returncode == 2 and words in bad.stderr and "Traceback" not in bad.stderr, bad.stderr


def test_prompts_from_a_file_continue_where_they_stopped(tmp_path):
    problems = data.load_problems("tiny", "dev", 5)
    lines = [json.dumps(dict(id=p["id"], prompt=p["prompt"])) for p in problems]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    args = ["--prompts", "q.jsonl", "--to", "a.jsonl", "--policy", "static", "--batch_size", "2"]
    first = command(tmp_path, "sample.py", *args)
    assert first.returncode == 0 and "5 responses written" in first.stdout, first.stderr
    full = {r["id"]: r for r in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())}
    assert all(full[p["id"]]["response"].endswith(p["answer"]) for p in problems)
    kept = (tmp_path / "a.jsonl").read_text().splitlines(True)
    (tmp_path / "a.jsonl").write_text("".join(kept[:2]) + kept[2][:30])  # killed while writing the third
    again = command(tmp_path, "sample.py", *args)
    assert "3 responses written to a.jsonl, 2 were there" in again.stdout, again.stderr
    assert {r["id"]: r for r in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())} == full
    (tmp_path / "changed.jsonl").write_text(lines[0].replace("swap", "trade") + "\n" + "\n".join(lines[1:]))
    changed = ["--prompts", "changed.jsonl", *args[2:]]
    (tmp_path / "one.txt").write_text("a")
    for bad, words in ((["--prompts", "none.txt"], "no file"), ([*args, "--gen_len", "40"], "another model, settings"),
                       (changed, "settings or prompts"),
                       (["--prompts", "q.jsonl", "--to", "q.jsonl"], "choose another"),
                       (["--prompts", "one.txt", "--to", "./one.txt"], "would replace"),
                       (["--prompts", "q.jsonl", "--batch_size", "0"], "at least 1"),
                       (["--prompts", "q.jsonl", "--prompt", "a"], "--prompt is for one prompt"),
                       (["--prompts", "q.jsonl", "--show"], "--show is for one prompt"),
                       (["--prompts", "q.jsonl", "--html", "a.html"], "--html is for one prompt"),
                       (["--to", "a.jsonl"], "--to is for --prompts"), (["--max_prompt", "9"], "--max_prompt is for --prompts")):
        refused = command(tmp_path, "sample.py", *bad)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr


def test_a_file_of_prompts_is_one_processs_work(tmp_path):
    """Under torchrun each rank would append every response to the same file; a single prompt is only shown."""
    (tmp_path / "p.txt").write_text("ball under pink\n")
    done = command(tmp_path, "sample.py", "--prompts", "p.txt", WORLD_SIZE="2", RANK="1")
    assert done.returncode == 2 and "start it without torchrun" in done.stderr and [*tmp_path.iterdir()] == [tmp_path / "p.txt"]
    assert command(tmp_path, "sample.py", "--prompts", "p.txt", WORLD_SIZE="1").returncode == 0


@pytest.mark.parametrize("raw", [False, True])
def test_a_system_turn_stands_before_every_prompt(tmp_path, monkeypatch, capsys, raw):
    """--system, with --prompt and --prompts: the ids are those of both turns, or of both texts with --raw."""
    seen, inner = [], sample.stream
    monkeypatch.setattr(sample, "stream", lambda model, prompts, *a, **kw: seen.extend(prompts) or inner(model, prompts, *a, **kw))
    tok, how = data.load_tokenizer("tiny"), ["--gen_len", "8", "--block_len", "8", *["--raw"] * raw]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for args in (["--prompt", "a"], ["--prompts", str(tmp_path / "p.jsonl")]):
        for system in ("", "be brief"):
            to = ["--to", str(tmp_path / f"{system}.jsonl")] * (args[0] == "--prompts")
            monkeypatch.setattr("sys.argv", ["sample.py", *args, *to, *how, *["--system", system] * bool(system)])
            sample.main()
            want = torch.tensor(tok.encode(f"{system} a") if raw else [
                tok.special["<bos>"], *tok.encode(f"{system} a"), tok.special["<sep>"]])
            assert torch.equal(seen[0], want) and torch.equal(seen[0], tok.prompt_ids(dict(prompt="a", raw=raw), system))
            seen.clear()
    monkeypatch.setattr("sys.argv", ["sample.py", "--prompts", str(tmp_path / "p.jsonl"), "--to", str(tmp_path / "be brief.jsonl"), *how])
    with pytest.raises(cli.UserError, match="another model, settings or prompts"):  # without its system turn
        sample.main()
    n = len(tok.prompt_ids(dict(prompt="a", raw=raw), "be brief"))
    for most, left_out in ((n, None), (n - 1, "is left: raise --max_prompt")):  # which counts that turn
        monkeypatch.setattr("sys.argv", ["sample.py", "--prompts", str(tmp_path / "p.jsonl"), "--to", str(tmp_path / "more.jsonl"),
                                         "--system", "be brief", "--max_prompt", str(most), *how])
        with pytest.raises(cli.UserError, match=left_out) if left_out else contextlib.nullcontext():
            sample.main()
    capsys.readouterr()


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_responses_of_a_model_that_changed(tmp_path, monkeypatch, capsys, what):
    """--prompts goes on only with the weights that it began with: the adapter's, and those of the base below it."""
    shutil.copytree(ROOT / "weights/tiny", tmp_path / "base")
    (tmp_path / "base/SHA256SUMS").unlink()
    lora.save(lora.add(nt_model.load("tiny"), 4, 4), tmp_path / "adapter", base=str(tmp_path / "base"))
    (tmp_path / "p.txt").write_text("a\nb\n")
    monkeypatch.setattr("sys.argv", ["sample.py", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"),
                                     "--prompts", str(tmp_path / "p.txt"), "--gen_len", "8", "--block_len", "8"])
    sample.main()
    before = (tmp_path / "p.responses.jsonl").read_text()
    sample.main()
    (file,) = (tmp_path / what).glob("*.safetensors")
    save_file({name: t * 1.1 for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(cli.UserError, match="another model, settings or prompts"):
        sample.main()
    assert "0 responses written" in capsys.readouterr().out and (tmp_path / "p.responses.jsonl").read_text() == before


@pytest.mark.parametrize("theirs", [None, '{"mine": 1}', '{"id": "p-0"}', '{"id": "p-0", "response": "a"}'])
def test_a_last_response_without_its_end(tmp_path, monkeypatch, capsys, theirs):
    """As an editor leaves a file: ours goes on, with no id twice; somebody else's, or one of other settings, is refused."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    to = tmp_path / "p.responses.jsonl"
    monkeypatch.setattr("sys.argv", ["sample.py", "--prompts", str(tmp_path / "p.txt"), "--gen_len", "8", "--block_len", "8"])
    if theirs:
        to.write_text(theirs)
        with pytest.raises(cli.UserError, match="another model, settings or prompts"):
            sample.main()
        assert to.read_text() == theirs
        to.write_text("a line")  # as torn as ours may be: it is kept beside
    sample.main()
    assert not theirs or (tmp_path / "p.responses.jsonl.damaged").read_text() == "a line\n"
    whole = to.read_text()
    to.write_text(whole[:-1])
    sample.main()
    assert to.read_text() == whole and "0 responses written" in capsys.readouterr().out
    to.write_text(whole[:-1])
    monkeypatch.setattr("sys.argv", [*sample.sys.argv, "--threshold", "0.1"])
    with pytest.raises(cli.UserError, match="another model, settings or prompts"):
        sample.main()
    assert to.read_text() == whole[:-1]


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, attrs))

    def handle_data(self, text):
        if self.opened and self.opened[-1][0] == "script":
            self.scripts.append(text)


def test_the_page_shows_base_and_trained(tmp_path, monkeypatch, capsys):
    model = lora.add(nt_model.load("tiny"), 4, 4)
    for name, p in model.named_parameters():
        p.data += 0.05 if name.endswith("lora_B") else 0
    lora.save(model, tmp_path / "adapter", "tiny")
    file = tmp_path / "page.html"
    for adapter, names in ([], ["model"]), (["--adapter", str(tmp_path / "adapter")], ["base", "trained"]):
        monkeypatch.setattr("sys.argv", ["sample.py", "--html", str(file), *adapter])
        sample.main()
        shown = json.loads(Page(file.read_text()).scripts[0])
        assert [side["name"] for side in shown["sides"]] == names
        problem, = data.load_problems("tiny", "test", 1)
        assert shown["prompt"] == problem["prompt"]
        for side, of in zip(shown["sides"], (TINY, model)):
            out = reference(of, TOK.prompt_ids(problem["prompt"]), cache="none", **SETTINGS)
            assert side["order"] == out.order.tolist() and side["nfe"] == out.nfe
            assert side["tokens"] == [TOK.decode([i]) for i in out.ids.tolist()]
            assert side["conf"] == pytest.approx(out.conf.tolist(), abs=1e-4)
        assert capsys.readouterr().out.endswith(f"written: {file}\n")
    assert shown["sides"][0] != shown["sides"][1]


@pytest.mark.parametrize("text", [
    "</script><script>alert(1)</script>", "<!--<script>", "</SCRIPT >", "<img src=x onerror=alert(1)>",
    "\"'`\\ ${1}", "\u2028\u2029 日本 \0", "DECODINGS", "\udcff half a pair", "&lt;/script&gt;"])
def test_nothing_that_a_page_shows_runs(text, tmp_path):
    L = 5
    out = sample.Output(*torch.arange(3 * L).view(3, L), torch.ones(L), 7)
    tok = SimpleNamespace(decode=lambda ids: f"{ids}{text}")
    sample.page({text: out}, tok, (L,), text, tmp_path / "page.html")
    page, plain = (tmp_path / "page.html").read_text(), (ROOT / "assets/decoding.html").read_text()
    shown = json.loads(Page(page).scripts[0])
    assert shown["prompt"] == shown["sides"][0]["name"] == text
    assert shown["sides"][0]["tokens"] == [f"[{i}]{text}" for i in range(L)]
    assert Page(page).opened == Page(plain).opened and Page(page).scripts[1:] == Page(plain).scripts[1:]
    assert page.count("<") == plain.count("<")


def test_the_page_needs_no_network():
    page = (ROOT / "assets/decoding.html").read_text()
    addresses = [value for _, attrs in Page(page).opened for key, value in attrs if key in ("src", "href")]
    assert not addresses and "innerHTML" not in page and "http" not in page and "url(" not in page
    assert page.count("DECODINGS") == 1 and page.count("\n") <= 150


def test_the_whole_story_in_small(tmp_path):
    """tad.py end to end on the embedded model with few problems; then its adapter decodes, merges and
    compares.
    """
    few = ["--n_problems", "16", "--max_steps", "2", "--eval_problems", "4"]
    story = command(tmp_path, "tad.py", *few, "--out", "run")
    assert story.returncode == 0, story.stderr
    for word in ("trajectories are correct", "W = ", "AUP base", "AUP TAD", "threshold 0.9"):
        assert word in story.stdout
    for file in ("curve.png", "window.png", "results.jsonl", "config.json", "log.jsonl",
                 "adapter/adapter_model.safetensors", "trajectories/rank0.jsonl"):
        assert (tmp_path / "run" / file).stat().st_size > 0
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["target_modules"].count("_proj") == 7
    merged = command(tmp_path, "lora.py", "merge", "--adapter", "run/adapter", "--to", "merged")
    assert merged.returncode == 0, merged.stderr
    a = lora.load(nt_model.load("tiny"), tmp_path / "run/adapter")
    b = nt_model.load(tmp_path / "merged")
    prompts = [TOK.prompt_ids(p["prompt"]) for p in data.load_problems("tiny", "dev", 3)]
    for x, y in zip(generate(a, prompts, **SETTINGS), generate(b, prompts, **SETTINGS)):
        assert x.ids.tolist() == y.ids.tolist()
    curve = command(tmp_path, "eval.py", "curve", "--model", "merged", "--n", "4", "--points", "3", "4")
    again = command(tmp_path, "eval.py", "curve", "--model", "merged", "--n", "4", "--points", "3", "4")
    assert curve.returncode == 0 and "threshold 0.9" in curve.stdout, curve.stderr
    assert again.returncode == 0 and again.stdout == curve.stdout  # read, not measured again


def test_how_the_tiny_models_were_made_and_a_baseline_in_small(tmp_path, monkeypatch):
    few = ["--max_steps", "3", "--batch_size", "8", "--drill_steps", "1", "--out", "base"]
    monkeypatch.setattr(trims, "mask_response", trims.mask_response)  # which it sets
    made = command(tmp_path, "weights/train.py", *few)
    assert made.returncode == 0, made.stderr
    assert nt_model.load(tmp_path / "base/model").cfg == TINY.cfg
    again = command(tmp_path, "weights/train.py", *few)
    assert again.returncode == 0 and "finished already" in again.stderr
    monkeypatch.undo()
    tuned = command(tmp_path, "trims.py", "--model", "base/model", "--max_steps", "2", "--batch_size", "8",
                "--n_problems", "16", "--eval_problems", "0", "--out", "sft")
    assert tuned.returncode == 0 and (tmp_path / "sft/adapter/adapter_config.json").exists(), tuned.stderr
    refused = command(tmp_path, "trims.py", "--trajectory_share", "1.5", "--out", "x")
    assert refused.returncode == 2 and "trajectory_share is 1.5: it must be at most 1" in refused.stderr
    with mock.patch.object(data.game("tiny"), "PRIVILEGED_SHARE"):  # which it sets
        teacher = command(tmp_path, "weights/train_ar.py", "--steps", "2", "--batch_size", "4", "--out", "ar")
    assert teacher.returncode == 0 and "nats per token" in teacher.stdout, teacher.stderr
    assert load_teacher(str(tmp_path / "ar")).config.vocab_size == 298


def test_bench_prints_what_was_measured_and_json(tmp_path):
    ok = command(tmp_path, "tools/bench.py", "--batch_size", "2", "--gen_len", "16", "--block_len", "8", "--cache", "dual", "--profile")
    facts = json.loads(ok.stdout.splitlines()[-1])
    assert ok.returncode == 0 and facts["nfe"] == 32 and facts["forwards"] == 16 and facts["looks"] == 2
    assert facts["tok_per_s"] > 0 and facts["time_of_uncached"] > 0 and "aten::" in ok.stdout
    assert 1 <= facts["flop_of_fast_dllm_dual"] < facts["flop_of_fast_dllm_prefix"] < facts["flop_of_uncached"]  # never more than the others
    bad = command(tmp_path, "tools/bench.py", "--model", "llada-9b")
    assert bad.returncode == 2 and "llada-9b" in bad.stderr
    bad = command(tmp_path, "tools/bench.py", "--policy", "threshold")
    assert bad.returncode == 2 and "--per_step" in bad.stderr
