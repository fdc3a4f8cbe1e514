"""Arrays by name from .npz, .npy, .pt and .safetensors files, memory-mapped where the format allows."""

import importlib.util
import pickle
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")

# What numpy, zipfile and torch raise for bytes that are not what they should be (found by flipping bytes).
_NUMPY_DAMAGE = (
    *(ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
    NotImplementedError,  # a zip version or compression that zipfile does not know
)
_TORCH_DAMAGE = (
    *(RuntimeError, ValueError, TypeError, EOFError, LookupError, AttributeError, AssertionError),
    pickle.UnpicklingError,
)


def read_arrays(paths: Iterable[str | Path]) -> dict[str, np.ndarray | torch.Tensor]:
    """Read the named arrays of all files into one dictionary.

    A .npy file, and a .pt file of one tensor, is named after its file: `features.npy` holds `features`.
    Nothing is unpickled but tensors, and what can be memory-mapped is: .npy, .safetensors, .pt, and the
    members of a .npz that are not compressed.

    Raises:
        OSError: a file cannot be read. ImportError: safetensors is not installed. ValueError: an unknown
            format, a damaged file, or two arrays of one name.
    """
    arrays: dict[str, np.ndarray | torch.Tensor] = {}
    for path in map(Path, paths):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown format; expected one of {', '.join(SUFFIXES)}")
        with open(path, "rb"):  # what cannot be opened is reported by name, the same for every format
            found = _READERS[path.suffix](path)
        for name, array in found.items():
            if name in arrays:
                raise ValueError(
                    f"{path}: an array named {name!r} was already read from another file "
                    "(if the files are shards, name their folder or add --shards 1/1)"
                )
            arrays[name] = array
    return arrays


def _read_npy(path: Path) -> dict[str, Any]:
    try:
        return {path.stem: np.lib.format.open_memmap(path, mode="r")}
    except _NUMPY_DAMAGE:
        raise ValueError(f"{path} is no .npy file of numbers, or is damaged") from None


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        with np.load(path, allow_pickle=False) as loaded:
            arrays = [member for member in members if member.filename.endswith(".npy")]
            return {member.filename.removesuffix(".npy"): _member(path, member, loaded) for member in arrays}
    except _NUMPY_DAMAGE:
        raise ValueError(f"{path} is no .npz file of numbers, or is damaged") from None


def _member(path: Path, member: zipfile.ZipInfo, loaded: Any) -> np.ndarray:
    """One array of a .npz: mapped from where it lies in the archive, unless it is compressed."""
    if member.compress_type != zipfile.ZIP_STORED:
        return loaded[member.filename.removesuffix(".npy")]
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)  # its last two words are the lengths of the name and the extra field
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read_header:
            return loaded[member.filename.removesuffix(".npy")]
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject or 0 in shape:
            return loaded[member.filename.removesuffix(".npy")]
        order: Literal["F", "C"] = "F" if fortran else "C"
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)


def _read_pt(path: Path) -> dict[str, Any]:
    try:
        # Only the format that torch writes since 1.6 can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _TORCH_DAMAGE:
        raise ValueError(f"{path} is no .pt file of tensors, or is damaged") from None
    if isinstance(content, torch.Tensor):
        return {path.stem: content}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a tensor or a dictionary of tensors, not a {type(content).__name__}"
        )
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _read_safetensors(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("reading .safetensors needs safetensors (pip install safetensors)")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(f"{path} is no .safetensors file, or is damaged") from None


_READERS = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".pt": _read_pt,
    ".pth": _read_pt,
    ".safetensors": _read_safetensors,
}
