"""One trial's settings, typed, with the checks that need several of them at once."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from orchestrator import schema
from orchestrator.located import Node, Part
from orchestrator.pruning import ByTask, PruneSettings, inconsistent
from orchestrator.wording import Problem, nearest_first, validate
from trainers.config import (
    BenchmarkConfig,
    Corpus,
    DistillLoss,
    FolderModel,
    Frozen,
    HarnessTask,
    HiddenCache,
    HubModel,
    LiveSignal,
    ModelSource,
    SampledCache,
    ScratchModel,
    Shorthand,
    Task,
    TopKCache,
    Training,
)

Placed = tuple[tuple[Part, ...], str]
"""Where something is wrong, and what."""


class ImportanceSettings(Frozen):
    """What the criteria measure on.

    `samples` of the calibration blocks of `corpus` (the trial's own, unless one is named), drawn
    with the seed where they are not all, for activations and perplexity; `tasks` for the task
    criterion. Perplexity and task also score blocks of `extra_block_lengths` layers, for the
    figures.
    """

    samples: int = Field(gt=0)
    corpus: Corpus | None = None
    tasks: tuple[Task, ...] = ()
    extra_block_lengths: tuple[Annotated[int, Field(gt=0)], ...] = (1, 2)


class AutoSignal(Frozen):
    """The cheapest exact signal: the teacher's hidden states, computed once for all trials, where
    they fit `resources.largest_cache_gb`; else a live teacher."""

    kind: Literal["auto"] = "auto"


class DistillSettings(Frozen):
    """How the student is retrained, and who teaches it: the source model (`original`), the one that
    it was pruned from (`previous`; they differ only in a chain), or `teacher_model`, any other of
    the same vocabulary."""

    loss: DistillLoss = DistillLoss()
    training: Training
    teacher: Literal["original", "previous"] = "original"
    teacher_model: Annotated[FolderModel | HubModel, Field(discriminator="kind")] | None = None
    signal: Annotated[
        AutoSignal | LiveSignal | HiddenCache | SampledCache | TopKCache,
        Field(discriminator="kind"),
        Shorthand,
    ] = AutoSignal()
    heldout_every: int | None = Field(default=None, gt=0)
    """Optimizer steps between two measurements of the held-out loss, which the curve then has and
    early stopping goes by."""

    @model_validator(mode="after")
    def _signal_suffices(self) -> DistillSettings:
        if isinstance(self.signal, SampledCache | TopKCache):
            if self.loss.logits not in ("forward_kl", "none") or self.loss.temperature != 1:
                text = f"{self.signal.kind} knows the teacher for forward_kl at temperature 1 alone"
                raise inconsistent([(("signal",), text)])
            if self.loss.hidden is not None or self.loss.top_k is not None:
                text = f"{self.signal.kind} holds neither hidden states nor all logits"
                raise inconsistent([(("signal",), text)])
        if self.heldout_every is not None and self.training.engine.zero_stage == 3:
            text = "needs whole weights to measure with, and zero_stage 3 shards them"
            raise inconsistent([(("heldout_every",), text)])
        return self


class CorrectSettings(Frozen):
    """Fine-tune the teacher on the corpus first (P2 section 3); the student is pruned from the
    corrected teacher, or from the source as it was."""

    training: Training
    prune_from: Literal["corrected", "original"] = "corrected"


class ChainStep(Frozen):
    """An earlier step of a chain: cut so far, and distil as the trial does unless said otherwise.
    `training_steps` changes only the length of that distillation."""

    prune: PruneSettings
    distill: DistillSettings | None = None
    training_steps: int | None = Field(default=None, gt=0)

    def distillation(self, of_trial: DistillSettings | None) -> DistillSettings | None:
        """This step's distillation, given the trial's."""
        settings = self.distill or of_trial
        if settings is None or self.training_steps is None:
            return settings
        steps = {"steps": self.training_steps}
        training = Training.model_validate({**settings.training.model_dump(), **steps})
        return settings.model_copy(update={"training": training})


class EvaluateSettings(Frozen):
    """Which questions are asked; with `tasks_before` also of the student before distillation."""

    tasks: tuple[Task, ...] = ()
    tasks_before: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"


class TrialConfig(Frozen):
    """Everything that determines a trial. Its local paths are absolute and exist."""

    source: ModelSource
    corpus: Corpus
    importance: ImportanceSettings
    correct: CorrectSettings | None = None
    chain: tuple[ChainStep, ...] = ()
    prune: PruneSettings | None = None
    distill: DistillSettings | None = None
    evaluate: EvaluateSettings
    benchmark: BenchmarkConfig | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_serializer(mode="wrap")
    def _with_what_is_asked_for(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a benchmark a trial is what it was before there were any: its id stays."""
        found: dict[str, Any] = dump(self)
        return {k: v for k, v in found.items() if k != "benchmark" or v is not None}

    @property
    def distillations(self) -> tuple[DistillSettings | None, ...]:
        """The distillation after every pruning, that of the trial last."""
        return (*(step.distillation(self.distill) for step in self.chain), self.distill)

    @property
    def cuts(self) -> tuple[tuple[tuple[Part, ...], PruneSettings], ...]:
        """Every pruning in the order it is done, with its place among the settings."""
        earlier = ((("chain", i, "prune"), step.prune) for i, step in enumerate(self.chain))
        own = ((("prune",), self.prune),) if self.prune is not None else ()
        return (*earlier, *own)

    @model_validator(mode="after")
    def _consistent(self) -> TrialConfig:
        problems = [*self._importance_problems(), *self._chain_problems(), *self._depth_problems()]
        for place, tasks in self.asked().items():
            problems += _task_problems(place, tasks)
        if problems:
            raise inconsistent(problems)
        return self

    def asked(self) -> dict[str, tuple[Task, ...]]:
        """The tasks by the section that asks them."""
        return {"importance": self.importance.tasks, "evaluate": self.evaluate.tasks}

    def _importance_problems(self) -> Iterator[Placed]:
        corpus = self.importance.corpus or self.corpus
        samples, blocks = self.importance.samples, corpus.calibration_blocks
        if samples > blocks:
            text = f"is {samples}, but the corpus has only {blocks} calibration_blocks"
            yield ("importance", "samples"), text
        depths = (cut.depth for _, cut in self.cuts if cut.depth is not None)
        by_task = any(isinstance(depth.criterion, ByTask) for depth in depths)
        if by_task and not self.importance.tasks:
            yield ("importance", "tasks"), "the criterion task needs at least one task here"

    def _chain_problems(self) -> Iterator[Placed]:
        if self.chain and self.prune is None:
            yield ("chain",), "leads to a last step under prune, which is not there"
        for index, step in enumerate(self.chain):
            try:
                step.distillation(self.distill)
            except ValueError:
                yield ("chain", index, "training_steps"), "leaves none but warm-up steps"

    def _depth_problems(self) -> Iterator[Placed]:
        depth = self.prune.depth if self.prune else None
        if depth and not self.chain and isinstance(self.source, ScratchModel):
            text = depth.contradiction(self.source.shape.num_hidden_layers)
            if text:
                yield ("prune", "depth", "keep"), text


def _task_problems(place: str, tasks: Sequence[Task]) -> Iterator[Placed]:
    counts = Counter(task.name for task in tasks)
    for index, task in enumerate(tasks):
        at = (place, "tasks", index, "name")
        if counts[task.name] > 1:
            yield at, f"'{task.name}' is the name of {counts[task.name]} tasks"
        if task.name == "mean" or not re.fullmatch(r"[\w.-]+", task.name):
            yield at, f"'{task.name}' is not a name for a task: use letters, digits, '_', '-', '.'"


def build_trial(tree: Node) -> tuple[TrialConfig | None, list[Problem]]:
    """The typed form of a trial's tree, its files found; or everything that is wrong with it."""
    found, problems = schema.find_files(TrialConfig, tree)
    config, more = validate(TrialConfig, found, extra_keys=(schema.DATA_FOLDER,))
    problems += more
    if config is not None:
        problems += [*_unknown_harness_tasks(config), *_missing_backend(config)]
    return (None if problems else config), problems


def _missing_backend(config: TrialConfig) -> Iterator[Problem]:
    asked = config.benchmark
    if asked and asked.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        text = "vllm is not installed; `pip install -e '.[vllm]'` does it"
        yield Problem(("benchmark", "backend"), text)


# --- tasks of lm-evaluation-harness ----------------------------------------------------------

_TASK_NAME = re.compile(
    rb"""^[ \t]*(?:-[ \t]+)?["']?(?:task|group|tag)["']?:[ \t]*["']?([\w][^\r\n"'#]*)""", re.M
)
_TAG_LIST = re.compile(
    rb"""^["']?tag["']?:[ \t]*\r?\n((?:[ \t]*-[ \t]+[^\r\n]+(?:\r?\n|$))+)""", re.M
)


@cache
def known_harness_tasks() -> frozenset[str]:
    """Names of tasks, groups and tags that the installed lm-evaluation-harness defines.

    Read from the text of its YAML files: to import it takes seconds, and torch. A file that names
    no task of its own (it includes another, or a class does) counts by its file name.
    """
    found = importlib.util.find_spec("lm_eval")
    names: set[str] = set()
    for folder in (found and found.submodule_search_locations) or ():
        for path in _yaml_files(Path(folder) / "tasks"):
            own_name = {Path(path).stem} if path.endswith(".yaml") else set[str]()
            names |= _names_in(path) or own_name
    return frozenset(names)


def _yaml_files(folder: Path) -> Iterator[str]:
    pending = [str(folder)] if folder.is_dir() else []
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.name.endswith("yaml") or "." not in entry.name:
                    yield entry.path  # what others include often has no ending


def _names_in(path: str) -> set[str]:
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 (14,000 files: keep it cheap)
        text = stream.read(16_384)
        if len(text) == 16_384 and not _TASK_NAME.search(text):
            text += stream.readall()
    found = _TASK_NAME.findall(text)
    for tags in _TAG_LIST.findall(text):
        found += [line.split(b"-", 1)[1] for line in tags.splitlines()]
    return {name.decode(errors="replace").strip(" \t\"'") for name in found}


def _unknown_harness_tasks(config: TrialConfig) -> Iterator[Problem]:
    for place, tasks in config.asked().items():
        for index, task in enumerate(tasks):
            if isinstance(task, HarnessTask) and task.name not in known_harness_tasks():
                near = nearest_first(task.name, known_harness_tasks())[:3]
                text = (
                    f"lm-evaluation-harness has no task '{task.name}'; nearest: {', '.join(near)}"
                )
                yield Problem((place, "tasks", index, "name"), text)
