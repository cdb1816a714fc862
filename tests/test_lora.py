import json
import re

import pytest
import torch
from conftest import CONFIGS, FIXTURES, random_model
from safetensors.torch import load_file

import lora
import model as nt_model
import run
import t3d
import tabom
import tad
import trims
from model import UserError


def trained(model, r=3, alpha=6, targets=lora.ALL, seed=5):
    """The model with adapters whose B is not zero."""
    lora.add(model, r, alpha, 0.0, targets)
    g = torch.Generator().manual_seed(seed)
    for _, m in lora.adapters(model):
        m.lora_B.data.copy_(0.3 * torch.randn(m.lora_B.shape, generator=g))
    return model


IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_fresh_off_and_merged(any_model):
    base = any_model(IDS)
    trained(any_model)
    adapted = any_model(IDS)
    assert (adapted - base).abs().max() > 0.1
    with lora.off(any_model):
        assert torch.equal(any_model(IDS), base)  # LoRA off is the base, bit for bit
    assert torch.equal(any_model(IDS), adapted)  # and on again
    names = {n for n, _ in any_model.named_parameters() if "lora" not in n}
    lora.merge(any_model)
    assert not lora.adapters(any_model) and {n for n, _ in any_model.named_parameters()} == names
    assert (any_model(IDS) - adapted).abs().max() < 1e-3 * adapted.abs().max()


def test_one_layer_by_hand():
    """W = [[1, 2], [3, 4]], A = [[1, 1]], B = [[1], [2]], alpha / r = 2: merged = W + 2 [[1, 1], [2, 2]]."""
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1., 2.], [3., 4.]])
    layer = lora.LoRALinear(linear, 1, 2, 0.0)
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1., 1.]]), torch.tensor([[1.], [2.]])
    assert layer(torch.tensor([1., 10.])).tolist() == [21 + 22, 43 + 44]
    assert layer.merged().weight.tolist() == [[3, 4], [7, 8]]


def test_dropout_is_off_in_a_model_that_evaluates(tmp_path):
    lora.save(lora.add(random_model(), 4, 4, dropout=0.5), tmp_path)
    loaded = lora.load(random_model(), tmp_path)
    assert not any(m.training for _, m in lora.adapters(loaded))


def test_only_adapters_train_and_start_at_zero():
    model = random_model()
    base = model(IDS)
    lora.add(model, 4, 4, 0.0)
    assert torch.equal(model(IDS), base)
    kinds = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B"}
    assert len(lora.adapters(model)) == 7 * 2  # all seven matrices of every block
    model(IDS).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_save_load_in_pefts_layout(tmp_path, name):
    model = trained(random_model(**CONFIGS[name]), targets=("q_proj", "v_proj", "down_proj"))
    lora.save(model, tmp_path, base="some/model")
    again = lora.load(random_model(**CONFIGS[name]), tmp_path)
    assert torch.equal(model(IDS), again(IDS))
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys and len(keys) == 2 * 3 * 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 6 and config["peft_type"] == "LORA"
    modules = {k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for k in keys}
    assert all(re.fullmatch(config["target_modules"], m) for m in modules)  # a pattern, as PEFT matches it
    assert not re.fullmatch(config["target_modules"], "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("name", ["llada_A", "dream_A", "sdar_A"])
def test_official_module_names(tmp_path, name):
    model = trained(nt_model.load(FIXTURES / name))
    lora.save(model, tmp_path)
    official = load_file(FIXTURES / name / "model.safetensors").keys()
    for key in load_file(tmp_path / "adapter_model.safetensors"):
        module = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        assert f"{module}.weight" in official


def test_errors(tmp_path):
    with pytest.raises(UserError, match="wq"):
        lora.add(random_model(), 4, 4, 0.0, ("wq",))
    with pytest.raises(UserError, match="lora_r is 0"):
        lora.add(random_model(), 0, 4)
    with pytest.raises(UserError, match="already carries"):
        lora.add(trained(random_model()), 4, 4)
    with pytest.raises(UserError, match="no LoRA adapters"):
        lora.save(random_model(), tmp_path)
    with pytest.raises(UserError, match="merge"):
        nt_model.save(trained(random_model()), tmp_path)
    lora.save(trained(random_model()), tmp_path / "a")
    small = random_model(hidden_size=16, head_dim=8)
    with pytest.raises(UserError, match="does not fit"):
        lora.load(small, tmp_path / "a")
    assert not lora.adapters(small)
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="corrupt or cut short"):
        lora.load(random_model(), tmp_path / "a")


def test_every_method_names_its_matrices(monkeypatch):
    """A text of names with commas; a wrong one is an error before anything is loaded."""
    assert lora.named("all") == lora.ALL and lora.named("q_proj,v_proj") == ["q_proj", "v_proj"]
    model = lora.add(random_model(), 2, 2, 0.0, "q_proj,down_proj")
    assert {name.split(".")[-1] for name, _ in lora.adapters(model)} == {"q_proj", "down_proj"}
    for method in (tad, t3d, tabom, trims):
        for words, want in ((["q_proj,v_proj"], "q_proj,v_proj"), (["all"], "all"), (["c_proj"], None)):
            monkeypatch.setattr("sys.argv", ["x.py", "--lora_targets", *words])
            if want:
                assert run.parse(method.Config, method.PRESETS, "").lora_targets == want
            else:
                with pytest.raises(UserError, match="LoRA targets .'c_proj'.: choose from q_proj"):
                    run.parse(method.Config, method.PRESETS, "")
