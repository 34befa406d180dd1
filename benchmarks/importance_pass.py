"""What scoring every neuron, head, channel and block of layers costs beside a plain forward pass.

    python benchmarks/importance_pass.py --json

Both sides run the same model, without its output head, over the same tokens in the same batches,
in turn, in one process. The model has the shape of SmolLM2-135M and random weights, or is the one
in `--model`. `cost_vs_forward` is the median time of the importance pass divided by the plain
one's. Before that, Block Influence is compared with the cosines of hidden states that a plain pass
returns. Left out: loading the model and reading the text, which both need.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from trainers.activations import collect
from trainers.checkpoints import DTYPES, load_model, new_model

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def forward(model: PreTrainedModel, blocks_NL: Tensor, size: int) -> None:
    """The plain pass, `size` blocks a batch."""
    for batch_BL in torch.split(blocks_NL, size):
        model.base_model(input_ids=batch_BL, use_cache=False)


@torch.no_grad()
def assert_equal(model: PreTrainedModel, blocks_NL: Tensor) -> None:
    """Raise unless Block Influence equals 1 - the mean cosine of hidden states, taken plainly.

    transformers returns the last hidden state after the final norm, so blocks that end with the
    last layer are left out here; the tests hold them to the same.
    """
    _, found = collect(model, blocks_NL)
    states = model.base_model(
        input_ids=blocks_NL, use_cache=False, output_hidden_states=True
    ).hidden_states
    for (first, length), influence in found.items():
        if first + length < len(states) - 1:
            pair = states[first].float(), states[first + length].float()
            plain = 1 - float(F.cosine_similarity(*pair, dim=-1).mean())
            assert abs(influence - plain) < 1e-5, (first, length, influence, plain)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    """Measure, print a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ratios: dict[str, float] = {}
    print(f"{arguments.blocks} blocks of {arguments.block_length} tokens, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {platform.processor() or platform.machine()}")
    for precision in arguments.precisions:
        model = _model(arguments.model, precision)
        shape = (arguments.blocks, arguments.block_length)
        blocks_NL = torch.randint(model.config.vocab_size, shape)
        assert_equal(model, blocks_NL[:1])
        plain, scored = _measure(model, blocks_NL, arguments.rounds)
        ratios[precision] = scored / plain
        print(f"{precision}  forward {plain:7.3f} s  with scores {scored:7.3f} s", end="  ")
        print(f"ratio {ratios[precision]:.3f}")
    if arguments.json:
        first = arguments.precisions[0]
        others = {f"cost_vs_forward.{name}": ratio for name, ratio in ratios.items()}
        print(json.dumps({"cost_vs_forward": ratios[first]} | others))


def _model(folder: Path | None, precision: str) -> PreTrainedModel:
    if folder:
        return load_model(folder, precision)
    return new_model(SMOLLM2_135M, seed=0).to(DTYPES[precision]).eval()


def _measure(model: PreTrainedModel, blocks_NL: Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of the plain pass and of the importance pass, after one of each unmeasured."""
    sizes: list[int] = []
    collect(model, blocks_NL, sizes.append)
    actions = (
        lambda: forward(model, blocks_NL, sizes[0]),
        lambda: collect(model, blocks_NL),
    )
    actions[0]()
    times = [[seconds(action) for action in actions] for _ in range(rounds)]
    plain, scored = (statistics.median(each) for each in zip(*times, strict=True))
    return plain, scored


if __name__ == "__main__":
    main()
