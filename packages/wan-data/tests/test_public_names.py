"""What README says can be imported, and what importing it loads."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wan_data

README = Path(__file__).parents[1] / "README.md"
NAMES = {
    "wan_data.loader": ("LoaderConfig", "PackLoader"),
    "wan_data.datasets": ("read_empty_caption", "read_latent_spec", "splits"),
}


def test_the_public_modules_and_the_package_have_the_same_names():
    for module, names in NAMES.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is getattr(wan_data, name)
    assert sorted(wan_data.__all__) == sorted(name for names in NAMES.values() for name in names)
    with pytest.raises(AttributeError, match="module 'wan_data' has no attribute 'Loader'"):
        _ = wan_data.Loader


def test_the_python_of_the_readme_runs(dataset):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    tree = ast.parse(code.replace('"dataset"', repr(str(dataset))))
    loop = tree.body[-1]
    assert isinstance(loop, ast.For)
    loop.body.append(ast.Break())  # the stream is endless
    found = {}
    exec(compile(ast.fix_missing_locations(tree), str(README), "exec"), found)
    assert found["pack"].keys
    assert found["state"]["rank"] == 0
    assert sum(found["splits"](dataset).values()) == 14
    assert found["read_latent_spec"](dataset).channels == 16


def test_neither_the_package_nor_the_help_imports_anything_heavy():
    code = (
        "import sys, wan_data, wan_data.cli\n"
        "heavy = {'torch', 'av', 'megatron.energon', 'diffusers', 'transformers', 'numpy', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "wan_data.cli.main(['prepare', '--help'], standalone_mode=False)\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "wan_data.LoaderConfig\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    first, *help_text, last = done.stdout.splitlines()
    assert "--video-folder" in "".join(help_text)
    assert first == "[]"
    assert help_text[-1] == "[]"
    assert "torch" in last, "the control"
    assert "megatron.energon" in last
