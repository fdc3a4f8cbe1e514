"""A small training run that saves after every step; tests/test_checkpoint.py kills and restarts it."""

import json
import os
import sys
from pathlib import Path

import torch

import ncfast

EPOCHS, STEPS = 3, 4


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    tracker = ncfast.Tracker(model)
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tracker.load_state_dict(state["tracker"])
        done = state["done"]
    print("from", done, flush=True)
    while done < EPOCHS * STEPS:
        generator = torch.Generator().manual_seed(done)
        inputs, labels = torch.randn(64, 10, generator=generator), torch.arange(64) % 5
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        tracker.update(labels)
        optimizer.step()
        done += 1
        if done % STEPS == 0:
            tracker.end_epoch(train_accuracy=0.5)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
        torch.save(state | {"tracker": tracker.state_dict()}, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", checkpoint)
        print("done", done, flush=True)
    (folder / "history.json").write_text(json.dumps(tracker.history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
