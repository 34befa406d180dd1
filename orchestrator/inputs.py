"""Which data sets a trial used, and for what, from its recorded settings alone: no data is read.

A digest is that of the content where the settings tell it (local files), the revision of a data set
on the hub, and else a hash of the settings that the data follow from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DIGEST_LENGTH = 12
LONGEST_DIGEST = 36
"""How long MLflow allows a digest to be."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """A data set in one of its roles: training, pretraining, calibration, heldout, evaluation.
    `source_type` and `source` are those of MLflow's own kinds of sources."""

    role: str
    name: str
    digest: str
    source_type: str
    source: Settings
    settings: Settings
    """As the trial names them: block length, number of blocks, shots, …"""


def inputs_of(config: Settings) -> list[Input]:
    """The data sets of a trial with these recorded settings. A data set that has two roles stands
    under the first, as MLflow keeps one role for each."""
    found: dict[tuple[str, str], Input] = {}
    for each in _inputs(config):
        found.setdefault((each.name, each.digest), each)
    return list(found.values())


def _inputs(config: Settings) -> Iterator[Input]:
    source, corpus = config.get("source") or {}, config.get("corpus")
    importance = config.get("importance") or {}
    pretrained = source.get("kind") == "scratch"
    if corpus is not None:
        own = pretrained and source.get("corpus") is None
        if own or config.get("distill") or config.get("correct"):
            yield _text("training", corpus, "train")
        yield _text("heldout", corpus, "heldout")
    if pretrained and source.get("corpus") is not None:
        yield _text("pretraining", source["corpus"], "train")
    if importance.get("corpus") is not None:
        yield _text("calibration", importance["corpus"], "train")
    for task in (config.get("evaluate") or {}).get("tasks", ()):
        yield _questions(task)


def _text(role: str, corpus: Settings, split: str) -> Input:
    """The half of a corpus that is trained on, or the one held out."""
    if corpus["kind"] == "text":
        return _file(role, corpus[split], None, corpus)
    if corpus["kind"] == "hub":
        name, part = corpus["dataset"], corpus[f"{split}_split"]
        source = {
            "path": name,
            "config_name": corpus.get("name"),
            "split": part,
            "revision": corpus["revision"],
        }
        whole = "/".join(filter(None, (name, corpus.get("name"), part)))
        return Input(
            role, whole, corpus["revision"][:LONGEST_DIGEST], "hugging_face", source, corpus
        )
    name = f"{corpus['kind']}-{corpus.get('language_seed', 0)}/{split}"
    return Input(role, name, _hash(corpus), "code", _code("trainers.corpus"), corpus)


def _questions(task: Settings) -> Input:
    if "path" in task:
        return _file("evaluation", task["path"], task["name"], task)
    made_by = "trainers.language" if task["kind"] == "generated" else "lm_eval"
    return Input("evaluation", task["name"], _hash(task), "code", _code(made_by), task)


def _file(role: str, recorded: str, name: str | None, settings: Settings) -> Input:
    """A local file, which is recorded as its name and the hash of its content."""
    file, _, digest = recorded.partition("@sha256:")
    source = {"uri": file}
    return Input(role, name or file, digest or _hash(settings), "local", source, settings)


def _code(module: str) -> Settings:
    return {"tags": {"mlflow.source.type": "LOCAL", "mlflow.source.name": module}}


def _hash(settings: Settings) -> str:
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]
