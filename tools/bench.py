"""What decoding costs, measured in turns with what a user would take instead, on the same weights.
    python tools/bench.py --model llada-8b --batch_size 32           # random weights of a real shape
`uncached` is the reference decoder, `fast_dllm_X` a plain loop with a cache of Fast-dLLM's: all eager, one
prompt, the layers as they are. All reveal --per_step tokens per forward, and none stops at an EOS."""
import json
import math
import statistics
import tomllib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.profiler import profile
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

import compare  # noqa: F401, first: it puts the folder above on the path
import cli
import eval as nt_eval
import lora
import sample
from cli import UserError, run_cli
from model import HERE, KVCache, Transformer, config_from_json, decoding_defaults, default_device, load

SHAPES = {name: config_from_json(raw) for name, raw in tomllib.loads(
    cli.read_text(HERE / "assets" / "shapes.toml")).items()}


def random_weights(cfg, device="cpu", dtype=torch.float32):
    """A model of a shape, built on the meta device and filled on `device`."""
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    return model.to_empty(device=device).init_weights(generator).eval()


@torch.no_grad()
def fast_dllm(model, prompt, s, cached):
    """Fast-dLLM (arXiv 2505.22618), its "dual" or "prefix" cache, s.per_step per forward -> ids (L,), nfe."""
    cfg, nfe = model.cfg, 0
    x = F.pad(prompt[None], (0, s.gen_len), value=cfg.mask_id)
    column = torch.arange(x.shape[1], device=x.device)[None]
    cache = KVCache(cfg, column >= 0, column, model.embed.weight.dtype)
    for block in column[:, len(prompt):].split(s.block_len, 1):
        seen = block if cached == "dual" else column[:, block[0, 0]:]
        fresh = False
        while (masked := x.gather(1, block) == cfg.mask_id).any():
            if fresh:
                logits = model(x.gather(1, seen), cache=cache, cols=seen)[:, :s.block_len]
            else:  # the published code scores the whole canvas here
                logits = model(x, cache=cache, rows=column[0, :1])[:, block[0]]
            token, confidence, *_ = sample.pick_tokens(logits, cfg, s)
            best = masked & (sample.place_of(confidence, masked) < s.per_step)
            x[0, block[best]] = token[best]
            nfe, fresh = nfe + 1, True
    return x[0, len(prompt):], nfe


def flop_of(call):
    """Of its products; torch's own formula for attention wants as many heads in key as in query."""
    own = {torch.ops.nanotraj.packed_linear: lambda x, tag, *_, **__: 2 * math.prod(x) * tag[0]}
    for kind in "flash_attention efficient_attention cudnn_attention flash_attention_for_cpu".split():
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}")
        own[operator] = lambda query, key, *_, **__: 4 * math.prod(query) * key[2]
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        call()
    return counter.get_total_flops()


def in_turns(what, n, **calls):
    """Call each n + 1 times, in turns -> last results, seconds of the first calls, medians of the others."""
    results, seconds = {}, {name: [] for name in calls}
    for _ in cli.progress_bar(range(n + 1), what):
        for name, call in calls.items():
            results[name] = None  # its cache need not lie beside the next one
            start = timer()  # when the device is done
            results[name] = call()
            seconds[name].append(timer() - start)
    first = {name: times[0] for name, times in seconds.items()}
    return results, first, {name: statistics.median(times[1:]) for name, times in seconds.items()}


