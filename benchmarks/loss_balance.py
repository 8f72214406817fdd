"""Which terms of Formula 10 move the network, and with which weights does none drown the others?

    python benchmarks/loss_balance.py --config launch/configs/esc10.toml --set data.manifest=esc10.manifest

The paper gives no alpha, beta and tau. A term's value says little of its weight: what counts is the gradient that it
sends into the shared network. This script trains the Multi-SSL stage of the configuration (float32, one process) and at
regular steps takes each term's gradient by itself, with respect to the AFT with its patch embedding: its norm, and the
cosine with the whole gradient. Weights are as configured, gradients are shown with and without them. Results go to
``OUT/loss_balance.{json,md,png}``.

Last result, 2026-11-23: as printed the contrast has 73 % of the gradient, features 24, reconstruction 2; with the
recipes' weights (alpha 2, beta 2, restore_scale 8) 52, 27 and 20 %.
"""

import argparse
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import common
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from fastsskd.batch import Batch
from fastsskd.config import load as load_config
from fastsskd.datasets import open_data
from fastsskd.errors import InputError
from fastsskd.loader import Loader
from fastsskd.model import build_model
from fastsskd.pretrain import Pretrain
from fastsskd.schedule import build_optimizer, learning_rate, set_learning_rate
from fastsskd.stage_parts import varied

RESULTS = Path(__file__).parent / "results"


def shared(module: Pretrain) -> list[Tensor]:
    """Parameters that every term reaches: patch embedding, positions, blocks and norm of the AFT."""
    model = module.model
    parts = (model.patch_embed, model.blocks, model.norm)
    return [model.pos_embed, *(p for part in parts for p in part.parameters())]


def gradients(module: Pretrain, batch: Batch) -> dict[str, dict[str, float]]:
    """Of each term: its value, the norm of its own gradient, and the cosine of that with the whole gradient."""
    parameters = shared(module)
    terms, _ = module.terms(batch)
    flat = {}
    for name, value in terms.items():
        own = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat[name] = torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, own, strict=True)]
        )
    whole = sum(module.weight(name) * own for name, own in flat.items())
    return {
        name: {
            "value": float(terms[name].detach()),
            "gradient": float(own.norm()),
            "weighted": module.weight(name) * float(own.norm()),
            "cosine": float(torch.nn.functional.cosine_similarity(own, whole, dim=0)),
        }
        for name, own in flat.items()
    }


def measure(args: argparse.Namespace) -> dict:
    """Train the stage, look at the gradients ``args.looks`` times on the way."""
    config = load_config(args.config, args.set)
    clips, data = open_data(config, args.batch).ssl, config.data
    model = build_model(config.model.size, 0, seconds=data.seconds, seed=config.run.seed)
    module = Pretrain(model, config.loss, config.mask, **varied(config)).train()
    optimizer = build_optimizer(module, config.ssl, config.optim)
    loader = Loader(
        clips,
        batch_size=args.batch,
        seconds=data.seconds,
        train=True,
        seed=config.run.seed,
        mean=data.mean,
        std=data.std,
        drop_last_to=args.batch,
    )
    per_epoch = len(clips) // args.batch
    total = config.ssl.epochs * per_epoch
    # Closer together at the beginning, where most happens.
    looks = sorted({round(total * (i / args.looks) ** 2) for i in range(args.looks)} | {total - 1})
    found, step = [], 0
    while step < total:
        for batch in loader:
            if step in looks:
                found.append({"step": step, "epoch": step / per_epoch, "terms": gradients(module, batch)})
                print(f"step {step}/{total}", {k: round(v["weighted"], 3) for k, v in found[-1]["terms"].items()})
            warmup = round(config.ssl.warmup_epochs * per_epoch)
            set_learning_rate(optimizer, learning_rate(step, total, warmup, config.ssl.lr, config.optim.schedule))
            loss, _ = module(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step == total:
                break
    loader.close()
    weights = {name: getattr(config.loss, name) for name in ("alpha", "beta", "tau", "restore_scale")}
    return {"weights": weights, "size": config.model.size, "batch": args.batch, "clips": len(clips), "looks": found}


def shares(looks: list[dict]) -> dict[str, dict[str, float]]:
    """Of each term, the median over the looks: value, gradient, and its share of the sum of weighted gradients."""
    table = {}
    for name in looks[0]["terms"]:
        own = [look["terms"][name] for look in looks]
        sums = [sum(term["weighted"] for term in look["terms"].values()) for look in looks]
        table[name] = {key: statistics.median(term[key] for term in own) for key in ("value", "gradient", "cosine")}
        table[name]["share"] = statistics.median(t["weighted"] / max(s, 1e-30) for t, s in zip(own, sums, strict=True))
    return table


def draw(result: dict, path: Path) -> None:
    """Values, gradients with their weights, and cosines over the epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.0), layout="constrained")
    looks = result["looks"]
    epochs = [look["epoch"] for look in looks]
    panels = (
        ("value", "value of the term", "log"),
        ("weighted", "norm of its gradient in the AFT, weighted", "log"),
        ("cosine", "cosine with the whole gradient", "linear"),
    )
    for axis, (key, title, scale) in zip(axes, panels, strict=True):
        for name in looks[0]["terms"]:
            style = "--" if name.endswith("_inter") else "-"
            color = f"C{('restore', 'mse', 'kl', 'contrast').index(name.split('_')[0])}"
            axis.plot(epochs, [look["terms"][name][key] for look in looks], style, color=color, label=name)
        axis.set(title=title, xlabel="epoch", yscale=scale)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    weights = ", ".join(f"{name} = {value:g}" for name, value in result["weights"].items())
    figure.suptitle(f"Terms of Multi-SSL, {result['size']} model, {result['clips']} clips, {weights}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field of the TOML")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--looks", type=int, default=24, help="times that the gradients are taken apart")
    parser.add_argument("--name", default="loss_balance", help="of the files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    command = "python benchmarks/loss_balance.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    try:
        result = measure(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    result["machine"] = common.machine({name: version(name) for name in ("torch", "timm")}, command)
    table = shares(result["looks"])
    lines = ["# Balance of the losses", "", f"`{command}`, {result['machine']['date']}.", ""]
    weights = ", ".join(f"{name} {value:g}" for name, value in result["weights"].items())
    lines += [f"Weights: {weights}. Medians over {len(result['looks'])} looks at a run of {result['clips']} clips.", ""]
    lines += [
        "| term | value | gradient | share of the weighted gradients | cosine with the whole |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        numbers = f"{row['value']:.3g} | {row['gradient']:.3g} | {100 * row['share']:.0f} % | {row['cosine']:.2f}"
        lines.append(f"| {name} | {numbers} |")
    common.write(args.out, args.name, result | {"table": table}, "\n".join(lines) + "\n")
    draw(result, args.out / f"{args.name}.png")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
