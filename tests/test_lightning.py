"""NeuralCollapseCallback in real runs of lightning.Trainer."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ncfast
from ncfast.integrations.lightning import NeuralCollapseCallback

# Lightning's own advice (workers, loggers, its use of torch internals) is no concern of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]

C, P, N = 3, 8, 60
STEPS = 3  # of an epoch
WORKER = Path(__file__).with_name("lightning_worker.py")


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(5, P), torch.nn.ReLU())
        self.fc = torch.nn.Linear(P, C)
        self.seen = []
        self.fc.register_forward_hook(self.see)

    def see(self, _module, inputs, _output):
        if self.trainer.training:
            self.seen.append(inputs[0].detach())

    def training_step(self, batch, _):
        inputs, labels = batch["inputs"], batch["labels"]
        outputs = self.fc(self.body(inputs))
        self.log("accuracy", (outputs.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return torch.nn.functional.cross_entropy(outputs, labels)

    def validation_step(self, batch, _):
        self.fc(self.body(batch["inputs"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(TensorDataset):
    def __getitem__(self, index):
        inputs, labels = super().__getitem__(index)
        return {"inputs": inputs, "labels": labels}


def loader(different=N, rank=0, ranks=1):
    """N rows in three batches, `different` of which are not repeated; of each batch this rank's share."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(N) % different
    inputs = torch.randn(N, 5, generator=generator)[rows]
    return DataLoader(Rows(inputs[rank::ranks], rows[rank::ranks] % C), batch_size=N // STEPS // ranks)


def callback(**options):
    return NeuralCollapseCallback(labels=lambda batch: batch["labels"], **options)


def trainer(path, *callbacks, **options):
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=path,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_every_field_of_every_epoch_is_logged(tmp_path):
    class Watch(lightning.Callback):
        logged = []  # noqa: RUF012 (one run, one list)

        def on_train_epoch_end(self, trainer, pl_module):
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.logged.append((values, list(pl_module.seen), pl_module.fc.weight.detach().clone()))
            pl_module.seen.clear()

    module, ours = Classifier(), callback(train_accuracy="accuracy")
    # Two batches per optimiser step, and validation in between, which must not count.
    fit = trainer(
        tmp_path, ours, Watch(), max_epochs=3, accumulate_grad_batches=2, enable_checkpointing=False
    )
    fit.fit(module, loader(), loader())
    assert [record["epoch"] for record in ours.tracker.history] == [0, 1, 2]
    shift = None
    for record, (logged, features, weight) in zip(ours.tracker.history, Watch.logged, strict=True):
        stats = ncfast.ClassStatistics(C, P, shift=shift)
        for batch, labels in zip(features, (torch.arange(N) % C).split(20), strict=True):
            stats.update(batch, labels)
        shift = stats.means.float()
        report = ncfast.collapse(stats, weight)
        assert (record["nc1"], record["nc3_self_duality"]) == (report.nc1, report.nc3_self_duality)
        assert record["num_samples"] == N
        assert record["train_accuracy"] == logged["accuracy"]
        numbers = {name for name, value in record.items() if isinstance(value, int | float)} - {"epoch"}
        assert {name for name in logged if name.startswith("collapse/")} == {f"collapse/{n}" for n in numbers}
        for name in numbers:
            assert logged[f"collapse/{name}"] == pytest.approx(float(record[name]), rel=2**-23)  # float32
    assert not module.fc._forward_pre_hooks


def test_resumed_from_a_checkpoint_in_the_middle_of_an_epoch(tmp_path):
    data = loader(different=20)  # batches all alike: Lightning begins an interrupted loader from its start
    whole = callback()
    trainer(tmp_path, whole, max_epochs=2, enable_checkpointing=False).fit(Classifier(), data)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    first = callback()
    trainer(tmp_path, first, saving, max_steps=4).fit(Classifier(), data)
    (path,) = tmp_path.glob("*.ckpt")
    resumed = callback()
    run = trainer(tmp_path, resumed, max_epochs=2, enable_checkpointing=False)
    run.fit(Classifier(), data, ckpt_path=path)
    assert resumed.tracker.history == whole.tracker.history


def test_head_by_name_and_a_metric_nobody_logged(tmp_path):
    ours = callback(head="fc", train_accuracy="acc")
    fit = trainer(tmp_path, ours, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(ValueError, match="no metric 'acc' was logged; there are: accuracy"):
        fit.fit(Classifier(), loader())
    assert isinstance(ours.tracker.head, torch.nn.Linear)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and what each of two leaves behind, training on the same batches."""
    left = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", str(WORKER), str(folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-4000:]
        left[ranks] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return left


@pytest.mark.parametrize("part", ["whole", "resumed"])
def test_two_processes_report_what_one_does(runs, part):
    """Also resumed from within an epoch, though only rank 0 writes the checkpoint."""
    (one,), two = runs[1], runs[2]
    assert two[0][part] == two[1][part]
    assert [record["num_samples"] for record in two[0][part]] == [N] * 3
    for record, other in zip(two[0][part], one["whole"], strict=True):
        if part == "resumed":  # Lightning itself goes on from rank 0's accuracy on every rank
            record["train_accuracy"] = other["train_accuracy"]
        assert record.keys() == other.keys()
        for name, value in other.items():
            # float64, trained alike but for the order of sums; Lightning averages accuracies in float32.
            bound = 2**-22 if name == "train_accuracy" else 1e-9
            expected = pytest.approx(value, rel=bound, abs=1e-12) if isinstance(value, float) else value
            assert record[name] == expected, name


def test_two_processes_log_what_one_does(runs):
    (one,), two = runs[1], runs[2]
    for logged in (one["logged"], two[0]["logged"], two[1]["logged"]):
        del logged["accuracy"]  # without sync_dist each process has its own
    assert two[0]["logged"] == two[1]["logged"]
    assert two[0]["logged"].keys() == one["logged"].keys()
    for name, value in one["logged"].items():
        assert two[0]["logged"][name] == pytest.approx(value, rel=2**-22), name  # logged as float32


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_early_leaves_the_model_as_it_was(tmp_path, failure):
    class Fails(Classifier):
        def training_step(self, batch, index):
            if index == 1:
                raise failure("enough")
            return super().training_step(batch, index)

    module, ours = Fails(), callback()
    # Lightning ends the process after a KeyboardInterrupt.
    with pytest.raises(RuntimeError if failure is RuntimeError else SystemExit):
        trainer(tmp_path, ours, max_epochs=1, enable_checkpointing=False).fit(module, loader())
    assert ours.tracker.statistics.num_samples == N // STEPS
    assert not module.fc._forward_pre_hooks


def test_sanity_check_and_several_loaders(tmp_path):
    """Validation before training does not count; of a combined batch, `labels` takes the part it is told."""

    class Both(Classifier):
        def training_step(self, batch, index):
            self.fc(self.body(batch["other"]["inputs"]))
            return super().training_step(batch["ours"], index)  # the last pass of a step is the one measured

        def validation_step(self, batch, index, dataloader_idx=0):  # noqa: ARG002 (Lightning asks for it)
            super().validation_step(batch, index)

    module, ours = Both(), NeuralCollapseCallback(labels=lambda batch: batch["ours"]["labels"])
    fit = trainer(tmp_path, ours, max_epochs=2, num_sanity_val_steps=2, enable_checkpointing=False)
    fit.fit(module, {"ours": loader(), "other": loader(different=7)}, [loader(), loader()])
    assert [record["num_samples"] for record in ours.tracker.history] == [N, N]
    features = torch.cat(module.seen[-5::2])  # the last epoch's second pass of every step
    means = torch.stack([features[c::C].mean(0) for c in range(C)])
    centred = (means - features.mean(0)).double()
    # float32 means of 20 features of order 1, squared
    trace_between = ours.tracker.history[-1]["trace_between"]
    assert trace_between == pytest.approx(float(centred.square().sum(1).mean()), rel=1e-5)


def test_only_rank_0_goes_on_from_the_rows_of_one_process():
    """Some of which wait in its checkpoint."""
    ours = callback()
    ours.on_train_start(types.SimpleNamespace(global_rank=0), Classifier())
    for _ in range(3):
        ours.tracker.statistics.update(torch.randn(30, P), torch.arange(30) % C)
    state = ours.state_dict()
    assert len(state["statistics"]["waiting_labels"]) == 30
    for rank, samples in [(0, 90), (1, 0)]:
        resumed = callback()
        resumed.load_state_dict(state)
        resumed.on_train_start(types.SimpleNamespace(global_rank=rank), Classifier())
        assert resumed.tracker.statistics.num_samples == samples
        assert resumed.tracker.statistics.counts.sum() == samples


def test_a_state_waiting_for_training_is_not_lost():
    ours = callback()
    ours.load_state_dict({"format": 1})
    assert ours.state_dict() == {"format": 1}
