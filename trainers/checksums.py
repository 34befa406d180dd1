"""Checksums beside the files of a checkpoint: what a disk changed is noticed before it is read.

Every worker takes its share of the files.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

NAME = "checksums{}.json"
CHUNK = 1 << 22


def write(folder: Path, rank: int, workers: int) -> None:
    """Note the CRC-32 of this worker's share of the folder's files."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    mine = sorted(files)[rank::workers]
    known = {os.path.relpath(file, folder): _crc32(file) for file in mine}
    (folder / NAME.format(rank)).write_text(json.dumps(known))


def are_right(folder: Path, rank: int, workers: int) -> bool:
    """Whether the files in this worker's share of the checksums are as they were; those of a folder
    without any (written before there were checksums) are taken to be."""
    if not folder.is_dir():
        return False
    return all(_hold(each) for each in sorted(folder.glob(NAME.format("*")))[rank::workers])


def _hold(checksums: Path) -> bool:
    try:
        known: dict[str, int] = json.loads(checksums.read_bytes())
        return all(_crc32(checksums.parent / name) == crc32 for name, crc32 in known.items())
    except (OSError, ValueError, AttributeError):
        return False


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
