"""The house keeps its floors: imports go down only, and each library has its doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"

FLOORS = (
    {"errors", "imports"},
    {"digests", "files", "fitted", "memory", "progress", "vision"},
    {"config"},
    {"experiment"},
    {"embedding", "images", "lineage", "metrics"},
    {"dataset", "backbone", "baselines", "store", "heads", "bundle", "leaderboard"},
    {"audit"},
    {"tuning", "training", "embedders"},
    {"report"},
    {"feed"},
    {"check", "extract_features", "train_heads", "finetune", "predict", "maintenance", "api"},
    {"cli"},
    {"__main__"},
)
"""From the ground up; a folder counts as one module."""

DOORS = {
    "pydantic": {"config"},
    "yaml": {"config"},
    "click": {"cli"},
    "tqdm": {"progress", "cli"},
    "h5py": {"store"},
    "torchvision": {"vision", "backbone"},  # backbone reaches submodules, after vision has opened the door
    "skopt": {"tuning"},
    "skops": {"bundle"},
    "joblib": {"bundle", "tuning"},
    "pyarrow": {"dataset", "store"},
    "PIL": {"images", "dataset", "report"},
    "matplotlib": {"report"},
    "skimage": {"baselines"},
    "simplejpeg": {"images"},
    "openvino": {"backbone"},
}

NO_TORCH = """
import sys
class NoTorch:
    @staticmethod
    def find_spec(name, *_):
        if name.partition('.')[0] in ('torch', 'torchvision'):
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch)
"""

WITHOUT_TORCH = (
    "dataset",
    "store",
    "heads",
    "bundle",
    "tuning",
    "leaderboard",
    "report",
    "train_heads",
    "baselines",
    "cli",
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every source file with the name of the module it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imported(path: Path) -> Iterator[str]:
    """The dotted names a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            assert node.module is not None
            yield node.module
            if node.module == "pipeline":
                yield from (f"pipeline.{alias.name}" for alias in node.names)


def floor_of(module: str) -> int:
    for floor, names in enumerate(FLOORS):
        if module in names:
            return floor
    raise AssertionError(f"pipeline/{module} has no floor; add it to FLOORS")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value).replace(str(PACKAGE), ""))
def test_imports_go_down_only(module: str, path: Path) -> None:
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "pipeline" and rest:
            other = rest.partition(".")[0]
            if other != module:
                assert floor_of(other) < floor_of(module), f"{module} imports {other}, which is not on a lower floor"


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value).replace(str(PACKAGE), ""))
def test_each_library_has_its_doors(module: str, path: Path) -> None:
    for name in imported(path):
        library = name.partition(".")[0]
        assert module in DOORS.get(library, {module}), f"{module} imports {library}; only {DOORS[library]} may"


def test_only_the_cli_prints() -> None:
    for module, path in modules():
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert module == "cli" or not prints, f"{path}:{prints} prints; log or return the text instead"


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, pipeline; print([m for m in ('numpy', 'torch', 'sklearn') if m in sys.modules])"
    assert run(code) == "[]"


def test_stage_two_imports_without_torch() -> None:
    names = ", ".join(f"pipeline.{name}" for name in WITHOUT_TORCH)
    assert run(f"{NO_TORCH}\nimport {names}\nprint('ok')") == "ok"


def test_stage_two_leaves_an_installed_torch_alone() -> None:
    assert run("import sys, pipeline.train_heads, pipeline.report; print('torch' in sys.modules)") == "False"


def test_the_users_own_import_of_torchvision_works_after_ours() -> None:
    code = """
try:
    import torchvision  # fails beside a CPU-only torch
except RuntimeError:
    pass
from pipeline.vision import torchvision as ours
import torchvision, torchvision.transforms.v2, torchvision.ops
print(torchvision is ours, torchvision.models.squeezenet1_1().eval()(__import__('torch').zeros(1, 3, 64, 64)).shape[1])
"""
    assert run(code) == "True 1000"


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
