"""Made-up records of a small depth ablation, with known answers, for tests that need no training.

Perplexity and Block Influence share the best students, `task` is behind, random layers further.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from orchestrator.records import (
    TEACHER,
    BlockScore,
    CurvePoint,
    ItemRecord,
    Records,
    StageRecord,
    TrialRecord,
)

TASKS = ("agreement", "knowledge", "reference")
CRITERIA = ("perplexity", "block_influence", "task")
SEEDS = (0, 1)
START = 1_750_000_000.0

# Share of the questions that each group answers.
ABILITY = {
    TEACHER: 0.97,
    "perplexity": 0.84,
    "block_influence": 0.83,
    "task": 0.66,
    "random_layers": 0.45,
}


def records(questions: int = 60) -> Records:
    """Teacher, three criteria and random layers with two seeds each, and one failed trial.
    `questions` a half and task."""
    groups = [(TEACHER, 0)] + [
        (group, seed) for group in (*CRITERIA, "random_layers") for seed in SEEDS
    ]
    trials, items, curves = [], [], []
    for position, (group, seed) in enumerate(groups):
        answered = items_of(f"{group}-{seed}", ABILITY[group], questions, seed)
        trials.append(trial(group, seed, position, accuracies(answered)))
        items += answered
        if group != TEACHER:
            curves += curve(f"{group}-{seed}", ABILITY[group], seed)
    trials.append(failed("task", 2, len(groups)))
    return Records(
        sweep="depth_ablation",
        profile="made_up",
        trials=tuple(trials),
        stages=tuple(stage for each in trials for stage in stages_of(each)),
        curves=tuple(curves),
        items=tuple(items),
        scores=tuple(block_scores()),
    )


def trial(group: str, seed: int, position: int, metrics: Mapping[str, float]) -> TrialRecord:
    """A completed trial; losses follow from the group's ability."""
    grid = group in CRITERIA
    teacher = group == TEACHER
    loss = 3.0 - ABILITY[group] + seed / 100
    losses = {"lm_loss.before": loss + 1, "lm_loss.after": loss, "kd_loss.after": loss - 2}
    depth = {"keep": 0.5, "criterion": group if grid else "random", "contiguous": True}
    return TrialRecord(
        trial_id=f"{group}-{seed}",
        sweep="depth_ablation",
        profile="made_up",
        seed=seed,
        status="completed",
        reason=None,
        baseline=None if grid else group,
        config={"seed": seed, "prune": None if teacher else {"depth": depth}},
        axes={"prune.depth.criterion": group, "prune.depth.contiguous": True} if grid else {},
        parameters=930_000 if teacher else 540_000,
        parameters_non_embedding=910_000 if teacher else 520_000,
        tokens_trained=0 if teacher else 61_440,
        metrics={**metrics, **({"lm_loss.after": 1.9} if teacher else losses)},
        dropped_layers=None if teacher else (1, 2, 3, 6),
        cpu_s=20.0,
        gpu_s=0.0,
        wall_s=12.5,
        started_at=START + 20 * position,
        ended_at=START + 20 * position + 12.5,
    )


def failed(criterion: str, seed: int, position: int) -> TrialRecord:
    """A trial whose loss left the numbers."""
    whole = trial(criterion, seed, position, {})
    reason = "distill: the loss is not finite at step 7 | <nan>"
    return replace(whole, status="failed", reason=reason, metrics={}, tokens_trained=None)


def items_of(trial_id: str, ability: float, questions: int, seed: int) -> list[ItemRecord]:
    """Each question has a difficulty, the same for every trial; ability against it decides."""
    rows = []
    for task in TASKS:
        draw = random.Random(task)
        for position in range(2 * questions):
            correct = float(ability + 0.02 * seed > draw.random())
            split = "report" if position % 2 else "select"
            score = (1 if correct else -1) * draw.random()
            rows.append(ItemRecord(trial_id, task, f"{position:04d}", split, correct, score))
    return rows


def accuracies(items: list[ItemRecord]) -> dict[str, float]:
    """`accuracy.<task>`, `accuracy.mean` and the same on the report half."""
    metrics = {}
    for name, split in (("accuracy", "select"), ("accuracy_report", "report")):
        for task in TASKS:
            hits = [item.correct for item in items if (item.task, item.split) == (task, split)]
            metrics[f"{name}.{task}"] = sum(hits) / len(hits)
        metrics[f"{name}.mean"] = sum(metrics[f"{name}.{task}"] for task in TASKS) / len(TASKS)
    return metrics


def curve(trial_id: str, ability: float, seed: int, steps: int = 80) -> list[CurvePoint]:
    """A loss that falls towards its end with noise."""
    draw = random.Random(f"{trial_id} {seed}")
    points = []
    for step in range(1, steps + 1):
        for name, floor in (("lm_loss", 3.0 - ability), ("kd_loss", 1.0 - ability)):
            value = floor + 2.5 * 0.95**step + draw.gauss(0, 0.04)
            time_ms = int(START * 1000) + 100 * step
            points.append(CurvePoint(trial_id, step, 768 * step, time_ms, name, value))
    return points


def stages_of(trial: TrialRecord) -> list[StageRecord]:
    """The importance pass is run by the first trial that asks for it and shared by the others."""

    def stage(kind: str, id_: str, cached: bool, cpu_s: float) -> StageRecord:
        cost = 0.0 if cached else cpu_s
        return StageRecord(id_, trial.trial_id, kind, cached, cost, 0.0, cost, 900.0, 61_440, 1e12)

    kinds = [stage("pretrain", "pretrain-0", trial.baseline != TEACHER, 150.0)]
    if trial.baseline is None:
        criterion = trial.axes["prune.depth.criterion"]
        kinds.append(stage("importance", f"importance-{criterion}", trial.seed > 0, 10.0))
    kinds.append(stage("evaluate", f"evaluate-{trial.trial_id}", False, 20.0))
    return kinds if trial.status == "completed" else kinds[:-1]


def block_scores(layers: int = 8) -> list[BlockScore]:
    """Ends matter more than the middle, and longer blocks more than shorter ones."""
    rows = []
    for name, stage, intact, slope in (
        ("lm_loss", "importance-perplexity", 1.9, 0.9),
        ("accuracy", "importance-task", 0.97, -0.12),
    ):
        criterion = stage.removeprefix("importance-")
        rows.append(BlockScore(stage, criterion, 0, -1, name, intact))
        for length in (1, 2, 4):
            for last in range(length - 1, layers):
                ends = abs((last - length / 2 + 0.5) / (layers - 1) - 0.5)
                value = intact + slope * length**0.6 * (0.3 + 2 * ends**2)
                rows.append(BlockScore(stage, criterion, length, last, name, value))
    return rows
