"""The decoder's step under torch.compile: one graph per shape, no recompile, no wait for the device inside.
CI counts; it never looks at a clock. Most tests let dynamo capture the graphs and run them as they are
(backend "eager"); inductor's code is run once per family.
"""
import copy
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import official_checkpoint
from conftest import CONFIGS, FIXTURES, prompts_of, random_model
from safetensors.torch import load_file, save_file
from test_sample import same
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import layers
import lora
import model as nt_model
import sample
from sample import Batch, Decoding, Rows, generate, reference

SETTINGS = dict(gen_len=12, block_len=4, policy="threshold", threshold=0.5, cache="dual")


# ----------------------------------------------------------------------------------------- the same decoding
RULES = dict(
    dual=dict(cache="dual"), prefix=dict(cache="prefix", policy="factor", threshold=1.0),
    vicinity=dict(cache="vicinity", vicinity=3, policy="static", per_step=2),
    multiblock=dict(cache="prefix", policy="multiblock", threshold=1.0),
    exact=dict(cache="exact", policy="static", steps=3),
    sampling=dict(cache="none", policy="entropy", threshold=1.0, temperature=0.7, top_p=0.9))


@pytest.mark.parametrize("name, rules", [  # a graph takes seconds: every rule, every kind of model
    ("grouped", "dual prefix vicinity multiblock"), ("shift", "dual"), ("block", "exact sampling"),
    ("all", "prefix")])
def test_compiled_equals_the_reference(graphs, name, rules):
    model, prompts = random_model(**CONFIGS[name]), prompts_of([2, 9, 5, 7])
    for case in map(RULES.get, rules.split()):
        settings, n = {**SETTINGS, **case}, len(graphs)
        outs = generate(model, prompts, batch_size=3, compiled=True, **settings)
        assert len(graphs) > n
        if settings.get("temperature"):
            assert all(same(a, b) for a, b in zip(outs, generate(model, prompts, batch_size=3, **settings)))
            outs, prompts = outs[:1], prompts[:1]  # the reference draws prompt 0's numbers
        for prompt, out in zip(prompts, outs):
            assert same(out, reference(model, prompt, **settings)), case


@pytest.mark.parametrize("name, cache", [("shift", "dual"), ("block", "exact")])
def test_inductor_equals_the_reference(name, cache):
    """The real compiler, a model of each attention pattern, one layer: compiling takes long."""
    torch._dynamo.reset()
    model, prompts = random_model(**CONFIGS[name], num_hidden_layers=1), prompts_of([2, 9, 5])
    settings = {**SETTINGS, "cache": cache}
    outs = generate(model, prompts, compiled=True, **settings)
    assert all(same(out, reference(model, p, **settings)) for p, out in zip(prompts, outs))


# ------------------------------------------------------------------------------------- breaks and recompiles
@pytest.mark.parametrize("cache", ["dual", "none"])
def test_no_recompile_after_warm_up(graphs, monkeypatch, cache):
    """Other models, lengths, numbers of prompts, paces, thresholds, rows that are free: all run on the graphs
    of the warm-up. There is a set of graphs for every batch size (a power of two) and every 32 columns.
    """
    model, settings = random_model(), {**SETTINGS, "cache": cache}
    generate(model, prompts_of([9, 12, 3, 5, 7]), batch_size=4, compiled=True, **settings)
    after_warm_up = len(graphs)
    assert after_warm_up == (2 if cache == "dual" else 1)  # the window and the refresh
    for seed, n in enumerate((3, 4, 9, 18)):
        longest = (1, 12, 15, 19)[seed]  # + 12 + 1 columns: 32 at most
        lengths = torch.randint(0, longest, (n - 1,), generator=torch.Generator().manual_seed(seed))
        prompts = prompts_of(lengths.tolist() + [longest], seed=seed)
        settings = {**settings, "threshold": 0.4 + 0.1 * seed, "seed": seed}
        generate(random_model(seed=seed), prompts, batch_size=4, compiled=True, **settings)
    assert len(graphs) == after_warm_up
    # broken: refreshes of whatever length, windows as wide as the slowest row happens to need
    if cache == "none":
        monkeypatch.setattr(Batch, "row_numbers", lambda self, rows: torch.tensor(rows))
    else:
        monkeypatch.setattr(Batch, "window_width", lambda self, start: self.P + self.s.gen_len - start)
    generate(model, prompts_of([9, 12, 3, 5, 7]), batch_size=4, compiled=True, **settings)
    assert len(graphs) > after_warm_up


