"""Linear layers as the decoder runs them: packed for oneDNN on a CPU, or in int8. Training never sees them.

    fast = for_decoding(model)    # the model itself where there is nothing to gain
"""
import copy
import weakref

import torch
import torch.nn.functional as F

PACKED = {}  # address of a layer's `tag` -> its weight in oneDNN's layout, which torch.compile cannot hold


def packed_linear(x, tag, bias):
    return torch.ops.mkldnn._linear_pointwise(x, PACKED[tag.data_ptr()], bias, "none", [], "")


# defined by hand: torch.library.custom_op costs as much as a small layer
LIBRARY = torch.library.Library("nanotraj", "DEF")
LIBRARY.define("packed_linear(Tensor x, Tensor tag, Tensor? bias) -> Tensor")
LIBRARY.impl("packed_linear", packed_linear, "CPU")
torch.library.register_fake("nanotraj::packed_linear",
                            lambda x, tag, bias: x.new_empty(*x.shape[:-1], len(tag)))


class PackedLinear(torch.nn.Module):
    """A linear layer with fp32 weights as oneDNN reads them fastest: 2 to 4 times MKL's speed on the CPU of
    BENCH.md. Results differ in rounding only.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.bias = bias
        self.tag = torch.empty(len(weight))
        address = self.tag.data_ptr()
        PACKED[address] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weakref.finalize(self.tag, PACKED.pop, address)

    def forward(self, x):
        return torch.ops.nanotraj.packed_linear(x, self.tag, self.bias)


class Int8Linear(torch.nn.Module):
    """Weights in int8 with one scale per output, computed in the model's dtype: half of bf16's bytes. The
    scale has that dtype too: so torch.compile recognises the product and takes a kernel that reads int8.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.bias = bias
        weight = weight.detach()
        scale = weight.float().abs().amax(1) / 127
        self.scale = scale.to(weight.dtype).clamp(min=1e-6)  # also in fp16 not zero
        steps = weight.float() / self.scale.float()[:, None]
        self.weight = steps.round().clamp(-127, 127).to(torch.int8)

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def with_linear(module, kind):
    """The same module tree with every linear layer as `kind`, adapters merged. The original stays as it is;
    norms, embeddings and biases are shared with it, so a copy is made anew after training.
    """
    if hasattr(module, "merged"):  # a LoRA adapter
        module = module.merged() if module.enabled else module
        return kind(module.weight, module.bias)
    if isinstance(module, torch.nn.Linear):
        return kind(module.weight, module.bias)
    twin = copy.copy(module)
    twin._modules = {name: with_linear(child, kind) for name, child in module._modules.items()}
    return twin


def for_decoding(model, int8=False):
    """The model as the decoder runs it: int8 when asked, packed on a CPU that has oneDNN, else as it is."""
    if int8:
        return with_linear(model, Int8Linear)
    return with_linear(model, PackedLinear) if can_pack(model.embed.weight) else model


def can_pack(weight):
    return (weight.device.type == "cpu" and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available())
