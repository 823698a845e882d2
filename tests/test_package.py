"""The package's own rules: imports point down, importing has no side effect, the public names are these."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bayesae
from bayesae import report, testing

ROOT = Path(bayesae.__file__).parent
FLOORS = {
    "cli": 9, "report": 8, "files": 8, "adapters": 7, "estimators": 7, "imputation": 6, "training": 6, "testing": 6,
    "evaluation": 6,
    "predictive": 5.75, "calibration": 3.5, "encoding": 5.5, "weights": 5, "codes": 5, "families": 4, "models": 3,
    "joint": 3, "subset": 3, "objectives": 3, "ood": 3, "decisions": 3, "metrics": 3, "curvature": 3,
    "draws": 2, "functional": 2, "likelihoods": 2, "data": 2,
    "types": 1, "forward_mode": 1, "distributed": 1.25, "schedules": 1, "lazy": 1,
    "errors": 0, "random": 1, "nets": 1.5, "priors": 1.5, "geometry": 1.5, "datasets": 1.5, "plots": 1.5,
}  # fmt: skip
# the reasons are in ARCHITECTURE.md
SAME_FLOOR = {("data", "functional"), ("likelihoods", "functional"), ("joint", "subset"), ("decisions", "ood")}
NEVER = {
    "weights": {"models", "codes"}, "codes": {"weights", "families"}, "ood": {"models", "joint", "subset"},
    "objectives": {"models", "joint", "subset"}, "metrics": {"models", "joint", "subset"},
    "decisions": {"models", "joint", "subset"},
}  # fmt: skip


def units():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            yield path, relative.parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bayesae":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("bayesae."))


@pytest.mark.parametrize(
    ("path", "unit"), list(units()), ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else ""
)
def test_imports_point_down(path, unit):
    assert not any(getattr(node, "level", 0) for node in ast.walk(ast.parse(path.read_text()))), "relative import"
    for other in imported(path):
        if other == unit or (unit, other) in SAME_FLOOR:
            continue
        assert FLOORS[other] < FLOORS[unit], f"{unit} (floor {FLOORS[unit]}) imports {other} (floor {FLOORS[other]})"
        assert other not in NEVER.get(unit, ()), f"{unit} must never import {other}"
        assert other != "estimators" or unit in {"files", "cli"}
        assert other != "calibration" or unit in {"estimators", "encoding"}


@pytest.mark.parametrize(
    ("path", "unit"), list(units()), ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else ""
)
def test_files_stay_small(path, unit):
    assert len(path.read_text().splitlines()) <= 400


SIDE_EFFECTS = """
import logging, sys, time, warnings
import numpy as np, torch
torch.manual_seed(3); np.random.seed(3)
before = (torch.get_rng_state().clone(), torch.get_default_dtype(), torch.is_grad_enabled(),
          torch.distributions.Distribution._validate_args, list(logging.root.handlers), logging.root.level,
          np.random.get_state()[1].tolist(), list(warnings.filters))
start = time.process_time()
import bayesae
took = time.process_time() - start
after = (torch.get_rng_state().clone(), torch.get_default_dtype(), torch.is_grad_enabled(),
         torch.distributions.Distribution._validate_args, list(logging.root.handlers), logging.root.level,
         np.random.get_state()[1].tolist(), list(warnings.filters))
assert torch.equal(before[0], after[0])
assert before[1:] == after[1:], (before[1:], after[1:])
heavy = {"laplace", "zuko", "backpack", "curvlinops", "torchvision", "matplotlib", "sklearn"} & set(sys.modules)
assert not heavy, heavy
print(took)
"""


def test_importing_changes_nothing_and_loads_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2


def test_public_names():
    snapshot = Path(__file__).with_name("public_api.txt").read_text().split()
    modules = {name: getattr(bayesae, name) for name in bayesae.__all__} | {"report": report, "testing": testing}
    inner = {f"{name}.{public}" for name, module in modules.items() for public in getattr(module, "__all__", ())}
    found = sorted(bayesae.__all__) + sorted(inner)
    assert found == snapshot, "\n".join(found)


@pytest.mark.parametrize("name", bayesae.__all__)
def test_everything_public_is_documented(name):
    thing = getattr(bayesae, name)
    assert thing.__doc__
    for public in getattr(thing, "__all__", ()):
        assert isinstance(getattr(thing, public), (tuple, dict)) or getattr(thing, public).__doc__, public


def test_oldest_versions_are_the_lower_bounds():
    import tomllib

    from packaging.version import Version

    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    lower = dict(requirement.split(",")[0].split(">=") for requirement in wanted)
    lines = (ROOT.parent / ".ci" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    assert {k: Version(v) for k, v in oldest.items()} == {k: Version(v) for k, v in lower.items()}


def test_the_readme_names_a_test_command_that_ci_runs():
    readme = (ROOT.parent / "README.md").read_text()
    command = readme.split("<!-- ci: tests -->")[1].split("```")[1]
    assert "venv" in command and "pytest" in command
