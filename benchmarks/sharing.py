"""What a sweep saves beside scripts that each do all of a trial's work.

    pip install --no-deps --target /tmp/peers -r benchmarks/requirements-peers.txt
    PYTHONPATH=/tmp/peers OMP_NUM_THREADS=1 python benchmarks/sharing.py --json

Eight trials distil the same pruned student at eight learning rates: by `orchestrate`, which runs
the teacher once and keeps warm workers, and by eight scripts around TRL's `GKDTrainer(lmbda=0,
beta=0)`. Both take the same blocks in the same order on two cores, nothing is stopped early, and
the losses of each trial's first steps must agree to 3 digits.

`cpu_speedup_vs_scripts`: CPU seconds of the scripts' training over those of the sweep's stages
`cache` and `distill`, start-up left out on both sides, 135M → 67M. `fraction_of_limit` is that
over 1 + T/(3S), what sharing alone tends to (T, S: parameters) between steps of equal speed. Ours
are faster without any sharing (`live_speedup_vs_gkd` of distill_step.py), so the fraction says how
large the speed-up is on that scale, not how much of the limit sharing has won; it may pass 1.
`wall_speedup_vs_scripts`: wall time of the scripts one after the other, each with both cores, over
that of the sweep, from the first process to the last with everything in it, on models of the `tiny`
profile's size; the sweep's also contains pruning, evaluation, the report and MLflow.
`wall_speedup_vs_scripts_together`: the same where two scripts run at a time, one core each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TRIALS = 8
RATES = [1e-4 * 1.5**number for number in range(TRIALS)]
CORES = 2
"""Of the machine that are used: by two trials, or by two scripts at once."""
FIRST_STEPS = 8
"""Of which the losses are compared at most: a curve's points are means."""
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Size:
    """Models and lengths of a comparison."""

    layers: int
    kept: int
    steps: int
    batch_size: int
    block_length: int
    tiny: bool


@dataclass(frozen=True)
class Side:
    """Seconds, and each trial's mean loss over its `first` steps."""

    wall_s: float
    cpu_s: float
    losses: list[float]
    first: int


# --- ours ------------------------------------------------------------------------------------


