"""A cache on disk: what goes in comes out, in any order, and nothing that was damaged does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trainers import signals
from trainers.config import HiddenCache, Signal, TopKCache
from trainers.contract import DamagedInputError, StageError
from trainers.shapes import blocks_a_chunk, cache_arrays, cache_bytes, shape_of
from trainers.signals import CacheWriter, DamagedCacheError, Header, open_cache
from trainers.teacher import DenseTargets, SparseTargets

LENGTH, NUMBERS = 6, torch.tensor([2, 3, 5, 8, 13, 21, 34])
SIGNALS = {"hidden": HiddenCache(), "likeliest": TopKCache(k=3)}


class Written(NamedTuple):
    """A cache, and what was written into it."""

    folder: Path
    signal: Signal
    values: dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks a chunk, so that seven blocks take three."""
    monkeypatch.setattr("trainers.shapes.CHUNK_TOKENS", 3 * LENGTH)


def header_of(config: dict[str, Any], signal: Any, precision: str) -> Header:
    states = ("output.1",) if isinstance(signal, HiddenCache) else ()
    arrays = cache_arrays(shape_of(config), signal, len(NUMBERS), LENGTH, precision, states)
    return Header(signal, LENGTH, blocks_a_chunk(LENGTH), 30.0, arrays)


def values_of(header: Header) -> dict[str, Tensor]:
    """Random contents of every array."""
    torch.manual_seed(0)
    values: dict[str, Tensor] = {"blocks": NUMBERS}
    for name, spec in header.arrays.items():
        if name == "ids":
            values[name] = torch.randint(300, spec.shape)
        elif name not in ("blocks", "checksums"):
            values[name] = torch.rand(spec.shape)
            if spec.dtype == "uint16":
                values[name] = values[name].bfloat16()
    return values


def write(folder: Path, header: Header, values: dict[str, Tensor], chunks: int = 3) -> CacheWriter:
    """Write what is still missing, up to so many chunks."""
    writer = CacheWriter(folder, header)
    for name in set(header.whole) - {"checksums"}:
        writer.put(name, values[name])
    while writer.done < chunks:
        rows = header.rows(writer.done)
        writer.append({name: values[name][rows] for name in header.by_block})
    if chunks == header.chunks:
        writer.finish()
    else:
        writer.flush()
    writer.close()
    return writer


@pytest.fixture(params=["hidden, fp32", "hidden, bf16", "likeliest, fp32"])
def written(request: pytest.FixtureRequest, tmp_path: Path, tiny_config: dict[str, Any]) -> Written:
    kind, precision = request.param.split(", ")
    header = header_of(tiny_config, SIGNALS[kind], precision)
    values = values_of(header)
    write(tmp_path, header, values)
    return Written(tmp_path, SIGNALS[kind], values)


def targets(
    written: Written, numbers: list[int] | Tensor = NUMBERS, length: int = LENGTH
) -> DenseTargets | SparseTargets:
    blocks_B = torch.as_tensor(numbers)
    ids_BL = torch.zeros(len(blocks_B), length, dtype=torch.int64)
    return open_cache(written.folder, written.signal).targets(ids_BL, blocks_B)


@pytest.mark.parametrize("numbers", [[2], [34, 2, 13], [8, 8], NUMBERS.tolist()], ids=str)
def test_what_was_written_of_a_block_is_read_exactly(written: Written, numbers: list[int]) -> None:
    rows = [NUMBERS.tolist().index(number) for number in numbers]
    expected = {name: values[rows] for name, values in written.values.items() if name != "head"}
    found = targets(written, numbers)
    if isinstance(found, DenseTargets):
        assert torch.equal(found.hidden_ND, expected["hidden"].flatten(0, 1))
        assert set(found.states) == {"output.1"}
        assert torch.equal(found.states["output.1"], expected["output.1"])
        assert torch.equal(found.head.weight_VD, written.values["head"])
        assert found.head.softcap == 30.0
    else:
        assert torch.equal(found.ids_NK, expected["ids"].flatten(0, 1))
        assert torch.equal(found.weights_NK, expected["probabilities"].flatten(0, 1))
        assert found.entropy_N is not None
        assert torch.equal(found.entropy_N, expected["entropy"].flatten())


def test_its_bytes_are_those_that_were_planned(
    written: Written, tiny_config: dict[str, Any]
) -> None:
    files = sum(file.stat().st_size for file in written.folder.glob("*.npy"))
    hidden = isinstance(written.signal, HiddenCache)
    half = written.values.get("head", torch.zeros(1)).dtype == torch.bfloat16
    precision, states = "bf16" if half else "fp32", int(hidden)
    shape = shape_of(tiny_config)
    planned = cache_bytes(shape, written.signal, len(NUMBERS), LENGTH, precision, states)
    assert files == planned
    assert {file.suffix for file in written.folder.iterdir()} == {".npy", ".json"}


def test_a_large_vocabulary_takes_four_bytes_a_word(tiny_config: dict[str, Any]) -> None:
    def specs(words: int) -> Any:
        return cache_arrays(shape_of(tiny_config | {"vocab_size": words}), TopKCache(), 1, 6, "")

    assert specs(1 << 16)["ids"].dtype == "uint16"
    assert specs((1 << 16) + 1)["ids"].dtype == "int32"


