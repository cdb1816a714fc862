import json
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, CONFIGS, FIXTURES, prompts_of, random_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as nt_model
import sample
import tad
from model import UserError


def close(a, b, tol=1e-4):
    return (a - b).abs().max().item() <= tol


# ---------------------------------------------------------------------------------------------- call contract
@torch.no_grad()
def test_padding_changes_nothing(any_model):
    """A row gives the same logits alone, left-padded, right-padded and in a mixed batch."""
    g = torch.Generator().manual_seed(1)
    # a model that pads prompts to whole blocks counts these from the first column
    lengths = (4, 8, 12) if any_model.cfg.whole_blocks else (5, 9, 12)
    rows = [torch.randint(0, 40, (n,), generator=g) for n in lengths]
    alone = [any_model(r[None])[0] for r in rows]
    for sides in ("LLL", "RRR", "LRL", "RLR"):
        ids, valid = torch.full((3, 12), any_model.cfg.pad_id), torch.zeros(3, 12, dtype=torch.bool)
        for i, (row, side) in enumerate(zip(rows, sides)):
            span = slice(12 - len(row), 12) if side == "L" else slice(0, len(row))
            ids[i, span], valid[i, span] = row, True
        logits = any_model(ids, valid=valid)
        assert logits.isfinite().all()
        for i, want in enumerate(alone):
            assert close(logits[i, valid[i]], want), (sides, i)


@torch.no_grad()
def test_hidden_and_head_of_chosen_rows(any_model):
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(2))
    rows = torch.rand(2, 7) < 0.5
    assert close(any_model.head(any_model.hidden(ids)[rows]), any_model(ids)[rows], 1e-5)


@torch.no_grad()
def test_shift_moves_rows_by_one():
    """The same weights with and without the shift: row i of one is row i - 1 of the other, row 0 stays."""
    plain, shifted = random_model(), random_model(shift=True)
    ids = torch.randint(0, 40, (1, 6))
    a, b = plain(ids), shifted(ids)
    assert close(b[:, 1:], a[:, :-1], 1e-5) and close(b[:, :1], a[:, :1], 1e-5)


@torch.no_grad()
def test_block_causal_sees_own_and_earlier_blocks_only():
    model, ids = random_model(block_size=4), torch.randint(0, 38, (1, 12))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 38  # in the last block
    a, b = model(ids), model(changed)
    assert close(a[:, :8], b[:, :8], 0) and not close(a[:, 8:9], b[:, 8:9], 1e-3)


