"""AR teachers with tokenisers of their own: ids, templates, bytes and scores, against `transformers`."""
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import official_checkpoint
from conftest import FIXTURES, command
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

import data
import eval as nt_eval
import teacher as nt_teacher
import trims
from cli import UserError
from teacher import difficulty, load_teacher, load_teacher_tokenizer, spread, token_nll

EXPECTED = json.loads((FIXTURES / "teacher_qwen/expected_nll.json").read_text())
TEXTS = ["plain", " two  spaces ", "12 * 7 = 84.\n\nSo\t84", "é 中文 🙂 ①", "<s> </s> <|eot_id|> <eos> x", "\n", "a"]
CORPUS = ["the answer is 12 and the sum of 3 and 4 is 7 . def f(x):\n    return x + 1\n é 中文"] * 4
BYTES = [f"<0x{b:02X}>" for b in range(256)]
TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
              "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
              "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
             "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
              "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"}
SPECIALS = {"llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "llama2": ["<s>", "</s>"], "base": ["<s>", "</s>"]}
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "llama2": "</s>", "base": "</s>"}


def write_teacher_tokenizer(folder, kind):
    """A small tokeniser of a kind, trained on a few lines: tokenizer.json and tokenizer_config.json."""
    specials = SPECIALS[kind]
    if kind in ("llama3", "base"):
        table = Tokenizer(models.BPE())
        table.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        table.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        table.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet,
                                                              special_tokens=specials, show_progress=False))
    else:
        table = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        replace = normalizers.Replace(" ", "▁")
        table.normalizer = replace if kind == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), replace])
        table.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        table.train_from_iterator(CORPUS, trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<unk>", *specials, *BYTES], show_progress=False))
        text = json.loads(table.to_str())  # byte tokens are ordinary ones
        text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] not in BYTES]
        table = Tokenizer.from_str(json.dumps(text))
        if kind == "gemma":  # added, not special, and part of a text
            table.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False)])
    table.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], table.token_to_id(specials[0]))])
    table.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=specials[0], eos_token=specials[1])
    if kind in TEMPLATES and kind != "gemma":
        config["chat_template"] = TEMPLATES[kind]
    elif kind in TEMPLATES:
        (folder / "chat_template.jinja").write_text(TEMPLATES[kind])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_teacher(folder, kind):
    folder.mkdir()
    shape = dict(vocab_size=340, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, initializer_range=0.3)
    torch.manual_seed(0)
    model = (Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=2.0))
             if kind == "gemma" else LlamaForCausalLM(LlamaConfig(**shape)))
    model.save_pretrained(folder)
    return write_teacher_tokenizer(folder, kind)


