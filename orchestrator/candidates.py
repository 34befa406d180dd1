"""Which shapes of a search space are worth a trial: constraints, judged from configs alone.

The papers search every shape within 5% of a parameter budget (P1 section 3, "lightweight neural
architecture search"). Imports no torch.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from trainers.config import Frozen
from trainers.shapes import Shape


class Budget(Frozen):
    """A number of parameters, or up to 1.0 a fraction of the source's, and how far off is allowed,
    as a fraction of it."""

    target: float = Field(gt=0)
    within: float = Field(default=0.05, ge=0, lt=1)

    def of(self, source: int) -> float:
        """The target in parameters, for a source with so many."""
        return self.target * source if self.target <= 1 else self.target


class Memory(Frozen):
    """Most bytes that the weights and the key-value cache may take when the model is served."""

    at_most: float = Field(gt=0)
    context: int = Field(default=4096, gt=0)
    batch_size: int = Field(default=1, gt=0)
    bytes_per_value: int = Field(default=2, gt=0)


class Constraints(Frozen):
    """What every trial of the grid must meet; `nearest` keeps so many shapes, those whose number
    of parameters is closest to its target."""

    parameters: Budget | None = None
    parameters_non_embedding: Budget | None = None
    memory: Memory | None = None
    nearest: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _nearest_to_something(self) -> Constraints:
        if self.nearest and not (self.parameters or self.parameters_non_embedding):
            raise ValueError("nearest needs a target under parameters or parameters_non_embedding")
        return self

    def __bool__(self) -> bool:
        return any((self.parameters, self.parameters_non_embedding, self.memory))

    def budgets(self) -> tuple[tuple[str, Budget], ...]:
        """The budgets that are set, with the name of the count that each is about."""
        both = (
            ("parameters", self.parameters),
            ("parameters_non_embedding", self.parameters_non_embedding),
        )
        return tuple((name, budget) for name, budget in both if budget is not None)

    def distance(self, shape: Shape, source: Shape) -> float:
        """How far the shape is from the targets, as a fraction of them; 0 without a target."""
        return max((abs(off) for _, _, off in self._offsets(shape, source)), default=0.0)

    def excess(self, shape: Shape, source: Shape) -> float:
        """How far the shape is from meeting all constraints, as a fraction of each limit; 0 where
        it meets them."""
        found = [
            abs(off) - budget.within
            for (_, budget), (_, _, off) in zip(
                self.budgets(), self._offsets(shape, source), strict=True
            )
        ]
        if self.memory is not None:
            found.append(served_bytes(shape, self.memory) / self.memory.at_most - 1)
        return max(0.0, *found) if found else 0.0

    def unmet(self, shape: Shape, source: Shape) -> str | None:
        """Which constraint the shape fails, and by how much; None where it meets all."""
        for (name, budget), (_, count, off) in zip(
            self.budgets(), self._offsets(shape, source), strict=True
        ):
            if abs(off) > budget.within:
                side = "above" if off > 0 else "below"
                return (
                    f"{_spaced(name)} {count:,}, {abs(off):.1%} {side} the target of "
                    f"{budget.of(getattr(source, name)):,.0f}"
                )
        if self.memory is not None:
            needed = served_bytes(shape, self.memory)
            if needed > self.memory.at_most:
                return f"needs {needed:,} bytes of memory, at most {self.memory.at_most:,.0f}"
        return None

    def _offsets(self, shape: Shape, source: Shape) -> list[tuple[str, int, float]]:
        found = []
        for name, budget in self.budgets():
            count, target = getattr(shape, name), budget.of(getattr(source, name))
            found.append((name, count, count / target - 1))
        return found


def served_bytes(shape: Shape, memory: Memory) -> int:
    """Bytes of the weights and of the keys and values of `batch_size` sequences of `context`."""
    values = 2 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers
    cache = values * memory.context * memory.batch_size
    return (shape.parameters + cache) * memory.bytes_per_value


def _spaced(name: str) -> str:
    return "non-embedding parameters" if name.endswith("non_embedding") else "parameters"
