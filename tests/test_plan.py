"""The plan: which stages a trial has, which are shared, and what changes their identity."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import small_sweep
from click.testing import CliRunner
from rich.console import Console

from orchestrator.cli import app
from orchestrator.plan import SweepPlan, describe, plan_sweep
from orchestrator.progress import plan_table, short_count
from orchestrator.space import enumerate_trials
from orchestrator.spec import SpecError, load
from orchestrator.steps import StageNode

ROOT = Path(__file__).parent.parent


def plan(folder: Path, sweep: dict[str, Any] | None = None, *overrides: str) -> SweepPlan:
    loaded = load(small_sweep.write(folder, sweep), overrides=overrides)
    return plan_sweep(loaded, enumerate_trials(loaded))


def single(folder: Path, *overrides: str) -> dict[str, str]:
    """Stage ids by step of the one trial besides the teacher."""
    sweep = {**small_sweep.SWEEP, "axes": {}, "baselines": {}}
    student = plan(folder, sweep, *overrides).trials[1]
    return {step: node.stage_id for step, node in student.steps.items()}


def test_a_student_is_pruned_measured_distilled_and_measured_again(tmp_path: Path) -> None:
    assert list(single(tmp_path)) == [
        "source",
        "importance",
        "prune",
        "before",
        "cache",
        "distill",
        "after",
    ]


def test_the_teacher_is_only_measured(tmp_path: Path) -> None:
    assert list(plan(tmp_path).trials[0].steps) == ["source", "after"]


def test_roles_are_filled_by_the_right_stages(tmp_path: Path) -> None:
    steps = plan(tmp_path).trials[1].steps
    ids = {step: node.stage_id for step, node in steps.items()}
    assert steps["prune"].inputs == {"model": ids["source"], "importance": ids["importance"]}
    assert steps["cache"].inputs == {"model": ids["source"]}
    assert steps["distill"].inputs == {"model": ids["prune"], "signals": ids["cache"]}
    assert steps["after"].inputs == {"model": ids["distill"], "teacher": ids["source"]}


# Setting -> the steps whose identity it changes.
EVERYTHING = {"source", "importance", "prune", "before", "cache", "distill", "after"}
CHANGES = {
    "source.seed=7": EVERYTHING,
    "source.shape.hidden_size=64": EVERYTHING,
    "corpus.language_seed=3": EVERYTHING,
    "importance.samples=4": {"importance", "prune", "before", "distill", "after"},
    "prune.depth.keep=1": {"importance", "prune", "before", "distill", "after"},
    "prune.depth.contiguous=true": {"prune", "before", "distill", "after"},
    "prune.depth.criterion=random": {"importance", "prune", "before", "distill", "after"},
    "prune.initialise=random": {"importance", "prune", "before", "distill", "after"},
    "distill.training.steps=31": {"cache", "distill", "after"},
    "distill.training.learning_rate=0.001": {"distill", "after"},
    "distill.training.micro_batch_size=2": {"distill", "after"},
    "distill.training.precision=bf16": {"cache", "distill", "after"},
    "distill.loss.temperature=2.0": {"distill", "after"},
    "seeds=[1]": {"cache", "distill", "after"},
    "evaluate.tasks=[{kind: generated, name: agreement, limit: 9}]": {"after"},
    "evaluate.tasks_before=true": {"before"},
    "resources.cpus_per_trial=2": set(),
    "resources.workers=2": set(),
    "resources.gpus_per_worker=1": set(),
    "resources.gpu_memory_gb=24": set(),
    "resources.peak_tflops=312": set(),
    "resources.utilisation=0.5": set(),
    "resources.checkpoint_every_s=9": set(),
    "select.metric=lm_loss.after": set(),
}  # fmt: skip


@pytest.mark.parametrize("override", CHANGES)
def test_a_setting_changes_the_identity_of_what_it_determines_and_of_nothing_else(
    tmp_path: Path, override: str
) -> None:
    before, after = single(tmp_path), single(tmp_path, override)
    assert {step for step in before if before[step] != after.get(step)} == CHANGES[override]


def test_a_random_choice_of_layers_takes_its_identity_from_the_seed(tmp_path: Path) -> None:
    random = "prune.depth.criterion=random"
    assert single(tmp_path, random)["prune"] != single(tmp_path, random, "seeds=[1]")["prune"]


@pytest.mark.parametrize(("samples", "same"), [(4, False), (8, True)])
@pytest.mark.parametrize("criterion", ["perplexity", "block_influence", "task"])
def test_importance_takes_the_seed_into_its_identity_where_it_draws_calibration_blocks(
    tmp_path: Path, criterion: str, samples: int, same: bool
) -> None:
    one_teacher = ("source.seed=0", f"importance.samples={samples}")
    settings = (*one_teacher, f"prune.depth.criterion={criterion}")
    one, other = (single(tmp_path, *settings, f"seeds=[{seed}]") for seed in (0, 1))
    assert (one["importance"] == other["importance"]) is (same or criterion == "task")
    assert one["source"] == other["source"]


def test_trials_that_differ_downstream_share_all_upstream_stages(tmp_path: Path) -> None:
    sweep = {**small_sweep.SWEEP, "axes": {"distill.loss.temperature": [1.0, 2.0]}, "baselines": {}}
    planned = plan(tmp_path, sweep)
    one, other = (trial.steps for trial in planned.trials[1:])
    for step in ("source", "importance", "prune", "before"):
        assert one[step].stage_id == other[step].stage_id
    assert planned.asked_by[one["source"].stage_id] == 3  # the teacher trial asks too
    assert one["distill"].stage_id != other["distill"].stage_id


def test_parameters_come_from_the_config_alone(tmp_path: Path) -> None:
    from trainers.config import LlamaShape
    from trainers.shapes import llama_config, shape_of

    planned = plan(tmp_path)
    shape = LlamaShape(**small_sweep.PROFILE["trial"]["source"]["shape"])
    from trainers import language

    teacher = shape_of(llama_config(shape, len(language.WORDS)))
    assert planned.trials[0].shape.parameters == teacher.parameters
    assert planned.trials[1].shape.parameters == teacher.parameters - 2 * teacher.layer_parameters


IMPOSSIBLE = {
    "more layers kept than there are": ("keep: 9", "cannot keep 9 layers, the source has 4"),
    "a layer outside the model": (
        "criterion: {kind: layers, drop: [1, 4]}",
        "the source has no layer 4; allowed: 0 to 3",
    ),
    "all layers dropped": (
        "criterion: {kind: layers, drop: [0, 1, 2, 3]}",
        "drops all 4 layers; keep at least one",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_shape_is_refused_with_file_and_line(tmp_path: Path, case: str) -> None:
    setting, message = IMPOSSIBLE[case]
    path = small_sweep.write(tmp_path)
    criterion = "" if "criterion" in setting else "\n      criterion: perplexity"
    path.write_text(
        "name: small\nquestion: q\nprofile: micro\ntrial:\n  prune:\n    depth:\n"
        f"      {setting}{criterion}\n"
    )
    loaded = load(path)
    with pytest.raises(SpecError) as raised:
        plan_sweep(loaded, enumerate_trials(loaded))
    assert len(raised.value.messages) == 1
    assert message in raised.value.messages[0]
    assert "small.yaml:7" in raised.value.messages[0]


def test_a_plan_does_not_change_what_it_is_made_from(tmp_path: Path) -> None:
    before = copy.deepcopy(small_sweep.SWEEP)
    plan(tmp_path)
    assert before == small_sweep.SWEEP


# --- width, rounds and chains ----------------------------------------------------------------


def planned_steps(folder: Path, **trial: Any) -> dict[str, StageNode]:
    """The steps of the one trial besides the teacher."""
    sweep = {**small_sweep.SWEEP, "trial": trial, "axes": {}, "baselines": {}}
    return dict(plan(folder, sweep).trials[1].steps)


NARROW = {"width": {"intermediate_size": 0.5, "hidden_size": 0.5}}


def test_layers_and_units_scored_by_one_pass_are_one_stage_in_both_roles(tmp_path: Path) -> None:
    prune = {"depth": {"keep": 0.5, "criterion": "block_influence"}, **NARROW}
    steps = planned_steps(tmp_path, prune=prune)
    assert list(steps) == [
        "source",
        "importance",
        "prune",
        "before",
        "cache",
        "distill",
        "after",
    ]
    inputs = steps["prune"].inputs
    assert inputs["importance"] == inputs["activations"] == steps["importance"].stage_id


def test_one_pass_serves_every_target_size_and_every_aggregation(tmp_path: Path) -> None:
    axes = {
        "prune.width.intermediate_size": [0.25, 0.5],
        "prune.width.criterion.batch": ["l2", "mean"],
        "prune.width.criterion.sequence": ["mean", "variance"],
    }
    width = {"intermediate_size": 0.5, "criterion": {"kind": "activations"}}
    trial = {"prune": {"width": width}}
    planned = plan(tmp_path, {**small_sweep.SWEEP, "trial": trial, "axes": axes, "baselines": {}})
    passes = {each.steps["activations"].stage_id for each in planned.trials[1:]}
    assert len(planned.trials) == 1 + 8 and len(passes) == 1


def test_each_round_scores_what_the_round_before_left(tmp_path: Path) -> None:
    steps = planned_steps(tmp_path, prune={**NARROW, "iterations": 2})
    assert list(steps)[:5] == [
        "source",
        "round1.activations",
        "round1.prune",
        "activations",
        "prune",
    ]
    assert steps["activations"].inputs["model"] == steps["round1.prune"].stage_id
    assert steps["prune"].inputs["model"] == steps["round1.prune"].stage_id
    assert steps["round1.prune"].config["width"]["intermediate_size"] == 48
    assert steps["prune"].config["width"]["intermediate_size"] == 32


def test_the_first_round_of_several_shares_its_scores_with_a_single_shot(tmp_path: Path) -> None:
    once = planned_steps(tmp_path, prune=NARROW)
    twice = planned_steps(tmp_path, prune={**NARROW, "iterations": 2})
    assert once["activations"].stage_id == twice["round1.activations"].stage_id


@pytest.mark.parametrize(
    ("teacher", "taught_by"), [("original", "source"), ("previous", "chain1.distill")]
)
def test_the_last_step_of_a_chain_prunes_the_model_before_it_and_learns_as_set(
    tmp_path: Path, teacher: str, taught_by: str
) -> None:
    distill = {**small_sweep.PROFILE["trial"]["distill"], "teacher": teacher}
    link = {"prune": {"width": {"intermediate_size": 0.75}}, "training_steps": 12}
    steps = planned_steps(tmp_path, chain=[link], prune=NARROW, distill=distill)
    assert steps["chain1.distill"].config["training"]["steps"] == 12
    assert steps["chain1.cache"].inputs["model"] == steps["source"].stage_id
    assert steps["activations"].inputs["model"] == steps["chain1.distill"].stage_id
    assert steps["cache"].inputs["model"] == steps[taught_by].stage_id
    assert steps["after"].inputs["teacher"] == steps["source"].stage_id


def test_the_tokens_of_a_chain_count_all_its_distillations(tmp_path: Path) -> None:
    link = {"prune": {"width": {"intermediate_size": 0.75}}}
    trial = {"chain": [link], "prune": NARROW}
    sweep = {**small_sweep.SWEEP, "trial": trial, "axes": {}, "baselines": {}}
    (student,) = plan(tmp_path, sweep).trials[1:]
    assert student.tokens_trained == 2 * 30 * 4 * 32
    assert [shape.intermediate_size for shape in student.chain] == [48]


def test_random_weights_need_no_scores(tmp_path: Path) -> None:
    prune = {"depth": {"keep": 0.5, "criterion": "perplexity"}, "initialise": "random"}
    assert list(planned_steps(tmp_path, prune=prune))[:2] == ["source", "prune"]


TOO_MUCH = {
    "wider than the source": ({"width": {"hidden_size": 64}}, "hidden_size", "64 is not between"),
    "more heads than there are": (
        {"width": {"num_attention_heads": 3}},
        "num_attention_heads",
        "3 is not between",
    ),
    "a chain that grows again": ({"depth": {"keep": 4, "criterion": "random"}}, "keep", "cannot"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_sizes_that_cannot_be_had_are_refused_with_their_line(tmp_path: Path, case: str) -> None:
    prune, setting, words = TOO_MUCH[case]
    link = {"prune": {"depth": {"keep": 2, "criterion": "random"}}}
    trial = {"prune": prune} | ({"chain": [link]} if "chain" in case else {})
    with pytest.raises(SpecError) as raised:
        plan(tmp_path, {**small_sweep.SWEEP, "trial": trial, "axes": {}, "baselines": {}})
    (message,) = raised.value.messages
    line = int(message.split(":")[1])
    assert setting in (tmp_path / "small.yaml").read_text().splitlines()[line - 1]
    assert words in message


def test_each_seed_pretrains_a_teacher_of_its_own_unless_the_source_names_one(
    tmp_path: Path,
) -> None:
    sweep = {**small_sweep.SWEEP, "axes": {"seed": [0, 1]}, "baselines": {}}
    teachers = [t for t in plan(tmp_path, sweep).trials if t.trial.baseline]
    own = [
        t for t in plan(tmp_path, sweep, "source.seed=null").trials if t.trial.baseline == "teacher"
    ]
    assert len(teachers) == 1 and len(own) == 2
    assert own[0].steps["source"].stage_id != own[1].steps["source"].stage_id


# --- teacher signals -------------------------------------------------------------------------


def test_students_of_one_teacher_share_one_cache_whatever_their_shape_and_loss(
    tmp_path: Path,
) -> None:
    axes = {"prune.depth.keep": [1, 2], "distill.loss.logits": ["forward_kl", "mse"]}
    planned = plan(tmp_path, {**small_sweep.SWEEP, "axes": axes, "baselines": {}})
    assert len({each.steps["cache"].stage_id for each in planned.trials[1:]}) == 1


def test_a_cache_that_does_not_fit_the_disk_makes_the_teacher_live(tmp_path: Path) -> None:
    sweep = {**small_sweep.SWEEP, "axes": {}, "baselines": {}}
    (student,) = plan(tmp_path, sweep, "resources.largest_cache_gb=0.0001").trials[1:]
    assert "cache" not in student.steps
    assert student.steps["distill"].inputs["teacher"] == student.steps["source"].stage_id


def test_conventional_training_needs_neither_teacher_nor_cache(tmp_path: Path) -> None:
    sweep = {**small_sweep.SWEEP, "axes": {}, "baselines": {}}
    loss = "distill.loss={logits: none, cross_entropy_weight: 1.0}"
    (student,) = plan(tmp_path, sweep, loss).trials[1:]
    assert list(student.steps["distill"].inputs) == ["model"]


def test_hidden_states_that_a_loss_needs_are_in_the_cache(tmp_path: Path) -> None:
    sweep = {**small_sweep.SWEEP, "axes": {}, "baselines": {}}
    hidden = "distill.loss.hidden={states: [output, embedding], mapping: {last: last}}"
    (student,) = plan(tmp_path, sweep, hidden).trials[1:]
    assert set(student.steps["cache"].config["states"]) == {"output.3", "embedding"}


@pytest.mark.parametrize("prune_from", ["corrected", "original"])
def test_a_corrected_teacher_teaches_and_the_student_comes_from_where_it_is_set(
    tmp_path: Path, prune_from: str
) -> None:
    training = {"steps": 9, "batch_size": 4, "learning_rate": 0.001}
    correct = {"training": training, "prune_from": prune_from}
    steps = planned_steps(tmp_path, correct=correct, prune=NARROW)
    pruned = steps["correct" if prune_from == "corrected" else "source"]
    assert steps["correct"].inputs["model"] == steps["source"].stage_id
    assert steps["cache"].inputs["model"] == steps["correct"].stage_id
    assert steps["prune"].inputs["model"] == pruned.stage_id
    assert steps["after"].inputs["teacher"] == steps["correct"].stage_id


@pytest.mark.parametrize(
    ("loss", "words"),
    [("logits: mse", "forward_kl"), ("temperature: 2.0", "temperature 1"), ("top_k: 3", "logits")],
)
def test_a_cache_of_few_tokens_is_refused_where_the_loss_needs_all(
    tmp_path: Path, loss: str, words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        single(tmp_path, "distill.signal=sampled_cache", f"distill.loss={{{loss}}}")


def test_a_layer_that_the_hidden_loss_maps_and_there_is_not_is_refused(tmp_path: Path) -> None:
    hidden = "distill.loss.hidden={states: [output], mapping: {last-2: last-2}}"
    with pytest.raises(SpecError, match="student's layer last-2 is not in a model of 2 layers"):
        single(tmp_path, hidden)


def checkpoint(folder: Path, vocabulary: dict[str, int]) -> Path:
    """A checkpoint as far as a plan reads one."""
    folder.mkdir()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    config = {"model_type": "llama", "num_attention_heads": 2, "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config | shape))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


@pytest.mark.parametrize(
    ("theirs", "words"),
    [({"a": 0, "b": 1, "c": 2}, "vocabularies differ: 3 tokens"), ({"b": 0, "a": 1}, "tokenizers")],
)
def test_a_teacher_of_other_tokens_is_refused_and_both_are_named(
    tmp_path: Path, theirs: dict[str, int], words: str
) -> None:
    source = checkpoint(tmp_path / "source", {"a": 0, "b": 1})
    other = checkpoint(tmp_path / "other", theirs)
    distill = {
        **small_sweep.PROFILE["trial"]["distill"],
        "teacher_model": {"kind": "folder", "path": str(other)},
    }
    model = {"kind": "folder", "path": str(source)}
    trial = {"source": model, "prune": NARROW, "distill": distill}
    with pytest.raises(SpecError, match=words) as raised:
        plan(tmp_path, {**small_sweep.SWEEP, "trial": trial, "axes": {}, "baselines": {}})
    assert str(source) in str(raised.value) and str(other) in str(raised.value)


def test_another_model_of_the_same_tokens_may_teach(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", {"a": 0, "b": 1})
    other = checkpoint(tmp_path / "other", {"a": 0, "b": 1})
    distill = {
        **small_sweep.PROFILE["trial"]["distill"],
        "teacher_model": {"kind": "folder", "path": str(other)},
    }
    model = {"kind": "folder", "path": str(source)}
    steps = planned_steps(tmp_path, source=model, prune=NARROW, distill=distill)
    assert steps["cache"].inputs["model"] == steps["teacher"].stage_id


# --- what it takes of GPUs -------------------------------------------------------------------

ON_GPUS = ("resources.gpus_per_worker=1", "resources.workers=2")


def described(folder: Path, *overrides: str, sweep: dict[str, Any] | None = None) -> dict[str, Any]:
    """The plan as `orchestrate plan --json` tells it."""
    loaded = load(small_sweep.write(folder, sweep), overrides=overrides)
    planned = plan_sweep(loaded, enumerate_trials(loaded))
    return describe(planned, loaded.resources, set(), set(), str)


def of_cluster(sweep: str, profile: str, *overrides: str) -> dict[str, Any]:
    """The plan of a shipped sweep at a profile for clusters."""
    path = ROOT / "sweeps" / f"{sweep}.yaml"
    loaded = load(path, profile, overrides)
    planned = plan_sweep(loaded, enumerate_trials(loaded))
    return describe(planned, loaded.resources, set(), set(), str)


def told(plan: dict[str, Any], width: int) -> str:
    """The plan's tables on a terminal of so many columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, soft_wrap=True)
    for table in plan_table(plan, width):
        console.print(table)
    return stream.getvalue()


