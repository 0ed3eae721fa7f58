"""What importing veneer costs, and which rooms may know of which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "veneer"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_veneer_brings_few_modules_and_no_other_library() -> None:
    out = _python(
        "import sys, torch, safetensors; before = set(sys.modules); import veneer; new = set(sys.modules) - before;"
        "print(len(new), *sorted({m.partition('.')[0] for m in new}))"
    )
    count, *libraries = out.split()
    assert libraries == ["veneer"]
    assert int(count) <= 5  # names are loaded when used


def test_using_veneer_needs_torch_and_safetensors_only() -> None:
    """A whole life of an adapter, with transformers and huggingface_hub out of reach."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "huggingface_hub", "accelerate", "datasets", "peft"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import tempfile, torch, veneer
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
model = veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["0"], r=2))
model(torch.randn(3, 4)).sum().backward()
with tempfile.TemporaryDirectory() as d:
    model.save_pretrained(d)
    base = model.unload()
    veneer.PeftModel.from_pretrained(base, d).merge_and_unload()
print("transformers" in sys.modules)
"""
    assert _python(code) == "False"


def test_all_public_names_resolve() -> None:
    import veneer

    for name in veneer.__all__:
        assert getattr(veneer, name) is not None
    assert set(veneer.__all__) <= set(dir(veneer))
    assert (
        _python("import veneer; print(veneer.distributed.shard.__name__, veneer.kernels.sparse.__name__)") == "shard veneer.kernels.sparse"
    )
    with pytest.raises(AttributeError, match="LoraConfg"):
        veneer.LoraConfg  # noqa: B018


# what a room may import, beside torch; imports inside functions, which break circles and spare time, count as well
ALLOWED = {
    "types": set(),
    "errors": set(),
    "sharding": set(),
    "config": {"errors", "types", "_version", "method", "checkpoint", "engine"},
    "ops": {"errors", "kernels"},
    "kernels": set(),
    "change": {"ops", "errors"},
    "bases": {"errors", "kernels", "sharding"},
    "deltas": {"errors"},
    "methods": {"change", "ops", "method", "config", "types", "errors", "inits", "kernels", "schedules", "variants", "routes"},
    "schedules": {"method", "errors"},
    "variants": {"change", "ops", "method", "types", "errors", "inits", "kernels", "schedules", "routes"},
    "routes": {"ops", "method", "errors"},
}


def _imports(file: Path) -> set[str]:
    """The rooms of veneer that a file imports."""
    package = file.relative_to(SRC).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {(*base, *str(n).split("."))[0] for n in names}
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("veneer."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room: str) -> None:
    files = [SRC / f"{room}.py"] if (SRC / f"{room}.py").exists() else sorted((SRC / room).glob("*.py"))
    for file in files:
        strange = _imports(file) - ALLOWED[room] - {room}
        assert not strange, f"{file.relative_to(SRC)} imports {sorted(strange)}"


def test_the_engine_names_no_method_and_nothing_reaches_into_the_command_line() -> None:
    for file in SRC.rglob("*.py"):
        rooms = _imports(file)
        room = file.relative_to(SRC).parts[0]
        assert "cli" not in rooms or room in ("cli", "__main__.py"), file
        if (
            room in ("engine", "sites", "bases", "checkpoint") and file.name != "stage.py"
        ):  # trained tokens are a method, and an option of others
            assert "methods" not in rooms, file


def test_only_optional_rooms_import_other_libraries_at_the_top() -> None:
    free = {"cli"}
    for file in SRC.rglob("*.py"):
        if file.relative_to(SRC).parts[0] in free:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or top in ("torch", "safetensors", "__future__"), f"{file}: {name}"


def test_no_room_has_the_name_of_a_function_in_it() -> None:
    """Importing it would put the module in the function's place."""
    import veneer

    assert not [name for name, home in veneer._HOME.items() if home == name]
