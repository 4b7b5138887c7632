"""The house keeps to its map: which folder may import which, and which libraries have their doors where."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipeline.config import Config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

EVERYWHERE = {"config", "errors", "io"}
"""What every folder may import; they import nothing of the house but one another, in this order: errors, io, config."""

EDGES = {
    "errors": set(),
    "io": {"errors"},
    "config": {"errors", "io"},
    "experiment": set(),
    "images": set(),
    "store": set(),
    "data": {"images", "experiment"},
    "embed": {"images", "store", "experiment"},
    "evaluation": {"data", "images", "store", "experiment"},
    "heads": {"evaluation", "data", "store", "experiment"},
    "export": {"embed", "heads", "evaluation", "data", "images", "experiment"},
    "finetuning": {"embed", "heads", "export", "evaluation", "data", "images", "store", "experiment"},
    "report": {"heads", "evaluation", "embed", "data", "images", "experiment"},
}
"""Which folders each may import besides; `stages` may import all of them, and only the command line and the Python names it."""

FRONT = {"cli", "__main__", "__init__"}

DOORS = {
    "pydantic": {"config"},
    "yaml": {"config"},
    "click": {"cli"},
    "tqdm": {"io", "cli"},
    "h5py": {"store"},
    "torchvision": {"io", "embed"},  # embed reaches submodules, after io.vision has opened the door
    "skopt": {"heads"},
    "skops": {"export"},
    "joblib": {"export", "heads"},
    "pyarrow": {"data", "images", "store"},
    "fsspec": {"io"},
    "PIL": {"images", "data", "report"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "umap": {"report"},
    "skimage": {"embed"},
    "simplejpeg": {"images"},
    "openvino": {"embed"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "skl2onnx": {"export"},
    "timm": {"embed"},
    "tabicl": {"heads"},
}

NO_TORCH = """
import sys
class NoTorch:
    @staticmethod
    def find_spec(name, *_):
        if name.partition('.')[0] in ('torch', 'torchvision'):
            print('asked for', name)
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch)
"""

WITHOUT_TORCH = (
    "data.scan",
    "store",
    "heads.tuning",
    "export.bundle",
    "evaluation.leaderboard",
    "report",
    "stages.train_heads",
    "embed.baselines",
    "embed.transformer",
    "stages.estimators",
    "stages.extract",
    "stages.predict",
    "stages.check",
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every source file with the name of the folder it belongs to, or its own where it is in none."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(path: Path) -> Iterator[str]:
    """The dotted names a file imports, wherever in the file it does."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            assert node.module is not None
            yield node.module
            if node.module == "pipeline":
                yield from (f"pipeline.{alias.name}" for alias in node.names)


def allowed(module: str) -> set[str]:
    """The folders that one may import."""
    if module in FRONT:
        return {*EDGES, "stages", *FRONT}
    if module == "stages":
        return {*EDGES}
    assert module in EDGES, f"pipeline/{module} is not in EDGES; say there what it may import"
    return EDGES[module] if module in EVERYWHERE else EDGES[module] | EVERYWHERE


def test_imports_follow_the_map() -> None:
    for module, path in modules():
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package == "pipeline" and rest:
                other = rest.partition(".")[0]
                assert other in allowed(module) | {module}, f"{path} imports {other}, which EDGES has no arrow for"


def test_the_map_has_no_circle() -> None:
    left = {name: edges | (EVERYWHERE - {name} if name not in EVERYWHERE else set()) for name, edges in EDGES.items()}
    while free := {name for name, edges in left.items() if not edges & left.keys()}:
        left = {name: edges for name, edges in left.items() if name not in free}
    assert not left


def test_every_arrow_of_the_map_is_used() -> None:
    found = {
        (module, name.split(".")[1]) for module, path in modules() for name in imported(path) if name[:9] == "pipeline."
    }
    assert {(module, other) for module, others in EDGES.items() for other in others - EVERYWHERE} <= found


def test_the_page_on_architecture_shows_this_map() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \|(.*)\|$", PAGE, re.MULTILINE)
    shown = {folder: {name.strip() for name in edges.split(",")} - {""} for folder, edges in rows}
    assert shown == {folder: edges - EVERYWHERE for folder, edges in EDGES.items() if folder != "errors"}


def test_every_name_on_the_page_on_architecture_exists() -> None:
    named = set(re.findall(r"`([\w/]+(?:\.(?:py|md|yaml)|/))`", PAGE))
    assert len(named) > 30
    for name in named:
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), f"docs/architecture.md names {name}"
    for table, file in re.findall(r"`([A-Z]+)`, `([\w/]+\.py)`", PAGE):
        assert re.search(rf"^{table}\b.*=", (PACKAGE / file).read_text(encoding="utf-8"), re.MULTILINE), table


def types(path: Path) -> set[str]:
    """The names of a file's classes, wherever they stand, and of its type aliases and type variables: CapWords that are given a value."""
    classes = {node.name for node in nodes(path) if isinstance(node, ast.ClassDef)}
    given = [node for node in ast.iter_child_nodes(nodes(path)[0]) if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = {ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) for node in given}
    return classes | {name for name in names if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name)}


def test_no_two_types_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for _, path in modules():
        for name in types(path):
            places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {"DatasetIndex", "Embedder", "Target", "FeatureMatrix", "_Images"} <= places.keys()
    twice = [f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]
    assert not twice, "a name means one type in the whole package; rename all but one of\n" + "\n".join(twice)


def test_the_top_level_is_a_short_list() -> None:
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__pycache__"} == {*EDGES, "stages", *FRONT}


def test_each_library_has_its_doors() -> None:
    for module, path in modules():
        for name in imported(path):
            library = name.partition(".")[0]
            assert module in DOORS.get(library, {module}), f"{path} imports {library}; only {DOORS[library]} may"


def test_only_the_cli_prints() -> None:
    for module, path in modules():
        calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
        prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert module == "cli" or not prints, f"{path}:{prints} prints; log or return the text instead"


def test_nothing_is_imported_before_it_is_used_and_stage_two_and_the_baselines_need_no_torch(
    experiment: Config, tmp_path: Path
) -> None:
    """Neither does a run of stage one that has nothing to embed."""
    copy = shutil.copytree(Path(experiment.output).parent, tmp_path / "copy")
    code = f"""
{NO_TORCH}
def loaded(*names):
    print([name for name in names if name in sys.modules])

import manyheads
loaded("pipeline", "numpy")
from pipeline.cli import cli
cli.main(["--help"], standalone_mode=False)
loaded("numpy", "sklearn", "h5py")
import pipeline.evaluation, pipeline.report
loaded("matplotlib", "plotly")
import {", ".join(f"pipeline.{name}" for name in WITHOUT_TORCH)}
done = manyheads.features({str(copy / "output")!r})
print(done.work, done.summary_lines()[-2])
loaded("skimage")
print(len(pipeline.embed.baselines.load('hog').probe))
"""
    nothing, help, without, done, hog = run(code).split("[]\n")
    assert nothing == ""
    assert "store      Maintain the feature stores" in help
    assert without == ""
    assert done.startswith("None ")
    assert "nothing to embed" in done
    assert hog == "1"


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
