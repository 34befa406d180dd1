"""What each stage computes, held against numbers kept with the stage's version.

Artifacts of an older version are reused as long as the version stays: if this test fails because a
stage now computes something else, raise its version in `orchestrator/stages.py` and run
`python tests/test_golden.py` to keep the new numbers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.stages import STAGES

GOLDEN = Path(__file__).parent / "golden.json"


def computed(folder: Path) -> dict[str, dict[str, float]]:
    """A few numbers from every stage, run one after the other on the smallest of models."""
    import numpy as np

    from trainers import (
        acquire,
        benchmark,
        cache,
        correct,
        distill,
        evaluate,
        importance,
        pretrain,
        prune,
    )
    from trainers.activations import FILE, ActivationStatistics
    from trainers.checkpoints import load_model
    from trainers.config import (
        AcquireConfig,
        Activations,
        BenchmarkConfig,
        ByActivation,
        ByScore,
        CacheConfig,
        CorrectConfig,
        DepthCut,
        DistillConfig,
        DistillLoss,
        EvaluateConfig,
        FolderModel,
        GeneratedCorpus,
        GeneratedTask,
        HiddenCache,
        HiddenLoss,
        ImportanceConfig,
        LlamaShape,
        Perplexity,
        PretrainConfig,
        PruneConfig,
        RequestLengths,
        SampledCache,
        Training,
        WidthCut,
    )
    from trainers.contract import StageContext, StageResult
    from trainers.mapping import teacher_states

    corpus = GeneratedCorpus(
        block_length=24, training_blocks=64, calibration_blocks=4, heldout_blocks=4
    )
    training = Training(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=2)
    shape = LlamaShape(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.12,
    )

    def run(
        stage: Callable[[Any], StageResult], config: Any, name: str = "", **inputs: Path
    ) -> tuple[Path, dict[str, float]]:
        out = folder / (name or type(config).__name__)
        out.mkdir()
        result = stage(StageContext(config, inputs, out, seed=1))
        return out, dict(result.metrics) | {"tokens": result.tokens, "flops": result.flops}

    found: dict[str, dict[str, float]] = {}
    source, found["pretrain"] = run(
        pretrain.run, PretrainConfig(shape=shape, corpus=corpus, training=training)
    )
    held = FolderModel(path=source / "model")
    _, found["acquire"] = run(acquire.run, AcquireConfig(source=held))
    scored, found["importance"] = run(
        importance.run,
        ImportanceConfig(criterion=Perplexity(samples=4, block_lengths=(1, 2)), corpus=corpus),
        model=source,
    )
    activations, _ = run(
        importance.run,
        ImportanceConfig(criterion=Activations(samples=4), corpus=corpus),
        "activations",
        model=source,
    )
    seen = ActivationStatistics.load(activations / FILE)
    for units in ("down_input", "pre_activation", "heads", "groups", "channels"):
        total = float(seen.scores(units, "l2", "mean").sum())  # type: ignore[arg-type]
        found["importance"][f"{units} in all"] = total
    for row in map(json.loads, (scored / "scores.jsonl").read_text().splitlines()):
        found["importance"][f"{row['name']} {row['block_length']} {row['last']}"] = row["value"]
    pruned, found["prune"] = run(
        prune.run,
        PruneConfig(
            depth=DepthCut(num_hidden_layers=2, choice=ByScore()),
            width=WidthCut(
                intermediate_size=20,
                hidden_size=12,
                num_attention_heads=1,
                choice=ByActivation(),
                head_residual=True,
            ),
        ),
        model=source,
        importance=scored,
        activations=activations,
    )
    weights = load_model(pruned / "model").state_dict()
    found["prune"] |= {name: float(tensor.abs().sum()) for name, tensor in weights.items()}
    for number, layer in enumerate(json.loads((pruned / "dropped_layers.json").read_text())):
        found["prune"][f"dropped {number}"] = layer
    student, found["distill"] = run(
        distill.run, DistillConfig(corpus=corpus, training=training), model=pruned, teacher=source
    )
    hidden = HiddenLoss(states=("output", "embedding"), mapping={"last": "last"})
    states = teacher_states(hidden, 2, 4)
    exact = CacheConfig(corpus=corpus, signal=HiddenCache(), steps=6, batch_size=4, states=states)
    kept, found["cache"] = run(cache.run, exact, model=source)
    _, by_states = run(
        distill.run,
        DistillConfig(
            corpus=corpus,
            training=training,
            loss=DistillLoss(cross_entropy_weight=0.5, hidden=hidden),
            signal=HiddenCache(),
        ),
        "by_states",
        model=pruned,
        signals=kept,
    )
    found["distill"]["loss with hidden states"] = by_states["loss"]
    few = CacheConfig(corpus=corpus, signal=SampledCache(samples=3), steps=6, batch_size=4)
    drawn, _ = run(cache.run, few, "samples", model=source)
    ids = np.load(drawn / "ids.npy")
    found["cache"]["drawn tokens in all"] = float(ids.astype(np.int64).sum())
    _, found["correct"] = run(
        correct.run, CorrectConfig(corpus=corpus, training=training), model=source
    )
    tasks = (GeneratedTask(name="agreement", limit=20),)
    _, found["evaluate"] = run(
        evaluate.run, EvaluateConfig(corpus=corpus, tasks=tasks), model=student, teacher=source
    )
    lengths = (RequestLengths(input=6, output=4),)
    asked = BenchmarkConfig(lengths=lengths, batch_sizes=(2,), rounds=2)
    _, measured = run(benchmark.run, asked, model=student, teacher=source)
    # All else are seconds, and those are not the same twice.
    found["benchmark"] = {
        name: value
        for name, value in measured.items()
        if "peak_memory" in name or name in ("tokens", "flops")
    }
    return found


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return computed(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("kind", sorted(STAGES))
def test_a_stage_computes_what_its_version_stands_for(
    now: dict[str, dict[str, float]], kind: str
) -> None:
    kept = json.loads(GOLDEN.read_text())[kind]
    assert kept["version"] == STAGES[kind].version, "run `python tests/test_golden.py`"
    # Kernels differ between processors in the last bits, which training carries on.
    assert now[kind] == pytest.approx(kept["values"], rel=1e-3, abs=1e-3), (
        f"{kind} computes something else: raise its version in orchestrator/stages.py"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        values = computed(Path(scratch))
    golden = {k: {"version": STAGES[k].version, "values": values[k]} for k in sorted(STAGES)}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    sys.stdout.write(f"written: {GOLDEN}\n")