def write_sweep(folder: Path, size: Size) -> Path:
    """A sweep of the eight learning rates over a teacher in `folder/teacher/model`."""
    half = size.kept // 2
    dropped = list(range(half, half + size.layers - size.kept))
    training = {
        "steps": size.steps,
        "batch_size": size.batch_size,
        "learning_rate": RATES[0],
    }
    profile = {
        "trial": {
            "source": {"kind": "folder", "path": str(folder / "teacher" / "model")},
            "corpus": {
                "kind": "generated",
                "block_length": size.block_length,
                "training_blocks": size.steps * size.batch_size,
                "calibration_blocks": 8,
                "heldout_blocks": 2,
            },
            "importance": {"samples": 8},
            "evaluate": {"tasks": []},
            "distill": {"training": training, "signal": "hidden_cache"},
        },
        "resources": {"checkpoint_every_s": 1e6},
    }
    sweep = {
        "name": "sharing",
        "question": "Which learning rate?",
        "profile": "shared",
        "trial": {
            "prune": {
                "depth": {"keep": size.kept, "criterion": {"kind": "layers", "drop": dropped}}
            }
        },
        "axes": {"distill.training.learning_rate": RATES},
        "select": {"metric": "lm_loss.after"},
    }
    (folder / "profiles").mkdir()
    (folder / "profiles" / "shared.yaml").write_text(yaml.safe_dump(profile))
    path = folder / "sharing.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def run_sweep(folder: Path, size: Size) -> Side:
    """Run it as a user would."""
    path = write_sweep(folder, size)
    command = [sys.executable, "-m", "orchestrator.cli", str(path)]
    command += ["--results", str(folder / "results"), "--max-concurrent", str(CORES)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    wall_s = time.perf_counter() - began
    from orchestrator.records import read_parquet

    records = read_parquet(folder / "results" / "sharing" / "shared")
    kinds = ("cache", "distill")
    cpu_s = sum(stage.cpu_s for stage in records.stages if stage.kind in kinds)
    grid = [trial for trial in records.trials if trial.baseline is None]
    assert len(grid) == TRIALS, [trial.reason for trial in records.trials]
    order = sorted(grid, key=lambda trial: trial.axes["distill.training.learning_rate"])
    losses = [p for p in records.curves if p.name == "loss"]
    first = min(point.step for point in losses)
    assert first <= FIRST_STEPS
    values = {point.trial_id: point.value for point in losses if point.step == first}
    return Side(wall_s, cpu_s, [values[trial.trial_id] for trial in order], first)


def pruned_student(folder: Path) -> Path:
    """The student that the sweep made, for the scripts to start from."""
    artifacts = folder / "results" / "artifacts"
    return next(path for path in artifacts.iterdir() if path.name.startswith("prune-")) / "model"


# --- scripts ---------------------------------------------------------------------------------


def run_scripts(folder: Path, size: Size, first: int, at_once: int) -> Side:
    """Run eight processes, so many at once, which share the cores; the losses are means over the
    `first` steps."""
    student = folder / "student" / "model"
    student.parent.mkdir(exist_ok=True)
    student.unlink(missing_ok=True)
    student.symlink_to(pruned_student(folder), target_is_directory=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // at_once))}

    def script(rate: float) -> dict[str, Any]:
        values = [str(folder), str(size.steps), str(size.batch_size), str(size.block_length)]
        command = [sys.executable, __file__, "--script", *values, repr(rate)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(script, RATES))
    wall_s = time.perf_counter() - began
    losses = [sum(each["losses"][:first]) / first for each in found]
    return Side(wall_s, sum(each["cpu_s"] for each in found), losses, first)


def be_a_script(folder: str, steps: str, batch_size: str, block_length: str, rate: str) -> None:
    """What a person would write around TRL, for one trial. Prints CPU seconds and first loss."""
    import distill_step
    import torch
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from trainers import language

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    setting = distill_step.Setting(
        Path(folder), int(steps), int(batch_size), int(block_length), "fp32", 1
    )
    arguments = distill_step._arguments(setting) | {"learning_rate": float(rate)}
    student, teacher = distill_step._models(setting)
    losses: list[float] = []

    class Script(GKDTrainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            loader = torch.utils.data.DataLoader
            return loader(self.train_dataset, setting.batch_size, collate_fn=distill_step._collate)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    trainer = Script(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**arguments, lmbda=0.0, beta=0.0, temperature=1.0, max_length=None),
        train_dataset=distill_step._dataset(setting),
        data_collator=distill_step._collate,
        processing_class=language.tokenizer(),
    )
    began = time.process_time()
    trainer.train()
    cpu_s = time.process_time() - began
    print(json.dumps({"cpu_s": cpu_s, "losses": losses[:FIRST_STEPS]}))


# --- measuring -------------------------------------------------------------------------------


def compare(size: Size) -> dict[str, float]:
    """Both sides' seconds, and the models' parameters."""
    import distill_step

    from trainers import language
    from trainers.checkpoints import count_parameters, load_model, new_model, save_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = distill_step.TEACHER | (TINY if size.tiny else {})
        save_model(new_model(shape, 0), language.tokenizer(), folder / "teacher" / "model")
        ours = run_sweep(folder, size)
        theirs = run_scripts(folder, size, ours.first, CORES)
        for sweep_loss, script_loss in zip(ours.losses, theirs.losses, strict=True):
            assert abs(sweep_loss - script_loss) <= 1e-3 * script_loss, (ours, theirs)
        in_turn = {}
        if size.tiny:
            in_turn["scripts_in_turn_wall_s"] = run_scripts(folder, size, ours.first, 1).wall_s
        parameters = {
            "teacher": count_parameters(load_model(folder / "teacher" / "model")),
            "student": count_parameters(load_model(pruned_student(folder))),
        }
    return {
        "sweep_wall_s": ours.wall_s,
        "sweep_cpu_s": ours.cpu_s,
        "scripts_wall_s": theirs.wall_s,
        "scripts_cpu_s": theirs.cpu_s,
        **in_turn,
        **parameters,
    }


def main() -> None:
    """Measure, print, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of a trial, 135M → 67M")
    parser.add_argument("--tiny-steps", type=int, default=240, help="of a trial, tiny")
    parser.add_argument("--only", choices=["tiny", "135m"])
    parser.add_argument("--script", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if arguments.script:
        be_a_script(*arguments.script)
        return
    if importlib.util.find_spec("trl") is None:
        parser.error("the scripts need TRL: see benchmarks/requirements-peers.txt")
    found: dict[str, float] = {}
    if arguments.only != "tiny":
        large = compare(Size(30, 11, arguments.steps, 2, 512, tiny=False))
        limit = 1 + large["teacher"] / (3 * large["student"])
        speedup = large["scripts_cpu_s"] / large["sweep_cpu_s"]
        found |= {"cpu_speedup_vs_scripts": speedup, "fraction_of_limit": speedup / limit}
        found |= {f"135m.{name}": value for name, value in large.items()}
    if arguments.only != "135m":
        small = compare(Size(8, 4, arguments.tiny_steps, 8, 96, tiny=True))
        found["wall_speedup_vs_scripts"] = small["scripts_in_turn_wall_s"] / small["sweep_wall_s"]
        found["wall_speedup_vs_scripts_together"] = small["scripts_wall_s"] / small["sweep_wall_s"]
        found |= {f"tiny.{name}": value for name, value in small.items()}
    for name, value in found.items():
        print(f"{name:<28} {value:16,.3f}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
