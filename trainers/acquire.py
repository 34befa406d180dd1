"""Stage `acquire`: an existing model comes into the store as a plain Hugging Face checkpoint."""

from __future__ import annotations

from trainers import checkpoints, shell
from trainers.config import AcquireConfig
from trainers.contract import StageContext, StageError, StageResult


def run(context: StageContext[AcquireConfig]) -> StageResult:
    """Download, link or convert, as the source asks."""
    source = context.config.source
    try:
        checkpoints.acquire(source, context.out / "model")
    except (OSError, ValueError) as error:
        name = getattr(source, "repository", None) or getattr(source, "path", None)
        raise StageError(f"cannot get the model {name or source.kind}: {error}") from error
    return StageResult()


if __name__ == "__main__":
    shell.main(AcquireConfig, run)