# --- damage ----------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def test_a_flipped_bit_in_any_file_is_found_and_named(written: Written) -> None:
    for file in written.folder.glob("*.npy"):
        intact = file.read_bytes()
        for place in (128, len(intact) // 2 + 64, len(intact) - 1):
            flip(file, place)
            with pytest.raises(DamagedCacheError, match=f"{file.name}.*checksum"):
                targets(written)
            file.write_bytes(intact)
    targets(written)


def test_the_error_names_the_role_and_crosses_to_another_process(written: Written) -> None:
    (written.folder / "cache.json").write_text("")
    with pytest.raises(DamagedInputError) as raised:
        targets(written)
    again = pickle.loads(pickle.dumps(raised.value))
    assert again.role == "signals"
    assert str(again) == str(raised.value)


def test_damage_harms_only_those_who_read_it(written: Written) -> None:
    name = "hidden" if isinstance(written.signal, HiddenCache) else "ids"
    flip(written.folder / f"{name}.npy", -1)
    targets(written, NUMBERS[:6])  # the last block is alone in its chunk
    with pytest.raises(DamagedCacheError, match="checksum of rows 6 to 6"):
        targets(written, NUMBERS[6:])


def test_a_chunk_is_checked_once(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = open_cache(written.folder, written.signal)
    ids_BL = torch.zeros(len(NUMBERS), LENGTH, dtype=torch.int64)
    signal.targets(ids_BL, NUMBERS)
    monkeypatch.setattr(signals.zlib, "crc32", lambda *_: pytest.fail("checked again"))
    signal.targets(ids_BL, NUMBERS)


@pytest.mark.parametrize("size", [0, 100, -1], ids=["empty", "in its header", "one byte short"])
def test_a_truncated_file_is_found_and_named(written: Written, size: int) -> None:
    for file in written.folder.glob("*.npy"):
        intact = file.read_bytes()
        file.write_bytes(intact[:size])
        with pytest.raises(DamagedCacheError, match=f"{file.name}.*bytes were written"):
            targets(written)
        file.write_bytes(intact)


def test_a_missing_file_is_found_and_named(written: Written) -> None:
    (written.folder / "blocks.npy").unlink()
    with pytest.raises(DamagedCacheError, match=r"blocks\.npy: missing"):
        targets(written)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '{"header": {"version": 1}}'])
def test_a_torn_description_is_found(written: Written, text: str) -> None:
    (written.folder / "cache.json").write_text(text)
    with pytest.raises(DamagedCacheError, match=r"cache\.json.*cannot be read"):
        targets(written)


def test_another_version_of_the_format_is_not_guessed_at(written: Written) -> None:
    file = written.folder / "cache.json"
    described = json.loads(file.read_text())
    described["header"]["version"] = 99
    file.write_text(json.dumps(described))
    with pytest.raises(DamagedCacheError, match="version is 99, not 1"):
        targets(written)


# --- what is not in it -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 4, 35])
def test_a_block_that_is_not_there_is_an_error_that_names_it(written: Written, number: int) -> None:
    with pytest.raises(StageError, match=f"block {number} is not in the cache"):
        targets(written, [2, number])


def test_blocks_of_another_length_are_an_error(written: Written) -> None:
    with pytest.raises(StageError, match="blocks of 6 tokens; these have 7"):
        targets(written, length=7)


def test_another_kind_of_signal_is_an_error_that_names_both(written: Written) -> None:
    with pytest.raises(StageError, match=r"holds \{.*, not \{'kind': 'topk_cache', 'k': 4\}"):
        open_cache(written.folder, TopKCache(k=4))


# --- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIGNALS)
def test_an_unfinished_cache_is_not_taken_for_a_whole_one_and_can_be_finished(
    tmp_path: Path, tiny_config: dict[str, Any], kind: str
) -> None:
    header = header_of(tiny_config, SIGNALS[kind], "fp32")
    values = values_of(header)
    for name in ("at once", "in parts"):
        (tmp_path / name).mkdir()
    write(tmp_path / "at once", header, values)
    write(tmp_path / "in parts", header, values, chunks=2)
    with pytest.raises(DamagedCacheError, match="2 of 3 chunks were written"):
        open_cache(tmp_path / "in parts", SIGNALS[kind])
    assert CacheWriter(tmp_path / "in parts", header).done == 2
    write(tmp_path / "in parts", header, values)
    for file in (tmp_path / "at once").iterdir():
        assert (tmp_path / "in parts" / file.name).read_bytes() == file.read_bytes()


def test_parts_of_another_cache_or_without_a_file_are_not_gone_on_with(
    tmp_path: Path, tiny_config: dict[str, Any]
) -> None:
    header = header_of(tiny_config, HiddenCache(), "fp32")
    write(tmp_path, header, values_of(header), chunks=2)
    (tmp_path / "hidden.npy").unlink()
    assert CacheWriter(tmp_path, header).done == 0
    write(tmp_path, header, values_of(header), chunks=2)
    assert CacheWriter(tmp_path, header_of(tiny_config, HiddenCache(), "bf16")).done == 0


def test_a_disk_without_room_is_an_error_before_anything_is_computed(
    tmp_path: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(signals.shutil, "disk_usage", lambda _: Full())
    with pytest.raises(StageError, match=r"takes .* GB, and the disk"):
        CacheWriter(tmp_path, header_of(tiny_config, HiddenCache(), "fp32"))
