"""Cut layers, neurons, heads and channels out of a checkpoint, a few rows of a tensor at a time.

What of a tensor belongs to which unit follows from the family's description (`tensor_axes`); no
architecture has a case of its own. Weights stay in their type; what must be computed is computed
in fp32. However large the checkpoint, memory is that of a few batches of rows (`ROWS_BYTES`).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from trainers.checkpoints import read_config
from trainers.contract import StageError
from trainers.families import Family
from trainers.shapes import Shape, Sizes, shape_of

WEIGHTS = "model.safetensors"
ROWS_BYTES = 1 << 24
"""How much of a tensor is read at once, unless one row alone is larger."""

# --- what to cut -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """Units in the order of their importance, best first: those kept, then those removed."""

    kept: tuple[int, ...]
    removed: tuple[int, ...] = ()

    @property
    def absorbs(self) -> dict[int, int]:
        """Kept unit -> the removed unit whose difference from it is added to it.

        Of L units, counted from 1 by importance, K stay; unit i of max(1, 2K-L+1)..K absorbs unit
        2K-i+1 (P1 section 2.3): the last kept one the first removed one, and so outwards.
        """
        return dict(zip(reversed(self.kept), self.removed, strict=False))


@dataclass(frozen=True)
class Heads:
    """What stays of one layer's attention: key-value groups, and in each its query heads.

    Query heads are counted through the layer, so those of group g of size n are g*n..g*n + n - 1.
    """

    groups: Ranking
    queries: Mapping[int, Ranking]
    """Kept group -> its query heads."""


@dataclass(frozen=True)
class Cut:
    """What stays of a model. Layers are named by their number in the source; None leaves an axis
    whole."""

    layers: tuple[int, ...]
    """The layers that stay, ascending."""
    neurons: Mapping[int, tuple[int, ...]] | None = None
    """Layer -> its neurons that stay, ascending."""
    heads: Mapping[int, Heads] | None = None
    channels: tuple[int, ...] | None = None
    """The channels of the residual stream that stay, ascending."""
    head_residual: bool = False
    """Whether the last kept heads absorb what sets them apart from the removed ones."""
    rescale_norms: bool = False
    """Whether norms are scaled so that cutting channels that are always zero changes nothing."""

    def sizes(self, shape: Shape) -> Sizes:
        """The sizes of what stays of a model of this shape."""
        sizes = replace(shape.sizes, num_hidden_layers=len(self.layers))
        first = self.layers[0]
        if self.neurons is not None:
            sizes = replace(sizes, intermediate_size=len(self.neurons[first]))
        if self.channels is not None:
            sizes = replace(sizes, hidden_size=len(self.channels))
        if self.heads is not None:
            heads = sum(len(ranking.kept) for ranking in self.heads[first].queries.values())
            groups = len(self.heads[first].groups.kept)
            sizes = replace(sizes, num_attention_heads=heads, num_key_value_heads=groups)
        return sizes


# --- which units a tensor holds --------------------------------------------------------------

Axis = Literal["hidden", "neurons", "queries", "groups", "fused"]
"""Channels; neurons; query heads or key-value groups of head_dim numbers each; or groups of a
query, a key and a value of head_dim numbers each."""

Axes = tuple[Axis | None, ...]
"""What each dimension of a tensor runs over; None is cut by nothing."""


def tensor_axes(family: Family) -> tuple[dict[str, Axes], dict[str, Axes]]:
    """The axes of a layer's tensors by their names inside the layer, and of all others by their
    names in a checkpoint's files."""
    layer: dict[str, Axes] = {}
    if family.fused_query_key_value is not None:
        layer |= _linear(family.fused_query_key_value, "fused", "hidden")
    else:
        layer |= _linear(family.query, "queries", "hidden")
        layer |= _linear(family.key, "groups", "hidden") | _linear(family.value, "groups", "hidden")
    layer |= _linear(family.attention_output, "hidden", "queries")
    for projection in filter(None, (family.gate, family.up)):
        layer |= _linear(projection, "neurons", "hidden")
    layer |= _linear(family.down, "hidden", "neurons")
    for norm in family.norms:
        layer |= _norm(norm)
    layer |= {f"{norm}.weight": (None,) for norm in family.head_norms}
    layer |= dict.fromkeys(family.buffers, ())
    model: dict[str, Axes] = {
        f"{table}.weight": (None, "hidden") for table in (family.embedding, *_head_names(family))
    }
    return layer, model | _norm(family.final_norm)


