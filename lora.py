"""LoRA (Hu et al., arXiv 2106.09685), written by hand: y = W x + b + (alpha / r) B A dropout(x).
    lora.add(model, r=16, alpha=16, dropout=0.0, targets=lora.ALL)   # freezes the base, adapters stay fp32
    with lora.off(model): ...         # inside, it is the base model: same weights, no second copy
    lora.save(model, dir)    # PEFT's layout, official module names: `peft` loads it on the official model
    lora.load(model, dir); lora.merge(model)     # plain nn.Linear again; or: lora.py merge"""
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cli  # first
import torch
import torch.nn.functional as F
from torch import nn

import model as nt_model
from cli import UserError, check_sums, option, run_cli, run_command, whole_folder
from layers import linear
from model import FAMILIES, official_name

ALL = tuple("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
HARMLESS = (  # of PEFT's settings: beside the tensors they change nothing
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform task_type auto_mapping "
    "peft_version base_model_name_or_path revision inference_mode fan_in_fan_out megatron_core loftq_config "
    "qalora_group_size").split()
UNSET = (None, False, "none", "", [], {})
PLAIN = dict(peft_type=("LORA",), init_lora_weights=(*UNSET, True, "gaussian", "orthogonal", "eva"))


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter; `weight` and `bias` keep their names: checkpoints fit."""
    def __init__(self, layer, r, alpha, dropout):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.r, self.alpha, self.dropout, self.enabled = r, alpha, dropout, True
        fp32 = dict(dtype=torch.float32, device=layer.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, layer.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)  # B = 0: the adapted model starts as the base

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        h = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return y + F.linear(self.alpha / self.r * h, self.lora_B.to(x.dtype))

    def merged(self):
        """A plain nn.Linear with W + alpha/r B A, added in fp32 and rounded once; inside off() with W."""
        if not self.enabled:
            return linear(self.weight, self.bias)
        delta = self.alpha / self.r * (self.lora_B.float() @ self.lora_A.float())
        return linear(nn.Parameter((self.weight.float() + delta).to(self.weight.dtype)), self.bias)


def adapters(model):
    """(our module name, LoRALinear) pairs of a model, in module order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def named(targets):
    """Names as in ALL, or a text of them with commas, or "all" -> the names."""
    names = ALL if targets == "all" else targets.split(",") if isinstance(targets, str) else targets
    if not names or not set(names) <= set(ALL) or len(set(names)) < len(names):
        raise UserError(f"LoRA targets {list(names)}: choose from {', '.join(ALL)}")
    return names


def add(model, r, alpha, dropout=0.0, targets=ALL):
    """Freeze the model and put an adapter on every block's `targets`, see named(). Returns the model."""
    names = named(targets)
    cli.check_numbers({"lora_r": r})
    if adapters(model):
        raise UserError("the model already carries LoRA adapters: merge them first")
    model.requires_grad_(False)
    for block in model.blocks:
        for name in names:
            setattr(block, name, LoRALinear(getattr(block, name), r, alpha, dropout))
    return model.train(model.training)  # new layers follow the model: no dropout in eval mode


@contextmanager
def changed(model, changes):
    """Inside, attributes are as changes say: [(object, attribute, value)]."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield model
    finally:
        for change in before:
            setattr(*change)


def off(model):
    return changed(model, [(m, "enabled", False) for _, m in adapters(model)])  # inside, it is its base


def merge(model):
    """Replace every adapter by a plain linear layer with the sum; in bf16 small adapters lose digits."""
    for name, layer in adapters(model):
        model.set_submodule(name, layer.merged())
    return model


def state_dict(model):
    """The adapters' own tensors, not copies, under PEFT's names."""
    return {f"base_model.model.{official_name(model.cfg, name)}.{part}.weight": getattr(m, part).detach()
            for name, m in adapters(model) for part in ("lora_A", "lora_B")}


def save(model, folder, base=""):
    """Write adapter_config.json and adapter_model.safetensors, PEFT's layout. base: the base model's name."""
    where = nt_model.presets().get(base, base)  # the hub id; an embedded model keeps its name
    pairs, folder = adapters(model), Path(folder)
    if not pairs:
        raise UserError("the model carries no LoRA adapters: nothing to save")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.cpu().contiguous() for name, t in state_dict(model).items()}
    nt_model.save_tensors(tensors, folder / "adapter_model.safetensors")
    names, layer = FAMILIES[model.cfg.family].names, pairs[0][1]
    kinds = sorted({re.escape(names[name.rpartition(".")[2]]) for name, _ in pairs})
    targets = rf"{re.escape(names['block'])}\.\d+\.({'|'.join(kinds)})"  # a list would match LLaDA's head
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=layer.r, lora_alpha=layer.alpha,
                  target_modules=targets, bias="none", lora_dropout=layer.dropout,
                  base_model_name_or_path=base if Path(where).is_absolute() else where,
                  revision=model.revision, inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(model, folder):
    """Add the adapter stored in a folder (PEFT's layout) and fill it, strictly. Returns the model."""
    check_sums(Path(folder))
    file = Path(folder) / "adapter_config.json"
    config = cli.read_object(file, optional=False)
    for key, value in config.items():
        if key not in HARMLESS and value not in PLAIN.get(key, UNSET):
            raise UserError(f"{file} has {key} {value!r}: only plain LoRA is built; merge the adapter into "
                            f"its base with peft and load the merged model")
    for key, most in dict(r=1e9, lora_alpha=1e9, lora_dropout=1).items():
        if type(config.get(key)) not in [float, int][key == "r":] or not (key == "r") <= config[key] < most:
            raise UserError(f"{file} has {key} {config.get(key)!r}: a number (r: int) < {most:g} is needed")
    tensors = nt_model.read_tensors(Path(folder) / "adapter_model.safetensors")
    names = FAMILIES[model.cfg.family].names
    targets = [t for t in ALL if any(f".{names[t]}.lora_A." in key for key in tensors)]
    add(model, config["r"], config["lora_alpha"], config["lora_dropout"], targets or ALL)
    wanted = state_dict(model)
    kinds = [{(name, t.shape, t.is_floating_point() and t.element_size() > 1) for name, t in some.items()}
             for some in (tensors, wanted)]
    wrong = sorted({name for name, *_ in kinds[0] ^ kinds[1]})
    if wrong:
        merge(model)  # B = 0: this only takes the empty adapters off again
        raise UserError(f"{folder} is of {config.get('base_model_name_or_path')!r}: it does not fit this "
                        f"model: give that one (or its r, or is quantised: merge by peft): {wrong[:2]}")
    for name, t in wanted.items():
        t.copy_(tensors[name])
    return model


@dataclass
class Merge(nt_model.ModelOptions):
    """merge an adapter into its base model (fp32, official names)"""
    adapter: str = option()  # adapter directory
    to: str = option()  # directory to write


def merge_command(args):
    to = Path(os.path.realpath(args.to))  # what a link leads to
    cli.check_apart([args.adapter, args.model], [to])
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {args.to!r} is there and not empty: choose another, or remove it")
    model = merge(load(nt_model.load(args.model, revision=args.revision), args.adapter))
    with whole_folder(to) as folder:
        nt_model.save(model, folder)
        nt_model.copy_tokenizer(args.model, folder, args.revision)
    print(f"merged model written to {args.to}")


if __name__ == "__main__":
    run_cli(lambda: run_command(__doc__, {"merge": (merge_command, Merge)}))