@pytest.fixture(scope="module")
def teacher_qwen(hub, tmp_path_factory):
    """The files of Qwen3-8B's folder, with small random weights: those that expected_nll.json was made with."""
    folder = tmp_path_factory.mktemp("qwen") / "teacher"
    folder.mkdir()
    config = Qwen3Config.from_pretrained(FIXTURES / "teacher_qwen")
    model, g = Qwen3ForCausalLM(config).bfloat16(), torch.Generator().manual_seed(51)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.3 * x if name.endswith("norm.weight") else
                    0.5 * x if len(p) == config.vocab_size else 1.2 * x / p.shape[1] ** 0.5)
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text((FIXTURES / "teacher_qwen" / name).read_text())
    for name in ("vocab.json", "merges.txt"):
        os.link(hub / "dream" / name, folder / name)
    tokens = json.loads((hub / "sdar-4b/tokenizer_config.json").read_text())  # Qwen3's, and a mask
    del tokens["added_tokens_decoder"]["151669"], tokens["mask_token"], tokens["auto_map"]
    tokens.update(eos_token="<|im_end|>", additional_special_tokens=tokens["additional_special_tokens"][:-1],
                  chat_template=(hub / "sdar-4b/chat_template.jinja").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def test_qwen3_as_a_teacher_gives_the_official_scores(teacher_qwen):
    """Ids, NLL and entropy of transformers 4.57; the prompt ends with Qwen3's own empty thought."""
    tok, teacher = load_teacher_tokenizer(teacher_qwen), load_teacher(teacher_qwen)
    student = data.Tokenizer(lambda text: list(text.encode()), {b: bytes([b]) for b in range(256)},
                             {"<eos>": 256}, False, SimpleNamespace(end_id=256, trims=False), 256)
    examples = []
    for e in EXPECTED:
        ids = tok.encode(e["completion"])
        assert tok.prompt_ids(e["prompt"]).tolist() == e["prompt_ids"]
        assert [*ids, tok.eos_id] == e["completion_ids"]
        assert b"".join(map(tok.bytes_of, ids)).decode() == e["completion"]
        whole = torch.tensor([e["prompt_ids"] + e["completion_ids"]])
        for metric in ("nll", "entropy"):
            got = token_nll(teacher, whole, metric=metric)[0, len(e["prompt_ids"]):].tolist()
            assert np.allclose(got, e[f"completion_{metric}"], atol=1e-4)
        examples.append(dict(id=0, prompt=e["prompt"], x0=student.response_ids(e["completion"])))
    for e, scores in zip(EXPECTED, difficulty(examples, student, teacher, tok, "nll")):  # in one padded batch
        assert abs(sum(scores[:-1]) - sum(e["completion_nll"][:-1])) < 1e-2
        assert abs(scores[-1] - e["completion_nll"][-1]) < 1e-3


@pytest.mark.parametrize("kind", SPECIALS)
def test_other_tokenisers_are_their_own(tmp_path, kind):
    """Byte-level and SentencePiece, with and without a space of their own, a template or added tokens."""
    tok = load_teacher_tokenizer(write_teacher(tmp_path / "t", kind))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert theirs.convert_ids_to_tokens(tok.eos_id) == ENDS[kind]
    special = set(theirs.convert_tokens_to_ids(SPECIALS[kind]))
    for text in TEXTS + ["x\n\ny <table>"]:
        ids = tok.encode(text)
        written = b"".join(map(tok.bytes_of, ids)).decode()
        assert written == " " * (kind == "llama2") + text and not special & set(ids)
        asked = tok.prompt_ids(text).tolist()
        clean = sum(i in special for i in tok.prompt_ids("x").tolist())
        assert sum(i in special for i in asked) == clean  # a text writes no special token
        if "<" not in text:
            want = theirs(text + "\n") if kind == "base" else theirs.apply_chat_template(
                [dict(role="user", content=text)], add_generation_prompt=True)
            assert asked == want["input_ids"]


@pytest.mark.parametrize("kind", ["llama3", "gemma", "llama2"])
def test_scores_of_other_tokenisers(tmp_path, kind):
    """Against the whole model's own logits (Gemma 2 caps them); every byte's score is counted once."""
    folder = write_teacher(tmp_path / "t", kind)
    tok, teacher = load_teacher_tokenizer(folder), load_teacher(folder)
    student = data.load_tokenizer(official_checkpoint(tmp_path / "s", "dream"))
    texts = ["12 is é 🙂", "the answer", "a\n\nb"]
    examples = [dict(id=i, prompt="sum ?", x0=student.response_ids(text)) for i, text in enumerate(texts)]
    scored = difficulty(examples, student, teacher, tok, "nll")
    for text, e, scores in zip(texts, examples, scored):
        prompt, ids = tok.prompt_ids("sum ?").tolist(), tok.encode(text)
        whole = torch.tensor([[*prompt, *ids, tok.eos_id]])
        logp = teacher(whole).logits[0].log_softmax(-1)
        nll = -logp[:-1].gather(1, whole[0, 1:, None])[len(prompt) - 1:, 0]
        assert len(scores) == len(e["x0"]) == len(text.encode()) + 1 and np.isfinite(scores).all()
        assert abs(sum(scores[:-1]) - nll[:-1].sum().item()) < 1e-3 and abs(scores[-1] - nll[-1].item()) < 1e-4


def test_a_token_of_no_bytes_counts_with_the_next():
    assert spread([5.0, 2.0, 1.0], [0, 2, 1], [1, 2]).tolist() == [3.5, 4.5]
    assert spread([1.0, 2.0], [1, 1], [2]).tolist() == [3.0]


@pytest.mark.parametrize("args", [["nll", "--n", "1"], []])
def test_commands_with_real_teachers(teacher_qwen, tmp_path, monkeypatch, args):
    """eval.py nll and trims.py, whose student has another tokeniser."""
    folder = official_checkpoint(tmp_path / "base", "dream")
    rows = [dict(prompt=e["prompt"], solution=e["completion"], answer="1") for e in EXPECTED]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args:
        args += ["--task", tmp_path / "p.jsonl", "--gen_len", 4, "--block_len", 4, "--out", tmp_path]
    else:
        args = ["--data", tmp_path / "p.jsonl", "--gen_len", 120, "--batch_size", 2, "--micro_batch", 2, "--max_steps",
                1, "--trajectory_share", 1.0, "--n_buckets", 3, "--out", tmp_path / "run"]
    name = "eval.py" if args[0] == "nll" else "trims.py"
    for teacher in (teacher_qwen, *(write_teacher(tmp_path / kind, kind) for kind in ("gemma", "llama3"))):
        again = [] if name == "eval.py" else ["--overwrite"]
        monkeypatch.setattr("sys.argv", [str(a) for a in [name, *args, "--model", folder, "--teacher", teacher, *again]])
        if name == "eval.py":
            nt_eval.cli.run_command(nt_eval.__doc__, nt_eval.COMMANDS)
            assert (tmp_path / "trajectory_nll.png").exists()
        else:
            trims.main()
            rows = data.read_jsonl(tmp_path / "run/difficulty/rank0.jsonl")
            assert len(rows) == len(EXPECTED) and all(any(v for v in row["scores"]) for row in rows)


def refused(folder, table):
    table.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))