def _linear(path: str, out: Axis, into: Axis) -> dict[str, Axes]:
    return {f"{path}.weight": (out, into), f"{path}.bias": (out,)}


def _norm(path: str) -> dict[str, Axes]:
    return {f"{path}.weight": ("hidden",), f"{path}.bias": ("hidden",)}


def _head_names(family: Family) -> tuple[str, ...]:
    return tuple(filter(None, (family.output_head, family.output_head_in_files)))


# --- what becomes of one tensor --------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """How one tensor is cut: out = (x[rows] + (x[rows] - x[absorbed]) + shift) * factor - shift,
    and of that the columns. None keeps all rows or columns; an absorbed row equal to its own row
    adds nothing."""

    name: str
    rows: tuple[int, ...] | None = None
    absorbed: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    factor: float = 1.0
    shift: float = 0.0

    @property
    def computes(self) -> bool:
        """Whether numbers change, and not only which of them stay."""
        return self.absorbed is not None or self.factor != 1

    def shape(self, source: Sequence[int]) -> tuple[int, ...]:
        """The tensor's dimensions after the cut."""
        first = [len(self.rows)] if self.rows is not None else list(source[:1])
        second = [len(self.columns)] if self.columns is not None else list(source[1:2])
        return tuple(first + second + list(source[2:]))


class Surgery:
    """Which tensors of one checkpoint stay, under which names, and what becomes of each."""

    def __init__(self, shape: Shape, cut: Cut) -> None:
        self._shape, self._cut, self._family = shape, cut, shape.family
        self._layer_axes, self._model_axes = tensor_axes(shape.family)
        self._place = {layer: place for place, layer in enumerate(cut.layers)}
        self._layer_name = re.compile(rf"{re.escape(self._family.layers)}\.(\d+)\.(.*)")

    def edit(self, name: str) -> Edit | None:
        """What becomes of the tensor of this name; None where its layer is dropped.

        Raises `StageError` for a tensor that the family's description does not know.
        """
        match = self._layer_name.fullmatch(name)
        if match is None:
            axes, layer, new = self._model_axes.get(name), -1, name
        else:
            layer = int(match[1])
            if layer not in self._place:
                return None
            axes = self._layer_axes.get(match[2])
            new = f"{self._family.layers}.{self._place[layer]}.{match[2]}"
        if axes is None:
            raise StageError(
                f"the checkpoint holds {name}, which the family {self._family.model_type} does not "
                "describe"
            )
        rows, columns = (*axes, None, None)[:2]
        factor = self._factor(name, match[2] if match else name)
        return Edit(
            name=new,
            rows=self._kept(rows, layer),
            absorbed=self._absorbed(rows, layer),
            columns=self._kept(columns, layer),
            factor=factor,
            shift=self._shift if factor != 1 and axes == ("hidden",) else 0.0,
        )

    def _kept(self, axis: Axis | None, layer: int) -> tuple[int, ...] | None:
        match axis:
            case "hidden":
                return self._cut.channels
            case "neurons":
                return None if self._cut.neurons is None else self._cut.neurons[layer]
            case None:
                return None
        if self._cut.heads is None:
            return None
        return self._numbers(axis, self._units(axis, self._cut.heads[layer]))

    def _absorbed(self, axis: Axis | None, layer: int) -> tuple[int, ...] | None:
        """For each kept row the row it absorbs, or itself: of query heads, and of keys and values
        too where each query head has its own."""
        if self._cut.heads is None or not self._cut.head_residual or axis in (None, "hidden"):
            return None
        if axis == "neurons" or (axis != "queries" and self._shape.heads_per_group > 1):
            return None
        heads = self._cut.heads[layer]
        rankings = list(heads.queries.values())
        if self._shape.heads_per_group == 1:
            rankings = [heads.groups]
        absorbs = {kept: gone for each in rankings for kept, gone in each.absorbs.items()}
        if not absorbs:
            return None
        return self._numbers(axis, [absorbs.get(u, u) for u in self._units(axis, heads)])

    def _units(self, axis: Axis, heads: Heads) -> list[int]:
        """The heads or groups that stay, in their order in the source."""
        if axis == "queries":
            return sorted(head for ranking in heads.queries.values() for head in ranking.kept)
        return sorted(heads.groups.kept)

    def _numbers(self, axis: Axis | None, units: Sequence[int]) -> tuple[int, ...]:
        """The rows or columns that belong to these heads."""
        width = self._shape.head_dim * (3 if axis == "fused" else 1)
        return tuple(unit * width + place for unit in units for place in range(width))

    @cached_property
    def _narrowing(self) -> float:
        """The square root of how many times fewer channels there are."""
        if self._cut.channels is None:
            return 1.0
        return math.sqrt(self._shape.hidden_size / len(self._cut.channels))

    @property
    def _shift(self) -> float:
        """What a norm adds to its weight to get its scale."""
        return 1.0 if self._family.norm_kind.endswith("plus_one") else 0.0

    def _factor(self, name: str, inside: str) -> float:
        """What the scale of a norm, or a table of embeddings, is multiplied by.

        With d_s channels, of which d_t stay and the others are always zero, the mean of squares
        over the d_t is d_s / d_t times that over the d_s: `rescale_norms` makes up for it with
        sqrt(d_s / d_t) in the norm's scale, and with d_s / d_t in its epsilon (`pruned_config`).
        For a LayerNorm that is exact where the stream's mean is zero.

        Where embeddings are multiplied by sqrt(hidden_size) as they are read, they grow by
        sqrt(d_s / d_t), whether norms are rescaled or not: they would shrink beside what the layers
        add. An output head tied to them grows too; the final norm takes that back.
        """
        family, factor = self._family, 1.0
        scales = [f"{norm}.weight" for norm in (*family.norms, family.final_norm)]
        tables = {f"{head}.weight" for head in _head_names(family) if self._tied}
        if inside in scales and self._cut.rescale_norms:
            factor *= self._narrowing
        if family.embedding_scaled and name in tables | {f"{family.embedding}.weight"}:
            factor *= self._narrowing
        if family.embedding_scaled and self._tied and name == f"{family.final_norm}.weight":
            factor /= self._narrowing
        return factor

    @property
    def _tied(self) -> bool:
        return self._shape.tie_word_embeddings


