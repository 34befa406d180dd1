"""What a sweep's stages leave on a disk, in bytes. Pure.

Caches are counted where they are planned (`StageNode.disk_bytes`); here are the models, and the
checkpoints that training keeps until it is done.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator import demand
from orchestrator.estimate import BYTES, Run
from orchestrator.plan import TrialPlan
from orchestrator.spec import Resources
from orchestrator.steps import StageNode
from trainers.shapes import Shape

LEAVE_A_MODEL = ("acquire", "pretrain", "correct", "prune", "distill")


def model_bytes(planned: TrialPlan) -> dict[str, int]:
    """Of the checkpoint that each stage of a trial leaves, by stage id. A model of the hub or of a
    folder is not copied."""
    shapes = demand.model_shapes(planned.trial.config, planned.steps)
    number: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in planned.steps.values():
        if node.kind in LEAVE_A_MODEL:
            id_, shape = node.stage_id, shapes[node.stage_id]
            number[id_] = _number_bytes(node, shape, number)
            found[id_] = 0 if _is_linked(node) else shape.parameters * number[id_]
    return found


def _number_bytes(node: StageNode, shape: Shape, of_inputs: Mapping[str, int]) -> int:
    """Of one parameter in the checkpoint that a stage leaves."""
    match node.kind:
        case "pretrain":
            return BYTES["fp32"]
        case "acquire":
            told = shape.config.get("dtype", shape.config.get("torch_dtype"))
            # Where a shape does not say, as nearly all published checkpoints are.
            return BYTES["fp32" if _is_linked(node) and told == "float32" else "bf16"]
        case "prune":
            return of_inputs[node.inputs["model"]]
        case _:
            return BYTES[node.config["training"]["precision"]]


def _is_linked(node: StageNode) -> bool:
    return node.kind == "acquire" and node.config["source"]["kind"] != "gguf"


def checkpoint_bytes(planned: TrialPlan, resources: Resources) -> dict[str, int]:
    """The most that the training checkpoints of each stage of a trial take, by stage id: the one
    before is removed only after the next one is whole."""
    found = demand.demands(planned.trial.config, planned.steps, resources)
    return {
        planned.steps[step].stage_id: 2 * _training_checkpoint(each.run)
        for step, each in found.items()
        if each.run is not None
    }


def _training_checkpoint(run: Run) -> int:
    """AdamW's two moments, from ZeRO 1 on fp32 master weights, and up to ZeRO 2 the weights that
    are trained."""
    weights = BYTES[run.training.precision] if run.zero_stage < 3 else 0
    return run.parameters * (weights + (12 if run.zero_stage else 8))
