"""Which of a student's hidden states is compared with which of its teacher's. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from trainers.config import HiddenLoss

StateName = str
"""A hidden state of a model: "embedding", "input.3", "output.7" or "attention.7", its layers
counted from 0."""

LayerMapping = Literal["proportional"] | Mapping[str, int | str]


def layer_number(place: int | str, layers: int) -> int:
    """The layer, from 0, that a place means in a model of so many layers: a number counts from the
    front, `last` is the last layer and `last-2` two before it.

    Raises `ValueError`, saying what is allowed, for a place that is none or is outside the model.
    """
    match = re.fullmatch(r"(\d+)|last(?:-(\d+))?", str(place))
    front, back = match.groups() if match else ("-1", None)
    number = layers - 1 - int(back or 0) if front is None else int(front)
    if not 0 <= number < layers:
        raise ValueError(
            f"layer {place} is not in a model of {layers} layers; "
            f"allowed are 0 to {layers - 1}, or last to last-{layers - 1}"
        )
    return number


def mapped_layers(
    mapping: LayerMapping, student_layers: int, teacher_layers: int
) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), counted from 0 and each pair once.

    `proportional` pairs the first layers, the last ones, and those between in even steps; a student
    of one layer is paired with the teacher's last. Raises `ValueError` as `layer_number` does.
    """
    if mapping == "proportional":
        return [
            (layer, _same_depth(layer, student_layers, teacher_layers))
            for layer in range(student_layers)
        ]
    pairs = (
        (_placed("student", student, student_layers), _placed("teacher", teacher, teacher_layers))
        for student, teacher in mapping.items()
    )
    return list(dict.fromkeys(pairs))


def _placed(whose: str, place: int | str, layers: int) -> int:
    try:
        return layer_number(place, layers)
    except ValueError as error:
        raise ValueError(f"the {whose}'s {error}") from None


def _same_depth(layer: int, student_layers: int, teacher_layers: int) -> int:
    if student_layers == 1:
        return teacher_layers - 1
    steps = student_layers - 1
    return (2 * layer * (teacher_layers - 1) + steps) // (2 * steps)  # rounded, halves up


def state_pairs(
    hidden: HiddenLoss, student_layers: int, teacher_layers: int
) -> tuple[tuple[StateName, StateName], ...]:
    """Pairs (student's state, teacher's state) that the loss compares, in the settings' order.

    Raises `ValueError` as `layer_number` does.
    """
    layers = mapped_layers(hidden.mapping, student_layers, teacher_layers)
    found: list[tuple[StateName, StateName]] = []
    for state in dict.fromkeys(hidden.states):
        if state == "embedding":
            found.append((state, state))
        else:
            found += [(f"{state}.{student}", f"{state}.{teacher}") for student, teacher in layers]
    return tuple(found)


def teacher_states(
    hidden: HiddenLoss, student_layers: int, teacher_layers: int
) -> tuple[StateName, ...]:
    """The teacher's states that the loss needs, each once. Raises `ValueError` as above."""
    pairs = state_pairs(hidden, student_layers, teacher_layers)
    return tuple(dict.fromkeys(teacher for _, teacher in pairs))