# --- the config ------------------------------------------------------------------------------


def pruned_config(config: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """The Hugging Face config of what stays.

    Settings of one value a layer that config.json leaves to transformers' defaults are stated, so
    that each layer that stays keeps its own.
    """
    shape = shape_of(config)
    family, sizes = shape.family, asdict(cut.sizes(shape))
    smaller = dict(config) | {name: size for name, size in sizes.items() if name in config}
    implied = asdict(shape_of(smaller).sizes)
    smaller |= {name: size for name, size in sizes.items() if implied[name] != size}
    stated = _with_defaults(config)
    for key in family.per_layer_settings:
        if isinstance(stated.get(key), list):
            smaller[key] = [stated[key][layer] for layer in cut.layers]
    if family.free_head_dim and (cut.heads is not None or cut.channels is not None):
        smaller["head_dim"] = shape.head_dim
    if cut.rescale_norms and cut.channels is not None:
        epsilon = family.setting(family.norm_epsilon, config)
        smaller[family.norm_epsilon] = epsilon * shape.hidden_size / len(cut.channels)
    return smaller


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(config)
    known = AutoConfig.for_model(settings.pop("model_type"), **settings)
    defaults: dict[str, Any] = known.to_dict()
    return defaults | {key: value for key, value in config.items() if value is not None}


# --- safetensors files, a few rows at a time -------------------------------------------------

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: its type, its dimensions and where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises `StageError` for a type that cannot be cut."""
        if self.dtype not in DTYPES:
            raise StageError(f"cannot cut tensors of type {self.dtype}; known are {list(DTYPES)}")
        return DTYPES[self.dtype]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The dimensions of one row, which is what the first dimension counts."""
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.torch_dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


def read_header(file: BinaryIO) -> dict[str, Stored]:
    """The tensors of a safetensors file (8 bytes of length, a JSON header, the data)."""
    length = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(length))
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_header(file: BinaryIO, tensors: Mapping[str, Stored]) -> None:
    """Announce tensors whose data will follow in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins where any type may
    file.write(len(text).to_bytes(8, "little") + text)


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring indices as (first, how many)."""
    first = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield indices[first], place - first
            first = place


