"""Features that keep many directions: von Neumann entropy (Kim et al. 2023, arXiv 2304.01434).

    rho = H^T H / B,   h_i = f_i / |f_i|,   S = -sum_j l_j log l_j over the eigenvalues l of rho, which sum to 1

f is what the last matrix reads. Orthonormal features give S = log of their number, the most; one direction gives 0.

Shapes: S samples, B batch, F features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def negative_von_neumann_entropy(features: Tensor) -> Tensor:
    """-S of a batch.

    Args:
        features: (B, F), or (S, B, F).

    Returns:
        a scalar, or (S,); nats, between -log min(B, F) and 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        h = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        gram = h @ h.mT if h.shape[-2] < h.shape[-1] else h.mT @ h  # the same eigenvalues but for zeros
        values = torch.linalg.eigvalsh(gram / h.shape[-2]).clamp(min=1e-12)
    return (values * values.log()).sum(-1)
