"""One bidirectional (or block-causal) transformer for every masked diffusion LM in this repository.

    model = load("tiny")                    # embedded; also a hub id or a checkpoint directory
    logits = model(ids)                     # (B, T) -> (B, T, V); logits[:, i] scores token i
    logits = model(ids, valid=valid)        # valid (B, T) bool: False = padding, left or right

LLaDA, Dream, SDAR and the tiny model differ in a handful of facts (`Config`) and in the names of their
tensors (`NAMES`); nothing else in this code base asks which family it is running. The module names below are
our own and neutral; official names exist only at the file boundary (`load`, `save`, LoRA adapters).

    python model.py --model DIR             # what was loaded, and one forward
"""
import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent

PRESETS = {  # --model NAME -> embedded directory or hub id
    "tiny": str(HERE / "weights" / "tiny"),
    "tiny-ar": str(HERE / "weights" / "tiny-ar"),  # TRIMS's teacher for it
    "llada": "GSAI-ML/LLaDA-8B-Instruct",
    "dream": "Dream-org/Dream-v0-Instruct-7B",
    "sdar-1.7b": "JetLM/SDAR-1.7B-Chat",
    "sdar-4b": "JetLM/SDAR-4B-Chat",
}


class UserError(ValueError):
    """Bad input: one line that names the thing, the value and the fix.
    Command lines print it and exit with 2.
    """


# --------------------------------------------------------------------------------------------- family facts
@dataclass(frozen=True)
class Config:
    family: str           # tiny | llada | dream | sdar
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
    block_len: int = 0     # > 0: block-causal attention over absolute blocks of this many tokens (SDAR)
    rope_fp32: bool = False  # rotate q, k in fp32 (LLaDA) instead of in the model's dtype
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it was, for save()


EXTRA_EOS = {"llada": (126348,), "dream": (151645,), "sdar": (151645,)}  # <|eot_id|>, <|im_end|>


@dataclass(frozen=True)
class Chat:
    """A chat template without code: what stands around the turns. <...> are special tokens."""
    bos: str
    turn: str         # one finished turn, of {role} and {text}
    answer: str       # opens the answer
    end: str          # what the model writes when its answer is finished
    system: str = ""  # system text where none is given; "" = no system turn
    trim: bool = False  # white space around a text is dropped


_IM = dict(bos="", turn="<|im_start|>{role}\n{text}<|im_end|>\n", answer="<|im_start|>assistant\n",
           end="<|im_end|>")
CHAT = {
    "llada": Chat("<|startoftext|>", "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
                  "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", trim=True),
    "dream": Chat(**_IM, system="You are a helpful assistant."),
    "sdar": Chat(**_IM),
    "tiny": Chat("<bos>", "{text}", "<sep>", "<eos>"),
}


def config_from_json(raw):
    """config.json (dict) -> Config. Raises UserError on an unknown model_type or a missing key."""
    if not isinstance(raw, dict):
        raise UserError(f"config.json holds a {type(raw).__name__}, not an object")
    family = {"llada": "llada", "Dream": "dream", "sdar": "sdar", "tiny": "tiny"}.get(raw.get("model_type"))
    if family is None:
        raise UserError(f"config.json has model_type {raw.get('model_type')!r}; "
                        f"supported are llada, Dream, sdar, tiny")
    try:
        facts = _llada_facts(raw) if family == "llada" else _hf_facts(raw, family)
        eos, mask_id = raw["eos_token_id"], raw["mask_token_id"]
    except KeyError as e:
        raise UserError(f"config.json of a {family} model lacks the key {e}") from None
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"config.json of a {family} model holds a value of the wrong type ({e})") from None
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    eos += tuple(i for i in EXTRA_EOS.get(family, ()) if i < facts["vocab_size"] and i not in eos)
    pad = raw.get("pad_token_id")
    cfg = Config(family=family, mask_id=mask_id, eos_ids=eos, pad_id=eos[0] if pad is None else pad,
                 raw=raw, **facts)
    _check_config(cfg)
    return cfg