# --------------------------------------------------------------------------------------- against transformers
@torch.no_grad()
@pytest.mark.parametrize("kv, tied, head_dim", [(4, False, 8), (2, True, 8), (1, False, 16)])
def test_equals_transformers(tmp_path, kv, tied, head_dim):
    """LLaDA = Llama, Dream = Qwen2, SDAR = Qwen3 with the right masks;
    weights cross through the official names.
    """
    from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                              Qwen3ForCausalLM)
    common = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=kv, max_position_embeddings=64,
                  rms_norm_eps=1e-6, tie_word_embeddings=tied, rope_theta=1e6, attn_implementation="sdpa")
    hf = {**common, "mask_token_id": 39, "eos_token_id": 38, "pad_token_id": 38}
    llada = dict(model_type="llada", d_model=32, n_heads=4, n_kv_heads=kv, n_layers=2, mlp_hidden_size=48,
                 rms_norm_eps=1e-6, embedding_size=40, vocab_size=40, max_sequence_length=64, rope_theta=1e6,
                 weight_tying=tied, mask_token_id=39, eos_token_id=38, pad_token_id=38)
    full = torch.ones(12, 12, dtype=torch.bool)
    blocks = torch.arange(12) // 4
    cases = [(LlamaForCausalLM(LlamaConfig(**common)), llada, full)] if head_dim == 8 else []
    if head_dim == 8:
        cases.append((Qwen2ForCausalLM(Qwen2Config(**common)), {**hf, "model_type": "Dream"}, full))
    cases.append((Qwen3ForCausalLM(Qwen3Config(**common, head_dim=head_dim)),
                  {**hf, "model_type": "sdar", "head_dim": head_dim, "block_size": 4},
                  blocks[:, None] >= blocks[None]))
    for reference, raw, mask in cases:
        for p in reference.parameters():  # biases and norms too
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        raw.pop("attn_implementation", None)
        state = {k: v for k, v in reference.state_dict().items() if not (tied and k == "lm_head.weight")}
        if raw["model_type"] == "llada":
            state = {llada_name(k): v for k, v in state.items()}
        folder = tmp_path / raw["model_type"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
        ids = torch.randint(0, 38, (2, 12), generator=torch.Generator().manual_seed(0))
        want = reference.eval()(ids, attention_mask=mask[None, None].expand(2, 1, 12, 12)).logits
        if raw["model_type"] == "Dream":
            want = torch.cat([want[:, :1], want[:, :-1]], 1)
        assert close(nt_model.load(folder)(ids), want), raw["model_type"]


LLADA_NAMES = {  # Llama's -> LLaDA's, spelled out
    "model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm", "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"}


def llada_name(llama_name):
    stem, _, kind = llama_name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"model.transformer.blocks.{layer}.{LLADA_NAMES[rest]}.{kind}"
    return f"model.transformer.{LLADA_NAMES[stem]}.{kind}"


def official(name):
    """A fixture's model; the bd3lm one was run in blocks of 4, which a name cannot say."""
    model = nt_model.load(FIXTURES / name)
    return sample.in_blocks(model, 4) if model.cfg.whole_blocks else model


@pytest.mark.parametrize("name, family", [
    ("llada_A", "llada"), ("dream_A", "dream"), ("sdar_A", "sdar"), ("a2d_mdlm_A", "a2d"), ("a2d_qwen2_mdlm_A", "a2d"),
    ("a2d_bd3lm_A", "a2d"), ("illada_A", "illada"), ("diffcoder_A", "diffcoder")])
@torch.no_grad()
def test_equals_the_official_code(name, family):
    model = official(name)
    assert model.cfg.family == family

    def unshift(logits):  # the official logits are raw: Dream's row i scores token i + 1
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if model.cfg.shift else logits

    want = load_file(FIXTURES / name / "expected.safetensors")
    assert close(model(want["input_ids"]), unshift(want["logits"]))
    if name not in ("sdar_A", "diffcoder_A"):  # their code pads nothing
        want = load_file(FIXTURES / name / "expected_leftpad.safetensors")
        valid = want["attention_mask"].bool()
        compared = valid.clone()
        compared[1, 5] = not model.cfg.shift  # the official row of the first real token comes from a pad
        assert close(model(want["input_ids"], valid=valid)[compared], unshift(want["logits"])[compared])


@torch.no_grad()
def test_a_left_padded_prompt_of_any_length_ends_with_its_blocks():
    """bd3lm: what decoding and training give to hidden() is what a prompt padded to whole blocks gives."""
    model, g = official("a2d_bd3lm_A"), torch.Generator().manual_seed(3)
    for n in (1, 3, 4, 6, 9):
        prompt, response = (torch.randint(0, 249, (k,), generator=g) for k in (n, 10))
        padded = torch.cat([torch.full((-n % 4,), 249), prompt, response])[None]
        want = model(padded, valid=torch.arange(padded.shape[1])[None] >= -n % 4)[0, -10:]
        inputs, cols = data.response_inputs(model.cfg, [prompt.tolist(), [5] * 7], torch.stack([response, response]))
        assert close(model(**inputs)[0, cols[0]], want), n
        layout, cols = nt_model.block_diffusion_layout(model.cfg, [prompt.tolist()], response[None], response[None])
        canvas, positions = torch.cat([prompt, response[:8]])[None], (torch.arange(n + 8) + -n % 4)[None]
        assert close(model(**layout)[0, cols[0, 4:8]], model(canvas, positions=positions)[0, -4:]), n


# ---------------------------------------------------------------------------------------------- save and load
def test_save_load_save_is_identical(any_model, tmp_path):
    nt_model.save(any_model, tmp_path / "a")
    again = nt_model.load(tmp_path / "a")
    nt_model.save(again, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert again.cfg == any_model.cfg
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(any_model(ids), again(ids))
    names = load_file(tmp_path / "a/model.safetensors").keys()
    assert "model.layers.1.self_attn.q_proj.weight" in names and "model.embed_tokens.weight" in names
    assert ("lm_head.weight" in names) == (not any_model.cfg.tied)


def test_sharded_checkpoint(tmp_path):
    model = random_model()
    nt_model.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(nt_model.load(tmp_path)(ids), model(ids))
    save_file({k: tensors[k] for k in names[6:]}, tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match="an earlier file holds .*, too: download or copy all again"):
        nt_model.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        nt_model.load(tmp_path)


def broken(tmp_path, change=None, config=None):
    nt_model.save(random_model(), tmp_path)
    if change:
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **(config or {})}))
    return tmp_path


