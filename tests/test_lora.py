import json
import os
import re

import pytest
import torch
from checkpoints import official_checkpoint
from conftest import CONFIGS, FIXTURES, random_model
from safetensors.torch import load_file, save_file

import cli
import data
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


def written(folder, **changes):
    """An adapter's folder, its settings changed; a None that was not there is written as null."""
    model = trained(random_model())
    lora.save(model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return model


@pytest.mark.parametrize("changes", [
    dict(use_dora=True), dict(use_rslora=True), dict(alpha_pattern={"q_proj": 2}), dict(rank_pattern={"q_proj": 2}),
    dict(bias="all"), dict(init_lora_weights="pissa"), dict(init_lora_weights="pissa_niter_4"),
    dict(init_lora_weights="olora"), dict(init_lora_weights="corda"), dict(init_lora_weights="lora_ga"),
    dict(peft_type="LOHA"), dict(peft_type=None), dict(alora_invocation_tokens=[1]), dict(trainable_token_indices=[3]),
    dict(modules_to_save=["lm_head"]), dict(layer_replication=[[0, 1]]), dict(target_parameters=["w"]),
    dict(use_qalora=True), dict(lora_bias=True), dict(a_new_setting=0.5), dict(kasa_config={"x": 1})])
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, changes):
    written(tmp_path, **changes)
    (key, value), = changes.items()
    words = f"adapter_config.json has {key} {value!r}: only plain LoRA is built; merge"
    with pytest.raises(UserError, match=re.escape(words)):
        lora.load(random_model(), tmp_path)


@torch.no_grad()
def test_settings_that_change_nothing_load(tmp_path):
    """All that PEFT writes by itself, and what it says about how the adapter was made."""
    peft = pytest.importorskip("peft")
    theirs = {k: v for k, v in peft.LoraConfig(r=3, lora_alpha=6).to_dict().items() if k not in ("target_modules",)}
    model = written(tmp_path, **theirs)
    assert torch.equal(lora.load(random_model(), tmp_path)(IDS), model(IDS))
    for changes in (dict(init_lora_weights=False), dict(init_lora_weights="gaussian"), dict(init_lora_weights="eva"),
                    dict(task_type="FEATURE_EXTRACTION", peft_version="0.21.2"), dict(layers_to_transform=[0, 1]),
                    dict(exclude_modules="x", megatron_core="y"), dict(bias="none", use_dora=False, rank_pattern={}),
                    dict(a_new_setting=None, another=[], lora_alpha=6.0)):
        model = written(tmp_path, **changes)
        assert torch.equal(lora.load(random_model(), tmp_path)(IDS), model(IDS)), changes


@pytest.mark.parametrize("changes", [dict(r="4"), dict(r=None), dict(r=2.5), dict(r=-1), dict(lora_alpha=None),
                                     dict(lora_alpha="6"), dict(lora_alpha=float("nan")), dict(lora_dropout=[0.1])])
def test_numbers_of_an_adapter(tmp_path, changes):
    written(tmp_path, **changes)
    (key, value), = changes.items()
    with pytest.raises(UserError, match=re.escape(f"adapter_config.json has {key} {value!r}: a number")):
        lora.load(random_model(), tmp_path)


def test_an_empty_or_missing_adapter_is_an_error(tmp_path, monkeypatch):
    import eval as nt_eval
    import sample
    for module, args in ((sample, ["--prompt", "x"]), (nt_eval, ["curve", "--n", "1"])):
        (tmp_path / "file").touch()
        for folder, words in (("", "--adapter is empty"), (str(tmp_path), "no file .*adapter_config.json"), (str(tmp_path / "file"), "no file .*file/adapter_config.json: correct")):
            monkeypatch.setattr("sys.argv", ["x.py", *args, "--adapter", folder])
            with pytest.raises(UserError, match=words):
                sample.main() if module is sample else nt_eval.cli.run_command("", nt_eval.COMMANDS)


@torch.no_grad()
def test_merging_into_a_folder_that_holds_a_model(tmp_path, monkeypatch):
    """Whosever it is, it is refused."""
    base, other = official_checkpoint(tmp_path / "base", "dream"), official_checkpoint(tmp_path / "other", "llada")
    model = trained(nt_model.load(base))
    lora.save(model, tmp_path / "adapter")
    ids = torch.randint(0, 250, (1, 9))
    want, before = model(ids), {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def merge(target):
        words = ["lora.py", "merge", "--model", base, "--adapter", tmp_path / "adapter", "--to", target]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        cli.run_command("", {"merge": (lora.merge_command, lora.Merge)})
    new = tmp_path / "new"
    merge(new)
    for target in (base, other, new, tmp_path / "adapter"):
        with pytest.raises(UserError, match="is there and not empty: choose another|would replace"):
            merge(target)
    assert all(file.read_bytes() == was for file, was in before.items())
    merged = nt_model.load(new)
    assert (merged(ids) - want).abs().max() < 1e-4 and merged.cfg.family == "dream"
    assert data.load_tokenizer(new).encode("ab") == [97, 98] and not (new / "tokenizer.json").exists()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_modes_that_the_umask_asks_for(tmp_path, mask, mode):
    import run as training
    before = os.umask(mask)
    try:
        lora.save(trained(random_model()), tmp_path / "adapter")
        nt_model.save(random_model(), tmp_path / "model")
        nt_model.save(random_model(), tmp_path / "model")  # over another
        (tmp_path / "c/tmp").mkdir(parents=True)
        training.write_checkpoint(tmp_path / "c", 1, {"a": torch.zeros(2)}, 0, 1)
    finally:
        os.umask(before)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) == 5 and {f.stat().st_mode & 0o777 for f in files} == {mode}


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
    whole, tensors = file.read_bytes(), {key: t.clone() for key, t in load_file(file).items()}
    (tmp_path / "a/SHA256SUMS").unlink(missing_ok=True)
    for dtype in (torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool):
        save_file({**tensors, (key := sorted(tensors)[1]): tensors[key].to(dtype)}, file)
        with pytest.raises(UserError, match="or is quantised: .*lora_"):
            lora.load(random_model(), tmp_path / "a")
    file.write_bytes(whole)
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
