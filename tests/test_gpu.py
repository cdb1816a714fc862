"""Real shapes, random weights, on a GPU. `pytest -m gpu -s tests/test_gpu.py` prints the rows of BENCH.md."""
import copy
import importlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import raw_config
from conftest import ROOT, command, prompts_of
from safetensors.torch import load_file

import bench
import data
import lora
import model as nt_model
import run
import sample
import tad
from model import rotate

PARAMETERS = {"llada-8b": 8_015_581_184, "dream-7b": 7_615_616_512, "sdar-4b": 4_411_424_256}
cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def milliseconds(call, device, n=5):
    def wait():
        if device == "cuda":
            torch.cuda.synchronize()
    call()
    wait()
    began = time.perf_counter()
    for _ in range(n):
        call()
    wait()
    return 1000 * (time.perf_counter() - began) / n


def forward_and_lora_step(model, device, length=512):
    """-> ms of a forward (batch 1), ms of a LoRA step (r = 128, all matrices, batch 1), finite logits?"""
    ids = torch.randint(0, 250, (1, length), device=device)
    with torch.no_grad():
        finite = bool(model(ids).isfinite().all())
        forward_ms = milliseconds(lambda: model(ids), device)
    lora.add(model, 128, 128).train()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-4)

    def step():
        h = model.hidden(ids)[0, ::2]  # half of the positions carry loss
        F.cross_entropy(model.head(h).float(), ids[0, ::2]).backward()
        opt.step()
        opt.zero_grad()
    step_ms = milliseconds(step, device)
    assert all(p.isfinite().all() for p in params) and any(m.lora_B.any() for _, m in lora.adapters(model))
    return forward_ms, step_ms, finite


def small_model(family="llada"):
    model = bench.random_weights(nt_model.config_from_json(raw_config(family)))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if not name.endswith("norm.weight"):
            p.data.normal_(std=0.3, generator=generator)
    return model


def tad_micro_batch(model, teacher, examples, cfg, device, plain):
    """Loss of one TAD micro-batch, half of the response revealed. plain: as one would write it first, with
    the logits of all positions and a copied teacher.
    """
    b = tad.make_batch(examples, [None] * len(examples), cfg, 8, model.cfg)
    if not plain:
        return tad.training_loss(model, teacher, {**b, "teacher_prompts": b["prompts"]}, cfg)[0]
    inputs, cols = data.response_inputs(model.cfg, b["prompts"], b["xt"])
    inputs = {k: None if t is None else t.to(device) for k, t in inputs.items()}
    row, j = b["masked"].nonzero(as_tuple=True)
    with torch.no_grad():
        teacher_logits = teacher(**inputs).float()
    logits = model(**inputs).float()
    at, x0 = (row.to(device), cols[row, j].to(device)), b["x0"][b["masked"]].to(device)
    ce, kl = tad.token_terms(logits[at], teacher_logits[at], x0, cfg).unbind(1)
    return tad.tad_loss(ce, kl, b["near"][b["masked"]].to(device), row.to(device), len(examples), cfg)[0]


