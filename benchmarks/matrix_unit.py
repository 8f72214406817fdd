"""How far are a training step's kernels for a CPU's matrix unit (AMX) ahead of torch's?

    python benchmarks/matrix_unit.py               # the base model's shapes; a minute
    python benchmarks/matrix_unit.py --rounds 20   # rougher

The matrix products of a block of the base model, 8 clips in two masked views: forwards, and the gradients of inputs and
weights; then attention. Torch's are oneDNN's products; of its attention the fused one and, as training had it before,
plain products a clip at a time. Each row's two sides are called one right after the other, so what neighbours on the
same processor do, they do to both: the ratio is the median of those pairs. What a side takes when nobody is in its way
is its 5th percentile. Before anything is timed, what both give is compared. Results go to
``benchmarks/results/matrix_unit.{json,md}``; without such a unit nothing is measured, and the page says so.

Last result, 2026-11-29: products 1.3 to 1.9 times as fast as torch's, attention 1.3 times as the fused one forwards and
1.9 to 2.0 times as plain products.
"""

import argparse
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import common
import torch
from step_timing import seconds_of, spared
from torch import Tensor
from torch.nn import functional

from fastsskd import distributed
from fastsskd.attention import MatrixProducts
from fastsskd_kernels import tiles
from fastsskd_kernels.attention import attention, attention_gradient
from fastsskd_kernels.product import product

RESULTS = Path(__file__).parent / "results"
TOKENS, HEADS, WIDTH = 512, 12, 64
MAPS = {"qkv": (768, 2304), "projection": (768, 768), "MLP, first": (768, 3072), "MLP, second": (3072, 768)}
"""Of a block: input and output of its linear maps."""


class Pair:
    """Two ways to the same numbers, and the operations they take."""

    def __init__(self, torchs: Callable[[], Tensor], ours: Callable[[], Tensor], operations: float):
        self.torchs, self.ours, self.operations = torchs, ours, operations

    def check(self, name: str) -> None:
        """Before anything is timed; twice bf16's rounding, since both sides round."""
        a, b = self.torchs().double(), self.ours().double()
        off = float((a - b).norm() / a.norm())
        if not off < 0.01:
            raise SystemExit(f"{name}: the two sides are {off:.2g} apart; nothing was timed")

    def time(self, rounds: int) -> dict:
        seconds = {"torch": [], "ours": []}
        for _ in range(rounds):
            seconds["torch"].append(seconds_of(self.torchs))
            seconds["ours"].append(seconds_of(self.ours))
        ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
        row = {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
        for side, each in seconds.items():
            row[side] = {"median_ms": 1e3 * statistics.median(each), "spared_ms": 1e3 * spared(each)}
            row[side]["teraflops"] = self.operations / statistics.median(each) / 1e12
        return row


def product_pairs(clips: int) -> dict[str, Pair]:
    found, rows = {}, clips * TOKENS
    for name, (width, out) in MAPS.items():
        x, grad = _normal(rows, width), _normal(rows, out)
        weight = _normal(out, width)
        factors = {
            "forwards": (x, weight.t()),
            "gradient of the input": (grad, weight),
            "gradient of the weight": (grad.t(), x),
        }
        for part, (a, b) in factors.items():
            pair = Pair(lambda a=a, b=b: a @ b, lambda a=a, b=b: product(a, b), 2.0 * rows * width * out)
            found[f"{name}, {part}"] = pair
    return found


def attention_pairs(clips: int) -> dict[str, Pair]:
    """Operations are those of the products: two forwards, four backwards."""
    qkv, grad = _normal(clips, TOKENS, 3, HEADS, WIDTH), _normal(clips, TOKENS, HEADS, WIDTH)
    once = 2.0 * clips * HEADS * TOKENS**2 * WIDTH
    leaf = qkv.flatten(2).requires_grad_()
    out = MatrixProducts.apply(leaf, HEADS)
    _, probs = attention(qkv, True)

    def fused() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def back() -> Tensor:
        (found,) = torch.autograd.grad(out, leaf, grad.flatten(2), retain_graph=True)
        return found.view(qkv.shape)

    def forth() -> Tensor:
        return MatrixProducts.apply(leaf, HEADS).detach().view(grad.shape)

    return {
        "attention, no gradient wanted, fused": Pair(fused, lambda: attention(qkv, False)[0], 2 * once),
        "attention, forwards, plain products": Pair(forth, lambda: attention(qkv, True)[0], 2 * once),
        "attention, backwards, plain products": Pair(back, lambda: attention_gradient(grad, qkv, probs), 4 * once),
    }


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def page(result: dict) -> str:
    lines = ["# Matrix unit", "", common.machine_line(result["machine"]), ""]
    if not result["rows"]:
        return (
            "\n".join([*lines, "Not measured: no matrix unit for bf16 numbers (AMX) that this process may use."]) + "\n"
        )
    lines += [
        f"{result['clips']} clips of {TOKENS} tokens, the base model's shapes, bf16, "
        f"{result['threads']} threads. How many times as fast as torch's; the median of pairs, and their range.",
        "",
        "| | as fast | range | torch's, ms | TFLOP/s | ours, ms | TFLOP/s | undisturbed: torch's, ms | ours, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        torchs, ours = row["torch"], row["ours"]
        cells = [f"{side['median_ms']:.1f} | {side['teraflops']:.2f}" for side in (torchs, ours)]
        cells += [f"{side['spared_ms']:.1f}" for side in (torchs, ours)]
        low, high = row["ratios"]
        lines.append(f"| {name} | {row['ratio']:.2f} | {low:.2f}-{high:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clips", type=int, default=16, help="twice the batch: both masked views go together")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for an idle machine")
    parser.add_argument("--smoke", action="store_true", help="one clip, one round: only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.clips, args.patience = 1, 1, 0.0
    distributed.start("cpu")  # with training's settings of the C library's memory
    watch, rows = common.IdleWatch(args.patience), {}
    if tiles.available():
        for name, pair in {**product_pairs(args.clips), **attention_pairs(args.clips)}.items():
            pair.check(name)
            watch.wait()
            rows[name] = pair.time(args.rounds)
    command = f"python benchmarks/matrix_unit.py --rounds {args.rounds} --clips {args.clips}"
    versions = {name: version(name) for name in ("torch", "numba")}
    about = common.machine(versions, command) | {"samples_on_an_idle_machine": str(watch)}
    result = {"machine": about, "clips": args.clips, "threads": torch.get_num_threads(), "rows": rows}
    common.write(args.out, "matrix_unit", result, page(result))
    print(page(result), end="")


if __name__ == "__main__":
    main()
