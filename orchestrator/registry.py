"""The winner of a sweep in MLflow's model registry: `models:/<sweep>.<profile>@champion`.

A version points to the checkpoint in the results folder and copies nothing. That folder holds one
model at a time, so an earlier version says which one has replaced it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHAMPION = "champion"
TRIAL_TAG = "orchestrate.trial_id"
REPLACED_TAG = "orchestrate.replaced_by"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def model_name(sweep: str, profile: str) -> str:
    """The registered model of a sweep at a profile. A dot occurs in neither name, so that no two
    sweeps share one; `/` and `:` are MLflow's own."""
    return f"{sweep}.{profile}"


def takes_folders(uri: str) -> bool:
    """Whether the registry may point to a folder of this machine. A database may; an MLflow server
    allows only what was uploaded to it, and checkpoints are not."""
    return urlsplit(uri).scheme.partition("+")[0] in DATABASES


def crown(
    client: Any, name: str, best: Mapping[str, Any], checkpoint: Path, run_id: str | None
) -> None:
    """Let the alias `champion` of the registered model point to the winner of `best.json`.

    A new winner gets a new version, and so does a checkpoint that has moved, or a winner whose run
    was replaced. `run_id` is the run of the winner's trial. Doing so twice, or again after a kill
    in between, changes nothing.
    """
    source, tags = checkpoint.resolve().as_uri(), tags_of(best)
    known = client.search_registered_models(filter_string=f"name = '{name}'")
    if not known:
        text = f"Winners of the sweep {best['sweep']} at the profile {best['profile']}."
        client.create_registered_model(name, description=text)
    versions = {
        int(each.version): each
        for each in client.search_model_versions(f"name = '{name}'")
        if TRIAL_TAG in each.tags
    }
    newest = versions.get(max(versions, default=0))
    wanted = (tags[TRIAL_TAG], source, run_id)
    if newest is None or (newest.tags[TRIAL_TAG], newest.source, newest.run_id) != wanted:
        newest = client.create_model_version(name, source, run_id, tags, await_creation_for=None)
    _set_tags(client, newest, tags)
    aliases = known[0].aliases if known else {}
    if str(aliases.get(CHAMPION)) != str(newest.version):
        client.set_registered_model_alias(name, CHAMPION, str(newest.version))
    for number, each in versions.items():
        if number != int(newest.version) and each.source == source:
            _set_tags(client, each, {REPLACED_TAG: str(newest.version)})


def uncrown(client: Any, name: str, checkpoint: Path) -> None:
    """Take the alias `champion` from a version that points to this checkpoint, which is gone or has
    not won. One that points elsewhere is another results folder's, and stays."""
    known = client.search_registered_models(filter_string=f"name = '{name}'")
    number = known[0].aliases.get(CHAMPION) if known else None
    if number is None:
        return
    if client.get_model_version(name, str(number)).source == checkpoint.resolve().as_uri():
        client.delete_registered_model_alias(name, CHAMPION)


def tags_of(best: Mapping[str, Any]) -> dict[str, str]:
    """Which trial won, and the values with their 95% intervals: of what it was chosen by, and on
    the questions that took no part in choosing it. What was not measured has no tag."""
    tags = {TRIAL_TAG: best["trial_id"], "seed": str(best["seed"])}
    for half in ("select", "report"):
        found = best[half]
        if found["value"] is not None:
            tags |= {f"{half}.metric": found["metric"], f"{half}.value": repr(found["value"])}
        if found["low"] is not None:
            tags[f"{half}.interval"] = json.dumps([found["low"], found["high"]])
    return tags


def _set_tags(client: Any, version: Any, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, str(version.version), key, value)
