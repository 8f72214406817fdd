"""Random numbers that belong to a clip, not to a batch, a rank or a device.

Every number is a hash of (seed of the clip, stream, position): splitmix64 [1] in wrapping 64-bit integer arithmetic,
which NumPy, torch on CPU and torch on a GPU all do alike. So the draws of a clip depend on its seed only: they are the
same bits whatever the batch around it, the rank, the device, or how often training was stopped and resumed. There is
no state: nothing here remembers what was drawn before.

[1] Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
"""

import numpy as np
import torch

MASK64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the odd step between the states of splitmix64
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB

# One stream per use, so that two draws for one clip never share noise. Streams below 100 belong to this package.
STREAM_INTER = 1
STREAM_INTRA_SHARE = 2
STREAM_INTRA_ORDER = 3
STREAM_INTRA_BANDS = 4


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as a Python integer."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    """splitmix64's finaliser on one Python integer, 0 <= z < 2^64."""
    z = ((z ^ (z >> 30)) * MIX1) & MASK64
    z = ((z ^ (z >> 27)) * MIX2) & MASK64
    return z ^ (z >> 31)


def _mix_numpy(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on a uint64 array; NumPy's unsigned arithmetic wraps."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX2)
    return z ^ (z >> np.uint64(31))


def shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch shifts int64 arithmetically, so the copies of the sign bit are masked away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix_torch(z: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on an int64 tensor, whose products wrap."""
    z = (z ^ shift_right(z, 30)) * _signed(MIX1)
    z = (z ^ shift_right(z, 27)) * _signed(MIX2)
    return z ^ shift_right(z, 31)


def derive_seed(*parts: int) -> int:
    """Hash integers, in order, into one seed.

    Args:
        *parts: any Python integers, such as run seed, epoch, index of the clip. Order matters.

    Returns:
        An int64 as a Python integer.
    """
    state = 0
    for part in parts:
        state = _mix_int((state + GAMMA + int(part)) & MASK64)
    return _signed(state)


def derive_seeds(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """One seed per clip: ``derive_seed(seed, epoch, i)`` for every i of an array.

    Args:
        seed: seed of the run.
        epoch: epoch, or any second counter.
        index: (N,) integers, the clips' places in the manifest.

    Returns:
        (N,) int64.
    """
    state = derive_seed(seed, epoch) & MASK64
    offset = np.uint64((state + GAMMA) & MASK64)
    return _mix_numpy(np.asarray(index).astype(np.int64).view(np.uint64) + offset).view(np.int64)


def clip_seeds(
    generator: torch.Generator | torch.Tensor, batch: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Turn what a caller passes as ``generator`` into one seed per clip.

    Args:
        generator: a ``torch.Generator``, which is advanced by ``batch`` draws, or the int64 (B,) seeds themselves.
        batch: B.
        device: where the noise is wanted; the seeds are moved there. By default they stay where they are.

    Returns:
        (B,) int64.

    Raises:
        ValueError: a tensor that is not int64 (B,), or neither of the two types.
    """
    if isinstance(generator, torch.Generator):
        low, high = -(1 << 63), (1 << 63) - 1
        seeds = torch.randint(low, high, (batch,), generator=generator, device=generator.device)
    elif isinstance(generator, torch.Tensor):
        if generator.dtype != torch.int64 or generator.shape != (batch,):
            found = f"{generator.dtype} {tuple(generator.shape)}"
            raise ValueError(f"generator: expected int64 seeds of shape ({batch},), got {found}")
        seeds = generator
    else:
        raise ValueError(f"generator: expected a torch.Generator or int64 seeds, got {type(generator).__name__}")
    return seeds if device is None else seeds.to(device, non_blocking=True)


def random_bits(seeds: torch.Tensor, n: int, *, stream: int) -> torch.Tensor:
    """Random words per clip: the states of splitmix64 after 1, 2 ... n steps, finalised.

    Args:
        seeds: (B,) int64, any device.
        n: words per clip.
        stream: which sequence of the clip; each use has its own constant.

    Returns:
        (B, n) int64, all 64 bits random.

    Raises:
        ValueError: seeds that are not a one-dimensional int64 tensor.
    """
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds: expected int64 of shape (B,), got {seeds.dtype} {tuple(seeds.shape)}")
    # The seed is hashed first: neighbouring seeds would otherwise walk the same sequence one step apart.
    key = _mix_torch(seeds + _signed(derive_seed(stream)))
    steps = torch.arange(1, n + 1, device=seeds.device) * _signed(GAMMA)
    return _mix_torch(key[:, None] + steps)


def uniform(seeds: torch.Tensor, n: int, *, stream: int) -> torch.Tensor:
    """Uniform numbers per clip.

    Args:
        seeds: (B,) int64, any device.
        n: numbers per clip.
        stream: which sequence of the clip; each use has its own constant.

    Returns:
        (B, n) float32 in [0, 1): multiples of 2^-24, so a product with any integer k stays below k.

    Raises:
        ValueError: seeds that are not a one-dimensional int64 tensor.
    """
    return shift_right(random_bits(seeds, n, stream=stream), 40).to(torch.float32) * 2.0**-24


def uniform64(seeds: torch.Tensor, n: int, *, stream: int) -> torch.Tensor:
    """As ``uniform``, (B, n) float64 in [0, 1) in multiples of 2^-53: for ranking, where equal draws would favour
    the lower position."""
    return shift_right(random_bits(seeds, n, stream=stream), 11).to(torch.float64) * 2.0**-53
