"""Which implementation a call runs on: the torch reference or the numba fast path."""

import torch

BACKENDS = ("auto", "torch", "numba")


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """Name the implementation that a call with this tensor uses.

    ``torch`` runs on every device and is the truth. ``numba`` is the fast path for CPU tensors.

    Args:
        backend: ``"auto"`` (numba on CPU, torch elsewhere), ``"torch"`` or ``"numba"``.
        tensor: the input of the call.

    Returns:
        ``"torch"`` or ``"numba"``.

    Raises:
        ValueError: unknown name, or numba asked for a tensor that it cannot take.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    fits = tensor.device.type == "cpu"
    if backend == "numba" and not fits:
        raise ValueError(f"backend='numba' takes CPU tensors, got one on {tensor.device}; use backend='torch'")
    if backend == "auto":
        return "numba" if fits else "torch"
    return backend
