"""What decoding costs, measured beside the uncached reference in the same run.

    python tools/bench.py --batch_size 1 --policy static --no-early_stop            # the embedded model
    python tools/bench.py llada-8b --batch_size 32 --policy static --no-early_stop  # a real shape
    python tools/bench.py llada-60m --batch_size 1 --compiled --profile             # where the time goes

Random weights of a real shape: choose the static policy. The last line is all as one JSON object.
"""
import json
import re
import resource
import statistics
import sys
from dataclasses import dataclass

import torch
from torch.profiler import profile
from torch.utils.benchmark import timer

import compare  # noqa: F401, first: it puts the folder above on the path
import cli
import data
import eval as nt_eval
import sample
from cli import UserError, option, run_cli
from layers import PackedLinear, can_pack, with_linear
from model import Config, Transformer, decoding_defaults, default_device

_LLADA = dict(rope_theta=5e5, norm_eps=1e-5, rope_fp32=True)
_QWEN = dict(max_len=4096, pad_id=151643, eos_ids=(151643, 151645))
SHAPES = {  # the public config.json files; llada-60m is a small one of our own, for a CPU
    "llada-8b": Config("llada", 126464, 32, 32, 32, 128, 4096, 12288, 4096, 126336, (126081, 126348), 126081,
                       **_LLADA),
    "dream-7b": Config("dream", 152064, 28, 28, 4, 128, 3584, 18944, mask_id=151666, qkv_bias=True,
                       shift=True, **_QWEN),
    "sdar-4b": Config("sdar", 151936, 36, 32, 8, 128, 2560, 9728, mask_id=151669, qk_norm=True, block_len=4,
                      **_QWEN),
    "llada-60m": Config("llada", 32000, 8, 8, 8, 64, 512, 1536, 4096, 31999, (31998,), 31998, **_LLADA),
}


def random_weights(cfg, device="cpu", dtype=torch.float32):
    """A model of a shape, built on the meta device and filled on `device`."""
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    return model.to_empty(device=device).init_weights(generator).eval()


def timed(what, call, n=3):
    """Call once, then n times -> the last result, seconds of the first call, median seconds of the others."""
    times = []
    for _ in cli.progress_bar(range(n + 1), what):
        began = timer()  # when the device is done
        result = call()
        times.append(timer() - began)
    return result, times[0], statistics.median(times[1:])


def roofline(batch, step_ms):
    """How much a forward over the windows, or the canvases, uses of what the device reaches -> dict."""
    cfg, rows, window = batch.model.cfg, len(batch.prompts), batch.cache is not None
    T = max(map(len, batch.prompts)) + batch.s.gen_len  # padding does not count
    columns = batch.window_width(batch.P) + sample.reach(batch.s, cfg) if window else T
    projections = cfg.d_model * (2 * cfg.head_dim * (cfg.n_head + cfg.n_kv_head) + 3 * cfg.d_mlp)
    head = cfg.vocab_size * cfg.d_model
    attention = 2 * cfg.n_head * cfg.head_dim * T  # multiply-adds per token
    scored = min(batch.s.scored_len, columns)
    flop = 2 * rows * (columns * cfg.n_layer * (projections + attention) + scored * head)
    size = batch.model.embed.weight.element_size()
    keys = 2 * rows * T * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * size if window else 0
    n_bytes = (cfg.n_layer * projections + head) * size + keys
    gb_per_s, tflop_per_s = n_bytes / step_ms / 1e6, flop / step_ms / 1e9
    device, dtype = default_device()
    scale = 4 if torch.cuda.is_available() else 1
    big = torch.ones(2**26 * scale, device=device)
    other = torch.empty_like(big)
    gb_limit = 2 * big.nbytes / timed("copy", lambda: other.copy_(big))[2] / 1e9  # read and written
    n = 2048 * scale
    layer = torch.nn.Linear(n, n, False, device, dtype)
    x = layer.weight
    if can_pack(x):
        layer = with_linear(layer, PackedLinear)
    tflop_limit = 2 * n**3 / timed("matrix product", lambda: layer(x))[2] / 1e12
    if re.search("H[12]00", nt_eval.device_name()):
        tflop_limit = 989.0  # dense bf16, by the data sheet
    return dict(
        gb_per_s=gb_per_s, bandwidth_share=gb_per_s / gb_limit,
        tflop_per_s=tflop_per_s, peak_tflop_per_s=tflop_limit, flop_share=tflop_per_s / tflop_limit)


