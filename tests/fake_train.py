"""Stands in for launch/train.py where tests are about the processes alone: same arguments, same files, no training.

``run.seed`` says what it does: 1 = fails, 2 = waits for a signal, 3 = is killed, 4 = waits for another job's beginning.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from fastsskd import config
from launch.train import parse


def main() -> int:
    args = parse()
    settings = config.load(args.config, args.set)
    out = Path(settings.run.out)
    if (out / "config.toml").exists() != args.resume:
        print("error: resume or not, and it was the other")
        return 1
    (out / "checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
    (out / "checkpoints/iter1-distill").mkdir(exist_ok=True)
    (out / "config.toml").write_text(config.to_toml(settings))
    (out / "ds_config.json").write_text(Path(args.ds_config).read_text())
    with open(out / "calls", "a") as file:
        names = ("OMP_NUM_THREADS", "MASTER_PORT", "RANK")
        file.write(json.dumps({**{n: os.environ.get(n) for n in names}, "workers": settings.data.workers}) + "\n")
    if settings.run.seed == 1:
        print("error: this clip is no clip\nand a line more")
        return 1
    if settings.run.seed == 2 and not args.resume:
        signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(1)))
        (out / "ready").touch()
        time.sleep(60)
    if settings.run.seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.run.seed == 4:
        deadline = time.monotonic() + 20
        while len(list(out.parent.glob("*/calls"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    metrics = {"accuracy": 0.5, "mAP": 0.6}
    together = len(list(out.parent.glob("*/calls")))
    result = {"status": "complete", "metrics": metrics, "together": together, "seconds": 1.0}
    result |= {"iterations": [{"iteration": 1, "metrics": metrics}], "teacher": None, "ensemble": None}
    (out / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
