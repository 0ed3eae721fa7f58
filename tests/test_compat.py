"""`import veneer.compat` makes peft mean veneer. Each test has a process of its own: what is imported first decides."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LIBRARIES = ("transformers", "accelerate", "diffusers", "trl", "sentence_transformers")


def _run(*args: str, cwd: Path | None = None, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([env.pop("first")] if "first" in env else []), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env, "PYTHONPATH": path})
    if check:
        assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-4000:]
    return out


def _python(code: str, **more: str) -> str:
    return _run("-c", code, **more).stdout.strip()


def test_every_name_in_the_table_is_there() -> None:
    missing = json.loads(
        _python(
            "import json, veneer.compat as c; from veneer.compat.names import TABLE, resolve\n"
            "bad = []\n"
            "for module, names in TABLE.items():\n"
            "    for name, home in names.items():\n"
            "        try: resolve(home)\n"
            "        except Exception as e: bad.append([module, name, home])\n"
            "print(json.dumps(bad))"
        )
    )
    assert not missing


def _imports(library: str) -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of every import of peft in a library's source."""
    spec = importlib.util.find_spec(library)
    assert spec is not None and spec.origin is not None
    for file in Path(spec.origin).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if "peft" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "peft":
                yield from ((file.name, str(node.module), a.name) for a in node.names)
            elif isinstance(node, ast.Import):
                yield from ((file.name, a.name, "") for a in node.names if a.name.split(".")[0] == "peft")


