"""What decoding costs, measured beside the uncached reference in the same run: `python sample.py --bench`.

    python sample.py --bench --batch_size 1 --policy static --no-early_stop       # the embedded model
    python sample.py --bench llada-8b --batch_size 32 --policy static --no-early_stop   # a real shape
    python sample.py --bench llada-60m --batch_size 1 --compiled --profile   # and where the time goes

Random weights in a real shape give honest times of a forward, but meaningless tokens: choose the static
policy for them. The last line is one JSON object.
"""
import json
import platform
import statistics
import sys
import time

import torch
from tqdm import tqdm

import sample
from layers import PackedLinear, can_pack, with_linear
from model import Config, Transformer, UserError, default_device

_IDS = dict(max_len=4096, pad_id=151643, eos_ids=(151643, 151645))
SHAPES = {  # the public config.json files; llada-60m is a small one of our own, for a CPU
    "llada-8b": Config("llada", 126464, 32, 32, 32, 128, 4096, 12288, 4096, 126336, (126081, 126348), 126081,
                       rope_theta=5e5, norm_eps=1e-5, rope_fp32=True),
    "dream-7b": Config("dream", 152064, 28, 28, 4, 128, 3584, 18944, mask_id=151666, qkv_bias=True,
                       shift=True, **_IDS),
    "sdar-4b": Config("sdar", 151936, 36, 32, 8, 128, 2560, 9728, mask_id=151669, qk_norm=True, block_len=4,
                      **_IDS),
    "llada-60m": Config("llada", 32000, 8, 8, 8, 64, 512, 1536, 4096, 31999, (31998,), 31998,
                        rope_theta=5e5, norm_eps=1e-5, rope_fp32=True),
}
PEAK_TFLOPS = {"H100": 989, "H200": 989}  # dense bf16


