"""Linear layers as the decoder runs them: adapters merged, packed for oneDNN on a CPU."""
import copy
import weakref

import torch

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
    """fp32 weights as oneDNN reads them fastest: 2 to 4 times MKL on BENCH.md's CPU; rounding differs."""
    def __init__(self, weight, bias):
        super().__init__()
        self.bias = bias
        self.tag = torch.empty(len(weight))
        address = self.tag.data_ptr()
        PACKED[address] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weakref.finalize(self.tag, PACKED.pop, address)

    def forward(self, x):
        return torch.ops.nanotraj.packed_linear(x, self.tag, self.bias)


def with_linear(module, kind):
    """A copy with adapters merged, every linear layer as kind(weight, bias) [as is]; it shares the rest."""
    if hasattr(module, "merged"):  # a LoRA adapter
        module = module.merged()
    if isinstance(module, torch.nn.Linear):
        return kind(module.weight, module.bias) if kind else module
    twin = copy.copy(module)
    twin._modules = {name: with_linear(child, kind) for name, child in module._modules.items()}
    return twin


def for_decoding(model):
    return with_linear(model, PackedLinear if can_pack(model.embed.weight) else None)


def can_pack(weight):
    return (weight.device.type == "cpu" and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available())
