"""NeuralCollapseCallback in real runs of lightning.Trainer."""

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


def loader(different=N):
    """Three batches of 20 rows, `different` of which are not repeated."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(N) % different
    return DataLoader(Rows(torch.randn(N, 5, generator=generator)[rows], rows % C), batch_size=20)


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
