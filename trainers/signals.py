"""What a teacher said of the training blocks, on disk: written once, read by every trial.

A cache is a folder of .npy files, one a kind of data, whose rows are blocks. Every chunk of rows of
every file has a checksum, which is compared the first time that one of the chunk's rows is read.

    teacher/        the teacher's config and tokenizer, to be compared with a student's
    cache.json      signal, arrays, how many chunks are safe on disk, checksums of whole files
    blocks.npy      which training blocks the rows stand for, in rising order
    checksums.npy   CRC-32 of each chunk, (chunks, files with a row a block)
    hidden.npy, head.npy, output.7.npy, …                            hidden_cache
    ids.npy, entropy.npy, and for the likeliest probabilities.npy    sampled_cache, topk_cache
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from trainers.config import HiddenCache, SampledCache, Signal, TopKCache
from trainers.contract import DamagedInputError, StageError
from trainers.shapes import NPY_HEADER_BYTES, ArraySpec
from trainers.teacher import DenseTargets, OutputHead, SparseTargets, TeacherSignal

VERSION = 1
DESCRIPTION = "cache.json"
NO_STATES = {"blocks", "checksums", "head", "hidden"}
"""The arrays of a hidden cache that are no inner states."""

CachedSignal = HiddenCache | SampledCache | TopKCache
Array = NDArray[Any]


class DamagedCacheError(DamagedInputError):
    """A file of a cache is not what was written: the cache has to be made again."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__("signals", f"the cache is damaged: {file}: {what}")
        self.file, self.what = file, what

    def __reduce__(self) -> tuple[type[DamagedCacheError], tuple[Path, str]]:
        return type(self), (self.file, self.what)  # it may end a worker in another process


@dataclass(frozen=True)
class Header:
    """What a cache is made of. `softcap` is c of the teacher's c * tanh(logits / c), if any."""

    signal: CachedSignal
    block_length: int
    blocks_a_chunk: int
    softcap: float | None
    arrays: Mapping[str, ArraySpec]
    version: int = VERSION

    @property
    def by_block(self) -> list[str]:
        """The arrays with a row a block, in the order of the columns of `checksums`."""
        return [name for name, array in self.arrays.items() if array.by_block]

    @property
    def whole(self) -> list[str]:
        """The arrays without a row a block."""
        return [name for name, array in self.arrays.items() if not array.by_block]

    @property
    def states(self) -> list[str]:
        """The inner states of a hidden cache."""
        return [name for name in self.by_block if name not in NO_STATES]

    @property
    def blocks(self) -> int:
        """How many blocks it says something of."""
        return self.arrays["blocks"].shape[0]

    @property
    def chunks(self) -> int:
        """In how many chunks its blocks stand."""
        return self.arrays["checksums"].shape[0]

    @property
    def file_bytes(self) -> int:
        """Bytes of all of its arrays on disk."""
        return sum(array.file_bytes for array in self.arrays.values())

    def rows(self, chunk: int) -> slice:
        """The rows of a chunk, from 0."""
        first = chunk * self.blocks_a_chunk
        return slice(first, min(first + self.blocks_a_chunk, self.blocks))


@dataclass(frozen=True)
class Description:
    """What cache.json says: the header, how far the cache is, and, when it is whole, the CRC-32 of
    the files without a row a block."""

    header: Header
    chunks_done: int
    crc32: Mapping[str, int]


_DESCRIPTION = TypeAdapter(Description)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


# --- bf16 and words, as numpy knows them -------------------------------------------------------


def to_disk(tensor: Tensor, dtype: str) -> Array:
    """The tensor as an array of this type; bf16 as its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return np.ascontiguousarray(tensor.cpu().numpy().astype(dtype, copy=False))


def from_disk(array: Array) -> Tensor:
    """Numbers that `to_disk` wrote; 16 bits are a bf16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


# --- writing ---------------------------------------------------------------------------------