@torch.no_grad()
def measure(model, prompts, args, s):
    """-> the facts that are printed, and a forward of the same work to look into. s: sample.Decoding."""
    cfg, n = model.cfg, len(prompts)
    one = prompts[0].to(model.embed.weight.device)
    def uncached():
        with one.device:
            return sample.reference(model, one, **vars(s) | {"cache": "none"})
    others = {"uncached": uncached}
    if not (cfg.shift or cfg.block_len):  # it is for LLaDA
        for cached in ("dual", "prefix"):
            others[f"fast_dllm_{cached}"] = partial(fast_dllm, model, one, s, cached)
    def decode(compiled):
        batch = sample.Batch(model, prompts, s, n, compiled=compiled)
        return batch, [out for _, out in sample.decode(batch)]
    def forwards(batch):
        batch.admit(dict(enumerate(range(n))))
        rows, width = batch.row_numbers(batch.busy()), batch.window_width(batch.P)
        found = {"whole_ms": lambda: batch.forward(rows, s.scored_len)}
        if batch.cache is not None:
            found["window_ms"] = lambda: batch.forward(None, width)
        return found
    flop_of_ours = flop_of(lambda: decode(False))  # first, so that there is one cache at a time
    n_flop = flop_of([*forwards(sample.Batch(model, prompts, s, n, compiled=False)).values()][-1])
    results, first, seconds = in_turns("decode", args.turns, ours=lambda: decode(args.compiled), **others)
    batch, outs = results["ours"]
    facts = dict(
        **nt_eval.provenance(),
        model=args.model, batch=n, prompt_len=args.prompt_len,
        **vars(s), compiled=batch.compiled,
        first_s=first["ours"],
        tok_per_s=n * s.gen_len / seconds["ours"],
        samples_per_h=3600 * n / seconds["ours"],
        nfe=sum(out.nfe for out in outs), forwards=batch.forwards, looks=batch.looks)
    for name, call in others.items():  # how many times its time and its products, for as many prompts
        facts[f"time_of_{name}"] = n * seconds[name] / seconds["ours"]
        facts[f"flop_of_{name}"] = n * flop_of(call) / flop_of_ours
    for name, forward in forwards(batch).items():
        facts[name] = 1000 * in_turns(name, 11, it=forward)[2]["it"]
    ms = facts[name]
    n_bytes = sum(p.nbytes for p in [*model.blocks.parameters(), model.head.weight])
    if batch.cache is not None:
        n_bytes += sum(t.nbytes for t in batch.cache.k + batch.cache.v)
    facts.update(
        gb_per_s=n_bytes / ms / 1e6,
        tflop_per_s=n_flop / ms / 1e9)  # of an H100's 989 (dense bf16, by the data sheet)
    return facts, forward


@dataclass
class Options(nt_eval.AdaptedModel):
    model: str = "tiny"  # preset, hub id, directory; random: llada-8b, dream-7b, sdar-4b, llada-60m
    batch_size: int = 32  # prompts decoded at once
    prompt_len: int = 128  # of random prompts
    compiled: bool | None = None  # torch.compile [on a GPU]
    turns: int = 5  # of which the medians are shown
    profile: bool = False  # and where the time goes


def main():
    args, given = cli.parse(__doc__, Options, sample.Decoding)
    if args.model in SHAPES and not args.revision:
        model = random_weights(SHAPES[args.model], *default_device())
    else:
        model = load(args.model, *default_device(), args.revision)
    if args.adapter:
        lora.load(model, args.adapter)
    torch.manual_seed(0)
    prompts = torch.randint(model.cfg.mask_id, (args.batch_size, args.prompt_len))
    s = sample.Decoding(**decoding_defaults(model.cfg) | dict(policy="static", early_stop=False) | given)
    if s.policy != "static" or s.steps or s.early_stop or s.temperature:
        raise UserError("--policy, --steps, --early_stop, --temperature: all here reveal the --per_step best")
    sample.check_used(s)
    facts, forward = measure(model, list(prompts), args, s)
    for key, value in facts.items():
        print(f"{key:>26} ", f"{value:.4g}" if isinstance(value, float) else value)
    if args.profile:
        with torch.no_grad(), profile() as traced:
            in_turns("profile", 9, it=forward)
        print(traced.key_averages().table(f"self_{default_device()[0]}_time_total", row_limit=15))
    print(json.dumps(facts))


if __name__ == "__main__":
    run_cli(main)
