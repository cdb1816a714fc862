"""One bidirectional (or block-causal) transformer for every masked diffusion LM in this repository.
    model = load("tiny")                    # embedded; also a hub id or a checkpoint directory
    logits = model(ids)                     # (B, T) -> (B, T, V); logits[:, i] scores token i
Families differ in their entry of `FAMILIES` only; official names exist in load, save and adapters only."""
import copy
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import cli  # first
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import layers
from cli import GIVEN, UserError, read_object, run_cli, say, sha256

HERE = Path(__file__).resolve().parent
CHUNK_BYTES = 2**26  # of fp32 logits at once, see by_chunks
LENGTHS = 64 if torch.cuda.is_available() else 1  # of training batches, a multiple: cuDNN plans for each
TOKENISER_FILES = ("vocab.json merges.txt token*.* added_tokens.json special_tokens_map.json "
                   "generation_config.json chat_template.jinja").split()


@dataclass(frozen=True)
class Config:
    family: str           # its name in FAMILIES
    vocab_size: int       # rows of the embedding
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    d_mlp: int
    max_len: int          # longest sequence the model was made for, tokens
    mask_id: int
    eos_ids: tuple        # every id that ends a response; eos_ids[0] fills the tail
    pad_id: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k, before RoPE
    tied: bool = False     # head shares the embedding
    shift: bool = False    # the network's row i predicts token i+1 (Dream); hidden() undoes it
    block_len: int = 0     # > 0: block-causal attention over blocks of this many tokens (SDAR); -1: unknown
    whole_blocks: bool = False  # the prompt's last block ends with it (bd3lm); else its first begins with it
    rope_fp32: bool = False  # rotate q, k in fp32 (LLaDA) instead of in the model's dtype
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it was, for save()


def pairs(text):
    """'a=b c=d' -> {'a': 'b', 'c': 'd'}"""
    return dict(pair.split("=") for pair in text.split())


HF_KEYS = pairs("""
    vocab_size=vocab_size n_layer=num_hidden_layers n_head=num_attention_heads d_model=hidden_size
    d_mlp=intermediate_size max_len=max_position_embeddings norm_eps=rms_norm_eps mask_id=mask_token_id
    eos_ids=eos_token_id""")
HF_OPTIONAL = pairs("n_kv_head=num_key_value_heads head_dim=head_dim tied=tie_word_embeddings "
                    "pad_id=pad_token_id block_len=block_size")
HF_NAMES = pairs("""
    embed=model.embed_tokens norm=model.norm head=lm_head block=model.layers attn_norm=input_layernorm
    mlp_norm=post_attention_layernorm q_proj=self_attn.q_proj k_proj=self_attn.k_proj v_proj=self_attn.v_proj
    o_proj=self_attn.o_proj q_norm=self_attn.q_norm k_norm=self_attn.k_norm gate_proj=mlp.gate_proj
    up_proj=mlp.up_proj down_proj=mlp.down_proj""")


class Family(NamedTuple):
    """What is true of one family of checkpoints and not of the others; nothing else asks for its name."""
    presets: dict           # --model NAME -> hub id or embedded directory
    networks: dict          # model_type of config.json -> fields of Config that it need not say
    names: dict = HF_NAMES  # our module name -> official module name
    keys: dict = HF_KEYS    # field of Config -> key of config.json
    optional: dict = HF_OPTIONAL  # the same; may be absent or null
    refused: dict = {}      # see REFUSED
    kinds: dict = {"": {}}  # what name or architectures must say -> the same
    thinks: bool = True     # what its chat template is told
    extra_eos: tuple = ()   # ids that end a response beside those of config.json
    decoding: dict = {}     # fields of sample.Decoding, unless told otherwise
    tasks: tuple = ()       # embedded ones: what a training run on them measures at its end


