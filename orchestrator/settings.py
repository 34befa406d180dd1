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

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import schema
from orchestrator.located import Node, Part
from orchestrator.wording import Problem, nearest_first, validate
from trainers.config import (
    Corpus,
    DistillLoss,
    Frozen,
    HarnessTask,
    ModelSource,
    ScratchModel,
    Shorthand,
    Task,
    Training,
)


def _inconsistent(problems: Sequence[tuple[tuple[Part, ...], str]]) -> PydanticCustomError:
    """An error about several settings, each with its place below the model that raises it."""
    text = "; ".join(f"{'.'.join(map(str, at))}: {what}" for at, what in problems)
    return PydanticCustomError("inconsistent", "{text}", {"text": text, "problems": problems})


class ByPerplexity(Frozen):
    """Drop what raises the calibration loss least."""

    kind: Literal["perplexity"] = "perplexity"


class ByBlockInfluence(Frozen):
    """Drop what changes the hidden states least."""

    kind: Literal["block_influence"] = "block_influence"


class ByTask(Frozen):
    """Drop what lowers the accuracy on `importance.tasks` least."""

    kind: Literal["task"] = "task"


class RandomLayers(Frozen):
    """Drop layers drawn with the trial's seed."""

    kind: Literal["random"] = "random"


class Explicit(Frozen):
    """Drop exactly these layers, counted from 0."""

    kind: Literal["layers"] = "layers"
    drop: tuple[int, ...]


DepthCriterion = Annotated[
    ByPerplexity | ByBlockInfluence | ByTask | RandomLayers | Explicit,
    Field(discriminator="kind"),
    Shorthand,
]


def _check_keep(value: Any) -> Any:
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        problem = "must be a number of layers (1, 2, …) or a fraction between 0 and 1"
    elif isinstance(value, int) and value < 1:
        problem = f"is {value}, must be at least 1 layer"
    elif isinstance(value, float) and not 0 < value < 1:
        problem = f"is {value}, must be a fraction between 0 and 1, or a whole number of layers"
    else:
        return value
    raise PydanticCustomError("keep", "{problem}", {"problem": problem})


class DepthSettings(Frozen):
    """How many layers stay, and which.

    `keep` is a number of layers, or a fraction of the source's. An explicit list says it already:
    there `keep` may be left out, and must agree where it is given.
    """

    keep: Annotated[int | float | None, BeforeValidator(_check_keep)] = None
    criterion: DepthCriterion
    contiguous: bool = False

    def layers_kept(self, num_hidden_layers: int) -> int:
        """Of so many layers, how many stay; a fraction is rounded and leaves one at least.

        Does not check that it is possible: the result may be above `num_hidden_layers`, or below 1
        for a list.
        """
        if isinstance(self.criterion, Explicit):
            return num_hidden_layers - len(self.criterion.drop)
        return self._asked_for(num_hidden_layers)

    def contradiction(self, num_hidden_layers: int) -> str | None:
        """How `keep` and an explicit list disagree for a source of so many layers, if they do."""
        kept = self.layers_kept(num_hidden_layers)
        if self.keep is None or kept == self._asked_for(num_hidden_layers):
            return None
        return (
            f"keep {self.keep} of {num_hidden_layers} layers contradicts criterion.drop, which "
            f"leaves {kept}; write `keep: null` to let the list decide"
        )

    def _asked_for(self, num_hidden_layers: int) -> int:
        if isinstance(self.keep, float):
            return max(1, round(self.keep * num_hidden_layers))
        return self.keep or 0

    @model_validator(mode="after")
    def _complete(self) -> DepthSettings:
        if isinstance(self.criterion, Explicit):
            drop = self.criterion.drop
            if not drop or min(drop) < 0 or len(set(drop)) < len(drop):
                raise _inconsistent(
                    [(("criterion", "drop"), "must list layers, counted from 0, each once")]
                )
        elif self.keep is None:
            raise _inconsistent(
                [(("keep",), f"is required with the criterion {self.criterion.kind}")]
            )
        return self


class PruneSettings(Frozen):
    """What is cut, and whether the student inherits the remaining weights."""

    depth: DepthSettings
    initialise: Literal["inherited", "random"] = "inherited"


class ImportanceSettings(Frozen):
    """What the criteria measure on.

    `samples` calibration blocks for perplexity and Block Influence, `tasks` for the task
    criterion. Blocks of `extra_block_lengths` layers are scored too, for the figures.
    """

    samples: int = Field(gt=0)
    tasks: tuple[Task, ...] = ()
    extra_block_lengths: tuple[Annotated[int, Field(gt=0)], ...] = (1, 2)


class DistillSettings(Frozen):
    """How the student is retrained."""

    loss: DistillLoss = DistillLoss()
    training: Training


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
    prune: PruneSettings | None = None
    distill: DistillSettings | None = None
    evaluate: EvaluateSettings
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _consistent(self) -> TrialConfig:
        problems = [*self._importance_problems(), *self._depth_problems()]
        for place, tasks in self.asked().items():
            problems += _task_problems(place, tasks)
        if problems:
            raise _inconsistent(problems)
        return self

    def asked(self) -> dict[str, tuple[Task, ...]]:
        """The tasks by the section that asks them."""
        return {"importance": self.importance.tasks, "evaluate": self.evaluate.tasks}

    def _importance_problems(self) -> Iterator[tuple[tuple[Part, ...], str]]:
        samples, blocks = self.importance.samples, self.corpus.calibration_blocks
        if samples > blocks:
            text = f"is {samples}, but the corpus has only {blocks} calibration_blocks"
            yield ("importance", "samples"), text
        by_task = self.prune is not None and isinstance(self.prune.depth.criterion, ByTask)
        if by_task and not self.importance.tasks:
            yield ("importance", "tasks"), "the criterion task needs at least one task here"

    def _depth_problems(self) -> Iterator[tuple[tuple[Part, ...], str]]:
        if self.prune and isinstance(self.source, ScratchModel):
            text = self.prune.depth.contradiction(self.source.shape.num_hidden_layers)
            if text:
                yield ("prune", "depth", "keep"), text


def _task_problems(place: str, tasks: Sequence[Task]) -> Iterator[tuple[tuple[Part, ...], str]]:
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
        problems += _unknown_harness_tasks(config)
    return (None if problems else config), problems


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