def read_rows(file: BinaryIO, tensor: Stored, rows: Sequence[int]) -> Tensor:
    """These rows of a tensor, (len(rows), *row_shape); nothing else is read."""
    found = torch.empty((len(rows), *tensor.row_shape), dtype=tensor.torch_dtype)
    target = found.view(-1).view(torch.uint8).numpy().data
    done = 0
    for first, count in _runs(rows):
        file.seek(tensor.start + first * tensor.row_bytes)
        wanted = count * tensor.row_bytes
        if file.readinto(target[done : done + wanted]) != wanted:  # type: ignore[attr-defined]
            raise StageError("a safetensors file ends before its data does")
        done += wanted
    return found


def cut_rows(file: BinaryIO, tensor: Stored, edit: Edit) -> Iterator[Tensor]:
    """What stays of a tensor, some rows at a time."""
    if not tensor.shape:  # one number, which nothing cuts
        tensor = replace(tensor, shape=(1,))
    rows: Sequence[int] = range(tensor.shape[0]) if edit.rows is None else edit.rows
    batch = max(1, ROWS_BYTES // max(1, tensor.row_bytes))
    columns = None if edit.columns is None else torch.tensor(edit.columns)
    for first in range(0, len(rows), batch):
        part = read_rows(file, tensor, rows[first : first + batch])
        part = part if columns is None else part.index_select(1, columns)
        if edit.computes:
            absorbed = None
            if edit.absorbed is not None:
                absorbed = read_rows(file, tensor, edit.absorbed[first : first + batch])
                absorbed = absorbed if columns is None else absorbed.index_select(1, columns)
            part = _computed(part, absorbed, edit)
        yield part.contiguous()


def _computed(part: Tensor, absorbed: Tensor | None, edit: Edit) -> Tensor:
    found = part.float()
    if absorbed is not None:
        found = found + (found - absorbed.float())
    if edit.factor != 1:
        found = (found + edit.shift) * edit.factor - edit.shift
    return found.to(part.dtype)


def cut_file(source: Path, target: Path, surgery: Surgery) -> dict[str, int]:
    """Write what stays of one safetensors file; tensor -> bytes. Nothing stays, nothing is
    written."""
    with source.open("rb") as before:
        stored = read_header(before)
        edits = {name: edit for name in stored if (edit := surgery.edit(name)) is not None}
        # Wide types first: then each tensor begins at a multiple of its type's width.
        names = sorted(edits, key=lambda name: -stored[name].torch_dtype.itemsize)
        after = {
            edits[name].name: replace(stored[name], shape=edits[name].shape(stored[name].shape))
            for name in names
        }
        if after:
            with target.open("wb") as out:
                write_header(out, after)
                for name in names:
                    for part in cut_rows(before, stored[name], edits[name]):
                        out.write(part.view(-1).view(torch.uint8).numpy().data)
    return {name: tensor.bytes for name, tensor in after.items()}


# --- a whole checkpoint ----------------------------------------------------------------------


def operate(source: Path, target: Path, cut: Cut) -> None:
    """Write what stays of the checkpoint in `source` into `target`, as a plain checkpoint with the
    same files. Raises `StageError` where the checkpoint is not what its config says."""
    config = read_config(source)
    surgery = Surgery(shape_of(config), cut)
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    size = 0
    for shard in shards(source):
        written = cut_file(shard, target / shard.name, surgery)
        weight_map |= dict.fromkeys(written, shard.name)
        size += sum(written.values())
    if set(weight_map.values()) != {WEIGHTS}:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (target / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2))
    (target / "config.json").write_text(json.dumps(pruned_config(config, cut), indent=2))
    copy_rest(source, target)


def shards(source: Path) -> list[Path]:
    """The files that transformers reads; some folders hold the weights in another form besides."""
    index = source / f"{WEIGHTS}.index.json"
    if not index.exists():
        if not (source / WEIGHTS).exists():
            raise StageError(f"{source} holds no {WEIGHTS}")
        return [source / WEIGHTS]
    names: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return [source / name for name in sorted(set(names.values()))]


def copy_rest(source: Path, target: Path) -> None:
    """Tokenizer, generation settings and the like; nothing that holds weights."""
    for file in source.iterdir():
        weights = file.suffix in {".safetensors", ".bin", ".gguf"} or ".index." in file.name
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