def test_without_gpus_there_are_no_gpu_hours_no_warnings_and_no_columns_for_them(
    tmp_path: Path,
) -> None:
    plan = described(tmp_path, "resources.gpu_memory_gb=0.0001")
    assert plan["total"]["gpu_hours"] is None and not plan["warnings"]
    assert all(trial["gpu_hours"] is None for trial in plan["trials"])
    assert "GPU" not in told(plan, 120)


def test_a_trial_takes_the_hours_of_all_its_stages_and_a_sweep_takes_shared_ones_once(
    tmp_path: Path,
) -> None:
    # A GPU so slow that hours are not rounded away.
    plan = described(tmp_path, *ON_GPUS, "resources.peak_tflops=1.0e-9")
    stages = {stage["stage_id"]: stage for t in plan["trials"] for stage in t["stages"]}
    for trial in plan["trials"]:
        assert trial["gpu_hours"] == pytest.approx(sum(s["gpu_hours"] for s in trial["stages"]))
    once = sum(stage["gpu_hours"] for stage in stages.values())
    assert plan["total"]["gpu_hours"] == pytest.approx(once)
    assert once < 0.9 * sum(trial["gpu_hours"] for trial in plan["trials"])
    flops = plan["total"]["flops"]
    assert plan["total"]["gpu_hours"] == pytest.approx(flops / (1e3 * 0.4) / 3600)


