"""Who may import whom, held by reading the source and by importing in clean processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vae_dist"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Arrows point down only: cli, train, launch, serve -> engine -> evaluate, decode, export -> ... -> config, errors.
LAYERS = [
    {"config", "errors"},
    {"data", "model", "objective", "observe"},
    {"evaluate", "decode", "export", "estimate"},
    {"engine"},
    {
        "cli",
        "train",
        "launch",
        "serve",
        "table",
        "doctor",
        "arguments",
        "data_command",
        "plan_command",
        "__main__",
        "__init__",
    },
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in it; `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from vae_dist.export import model_dir` imports a module, too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    """The first name below vae_dist: `engine`, `cli`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def importers(package: str) -> set[str]:
    """Files that import a package, relative to the project."""
    return {
        str(path.relative_to(ROOT)) for path in SOURCES if any(name.split(".")[0] == package for name in imports(path))
    }


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} <= LEVEL.keys()


def test_arrows_point_down_only() -> None:
    upward = []
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package == "vae_dist" and LEVEL.get(target, -1) > LEVEL[part_of(path)]:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert upward == []


def test_ray_is_imported_by_launch_and_serve_only() -> None:
    assert {p for p in importers("ray") if not p.startswith(("vae_dist/launch/", "vae_dist/serve/"))} == set()


def test_deepspeed_is_imported_by_the_engine_only() -> None:
    assert {p for p in importers("deepspeed") if not p.startswith("vae_dist/engine/")} == set()


def test_the_kernels_import_nothing_but_torch_and_triton() -> None:
    allowed = {"torch", "triton", "vae_kernels", *sys.stdlib_module_names}
    foreign = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / "kernels" / "vae_kernels").rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] not in allowed
    }
    assert foreign == set()


def test_nothing_unpickles() -> None:
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                if called in ("torch.load", "torch.save", "np.load") or node.value.id == "pickle":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
        found += [
            f"{path.relative_to(ROOT)} imports {n}" for n in imports(path) if n.split(".")[0] in ("pickle", "dill")
        ]
    assert found == []


def test_project_folders_are_not_packages() -> None:
    folders = [ROOT / name for name in ("kernels", "cluster", "configs", "tests")]
    assert [f for folder in folders[:3] for f in [folder / "__init__.py"] if f.exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def run_python(code: str, folder: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter in another folder, which finds the checkout by PYTHONPATH alone."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIGHT = [
    "vae_kernels", "vae_dist.model.vae", "vae_dist.objective.elbo", "vae_dist.decode.latent_ops",
    "vae_dist.evaluate.likelihood", "vae_dist.export.model_dir", "vae_dist.estimate.view",
]  # fmt: skip


def test_models_load_where_there_is_torch_alone(tmp_path: Path) -> None:
    code = (
        "import sys, importlib, vae_dist\n"
        f"for name in {LIGHT}: importlib.import_module(name)\n"
        "print([name for name in ('ray', 'deepspeed') if name in sys.modules])"
    )
    assert run_python(code, tmp_path) == "[]"


def test_the_command_line_starts_without_ray_and_deepspeed(tmp_path: Path) -> None:
    code = "import sys, vae_dist.cli, vae_dist.train\nprint([n for n in ('ray', 'deepspeed') if n in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_foreign_package_called_kernels_is_not_shadowed(tmp_path: Path, order: str) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("ORIGIN = 'foreign'\n", encoding="utf-8")
    paths = [str(tmp_path), str(ROOT)] if order == "before" else [str(ROOT), str(tmp_path)]
    code = "import vae_dist, vae_kernels, kernels\nprint(kernels.ORIGIN, vae_kernels.__file__)"
    # In the project itself, where the folder `kernels` lies on the path.
    origin, ours = run_python(code, ROOT, PYTHONPATH=os.pathsep.join(paths)).split()
    assert origin == "foreign"
    assert Path(ours) == ROOT / "kernels" / "vae_kernels" / "__init__.py"
