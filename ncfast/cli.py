"""The command line: `ncfast info`, `ncfast measure`, `ncfast merge`, `ncfast demo`."""

import argparse
import csv
import importlib
import importlib.util
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

import ncfast
from ncfast.collapse import GLOBAL_MEANS, CollapseReport
from ncfast.files import SUFFIXES, read_arrays
from ncfast.measure import as_tensor
from ncfast.ops import dispatch
from ncfast.ops.class_scatter import PRECISIONS
from ncfast.shards import find_shards, is_sharded, measure_shards
from ncfast.statistics import ClassStatistics

OPERATIONS: dict[str, dict[str, bool]] = {  # and the options that what runs depends on
    "class_scatter": {},
    "class_scatter (no scatter)": {"scatter": False},
    "affine_argmax": {},
    "pair_geometry": {},
}
ARRAYS = ("features", "labels", "weight", "bias", "test_features", "test_labels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for an error (one line on stderr), 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Σ shows a question mark
    try:
        arguments = _parser().parse_args(argv)
        if importlib.util.find_spec("rich") is None:
            raise ImportError("the command line needs rich: pip install 'ncfast[cli]'")
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, `head` for one, has had enough: say nothing, now and when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError) as error:
        print("ncfast: error:", _message(error), file=sys.stderr)
        return 2
    return 0


def _message(error: Exception) -> str:
    """One line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"ncfast: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ncfast", description="Neural-collapse metrics for PyTorch.")
    parser.add_argument("--version", action="version", version=f"ncfast {ncfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what this machine has, what would run, and why")
    info.set_defaults(run=_info)

    measure = commands.add_parser(
        "measure",
        help="NC1–NC4 of features and labels in files",
        description="Measures arrays by name. A .npy file is named after itself: features.npy is 'features'. "
        "A folder, a quoted pattern or a .parquet file stands for shards, each with features and labels: "
        "these are read once, in constant memory; NC4, which needs a second time, is not measured.",
    )
    measure.set_defaults(run=_measure)
    measure.add_argument("files", nargs="+", metavar="FILE", help=f"{', '.join(SUFFIXES)}; or shards")
    for name in ARRAYS:
        option = f"--{name.replace('_', '-')}"
        measure.add_argument(option, metavar="NAME", help=f"name of the array (default: {name})")
    measure.add_argument("--num-classes", type=int, metavar="C")
    measure.add_argument("--shards", metavar="I/N", help="of the shards, every N-th from the I-th (1 … N) on")
    measure.add_argument("--save-state", metavar="PATH", help="write the state of shards for 'ncfast merge'")
    _add_report_options(measure)
    measure.add_argument("--precision", choices=PRECISIONS, default="high")
    measure.add_argument("--ignore-index", type=int, default=-100, metavar="LABEL")
    measure.add_argument("--nonfinite", choices=("error", "skip"), default="error")

    merge = commands.add_parser(
        "merge",
        help="one report from the states that 'ncfast measure --save-state' wrote",
        description="Merges states of any split of the data, in any order.",
    )
    merge.set_defaults(run=_merge)
    merge.add_argument("states", nargs="+", metavar="STATE")
    merge.add_argument("--save-state", metavar="PATH", help="write the merged state too")
    _add_report_options(merge)

    demo = commands.add_parser(
        "demo",
        help="train a small network past zero training error and watch it collapse",
        description="Trains on images that a package ships; writes collapse.csv, .json and .png.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR")
    demo.add_argument("--quick", action="store_true", help="8×8 digits instead of 5,000 MNIST images")
    demo.add_argument("--epochs", type=int, metavar="N", help="default: 200")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _add_report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--classifier", metavar="FILE", help="file of weight and bias, for shards and states"
    )
    command.add_argument("--global-mean", choices=GLOBAL_MEANS, default="samples")
    command.add_argument("--json", metavar="PATH", help="write the report as JSON; - is standard output")
    command.add_argument("--csv", metavar="PATH", help="write the report as CSV; - is standard output")


def _info(_: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("ncfast", ncfast.__version__)
    facts.add_row("Python", platform.python_version())
    facts.add_row("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts.add_row("GPU", gpu)
    facts.add_row("forced", dispatch.forced_backend() or "nothing")
    for backend in dispatch.BACKENDS:
        facts.add_row(backend, dispatch.unavailable(backend) or "installed")
    isas = _isas()
    if isas:
        has = (f"{name} {'yes' if available else 'no'}" for name, available in isas)
        facts.add_row("CPU instruction sets", ", ".join(has))
    console.print(facts)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        table = Table("operation", "backend", "", title=f"float32 features on {device}", title_justify="left")
        for shown, options in OPERATIONS.items():
            operation = shown.split()[0]
            for backend, reason in dispatch.explain(operation, torch.empty(1, 1, device=device), **options):
                style = "bold green" if reason == "runs" else ""
                if backend == "cpu" and reason == "runs":
                    reason += f" on {importlib.import_module('ncfast._cpu').isa(operation)}"
                table.add_row(shown, backend, reason, style=style)
                shown = ""
            table.add_section()
        console.print(table)


def _isas() -> list[tuple[str, bool]]:
    """The instruction sets that the C++ extension has bodies for, and whether this machine has them."""
    if dispatch.unavailable("cpu") is not None:
        return []
    return importlib.import_module("ncfast._cpu").isas()


def _measure(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments)
    if arguments.shards or arguments.save_state or any(map(is_sharded, arguments.files)):
        _measure_shards(arguments)
        return
    if arguments.classifier:
        arguments.files.append(arguments.classifier)
    arrays = read_arrays(arguments.files)
    chosen: dict[str, Any] = {}
    for name in ARRAYS:
        asked = getattr(arguments, name)
        if asked is not None and asked not in arrays:
            raise ValueError(f"no array is named {asked!r}; there are: {', '.join(arrays)}")
        chosen[name] = arrays.get(asked or name)
    for name in ("features", "labels"):
        if chosen[name] is None:
            raise ValueError(f"no array is named {name!r}; there are: {', '.join(arrays)} (see --{name})")
    test = (chosen.pop("test_features"), chosen.pop("test_labels"))
    if (test[0] is None) != (test[1] is None):
        raise ValueError("test_features and test_labels are needed together")
    if chosen["weight"] is None and not (arguments.test_features or arguments.test_labels):
        test = (None, None)  # they happen to be in the file; nothing can be measured on them
    report = ncfast.measure(
        **chosen,
        test=None if test[0] is None else test,
        num_classes=arguments.num_classes,
        global_mean=arguments.global_mean,
        precision=arguments.precision,
        ignore_index=arguments.ignore_index,
        nonfinite=arguments.nonfinite,
        progress=_shows_progress(),
    )
    _write(report, arguments)


def _measure_shards(arguments: argparse.Namespace) -> None:
    shards = find_shards(arguments.files)
    if arguments.shards:
        index, _, count = arguments.shards.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ValueError(f"--shards must be I/N with 1 ≤ I ≤ N, got {arguments.shards!r}")
        shards = shards[int(index) - 1 :: int(count)]
        if not shards:
            raise ValueError(f"share {arguments.shards} of the shards is empty: there are fewer than {count}")
    if arguments.test_features or arguments.test_labels:
        raise ValueError("shards are read only once: there is nothing to measure on test data")
    weight, bias = _classifier(arguments)
    if weight is None and (arguments.weight or arguments.bias):
        raise ValueError("--weight and --bias name arrays of the file --classifier, which was not given")
    if weight is None and arguments.num_classes is None:
        raise ValueError("shards need --num-classes or --classifier: they are read only once")
    stats = measure_shards(
        shards,
        len(weight) if arguments.num_classes is None else arguments.num_classes,
        features=arguments.features or "features",
        labels=arguments.labels or "labels",
        precision=arguments.precision,
        ignore_index=arguments.ignore_index,
        nonfinite=arguments.nonfinite,
        progress=_shows_progress(),
    )
    if arguments.save_state:
        stats.save(arguments.save_state)
    if not arguments.save_state or arguments.json or arguments.csv:
        _write(ncfast.collapse(stats, weight, bias, global_mean=arguments.global_mean), arguments)


def _merge(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments)
    stats = ClassStatistics.load(arguments.states[0])
    for path in arguments.states[1:]:
        other = ClassStatistics.load(path)
        try:
            stats.merge(other)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    report = ncfast.collapse(stats, *_classifier(arguments), global_mean=arguments.global_mean)
    if arguments.save_state:
        stats.save(arguments.save_state)
    _write(report, arguments)


def _classifier(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Weight and bias of the file --classifier, or None twice."""
    if arguments.classifier is None:
        return None, None
    arrays = read_arrays([arguments.classifier])
    weight, bias = getattr(arguments, "weight", None), getattr(arguments, "bias", None)
    weight, bias = weight or "weight", bias or "bias"
    if weight not in arrays:
        raise ValueError(
            f"{arguments.classifier}: no array is named {weight!r}; there are: {', '.join(arrays)}"
        )
    if getattr(arguments, "bias", None) is not None and bias not in arrays:
        raise ValueError(
            f"{arguments.classifier}: no array is named {bias!r}; there are: {', '.join(arrays)}"
        )
    found = arrays.get(bias)
    return as_tensor(arrays[weight], weight), None if found is None else as_tensor(found, bias)


