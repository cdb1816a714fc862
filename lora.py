"""LoRA (Hu et al., arXiv 2106.09685), written by hand: y = W x + b + (alpha / r) B A dropout(x).

    lora.add(model, r=16, alpha=16, dropout=0.0, targets=lora.ALL)   # freezes the base, adapters stay fp32
    with lora.off(model):    # the base model: same weights, no second copy
        teacher_logits = model(ids)
    lora.save(model, dir)    # PEFT's layout, official module names: `peft` loads it on the official model
    lora.load(model, dir)
    lora.merge(model)        # plain nn.Linear again

    # a checkpoint without adapters
    python lora.py merge --model tiny --adapter out/tad-tiny/adapter --to merged
"""
import argparse
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

import model as nt_model
from model import NAMES, UserError, official_name, read_json

# in our names, every family
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter.
    `weight` and `bias` keep their names, so base checkpoints still fit.
    """

    def __init__(self, linear, r, alpha, dropout):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.r, self.alpha, self.dropout, self.enabled = r, alpha, dropout, True
        fp32 = dict(dtype=torch.float32, device=linear.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # B = 0: the adapted model starts as the base

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        h = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
        return y + F.linear(self.alpha / self.r * F.linear(h, self.lora_A), self.lora_B).to(y.dtype)

    def merged(self):
        """A plain nn.Linear with W + alpha/r B A: added in fp32, rounded once to the weight's dtype."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        delta = self.alpha / self.r * (self.lora_B.float() @ self.lora_A.float())
        linear.weight = nn.Parameter((self.weight.float() + delta).to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def adapters(model):
    """(our module name, LoRALinear) pairs of a model, in module order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def add(model, r, alpha, dropout=0.0, targets=ALL):
    """Freeze the model and put an adapter on every block's `targets` (names as in ALL). Returns the model."""
    unknown = sorted(set(targets) - set(ALL))
    if unknown or not targets:
        raise UserError(f"LoRA targets {unknown or list(targets)}: choose from {', '.join(ALL)}")
    if r < 1:
        raise UserError(f"LoRA rank is {r}: it must be at least 1")
    if adapters(model):
        raise UserError("the model already carries LoRA adapters: merge them first")
    model.requires_grad_(False)
    for block in model.blocks:
        for name in targets:
            setattr(block, name, LoRALinear(getattr(block, name), r, alpha, dropout))
    return model.train(model.training)  # new layers follow the model: no dropout in eval mode


@contextmanager
def off(model):
    """Inside, the model is its base."""
    layers = [m for _, m in adapters(model)]
    before = [m.enabled for m in layers]
    for m in layers:
        m.enabled = False
    try:
        yield model
    finally:
        for m, enabled in zip(layers, before):
            m.enabled = enabled


def merge(model):
    """Replace every adapter by a plain linear layer with the sum.
    In bf16 small adapters lose digits: merge in fp32.
    """
    for name, layer in adapters(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged())
    return model


@torch.no_grad()
def unsharded(model, device="cpu", dtype=None, keep=True):
    """A plain copy of a model that is spread over ranks, adapters included; a plain model as it is.
    Every rank must call it; where keep is False it gets None.
    """
    if not nt_model.is_sharded(model):
        return model
    state = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        if keep:
            kind = p.dtype if "lora_" in name or dtype is None else dtype
            state[name] = whole.detach().to(device, kind, copy=True)
    if not keep:
        return None
    with torch.device("meta"):
        plain, pairs = nt_model.Transformer(model.cfg), adapters(model)
        if pairs:
            layer = pairs[0][1]
            add(plain, layer.r, layer.alpha, layer.dropout, {name.rpartition(".")[2] for name, _ in pairs})
    if model.cfg.tied:
        state["head.weight"] = state["embed.weight"]
    plain.load_state_dict(state, assign=True)
    if model.cfg.tied:
        plain.head.weight = plain.embed.weight
    plain.revision = model.revision
    return plain.eval()


def state_dict(model):
    """Adapter tensors under PEFT's names: base_model.model.<official module>.lora_A.weight."""
    return {f"base_model.model.{official_name(model.cfg, name)}.{part}.weight":
            getattr(m, part).detach().cpu()
            for name, m in adapters(model) for part in ("lora_A", "lora_B")}


def save(model, folder, base=""):
    """Write adapter_config.json and adapter_model.safetensors in PEFT's layout.
    base: name of the base model; the presets of hub models are written as their hub ids.
    """
    base = nt_model.PRESETS.get(base, base) if base != "tiny" else base
    pairs = adapters(model)
    if not pairs:
        raise UserError("the model carries no LoRA adapters: nothing to save")
    folder, layer = Path(folder), pairs[0][1]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state_dict(model).items()}, folder / "adapter_model.safetensors",
              metadata={"format": "pt"})
    # a pattern, not a list: PEFT matches a list by suffix, and LLaDA's head is called ff_out as down_proj is
    names = NAMES[model.cfg.family]
    kinds = sorted({names[name.rpartition(".")[2]] for name, _ in pairs})
    targets = rf"{re.escape(names['block'])}\.\d+\.({'|'.join(map(re.escape, kinds))})"
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=layer.r, lora_alpha=layer.alpha,
                  target_modules=targets, bias="none", lora_dropout=layer.dropout,
                  base_model_name_or_path=base, revision=model.revision, inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(model, folder):
    """Add the adapter stored in a folder (PEFT's layout) and fill it, strictly. Returns the model."""
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is missing, corrupt or cut short ({e})") from None
    odd = [k for k in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
           if config.get(k)] + ["bias"] * (config.get("bias", "none") != "none")
    if odd:
        raise UserError(f"{folder}: the adapter uses {', '.join(odd)}: only plain LoRA is built")
    lacking = [k for k in ("r", "lora_alpha", "lora_dropout") if k not in config]
    if lacking:
        raise UserError(f"{folder}: adapter_config.json lacks {', '.join(lacking)}")
    first = {t: f"base_model.model.{official_name(model.cfg, f'blocks.0.{t}')}.lora_A.weight" for t in ALL}
    targets = [t for t in ALL if first[t] in tensors]
    if not targets:
        raise UserError(f"{folder}: the adapter does not fit the model: "
                        f"it has no tensor for a matrix of a {model.cfg.family} block")
    add(model, config["r"], config["lora_alpha"], config["lora_dropout"], targets)
    wanted = state_dict(model)
    wrong = sorted(k for k in wanted.keys() | tensors.keys()
                   if k not in tensors or k not in wanted or wanted[k].shape != tensors[k].shape)
    if wrong:
        merge(model)  # B = 0: this only takes the empty adapters off again
        raise UserError(f"{folder}: the adapter does not fit the model: {wrong[:3]} ({len(wrong)} tensors)")
    with torch.no_grad():
        for name, m in adapters(model):
            for part in ("lora_A", "lora_B"):
                key = f"base_model.model.{official_name(model.cfg, name)}.{part}.weight"
                getattr(m, part).copy_(tensors[key])
    return model


def main():
    ap = argparse.ArgumentParser(description="Merge an adapter into its base model.")
    ap.add_argument("what", choices=["merge"])
    ap.add_argument("--model", default="tiny", help="preset name, hub id or directory of the base model")
    ap.add_argument("--adapter", required=True, help="adapter directory")
    ap.add_argument("--revision", help="commit, branch or tag of a hub id")
    ap.add_argument("--to", required=True, help="directory to write (fp32, official names)")
    args = ap.parse_args()
    model = merge(load(nt_model.load(args.model, revision=args.revision), args.adapter))
    nt_model.save(model, args.to)
    nt_model.copy_tokenizer(args.model, args.to, args.revision)
    print(f"merged model written to {args.to}")


if __name__ == "__main__":
    nt_model.run_cli(main)
