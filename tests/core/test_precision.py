"""float32 within a block, whatever torch's default type is, and the caller's type after it."""

import pytest
import torch

from pyro_isingvit.core.precision import single_precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_and_after(dtype: torch.dtype) -> None:
    @single_precision()
    def made() -> torch.Tensor:
        return torch.zeros(1)

    torch.set_default_dtype(dtype)
    try:
        assert made().dtype == torch.float32 and torch.zeros(1).dtype == dtype
        with pytest.raises(KeyboardInterrupt), single_precision():
            raise KeyboardInterrupt
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
