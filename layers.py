"""Linear layers as the decoder runs them: adapters merged, those of one input joined, packed on a CPU."""
import copy
import weakref
from ctypes import pythonapi

import torch

DECODERS = weakref.WeakKeyDictionary()  # model -> (what it was made from, for_decoding() of it)
mallopt = getattr(pythonapi, "mallopt", lambda option, value: None)  # glibc's; other C libraries have none
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PACKED = {}  # address of a layer's `tag` -> its weight in oneDNN's layout, which torch.compile cannot hold


def packed_linear(x, tag, bias):
    return torch.ops.mkldnn._linear_pointwise(x, PACKED[tag.data_ptr()], bias, "none", [], "")


LIBRARY = torch.library.Library("nanotraj", "DEF")  # custom_op would cost as much as a small layer
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


def moved(weight, bias):
    """A PackedLinear in the place of these parameters, which are empty from now on."""
    layer = PackedLinear(weight.float(), bias)  # load() may have left it as it is in the file
    weight.data = weight.new_empty(0)
    return layer


def linear(weight, bias):
    """An nn.Linear of these parameters, which are not copied."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


class Joined(torch.nn.Module):
    """Linear layers of one input as one product, which fills more of the device -> a result for each."""
    def __init__(self, layers, kind):
        super().__init__()
        layers = [with_linear(layer, linear) for layer in layers]
        self.sizes = [len(layer.weight) for layer in layers]
        weight = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.nn.Parameter(torch.cat(biases))
        if kind is not PackedLinear:  # weights are held once
            for layer, part in zip(layers, weight.split(self.sizes)):
                layer.weight.data = part if kind is linear else part.new_empty(0)
        self.layer = kind(torch.nn.Parameter(weight), bias)

    def forward(self, x):
        return self.layer(x).split(self.sizes, -1)


def with_linear(module, kind):
    """A copy with adapters merged, linear layers as kind(weight, bias), some joined; it shares the rest."""
    if hasattr(module, "merged"):  # a LoRA adapter
        module = module.merged()
    if isinstance(module, torch.nn.Linear):
        return kind(module.weight, module.bias)
    twin, parts = copy.copy(module), dict(module._modules)
    joined = {"+".join(names): Joined([parts.pop(name) for name in names], kind)
              for names in getattr(module, "JOINED", ()) if names[0] in parts}
    order = sorted(parts, key="head".__ne__)  # the largest layer first, while there is room for two
    twin._modules = {name: with_linear(parts[name], kind) for name in order} | joined
    return twin


def state_of(model):
    """What a decoder is made from. Bits are summed: fused optimizers and .data leave versions as is."""
    adapters = [(m.enabled, m.alpha, m.r) for m in model.modules() if hasattr(m, "merged")]
    sums = torch.stack([p.flatten().view(torch.int64).sum() for p in model.parameters()])
    return model.cfg, adapters, sums.tolist()


@torch.inference_mode(False)
@torch.no_grad()
def for_decoding(model):
    """The model as the decoder runs it, made again only when the model has changed."""
    if model not in DECODERS or DECODERS[model][0] != state_of(model):
        DECODERS.pop(model, None)  # first: there may be no room for two
        kind, embedding = linear, model.embed.weight.data
        if can_pack(embedding.device, embedding.dtype):
            kind = moved if model.only_decodes else PackedLinear
        mallopt(M_MMAP_THRESHOLD, 1 << 19)  # freed weights go back to the kernel and leave no holes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        twin = with_linear(model, kind)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # arrays stay, or every forward would fetch their memory anew
        model.embed.weight.data = embedding  # a tied head's, too
        DECODERS[model] = state_of(model), twin
    return DECODERS[model][1]


def can_pack(device, dtype):
    return str(device) == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
