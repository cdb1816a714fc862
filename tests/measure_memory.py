"""Peak memory, measured: prints rows of BENCH.md. Not part of the suite, which counts and does not measure.

    python -m pytest -s tests/measure_memory.py     # Linux
"""
import os
import subprocess
import sys

import torch
from checkpoints import official_checkpoint, raw_config
from conftest import ROOT

import bench
import model as nt_model

PEAK = """
import re, sys, threading, time
import torch
import torch.distributed as dist
import lora, model, run, tad
torch.set_num_threads(1)
class Peak(threading.Thread):
    # the largest anonymous memory in between, MiB: pages that are mapped from a file are not counted
    def now(self):
        return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10
    def run(self):
        self.at, self.top = self.now(), 0
        while not self.top < 0:
            self.top = max(self.top, self.now())
            time.sleep(0.001)
    def grown(self):
        top, self.top = self.top, -10**9
        return top - self.at
peak = Peak(daemon=True)
"""
LOSS = PEAK + """
n, V, C = 2048, 32000, 256
head, h, x0 = torch.nn.Linear(C, V, bias=False), torch.randn(n, C, requires_grad=True), torch.arange(n)
peak.start(); time.sleep(0.05)
terms = lambda h, t, x0: tad.token_terms(head(h), head(t).detach(), x0, tad.Config())
rows = h, torch.randn(n, C), x0
(model.by_chunks(terms, V, *rows) if sys.argv[1] == 'chunked' else terms(*rows)).sum().backward()
print(peak.grown())
"""
LOADING = PEAK + """
dist.init_process_group('gloo')
cpu, how = torch.device('cpu'), sys.argv[2]
run.shard(model.load('tiny'), cpu, train=True)  # what is imported and set up once
peak.start(); time.sleep(0.05)
m = model.load(sys.argv[1], cpu, torch.bfloat16 if how == 'mapped' else torch.float32)
m = run.shard(m, cpu, train=True)
grown, own = peak.grown(), sum(run.local(p).numel() for p in m.parameters()) * 4 >> 20
if dist.get_rank() == 0: print(grown, own)
dist.barrier(); dist.destroy_process_group()
"""

DECODING = PEAK + """
import sample
from ctypes import pythonapi
prompts, s = [torch.arange(128)], dict(gen_len=256, block_len=32, policy='static', per_step=32, cache='dual')
tiny = model.load('tiny')
sample.generate(tiny, [torch.arange(9)], gen_len=16, block_len=8)  # what is imported and set up once
pythonapi.mallopt(-3, 1 << 17)  # glibc's own at the start: as if this were the first model
before = peak.now()
m = model.load(sys.argv[2], only_decodes=sys.argv[1] == 'once')
weights = sum(4 * p.numel() for p in m.parameters()) >> 20
cache = m.cfg.n_layer * (128 + 256 + 1) * 2 * m.cfg.d_model * 4 >> 20
for call in range(2):
    peak = Peak(daemon=True)
    peak.start()
    sample.generate(m, prompts, **s)
    print(peak.top - before, end=' ')
print(weights + cache)
"""


def measured(code, *args, torchrun=(), malloc=dict(MALLOC_MMAP_THRESHOLD_="65536")):
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, *torchrun, *map(str, args)] if torchrun else
                          [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True,
                          env={**own, "PYTHONPATH": str(ROOT), **malloc})
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(x) for x in done.stdout.split()]


def test_peak_memory_of_the_loss(tmp_path):
    """2,048 rows over 32,000 tokens, forward and backward of TAD's loss: whole, and in chunks of 64 MiB."""
    peaks = {how: measured(LOSS, how)[0] for how in ("plain", "chunked")}
    print(f"\n| {peaks['plain']} MiB | {peaks['chunked']} MiB |")
    assert peaks["plain"] > 4 * 250 and peaks["chunked"] < peaks["plain"] / 2  # logits: 250 MiB


def test_peak_memory_of_decoding(tmp_path):
    """On a CPU, batch 1: llada-60m, and a model in whose weights the head has the share that it has in Dream-7B's
    and LLaDA-8B's. A model that may train keeps its weights beside the packed ones; those of a file of fp32
    weights are not counted, since they stay mapped.
    """
    large = raw_config("dream", vocab_size=30_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=24,
                       num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    peaks = {}
    for name, cfg in {"llada-60m": bench.SHAPES["llada-60m"], "389 M": nt_model.config_from_json(large)}.items():
        for dtype in (torch.float32, torch.bfloat16):
            nt_model.save(bench.random_weights(cfg).to(dtype), tmp_path)  # mapped when it is loaded
            for how in ("once", "beside")[:1 + (name == "llada-60m")]:
                peaks[f"{name}, {how}, of a file of {dtype}"] = measured(DECODING, how, tmp_path, malloc={})
    for how, (first, second, least) in peaks.items():
        print(f"\n| {how} | {first} MiB, {first / least:.2f} x | {second} MiB, {second / least:.2f} x | {least} MiB |")
    assert all(max(both) < 1.1 * least for how, (*both, least) in peaks.items() if "once" in how)
    assert peaks["llada-60m, beside, of a file of torch.bfloat16"][1] > 1.5 * peaks["llada-60m, once, of a file of torch.bfloat16"][1]


def test_peak_memory_of_loading_shards(tmp_path):
    """A bf16 checkpoint to fp32 shards on two ranks: mapped and block by block, or loaded in fp32 first."""
    folder = official_checkpoint(tmp_path / "base", "dream", tokenizer=False, vocab_size=4_000,
                                 hidden_size=512, intermediate_size=1408, num_hidden_layers=12,
                                 num_attention_heads=8, num_key_value_heads=4, dtype=torch.bfloat16)
    (tmp_path / "loading.py").write_text(LOADING)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    peaks = {}
    for how in ("mapped", "fp32"):
        peaks[how], shard = measured("", tmp_path / "loading.py", folder, how, torchrun=torchrun)
    print(f"\n| {shard} MiB | {peaks['mapped']} MiB | {peaks['fp32']} MiB |")
    assert shard <= peaks["mapped"] < 1.5 * shard and peaks["fp32"] > 1.9 * shard


def test_peak_memory_of_loading(tmp_path):
    """At most the weights and one shard: 192.6M parameters, two bf16 shards, loaded in a process of its own
    (with -s it prints the rows of BENCH.md).
    """
    folder = official_checkpoint(tmp_path, "dream", tokenizer=False, vocab_size=50_000, hidden_size=1024,
                                 intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
                                 num_key_value_heads=4, dtype=torch.bfloat16)
    # VmHWM, not ru_maxrss: a child inherits its parent's ru_maxrss
    code = ("import re, sys, torch, model\n"
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
            "model.load('tiny'); before = peak()\n"
            "m = model.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))\n"
            "print(peak() - before, sum(p.numel() * p.element_size() for p in m.parameters()))")
    shard = max(f.stat().st_size for f in nt_model.weight_files(folder))
    for dtype in ("float32", "bfloat16"):
        grown, weights = measured(code, folder, dtype)
        print(f"\n| {dtype} | {weights >> 20} MiB | {shard >> 20} MiB | {grown >> 20} MiB |")
        assert grown <= 1.02 * (weights + shard)
        assert dtype == "bfloat16" or grown >= weights  # the measurement sees the weights