class CacheWriter:
    """Writes a cache chunk by chunk into a folder, and goes on there after the last chunk that is
    safe on disk. Raises `StageError` where the disk has no room for all of it."""

    def __init__(self, folder: Path, header: Header) -> None:
        self._folder, self._header = folder, header
        self.done = _chunks_done(folder, header)
        if self.done == 0:
            _create(folder, header)
        self._files = {name: _file(folder, name).open("r+b") for name in header.arrays}

    def put(self, name: str, values: Tensor) -> None:
        """Write an array that has no row a block."""
        spec = self._header.arrays[name]
        _write_at(self._files[name], 0, to_disk(values, spec.dtype))

    def append(self, chunk: Mapping[str, Tensor]) -> None:
        """Write the next chunk's rows of every array that has a row a block."""
        rows, checksums = self._header.rows(self.done), []
        for name in self._header.by_block:
            spec = self._header.arrays[name]
            array = to_disk(chunk[name], spec.dtype)
            assert array.shape == (rows.stop - rows.start, *spec.shape[1:]), (name, array.shape)
            _write_at(self._files[name], rows.start * array[0].nbytes, array)
            checksums.append(zlib.crc32(array.data))
        row = np.array(checksums, dtype=np.uint32)
        _write_at(self._files["checksums"], self.done * row.nbytes, row)
        self.done += 1

    def flush(self) -> None:
        """Make what was written safe on disk, and only then say that it is there."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        _describe(self._folder, Description(self._header, self.done, {}))

    def finish(self) -> None:
        """Flush, and declare the cache whole."""
        assert self.done == self._header.chunks
        self.flush()
        crc32 = {name: _crc32_of(_file(self._folder, name)) for name in self._header.whole}
        _describe(self._folder, Description(self._header, self.done, crc32))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _chunks_done(folder: Path, header: Header) -> int:
    """How many chunks of exactly this cache are in the folder; 0 where anything is amiss."""
    try:
        found = _read_description(folder)
        _check_sizes(folder, header)
    except DamagedCacheError:
        return 0
    return found.chunks_done if found.header == header else 0


def _create(folder: Path, header: Header) -> None:
    needed, free = header.file_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise StageError(
            f"the cache takes {needed / 1e9:.2f} GB, and the disk of {folder} has "
            f"{free / 1e9:.2f} GB left"
        )
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for name, spec in header.arrays.items():
        with _file(folder, name).open("wb") as file:
            described = {
                "descr": npy.dtype_to_descr(np.dtype(spec.dtype)),
                "fortran_order": False,
                "shape": spec.shape,
            }
            npy.write_array_header_1_0(file, described)
            assert file.tell() == NPY_HEADER_BYTES
            file.truncate(spec.file_bytes)


def _write_at(file: BinaryIO, place: int, array: Array) -> None:
    # Written rather than assigned to a memory map: there a full disk kills the process.
    file.seek(NPY_HEADER_BYTES + place)
    file.write(array.data)


def _describe(folder: Path, description: Description) -> None:
    values = asdict(description)
    values["header"]["signal"] = description.header.signal.model_dump()
    beside = folder / f"{DESCRIPTION}.part"
    with beside.open("w") as stream:
        stream.write(json.dumps(values, indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(folder / DESCRIPTION)


def _crc32_of(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


# --- reading ---------------------------------------------------------------------------------


def open_cache(folder: Path, signal: Signal) -> TeacherSignal:
    """The teacher's signal that the cache in `folder` holds. Rows stay on disk until they are read.

    Raises `DamagedCacheError`, here or at the first reading of a damaged chunk, and `StageError`
    where the cache is of another kind than `signal`.
    """
    rows = _CachedRows(folder)
    if rows.header.signal != signal:
        held = rows.header.signal.model_dump()
        raise StageError(f"the cache in {folder} holds {held}, not {signal.model_dump()}")
    if isinstance(signal, HiddenCache):
        return CachedHidden(rows)
    return CachedTokens(rows)


def _read_description(folder: Path) -> Description:
    file = folder / DESCRIPTION
    try:
        described = json.loads(file.read_text())
        version = described["header"]["version"]
        if version != VERSION:
            raise DamagedCacheError(file, f"the format's version is {version}, not {VERSION}")
        return _DESCRIPTION.validate_python(described)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCacheError(file, f"cannot be read ({type(error).__name__})") from error


def _check_sizes(folder: Path, header: Header) -> None:
    for name, spec in header.arrays.items():
        file = _file(folder, name)
        size = file.stat().st_size if file.exists() else None
        if size != spec.file_bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise DamagedCacheError(file, f"{found}, where {spec.file_bytes} bytes were written")


class _CachedRows:
    """The arrays of a cache, memory-mapped, with each chunk checked when it is first read."""

    def __init__(self, folder: Path) -> None:
        described = _read_description(folder)
        self.header, self._folder = described.header, folder
        if described.chunks_done < self.header.chunks or not described.crc32:
            raise DamagedCacheError(
                folder / DESCRIPTION,
                f"{described.chunks_done} of {self.header.chunks} chunks were written",
            )
        _check_sizes(folder, self.header)
        for name, crc32 in described.crc32.items():
            if _crc32_of(_file(folder, name)) != crc32:
                raise DamagedCacheError(_file(folder, name), "its checksum differs")
        self._blocks, self._checksums = self.whole("blocks"), self.whole("checksums")
        self._columns = {name: column for column, name in enumerate(self.header.by_block)}
        self._arrays = {name: self._mapped(name) for name in self.header.by_block}
        self._checked = np.zeros(self._checksums.shape, dtype=bool)

    def whole(self, name: str) -> Array:
        """An array that has no row a block, in memory."""
        array: Array = np.load(_file(self._folder, name))
        return array

    def _mapped(self, name: str) -> Array:
        file = _file(self._folder, name)
        try:
            array: Array = np.load(file, mmap_mode="r")
        except ValueError as error:
            raise DamagedCacheError(file, "its header cannot be read") from error
        spec = self.header.arrays[name]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise DamagedCacheError(file, f"it holds {array.dtype} of shape {array.shape}")
        return array

    def places(self, input_ids_BL: Tensor, blocks_B: Tensor) -> Array:
        """The rows that stand for these blocks. Raises `StageError` where one is not there."""
        length = input_ids_BL.shape[1]
        if length != self.header.block_length:
            raise StageError(
                f"the cache in {self._folder} is of blocks of {self.header.block_length} tokens; "
                f"these have {length}"
            )
        wanted = blocks_B.numpy()
        places = np.searchsorted(self._blocks, wanted)
        found = self._blocks[np.minimum(places, len(self._blocks) - 1)] == wanted
        if not found.all():
            raise StageError(
                f"block {wanted[~found][0]} is not in the cache in {self._folder}, which was made "
                "for fewer steps, another batch size or another seed"
            )
        return places

    def read(self, name: str, places: Array) -> Array:
        """A copy of these rows of an array. Raises `DamagedCacheError`."""
        for chunk in np.unique(places // self.header.blocks_a_chunk):
            self._check(name, int(chunk))
        return self._arrays[name][places]

    def _check(self, name: str, chunk: int) -> None:
        column = self._columns[name]
        if self._checked[chunk, column]:
            return
        rows = self._arrays[name][self.header.rows(chunk)]
        if zlib.crc32(rows.data) != self._checksums[chunk, column]:
            file, place = _file(self._folder, name), self.header.rows(chunk)
            raise DamagedCacheError(
                file, f"the checksum of rows {place.start} to {place.stop - 1} differs"
            )
        self._checked[chunk, column] = True


class CachedHidden:
    """The teacher's final hidden states (and inner ones): its exact logits, without running it."""

    def __init__(self, rows: _CachedRows) -> None:
        self._rows = rows
        self._head = OutputHead(from_disk(rows.whole("head")), rows.header.softcap)

    def targets(self, input_ids_BL: Tensor, blocks_B: Tensor) -> DenseTargets:
        """See `TeacherSignal`. Raises `StageError` for a block that is not in the cache."""
        device = input_ids_BL.device
        places = self._rows.places(input_ids_BL, blocks_B)
        if self._head.weight_VD.device != device:
            self._head = OutputHead(self._head.weight_VD.to(device), self._head.softcap)
        read = {
            name: from_disk(self._rows.read(name, places)).to(device)
            for name in self._rows.header.by_block
        }
        hidden_ND = read["hidden"].flatten(0, 1)
        states = {name: read[name] for name in self._rows.header.states}
        return DenseTargets(hidden_ND, states, self._head)


class CachedTokens:
    """Tokens drawn from the teacher's distributions, or their likeliest ones."""

    def __init__(self, rows: _CachedRows) -> None:
        self._rows = rows

    def targets(self, input_ids_BL: Tensor, blocks_B: Tensor) -> SparseTargets:
        """See `TeacherSignal`. Raises `StageError` for a block that is not in the cache."""
        device = input_ids_BL.device
        places = self._rows.places(input_ids_BL, blocks_B)
        ids = torch.from_numpy(self._rows.read("ids", places).astype(np.int64)).flatten(0, 1)
        entropy = torch.from_numpy(self._rows.read("entropy", places)).flatten()
        weights = self._weights(ids, places)
        return SparseTargets(ids.to(device), weights.to(device), entropy.to(device))

    def _weights(self, ids_NK: Tensor, places: Array) -> Tensor:
        if isinstance(self._rows.header.signal, SampledCache):
            return torch.full(ids_NK.shape, 1 / ids_NK.shape[1])
        return torch.from_numpy(self._rows.read("probabilities", places)).flatten(0, 1)