class Recorded:
    """A CUDA graph without CUDA: inside of it nothing runs, and a replay runs it on the same tensors."""
    def __init__(self):
        self.calls = []

    def replay(self):
        for step, args in self.calls:
            step(*args)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The decoder compiles its parts and replays graphs, on plain layers -> [the graphs that were captured],
    {shape of a step: rows of a refresh or None, columns of the batch}.
    """
    captured, shapes, inner, open_graph = [], set(), Batch.__init__, []

    @contextmanager
    def capturing(graph, pool):
        captured.append(graph)
        open_graph.append(graph)
        yield
        open_graph.clear()

    def init(self, *args, **kw):
        inner(self, *args, **kw)
        step, shape = self.step, self.rows.canvas.shape

        def tensors():
            return [t.data_ptr() for t in [*vars(self.rows).values(), *(self.cache.k + self.cache.v if self.cache else [])]]
        places = tensors()

        def stepping(rows, width):
            assert tensors() == places and self.forwards < 200  # a graph writes where it wrote, and a decoding ends
            shapes.add((rows is not None and len(rows), width, shape))
            return open_graph[0].calls.append((step, (rows, width))) if open_graph else step(rows, width)
        self.step = stepping
    monkeypatch.setattr(Batch, "capture", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(Batch, "__init__", init)
    monkeypatch.setattr(layers, "can_pack", lambda *args: False)
    for name, value in dict(CUDAGraph=Recorded, graph=capturing, graph_pool_handle=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured, shapes


@pytest.mark.parametrize("name, rules", [("shift", "dual"), ("block", "exact")])
def test_the_gpus_arrangement_compiles_three_graphs_per_shape(graphs, as_on_a_gpu, monkeypatch, name, rules):
    """A refresh (of 2, 4 ... rows): the blocks, the last of them, the step's end. A window has no other last
    block. Nothing else is compiled, however many batches follow, and replays do what the reference does.
    """
    captured, shapes = as_on_a_gpu
    for seed in range(3):
        model, settings = random_model(**CONFIGS[name], seed=seed), {**SETTINGS, **RULES[rules], "seed": seed}
        lengths = torch.randint(0, 12, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        prompts = prompts_of([12, *lengths], seed=seed) if seed else prompts_of([2, 9, 5, 7, 12])
        outs = generate(model, prompts, batch_size=4, compiled=True, **settings)
        if not seed:
            assert all(same(out, reference(model, prompt, **settings)) for prompt, out in zip(prompts, outs))
        assert len(graphs) == sum(3 if rows else 2 for rows, *_ in shapes)
    assert {rows for rows, *_ in shapes if rows} <= {2, 4} and len({columns for *_, columns in shapes}) == 1
    assert len(captured) >= 4 and all(len(graph.calls) == 1 for graph in captured)
    # broken: a refresh of as many rows as there happen to be
    before = len(graphs)
    monkeypatch.setattr(Batch, "row_numbers", lambda self, rows: torch.tensor(rows))
    generate(model, prompts_of([9, 12, 3, 5, 7]), batch_size=4, compiled=True, **settings)
    assert len(graphs) > before


def test_a_graph_break_is_an_error(graphs, monkeypatch):
    model, prompts, settings = random_model(num_hidden_layers=1), prompts_of([9, 12]), {**SETTINGS, "cache": "none"}
    generate(model, prompts, compiled=True, **settings)  # whole
    inner = sample.advance

    def printing(x, s):
        print("a block may be full")
        inner(x, s)

    def branching(x, s):
        if x.masked.any():
            x.nfe = x.nfe + 0
        inner(x, s)
    for broken in (printing, branching):
        monkeypatch.setattr(sample, "advance", broken)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            generate(model, prompts, compiled=True, **settings)


# -------------------------------------------------------------------------------------------------- syncs
class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for a device: reads of values, and shapes that hang on values."""
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "equal", "is_nonzero",
             "bincount", "repeat_interleave")
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITS) or (name.lstrip("_").startswith("index") and any(
                isinstance(i, torch.Tensor) and i.dtype == torch.bool
                for i in (args[1] if isinstance(args[1], (list, tuple)) else []))):
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_syncs(monkeypatch):
    """Every wait inside the batch's own methods; tolist, numpy and copies to the CPU bypass the dispatcher on
    a CPU and are counted by name, and so are copies to the device that would wait for it.
    """
    mode = Syncs()
    for name in ("tolist", "numpy", "cpu", "to"):
        inner = getattr(torch.Tensor, name)

        def counted(self, *a, inner=inner, name=name, **kw):
            inside = mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            moves = name != "to" or (a and isinstance(a[0], (str, torch.device))
                                     and not kw.get("non_blocking"))
            mode.count += bool(inside and moves)
            return inner(self, *a, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    for name in ("run", "finished", "admit"):
        def watched(self, *a, inner=getattr(Batch, name)):
            with mode:
                return inner(self, *a)
        monkeypatch.setattr(Batch, name, watched)
    yield mode


def count_syncs(monkeypatch, settings, n_prompts=24):
    """(waits, forwards) of a run over prompts of mixed lengths."""
    batches, inner = [], Batch.__init__
    model, prompts = random_model(), prompts_of([3 + i % 11 for i in range(n_prompts)])
    with monkeypatch.context() as m, counting_syncs(m) as syncs:
        m.setattr(Batch, "__init__", lambda self, *a, **kw: batches.append(self) or inner(self, *a, **kw))
        generate(model, prompts, batch_size=4, **{"sync_every": 4, **settings})  # as on a GPU
    # a look is a copy to the CPU, and then a read of that copy, which waits for nothing
    return syncs.count - batches[0].looks, batches[0].forwards


CASES = {"threshold": dict(SETTINGS, early_stop=True), "none": dict(SETTINGS, cache="none"),
         "prefix": dict(SETTINGS, cache="prefix"), "multiblock": dict(SETTINGS, policy="multiblock",
                                                                      cache="prefix", threshold=1.0),
         "static": dict(SETTINGS, policy="static", early_stop=False),
         "sampling": dict(SETTINGS, temperature=1.0, top_p=0.9, top_k=5)}


@pytest.mark.parametrize("case", list(CASES))
def test_the_host_waits_once_in_four_forwards(monkeypatch, case):
    waits, forwards = count_syncs(monkeypatch, CASES[case])
    assert 0 < waits <= forwards / 4


def test_one_token_per_forward_has_a_fixed_trip_count(monkeypatch):
    settings = dict(SETTINGS, policy="static", early_stop=False, gen_len=32, block_len=16)
    waits, forwards = count_syncs(monkeypatch, settings, n_prompts=8)
    assert forwards == 2 * 32 and waits == 2 * 2  # a look when a block is done


@pytest.mark.parametrize("broken", ["if", "nonzero", "bool index", "bool write", "unique", "tolist", "to cpu",
                                    "sync_every"])
def test_the_sync_guard_fails_on_broken_copies(monkeypatch, broken):
    inner, settings = sample.advance, dict(CASES["threshold"])

    def advance(x, s):
        if broken == "if" and x.masked.any():
            x.nfe = x.nfe + 0
        if broken == "nonzero":
            x.masked.nonzero()
        if broken == "bool index":
            x.canvas[x.masked]
        if broken == "bool write":
            x.canvas[x.masked] = x.canvas[x.masked.clone()][:1]
        if broken == "unique":
            x.start.unique()
        if broken == "tolist":
            x.start.tolist()
        if broken == "to cpu":
            x.start.to("cpu")
        inner(x, s)
    monkeypatch.setattr(sample, "advance", advance)
    if broken == "sync_every":
        settings["sync_every"] = 1
    waits, forwards = count_syncs(monkeypatch, settings)
    assert waits > forwards / 4


# ------------------------------------------------------------------------------------ layers for decoding
def test_packed_layers_are_the_same_layers():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this CPU build of torch has no oneDNN")
    model = lora.add(random_model(qkv_bias=True), r=4, alpha=8)
    for _, m in lora.adapters(model):
        torch.nn.init.normal_(m.lora_B, std=0.1)
    ids = prompts_of([20])[0][None]
    fast = layers.for_decoding(model)
    with torch.no_grad():
        assert (fast(ids) - model(ids)).abs().max() < 1e-3
        with lora.off(model):
            base, fast_base = model(ids), layers.for_decoding(model)(ids)
        assert (fast_base - base).abs().max() < 1e-3 and (base - model(ids)).abs().max() > 0.1
    assert fast.embed.weight is model.embed.weight and lora.adapters(model) and not lora.adapters(fast)
    n = len(layers.PACKED)
    del fast, model
    assert len(layers.PACKED) == n - 18  # nothing outlives it: one with the adapters, one without


@pytest.mark.parametrize("settings", [{}, dict(tied=True), dict(qkv_bias=True, n_kv_head=1), dict(tied=True, qk_norm=True)])
def test_a_model_that_only_decodes_holds_its_weights_once(monkeypatch, settings):
    """Packed, its own linear layers are empty, a tied embedding is not; the second call packs nothing."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this CPU build of torch has no oneDNN")
    model, prompts = random_model(**settings), prompts_of([9, 4])
    own, decoding = copy.deepcopy(model), dict(gen_len=16, block_len=8, threshold=0.2)
    own.only_decodes, model.only_decodes = False, True
    want, numbers = sample.generate(own, prompts, **decoding), []
    inner = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(layers.torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: numbers.append(1) or inner(*args), raising=False)
    for packed in (len(model.blocks) * 4 + 1, 0):  # q, k, v and gate, up are joined
        numbers.clear()
        outs = sample.generate(model, prompts, **decoding)
        assert len(numbers) == packed
        assert all(torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order) for a, b in zip(want, outs))
    assert torch.equal(model.embed.weight, own.embed.weight)
    kept = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight") or name == "head.weight")
    assert kept == 0 and sum(p.numel() for p in own.parameters()) > 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "a2d_qwen2_mdlm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_only_decodes_leaves_its_weights_in_the_file(tmp_path, monkeypatch, family, dtype):
    """Until they are packed, and then they are the same: tied (A2D), with biases (Dream, A2D); where nothing packs, too."""
    nt_model.save(nt_model.load(FIXTURES / f"{family}_A").to(dtype), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({"lm_head.weight": tensors.get("model.embed_tokens.weight", torch.empty(0)).clone(), **tensors}
              if family.startswith("a2d") else tensors, file)  # a tied head may be stored, too
    plain, model = nt_model.load(tmp_path), nt_model.load(tmp_path, only_decodes=True)
    assert not plain.only_decodes and model.only_decodes and plain.head.weight.dtype == torch.float32
    later = {name for name, p in model.named_parameters() if p.dtype != torch.float32}
    linear = {name for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"}
    assert later == (linear if dtype != torch.float32 and layers.can_pack("cpu", torch.float32) else set())
    settings = dict(gen_len=16, block_len=8, threshold=0.3, cache="none")
    want, outs = (generate(m, prompts_of([9, 4]), **settings) for m in (plain, model))
    assert all(map(same, want, outs)) and all(torch.equal(a.conf, b.conf) for a, b in zip(want, outs))
    monkeypatch.setattr(layers, "can_pack", lambda *args: False)
    model = nt_model.load(tmp_path, only_decodes=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model(torch.arange(9)[None]), plain(torch.arange(9)[None]))
    generate(model, prompts_of([9, 4]), **settings)


@pytest.mark.parametrize("odd", [dict(vocab_size=273), dict(intermediate_size=47)])
def test_weights_in_the_file_are_not_summed_before_they_are_packed(tmp_path, odd):
    """Of 16 bits and no multiple of four in number, they could not be; and the whole file would be read once more."""
    official_checkpoint(tmp_path, "dream", tokenizer=False, dtype=torch.bfloat16, hidden_size=30, num_attention_heads=3,
                        num_key_value_heads=3, **odd)
    a, b = (generate(nt_model.load(tmp_path, only_decodes=only), prompts_of([9]), gen_len=16, block_len=8, cache="none")[0]
            for only in (True, False))
    assert same(a, b) and torch.equal(a.conf, b.conf)


def test_packing_leaves_no_holes_and_decoding_keeps_its_arrays(monkeypatch):
    """glibc is told so, around packing; a model that only decodes keeps small arrays only, of a single prompt."""
    said, threshold, inner = [], layers.M_MMAP_THRESHOLD, layers.with_linear
    for module in (layers, sample):
        monkeypatch.setattr(module, "mallopt", lambda *setting: said.append(setting))
    monkeypatch.setattr(layers, "with_linear", lambda *args: said.append("packed") or inner(*args))
    model = random_model()
    layers.for_decoding(model)
    assert said[:3] == [(threshold, 1 << 19), (layers.M_TRIM_THRESHOLD, 1 << 30), "packed"]
    assert said[-1] == (threshold, 1 << 25) and set(said[3:-1]) == {"packed"}
    for only_decodes, n, batch_size, kept in ((False, 1, 8, 25), (False, 8, 8, 25), (True, 1, 8, 19), (True, 8, 1, 19), (True, 2, 8, 25)):
        model.only_decodes = only_decodes
        said.clear()
        generate(model, prompts_of([4] * n), batch_size, gen_len=4, block_len=4)
        assert said == [(threshold, 1 << kept)]


def test_another_c_library_than_glibc():
    code = "import ctypes, torch; ctypes.pythonapi = object(); import sample, model\n" \
           "print(sample.generate(model.load('tiny'), [torch.arange(5)], gen_len=4, block_len=4)[0].nfe)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=layers.__file__.rpartition("/")[0])
    assert not done.returncode and int(done.stdout) > 0, done.stderr


@pytest.mark.parametrize("packed", [True, False])
def test_the_decoder_is_made_again_only_when_the_model_changes(monkeypatch, packed):
    """One packing for many calls; a change of any kind is seen, and the model stays as it was."""
    monkeypatch.setattr(layers, "can_pack", lambda *args: packed)
    made, inner = [], layers.with_linear
    monkeypatch.setattr(layers, "with_linear", lambda *args: made.append(args[0]) or inner(*args))
    model = lora.add(random_model(qkv_bias=True), r=2, alpha=4)
    ids, weights = prompts_of([9])[0][None], {name: p.clone() for name, p in model.named_parameters()}

    def made_again():
        made.clear()
        with torch.no_grad():
            assert (layers.for_decoding(model)(ids) - model(ids)).abs().max() < 1e-3
        return bool(made)
    assert made_again() and not made_again() and not made_again()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with lora.off(model):
        assert made_again() and not made_again()
    assert made_again() and not made_again()
    block, (_, adapter) = model.blocks[1], lora.adapters(model)[0]
    for p in (adapter.lora_A, adapter.lora_B):
        p.grad = torch.ones_like(p)
    torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=0.1, fused=True).step()  # it counts no version
    assert made_again() and not made_again()
    adapter.alpha = 40
    assert made_again() and not made_again()
    block.v_proj.weight.data.view(-1)[3] = 2.0
    assert made_again() and not made_again()
    model.cfg = replace(model.cfg, eos_ids=(7,))
    assert made_again() and layers.for_decoding(model).cfg.eos_ids == (7,)
    for weight in (block.k_proj.weight, block.q_proj.bias, model.embed.weight, block.mlp_norm.weight):
        weight.data.mul_(1.5)
        assert made_again() and not made_again()
    block.up_proj.weight.data = torch.randn_like(block.up_proj.weight)
    assert made_again() and not made_again()
    lora.merge(model)
    assert made_again() and not made_again()
    block.gate_proj.weight.data.mul_(2)
    with torch.inference_mode():  # what it makes must not keep the model from being trained
        assert made_again() and not made_again()
    model.requires_grad_(True)(ids).sum().backward()
    assert block.q_proj.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", [lambda t: t[:1].neg_(), lambda t: t[-1:].mul_(1.02), lambda t: t.mul_(-2.0), lambda t: t.mul_(4.0)])
def test_every_weight_counts_in_what_a_decoder_is_made_from(dtype, change):
    model = random_model(qkv_bias=True, qk_norm=True).to(dtype)
    for name, p in model.requires_grad_(False).named_parameters():
        p.view(-1)[[0, -1]] += 1.0  # none of them is 0
        before = layers.state_of(model)
        assert before == layers.state_of(model)
        change(p.view(-1))
        assert before != layers.state_of(model), name


@pytest.mark.parametrize("case", list(CASES))
def test_the_step_reads_no_value(case):
    """The step on tensors without values: a read of one, and a shape that hangs on values, raise here."""
    s, cfg, T, R = Decoding(**CASES[case]), random_model().cfg, 64, 3
    with torch.device("meta"):
        model = nt_model.Transformer(cfg)
    shapes = {name: p.shape for name, p in model.state_dict().items()}

    def zeros(*shape, dtype=torch.long):
        return torch.zeros(shape, dtype=dtype)
    with FakeTensorMode(), torch.no_grad():
        model.load_state_dict({k: zeros(*v, dtype=torch.float32) for k, v in shapes.items()}, assign=True)
        rows, cache = Rows.new([(4 + i, zeros(4 + i + s.gen_len), 0) for i in range(R)], s, cfg, T), None
        if s.cache != "none":
            cache = nt_model.KVCache(cfg, rows.valid, rows.positions, torch.float32)
        sample.step(model, rows, cache, s, zeros(2), s.scored_len, sample.conclude)
        if cache is not None:
            sample.step(model, rows, cache, s, None, s.block_len, sample.conclude)
        for broken in (lambda: bool(rows.masked.any()), lambda: rows.start.tolist(), rows.masked.nonzero,
                       rows.start.unique):  # what the guard is for
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                broken()


@pytest.mark.parametrize("cached", ["dual", "prefix"])
def test_the_baselines_of_the_benchmark_are_fast_dllm(cached):
    """Their tokens and forwards on the official sampler's recorded cases, and ours on tokens per forward."""
    model, seen = nt_model.load(FIXTURES / "llada_A"), 0
    for case in json.loads((FIXTURES / "llada_A" / "samplers.json").read_text())["cases"]:
        if not re.fullmatch(rf"fast_{cached}_p\d_thrNone", case["name"]):
            continue
        (prompt,) = case["settings"]["prompt"]
        s = Decoding(policy="static", early_stop=False, gen_len=16, block_len=8)
        ids, nfe = bench.fast_dllm(model, torch.tensor(prompt), s, cached)
        assert [prompt + ids.tolist()] == case["ids"] and nfe == case["forwards"]
        seen += 1
    assert seen >= 2
    for settings in (dict(per_step=2), dict(per_step=3, block_len=5), dict(gen_len=13, block_len=4)):
        s = Decoding(**dict(policy="static", early_stop=False, gen_len=16, block_len=8) | settings)
        ids, nfe = bench.fast_dllm(model, torch.tensor(prompt), s, cached)
        (ours,) = generate(model, [torch.tensor(prompt)], **vars(replace(s, cache=cached)))
        assert torch.equal(ids, ours.ids) and nfe == ours.nfe