def _shows_progress() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


def _check_outputs(arguments: argparse.Namespace) -> None:
    if arguments.json == arguments.csv == "-":
        raise ValueError("--json and --csv cannot both go to standard output")


def _write(report: CollapseReport, arguments: argparse.Namespace) -> None:
    if "-" not in (arguments.json, arguments.csv):
        _print_report(report)
    for path, write in ((arguments.json, _write_json), (arguments.csv, _write_csv)):
        if path is not None:
            with nullcontext(sys.stdout) if path == "-" else open(path, "w", newline="") as file:
                write(report, file)


def _print_report(report: CollapseReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("", "value", box=SIMPLE_HEAD)
    for line in str(report).splitlines():
        name, _, value = line.partition(" ")
        table.add_row(name, value.strip())
    Console().print(table)


def _write_json(report: CollapseReport, file: Any) -> None:
    json.dump(report.as_dict(), file, indent=1, allow_nan=False)
    file.write("\n")


def _write_csv(report: CollapseReport, file: Any) -> None:
    writer = csv.DictWriter(file, list(report.as_dict()), lineterminator="\n")
    writer.writeheader()
    writer.writerow(report.as_dict())


def _demo(arguments: argparse.Namespace) -> None:
    from ncfast.demo import run_demo

    run_demo(arguments.output, quick=arguments.quick, epochs=arguments.epochs, seed=arguments.seed)
