import json

import pytest
import torch
from conftest import CONFIGS, random_model

import data
import eval as nt_eval
import model as nt_model
import sample
from model import UserError


@pytest.mark.parametrize("pairs, y_max, want", [  # EVAL.md's check values
    ([(1, 80), (4, 78)], 80, 308.5460),
    ([(1, 80), (3, 79), (6, 75)], 82, 418.4082),
    ([(1, 80), (3, 74), (6, 76)], 80, 443.5345),  # 74 < 80 - 5: dropped, its neighbours joined
])
def test_aup_check_values(pairs, y_max, want):
    assert abs(nt_eval.aup(pairs, y_max) - want) < 1e-3
    assert abs(nt_eval.aup(pairs[::-1], y_max) - want) < 1e-3


def test_aup_by_hand():
    assert nt_eval.aup([(2, 50)], 50) == 100  # one point: rho_1 y_1
    assert abs(nt_eval.aup([(1, 50), (2, 50)], 50) - 100) < 1e-9  # W = 1 at y_max
    assert abs(nt_eval.aup([(1, 50), (2, 60)], 40) - (50 + 55)) < 1e-9  # W is at most 1
    with pytest.warns(UserWarning, match="clipped at TPF 1.00 of 3.00"):
        assert nt_eval.aup([(1, 80), (3, 20)], 80) == 80
    with pytest.raises(UserError):
        nt_eval.aup([], 80)


def point(label, rule, correct, tokens, nfe):
    return dict(label=label, rule=rule, correct=correct, tokens=tokens, nfe=nfe, seconds=1.0,
                ids=[str(i) for i in range(len(correct))], settings={}, responses=[""] * len(correct))


def test_accuracy_and_tpf_by_hand():
    p = point("m", "threshold 0.9", [1, 0, 1, 1], [10, 20, 30, 40], [5, 5, 20, 20])
    assert nt_eval.accuracy(p) == (75.0, pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5))
    assert nt_eval.tpf(p) == 2.0  # 100 / 50: of the sums, not the mean of 2, 4, 1.5, 2


def test_report_writes_results_and_picture(tmp_path, capsys):
    curves = [(label, [point(label, "1 per forward", [1, 1, 0, 1], [8] * 4, [8] * 4),
                       point(label, "threshold 0.9", good, [8] * 4, [4] * 4)])
              for label, good in (("base", [1, 0, 0, 1]), ("TAD", [1, 1, 0, 1]))]
    nt_eval.report(curves, tmp_path)
    printed = capsys.readouterr().out
    assert "AUP base: 75.0" in printed and "AUP TAD: 150.0" in printed and "y_max 75.0" in printed
    assert (tmp_path / "curve.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[3]["correct"] == [1, 1, 0, 1] and rows[0]["provenance"]["torch"]


def test_compare_is_paired_and_refuses_other_problems(tmp_path):
    def write(name, label, good):
        (tmp_path / name).mkdir()
        points = [point(label, "1 per forward", [1] * 50, [8] * 50, [8] * 50),
                  point(label, "threshold 0.9", good, [8] * 50, [4] * 50)]
        (tmp_path / name / "results.jsonl").write_text("\n".join(json.dumps(p) for p in points) + "\n")
    write("b", "base", [1] * 47 + [0] * 3)
    write("s", "SFT", [1] * 48 + [0] * 2)
    write("t", "TAD", [1] * 50)
    text = nt_eval.compare(nt_eval.read_runs([tmp_path / x for x in "bst"]), "base", "SFT", n_boot=50)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    header = rows["| model"]
    assert "2 per forward, %" not in header  # no run has it
    assert rows["| TAD"][header.index("AUP")] == "200.0 ± 0.0"
    assert rows["| TAD"][header.index("TPF at 0.9")] == "2.00 ± 0.00" and rows["| SFT"][1] == "1"
    assert "at 0.9, %, TAD - SFT: 4.00" in text and "AUP TAD / base: 2.00" in text
    p = point("odd", "threshold 0.9", [1], [8], [4])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "results.jsonl").write_text(json.dumps(p) + "\n")
    with pytest.raises(UserError, match="same problems"):
        nt_eval.read_runs([tmp_path / "b", tmp_path / "odd"])


def test_caches_against_the_uncached_decoder():
    """Caches change a bidirectional model's decoding, unless its rows do not see each other; a block-causal
    model decoded in its own blocks is changed by none.
    """
    vocabulary = dict(vocab_size=298, mask_token_id=297, eos_token_id=296, pad_token_id=296)
    tok, problems = data.load_tokenizer("tiny"), data.load_problems("tiny", "dev", 4)
    rule = dict(gen_len=12, block_len=4, policy="threshold", threshold=0.5)

    def agreement(model):
        rows = [line.strip(" |").split(" | ") for line in
                nt_eval.compare_caches(model, tok, problems, rule, 2).split("\n")[2:]]
        return {row[0]: row[4:] for row in rows}
    same = ["100.0", "100.0"]
    model = random_model(**vocabulary)
    plain = agreement(model)
    assert list(plain) == ["none", "prefix", "dual", "vicinity"] and plain["none"] == same != plain["dual"]
    for block in model.blocks:
        block.o_proj.weight.data.zero_()
    assert set(map(tuple, agreement(model).values())) == {tuple(same)}
    causal = agreement(random_model(**CONFIGS["block"], **vocabulary))
    assert len(causal) == 5 and set(map(tuple, causal.values())) == {tuple(same)}


def test_teacher_nll_along_a_decoding():
    """Every point is the teacher's mean NLL of the revealed tokens in text order."""
    tok, teacher_tok = data.load_tokenizer("tiny"), data.load_teacher_tokenizer("tiny-ar")
    teacher, problem = nt_model.load_teacher("tiny-ar"), data.load_problems("tiny", "dev", 1)[0]
    ids = data.pad_response(tok.response_ids(problem["solution"]), 48, tok.eos_id)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    out = sample.Output(torch.tensor(ids), order, order, torch.ones(48), 48)
    curve = nt_eval.trajectory_nll(teacher, teacher_tok, tok, problem["prompt"], out, (tok.eos_id,))
    head = tok.prompt_ids(problem["prompt"]).tolist()
    for t in (10, 30, 47):
        shown = [i for i, o in zip(ids, order.tolist()) if o <= t and i != tok.eos_id]
        nll = nt_model.token_nll(teacher, torch.tensor([head + shown]))[0, len(head):]
        assert abs(curve[t] - nll.mean().item()) < 1e-4
    assert curve[47] < 0.4 < curve[10]  # a finished solution is likely, scraps of it are not