def test_what_is_computed_again_costs_hours_and_no_model_flops(tmp_path: Path) -> None:
    slow = (*ON_GPUS, "resources.peak_tflops=1.0e-9")
    plain = described(tmp_path, *slow)["total"]
    engine = "distill.training.engine.gradient_checkpointing=true"
    again = described(tmp_path, *slow, engine)["total"]
    assert again["flops"] == plain["flops"] and again["gpu_hours"] > plain["gpu_hours"]


def test_a_trial_that_trains_nothing_has_no_memory_under_any_zero_stage(tmp_path: Path) -> None:
    teacher, student, *_ = of_cluster("width_vs_depth", "llama31_8b")["trials"]
    assert list(teacher["memory_gb"].values()) == [None] * 4
    assert teacher["fullest"]["step"] == "after" and teacher["fullest"]["zero_stage"] is None
    zero = list(student["memory_gb"].values())
    assert zero == sorted(zero, reverse=True) and zero[3] > 0


def test_memory_of_a_stage_is_the_sum_of_its_parts_and_the_fullest_stage_has_the_most(
    tmp_path: Path,
) -> None:
    for trial in of_cluster("chain", "nemotron_15b")["trials"]:
        totals = {}
        for stage in trial["stages"]:
            *parts, total = stage["memory_gb"].values()
            assert sum(parts) == pytest.approx(total, abs=1e-3)
            totals[stage["step"]] = total
        assert totals[trial["fullest"]["step"]] == max(totals.values())
        assert trial["fullest"]["memory_gb"] == max(totals.values())


