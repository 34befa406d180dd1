"""Who may import whom, and what must answer without torch or ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

EVERYTHING = "everything in orchestrator"
SPEC = {
    "asked", "candidates", "located", "pruning", "scheduling", "schema", "settings", "spec",
    "winners", "wording",
}  # fmt: skip

# Module of orchestrator -> modules of orchestrator it may import.
ORCHESTRATOR: dict[str, set[str] | str] = {
    "cli": EVERYTHING,
    "running": EVERYTHING,
    "asking": {"steps"},
    "recorded": {"asked", "located", "scheduling", "wording"},
    "publishing": {"growth", "records", "report", "selection", "spec"},
    "outline": {"growth", "plan", "progress", "space", "spec", "store"},
    "tuning": {
        "execute", "faults", "jobs", "ledger", "plan", "space", "spec", "records", "stages",
        "steps", "cluster", "room", "stopping", "storage", "store", "tracking", "workers",
    },
    "room": {"cluster", "spec"},
    "workers": {"execute", "faults", "stages", "steps"},
    "jobs": {"plan", "spec", "stages", "steps", "store"},
    "execute": {"faults", "plan", "stages", "steps", "store", "records"},
    "plan": {"demand", "estimate", "steps", "space", "axes", *SPEC},
    "demand": {"axes", "estimate", "space", "steps", *SPEC},
    "estimate": set(),
    "steps": {"stages", "space", *SPEC},
    "space": {"axes", "measures", *SPEC},
    "axes": {*SPEC},
    "measures": {*SPEC},
    "race": {"axes", "inference", "records", "space", *SPEC},
    "growth": {"axes", "plan", "proposals", "race", "records", "space", *SPEC},
    "proposals": {"axes", "scheduling"},
    "stopping": {"records", "scheduling"},
    "spec": SPEC - {"spec"},
    "settings": {"located", "pruning", "schema", "wording"},
    "pruning": {"located"},
    "candidates": set(),
    "scheduling": {"asked"},
    "winners": {"located"},
    "schema": {"located", "wording"},
    "wording": {"located"},
    "located": set(),
    "asked": set(),
    "stages": set(),
    "faults": set(),
    "leases": set(),
    "store": {"faults", "leases"},
    "storage": {"faults", "leases", "store"},
    "ledger": {"records"},
    "records": set(),
    "tracking": {"records", "runs"},
    "runs": {"inputs", "records", "registry", "wording"},
    "inputs": set(),
    "registry": set(),
    "mirroring": {"leases", "ledger", "records", "runs", "tracking"},
    "inference": set(),
    "answers": {"inference", "records"},
    "selection": {"answers", "asked", "inference", "records", "wording"},
    "pareto": {"asked", "records", "selection"},
    "claims": {"asked", "inference", "selection", "records"},
    "published": set(),
    "papers": {"asked", "published", "records", "selection"},
    "tables": {"asked", "claims", "papers", "selection", "records"},
    "practices": {
        "asked", "claims", "located", "papers", "published", "recorded", "records", "selection",
        "tables",
    },
    "comparing": {
        "answers", "asked", "claims", "inference", "located", "recorded", "records", "selection",
        "wording",
    },
    "side_by_side": {"asked", "claims", "comparing", "inference", "progress"},
    "figures": {
        "canvas", "plots_cost", "plots_effects", "plots_layers", "plots_pareto", "plots_ranks",
        "plots_throughput", "plots_training", "records", "selection",
    },
    "canvas": set(),
    "plots_cost": {"canvas", "records"},
    "plots_effects": {"canvas", "published", "records", "selection"},
    "plots_layers": {"canvas", "records", "selection"},
    "plots_pareto": {"canvas", "pareto", "records", "selection"},
    "plots_ranks": {"canvas", "plots_training", "records", "selection"},
    "plots_throughput": {"canvas", "records", "selection", "throughput"},
    "plots_training": {"canvas", "records", "selection"},
    "throughput": {"asked", "records", "selection", "tables"},
    "report": {"asked", "selection", "records", "tables", "figures", "page", "throughput"},
    "page": {"asked", "selection", "records", "tables"},
    "cluster": set(),
    "footprint": {"demand", "estimate", "plan", "spec", "steps"},
    "doctor": {"cluster", "footprint", "plan", "spec", "store", "tracking"},
    "verifying": {
        "jobs", "ledger", "plan", "progress", "records", "selection", "space", "store", "tracking",
        "tuning", *SPEC,
    },
    "progress": {"claims", "selection"},
}  # fmt: skip

# Module of orchestrator -> modules of trainers it may import.
TRAINERS = {
    "stages": {"config"},
    "asked": {"config"},
    "spec": {"config"},
    "scheduling": {"config"},
    "proposals": {"config"},
    "candidates": {"config", "shapes"},
    "pruning": {"config", "shapes"},
    "settings": {"config"},
    "schema": {"config"},
    "space": {"config", "shapes"},
    "plan": {"families", "shapes"},
    "demand": {"config", "mapping", "shapes"},
    "estimate": {"config", "shapes"},
    "footprint": {"shapes"},
    "steps": {"config", "mapping", "shapes"},
    "execute": {"config", "contract"},
    "throughput": {"config"},
    "plots_throughput": {"config"},
    "tuning": {"contract"},
    "faults": {"contract"},
    "workers": {"contract"},
    "verifying": {"config"},
    "recorded": {"config"},
}

# Package -> the only modules that may import it.
ONLY_HERE = {
    "ray": {
        "orchestrator.cluster",
        "orchestrator.stopping",
        "orchestrator.tuning",
        "orchestrator.workers",
    },
    "optuna": {"orchestrator.proposals"},
    "mlflow": {"orchestrator.runs"},
    "pyarrow": {"orchestrator.records", "orchestrator.storage"},
    "deepspeed": {"trainers.engine"},
    "lm_eval": {"trainers.questions", "trainers.scorer"},
}

NO_TORCH = {"config", "contract", "shapes", "families", "language", "mapping"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> list[Path]:
    return [p for p in sorted((ROOT / package).glob("*.py")) if p.stem != "__init__"]


def ours(path: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports."""
    known = {p.stem for p in modules(package)}
    return {n.split(".")[1] for n in imports_of(path) if n.startswith(f"{package}.")} & known