def _check_config(cfg):
    """Refuse what would fail later without a clear word, or load and then be silently wrong."""
    for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_mlp", "max_len"):
        value = getattr(cfg, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.json: {name} is {value!r}, not a positive whole number")
    for name, ids in (("mask_token_id", [cfg.mask_id]), ("eos_token_id", cfg.eos_ids),
                      ("pad_token_id", [cfg.pad_id])):
        if not all(isinstance(i, int) and 0 <= i < cfg.vocab_size for i in ids):
            raise UserError(f"config.json has {name} {cfg.raw.get(name)!r}, "
                            f"outside its vocabulary of {cfg.vocab_size}")
    rope = cfg.raw.get("rope_scaling") or cfg.raw.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json asks for scaled RoPE ({rope}): only the default RoPE is built")
    if cfg.raw.get("use_sliding_window"):
        raise UserError("config.json asks for sliding-window attention (use_sliding_window): it is not built")


def _llada_facts(raw):
    n_head = raw["n_heads"]
    return dict(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"], n_layer=raw["n_layers"], n_head=n_head,
        n_kv_head=raw.get("n_kv_heads") or n_head, head_dim=raw["d_model"] // n_head, d_model=raw["d_model"],
        d_mlp=raw["mlp_hidden_size"], max_len=raw["max_sequence_length"], rope_theta=float(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"], tied=raw["weight_tying"], rope_fp32=True)


def _hf_facts(raw, family):
    n_head, d_model = raw["num_attention_heads"], raw["hidden_size"]
    theta = raw.get("rope_theta") or (raw.get("rope_parameters") or {})["rope_theta"]
    facts = dict(
        vocab_size=raw["vocab_size"], n_layer=raw["num_hidden_layers"], n_head=n_head,
        n_kv_head=raw.get("num_key_value_heads") or n_head, head_dim=raw.get("head_dim") or d_model // n_head,
        d_model=d_model, d_mlp=raw["intermediate_size"], max_len=raw["max_position_embeddings"],
        rope_theta=float(theta), norm_eps=raw["rms_norm_eps"], tied=raw.get("tie_word_embeddings", False))
    if family == "dream":
        facts.update(qkv_bias=True, shift=True)
    elif family == "sdar":
        facts.update(qk_norm=True, block_len=raw.get("block_size", 4),
                     qkv_bias=raw.get("attention_bias", False))
    else:  # tiny: every fact may be written into its config.json, so that tests can mix them
        facts.update(qkv_bias=raw.get("qkv_bias", False), qk_norm=raw.get("qk_norm", False),
                     shift=raw.get("shift", False), block_len=raw.get("block_size", 0))
    return facts


_HF = dict(embed="model.embed_tokens", norm="model.norm", head="lm_head",
           attn_norm="input_layernorm", mlp_norm="post_attention_layernorm", block="model.layers",
           **{m: f"self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
           **{m: f"mlp.{m}" for m in ("gate_proj", "up_proj", "down_proj")})
_LLADA = dict(embed="model.transformer.wte", norm="model.transformer.ln_f", head="model.transformer.ff_out",
              attn_norm="attn_norm", mlp_norm="ff_norm", block="model.transformer.blocks",
              q_proj="q_proj", k_proj="k_proj", v_proj="v_proj", o_proj="attn_out",
              gate_proj="ff_proj", up_proj="up_proj", down_proj="ff_out")
NAMES = {"llada": _LLADA, "dream": _HF, "sdar": _HF, "tiny": _HF}  # our module name -> official module name


def official_name(cfg, name):
    """Our tensor or module name ('blocks.3.q_proj.weight') -> the checkpoint's
    ('model.layers.3.self_attn.q_proj…').
    """
    names, parts = NAMES[cfg.family], name.split(".")
    if parts[0] == "blocks":
        return ".".join([names["block"], parts[1], names[parts[2]], *parts[3:]])
    return ".".join([names[parts[0]], *parts[1:]])


# ------------------------------------------------------------------------------------------------ the network
class RMSNorm(nn.Module):
    """Statistics in fp32, cast down, then times the weight in the model's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rope_angles(cfg, positions):
    """positions (B, T) -> cos, sin (B, 1, T, head_dim) fp32."""
    even = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()
    inv_freq = cfg.rope_theta ** (-even / cfg.head_dim)
    angles = positions[:, None, :, None].float() * inv_freq  # (B, 1, T, head_dim / 2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-rotated RoPE. x (B, H, T, head_dim)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Block(nn.Module):
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

    def qkv(self, x, cos, sin):
        """x (B, T, C) -> rotated q (B, H, T, hd), rotated k and plain v (B, H_kv, T, hd)."""
        cfg, (B, T, _), x = self.cfg, x.shape, self.attn_norm(x)
        q = self.q_proj(x).view(B, T, cfg.n_head, cfg.head_dim)
        k = self.k_proj(x).view(B, T, cfg.n_kv_head, cfg.head_dim)
        v = self.v_proj(x).view(B, T, cfg.n_kv_head, cfg.head_dim).transpose(1, 2)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        dtype = torch.float32 if cfg.rope_fp32 else q.dtype
        cos, sin = cos.to(dtype), sin.to(dtype)
        q, k = (rotate(t.transpose(1, 2).to(dtype), cos, sin).to(v.dtype) for t in (q, k))
        return q, k, v

    def mix(self, x, q, k, v, attn_mask):
        """Attention of q over k, v, then the MLP, both residual.
        attn_mask (B, T_q, T_k) bool, True = attend; or None.
        """
        B, _, T, _ = q.shape
        y = F.scaled_dot_product_attention(q, k, v,
                                           attn_mask=None if attn_mask is None else attn_mask[:, None],
                                           enable_gqa=self.cfg.n_head != self.cfg.n_kv_head)
        x = x + self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def forward(self, x, cos, sin, attn_mask, cache=None, layer=0, cols=None, rows=None, out=None):
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            k, v = cache.write(layer, k, v, cols) if rows is None else cache.refresh(layer, k, v, rows)
        if out is not None:  # only these columns go on: (B, K)
            x, q = take(x, out), take(q.transpose(1, 2), out).transpose(1, 2)
            attn_mask = None if attn_mask is None else take(attn_mask, out)
        return self.mix(x, q, k, v, attn_mask)


def take(x, cols):
    """x (B, T, ...), cols (B, K) int64 -> (B, K, ...)."""
    return x.gather(1, cols.view(*cols.shape, *[1] * (x.ndim - 2)).expand(*cols.shape, *x.shape[2:]))


class KVCache:
    """Rotated keys and values of whole canvases, allocated once: per layer k, v (B, S, H_kv, head_dim). One
    tensor per layer, since torch.compile writes into a whole tensor in place but copies it for a view.

    `valid` (B, S) bool and `positions` (B, S) int64 describe the canvas's columns.
    """

    def __init__(self, cfg, valid, positions, dtype):
        shape, dev = (*valid.shape, cfg.n_kv_head, cfg.head_dim), valid.device
        self.k = [torch.zeros(shape, dtype=dtype, device=dev) for _ in range(cfg.n_layer)]
        self.v = [torch.zeros(shape, dtype=dtype, device=dev) for _ in range(cfg.n_layer)]
        self.valid, self.positions = valid, positions
        self.cos, self.sin = (t[0, 0] for t in rope_angles(cfg, torch.arange(shape[1], device=dev)[None]))

    def angles(self, positions):
        """rope_angles() from a table."""
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def refresh(self, layer, k, v, rows):
        """Overwrite whole rows (N,) int64 of one layer with k, v (N, H_kv, S, head_dim)."""
        self.k[layer][rows], self.v[layer][rows] = k.transpose(1, 2), v.transpose(1, 2)
        return k, v

    def write(self, layer, k, v, cols):
        """Overwrite columns cols (B, W) of one layer; return its full (B, H_kv, S, head_dim) keys, values."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer][rows, cols], self.v[layer][rows, cols] = k.transpose(1, 2), v.transpose(1, 2)
        return self.k[layer].transpose(1, 2), self.v[layer].transpose(1, 2)


def attention_mask(cfg, q_pos, q_col, k_pos, k_col, k_valid):
    """Who sees whom: (B, T_q, T_k) bool.
    Keys must be real tokens and, for block-causal models, in no later block.

    Positions count from the row's first real token, so blocks have the same origin in training and in
    decoding. Every token also sees itself: a padded query would otherwise average over nothing and
    spread NaN.
    """
    keep = k_valid[:, None, :]
    if cfg.block_len:
        keep = keep & (q_pos[:, :, None] // cfg.block_len >= k_pos[:, None, :] // cfg.block_len)
    return keep | (q_col[:, :, None] == k_col[:, None, :])


def block_diffusion_layout(cfg, prompts, xt, x0):
    """Training layout of block-causal models: [prompt blocks | noisy response | clean response], so that one
    forward scores every noisy block behind clean earlier ones (SDAR; T3D).

    prompts: list of id lists; xt, x0 (B, L) -> the arguments of hidden(): ids, positions (B, T),
    attn_mask (B, T, T) bool; and cols (B, L), where the noisy response stands. Blocks count from the first
    prompt token, as in decoding: a last, partial prompt block stands in both halves, and is never noised.
    """
    if cfg.shift or not cfg.block_len:
        raise UserError("this layout is for block-causal models without a shift (SDAR)")
    K, (B, L) = cfg.block_len, xt.shape
    starts = [len(p) - len(p) % K for p in prompts]  # first token of the block in which the response begins
    T = max(s + 2 * (len(p) - s + L) for s, p in zip(starts, prompts))
    ids, positions = torch.full((B, T), cfg.pad_id), torch.zeros(B, T, dtype=torch.long)
    noisy, valid = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    cols = torch.empty(B, L, dtype=torch.long)
    for row, (s, p) in enumerate(zip(starts, prompts)):
        p, half = torch.tensor(p, dtype=torch.long), len(p) - s + L
        n = s + 2 * half
        ids[row, :n] = torch.cat([p, xt[row].cpu(), p[s:], x0[row].cpu()])
        positions[row, :n] = torch.cat([torch.arange(s + half), torch.arange(s, s + half)])
        noisy[row, s:s + half], valid[row, :n] = True, True
        cols[row] = torch.arange(len(p), len(p) + L)
    block = positions // K
    q, k = block[:, :, None], block[:, None, :]
    sees = torch.where(noisy[:, None, :], noisy[:, :, None] & (q == k),  # noisy keys: their own block only
                       torch.where(noisy[:, :, None], q > k, q >= k))    # clean keys: earlier blocks
    col = torch.arange(T)
    attn_mask = sees & valid[:, None, :] | (col[:, None] == col)
    return dict(ids=ids, positions=positions, attn_mask=attn_mask), cols


class Transformer(nn.Module):
    revision = None  # the hub commit that load() took the weights from
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
        """Training from scratch: embeddings N(0, 1), so that tokens stay themselves along the residual
        stream; matrices N(0, 1 / fan_in), those that write to it at 0.3 of that; a small head.

        Chosen over GPT-2's 0.02 after one run of each, whose learning rates differed too: after 300 steps
        of 32 only this one wrote well-formed responses.
        """
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

        ids (B, T) int64. valid (B, T) bool, False = padding. attn_mask (B, T, T) bool and positions (B, T)
        replace the rule of the family (training layouts). A cache is used in two ways. With rows (B,) int64,
        ids are whole canvases and all keys and values of these rows are stored. With cols (B, T), ids are the
        tokens of these columns: their keys and values are overwritten, and they attend to the whole canvas.
        In a window that does not start at the first token, a shifted model's first row is meaningless:
        include the left neighbour and drop it. out (B, K) int64: the states of these columns only, (B, K, C);
        the last block then computes no others.
        """
        cfg, dev = self.cfg, ids.device
        if cols is not None:
            positions = cache.positions.gather(1, cols)
            k_col = torch.arange(cache.valid.shape[1], device=dev)[None]
            attn_mask = attention_mask(cfg, positions, cols, cache.positions, k_col, cache.valid)
        else:
            if positions is None:
                positions = (token_positions(valid) if valid is not None
                             else torch.arange(ids.shape[1], device=dev)[None].expand(ids.shape))
            if attn_mask is None and (valid is not None or cfg.block_len):
                col = torch.arange(ids.shape[1], device=dev)[None]
                valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
                attn_mask = attention_mask(cfg, positions, col, positions, col, valid)
        cos, sin = rope_angles(cfg, positions) if cache is None else cache.angles(positions)
        x = self.embed(ids)
        if out is not None and cfg.shift:  # the network's row i-1 predicts token i; the first keeps its own
            out = out - (take(positions, out) > 0).long()
        again = self.checkpoint_blocks and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            at = layer if cache is not None else 0  # a compiled block is then one graph for all layers
            args = (x, cos, sin, attn_mask, cache, at, cols, rows, out if last else None)
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        x = self.norm(x)
        if out is None and cfg.shift:
            x = torch.where((positions == 0)[..., None], x, x.roll(1, dims=1))
        return x

    def forward(self, ids, valid=None, **kw):
        """ids (B, T) -> logits (B, T, V); logits[:, i] scores token i. See hidden()."""
        return self.head(self.hidden(ids, valid, **kw))


CHUNK_BYTES = 2**26  # of fp32 logits at once


def by_chunks(terms, n_vocab, *rows, chunk_bytes=CHUNK_BYTES):
    """terms(*rows) for functions of rows that go through logits: rows (N, ...) -> (N, ...), chunk by chunk.

    A chunk holds chunk_bytes of fp32 logits; it is computed again in the backward pass, so that no more than
    one chunk's logits exist at once instead of (N, V). The values are those of one call, up to rounding.
    """
    n, N = max(1, chunk_bytes // (4 * n_vocab)), len(rows[0])
    if N <= n:
        return terms(*rows)
    return torch.cat([checkpoint(terms, *(r[i:i + n] for r in rows), use_reentrant=False)
                      for i in range(0, N, n)])


def n_content(ids, eos_ids):
    """ids (L,) int64 tensor or list -> tokens before the first EOS."""
    return next((i for i, token in enumerate(torch.as_tensor(ids).tolist()) if token in eos_ids), len(ids))


def token_positions(valid):
    """valid (B, T) bool -> positions (B, T) int64 counted from each row's first real token;
    padding gets 0 or less use.
    """
    return (valid.long().cumsum(1) - 1).clamp(min=0)


# -------------------------------------------------------------------------------------- over several ranks
def shard(model, device, train=False):
    """Spread the tensors over all ranks (FSDP2), in place: each keeps its rows, and a block's are gathered
    while it runs. For hidden() and then head(); decode with lora.unsharded(). A model on the CPU goes to the
    device block by block. LoRA adapters stay whole. train: fp32 masters, computed with in bf16 on a GPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # inputs are not cast: the angles of RoPE stay fp32
    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" else {}
    policy = MixedPrecisionPolicy(**(dtypes if train else {}), cast_forward_inputs=False)
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    # what the blocks leave to the model (embedding, norm, head) is whole from hidden() to the end of backward
    for unit, parts in [*((b, [b]) for b in model.blocks), (model, [model.embed, model.norm, model.head])]:
        for part in parts if train else ():
            part.float()
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=adapters)
    for p in adapters:
        p.data = p.data.to(device)
    register_fsdp_forward_method(model, "hidden")
    return model


def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def local(t):
    """This rank's rows of a tensor: all of them unless it is sharded."""
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


def fill(t, whole):
    """Copy a whole tensor into t, or this rank's rows of it where t is sharded."""
    if isinstance(t, DTensor):
        n = -(-len(whole) // torch.distributed.get_world_size())
        at = torch.distributed.get_rank() * n
        whole = whole[at:at + n]
    local(t).copy_(whole)


def print_memory(model, cfg, frozen_copy):
    """What a GPU holds in training, in GiB, for 1, 8 and 16 of them. model: on the meta device, with adapters
    unless all is trained; frozen_copy: --full keeps a frozen model beside it. bf16, with fp32 for what is
    trained; prompts of 256 tokens; activations are a rough count of what the backward pass reads.
    """
    n_all, n_trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every)
                        for every in (True, False))
    n_block, facts = sum(p.numel() for p in model.blocks[0].parameters()), model.cfg
    per_token = 2 * (16 * facts.d_model + 3 * (facts.n_head + 2 * facts.n_kv_head) * facts.head_dim
                     + 4 * facts.d_mlp)
    everything = n_trained == n_all
    if not everything:  # the inputs of adapters, in fp32
        per_token += 4 * (6 * facts.d_model + facts.d_mlp)
    per_token = (facts.n_layer * 2 * facts.d_model + per_token if cfg.checkpoint_blocks
                 else facts.n_layer * per_token)
    tokens = cfg.micro_batch * (256 + cfg.gen_len * (2 if facts.block_len else 1))
    print(f"{n_all:,} parameters, {n_trained:,} of them trained; GiB per GPU:\n"
          f"GPUs   weights  gradients  optimizer  activations  logits   total")
    for n in (1, 8, 16):
        sharded = cfg.full or cfg.fsdp
        weights = (4 * n_all if everything else 2 * (n_all - n_trained)) / (n if sharded else 1)
        weights += 0 if everything else 4 * n_trained
        weights += 2 * n_all / n if cfg.full and frozen_copy else 0
        rest = n_all - facts.n_layer * n_block  # embedding, norm, head: whole until the last gradient
        weights += 2 * (rest + 2 * n_block) if sharded else 0  # gathered, with two blocks
        weights += 2 * rest if cfg.full and frozen_copy else 0  # the frozen copy's, too
        trained = n_trained / (n if cfg.full else 1)
        gathered = 6 * rest if cfg.full else 0  # their gradients, in bf16 and in fp32 to be summed
        parts = [weights, 4 * trained + gathered, 8 * trained, per_token * tokens, 6 * CHUNK_BYTES]
        print(f"{n:>4}" + "".join(f"{p / 2**30:>{w}.1f}" for p, w in zip([*parts, sum(parts)],
                                                                        (10, 11, 11, 13, 8, 8))))


# ------------------------------------------------------------------------------------------- the AR teacher
def load_teacher(name, device="cpu", dtype=torch.float32, revision=None):
    """Any `transformers` causal LM, frozen: TRIMS's teacher. Strict; remote code is never run."""
    from transformers import AutoModelForCausalLM
    folder = checkpoint_dir(name, revision)
    try:
        teacher, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, SafetensorError) as e:
        line = str(e).strip().split("\n")[0]
        raise UserError(f"{name} is not a causal LM that transformers loads: {line}") from None
    absent = sorted(info["missing_keys"]) + [key[0] for key in info["mismatched_keys"]]
    if absent:  # transformers only warns, and fills them with random numbers
        raise UserError(f"{name}: tensors are missing or of another shape: {absent[:3]} ({len(absent)})")
    return teacher.to(device).eval().requires_grad_(False)


@torch.no_grad()
def token_nll(teacher, ids, valid=None, metric="nll"):
    """-log p(ids[:, t] | ids[:, :t]) under a causal LM, in nats: (B, T) fp32. 0 for padding and for the first
    token, which nothing predicts. ids (B, T) int64; valid (B, T) bool, False = padding on either side.
    metric entropy: the predictive entropy at t instead.
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    h = teacher.base_model(ids, attention_mask=valid.long(), position_ids=token_positions(valid))[0]

    def terms(h, x):
        logp = teacher.get_output_embeddings()(h).float().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1) if metric == "entropy" else -logp.gather(1, x[:, None])[:, 0]
    scored = valid[:, 1:] & valid[:, :-1]  # the head on these rows only, in chunks
    nll = torch.zeros(scored.shape, device=ids.device)
    nll[scored] = by_chunks(terms, teacher.config.vocab_size, h[:, :-1][scored], ids[:, 1:][scored])
    return F.pad(nll, (1, 0))


# ------------------------------------------------------------------------------------------------- load, save
def load(name, device="cpu", dtype=torch.float32, revision=None):
    """A model in eval mode from a preset name, a hub id or a local checkpoint directory.

    Built on the meta device and filled tensor by tensor from safetensors, so that nothing is allocated twice.
    Strict: every tensor of the file is used and every parameter filled, else UserError.
    Loading never executes code. revision: commit, branch or tag of a hub id.
    """
    folder = checkpoint_dir(name, revision)
    cfg = config_from_json(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(cfg)
    wanted = {official_name(cfg, n): n for n in model.state_dict() if not (cfg.tied and n == "head.weight")}
    found, state = set(), {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():
                    if key in found:
                        raise UserError(f"{folder}: tensor {key} stands in two files")
                    found.add(key)
                    if key in wanted:
                        state[wanted[key]] = f.get_tensor(key).to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} is corrupt or cut short ({e}); download or copy it again") from None
    _check_tensors(folder, model, wanted, found, state)
    if cfg.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True, strict=True)
    if cfg.tied:
        model.head.weight = model.embed.weight
    model.revision = folder.name if folder.parent.name == "snapshots" else None
    return model.eval()


def _check_tensors(folder, model, wanted, found, state):
    missing, extra = sorted(set(wanted) - found), sorted(found - set(wanted))
    if missing or extra:
        raise UserError(f"{folder}: the weights do not fit its config.json: "
                        f"missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)})")
    for name, p in model.state_dict().items():
        if name in state and state[name].shape != p.shape:
            raise UserError(f"{folder}: tensor {official_name(model.cfg, name)} has shape "
                            f"{tuple(state[name].shape)}, its config.json asks for {tuple(p.shape)}")


def checkpoint_dir(name, revision=None, weights=True):
    """Preset name, hub id or directory -> local directory. Downloads through huggingface_hub when it must
    (weights=False: only the small files); its cache and HF_HUB_OFFLINE are honoured.
    """
    name = PRESETS.get(str(name), str(name))
    if os.path.isdir(name):
        if revision:
            raise UserError(f"--revision {revision}: {name} is a local directory; a revision pins a hub id")
        return Path(name)
    if os.path.isabs(name) or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"no model {name!r}: give one of {', '.join(PRESETS)}, "
                        f"a hub id (owner/name) or a directory")
    from huggingface_hub import constants, snapshot_download
    try:
        return Path(snapshot_download(name, revision=revision or None,
                                      allow_patterns=["*.json", "*.txt", "*.jinja"]
                                      + ["*.safetensors"] * weights))
    except Exception as e:
        # offline, no such repository, gated: huggingface_hub raises a different type for each
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{name!r} is not in the local hub cache and HF_HUB_OFFLINE is set: unset it, "
                            f"download the model first, or give a local directory") from None
        raise UserError(f"cannot download {name!r} ({type(e).__name__}): check the name, the revision and "
                        f"the network, or give a local directory in the official format") from None


def default_device():
    """Where the command lines load a model for use: bf16 on a GPU, fp32 on a CPU."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def config_of(name, revision=None):
    """Preset name, hub id or directory -> its Config, without loading weights."""
    return config_from_json(read_json(checkpoint_dir(name, revision, weights=False) / "config.json"))


def family_of(name, revision=None):
    """llada | dream | sdar | tiny, see config_of."""
    return config_of(name, revision).family


def weight_files(folder):
    """The safetensors files of a checkpoint directory, through its index when it is sharded."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        table = read_json(index)
        if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
            raise UserError(f"{index} has no weight_map: not an index of safetensors files")
        names = sorted(set(table["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}: not a checkpoint in the official safetensors format")
    return [folder / name for name in names]


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None


def write_whole(path, text):
    """Under another name, then renamed: whole or absent."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def save(model, folder, dtype=None):
    """Write config.json and model.safetensors with the official names
    (the official code can load the result).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {official_name(model.cfg, n): p.detach().to("cpu", dtype or p.dtype).contiguous()
               for n, p in model.state_dict().items() if not (model.cfg.tied and n == "head.weight")}
    lora = [n for n in tensors if "lora_" in n]
    if lora:
        raise UserError("the model still carries LoRA adapters: "
                        "lora.merge(model) first, or lora.save the adapter")
    # never write into a file that this process may have mapped: a loaded model reads its tensors from there
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.cfg.raw, indent=2) + "\n")


def copy_tokenizer(name, folder, revision=None):
    """Copy a checkpoint's tokeniser files beside newly saved weights,
    so that the new directory stands alone.
    """
    for pattern in ("vocab.json", "merges.txt", "token*.json", "added_tokens.json", "special_tokens_map.json",
                    "generation_config.json", "chat_template.jinja"):
        for file in checkpoint_dir(name, revision, weights=False).glob(pattern):
            if file.parent.resolve() != Path(folder).resolve():
                shutil.copyfile(file, Path(folder) / file.name)


def main():
    ap = argparse.ArgumentParser(description="Load a checkpoint, print what it is, run one forward.")
    ap.add_argument("--model", default="tiny", help="preset name, hub id or directory")
    ap.add_argument("--revision", help="commit, branch or tag of a hub id")
    args = ap.parse_args()
    model = load(args.model, *default_device(), args.revision)
    cfg = model.cfg
    print(f"family {cfg.family}: {sum(p.numel() for p in model.parameters()):,} parameters")
    for key, value in vars(cfg).items():
        if key not in ("family", "raw"):
            print(f"  {key:<11} {value}")
    with torch.no_grad():
        logits = model(torch.full((1, 8), cfg.mask_id, device=model.embed.weight.device))
    print(f"one forward over 8 mask tokens: logits {tuple(logits.shape)}, "
          f"finite: {bool(logits.isfinite().all())}")


def keep_freed_memory():
    """Let glibc keep up to 1 GiB per process of what was freed at the end of its heap: giving it back, and
    faulting its pages in anew at the next step, was a third of the tiny model's decoding time on a CPU.
    Nothing is done where the environment sets glibc's thresholds, or where there is no glibc.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    libc = ctypes.CDLL(None) if sys.platform == "linux" and not chosen else None
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # it no longer adapts by itself; larger blocks go back at once


def run_cli(main):
    """Run a command line: bad input is one line on stderr and exit code 2, never a traceback.
    main may return another exit code. Freed memory is kept, see above.
    """
    keep_freed_memory()
    try:
        code = main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # without this order some processes abort when they exit
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if isinstance(code, int):
        sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
