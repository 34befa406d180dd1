"""Stage `acquire`: an existing model comes into the store as a plain Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from trainers import checkpoints, shell
from trainers.checkpoints import read_config
from trainers.config import AcquireConfig, FolderModel, GgufModel, HubModel
from trainers.contract import StageContext, StageError, StageResult
from trainers.shapes import shape_of


def run(context: StageContext[AcquireConfig]) -> StageResult:
    """Download, link or convert, as the source asks."""
    source = context.config.source
    try:
        checkpoints.acquire(source, context.out / "model")
    except (OSError, ValueError) as error:
        name = getattr(source, "repository", None) or getattr(source, "path", None)
        raise StageError(f"cannot get the model {name or source.kind}: {error}") from error
    _check(source, context.out / "model")
    return StageResult()


def _check(source: HubModel | FolderModel | GgufModel, folder: Path) -> None:
    """The shape that the plan was made with is the one that came."""
    stated = None if isinstance(source, FolderModel) else source.shape
    found = shape_of(read_config(folder))
    if stated and shape_of(stated).parameters != found.parameters:
        raise StageError(
            f"source.shape describes {shape_of(stated).parameters:,} parameters, the model has "
            f"{found.parameters:,}"
        )


if __name__ == "__main__":
    shell.main(AcquireConfig, run)
