"""One rank of the distributed runs of tests/test_lightning.py, `torchrun lightning_worker.py FOLDER`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import leave
from test_lightning import STEPS, Classifier, callback, loader, trainer

from ncfast.integrations.lightning import NeuralCollapseCallback


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    # Lightning's own sampler would shuffle.
    options |= {"precision": "64-true", "use_distributed_sampler": False}

    def run(checkpoint: Path | None = None, **more: Any) -> tuple[lightning.Trainer, NeuralCollapseCallback]:
        ours = callback(train_accuracy="accuracy")
        fit = trainer(folder, ours, *more.pop("callbacks", ()), **options, **more)
        fit.fit(Classifier().double(), loader(20, rank, ranks), ckpt_path=checkpoint)
        return fit, ours

    fit, whole = run(max_epochs=3, enable_checkpointing=False)
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    middle = STEPS + 1  # of the second epoch
    run(
        max_steps=middle,
        callbacks=[ModelCheckpoint(folder, filename="middle", every_n_train_steps=middle, save_top_k=-1)],
    )
    _, resumed = run(folder / "middle.ckpt", max_epochs=3, enable_checkpointing=False)
    runs = {"whole": whole.tracker.history, "resumed": resumed.tracker.history, "logged": logged}
    (folder / f"{rank}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
