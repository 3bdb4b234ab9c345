"""``python -m hf_noneuclid`` runs other people's scripts; ``import hf_noneuclid`` needs nothing but torch."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
from helper import VALUE
from transformers.training_args import OptimizerNames
if __name__ == "__main__":
    known = OptimizerNames("muonmax_momo").value
    with open("seen.json", "w") as f:
        seen = {"argv": sys.argv, "helper": VALUE, "known": known, "file": __file__}
        json.dump({**seen, "first": sys.path[0]}, f)
    sys.exit(7)
"""

MODULE = """
import json, sys
from .helper import VALUE
from transformers.training_args import OptimizerNames
if __name__ == "__main__":
    known = OptimizerNames("muonmax_momo").value
    with open("seen.json", "w") as f:
        json.dump({"argv": sys.argv, "helper": VALUE, "known": known, "file": __file__}, f)
    raise ValueError("an error of the module itself")
"""

ARGUMENTS = ["--help", "-m", "--", "", "two words", "--optim", "muonmax_momo", "-h", "key=a,b", "'\"$HOME"]


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_a_script_runs_as_if_it_were_run_alone(tmp_path):
    """Its arguments, name, neighbours and exit code are its own, and it knows the methods."""
    folder = tmp_path / "some folder"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("VALUE = 'beside the script'")
    result = run("-m", "hf_noneuclid", "some folder/script.py", *ARGUMENTS, cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "argv": ["some folder/script.py", *ARGUMENTS],
        "helper": "beside the script",
        "known": "muonmax_momo",
        "file": "some folder/script.py",
        "first": str(folder),
    }


def test_a_module_runs_as_if_it_were_run_alone(tmp_path):
    """A module of a package imports its siblings, and its errors end the process as Python's own do."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "module.py").write_text(MODULE)
    (package / "helper.py").write_text("VALUE = 'in the package'")
    result = run("-m", "hf_noneuclid", "-m", "package.module", *ARGUMENTS, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("ValueError: an error of the module itself")
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "argv": [str(package / "module.py"), *ARGUMENTS],
        "helper": "in the package",
        "known": "muonmax_momo",
        "file": str(package / "module.py"),
    }


WRONG_LINES = """
import json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

def outcome(*arguments):
    sys.argv = ["hf_noneuclid", *arguments]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_module("hf_noneuclid", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

lines = [[], ["-m"], ["--help"], ["missing.py", "--optim", "muon"], ["-m", "no_such_module"]]
print(json.dumps([outcome(*line) for line in lines]))
"""


def test_wrong_command_lines_say_what_is_wrong(tmp_path):
    result = run("-c", WRONG_LINES, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    nothing, no_module, asked, no_script, unknown = json.loads(result.stdout.splitlines()[-1])
    usage = "usage: python -m hf_noneuclid (SCRIPT | -m MODULE) [ARGUMENT ...]"
    for mistake in (nothing, no_module):
        assert mistake["code"] == 2
        assert mistake["err"].startswith(usage)
        assert mistake["out"] == ""
    assert asked["code"] == 0
    assert asked["out"].startswith(usage)
    # Text as the code of SystemExit is printed to stderr, and the process exits with 1.
    assert "there is no script 'missing.py'" in no_script["code"]
    assert usage in no_script["code"]
    assert "no_such_module" in str(unknown["code"])


BARE_IMPORT = """
import importlib.machinery, json, sys, torch
PACKAGES = ("transformers", "accelerate", "datasets", "deepspeed", "peft")

class Broken:
    '''Finds the packages and fails to load them, as an installation that does not fit together does.'''
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{spec.name} does not load")
    def exec_module(self, module):
        raise NotImplementedError

def absent():
    sys.modules.update(dict.fromkeys(PACKAGES))

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ImportError(f"{name} is refused")

def broken():
    for name in PACKAGES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Broken())

def refused():
    sys.meta_path.insert(0, Refused())

def message(ask):
    try:
        ask()
    except ImportError as error:
        return str(error)

def attempt(block):
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_noneuclid"]:
        del sys.modules[name]
    block()
    try:
        import hf_noneuclid
    except ImportError as error:
        return f"import hf_noneuclid: {error}"
    model = torch.nn.Linear(4, 8)
    optimizer = hf_noneuclid.create_optimizer(model, lr=1e-2)
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    return {
        "steps": optimizer.diagnostics()["steps"],
        "errors": [
            message(lambda: hf_noneuclid.NonEuclidTrainer),
            message(lambda: hf_noneuclid.NonEuclidTrainerMixin),
            message(hf_noneuclid.register),
        ],
        "imported": [name for name in PACKAGES if sys.modules.get(name)],
    }

print(json.dumps([attempt(block) for block in (absent, broken, refused)]))
"""


def test_the_package_needs_nothing_but_torch(tmp_path):
    """Where transformers is absent, broken or refused, only what needs it says so."""
    result = run("-c", BARE_IMPORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    attempts = json.loads(result.stdout.splitlines()[-1])
    assert [attempt for attempt in attempts if isinstance(attempt, str)] == []
    for attempt in attempts:
        assert attempt["steps"] == 1
        assert attempt["imported"] == []
        for error in attempt["errors"]:
            assert "pip install 'hf_noneuclid[trainer]'" in (error or "no ImportError was raised")