def lora_step(base, device, batch, length, plain):
    """-> a TAD step (LoRA r = 128, all matrices; AdamW) to call, the list to which it adds its loss."""
    torch.manual_seed(0)
    teacher = copy.deepcopy(base) if plain else None
    model = lora.add(base, 128, 128).train()
    if device == "cuda" and not plain:
        run.compile_blocks(model)
    teacher, half = teacher or model, length // 2
    g = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 250, (batch, length), generator=g).tolist()
    examples = [(dict(id=0, prompt_ids=text[:half], x0=text[half:], order=list(range(half))), half // 2)
                for text in texts]
    cfg = tad.Config(batch_size=batch, teacher_prompt="plain")
    params, losses = run.trainable(model).values(), []
    opt = torch.optim.AdamW(params, lr=1e-3) if plain else run.adamw(params, replace(cfg, lr=1e-3))

    def step():
        loss = tad_micro_batch(model, teacher, examples, cfg, device, plain)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return step, losses


def test_the_chunked_step_is_the_plain_step_on_a_cpu(monkeypatch):
    monkeypatch.setattr(nt_model.by_chunks, "__kwdefaults__", {"chunk_bytes": 4 * 272 * 3})  # three rows
    found = []
    for plain in (False, True):
        step, losses = lora_step(small_model(), "cpu", 2, 32, plain)
        milliseconds(step, "cpu", n=2)
        found.append(losses)
    assert len(set(found[1])) == 3 and all(abs(a - b) < 1e-4 for a, b in zip(*found))


def error_of_a_block(model):
    """Of the first block in the model's dtype, on its device: norm of the difference from fp32 on a CPU, relative."""
    cfg, block = model.cfg, model.blocks[0]
    x, positions = torch.randn(1, 64, cfg.d_model, generator=torch.Generator().manual_seed(0)), torch.arange(64)[None]
    angles = nt_model.rope_angles(cfg, positions)
    here = block.q_proj.weight
    with torch.no_grad():
        got = block(x.to(here), *(t.to(here.device) for t in angles), None).cpu().float()
        want = copy.deepcopy(block).cpu().float()(x.to(here.dtype).float(), *angles, None)
    return float((got - want).norm() / want.norm())


def test_the_error_of_a_block_is_that_of_its_dtype():
    model = small_model("dream")
    assert error_of_a_block(model) == 0 and 1e-4 < error_of_a_block(model.bfloat16()) < 0.02
    with pytest.MonkeyPatch.context() as patch:  # what the bound is for: the device turns queries and keys another way
        patch.setattr(nt_model, "rotate", lambda x, cos, sin: x if x.dtype == torch.bfloat16 else rotate(x, cos, sin))
        assert error_of_a_block(model) > 0.02


def check_trained(folder):
    """Every tensor is finite, and none is what it was: the tiny model's own, or 0 as an adapter's B."""
    (file,) = folder.glob("*.safetensors")
    base = load_file(ROOT / "weights/tiny/model.safetensors")
    for name, t in load_file(file).items():
        assert t.isfinite().all() and (t != base.get(name, torch.zeros(()))).any(), name


@pytest.mark.parametrize("flags", [["--full"], []])
def test_a_trained_folder_is_told_from_one_that_is_not(tmp_path, flags):
    words = "--n_problems 2 --batch_size 2 --micro_batch 2 --max_steps 1 --eval_problems 0 --out run".split()
    done = command(tmp_path, "tad.py", *words, *flags)
    assert done.returncode == 0, done.stderr
    check_trained(tmp_path / ("run/model" if flags else "run/adapter"))
    for folder in (ROOT / "weights/tiny", tmp_path / "new"):
        if folder == tmp_path / "new":
            lora.save(lora.add(nt_model.load("tiny"), 4, 8), folder)
        with pytest.raises(AssertionError):
            check_trained(folder)


def test_the_measurement_itself_on_a_cpu():
    forward_ms, step_ms, finite = forward_and_lora_step(small_model(), "cpu", length=32)
    assert finite and forward_ms > 0 and step_ms > 0


def test_the_script_for_a_gpu_runs_with_small_models(tmp_path, monkeypatch):
    """Every Python command of tools/gpu_first.sh; of pytest's, that there is a test for each of its choices."""
    (tmp_path / "calls").mkdir()
    for name, line in {"nvidia-smi": "", "python3": 'printf "%s\\0" "$@" > "$(mktemp calls/$(date +%s%N)-XXX)"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    script, path = ROOT / "tools/gpu_first.sh", f"{tmp_path}:{os.environ['PATH']}"
    for part in ("first", "more"):
        subprocess.run(["bash", script, part], check=True, cwd=tmp_path, env=os.environ | dict(PATH=path, OUT="out"))
    calls = [file.read_text().split("\0")[:-1] for file in sorted((tmp_path / "calls").iterdir())]
    assert len(calls) == 2 + 5 + 6  # both parts print versions
    for name in bench.SHAPES:
        monkeypatch.setitem(bench.SHAPES, name, small_model(name.split("-")[0]).cfg)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", lambda *args: (dict(n=1), lambda: None))
    monkeypatch.setattr(sample.Batch, "forward", sample.Batch.forward)  # measure_collection changes it
    ours = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", __file__], check=True,
                          capture_output=True, text=True).stdout.lower().splitlines()
    for program, *words in calls:
        code = words.pop(0).replace('"cuda", torch.bfloat16', '"cpu"') if program == "-c" else ""
        monkeypatch.setattr(sys, "argv", [program, *words])
        if program == "-m":
            for choice in words[words.index("-k") + 1].lower().split(" or "):
                needed = [word for word in choice.split(" and ") if not word.startswith("not ")]
                assert any(all(word in name for word in needed) for name in ours), choice
        elif program == "-c":
            exec(code, {})
        else:
            importlib.import_module(Path(program).stem).main(*(words if "collection" in program else []))


def test_the_shapes_have_the_real_parameter_counts():
    for name, n in PARAMETERS.items():
        with torch.device("meta"):
            model = nt_model.Transformer(bench.SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) == n


class TestOnAGpu:
    pytestmark = cuda

    @pytest.mark.parametrize("shape", list(PARAMETERS))
    def test_real_shapes_forward_and_lora_step(self, shape):
        torch.cuda.reset_peak_memory_stats()
        model = bench.random_weights(bench.SHAPES[shape], "cuda", torch.bfloat16)
        assert error_of_a_block(model) < 0.02
        forward_ms, step_ms, finite = forward_and_lora_step(model, "cuda")
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"\n| {shape} | {torch.cuda.get_device_name()} | bf16, 1 x 512 | forward {forward_ms:.1f} ms "
              f"| LoRA step {step_ms:.1f} ms | peak {peak:.1f} GiB |")
        assert finite
        del model
        torch.cuda.empty_cache()

    @pytest.mark.parametrize("batch, length", [(4, 512), (1, 2048)])
    def test_lora_step_against_the_plain_one(self, batch, length):
        n, first = PARAMETERS["llada-8b"], []
        for plain in (False, True):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            base = bench.random_weights(bench.SHAPES["llada-8b"], "cuda", torch.bfloat16)
            step, losses = lora_step(base, "cuda", batch, length, plain)
            tok_per_s, peak = 1000 * batch * length / milliseconds(step, "cuda"), torch.cuda.max_memory_allocated() / 2**30
            print(f"\n| {'plain' if plain else 'tad.py'} | {torch.cuda.get_device_name()} "
                  f"| {batch} x {length} | {tok_per_s:.0f} tok/s | MFU {tok_per_s * 6 * n / 989e12:.1%} "
                  f"| {peak:.1f} GiB |")
            assert torch.tensor(losses).isfinite().all()
            first.append(losses[0])
            del base, step
        assert abs(first[0] - first[1]) < 0.02 * first[1]  # of the same weights and examples, in bf16

    @pytest.mark.parametrize("flags", [["--full"], ["--fsdp"], []])
    def test_nccl_with_one_process(self, tmp_path, flags):
        done = subprocess.run(  # it writes to the terminal: a look at where it is
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
             str(ROOT / "tad.py"), "--n_problems", "24", "--max_steps", "4", "--eval_problems", "0", "--out",
             str(tmp_path / "run"), *flags])
        final = tmp_path / "run" / ("model" if flags == ["--full"] else "adapter")
        assert done.returncode == 0
        check_trained(final)

    @pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_decodes_as_on_a_cpu(self, monkeypatch, family, compiled):
        """Eager, and compiled with CUDA graphs: ids, order and nfe of the CPU's reference in fp32."""
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        own = "exact" if family == "sdar" else "dual"
        cases = [dict(cache=own), dict(cache="prefix"), dict(cache="none"),
                 dict(cache="dual", policy="static", per_step=1, early_stop=False),
                 dict(cache=own, temperature=0.7, top_p=0.9), dict(cache=own, temperature=1.0, top_k=5)]
        if family != "sdar":
            cases += [dict(cache="vicinity", vicinity=3),
                      dict(cache="prefix", policy="multiblock", threshold=3.0)]
        cpu, gpu = small_model(family), small_model(family).cuda()
        gpu.load_state_dict(cpu.state_dict())
        prompts = prompts_of([3, 17, 9, 30, 5], vocab=250)
        for case in cases:
            settings = dict(gen_len=24, block_len=8, policy="threshold", threshold=0.15) | case
            outs = sample.generate(gpu, prompts, batch_size=3, compiled=compiled, **settings)
            # the reference draws the random numbers of the first prompt
            for prompt, out in list(zip(prompts, outs))[:1 if "temperature" in case else None]:
                ref = sample.reference(cpu, prompt, **settings)
                assert torch.equal(out.ids, ref.ids) and torch.equal(out.order, ref.order), case
                assert out.nfe == ref.nfe

    def test_no_host_sync_between_two_looks(self):
        """CUDA's sync debug mode raises on any wait inside run(), once all is compiled and captured."""
        model, s = small_model().cuda(), sample.Decoding(gen_len=32, block_len=8, cache="dual", threshold=0.1)
        prompts = prompts_of([3 + i % 20 for i in range(32)], vocab=250)
        batch, replayed = sample.Batch(model, prompts, s, 8, range(32)), []
        run_inner, forward_inner = batch.run, batch.forward

        def strictly(call, *args, mode="error"):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                call(*args)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        def forward(rows, width):
            graph = batch.graphs.get((None if rows is None else len(rows), width))
            replayed.append(graph is not None)
            strictly(forward_inner, rows, width, mode="error" if graph else "default")
        batch.run, batch.forward = lambda: strictly(run_inner), forward
        assert len(list(sample.decode(batch))) == 32
        assert sum(replayed) > 8 and batch.looks <= batch.forwards / 4

    @pytest.mark.parametrize("batch_size", [1, 4, 32])
    def test_sampling_compiles_over_a_real_vocabulary(self, monkeypatch, batch_size):
        cfg = replace(bench.SHAPES["dream-7b"], n_layer=1, d_model=256, d_mlp=256)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        model = bench.random_weights(cfg, "cuda")  # fp32, so that a CPU draws the same
        for kw in (dict(top_p=0.95), dict(top_k=50)):
            prompts = prompts_of([9] * batch_size, vocab=250)
            settings = dict(gen_len=8, block_len=8, temperature=1.0, early_stop=False) | kw
            outs = sample.generate(model, prompts, **settings)
            ref = sample.reference(copy.deepcopy(model).cpu(), prompts[0], **settings)
            assert torch.equal(outs[0].ids, ref.ids) and torch.equal(outs[0].order, ref.order)
            assert all(sorted(out.rank.tolist()) == list(range(8)) for out in outs)
            assert len({tuple(out.ids.tolist()) for out in outs}) == batch_size  # each row has its own numbers