@pytest.mark.parametrize("path", modules("orchestrator"), ids=lambda p: p.stem)
def test_an_orchestrator_module_imports_only_what_the_design_allows(path: Path) -> None:
    allowed = ORCHESTRATOR[path.stem]
    if allowed != EVERYTHING:
        assert ours(path, "orchestrator") <= set(allowed)
    assert ours(path, "trainers") <= TRAINERS.get(path.stem, set())


@pytest.mark.parametrize("path", modules("trainers"), ids=lambda p: p.stem)
def test_a_trainer_knows_nothing_of_the_orchestrator(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & {"orchestrator", "ray", "mlflow", "optuna", "pyarrow"}


@pytest.mark.parametrize("package", ONLY_HERE)
def test_a_heavy_library_has_one_door(package: str) -> None:
    users = {
        f"{path.parent.name}.{path.stem}"
        for folder in ("orchestrator", "trainers")
        for path in modules(folder)
        if package in {name.split(".")[0] for name in imports_of(path)}
    }
    assert users <= ONLY_HERE[package]


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_what_the_planner_reads_of_the_trainers_needs_no_torch(name: str) -> None:
    code = f"import sys, trainers.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_worker_that_trains_does_not_load_mlflow_and_still_can() -> None:
    code = "import sys, trainers.engine; assert 'mlflow' not in sys.modules; import mlflow"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_planning_imports_neither_torch_nor_ray(command: str) -> None:
    code = (
        "import sys\n"
        "from orchestrator.cli import app\n"
        f"app(['{command}', 'sweeps/depth_ablation.yaml'], standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
