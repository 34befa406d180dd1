"""The sweep file's typed form, and the only reader of sweep files and profiles.

A sweep says what is asked, a profile at which scale: the trial's settings are the profile's, then
the sweep's over them, then `--set`. Whatever is wrong is told all at once, each mistake with its
file, line and dotted key, and nothing else happens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator import scheduling, schema
from orchestrator.asked import Claim, Select
from orchestrator.candidates import Constraints
from orchestrator.located import (
    LocatedError,
    Node,
    Origin,
    dump,
    merge,
    nest,
    read_file,
    read_value,
    undotted,
)
from orchestrator.pruning import inconsistent
from orchestrator.scheduling import Scheduler, Search
from orchestrator.schema import unknown_setting
from orchestrator.settings import TrialConfig, build_trial, known_harness_tasks
from orchestrator.winners import NAME, NoWinnerError, find_winners
from orchestrator.wording import Problem, hint, nearest_first, validate
from trainers.config import Frozen

__all__ = [
    "NAME",
    "Resources",
    "Select",
    "SpecError",
    "Sweep",
    "TrialConfig",
    "build_trial",
    "known_harness_tasks",
    "load",
]

RESERVED = ("artifacts", "mlartifacts", "published")
"""Folders beside those of the sweeps."""
STORAGE = ("file", "s3", "gs")
"""Schemes of URIs where artifacts can be."""
VARYING = ("trial", "axes", "linked", "exclude", "baselines")
"""What trials are made of; typed only once a trial is made."""


class SpecError(Exception):
    """Invalid input. Each of `messages` reads `file:line: dotted.key: what is wrong`."""

    def __init__(self, *messages: str) -> None:
        self.messages = tuple(dict.fromkeys(messages))
        super().__init__("\n".join(self.messages))


class Resources(Frozen):
    """What a sweep may use: CPU cores of a trial, and of a stage that several trials wait for."""

    cpus_per_trial: int = Field(default=1, gt=0)
    cpus_shared: int = Field(default=1, gt=0)
    max_concurrent: int | None = Field(default=None, gt=0)
    checkpoint_every_s: float = Field(default=30.0, gt=0)
    largest_cache_gb: float = Field(default=4.0, ge=0)
    """Disk that one cache of a teacher's outputs may take before a live teacher is preferred."""
    workers: int = Field(default=1, gt=0)
    """Processes that train one trial together; `cpus_per_trial` is for each of them."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    gpu_memory_gb: float = Field(default=80.0, gt=0)
    """Memory of a GPU, for `plan`, which also reckons GPU-hours: FLOPs / (peak * utilisation)."""
    peak_tflops: float = Field(default=989.0, gt=0)
    """What a GPU computes at most: an H100 SXM in dense bf16 (its data sheet: 1,979 sparse)."""
    utilisation: float = Field(default=0.4, gt=0, le=1)
    """The share of that peak that is reached: an assumption until it is measured."""


def _check_name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(NAME, value):
        text = "'{value}' is not a name: use letters, digits, '_' and '-' only"
        raise PydanticCustomError("name", text, {"value": value})
    if value in RESERVED:
        text = "'{value}' is the name of a folder among the results; choose another"
        raise PydanticCustomError("reserved", text, {"value": value})
    return value


def _check_location(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    scheme, found, rest = value.partition("://")
    if found and (scheme not in STORAGE or not rest.strip("/")):
        text = "'{value}' is no place for artifacts: name a folder, s3://bucket/… or gs://bucket/…"
        raise PydanticCustomError("location", text, {"value": value})
    if found and "@" in rest.partition("?")[0]:
        text = "must hold no credentials: give them in the environment (AWS_ACCESS_KEY_ID, …)"
        raise PydanticCustomError("location", text)
    return value


def _check_seeds(value: Any) -> Any:
    if isinstance(value, tuple) and (not value or len(set(map(str, value))) < len(value)):
        raise PydanticCustomError("seeds", "must list at least one seed, each once")
    return value


Name = Annotated[str, BeforeValidator(_check_name)]
Location = Annotated[str, BeforeValidator(_check_location)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(_check_seeds)]


class SweepFile(Frozen):
    """The keys of a sweep file. `merged`: the profile's settings are in it already."""

    name: Name
    question: str
    profile: str | None = None
    merged: bool = False
    trial: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Any] = Field(default_factory=dict)
    linked: tuple[dict[str, Any], ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    baselines: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    seeds: Seeds = (0,)
    constraints: Constraints = Constraints()
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    select: Select = Select()
    claims: tuple[Claim, ...] = ()
    resources: Resources = Resources()
    artifacts: Location | None = None
    """Folder or URI of artifacts that several machines share; by default below the results. Where
    they are says nothing of what they are: it enters neither identities nor records."""

    @model_validator(mode="after")
    def _whole_race(self) -> SweepFile:
        if self.search.method != "grid" and self.scheduler.method == "race":
            text = "a race runs the whole grid; use asha or median"
            raise inconsistent([(("search", "method"), text)])
        return self


class Sweep(SweepFile):
    """A sweep with its profile and overrides merged in. `tree` knows where each value is from."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    profile: Name
    tree: Node = Field(exclude=True, repr=False)

    @property
    def base(self) -> Node:
        """The settings all trials share, with their places."""
        return self.tree.child("trial") or Node({}, self.tree.origin)

    @property
    def grows(self) -> bool:
        """Whether trials are added while the sweep runs."""
        return self.search.method != "grid" or self.scheduler.method == "race"

    @property
    def finalists(self) -> dict[str, Any] | None:
        """See `scheduling.finalists`."""
        return scheduling.finalists(self.select, self.scheduler)

    def resolved(self, relative_to: Path | None = None) -> dict[str, Any]:
        """The sweep with everything inline, as a sweep file that needs no profile.

        Local paths are absolute, or relative to the folder `relative_to` if the file goes there;
        those of text and questions start at the `data_folder`, if there is one.
        """
        tree = schema.final_paths(TrialConfig, self.tree, relative_to)
        return {
            "name": self.name,
            "question": self.question,
            "profile": self.profile,
            "merged": True,
            **{key: tree.mapping[key].plain() for key in VARYING if key in tree.mapping},
            "seeds": list(self.seeds),
            "constraints": self.constraints.model_dump(exclude_none=True),
            "search": self.search.model_dump(exclude_none=True),
            "scheduler": self.scheduler.model_dump(exclude_none=True),
            "select": self.select.model_dump(exclude_none=True),
            **({"claims": tree.mapping["claims"].plain()} if self.claims else {}),
            "resources": self.resources.model_dump(),
        }

    def dump_yaml(self, relative_to: Path | None = None) -> str:
        """`resolved` as YAML text."""
        return dump(self.resolved(relative_to))


class ProfileFile(Frozen):
    """The keys of a profile. Its seeds and resources win over the sweep's: it knows the scale."""

    description: str = ""
    trial: dict[str, Any] = Field(default_factory=dict)
    for_sweep: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that a sweep of this name needs at this scale, laid over `trial`, and `seeds`."""
    seeds: Seeds | None = None
    resources: Resources = Resources()
    artifacts: Location | None = None


def load(
    sweep: Path,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    results: Path = Path("results"),
) -> Sweep:
    """A sweep file with a profile (by default the one it names) and `key=value` overrides.

    Winners of other sweeps that serve as sources are looked for under `results`.

    Axes, exclusions, baselines and what metrics there are to go by are checked when trials are made
    (`orchestrator.space`).
    Raises `SpecError`.
    """
    sweep = Path(sweep)
    try:
        document = _document(read_file(sweep))
        name, scale = _profile(sweep, document, profile)
        settings = _overrides(overrides)
    except LocatedError as error:
        raise SpecError(*error.messages) from None
    document, problems = _lift_seeds(document)
    messages = [p.message(scale) for p in validate(ProfileFile, scale)[1]]
    messages += [p.message(document) for p in problems]
    tree = _over_profile(document, scale)
    for key, node in settings:
        tree, trouble = _set(tree, key, node)
        messages += trouble
    messages += [text for key, node in settings for text in _overruled(tree, key, node)]
    tree = _with_seeds(tree)
    try:
        tree = find_winners(tree, results, name)
    except NoWinnerError as error:
        raise SpecError(str(error)) from None
    valid, problems = validate(SweepFile, tree)
    messages += [p.message(tree) for p in problems] + _base_problems(tree)
    if messages or valid is None:
        raise SpecError(*messages)
    raw = {key: node.plain() for key, node in tree.mapping.items() if key in VARYING}
    place = _artifacts(tree)
    return Sweep(**{**dict(valid), **raw, "profile": name, "tree": tree, "artifacts": place})


def _document(tree: Node) -> Node:
    """A file's top level: a mapping; a key with nothing after it counts as left out."""
    if tree.value is None:
        raise SpecError(f"{tree.origin}: the file is empty")
    if not tree.mapping:
        raise SpecError(f"{tree.origin}: must be a mapping of keys to values")
    return replace(tree, value={k: v for k, v in tree.mapping.items() if v.value is not None})


def _profile(sweep: Path, document: Node, asked: str | None) -> tuple[str, Node]:
    """The profile's name, and what it holds: nothing where that is merged in already."""
    named = document.child("profile")
    origin = Origin(f"--profile {asked}", None, Path.cwd()) if asked else document.origin
    if named is not None and not asked:
        origin = named.origin
    name = asked or (named.value if named else None)
    if not isinstance(name, str):
        problem = "must be text" if named else "is required (or give --profile)"
        raise SpecError(f"{origin}: profile: {problem}{_available(sweep, '')}")
    if (merged := document.child("merged")) is not None and merged.value is True:
        if asked and named is not None and asked != named.value:
            text = f"the file is merged with the profile '{named.value}' already"
            raise SpecError(f"{origin}: profile: {text}")
        _check_profile_name(name, origin)
        return name, Node({}, document.origin)
    path = _profile_path(sweep, name, origin)
    _check_profile_name(path.stem, origin)
    return path.stem, _document(read_file(path))


def _check_profile_name(name: str, origin: Origin) -> None:
    """A profile's results lie in a folder of its name."""
    if not re.fullmatch(NAME, name):
        raise SpecError(f"{origin}: profile: '{name}' is not a name for a profile")


def _profile_path(sweep: Path, name: str, origin: Origin) -> Path:
    if name.endswith(".yaml"):
        path = origin.folder / name
    else:
        path = sweep.parent / "profiles" / f"{name}.yaml"
    if not os.path.isfile(path):  # noqa: PTH113 (pathlib raises on names that are too long)
        text = f"there is no profile '{name}'{_available(sweep, name)}"
        raise SpecError(f"{origin}: profile: {text}")
    return path


def _available(sweep: Path, name: str) -> str:
    folder = sweep.parent / "profiles"
    there = [path.stem for path in folder.glob("*.yaml")]
    if not there:
        return f"; there are none in {folder}: name a file, as --profile sweeps/profiles/tiny.yaml"
    return f"{hint(name, there)}; in {folder}: {', '.join(nearest_first(name, there))}"


def _lift_seeds(tree: Node) -> tuple[Node, list[Problem]]:
    """`axes.seed` moved to `seeds`: every trial has a seed, so it is no axis like others."""
    axes = tree.child("axes")
    seeds = axes.child("seed") if axes else None
    if axes is None or seeds is None:
        return tree, []
    if tree.child("seeds") is not None:
        return tree, [Problem(("axes", "seed"), "the seeds are given under seeds, too")]
    return tree.with_entry("axes", axes.without(["seed"])).with_entry("seeds", seeds), []


def _over_profile(sweep: Node, profile: Node) -> Node:
    """The sweep with the profile's settings under its own."""
    empty = Node({}, sweep.origin, implied=True)
    trial, base = sweep.child("trial") or empty, profile.child("trial")
    base = undotted(base) if base and base.mapping else empty
    name = sweep.child("name")
    own = profile.at(("for_sweep", str(name.value))) if name else None
    seeds = own.child("seeds") if own else None
    base = merge(base, undotted(own.without(["seeds"]))) if own and own.mapping else base
    tree = sweep.with_entry("trial", merge(base, undotted(trial)))
    for key in ("seeds", "resources", "artifacts"):
        scale = (seeds if key == "seeds" else None) or profile.child(key)
        if scale is not None:
            own = sweep.child(key)
            tree = tree.with_entry(key, merge(own, scale) if own else scale)
    return tree


def _with_seeds(tree: Node) -> Node:
    """Seeds where there are none: the one of the shared settings, if they name one."""
    seed = tree.at(("trial", "seed"))
    if seed is None or tree.child("seeds") is not None:
        return tree
    return tree.with_entry("seeds", Node((seed,), seed.origin))


def _artifacts(tree: Node) -> str | None:
    """Where the artifacts are; a relative folder starts at the file that names it."""
    node = tree.child("artifacts")
    if node is None or node.value is None:
        return None
    place = str(node.value)
    if "://" in place:
        return place
    return os.path.normpath(node.origin.folder / os.path.expanduser(place))  # noqa: PTH111


# --- --set -----------------------------------------------------------------------------------


def _overrides(texts: Sequence[str]) -> list[tuple[str, Node]]:
    """Keys and values of `key=value`, all that cannot be read told at once."""
    settings, messages = [], list[str]()
    for text in texts:
        origin = Origin(f"--set {text}", None, Path.cwd())
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            messages.append(f"{origin}: must be dotted.key=value")
            continue
        try:
            settings.append((key.strip(), read_value(value, origin)))
        except LocatedError as error:
            messages += error.messages
    if messages:
        raise SpecError(*messages)
    return settings


def _set(tree: Node, key: str, node: Node) -> tuple[Node, list[str]]:
    """The tree with one override in it, or why it cannot be."""
    first, _, rest = key.partition(".")
    if first in ("profile", "merged"):
        return tree, [f"{node.origin}: {key}: cannot be set; give --profile"]
    if first == "axes" and rest:
        return _set_axis(tree, rest, node), []
    if first in SweepFile.model_fields and first != "trial":
        return _relift(merge(tree, nest(key, node))), []
    name = rest if first == "trial" else key
    if name in (axes := _axes(tree)):
        alone = name == "seed" or tree.at(("axes", name)) is not None
        instead = f"set axes.{name}=[…]" if alone else "set linked=[…]"
        text = f"is an axis ({axes[name].origin}); {instead} instead"
        return tree, [f"{node.origin}: {key}: {text}"]
    in_list = any(map(str.isdigit, name.split(".")))
    if in_list and (trouble := unknown_setting(TrialConfig, name)):
        return tree, [f"{node.origin}: {key}: {trouble}"]
    return merge(tree, nest(f"trial.{name}" if name else "trial", node)), []


def _overruled(tree: Node, key: str, node: Node) -> list[str]:
    """What of an override some trials would not have, because a file lays more over what all share.
    Given under `trial.` it is meant for the others; a section that is left out has no settings."""
    base, axes = tree.child("trial"), _axes(tree)
    if base is None or key.partition(".")[0] in SweepFile.model_fields or key in axes:
        return []
    laid = [(label, merge(base, layer)) for label, layer in _laid_over(tree, axes)]
    messages = []
    for parts in _leaves(tuple(key.split(".")), node):
        found = [(label, _named(there)) for label, over in laid if (there := over.at(parts))]
        places = [f"{label} ({n.origin})" for label, n in found if n.origin.line is not None]
        if places:
            dotted = ".".join(parts)
            text = f"is set again by {', '.join(dict.fromkeys(places))}; change it there, or give"
            others = f"trial.{key} to set it for the other trials alone"
            messages.append(f"{node.origin}: {dotted}: {text} {others}")
    return messages


def _laid_over(tree: Node, axes: Mapping[str, Node]) -> Iterator[tuple[str, Node]]:
    """What is laid over the shared settings of some trials, and what it is called."""
    for name, axis in axes.items():
        if variants := axis.child("variants"):
            for variant, settings in variants.mapping.items():
                yield f"the variant {variant} of {name}", undotted(settings)
            continue
        values = axis.child("values") or axis
        for value in values.sequence or (values,):
            yield f"the axis {name}", nest(name, value)
    baselines, rungs = tree.child("baselines"), tree.at(("scheduler", "rungs"))
    for name, settings in baselines.mapping.items() if baselines else ():
        yield f"the baseline {name}", undotted(settings)
    for rung in rungs.sequence if rungs else ():
        named, laid = rung.child("name"), rung.child("set")
        if named and laid:
            yield f"the rung {named.value}", undotted(laid)


def _leaves(parts: tuple[str, ...], node: Node) -> Iterator[tuple[str, ...]]:
    """Where the values below a node are."""
    for key, child in node.mapping.items():
        yield from _leaves((*parts, key), child)
    if not node.mapping:
        yield parts


def _named(node: Node) -> Node:
    """What tells a variant, which may be spelt out: `random` or `{kind: random}`."""
    return node.mapping.get("kind", node)


def _set_axis(tree: Node, name: str, node: Node) -> Node:
    axes = tree.child("axes") or Node({}, node.origin)
    old = axes.child(name)
    if old is not None and old.child("when") is not None and isinstance(node.value, tuple):
        node = old.with_entry("values", node)
    return _relift(tree.with_entry("axes", axes.with_entry(name, node)))


def _relift(tree: Node) -> Node:
    axes = tree.child("axes")
    seeds = axes.child("seed") if axes else None
    return _lift_seeds(tree.without(["seeds"]) if seeds else tree)[0]


def _axes(tree: Node) -> dict[str, Node]:
    """Every name that takes several values, with its place."""
    axes, linked = tree.child("axes"), tree.child("linked")
    names = dict(axes.mapping) if axes else {}
    for group in linked.sequence if linked else ():
        names |= group.mapping
    if (seeds := tree.child("seeds")) is not None:
        names["seed"] = seeds
    return names


# --- checks of the shared settings -----------------------------------------------------------


def _base_problems(tree: Node) -> list[str]:
    """What is wrong with the shared settings, whatever value the axes take."""
    base = tree.child("trial")
    if base is None or not isinstance(base.value, dict):
        return []
    axes = [tuple(name.split(".")) for name in _axes(tree) if name != "seed"]
    config, problems = build_trial(base)
    if config is not None or _has_variants(tree):
        return []  # a variant may mend anything; what it does not is told of the trials
    return [p.message(base) for p in problems if not _mendable(p, axes)]


def _has_variants(tree: Node) -> bool:
    axes = tree.child("axes")
    return axes is not None and any(node.child("variants") for node in axes.mapping.values())


def _mendable(problem: Problem, axes: Sequence[tuple[str, ...]]) -> bool:
    """Whether the value of an axis may mend it: then it is told when the trials are made."""
    at = problem.parts
    return (problem.cross and bool(axes)) or any(
        at[: len(axis)] == axis or (problem.partial and axis[: len(at)] == at) for axis in axes
    )