FAMILIES = {
    "tiny": Family(
        presets={name: str(HERE / "weights" / name) for name in ("tiny", "tiny-ar", "barter", "barter-ar")},
        networks=dict(tiny={}),
        optional=HF_OPTIONAL | {fact: fact for fact in "qkv_bias qk_norm shift whole_blocks".split()},
        decoding=dict(gen_len=48, block_len=16, cache="none"),  # stale caches cost accuracy here
        tasks=("tiny", "barter")),
    "llada": Family(
        presets=pairs("llada=GSAI-ML/LLaDA-8B-Instruct llada-1.5=GSAI-ML/LLaDA-1.5"),
        networks=dict(llada=dict(rope_fp32=True)),
        names=pairs("""
            embed=model.transformer.wte norm=model.transformer.ln_f head=model.transformer.ff_out
            block=model.transformer.blocks attn_norm=attn_norm mlp_norm=ff_norm q_proj=q_proj k_proj=k_proj
            v_proj=v_proj o_proj=attn_out gate_proj=ff_proj up_proj=up_proj down_proj=ff_out"""),
        keys=HF_KEYS | pairs("n_layer=n_layers n_head=n_heads d_model=d_model d_mlp=mlp_hidden_size "
                             "max_len=max_sequence_length tied=weight_tying"),
        optional=pairs("vocab_size=embedding_size n_kv_head=n_kv_heads pad_id=pad_token_id"),
        extra_eos=(126348,)),  # <|eot_id|>
    "illada": Family(
        presets={"illada": "GSAI-ML/iLLaDA-8B-Instruct"},
        networks=dict(illada=dict(mask_id=5, pad_id=1))),
    "dream": Family(
        presets=pairs("dream=Dream-org/Dream-v0-Instruct-7B diffucoder=apple/DiffuCoder-7B-Instruct "
                      "dream-coder=Dream-org/Dream-Coder-v0-Instruct-7B"),
        networks=dict(Dream=dict(qkv_bias=True, shift=True)),
        refused=dict(attention_bias=True),
        extra_eos=(151645,)),  # <|im_end|>
    "sdar": Family(
        presets={f"sdar-{size.lower()}{block}": f"JetLM/SDAR-{size}-Chat{block}"
                 for size in "1.7B 4B 8B".split() for block in ["", *"-b8 -b16 -b32 -b64".split()]}
        | pairs("trado-4b=Gen-Verse/TraDo-4B-Instruct trado-8b=Gen-Verse/TraDo-8B-Instruct"),
        networks=dict(sdar=dict(qk_norm=True, block_len=4, mask_id=151669)),
        extra_eos=(151645,)),
    "diffcoder": Family(
        presets={"diffcoder": "ByteDance-Seed/Stable-DiffCoder-8B-Instruct"},
        networks=dict(llama=dict(block_len=4, mask_id=5, pad_id=1)),
        kinds=dict(diffcoder={})),
    "a2d": Family(  # dllm's
        presets={f"a2d-{size}{kind}": f"dllm-hub/{base}-diffusion-{kind.strip('-') or 'mdlm'}-v0.1"
                 for size, base in (("0.6b", "Qwen3-0.6B"), ("0.5b", "Qwen2.5-Coder-0.5B-Instruct"))
                 for kind in ("", "-bd3lm")},
        networks={"a2d-qwen3": dict(qk_norm=True), "a2d-qwen2": dict(qkv_bias=True)},
        kinds=dict(mdlm={}, bd3lm=dict(block_len=32, whole_blocks=True)),
        thinks=False),
}
REFUSED = {key: built for built, keys in [  # of config.json, and what is built: others are other networks
    (None, "quantization_config num_experts num_local_experts clip_qkv layer_norm_eps logit_softcapping "
           "final_logit_softcapping attn_logit_softcapping bd_size"),
    (False, "use_sliding_window alibi scale_logits input_emb_norm attention_layer_norm bias_for_layer_norm "
            "include_bias include_qkv_bias attention_bias mlp_bias embedding_layer_norm "
            "multi_query_attention"),
    (True, "rope rope_full_precision"), ("silu", "hidden_act activation_type"), ("rms", "layer_norm_type"),
    (1, "block_group_size partial_rotary_factor"), ("llama", "block_type"), ("full_attention", "layer_types"),
] for key in keys.split()}
UNKNOWN = "config.json lacks block_size: add it, name the folder x-b8, or give --block_len (--train_block)"


def presets():
    """{--model NAME: hub id or embedded directory} of all families."""
    return {name: where for family in FAMILIES.values() for name, where in family.presets.items()}


def decoding_defaults(cfg):
    """What a model decodes with unless told otherwise: fields of sample.Decoding."""
    own_blocks = dict(block_len=cfg.block_len, cache="exact") if cfg.block_len else {}
    return {**own_blocks, **FAMILIES[cfg.family].decoding}


