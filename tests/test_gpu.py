"""Real shapes, random weights, on a GPU. `pytest -m gpu -s tests/test_gpu.py` prints the rows of BENCH.md."""
import time

import pytest
import torch
import torch.nn.functional as F
from checkpoints import raw_config

import lora
import model as nt_model

SHAPES = {  # what differs from the small configs of checkpoints.py; MODELS' public config.json files
    "LLaDA-8B": ("llada", dict(d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288,
                               embedding_size=126464, vocab_size=126464, max_sequence_length=4096)),
    "Dream-7B": ("dream", dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                               num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)),
    "SDAR-4B": ("sdar", dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728,
                             num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                             head_dim=128)),
    "small": ("llada", {}),
}
PARAMETERS = {"LLaDA-8B": 8_015_581_184, "Dream-7B": 7_615_616_512, "SDAR-4B": 4_411_424_256}


def random_weights(shape, device):
    """A model of a real shape, bf16, built on the meta device and filled on `device`."""
    family, facts = SHAPES[shape]
    with torch.device("meta"):
        model = nt_model.Transformer(nt_model.config_from_json(raw_config(family, **facts))).bfloat16()
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if name.endswith("norm.weight") else p.normal_(std=0.02)
    return model


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


def forward_and_lora_step(shape, device, length=512):
    """-> ms of a forward (batch 1), ms of a LoRA step (r = 128, all matrices, batch 1), finite logits?"""
    model = random_weights(shape, device)
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
    return model, forward_ms, step_ms, finite


def test_the_measurement_itself_on_a_cpu():
    _, forward_ms, step_ms, finite = forward_and_lora_step("small", "cpu", length=32)
    assert finite and forward_ms > 0 and step_ms > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["LLaDA-8B", "Dream-7B", "SDAR-4B"])
def test_real_shapes_forward_and_lora_step(shape):
    torch.cuda.reset_peak_memory_stats()
    model, forward_ms, step_ms, finite = forward_and_lora_step(shape, "cuda")
    base = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"\n| {shape} | {torch.cuda.get_device_name()} | bf16, 1 x 512 | forward {forward_ms:.1f} ms "
          f"| LoRA step {step_ms:.1f} ms | peak {peak:.1f} GiB |")
    assert base == PARAMETERS[shape] and finite
    del model
    torch.cuda.empty_cache()
