"""Buffers that show what a kernel wrote, and comparison of what it wrote with its twin. Used by the kernels' tests."""

import pytest
import torch
from torch import Tensor

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter's products of these are wrong
]
_POISON = -12288  # exact in every dtype
_MARGIN = 1024  # elements before and behind
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Poisoned:
    """A tensor of NaNs, or of a large negative integer, between margins that nobody may write to."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        size = torch.Size(shape).numel()
        self._whole = torch.full((size + 2 * _MARGIN,), _POISON, dtype=dtype, device=device)
        self.inside = self._whole[_MARGIN : _MARGIN + size].view(shape)
        if dtype.is_floating_point:
            self.inside.fill_(torch.nan)

    def put(self, values: Tensor) -> Tensor:
        """The tensor, with `values` in it."""
        return self.inside.copy_(values)

    def is_untouched(self, *index: int | slice | Tensor) -> bool:
        """Whether nothing was ever put there."""
        part = self.inside[index]
        return bool((part.isnan() if part.dtype.is_floating_point else part == _POISON).all())

    def check(self) -> None:
        """The margins are as they were."""
        assert bool((self._whole[:_MARGIN] == _POISON).all()), "wrote before the start"
        assert bool((self._whole[-_MARGIN:] == _POISON).all()), "wrote past the end"


def check_close(expected: Tensor, got: Tensor, dtype: torch.dtype) -> None:
    """`got` is `expected` but for the rounding of `dtype`, which is in proportion to the largest number."""
    expected, got = expected.double().cpu(), got.double().cpu()
    assert expected.shape == got.shape
    assert bool(got.isfinite().all())
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    assert error <= _TOLERANCES[dtype], f"relative error {error:.2e}"


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
