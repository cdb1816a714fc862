import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model

import data
import trims
from trims import Config, make_batch, mask_response, mdlm_loss

CFG = SimpleNamespace(t_min=0.001, block_share=0.0, block_len=4, batch_size=2)


def test_loss_by_hand():
    """Two masked tokens of a response of 4 with t = 0.5, batch of 2: (1/t) (1/L) (1/B) sum of -log p."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    w = torch.full((2,), 1 / 0.5 / 4 / 2)
    want = (-math.log(0.25) - math.log(0.8)) / 0.5 / 4 / 2
    assert abs(mdlm_loss(p.log(), torch.tensor([1, 2]), w).item() - want) < 1e-6


def test_mdlm_masks_have_the_right_rate_and_weight():
    shares = []
    for i in range(500):
        masked, w = mask_response({"x0": [0] * 64}, CFG, data.example_rng(0, 0, i))
        t = 1 / w[0]
        assert np.allclose(w, w[0]) and abs(masked.mean() - t) < 5 * math.sqrt(t * (1 - t) / 64) + 1e-9
        shares.append(t)
    assert abs(np.mean(shares) - 0.5) < 0.05 and min(shares) < 0.05 and max(shares) > 0.95


def test_block_masks_are_the_states_of_block_decoding():
    cfg = SimpleNamespace(**{**vars(CFG), "block_share": 1.0})
    for i in range(50):
        masked, w = mask_response({"x0": [0] * 16}, cfg, data.example_rng(0, 0, i))
        current = np.flatnonzero(w)
        assert len(current) == 4 and current[0] % 4 == 0
        assert not masked[:current[0]].any() and masked[current[-1] + 1:].all()


def test_noise_depends_on_seed_epoch_and_example_only():
    a, b = (mask_response({"x0": [0] * 32}, CFG, data.example_rng(0, 1, 7)) for _ in range(2))
    other = mask_response({"x0": [0] * 32}, CFG, data.example_rng(0, 2, 7))
    assert np.array_equal(a[0], b[0]) and not np.array_equal(a[0], other[0])


def test_batch_layout():
    examples = [{"prompt_ids": [1, 2, 3], "x0": [4, 5, 6, 7]}, {"prompt_ids": [1], "x0": [8, 9, 9, 9],
                                                                 "masked": [True, False, False, True]}]
    rngs = [data.example_rng(0, 0, i) for i in range(2)]
    facts = SimpleNamespace(mask_id=99, pad_id=0, block_len=0)
    inputs, cols, x0, masked, w = make_batch(examples, rngs, CFG, facts)
    ids, valid = inputs["ids"], inputs["valid"]
    assert cols.tolist() == [[3, 4, 5, 6]] * 2
    assert x0.tolist() == [[4, 5, 6, 7], [8, 9, 9, 9]] and valid.tolist()[1][:3] == [False, False, True]
    assert ids[1].tolist() == [0, 0, 1, 99, 9, 9, 99] and masked[1].tolist() == [True, False, False, True]
    assert w[1].tolist() == [0.25] * 4  # a drill: mean over its two masked tokens, over a batch of two


def test_block_causal_models_train_behind_clean_blocks():
    """Block of 2, prompt of 3: [p0 p1 | p2 x | x x | x (noisy) | p2 x | x x | x (clean)]."""
    facts, cfg = random_model(block_size=2).cfg, SimpleNamespace(**{**vars(CFG), "batch_size": 1})
    example = {"prompt_ids": [1, 2, 3], "x0": [4, 5, 6, 7], "masked": [True, False, True, False]}
    inputs, cols, *_ = make_batch([example], [data.example_rng(0, 0, 0)], cfg, facts)
    assert inputs["ids"].tolist() == [[1, 2, 3, 39, 5, 39, 7, 3, 4, 5, 6, 7]]
    assert inputs["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6]]
    assert cols.tolist() == [[3, 4, 5, 6]]
    sees = [inputs["attn_mask"][0, q].nonzero()[:, 0].tolist() for q in (1, 3, 5, 8)]
    assert sees == [[0, 1], [0, 1, 2, 3], [0, 1, 4, 5, 7, 8], [0, 1, 7, 8]]


def test_expected_loss_is_an_upper_bound_for_a_uniform_model():
    """With uniform predictions the MDLM loss is log V in expectation, whatever t is drawn."""
    total = []
    for i in range(300):
        _, _, x0, masked, w = make_batch([{"prompt_ids": [1], "x0": [2] * 64}] * 2,
                                         [data.example_rng(0, i, j) for j in range(2)], CFG,
                                         SimpleNamespace(mask_id=9, pad_id=0, block_len=0))
        total.append(mdlm_loss(torch.zeros(int(masked.sum()), 10), x0[masked], w[masked]).item())
    assert abs(np.mean(total) - math.log(10)) < 0.1


def test_method_files_share_their_boilerplate():
    def block(name):
        text = (ROOT / name).read_text()
        return re.search(r"# --- boilerplate: .*?# --- end boilerplate ---", text, re.S)[0]
    assert len({block(f"{name}.py") for name in ("tad", "trims", "t3d", "tabom")}) == 1
    assert len(block("tad.py")) > 3000


def test_learning_rate_schedules():
    def frac(step, schedule, warmup=0):
        return trims.lr_frac(step, 100, SimpleNamespace(lr_schedule=schedule, warmup_steps=warmup))
    assert frac(0, "constant", 10) == 0.1 and frac(50, "constant", 10) == 1
    assert frac(10, "cosine", 10) == 1 and abs(frac(55, "cosine", 10) - 0.5) < 1e-9
    assert frac(60, "tail") == 1 and abs(frac(80, "tail") - 0.5) < 1e-9


def test_presets_and_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["trims.py", "--lr", "0.5", "--no-full"])
    cfg = trims.parse_args(Config, trims.PRESETS, "")
    assert (cfg.lr, cfg.gen_len, cfg.clip) == (0.5, 48, 1.0)  # command line > preset > field
    monkeypatch.setattr("sys.argv", ["trims.py", "--help"])
    with pytest.raises(SystemExit):
        trims.parse_args(Config, trims.PRESETS, "doc")


def test_optimizers_cover_every_parameter_once():
    model = random_model()
    opts = trims.build_optimizers(SimpleNamespace(muon_lr=0.01, lr=1e-3, beta2=0.95, weight_decay=0.0), model)
    held = [id(p) for opt in opts for g in opt.param_groups for p in g["params"]]
    assert len(opts) == 2 and sorted(held) == sorted(id(p) for p in model.parameters())
