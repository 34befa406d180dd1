"""Models that are ready to generate: by transformers on a CPU or GPU, or by vLLM on a GPU.

Every back end answers all requests of a batch at once, greedily, each with exactly so many new
tokens: no end of text ends an answer early.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from trainers import workers
from trainers.checkpoints import load_model
from trainers.config import BenchmarkConfig, Load
from trainers.contract import StageError

SHARE_OF_GPU = 0.45
"""Of a GPU's memory, for each of two vLLM engines that stand side by side."""


class Generator(Protocol):
    """A loaded model."""

    def generate(self, prompts_BI: Tensor, new_tokens: int) -> Tensor:
        """The new tokens alone, (batch, new_tokens), on the CPU: so they are there when it ends."""

    def peak_bytes(self) -> float | None:
        """The most memory that the model took in the calls since this was asked last, its weights
        included; None where nothing tells."""


def open_model(folder: Path, config: BenchmarkConfig) -> Generator:
    """The model in `folder`, ready. Raises `StageError` where its back end cannot be had."""
    if config.backend == "vllm":
        return VLLM(folder, config)
    return Transformers(folder, config.precision)


class Transformers:
    """`generate` of transformers with its own key-value cache."""

    def __init__(self, folder: Path, precision: str) -> None:
        self._model = load_model(folder, precision).to(workers.device())
        # What a checkpoint asks for (an end of text, sampling, penalties) is no part of this.
        self._model.generation_config = GenerationConfig(do_sample=False)
        self._cuda = self._model.device.type == "cuda"
        self._weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self._peak: float | None = None

    @torch.inference_mode()
    def generate(self, prompts_BI: Tensor, new_tokens: int) -> Tensor:
        """See `Generator`."""
        ids_BI = prompts_BI.to(self._model.device)
        before = self._allocated()
        whole_BT: Tensor = self._model.generate(
            ids_BI,
            attention_mask=torch.ones_like(ids_BI),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        if self._cuda:
            # Another model's weights may lie beside: they are in both figures.
            grown = torch.cuda.max_memory_allocated(self._model.device) - before
            self._peak = max(self._peak or 0.0, float(self._weights + grown))
        return whole_BT[:, prompts_BI.shape[1] :].cpu()

    def _allocated(self) -> int:
        """Bytes in use on the GPU; its high-water mark starts from here."""
        if not self._cuda:
            return 0
        torch.cuda.reset_peak_memory_stats(self._model.device)
        return torch.cuda.memory_allocated(self._model.device)

    def peak_bytes(self) -> float | None:
        """By PyTorch's allocator on a GPU. A process on a CPU keeps what it has freed, so that its
        size says nothing of one of two models: None."""
        peak, self._peak = self._peak, None
        return peak


class VLLM:
    """vLLM's offline engine (`vllm.LLM`): paged keys and values, CUDA graphs, continuous batching;
    with precision fp8 it quantises bf16 weights while it loads them.

    What was read before is not kept from call to call (`enable_prefix_caching`): each call reads
    its prompts. Not run by any test here: it needs a GPU.
    """

    def __init__(self, folder: Path, config: BenchmarkConfig) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise StageError("vllm is not installed; `pip install -e '.[vllm]'` does it")
        if not torch.cuda.is_available():
            raise StageError("backend vllm needs a GPU, and this worker has none")
        import vllm

        self._parameters = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32" if config.precision == "fp32" else "bfloat16",
            quantization="fp8" if config.precision == "fp8" else None,
            max_model_len=max(each.input + each.output for each in config.lengths),
            max_num_seqs=max(max(load.batch, load.teacher_batch) for load in config.loads),
            gpu_memory_utilization=SHARE_OF_GPU,
            enable_prefix_caching=False,
        )

    def generate(self, prompts_BI: Tensor, new_tokens: int) -> Tensor:
        """See `Generator`."""
        sampling = self._parameters(
            temperature=0.0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": row} for row in prompts_BI.tolist()]
        answers = self._engine.generate(prompts, sampling, use_tqdm=False)
        made = [list(answer.outputs[0].token_ids) for answer in answers]
        if {len(row) for row in made} != {new_tokens}:
            raise StageError(f"vllm gave {sorted({len(r) for r in made})} tokens, not {new_tokens}")
        return torch.tensor(made)

    def peak_bytes(self) -> float | None:
        """vLLM takes its share of the GPU at once, whatever the model: None."""
        return None


def prompts(load: Load, vocab_size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens drawn uniformly, (batch, input), for the model and for its teacher: the same ones as
    far as the smaller batch goes."""
    count = max(load.batch, load.teacher_batch)
    ids_BI = torch.randint(vocab_size, (count, load.input), generator=random)
    return ids_BI[: load.batch], ids_BI[: load.teacher_batch]
