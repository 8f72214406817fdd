"""What should the curves of a pre-training look like?

    python benchmarks/reference.py RUN --out benchmarks/results/reference/NAME

Thins the metrics of a run to a small table a stage (``STAGE.csv``), with the settings they belong to
(``reference.json``) and a picture of the losses (``losses.png``). `fastsskd report OTHER --reference FOLDER` lays them
beside another run's curves.
"""

import argparse
from pathlib import Path

from fastsskd.figures import loss_curves
from fastsskd.report import reference
from fastsskd.report.data import read_run

RESULTS = Path(__file__).parent / "results/reference"


def collect(path: Path, out: Path) -> list[Path]:
    """Tables, settings and picture of the run at ``path``, in ``out``."""
    run = read_run(path)
    files = reference.save(run, out)
    lines = [{"stage": stage.name, **row} for stage in run.stages for row in reference.thinned(stage.lines)]
    if lines:
        files.append(out / "losses.png")
        loss_curves(lines, files[-1])
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder to write; default: results/reference/ and the run's name")
    args = parser.parse_args()
    for file in collect(args.run, args.out or RESULTS / args.run.resolve().name):
        print(f"{file}: {file.stat().st_size / 1e3:.1f} kB")
