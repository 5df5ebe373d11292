"""float32 matrix products by oneDNN, on an AMD CPU with AVX-512.

torch takes them to MKL, which there runs at half of what oneDNN, a part of torch as well, reaches. Where there is only
AVX2, MKL is the faster one (a Zen 3: 74 against 60 GFLOP/s a core). The numbers differ as those of two MKL products of
other sizes do, in the last digits.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.overrides import TorchFunctionMode

# Multiplications and additions of a product below which oneDNN's own costs, about 40 microseconds, are not earned back.
_LEAST = 1 << 24


def fast_products(model) -> AbstractContextManager:
    """Within it a float32 model's linear layers take their products to oneDNN, if its weights are on such a CPU."""
    if model.device.type != "cpu" or not _pays():
        return nullcontext()
    return _OneDNN()


def _pays() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # Some torch that requirements.txt allows has no get_capabilities.
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in capabilities.get("cpu_name", "") and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        if function is torch.addmm and not kwargs:  # transformers' Conv1D
            bias, x, weight = args
            if bias.dim() == 1:
                return _linear(x, weight.t(), bias)
        return function(*args, **kwargs)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.dtype == weight.dtype == torch.float32 and input.numel() * weight.shape[0] >= _LEAST:
        return torch.nn.functional.linear(input.to_mkldnn(), weight, bias).to_dense()
    return torch.nn.functional.linear(input, weight, bias)