NO_SYSTEM = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
             "<s>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}")


def test_teachers_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    """Before any weights are loaded: there are none here."""
    monkeypatch.setattr(nt_teacher, "load_teacher", lambda *_: pytest.fail("loaded first"))
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig().to_dict()))
    words = {"[UNK]": 0, "the": 1, "##s": 2}
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("a", -2.0)], unk_id=0))
    unigram.normalizer = normalizers.NFKC()
    lower = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    for table in (Tokenizer(models.WordPiece(words, unk_token="[UNK]")), Tokenizer(models.WordLevel(words, "[UNK]")),
                  unigram, lower):
        refused(tmp_path, table)
        with pytest.raises(UserError, match=f"--teacher {tmp_path}: what its .* cannot be told"):
            load_teacher_tokenizer(tmp_path)
    for text in ("{}", "[1]", "not JSON"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=f"--teacher {tmp_path}: copy or install what its tokeniser needs: "):
            load_teacher_tokenizer(tmp_path)
    write_teacher_tokenizer(tmp_path, "llama3")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for template, words in (("{{ raise_exception('no system') }}", r"its chat_template fails \(no system.* with the roles .*user.*assistant.*: mend it or the row .*OK"),
                            ("{% for %}", "its chat_template fails"), ("{{ messages[5].content }}", "its chat_template fails")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        with pytest.raises(UserError, match=words):
            load_teacher_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": NO_SYSTEM}))
    tok = load_teacher_tokenizer(tmp_path)
    for said in ([["system", "Be brief."]], [["user", "a"], ["assistant", "b"], ["system", "c"]], [["system", ""]]):
        with pytest.raises(UserError, match=r"its chat_template fails \(no system here.* with the roles .*system.*: mend it or the row .*last words"):
            tok.prompt_ids(dict(prompt="the last words", earlier=said))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))
    with pytest.raises(UserError, match="not how an answer ends"):
        load_teacher_tokenizer(tmp_path)
    folder = official_checkpoint(tmp_path / "base", "sdar")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "solution": "b", "answer": "c"}\n')
    args = ["trims.py", "--model", folder, "--data", tmp_path / "p.jsonl", "--out", tmp_path / "run", "--teacher", tmp_path]
    monkeypatch.setattr("sys.argv", list(map(str, args)))
    with pytest.raises(UserError, match="not how an answer ends"):
        trims.main()
    assert not (tmp_path / "run").exists()
    few = load_teacher(write_teacher(tmp_path / "few", "llama3"))
    with pytest.raises(UserError, match="340 embeddings, tokeniser up to 340: copy both"):
        token_nll(few, torch.tensor([[1, 340]]))