def test_the_profiles_for_clusters_fit_their_gpus() -> None:
    assert not of_cluster("width_vs_depth", "llama31_8b")["warnings"]
    assert not of_cluster("chain", "nemotron_15b")["warnings"]


WHOLE = (
    "distill.training.engine.zero_stage=1",
    "distill.training.engine.gradient_checkpointing=false",
)


def test_a_warning_names_the_trials_the_need_and_settings_under_which_there_is_none() -> None:
    plan = of_cluster("width_vs_depth", "llama31_8b", *WHOLE)
    students = {trial["trial_id"] for trial in plan["trials"] if trial["baseline"] != "teacher"}
    assert {trial for warning in plan["warnings"] for trial in warning["trials"]} == students
    for warning in plan["warnings"]:
        assert warning["step"] == "distill" and warning["settings"]
        assert warning["needs_gb"] > warning["has_gb"] == 72 > warning["then_gb"]
        assert f"needs {warning['needs_gb']:.1f} GB" in warning["text"]
        set_so = [f"{key}={json.dumps(value)}" for key, value in warning["settings"].items()]
        assert all(each in warning["text"] for each in set_so)
        better = of_cluster("width_vs_depth", "llama31_8b", *WHOLE, *set_so)
        labels = {label for other in better["warnings"] for label in other["labels"]}
        assert not labels & set(warning["labels"])


