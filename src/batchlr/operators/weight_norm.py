"""Weight normalisation whose second derivative is right."""

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, the norm over all dimensions but ``dim`` (Salimans & Kingma 2016).

    Torch's kernel takes ``|v|`` for a constant in its double backward, so that a Hessian made with
    it is not symmetric (measured with torch 2.14).
    """
    result: Tensor = v * (g / torch.norm_except_dim(v, 2, dim))
    return result