def test_every_import_of_peft_in_the_libraries_is_served() -> None:
    there = [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    found = {library: {(module, name) for _, module, name in _imports(library)} for library in there}
    assert all(found.values())
    code = """
import importlib, json, sys, veneer.compat
bad = []
for module, name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(module)
        if name: exec(f'from {module} import {name}')
    except Exception as e: bad.append([module, name, repr(e)])
print(json.dumps(bad))
"""
    bad = json.loads(_run("-c", code, json.dumps(sorted(set().union(*found.values())))).stdout)
    assert not bad


def test_the_answers_that_libraries_ask_for() -> None:
    code = """
import veneer.compat, veneer
import importlib.metadata as m, importlib.util, peft
assert m.version("peft") == peft.__version__ == "0.21.2" and m.metadata("peft")["Name"] == "peft"
assert importlib.util.find_spec("peft") is not None and m.packages_distributions()["peft"][0] == "peft"
assert peft.LoraConfig is veneer.LoraConfig and peft.tuners.lora.LoraConfig is veneer.LoraConfig
import peft.utils.merge_utils, peft.tuners.lora.layer
from peft import *
assert get_peft_model is veneer.get_peft_model
try:
    from peft.utils import load_peft_wheights
except ImportError as e:
    print(e)
try:
    import peft.utils.hotswop
except ModuleNotFoundError as e:
    print(e)
try:
    import peft.tuners.lora.layer as l; l.LoraLayer(None)
except TypeError as e:
    print(e)
"""
    out = _python(code)
    assert (
        "load_peft_wheights" in out
        and "'load_peft_weights'" in out
        and "hotswap" in out
        and "get_peft_model or inject_adapter_in_model" in out
    )


def test_isinstance_answers_as_users_of_peft_expect() -> None:
    code = """
import veneer.compat, torch
from torch import nn
from peft import LoraConfig, LoHaConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.lora import LoraLayer, Linear, Conv2d, Embedding, LoraModel
from peft.tuners.loha.layer import LoHaLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(2, 2, 1), "c": nn.Embedding(4, 4), "d": nn.Linear(4, 2)})
model = get_peft_model(net, LoraConfig(r=2, target_modules=["a", "b", "c"], modules_to_save=["d"]))
m = model.base_model.model
assert isinstance(model.base_model, (BaseTuner, LoraModel)) and isinstance(model.base_model, LoraModel)
assert all(isinstance(m[k], BaseTunerLayer) and isinstance(m[k], LoraLayer) and not isinstance(m[k], LoHaLayer) for k in "abc")
assert [isinstance(m[k], Linear) for k in "abcd"] == [True, False, False, False]
assert isinstance(m["b"], Conv2d) and isinstance(m["c"], Embedding)
assert isinstance(m["d"], ModulesToSaveWrapper) and isinstance(m["d"], AuxiliaryTrainingWrapper) and not isinstance(m["d"], BaseTunerLayer)
assert not isinstance(nn.Linear(2, 2), BaseTunerLayer) and not isinstance(m["a"].base_layer, LoraLayer)
assert LoHaLayer.adapter_layer_names[0] == "hada_w1_a" and issubclass(LoraLayer, BaseTunerLayer)
other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(r=2, target_modules=["0"]))
assert isinstance(other.base_model.model[0], LoHaLayer) and not isinstance(other.base_model.model[0], LoraLayer)
"""
    _python(code)


def test_the_functions_on_bare_models() -> None:
    code = """
import veneer.compat, torch
from torch import nn
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import cast_adapter_dtype, delete_adapter, get_peft_model_state_dict, set_adapter, set_peft_model_state_dict, set_requires_grad
net = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
for name in "ab":
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), net, name)
net[0].to(torch.bfloat16)
x = torch.randn(3, 4, dtype=torch.bfloat16)
set_adapter(net, "a"); a = net(x); set_adapter(net, ["a", "b"]); both = net(x)
assert not torch.equal(a, both)
set_requires_grad(net, "a", False)
assert {n.split(".")[2] for n, p in net.named_parameters() if p.requires_grad} == {"b"}
cast_adapter_dtype(net, "b")
assert net[0].lora_A["b"].weight.dtype == torch.float32 and net[0].lora_A["a"].weight.dtype == torch.bfloat16
state = get_peft_model_state_dict(net, adapter_name="a")
assert set(state) == {"0.lora_A.weight", "0.lora_B.weight"}
assert not set_peft_model_state_dict(net, state, "b").unexpected_keys
assert delete_adapter(net, "b", prefix="lora_") == ["a"] and delete_adapter(net, "a", prefix="lora_") is None
"""
    _python(code)


def test_the_real_peft_is_left_alone_or_told_of(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("__version__ = 'real'\n")
    (tmp_path / "peft-9.9.dist-info").mkdir()
    (tmp_path / "peft-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
    first = str(tmp_path)
    assert _python("import importlib.metadata as m; print(m.version('peft'))", first=first) == "9.9"
    # installed and not imported: veneer wins
    assert (
        _python("import veneer.compat, peft, importlib.metadata as m; print(m.version('peft'), peft.__version__)", first=first)
        == "0.21.2 0.21.2"
    )
    out = _run("-c", "import peft, veneer.compat", first=first, check=False)
    assert out.returncode != 0 and "has been imported already" in out.stderr
    # not asked for: the real one is what it was
    assert _python("import veneer, peft; print(peft.__version__)", first=first) == "real"


def test_coming_after_a_library_that_found_no_peft_is_an_error() -> None:
    pytest.importorskip("transformers")
    hide = "import sys, importlib.util as u\nreal = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'peft' else real(n, *a)\n"
    out = _run("-c", f"{hide}import transformers.trainer_utils\nu.find_spec = real\nimport veneer.compat", check=False)
    assert out.returncode != 0 and "Import veneer.compat first" in out.stderr
    if importlib.util.find_spec("diffusers") is not None:
        out = _run("-c", "import diffusers, veneer.compat", check=False)
        assert out.returncode != 0 and "diffusers has been imported already" in out.stderr


def test_a_program_runs_with_it(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 3\n")
    (tmp_path / "script.py").write_text("import sys, peft, helper\nprint(peft.__version__, helper.VALUE, __name__, sys.argv)\n")
    out = _run("-m", "veneer.compat", "script.py", "--one", "two", cwd=tmp_path).stdout.split("\n")[0]
    assert out == "0.21.2 3 __main__ ['script.py', '--one', 'two']"
    out = _run("-m", "veneer.compat", "-m", "script", "x", cwd=tmp_path).stdout
    assert out.startswith("0.21.2 3 __main__") and out.strip().endswith("'x']")
    bad = _run("-m", "veneer.compat", "nothing.py", cwd=tmp_path, check=False)
    assert bad.returncode != 0 and "no file 'nothing.py'" in bad.stderr


def test_the_page_on_moving_runs(tmp_path: Path) -> None:
    page = (HERE.parent / "docs" / "migrating-from-peft.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert blocks and all("veneer.compat" in b for b in blocks)
    for block in blocks:
        _run("-c", block, cwd=tmp_path)


def _integration(*more: str) -> None:
    files = [str(f) for f in sorted((HERE / "integration").glob("test_*.py")) if _needs(f)]
    assert files
    out = _run(
        "-m", "veneer.compat", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *more, *files, cwd=HERE.parent, check=False
    )
    assert out.returncode in (0, 5), out.stdout[-12000:] + out.stderr[-4000:]  # 5: none of this mark


def _needs(file: Path) -> bool:
    """Whether the libraries that a file imports are installed."""
    tops = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name if isinstance(n, ast.Import) else str(n.module) for n in tops for a in n.names if not getattr(n, "level", 0)}
    return all(importlib.util.find_spec(n.split(".")[0]) is not None for n in names if n.split(".")[0] in LIBRARIES)


def test_the_real_libraries() -> None:
    """tests/integration with whatever of transformers, accelerate, TRL and sentence-transformers is installed."""
    pytest.importorskip("transformers")
    _integration()


@pytest.mark.slow
def test_the_real_libraries_at_length() -> None:
    pytest.importorskip("transformers")
    _integration("-m", "slow")


@pytest.mark.slow
def test_the_example_with_diffusers_runs(tmp_path: Path) -> None:
    for library in ("diffusers", "sklearn", "matplotlib"):
        pytest.importorskip(library)
    _run(str(HERE.parent / "examples" / "diffusion" / "run.py"), "--quick", "--out", str(tmp_path))
    figures = json.loads((tmp_path / "run.json").read_text())
    assert all(figures[k]["loaded draws what was trained, largest difference"] == 0 for k in ("unet", "transformer"))
    assert (tmp_path / "images.png").stat().st_size > 10_000