def test_a_step_of_a_chain_takes_the_settings_of_the_trial_unless_it_has_its_own(
    tmp_path: Path,
) -> None:
    link = {"prune": {"width": {"intermediate_size": 0.75}}}
    for own, place in ((False, "distill"), (True, "chain.0.distill")):
        chain = [link | ({"distill": small_sweep.PROFILE["trial"]["distill"]} if own else {})]
        trial = {"chain": chain, "prune": NARROW}
        sweep = {**small_sweep.SWEEP, "trial": trial, "axes": {}, "baselines": {}}
        roomy = described(tmp_path, *ON_GPUS, sweep=sweep)["trials"][1]
        (step,) = [stage for stage in roomy["stages"] if stage["step"] == "chain1.distill"]
        just_too_small = (step["memory_gb"]["total"] - 0.0001) / 0.9
        tight = f"resources.gpu_memory_gb={just_too_small}"
        warnings = described(tmp_path, *ON_GPUS, tight, sweep=sweep)["warnings"]
        (warning,) = [each for each in warnings if each["step"] == "chain1.distill"]
        assert all(key.startswith(f"{place}.training.") for key in warning["settings"])
        assert (" in the file it needs " in warning["text"]) == own, "--set cannot set it"


def test_what_no_setting_makes_fit_is_said_so() -> None:
    plan = of_cluster("width_vs_depth", "llama31_8b", "resources.gpu_memory_gb=16")
    (before,) = [warning for warning in plan["warnings"] if warning["step"] == "before"]
    assert before["settings"] is None and before["then_gb"] is None
    assert "no setting makes it fit" in before["text"]


