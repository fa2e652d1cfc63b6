"""The import direction of docs/architecture.md, read from the source; and what must come without torch.

`python -m tests.test_imports` draws the diagram of docs/architecture.md anew.
"""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = Path(__file__).parent.parent / "service"
FILES = sorted(SERVICE.rglob("*.py"))
MAX_LINES = 400
PAGE = SERVICE.parent / "docs" / "architecture.md"
NOT_DRAWN = {"version", "logs", "settings", "listening", "pair"}  # small ones, which most others import

# What each part of the service may import of the others. A part is a package, or a file beside the packages.
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "logs": set(),
    "listening": set(),
    "settings": set(),
    "pair": set(),
    "model": set(),
    "checkpoint": {"model"},
    "engine": {"model", "checkpoint", "logs"},
    "api": {"engine", "checkpoint", "logs"},
    "serve": {"api", "engine", "settings", "listening", "logs", "supervised", "version"},
    "supervised": {"engine"},
    "ray_proxy": {"api"},
    "ray_serve": {"api", "engine", "serve", "settings", "supervised", "logs"},
    "generate": {"api", "engine", "serve", "settings", "logs"},
    "convert": {"checkpoint", "serve", "settings", "logs"},
    "evaluation": {"api", "checkpoint", "engine", "model", "pair", "serve", "settings", "version"},
    "selftest": {"engine", "model", "serve", "settings"},
    "drain": {"settings"},
    "verify": {"checkpoint", "engine", "model", "serve", "settings", "logs"},
    "key": {"api"},
    "cli": {
        "api",
        "key",
        "serve",
        "generate",
        "convert",
        "verify",
        "evaluation",
        "selftest",
        "load",
        "drain",
        "settings",
        "version",
    },
    "load": {"pair", "version"},
    "demo": set(),
}
# Of these packages, others may import only the files without tensors.
WITHOUT_TENSORS = {"service.model.batch", "service.model.config", "service.model.split"}
# The only files outside model/ and checkpoint/ that work with tensors: they run in the engine's processes.
ENGINE_WITH_TORCH = {"service.engine.loading", "service.engine.ranks"}
# Files that import nothing of torch, not even through others.
TORCH_FREE = (
    "service.engine.client",
    "service.engine.scheduler",
    "service.engine.process",
    "service.api.app",
    "service.api.process",
    "service.model.batch",
    "service.checkpoint.tokenizer",
    "service.settings",
    "service.serve",
    "service.ray_proxy",
    "service.drain",
    "service.evaluation.command",
    "service.cli",
)


def module(file: Path) -> str:
    return ".".join(file.relative_to(SERVICE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Every module that the file imports, in functions too, but not for types only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def own(names: set[str]) -> set[str]:
    """Those that are files or packages of ours."""
    modules = {module(file) for file in FILES}
    return names & (modules - {"service"})


def part(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_go_in_one_direction(file: Path) -> None:
    """cli -> serve, generate -> api -> engine -> model, and checkpoint beside model."""
    if file.parent == SERVICE and file.stem == "__init__":
        assert set() == own(imports(file))
        return
    here = part(module(file))
    assert here in ALLOWED, f"{here} is a new part: say here what it may import"
    assert {part(name) for name in own(imports(file))} - {here} <= ALLOWED[here]


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name in ("engine", "api")], ids=module)
def test_engine_and_api_work_without_tensors(file: Path) -> None:
    """But for the engine's loading, which its process imports as it starts."""
    names = imports(file)
    if module(file) in ENGINE_WITH_TORCH:
        assert "torch" in names, "then the exception can go"
        return
    assert set() == {name for name in names if name.split(".")[0] in ("torch", "transformers")}
    assert {name for name in own(names) if name.startswith("service.model.")} <= WITHOUT_TENSORS


def test_api_knows_the_engine_by_its_client_and_records() -> None:
    """And how children begin; nothing of scheduling."""
    names = {name for file in (SERVICE / "api").glob("*.py") for name in own(imports(file)) if part(name) == "engine"}
    allowed = {"client", "backlog", "request", "child", "grammar"}  # grammars are compiled on both sides
    assert names <= {"service.engine", *(f"service.engine.{name}" for name in allowed)}


def test_engine_speaks_no_http_and_no_text() -> None:
    """No web framework and no tokenizer in the engine."""
    names = {name.split(".")[0] for file in (SERVICE / "engine").glob("*.py") for name in imports(file)}
    assert set() == names & {"fastapi", "starlette", "uvicorn", "pydantic", "tokenizers", "http"}


def test_settings_are_read_by_the_command_line_and_the_composition_root_alone() -> None:
    readers = {module(file) for file in FILES if "service.settings" in imports(file)}
    commands = {
        "service.ray_serve",
        "service.serve",
        "service.generate",
        "service.convert",
        "service.verify",
        "service.evaluation.command",
        "service.selftest.command",
        "service.drain",
    }
    assert {"service.cli", *commands} == readers


def diagram() -> str:
    """The parts and what they import, as Mermaid; what an arrow's end imports needs no arrow of its own."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        if module(file) != "service":
            here = part(module(file))
            graph.setdefault(here, set()).update({part(name) for name in own(imports(file))} - {here})

    def reached(here: str) -> set[str]:
        return graph[here].union(*map(reached, graph[here]))

    arrows = sorted(
        (here, there)
        for here in graph.keys() - NOT_DRAWN
        for there in graph[here] - NOT_DRAWN
        if not any(there in reached(other) for other in graph[here])
    )
    return "\n".join(["```mermaid", "graph TD", *(f"    {here} --> {there}" for here, there in arrows), "```"])


def test_the_diagram_is_of_the_imports() -> None:
    assert diagram() in PAGE.read_text(), "python -m tests.test_imports draws it anew"


def test_no_cycles() -> None:
    """Counting imports inside functions too, no file needs itself."""
    graph = {module(file): own(imports(file)) - {module(file)} for file in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order)


def test_no_torch_on_import() -> None:
    """The API process and the commands start without it: one interpreter imports all of these."""
    source = (
        f"import sys\nfor name in {TORCH_FREE!r}:\n    __import__(name)\n    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert ("", 0) == (done.stderr, done.returncode)


def test_no_file_has_two_jobs() -> None:
    assert {} == {module(file): n for file in FILES if (n := len(file.read_text().splitlines())) > MAX_LINES}


@pytest.mark.parametrize("file", FILES, ids=module)
def test_every_file_opens_with_its_job(file: Path) -> None:
    """A docstring, of one to a few lines."""
    assert ast.get_docstring(ast.parse(file.read_text()))


if __name__ == "__main__":
    PAGE.write_text(re.sub(r"```mermaid\n.*?```", lambda _: diagram(), PAGE.read_text(), flags=re.DOTALL))