def random_weights(cfg, device="cpu", dtype=torch.float32, std=0.02):
    """A model of a shape, built on the meta device and filled on `device`."""
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if name.endswith("norm.weight") else p.normal_(std=std, generator=generator)
    return model


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(call, device, n=3):
    """Median of n timed calls, after one that is not counted."""
    call()
    times = []
    for _ in range(n):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def device_limits(device, dtype):
    """What this device reaches: copying (GB/s read and written), and a large matrix product (TFLOP/s)."""
    cuda = torch.device(device).type == "cuda"
    big = torch.empty((2**31 if cuda else 2**28) // 4, dtype=torch.float32, device=device).fill_(1)
    other = torch.empty_like(big)
    gb_per_s = 2 * big.nbytes / seconds(lambda: other.copy_(big), device, 5) / 1e9
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    layer = torch.nn.Linear(n, n, bias=False, device=device, dtype=dtype)
    layer = with_linear(layer, PackedLinear) if can_pack(layer.weight) else layer
    with torch.no_grad():
        return gb_per_s, 2 * n**3 / seconds(lambda: layer(a), device, 5) / 1e12


def step_costs(batch):
    """Median milliseconds of a forward over the windows, and over the whole canvases (None: no cache)."""
    batch.admit({row: row for row in range(len(batch.owner))})
    rows, width = batch.numbers(list(range(len(batch.owner)))), batch.width(batch.P)
    calls = {"whole_ms": lambda: batch.forward(rows, batch.s.width)}
    if batch.cache is not None:
        calls["window_ms"] = lambda: batch.forward(None, width)
    costs = {"window_ms": None}
    for name, call in calls.items():
        for _ in range(2):  # compiled, captured
            call()
        costs[name] = 1000 * seconds(call, batch.dev, 9)
    return costs


def flop_and_bytes(batch, rows, columns, T, window):
    """Of a forward over `columns` of `rows` rows of T: floating-point operations, bytes that must be read."""
    cfg = batch.model.cfg
    projections = (cfg.d_model * cfg.head_dim * 2 * (cfg.n_head + cfg.n_kv_head)
                   + 3 * cfg.d_model * cfg.d_mlp)
    head = cfg.vocab_size * cfg.d_model
    attention = 2 * cfg.n_head * cfg.head_dim * T  # multiply-adds per token
    flop = 2 * rows * (columns * cfg.n_layer * (projections + attention) + min(batch.s.width, columns) * head)
    size = batch.model.embed.weight.element_size()
    keys = 2 * rows * T * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * size if window else 0
    weight_size = 1 if batch.int8 else size
    return flop, (cfg.n_layer * projections + head) * weight_size + keys


def decode_cost(model, prompts, settings, how, repeats):
    """Whole runs through the decoder -> dict; the first one compiles and is not counted."""
    s, runs = sample.Decoding(**settings), []
    for _ in tqdm(range(repeats + 1), unit="run", desc="decode"):
        wait(model.embed.weight.device)
        began = time.perf_counter()
        batch = sample.Batch(model, prompts, s, len(prompts), range(len(prompts)), **how)
        outs = [out for _, out in sample.decode(batch)]
        wait(batch.dev)
        runs.append(time.perf_counter() - began)
    took, nfe = statistics.median(runs[1:]), sum(out.nfe for out in outs)
    tokens = sum(out.n_tokens(model.cfg.eos_ids) for out in outs) if s.early_stop else len(outs) * s.gen_len
    return batch, dict(
        first_run_s=runs[0], run_s=took, tok_per_s=tokens / took, samples_per_h=3600 * len(outs) / took,
        tpf=tokens / nfe, nfe=nfe, forwards=batch.forwards, ms_per_forward=1000 * took / batch.forwards,
        forwards_per_look=batch.forwards / batch.looks)


def reference_cost(model, prompt, settings):
    """The uncached eager reference, one prompt -> dict."""
    device, outs = model.embed.weight.device, []

    def call():
        with torch.device(device):
            outs.append(sample.reference(model, prompt.to(device), **{**settings, "cache": "none"}))
    took = seconds(call, device, 3)
    tokens = outs[0].n_tokens(model.cfg.eos_ids) if settings["early_stop"] else settings["gen_len"]
    return dict(reference_tok_per_s=tokens / took, reference_nfe=outs[0].nfe,
                reference_ms_per_forward=1000 * took / outs[0].nfe)


def make_prompts(model, name, batch_size, length):
    """Problems of the tiny task for the tiny model, else random ids."""
    if name == "tiny":
        import data
        tok = data.load_tokenizer("tiny")
        return [tok.prompt_ids(p["prompt"]) for p in data.load_problems("tiny", "test", batch_size)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, model.cfg.vocab_size // 2, (length,), generator=generator)
            for _ in range(batch_size)]


@torch.no_grad()
def run(model, name, settings, batch_size, prompt_len, how, repeats=3, profile=False):
    """Measure and print; the last line is JSON. how: compiled, sync_every, int8 of sample.Batch."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    prompts = make_prompts(model, name, batch_size, prompt_len)
    sample.check_prompts(model.cfg, prompts, sample.Decoding(**settings))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    batch, cost = decode_cost(model, prompts, settings, how, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_resident_gib()
    gb_limit, tflop_limit = device_limits(device, dtype)
    fresh = sample.Batch(model, prompts, batch.s, len(prompts), range(len(prompts)), **how)
    costs = step_costs(fresh)
    window = costs["window_ms"] is not None
    n, length = len(prompts), max(map(len, prompts)) + settings["gen_len"]  # padding does not count
    columns = fresh.width(fresh.P) + sample.reach(fresh.s, model.cfg) if window else length
    flop, read = flop_and_bytes(fresh, n, columns, length, window)
    ms = costs["window_ms"] or costs["whole_ms"]
    name_of = (torch.cuda.get_device_name() if cuda
               else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    peak_of = next((v for k, v in PEAK_TFLOPS.items() if k in name_of), None)
    gb_per_s, tflops = read / ms / 1e6, flop / ms / 1e9
    facts = dict(
        device=name_of, dtype=str(dtype).removeprefix("torch."), torch=torch.__version__,
        python=platform.python_version(), model=name, parameters=sum(p.numel() for p in model.parameters()),
        batch=n, prompt_len=max(map(len, prompts)), **{k: settings[k] for k in (
            "gen_len", "block_len", "cache", "policy", "threshold", "per_step", "early_stop")}, **how,
        compiled_now=batch.compiled, **cost, **costs, gb_per_s=gb_per_s, bandwidth_share=gb_per_s / gb_limit,
        tflop_per_s=tflops, flop_share=tflops / (peak_of or tflop_limit),
        flop_share_of=f"{peak_of} TFLOP/s, dense bf16" if peak_of else f"{tflop_limit:.3g} TFLOP/s, measured",
        peak_gib=peak, **reference_cost(model, prompts[0], settings))
    # with early stop or sampling the reference's one prompt is not the batch's work
    alike = not settings["early_stop"] and settings["policy"] == "static"
    facts["speedup"] = facts["tok_per_s"] / facts["reference_tok_per_s"] if alike else None
    report(facts)
    if profile:
        print_profile(fresh, window)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}))


def peak_resident_gib():
    """Of this process, so far; Linux and macOS."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def report(f):
    kind = "window" if f["window_ms"] else "whole canvas"
    print(f"{f['model']} ({f['parameters'] / 1e6:.1f} M parameters, {f['dtype']}) on {f['device']}, "
          f"torch {f['torch']}\n"
          f"batch {f['batch']}, prompt {f['prompt_len']}, response {f['gen_len']} in blocks of "
          f"{f['block_len']}, policy {f['policy']}, cache {f['cache']}, "
          f"{'compiled' if f['compiled_now'] else 'eager'}{', int8' if f['int8'] else ''}\n"
          f"  {f['tok_per_s']:.1f} tok/s   {f['samples_per_h']:.0f} samples/h   TPF {f['tpf']:.2f}   "
          f"{f['ms_per_forward']:.2f} ms per forward   {f['forwards_per_look']:.1f} forwards per sync\n"
          f"  {kind}: {f['window_ms'] or f['whole_ms']:.2f} ms   refresh: {f['whole_ms']:.2f} ms   "
          f"{f['gb_per_s']:.1f} GB/s ({f['bandwidth_share']:.0%} of what a copy reaches)   "
          f"{f['tflop_per_s']:.3g} TFLOP/s ({f['flop_share']:.0%} of {f['flop_share_of']})\n"
          f"  peak memory {f['peak_gib']:.2f} GiB   first run {f['first_run_s']:.1f} s\n"
          f"  uncached eager reference, batch 1: {f['reference_tok_per_s']:.1f} tok/s, "
          f"{f['reference_ms_per_forward']:.2f} ms per forward, nfe {f['reference_nfe']}"
          + (f"; this decoder is {f['speedup']:.2f} x as fast" if f["speedup"] else ""))


def print_profile(batch, window):
    """Where a forward's time goes."""
    from torch.profiler import ProfilerActivity, profile
    cuda = batch.dev.type == "cuda"
    rows = None if window else batch.numbers(list(range(len(batch.owner))))
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as traced:
        for _ in range(10):
            batch.forward(rows, batch.width(batch.P) if window else batch.s.width)
        wait(batch.dev)
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(traced.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))


def shape(name):
    if name not in SHAPES:
        raise UserError(f"--bench {name}: choose one of {', '.join(SHAPES)}, or none to measure --model")
    return SHAPES[name]


def main(args, settings, load_model):
    """Called by `sample.py --bench`."""
    how = dict(compiled=args.compiled, sync_every=args.sync_every, int8=args.int8)
    model = random_weights(shape(args.bench), *default_device()) if args.bench else load_model()
    run(model, args.bench or str(args.model), settings, args.batch_size, args.prompt_len, how,
        profile=args.profile)