def listed(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def read_config(folder):
    """The Config of a checkpoint's directory, or a link to one; generation_config.json may add EOS ids."""
    raw = read_object(folder / "config.json", optional=False)
    eos = listed(raw.get("eos_token_id"))
    said = read_object(folder / "generation_config.json").get("eos_token_id")
    more = [i for i in listed(said) if i not in eos]
    if more:
        raw["eos_token_id"] = eos + more
    tokens, parts = folder / "tokenizer_config.json", (*folder.resolve().parts, folder.absolute().name)
    name = next((part for part in parts if part.startswith("models--")), f"{parts[-2]}\n{parts[-1]}")
    told = re.search(r"(?im)(?:\b|_)b(8|16|32|64)(?!\w)|(SDAR|TraDo)-[\d.]+B(-Chat|-Instruct)?$", name)
    block = int(told[1] or 4) if told else GIVEN.get("block_len") or GIVEN.get("train_block")
    sdar, kind = raw.get("model_type") == "sdar", " ".join({*re.findall("mdlm|bd3lm", name.lower())})
    table = read_object(tokens)
    try:
        ids = {token["content"]: int(i) for i, token in table.get("added_tokens_decoder", {}).items()}
        mask = table.get("mask_token")
        mask_id = ids.get(mask["content"] if isinstance(mask, dict) else mask)
    except Exception as e:  # any field may be of another type
        raise UserError(f"{tokens}: added_tokens_decoder or mask_token is wrong ({e!r}); copy it") from None
    found = dict(mask_token_id=mask_id, block_size=sdar and block, kind=kind)
    taken = {key: value for key, value in found.items() if value and not raw.get(key)}
    if taken:
        say(f"{folder}/config.json lacks {taken}, which its name, its tokeniser or an option says")
    raw.update(taken)
    cfg = config_from_json(raw, folder / "config.json")
    return cfg if raw.get("block_size") or not sdar else replace(cfg, block_len=-1)


def config_from_json(raw, file="config.json"):
    """config.json (dict) -> Config. Raises UserError for what is missing, wrong or not built."""
    network = raw.get("model_type")
    known = {each: name for name, entry in FAMILIES.items() for each in entry.networks}
    if network not in [*known]:
        raise UserError(f"{file} has model_type {network!r}; supported are {', '.join(known)}: choose one")
    name, family = known[network], FAMILIES[known[network]]
    told = str([raw.get(key) for key in ("kind", "architectures", "auto_map")]).lower()
    kinds = [kind for kind in family.kinds if kind in told]
    if len(kinds) != 1:
        raise UserError(f"{file} has model_type {network!r}, but its kind, architectures, auto_map (A2D's "
                        f"folder) do not say {' or '.join(family.kinds)}: add its kind, or take another")
    facts = dict.fromkeys(family.keys) | family.networks[network] | family.kinds[kinds[0]]
    bidirectional = "block_len" not in facts and family.optional is HF_OPTIONAL
    blocks = dict(block_size=None) if bidirectional else {}  # DreamReasoner, say, is another network
    for key, built in (REFUSED | family.refused | blocks).items():
        if not all(value in (built, None) for value in listed(raw.get(key))):
            raise UserError(f"{file} has {key} {raw[key]!r}: only {built!r} is built, choose another")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    told = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if told != "default" or rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{file} has rope_scaling or rope_parameters {rope}: choose one of the default RoPE")
    official = family.keys | family.optional
    facts |= {ours: raw[key] for ours, key in official.items() if raw.get(key) is not None}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or None
    facts = dict(n_kv_head=facts["n_head"], rope_theta=theta) | facts
    for ours, value in facts.items():
        kind = Config.__annotations__[ours]
        typed = type(value) in (kind, int)
        valid = typed and (kind is int) <= value < 10**9
        if not valid and not ours.endswith(("_id", "_ids")):  # those are looked at below
            raise UserError(f"{file} has {official.get(ours, ours)} {raw.get(ours, value)!r}: "
                            f"a valid {kind.__name__} is needed")
    facts.setdefault("head_dim", facts["d_model"] // facts["n_head"])
    eos = listed(facts["eos_ids"])
    more = [i for i in family.extra_eos if i < facts["vocab_size"] and i not in eos]
    cfg = Config(name, raw=raw, **{"pad_id": (eos or [None])[0], **facts, "eos_ids": (*eos, *more)})
    if cfg.n_head % cfg.n_kv_head or cfg.head_dim % 2 or not cfg.head_dim:
        raise UserError(f"{file} has {official['n_head']} {cfg.n_head}, head_dim {cfg.head_dim} and "
                        f"{cfg.n_kv_head} heads of keys: these do not fit, or head_dim is odd; correct it")
    mask = [cfg.mask_id] * (cfg.mask_id not in eos)
    for name, ids in dict(mask_token_id=mask, eos_token_id=eos, pad_token_id=[cfg.pad_id]).items():
        if not ids or not all(type(i) is int and 0 <= i < cfg.vocab_size for i in ids):
            raise UserError(f"{file} (generation_config.json, tokeniser) has {name} {raw.get(name, ids)!r}: "
                            f"an id below vocab_size {cfg.vocab_size} is needed, EOS and mask two of them")
    return cfg


def official_name(cfg, name):
    """Our module or tensor name -> the checkpoint's: blocks.3.q_proj -> model.layers.3.self_attn.q_proj."""
    names, (first, *rest) = FAMILIES[cfg.family].names, name.split(".")
    if first == "blocks":
        layer, part, *rest = rest
        return ".".join([names["block"], layer, names[part], *rest])
    return ".".join([names[first], *rest])


class RMSNorm(nn.RMSNorm):
    """Statistics in fp32, cast down, then times the weight in the model's dtype."""
    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rope_angles(cfg, positions):
    """positions (B, T) -> cos, sin (B, 1, T, head_dim) fp32, of negative angles in the first half."""
    even = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()
    angles = positions[:, None, :, None].float() * cfg.rope_theta ** (-even / cfg.head_dim)
    angles = torch.cat([-angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-rotated RoPE. x (B, H, T, head_dim)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([b, a], -1) * sin


class Block(nn.Module):
    JOINED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # for decoding, see layers.Joined

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d, hd = cfg, cfg.d_model, cfg.head_dim
        self.attn_norm = RMSNorm(d, cfg.norm_eps)
        self.q_proj = nn.Linear(d, cfg.n_head * hd, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(d, cfg.n_kv_head * hd, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(d, cfg.n_kv_head * hd, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * hd, d, bias=False)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(hd, cfg.norm_eps), RMSNorm(hd, cfg.norm_eps)
        self.mlp_norm = RMSNorm(d, cfg.norm_eps)
        self.gate_proj = nn.Linear(d, cfg.d_mlp, bias=False)
        self.up_proj = nn.Linear(d, cfg.d_mlp, bias=False)
        self.down_proj = nn.Linear(cfg.d_mlp, d, bias=False)

    def project(self, x, names):
        """x (B, T, C) -> its product with each of these layers; of a decoder they are one layer."""
        joined = self._modules.get("+".join(names))
        if joined:
            return joined(x)
        return [getattr(self, name)(x) for name in names]

    def qkv(self, x, cos, sin):
        """x (B, T, C) -> rotated q (B, H, T, hd), rotated k and plain v (B, H_kv, T, hd)."""
        x = self.attn_norm(x)
        q, k, v = (y.unflatten(2, (-1, self.cfg.head_dim)) for y in self.project(x, self.JOINED[0]))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        dtype = torch.float32 if self.cfg.rope_fp32 else q.dtype
        cos, sin = cos.to(dtype), sin.to(dtype)
        q, k = (rotate(t.transpose(1, 2).to(dtype), cos, sin).to(v.dtype) for t in (q, k))
        return q, k, v.transpose(1, 2)

    def mix(self, x, q, k, v, attn_mask):
        """Attention, then the MLP, both residual. attn_mask (B, T_q, T_k), added; or None."""
        attn_mask = None if attn_mask is None else attn_mask[:, None]
        grouped = self.cfg.n_head != self.cfg.n_kv_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=grouped)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        gate, up = self.project(self.mlp_norm(x), self.JOINED[1])
        return x + self.down_proj(F.silu(gate) * up)

    def forward(self, x, cos, sin, attn_mask, cache=None, out=None):
        """x (B, T, C) -> (B, T, C). cache: store()'s keys, values, rows, cols. out (B, K): what to return."""
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            k, v = store(*cache, k, v)
        if out is not None:
            x = take(x, out)
            q = take(q.transpose(1, 2), out).transpose(1, 2)
            attn_mask = None if attn_mask is None else take(attn_mask, out)
        return self.mix(x, q, k, v, attn_mask)


def take(x, cols):
    """x (B, T, ...), cols (B, K) int64 -> (B, K, ...)."""
    rest = x.shape[2:]
    index = cols.view(*cols.shape, *[1] * len(rest))
    return x.gather(1, index.expand(*cols.shape, *rest))


class KVCache:
    """Rotated keys and values of canvases: per layer k, v (B, S, H_kv, head_dim). valid, positions (B, S)."""
    def __init__(self, cfg, valid, positions, dtype):
        shape = (*valid.shape, cfg.n_kv_head, cfg.head_dim)  # of one layer: torch.compile would copy a view
        self.k, self.v = ([valid.new_zeros(shape, dtype=dtype) for _ in range(cfg.n_layer)] for _ in "kv")
        self.valid, self.positions = valid, positions
        most = valid.shape[1] + cfg.block_len * cfg.whole_blocks  # positions
        cos, sin = rope_angles(cfg, torch.arange(most, device=valid.device)[None])
        self.cos, self.sin = cos[0, 0], sin[0, 0]

    def angles(self, positions):  # rope_angles() from a table
        return self.cos[positions][:, None], self.sin[positions][:, None]


def store(keys, values, rows, cols, k, v):
    """Overwrite rows (N,), or where None columns cols (B, W) of all, of a layer's cache -> whole canvases."""
    at = rows if cols is None else (torch.arange(k.shape[0], device=k.device)[:, None], cols)
    keys[at], values[at] = k.transpose(1, 2), v.transpose(1, 2)
    if cols is None:
        return k, v
    return keys.transpose(1, 2), values.transpose(1, 2)


def attention_mask(cfg, q_pos, q_col, k_pos, k_col, k_valid):
    """Who sees whom, (B, T_q, T_k) bool: real tokens, and no later block of a block-causal model."""
    keep = k_valid[:, None, :]
    if cfg.block_len:
        keep = keep & (q_pos[:, :, None] // cfg.block_len >= k_pos[:, None, :] // cfg.block_len)
    return keep | (q_col[:, :, None] == k_col[:, None, :])  # itself, or a padded query would spread NaN


def in_first_block(cfg, n_prompt):
    """Of n_prompt tokens, those that share a block with the first of the response."""
    return n_prompt % (cfg.block_len if cfg.block_len and not cfg.whole_blocks else 1)


def first_position(cfg, n_prompt):
    """Of a prompt's first token: with it a block begins, or blocks end where the prompt does."""
    return (in_first_block(cfg, n_prompt) - n_prompt) % (cfg.block_len or 1)


def response_blocks(cfg, prompts, L):
    """The number (B, L) of the block that each position of a response to prompts, lists of ids, is in."""
    first = torch.tensor([in_first_block(cfg, len(prompt)) for prompt in prompts])
    return (first[:, None] + torch.arange(L)) // (cfg.block_len or L)


def in_blocks(model, block_len):
    """A block-causal model in blocks of block_len, which save() names; its weights are shared."""
    if model.cfg.block_len in (0, block_len):
        return model
    twin = copy.copy(model)
    raw = model.cfg.raw | {"block_size": block_len}
    twin.cfg = replace(model.cfg, block_len=block_len, raw=raw)
    return twin


def block_diffusion_layout(cfg, prompts, xt, x0):
    """Training layout of block-causal models, [prompt blocks | noisy response | clean response]: one forward
    scores every noisy block behind clean earlier ones (SDAR; T3D). xt, x0 (B, L) -> hidden()'s arguments;
    cols (B, L) of the noisy response. A partial prompt block stands in both halves and is never noised."""
    if cfg.shift or not cfg.block_len:
        raise UserError("this layout is for block-causal models without a shift (SDAR)")
    K, L = cfg.block_len, xt.shape[1]
    n = torch.tensor([len(p) for p in prompts])[:, None]
    end = n + L  # of the noisy half, which begins with the prompt's partial block
    start = n - in_first_block(cfg, n)
    rows = [torch.tensor(p + noisy + p[s:] + clean)
            for p, s, noisy, clean in zip(prompts, start[:, 0], xt.tolist(), x0.tolist())]
    ids = pad_sequence(rows, batch_first=True, padding_value=cfg.pad_id)
    ids = F.pad(ids, (0, -ids.shape[1] % LENGTHS))
    col = torch.arange(ids.shape[1])
    noisy = (col >= start) & (col < end)
    positions = first_position(cfg, n) + torch.where(col < end, col, col - end + start)  # padding: later
    q, k = positions[:, :, None] // K, positions[:, None, :] // K
    sees = torch.where(noisy[:, None, :], noisy[:, :, None] & (q == k),  # noisy keys: their own block only
                       torch.where(noisy[:, :, None], q > k, q >= k))    # clean keys: earlier blocks
    return dict(ids=ids, positions=positions, attn_mask=sees), n + torch.arange(L)


class Transformer(nn.Module):
    revision = None  # the hub commit that load() took the weights from
    only_decodes = False  # on a CPU, linear layers stay as in the file; packed ones then take their place
    checkpoint_blocks = False  # training keeps a block's input only and computes the block again: less memory

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.head.weight = self.embed.weight

    def init_weights(self, generator=None):
        """For training from scratch. In one run of each, GPT-2's N(0, 0.02) learned far more slowly."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(p)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
            else:
                gain = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                std = {"embed.weight": 1.0, "head.weight": 0.02}.get(name, gain * p.shape[1] ** -0.5)
                nn.init.normal_(p, std=std, generator=generator)
        return self

    def hidden(self, ids, valid=None, cache=None, cols=None, rows=None, attn_mask=None, positions=None,
               out=None):
        """Last hidden states (B, T, C), shift already applied: row i belongs to token i, whatever the family.
        ids (B, T) int64; valid (B, T) bool, False = padding; attn_mask (B, T, T) bool and positions (B, T)
        replace the family's own rule. A cache with rows (B,) int64 stores all keys and values of ids, whole
        canvases. With cols (B, T), ids are the tokens of these columns: their keys and values are replaced,
        and they attend to the whole canvas; a shifted model's first row is then meaningless: include the left
        neighbour and drop it. out (B, K) int64: the states of these columns only, (B, K, C)."""
        if self.cfg.block_len < 0:
            raise UserError(UNKNOWN)
        canvas = ids if cache is None else cache.valid
        col = torch.arange(canvas.shape[1], device=ids.device)[None]
        if cols is not None:
            positions = cache.positions.gather(1, cols)
            attn_mask = attention_mask(self.cfg, positions, cols, cache.positions, col, cache.valid)
        if positions is None:
            absolute = valid is None or self.cfg.whole_blocks  # bd3lm pads a prompt to whole blocks
            positions = col.expand(ids.shape) if absolute else token_positions(valid)
        if attn_mask is None and (valid is not None or self.cfg.block_len):
            valid = ids >= 0 if valid is None else valid
            attn_mask = attention_mask(self.cfg, positions, col, positions, col, valid)
        cos, sin = rope_angles(self.cfg, positions) if cache is None else cache.angles(positions)
        x = self.embed(ids)
        if out is not None and self.cfg.shift:  # row i-1 predicts token i; the first token keeps its own
            out = out - (take(positions, out) > 0).long()
        if attn_mask is not None:  # as what attention adds, made once for all blocks
            attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, -torch.inf)
        again = self.checkpoint_blocks and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            kept = None if cache is None else (cache.k[layer], cache.v[layer], rows, cols)
            last = layer == len(self.blocks) - 1
            args = (x, cos, sin, attn_mask, kept, out if last else None)
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        x = self.norm(x)
        if out is None and self.cfg.shift:
            x = torch.where((positions == 0)[..., None], x, x.roll(1, dims=1))
        return x

    def forward(self, ids, valid=None, **kw):
        """ids (B, T) -> logits (B, T, V); logits[:, i] scores token i. See hidden()."""
        return self.head(self.hidden(ids, valid, **kw))


def by_chunks(terms, n_vocab, *rows, chunk_bytes=CHUNK_BYTES):
    """terms(*rows) of rows (N, ...), up to rounding; only chunk_bytes of fp32 logits exist at a time."""
    n = max(1, chunk_bytes // (4 * n_vocab))
    if len(rows[0]) <= n:
        return terms(*rows)
    chunks = zip(*(r.split(n) for r in rows))
    return torch.cat([checkpoint(terms, *chunk, use_reentrant=False) for chunk in chunks])


def n_content(ids, eos_ids):
    """ids (L,) int64 tensor or list -> tokens before the first EOS."""
    ends = (i for i, token in enumerate(torch.as_tensor(ids).tolist()) if token in eos_ids)
    return next(ends, len(ids))


def token_positions(valid):
    """valid (B, T) bool -> positions (B, T) int64, counted from each row's first real token."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def with_response(prompt, cfg, gen_len):
    """-> the prompt's length P, and (P + gen_len,) ids: masks behind it, EOS behind a given response."""
    P = n_content(prompt, [cfg.mask_id])
    filling = cfg.mask_id if P == len(prompt) else cfg.eos_ids[0]
    return P, F.pad(prompt, (0, P + gen_len - len(prompt)), value=filling)


def stale_hidden(model, old, new, positions, inside):
    """Hidden states of the slice `inside` of canvas `new` (T,); other keys are of the last refresh, `old`."""
    cfg = model.cfg
    mask = attention_mask(cfg, positions, positions, positions, positions, positions >= 0)
    cos, sin = rope_angles(cfg, positions)
    h_old = model.embed(old[None])
    h = model.embed(new[None, inside])
    for block in model.blocks:
        _, k, v = block.qkv(h_old, cos, sin)
        q, k_new, v_new = block.qkv(h, cos[:, :, inside], sin[:, :, inside])
        k[:, :, inside], v[:, :, inside] = k_new, v_new
        h = block.mix(h, q, k, v, mask[:, inside])
        h_old = block(h_old, cos, sin, mask)
    h = model.norm(h)
    return torch.cat([h[:, :1], h[:, :-1]], 1) if cfg.shift else h


def load(name, device="cpu", dtype=torch.float32, revision=None, only_decodes=False):
    """Preset name, hub id or directory -> a model in eval mode, every tensor used, every parameter filled."""
    folder = checkpoint_dir(name, revision)
    cli.check_sums(folder)
    cfg = read_config(folder)
    with torch.device("meta"):  # nothing is allocated twice
        model = Transformer(cfg)
    head, embed = (official_name(cfg, name) for name in ("head.weight", "embed.weight"))
    packed = only_decodes and layers.can_pack(device, dtype)
    tensors = {}
    for file in weight_files(folder):
        for key, t in read_tensors(file).items():
            if key in tensors:
                raise UserError(f"{file}: an earlier file holds {key}, too: download or copy all again")
            if not t.is_floating_point() or t.element_size() < 2:
                raise UserError(f"{file} holds {key} as {t.dtype}: quantised; take the model in bf16")
            if not key.endswith("rotary_emb.inv_freq"):  # follows from config.json
                later = packed and t.dim() == 2 and key != embed
                tensors[key] = t if later else t.to(device=device, dtype=dtype)
    own = {official_name(cfg, name): (name, p.shape) for name, p in model.named_parameters()}
    if cfg.tied and {head, embed} <= tensors.keys() and torch.equal(tensors[head].to(dtype), tensors[embed]):
        del tensors[head]
    missing, extra = sorted(own.keys() - tensors), sorted(tensors.keys() - own)
    wrong = [f"{key} has shape {tuple(tensors[key].shape)}, config.json asks for {tuple(shape)}"
             for key, (_, shape) in own.items() if key in tensors and tensors[key].shape != shape]
    if missing or extra or wrong:
        raise UserError(f"{folder}: its config.json (layers, hidden_size, tie_word_embeddings?) does not fit "
                        f"the weights, copy both again: missing {missing[:3]} ({len(missing)}), unexpected "
                        f"{extra[:3]}; {wrong[:3]}")
    state = {name: tensors[key] for key, (name, _) in own.items()}
    model.load_state_dict(state, assign=True, strict=not cfg.tied)
    if cfg.tied:
        model.head.weight = model.embed.weight
    model.revision = folder.name if folder.parent.name == "snapshots" else None
    model.only_decodes = only_decodes
    return model.eval()


def read_tensors(file):
    """The tensors of a safetensors file, mapped into memory. Raises UserError if it is absent or damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is missing, corrupt or cut short ({e}); download or copy it again") from None


def checkpoint_dir(name, revision=None, weights=True):
    """Preset name, hub id or directory -> local directory, downloaded where needed; weights: or without."""
    name = presets().get(str(name), str(name))
    if os.path.isdir(name):
        if revision:
            raise UserError(f"--revision {revision}: {name} is a local directory; a revision pins a hub id")
        if os.path.exists(f"{name}/lock"):
            raise UserError(f"{name} is a run's folder: give its model, or its adapter by --adapter")
        return Path(name)
    if os.path.isabs(name) or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"no model {name!r}: give {', '.join(presets())}, a hub id owner/name or a directory")
    from huggingface_hub import constants, snapshot_download
    files = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files,
                                      local_files_only=constants.HF_HUB_OFFLINE))
    except Exception as e:  # of a different type for each of: offline, no such repository, gated
        why = "HF_HUB_OFFLINE is set, not in the cache" if constants.HF_HUB_OFFLINE else type(e).__name__
        raise UserError(f"cannot download {name!r} ({why}): check the name, the revision and the network, or "
                        f"give a local directory in the official format") from None


def local_weights(name):
    """A checksum of a local model's, adapter's or collection's files; None for a hub id, see revision."""
    folder = Path(presets().get(str(name), name))
    patterns = ["*.safetensors", "*config.json", "rank*.jsonl", *TOKENISER_FILES]
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    sums = map(sha256, sorted(files))
    return f"{zlib.crc32(''.join(sums).encode()):08x}" if name and folder.is_dir() else None


def default_device():
    """Where the command lines load a model for use: bf16 on a GPU, fp32 on a CPU."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def config_of(name, revision=None):
    """Preset name, hub id or directory -> its Config, without loading weights."""
    return read_config(checkpoint_dir(name, revision, weights=False))


def family_of(name, revision=None):
    """The name in FAMILIES of a preset (without a download), a hub id or a directory."""
    found = (family for family, entry in FAMILIES.items() if name in entry.presets)
    return next(found, None) or config_of(name, revision).family


def weight_files(folder):
    """The safetensors files of a checkpoint directory, through its index when it is sharded."""
    index = folder / "model.safetensors.index.json"
    shards = {"": "model.safetensors"}  # goes first where both are, as in transformers
    if index.exists() and not (folder / shards[""]).exists():
        shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index} has no weight_map, {{tensor: file}}: download or copy it again")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}, in which the weights are: download or copy it")
    return [folder / name for name in names]


def save_tensors(tensors, file):
    """A whole .safetensors file under this name, or none; its mode is what the umask asks for."""
    part = Path(f"{file}.tmp")
    part.unlink(missing_ok=True)
    part.with_name(cli.SUMS).unlink(missing_ok=True)  # of what stood there
    part.touch()
    mode = part.stat().st_mode
    save_file(tensors, part, metadata={"format": "pt"})  # through a file that only its owner may read
    part.chmod(mode)
    os.replace(part, file)  # a loaded model may have the old one mapped into memory


def save(model, folder):
    """Write config.json and model.safetensors, which load() takes before shards, with the official names."""
    folder, state = Path(folder), dict(model.named_parameters())
    if any("lora_" in name for name in state):
        raise UserError("the model carries LoRA adapters: lora.merge(model) first, or lora.save the adapter")
    tensors = {official_name(model.cfg, name): t.detach().cpu().contiguous() for name, t in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.cfg.raw, indent=2) + "\n")


def copy_tokenizer(name, folder, revision=None):
    """Copy a checkpoint's tokeniser files beside the weights in a new folder, which then stands alone."""
    source = checkpoint_dir(name, revision, weights=False)
    for pattern in TOKENISER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


@dataclass
class ModelOptions:
    model: str = "tiny"  # preset name, hub id or directory
    revision: str = ""  # commit, branch or tag of a hub id


def main():
    args = cli.parse(__doc__, ModelOptions)
    model = load(args.model, *default_device(), args.revision)
    print(f"family {model.cfg.family}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(model.cfg)


if __name__ == "__main__":
    run_cli(main)