@torch.no_grad()
def measure(model, prompts, args, s):
    """-> the facts that are printed, and a forward of the same work to look into. s: sample.Decoding."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    how = {key: getattr(args, key) for key in nt_eval.HOW}

    def decode():
        batch = sample.Batch(model, prompts, s, len(prompts), **how)
        return batch, [out for _, out in sample.decode(batch)]

    def reference():
        with model.embed.weight.device as device:
            return sample.reference(model, prompts[0].to(device), **{**vars(s), "cache": "none"})

    def n_tokens(out):  # a response ends with its first EOS where decoding stops there
        return out.n_tokens(model.cfg.eos_ids) if s.early_stop else s.gen_len
    (batch, outs), first_run_s, run_s = timed("decode", decode)
    tokens, nfe = sum(map(n_tokens, outs)), sum(out.nfe for out in outs)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    facts = dict(
        **nt_eval.provenance(), threads=torch.get_num_threads(), dtype=nt_eval.dtype_name(model),
        model=args.shape or args.model,
        parameters=sum(p.numel() for p in model.parameters()),
        batch=len(prompts), prompt_len=max(map(len, prompts)),
        **vars(s), **how,
        compiled_now=batch.compiled, first_run_s=first_run_s, run_s=run_s,
        peak_gib=(torch.cuda.max_memory_allocated() or resident) / 2**30,
        tok_per_s=tokens / run_s,
        samples_per_h=3600 * len(outs) / run_s,
        tpf=tokens / nfe, nfe=nfe,
        forwards=batch.forwards, ms_per_forward=1000 * run_s / batch.forwards,
        forwards_per_look=batch.forwards / batch.looks)
    everyone = list(range(len(batch.owner)))
    batch.admit(dict(enumerate(everyone)))
    rows, width = batch.row_numbers(everyone), batch.window_width(batch.P)
    forwards = {"whole_ms": lambda: batch.forward(rows, batch.s.scored_len)}
    if batch.cache is not None:
        forwards["window_ms"] = lambda: batch.forward(None, width)
    for name, forward in forwards.items():  # the median does not see the calls that compile
        facts[name] = 1000 * timed(name, forward, 11)[2]
    facts |= roofline(batch, facts[name])
    alone, _, alone_s = timed("reference", reference)
    facts.update(reference_nfe=alone.nfe, reference_tok_per_s=n_tokens(alone) / alone_s,
                 reference_ms_per_forward=1000 * alone_s / alone.nfe)
    if s.policy == "static" and not s.early_stop:  # else its one prompt is not the batch's work
        facts["speedup"] = facts["tok_per_s"] / facts["reference_tok_per_s"]
    return facts, forward


@dataclass
class Options(nt_eval.AdaptedModel):
    shape: str = option("", positional=True)  # llada-8b, dream-7b, sdar-4b, llada-60m [--model instead]
    batch_size: int = 32  # prompts decoded at once
    prompt_len: int = 128  # of random prompts
    compiled: bool | None = None  # torch.compile [on a GPU]
    sync_every: int = 4  # forwards between two looks of the host at the device
    profile: bool = False  # and where the time goes


def main():
    args, given = cli.parse(__doc__, Options, sample.Decoding)
    if args.shape and args.shape not in SHAPES:
        raise UserError(f"no shape {args.shape}: choose one of {', '.join(SHAPES)}, or give --model instead")
    if args.shape:
        model = random_weights(SHAPES[args.shape], *default_device())
    else:
        model, tok = nt_eval.load_both(args)
    if args.shape or args.model != "tiny":
        torch.manual_seed(0)
        prompts = list(torch.randint(0, model.cfg.vocab_size // 2, (args.batch_size, args.prompt_len)))
    else:
        prompts = [tok.prompt_ids(p["prompt"]) for p in data.load_problems("tiny", "test", args.batch_size)]
    settings = decoding_defaults(model.cfg) | given
    facts, forward = measure(model, prompts, args, sample.Decoding(**settings))
    facts = {key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()}
    for key, value in facts.items():
        print(f"{key:>26}  {value}")
    if args.profile:
        with torch.no_grad(), profile() as traced:
            timed("profile", forward, 9)
        print(traced.key_averages().table(f"self_{default_device()[0]}_time_total", row_limit=15))
    print(json.dumps(facts))


if __name__ == "__main__":
    run_cli(main)