def test_a_signal_that_would_fit_is_named_with_the_disk_it_takes() -> None:
    tight = ("resources.gpu_memory_gb=24", "evaluate.precision=bf16")
    plan = of_cluster("width_vs_depth", "llama31_8b", *tight)
    (warning,) = [warning for warning in plan["warnings"] if warning["step"] == "distill"]
    assert warning["settings"]["distill.signal"] == "sampled_cache"
    assert "GB of disk" in warning["text"]


def test_workers_that_share_a_gpu_share_its_memory(tmp_path: Path) -> None:
    half = of_cluster("width_vs_depth", "llama31_8b", "resources.gpus_per_worker=0.5")
    assert {warning["has_gb"] for warning in half["warnings"]} == {36}


@pytest.mark.parametrize(
    ("number", "short"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (404_736, "405k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (4_512_746_496, "4.51B"),
        (94_011_129_856, "94.0B"),
    ],
)
def test_counts_are_told_in_three_digits(number: int, short: str) -> None:
    assert short_count(number) == short


@pytest.mark.parametrize("width", [80, 120, 140])
def test_tables_of_a_plan_fit_the_terminal_and_lose_no_number(width: int) -> None:
    plan = of_cluster("chain", "nemotron_15b")
    text = told(plan, width)
    assert max(map(len, text.splitlines())) <= width
    flat = re.sub(r"[^\w.,:=%-]+", "", text)
    for trial in plan["trials"]:
        assert trial["trial_id"] in flat
        for each in (*trial["memory_gb"].values(), trial["fullest"]["memory_gb"]):
            assert each is None or f"{each:.1f}" in text
        assert f"{trial['gpu_hours']:,.1f}" in text and f"{trial['flops']:.2g}" in text


@pytest.mark.parametrize(
    ("sweep", "profile"), [("width_vs_depth", "llama31_8b"), ("chain", "nemotron_15b")]
)
def test_the_plans_in_the_docs_are_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: str, profile: str
) -> None:
    monkeypatch.chdir(ROOT)
    command = f"plan sweeps/{sweep}.yaml --profile {profile}"
    page = (ROOT / "docs" / "plans.md").read_text()
    shown = page.split(f"orchestrate {command}\n```\n```\n")[1].split("```")[0]
    whole = CliRunner().invoke(app, [*command.split(), "--results", str(tmp_path)])
    assert whole.output.endswith(shown) and "GB of each GPU" in shown
    plan = json.loads(CliRunner().invoke(app, [*command.split(), "--json"]).output)
    assert f"{plan['total']['gpu_hours']:,.0f} GPU-hours" in shown
    for trial in plan["trials"]:
        (row,) = [line for line in shown.splitlines() if f"│ {trial['label']} " in line]
        numbers = ["-" if each is None else f"{each:.1f}" for each in trial["memory_gb"].values()]
        fullest = trial["fullest"]
        numbers += [f"{fullest['memory_gb']:.1f}", fullest["step"], f"{trial['gpu_hours']:,.1f}"]
        assert [cell.strip() for cell in row.strip("│").split("│")[1:]] == numbers


def test_the_warnings_in_the_docs_are_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "plans.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("warning: ")]
    (command,) = [line for line in page.splitlines() if line.endswith("checkpointing=false")]
    _, *arguments = command.split()
    whole = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path)]).output
    assert [line for line in whole.splitlines() if line.startswith("warning: ")] == shown != []