@pytest.mark.parametrize("changes", [
    dict(hidden_act="nope"), dict(num_hidden_layers="x"), dict(hidden_size=None), dict(rope_scaling=3), dict(num_attention_heads=0), dict(vocab_size="a"),
    dict(model_type="nope"), dict(rope_parameters=dict(rope_type="nope")), dict(intermediate_size=[1])])
def test_a_teacher_whose_config_is_wrong_is_refused_in_one_line(teacher_qwen, tmp_path, changes):
    for file in teacher_qwen.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"--teacher {tmp_path}: give a causal LM that transformers loads: ") as refused:
        load_teacher(str(tmp_path))
    assert "\n" not in str(refused.value)


KINDS = {  # some count positions their own way, have no position_ids, layers of several kinds, or change their logits
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64), "gpt_neox": {}, "bloom": dict(n_layer=2, n_head=4),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16), "falcon": {}, "mpt": dict(d_model=32, n_heads=4, n_layers=2), "mamba": dict(state_size=4),
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8),
    "cohere": dict(logit_scale=0.3), "granite": dict(logits_scaling=3.0), "gemma3_text": dict(head_dim=8, final_logit_softcapping=2.0),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, num_key_value_heads=2), "phi": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_any_causal_lm_scores_as_transformers_does(tmp_path, kind):
    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0,
                 eos_token_id=1, pad_token_id=1, max_position_embeddings=64)
    config = AutoConfig.for_model(kind, **{**shape, **KINDS[kind]})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    rows = [torch.randint(2, 40, (n,)) for n in (11, 5, 8)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    for metric in ("nll", "entropy"):
        for row, got in zip(rows, token_nll(teacher, ids, metric)):
            logp = teacher(row[None]).logits[0, :-1].log_softmax(-1)
            want = -logp.gather(1, row[1:, None])[:, 0] if metric == "nll" else -(logp.exp() * logp).sum(-1)
            assert (got[1:len(row)] - want).abs().max() < 1e-5 and got[0] == 0, metric


def test_an_example_that_is_too_long_for_the_teacher_is_named(tmp_path):
    folder = write_teacher(tmp_path / "teacher", "llama3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=8)))
    tok = data.load_tokenizer("tiny")
    example = dict(id="row-7", prompt="a b c d e f g h", prompt_ids=[1], x0=tok.response_ids("pink and red"))
    with pytest.raises(UserError, match=r"example row-7: \d+ tokens, the teacher takes 8: --max_prompt"):
        difficulty([example], tok, load_teacher(folder), load_teacher_tokenizer(folder), "nll")
    done = command(tmp_path, "eval.py", "nll", "--n", 1, "--teacher", folder, "--gen_len", 8, "--block_len", 8)
    assert done.returncode == 2 and re.search(r"problem tiny-test-0 and its response: \d+ tokens, the teacher takes 8: --max_prompt", done.stderr)
