"""Features in many files, each with its labels: read once, piece by piece, whatever they add up to."""

import glob
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ncfast.files import read_arrays
from ncfast.measure import as_tensor, progress_bar
from ncfast.ops.class_scatter import check_features, check_labels, rows_from
from ncfast.statistics import ClassStatistics

SHARD_SUFFIXES = (".npz", ".safetensors", ".parquet", ".pt", ".pth")

_PIECE = 1 << 24  # elements of the features handled at once
_PARQUET_ROWS = 4096  # rows decoded at once


def is_sharded(path: str | Path) -> bool:
    """Whether a path stands for shards: a folder, a glob pattern or a .parquet file."""
    return Path(path).is_dir() or _is_pattern(path) or Path(path).suffix == ".parquet"


def _is_pattern(path: str | Path) -> bool:
    """Whether it is one for `glob`, and not the name of a file: `run[1].npz`."""
    return glob.has_magic(str(path)) and not Path(path).is_file()


def find_shards(paths: Iterable[str | Path]) -> list[Path]:
    """The files that the paths stand for, sorted by name: of a folder, or matching a pattern, or as given.

    Raises:
        ValueError: a folder or pattern without shards, or a file of an unknown format.

    """
    shards: set[Path] = set()
    for path in paths:
        if Path(path).is_dir():
            found = [file for file in Path(path).iterdir() if file.suffix in SHARD_SUFFIXES]
        elif _is_pattern(path):
            found = [Path(match) for match in glob.glob(str(path), recursive=True)]
        else:
            found = [Path(path)]
        if not found:
            raise ValueError(f"{path} has no shards ({', '.join(SHARD_SUFFIXES)})")
        shards.update(found)
    for shard in shards:
        if shard.suffix not in SHARD_SUFFIXES:
            raise ValueError(f"{shard}: unknown format; expected one of {', '.join(SHARD_SUFFIXES)}")
    return sorted(shards)


def measure_shards(
    shards: Iterable[str | Path],
    num_classes: int,
    *,
    features: str = "features",
    labels: str = "labels",
    progress: bool = False,
    **options: Any,
) -> ClassStatistics:
    """Accumulate files that each hold features [N, p] and labels [N], in one pass and constant memory.

    Args:
        shards: .npz, .safetensors, .pt (memory-mapped where not compressed) or .parquet files, the features
            of these a column of lists.
        num_classes: C.
        features: name of the features' array or column.
        labels: name of the labels' array or column.
        progress: show a progress bar over the shards (needs tqdm).
        options: those of `ClassStatistics`.

    Returns:
        ClassStatistics, ready for `merge`, `save` or `collapse`.

    Raises:
        OSError: a file cannot be read. ValueError, TypeError: no shards, no array of that name, dimensions
            that differ between shards; and what `ClassStatistics.update` raises, naming the file and row.

    """
    stats: ClassStatistics | None = None
    for shard in progress_bar([Path(shard) for shard in shards], progress, "shards"):
        start = 0
        try:
            for h, y in _pieces(shard, features, labels):
                stats = stats or ClassStatistics(num_classes, h.shape[1], **options)
                with rows_from(start):
                    stats.update(h, y)
                start += len(h)
        except TypeError as error:
            raise TypeError(f"{shard}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{shard}: {error}") from None
    if stats is None:
        raise ValueError("there are no shards to measure, or none with a row")
    return stats


def _pieces(shard: Path, features: str, labels: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if shard.suffix == ".parquet":
        yield from _parquet_pieces(shard, features, labels)
        return
    arrays = read_arrays([shard])
    for name in (features, labels):
        if name not in arrays:
            raise ValueError(f"no array is named {name!r}; there are: {', '.join(arrays)}")
    h, y = as_tensor(arrays[features], features), as_tensor(arrays[labels], labels)
    check_features(h, features)
    check_labels(y, h, labels)
    rows = max(1, _PIECE // h.shape[1])
    yield from zip(h.split(rows), y.split(rows), strict=True)


def _is_list_of_numbers(kind: Any) -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and (types.is_floating(kind.value_type) or types.is_integer(kind.value_type))


def _parquet_pieces(shard: Path, features: str, labels: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("reading .parquet needs pyarrow (pip install pyarrow)")
    import pyarrow
    from pyarrow import parquet

    with open(shard, "rb") as opened:
        try:
            file = parquet.ParquetFile(opened)
        except pyarrow.ArrowInvalid:
            raise ValueError("is no .parquet file, or is damaged") from None
        for name in (features, labels):
            if name not in file.schema_arrow.names:
                raise ValueError(
                    f"no column is named {name!r}; there are: {', '.join(file.schema_arrow.names)}"
                )
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[features, labels]):
            column, y = batch.column(features), batch.column(labels)
            if not _is_list_of_numbers(column.type):
                raise TypeError(f"column {features!r} must hold lists of numbers, got {column.type}")
            values = column.flatten()
            if column.null_count or values.null_count or y.null_count or len(values) % len(column):
                raise ValueError("the columns must have no nulls, and lists of one length")
            dim = len(values) // len(column)
            if not pyarrow.types.is_fixed_size_list(column.type) and any(
                length.as_py() != dim for length in column.value_lengths().unique()
            ):
                raise ValueError(f"the lists of column {features!r} must all have one length")
            h = values.to_numpy(zero_copy_only=False).reshape(len(column), dim)
            yield as_tensor(h, features), as_tensor(y.to_numpy(zero_copy_only=False), labels)
