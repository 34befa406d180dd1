"""Which sweeps are recorded below a results folder, and what each of them asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import scheduling
from orchestrator.asked import Claim, Select
from orchestrator.located import LocatedError, read_file
from orchestrator.scheduling import Scheduler
from orchestrator.wording import validate
from trainers.config import Frozen


def results_folders(results: Path) -> dict[tuple[str, str], Path]:
    """The results folder of every (sweep, profile), by name; one's own stand before published
    ones."""
    published = results.glob("published/*/*/trials.parquet")
    own = results.glob("*/*/trials.parquet")
    found = {(file.parts[-3], file.parts[-2]): file.parent for file in [*published, *own]}
    return dict(sorted(found.items()))


class Asked(Frozen):
    """What is read of a sweep file: what else it says may be of an older or newer form."""

    name: str = ""
    select: Select = Select()
    scheduler: Scheduler = Scheduler()
    claims: tuple[Claim, ...] = ()

    @property
    def finalists(self) -> dict[str, Any] | None:
        """See `scheduling.finalists`."""
        return scheduling.finalists(self.select, self.scheduler)


def read_asked(path: Path, keys: Sequence[str] = tuple(Asked.model_fields)) -> Asked:
    """What a sweep file says under these keys; the defaults where there is no file. Raises
    `LocatedError`."""
    if not path.is_file():
        return Asked()
    tree = read_file(path)
    given = ((key, tree.child(key)) for key in keys)
    part = {key: node for key, node in given if node is not None and node.value is not None}
    tree = replace(tree, value=part)
    valid, problems = validate(Asked, tree)
    if valid is None:
        raise LocatedError([problem.message(tree) for problem in problems])
    return valid
