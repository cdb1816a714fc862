"""Small random checkpoints in the official formats, tokenisers included."""
import bz2
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import model as nt_model

SPECIALS = {"llada": ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>",
                      "<|eot_id|>", "<|mdm_mask|>"],
            "dream": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"],
            "sdar": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"],
            "illada": ["</s>", "<s>", "<mask>"],
            "diffcoder": ["<[end▁of▁sentence]>", "<[begin▁of▁sentence]>", "<[MASK_TOKEN]>"]}
SPECIALS |= dict.fromkeys(("a2d", "a2d-bd3lm"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"])
HUB = Path(__file__).parent / "fixtures/hub"
TEMPLATES = {  # the checkpoints' own
    "llada": json.loads(bz2.decompress((HUB / "llada/tokenizer_config.json.bz2").read_bytes()))["chat_template"],
    "dream": json.loads((HUB / "dream/tokenizer_config.json").read_text())["chat_template"],
    "sdar": (HUB / "sdar-4b/chat_template.jinja").read_text(),
    "illada": None, "diffcoder": None}  # not known
TEMPLATES |= dict.fromkeys(("a2d", "a2d-bd3lm"), TEMPLATES["sdar"])  # Qwen3's
OWN_KEYS = {  # of config.json, beside Hugging Face's
    "dream": dict(model_type="Dream"), "sdar": dict(model_type="sdar", head_dim=16, block_size=4), "illada": dict(model_type="illada"),
    "diffcoder": dict(model_type="llama", architectures=["StableDiffcoderForCausalLM"]),
    "a2d": dict(model_type="a2d-qwen3", head_dim=16, kind="mdlm", tie_word_embeddings=True),
    "a2d-bd3lm": dict(model_type="a2d-qwen2", kind="bd3lm", block_size=4, tie_word_embeddings=True)}
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # a byte-level vocabulary without merges
VOCAB = 272  # 256 bytes, specials, and rows that no token uses, as in the real checkpoints


def raw_config(family, **changes):
    """config.json of a small model with the family's own keys."""
    at = {token: 256 + i for i, token in enumerate(SPECIALS[family])}
    mask = at[SPECIALS[family][-1]]
    if family == "llada":
        raw = dict(model_type="llada", d_model=32, n_heads=4, n_kv_heads=4, n_layers=2, mlp_hidden_size=48,
                   rms_norm_eps=1e-5, embedding_size=VOCAB, vocab_size=VOCAB, max_sequence_length=512,
                   rope_theta=5e5, weight_tying=False, mask_token_id=mask, pad_token_id=at["<|endoftext|>"],
                   eos_token_id=[at["<|endoftext|>"], at["<|eot_id|>"]])
    else:
        ends = [at[token] for token in (SPECIALS[family][0], "<|im_end|>") if token in at]
        raw = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                   max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False,
                   mask_token_id=mask, pad_token_id=ends[0], eos_token_id=ends)
        raw.update(OWN_KEYS[family])
    return {**raw, **changes}


def write_bpe(folder, specials):
    """tokenizer.json: 256 bytes and special tokens."""
    table = Tokenizer(models.BPE(vocab=BYTES, merges=[]))
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table.decoder = decoders.ByteLevel()
    table.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    table.save(str(folder / "tokenizer.json"))


def tokenizer_config(family):
    """tokenizer_config.json: the template and the special tokens, with their ids."""
    kind = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    at = {256 + i: dict(content=token, **kind) for i, token in enumerate(SPECIALS[family])}
    bos = dict(bos_token=SPECIALS[family][0]) if family == "llada" else {}
    eos = SPECIALS[family][1 if family == "llada" else 0]
    return dict(chat_template=TEMPLATES[family], added_tokens_decoder=at, eos_token=eos, **bos)


def write_tokenizer(folder, family):
    """256 bytes and the family's special tokens, in the family's own files."""
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(family)))
    if family in ("llada", "illada", "diffcoder"):
        write_bpe(folder, SPECIALS[family])
    else:
        at = {token: 256 + i for i, token in enumerate(SPECIALS[family])}
        (folder / "vocab.json").write_text(json.dumps(BYTES))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "added_tokens.json").write_text(json.dumps(at))


def official_checkpoint(folder, family, seed=0, tokenizer=True, dtype=torch.float32, **changes):
    """Write a random checkpoint of a family: config.json, two shards with their index, tokeniser files."""
    cfg = nt_model.config_from_json(raw_config(family, **changes))
    model = nt_model.Transformer(cfg).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(seed))
    nt_model.save(model.to(dtype), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}  # a layer lies in both
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        write_tokenizer(folder, family)
    return folder