@pytest.mark.parametrize("change, config, words", [
    (lambda t: t.pop("model.norm.weight"), {}, "missing ['model.norm.weight']"),
    (lambda t: t.update(extra=torch.zeros(1)), {}, "unexpected ['extra']"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), {}, "shape (3,)"),
    (None, {"model_type": "gpt2"}, "model_type 'gpt2'"),
    (None, {"hidden_size": 64}, "shape"),
])
def test_bad_checkpoints_say_what_is_wrong(tmp_path, change, config, words):
    with pytest.raises(UserError) as e:
        nt_model.load(broken(tmp_path, change, config))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_missing_key_truncated_file_and_absent_model(tmp_path):
    folder = broken(tmp_path / "a")
    raw = (folder / "model.safetensors").read_bytes()
    for cut in (4, 100, len(raw) // 2, len(raw) - 1):
        (folder / "model.safetensors").write_bytes(raw[:cut])
        with pytest.raises(UserError, match="corrupt or cut short"):
            nt_model.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        nt_model.load(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in BASE.items() if k != "hidden_size"}))
    with pytest.raises(UserError, match="hidden_size"):
        nt_model.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        nt_model.load(folder)
    with pytest.raises(UserError, match="no model 'tinny'"):
        nt_model.load("tinny")


def test_configs_cover_every_fact():
    """The random configs above differ from the tiny model in every fact that a family can have."""
    facts = [random_model(**c).cfg for c in CONFIGS.values()]
    assert any(c.n_kv_head != c.n_head for c in facts)
    assert any(c.head_dim * c.n_head != c.d_model for c in facts)
    assert all(any(getattr(c, f) for c in facts)
               for f in ("qkv_bias", "qk_norm", "tied", "shift", "block_len"))


# ------------------------------------------------------------------------------------- chunked head and loss
class LargestLogits(TorchDispatchMode):
    """The most logits rows in one tensor, forward and backward; (32, 40) is the head's gradient."""
    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.ndim == 2 and t.shape[1] == 40 and t.shape[0] != 32:
                self.rows = max(self.rows, t.shape[0])
        return out


def test_chunked_terms_are_exact_and_small():
    """Cross-entropy and KL, values and gradients, against the plain computation; and no tensor of all logits,
    in the forward or in the backward pass. Chunking that keeps every chunk for the backward would still be
    caught by the memory row of BENCH.md, a plain call is caught here.
    """
    model, g = random_model(), torch.Generator().manual_seed(0)
    h = torch.randn(50, 32, generator=g, requires_grad=True)
    h_teacher, x0 = torch.randn(50, 32, generator=g), torch.randint(0, 40, (50,), generator=g)
    config = SimpleNamespace(tau=1.5)

    def terms(h, h_teacher, x0):
        return tad.token_terms(model.head(h), model.head(h_teacher).detach(), x0, config)

    def run(**kw):
        for t in (h, model.head.weight):
            t.grad = None
        with LargestLogits() as seen:
            out = nt_model.by_chunks(terms, 40, h, h_teacher, x0, **kw)
            out.square().sum().backward()
        return out.detach(), h.grad, model.head.weight.grad, seen.rows
    plain, chunked = run(), run(chunk_bytes=4 * 40 * 7)
    assert plain[3] == 50 and chunked[3] == 7
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-5) for a, b in zip(plain[:3], chunked[:3]))
    assert chunked[0].shape == (50, 2)
    assert nt_model.by_chunks(terms, 40, h[:0], h_teacher[:0], x0[:0]).shape == (0, 2)


@pytest.mark.parametrize("facts", list(CONFIGS))
def test_hidden_of_chosen_columns(facts):
    """out: the same states as the whole row's, whatever the family; the last block computes no others."""
    model = random_model(**CONFIGS[facts])
    ids = torch.stack(prompts_of([12, 12]))
    valid = torch.arange(12) >= torch.tensor([[0], [3]])
    cols = torch.tensor([[0, 5, 5, 11], [3, 4, 9, 2]])
    whole, n = model.hidden(ids, valid), []
    model.blocks[-1].down_proj.register_forward_hook(lambda m, x, y: n.append(y.shape[1]))
    some = model.hidden(ids, valid, out=cols)
    want = whole.gather(1, cols[..., None].expand(-1, -1, whole.shape[-1]))
    real = valid.gather(1, cols)
    assert n == [4] and torch.allclose(some[real], want[real], atol=1e-5)
