"""How much memory surgery takes, in sizes of the checkpoint's largest tensor.

    python benchmarks/surgery_memory.py --json

Makes a synthetic Llama checkpoint (bf16, several files, written a tensor at a time), then cuts it
on every axis with the stage `prune` in a fresh process, head residual and rescaled norms included;
units are drawn at random, so that what is kept lies scattered. What is measured there, from after
the imports to the end of the stage:

- anonymous memory: the rise of RssAnon in /proc/self/status, sampled every few milliseconds. That
  is what the stage itself allocates; `peak_bytes_vs_largest_tensor` comes from it.
- all resident memory: the rise of VmHWM, reset when the operation begins. It also counts what
  pages of libraries are touched for the first time. Surgery reads and writes with plain file calls
  and maps no file, so checkpoint pages are in the kernel's cache and in neither number.

Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trainers import prune, surgery
from trainers.config import AtRandom, DepthCut, PruneConfig, RandomUnits, WidthCut
from trainers.contract import StageContext
from trainers.shapes import shape_of
from trainers.surgery import Stored

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""The sizes of Llama 3.2 1B with 12 layers and an output head of its own."""
TINY = LLAMA | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "head_dim": 4}
CUT = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
"""What the stage cuts."""


# --- the checkpoint --------------------------------------------------------------------------


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint."""
    hidden, inner, words = (config[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    queries, keys = (
        config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    yield "model.embed_tokens.weight", (words, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (words, hidden)


def write_checkpoint(config: Mapping[str, Any], folder: Path, files: int) -> int:
    """Fill `folder` with the checkpoint, a tensor at a time, and give the size of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: Stored("BF16", shape, 0) for name, shape in shapes(config)}
    names = list(tensors)
    weight_map: dict[str, str] = {}
    draw = torch.Generator().manual_seed(0)
    for number in range(files):
        inside = names[number::files]
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        with (folder / file).open("wb") as out:
            surgery.write_header(out, {name: tensors[name] for name in inside})
            for name in inside:
                rows = torch.randn(1, *tensors[name].row_shape, generator=draw).bfloat16()
                part = rows.view(torch.uint8).numpy().tobytes()
                for _ in range(tensors[name].shape[0] if tensors[name].row_shape else 1):
                    out.write(part if tensors[name].row_shape else part * tensors[name].shape[0])
        weight_map |= dict.fromkeys(inside, file)
    size = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def settings(config: Mapping[str, Any]) -> PruneConfig:
    """Three quarters of every size."""
    kept = {name: config[name] * 3 // 4 for name in CUT}
    layers = DepthCut(num_hidden_layers=kept.pop("num_hidden_layers"), choice=AtRandom())
    width = WidthCut(**kept, choice=RandomUnits(), head_residual=True, rescale_norms=True)
    return PruneConfig(depth=layers, width=width)


# --- in the fresh process --------------------------------------------------------------------


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if field in line)


class Sampler(threading.Thread):
    """The largest anonymous memory of this process, looked up every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.samples, self.done = 0, 0, threading.Event()

    def run(self) -> None:
        """Look until told that it is over."""
        while not self.done.wait(0.002):
            self.peak = max(self.peak, memory("RssAnon"))
            self.samples += 1


def measure(source: Path, target: Path) -> dict[str, float]:
    """Prune the checkpoint `source/model` and give the rise of this process' memory in bytes."""
    torch.set_num_threads(1)
    target.mkdir()
    config = json.loads((source / "model" / "config.json").read_text())
    context = StageContext(settings(config), {"model": source}, target)
    anonymous, resident = memory("RssAnon"), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    sampler = Sampler()
    sampler.start()
    began = time.perf_counter()
    prune.run(context)
    seconds = time.perf_counter() - began
    sampler.done.set()
    sampler.join()
    return {
        "anonymous": sampler.peak - anonymous,
        "resident": memory("VmHWM") - resident,
        "before": resident,
        "samples": sampler.samples,
        "seconds": seconds,
    }


# --- in this one -----------------------------------------------------------------------------


def check(target: Path, config: Mapping[str, Any]) -> None:
    """The result has as many parameters as its config says, and the sizes that were asked for."""
    asked = replace(shape_of(config).sizes, **{name: config[name] * 3 // 4 for name in CUT})
    shape = shape_of(json.loads((target / "config.json").read_text()))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert shape.sizes == asked, shape.sizes
    assert index["metadata"]["total_size"] == 2 * shape.parameters


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="tiny tensors: only to try it out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    config = TINY if arguments.tiny else LLAMA
    largest = config["vocab_size"] * config["hidden_size"] * 2
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place, "source"), Path(place, "target")
        size = write_checkpoint(config, source / "model", arguments.files)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(source), str(target)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        found = json.loads(done.stdout.splitlines()[-1])
        check(target / "model", config)
    report(found, size, largest, arguments.files)
    if arguments.json:
        names = {"anonymous": "peak", "resident": "resident_peak"}
        outcome = {f"{to}_bytes_vs_largest_tensor": found[of] / largest for of, to in names.items()}
        print(json.dumps(outcome | {"checkpoint_bytes": size, "largest_tensor_bytes": largest}))


def report(found: dict[str, float], size: int, largest: int, files: int) -> None:
    """A table of what was measured, under the facts of the machine."""
    console = Console(width=100)
    console.print(
        f"Llama, {size / 1e9:.2f} GB of bf16 in {files} files, cut on every axis in "
        f"{found['seconds']:.1f} s; {found['samples']:.0f} samples"
    )
    console.print(f"torch {torch.__version__}, {platform.machine()}, {platform.system()}")
    table = Table()
    table.add_column("memory")
    table.add_column("MB", justify="right")
    table.add_column("largest tensors", justify="right")
    for name, value in (
        ("largest tensor", largest),
        ("rise of anonymous memory, peak", found["anonymous"]),
        ("rise of all resident memory, peak", found["resident"]),
        ("the process before, imports included", found["before"]),
    ):
        table.add_row(name, f"{value / 1e6:.1f}", f"{value / largest:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
