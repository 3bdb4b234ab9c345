"""The command ``noneuclid``: it runs other people's scripts unchanged, and says what is wrong with a line."""

import json
import os
import subprocess
import sys

import pytest

import hf_noneuclid
from hf_noneuclid.cli import COMMANDS

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


@pytest.mark.parametrize("given", [[], ["run"]])
def test_a_script_runs_as_if_it_were_run_alone(tmp_path, given):
    """Its arguments, name, neighbours and exit code are its own, and it knows the methods."""
    folder = tmp_path / "some folder"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("VALUE = 'beside the script'")
    result = run("-m", "hf_noneuclid", *given, "some folder/script.py", *ARGUMENTS, cwd=tmp_path)
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


WRONG = {
    ("swep", "--suite", "mini"): "there is no command and no script 'swep'. Did you mean 'sweep'?",
    ("xyz",): "there is no command and no script 'xyz'. The commands are run, sweep, report,",
    ("missing.py", "--optim", "muon"): "there is no script 'missing.py'",
    ("run", "missing"): "there is no script 'missing'",
    ("-m", "no.such.module"): "there is no module 'no.such.module'",
    ("run", "-m", "json"): "there is no module 'json'",  # a package without a __main__
    ("-m", ".relative"): "there is no module '.relative'",
}
USAGE = {(): 2, ("-m",): 2, ("run",): 2, ("run", "-m"): 2, ("--help",): 0, ("run", "-h"): 0}
HELP = [(command, "--help") for command in COMMANDS if command != "run"]
ABSENT = [
    (("sweep", "--help"), "optuna"),
    (("report", "--help"), "matplotlib"),
    (("publish", "--study", "outputs/mini", "--namespace", "me"), "optuna"),
]

OUTCOMES = """
import json, os, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
import hf_noneuclid

def outcome(arguments, absent):
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        with open(read) as answer:
            text = answer.read()
        os.waitpid(process, 0)
        return json.loads(text)
    try:
        if absent:
            sys.modules[absent] = None
        sys.argv = ["hf_noneuclid", *arguments]
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_module("hf_noneuclid", run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as error:
                code = error.code or 0
        with open(write, "w") as answer:
            json.dump({"code": code, "out": out.getvalue(), "err": err.getvalue()}, answer)
    finally:
        os._exit(0)

print(json.dumps([outcome(*line) for line in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The exit code and output of every command line and package that is absent.

    Each is a fork of one process that has imported the package, because importing torch is slow.
    """
    folder = tmp_path_factory.mktemp("outcomes")
    (folder / "report").mkdir()  # a folder with the name of a command does not hide it
    lines = [*((line, None) for line in [*WRONG, *USAGE, ("--version",), *HELP]), *ABSENT]
    result = run("-c", OUTCOMES, json.dumps(lines), cwd=folder)
    assert result.returncode == 0, result.stderr
    return dict(zip(lines, json.loads(result.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_says_what_is_wrong(outcomes, line):
    outcome = outcomes[line, None]
    assert outcome["code"] == 2
    assert outcome["err"].startswith(f"noneuclid: {WRONG[line]}")
    assert outcome["out"] == ""


def test_a_command_line_without_a_command_shows_the_usage(outcomes):
    for line, code in USAGE.items():
        outcome = outcomes[line, None]
        assert outcome["code"] == code
        shown, other = ("out", "err") if code == 0 else ("err", "out")
        assert outcome[shown].startswith("usage: noneuclid ")
        assert "[run] (SCRIPT | -m MODULE) [ARGUMENT ...]" in outcome[shown]
        assert outcome[other] == ""
    for command in COMMANDS:
        assert f"\n  {command} " in outcomes[("--help",), None]["out"]


def test_the_version_is_the_packages(outcomes):
    expected = {"code": 0, "out": f"noneuclid {hf_noneuclid.__version__}\n", "err": ""}
    assert outcomes[("--version",), None] == expected


@pytest.mark.parametrize("line", HELP)
def test_every_command_has_a_help_text(outcomes, line):
    outcome = outcomes[line, None]
    assert outcome["code"] == 0, outcome
    assert outcome["out"].startswith(f"usage: noneuclid {line[0]} ")


@pytest.mark.parametrize(("line", "package"), ABSENT)
def test_a_command_names_the_optional_package_that_is_missing(outcomes, line, package):
    message = f"noneuclid {line[0]} needs the package {package}: pip install 'hf_noneuclid[recipes]'\n"
    assert outcomes[line, package] == {"code": 2, "out": "", "err": message}


def test_an_import_error_of_the_module_itself_is_not_hidden(tmp_path):
    """Neither when it runs nor when the package around it is imported."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("import no_such_dependency")
    (tmp_path / "broken" / "module.py").touch()
    result = run("-m", "hf_noneuclid", "-m", "broken.module", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("ModuleNotFoundError: No module named 'no_such_dependency'")


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


TRAINS = """
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64))
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
Trainer(model, args, train_dataset=rows).train()
print("it has trained")
"""


@pytest.mark.parametrize(("optim", "code"), [("muon", 0), ("sgd", 1)])
def test_routes_shows_the_matrices_of_a_script_and_does_not_train(tmp_path, optim, code):
    (tmp_path / "train.py").write_text(TRAINS)
    flags = ["--output_dir=out", "--use_cpu=true", "--report_to=none", "--max_steps=1", f"--optim={optim}"]
    result = run("-m", "hf_noneuclid", "routes", "train.py", *flags, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert ("matrices: 8 tensors, 6,144 elements" in result.stdout) is (optim == "muon")
    assert ("it has trained" in result.stdout) is (optim == "sgd")
    assert ("had made no optimizer of hf_noneuclid" in result.stderr) is (optim == "sgd")


def test_routes_shows_the_matrices_of_a_model(tmp_path):
    result = run("-m", "hf_noneuclid", "routes", "tiny", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "matrices: " in result.stdout
    assert run("-m", "hf_noneuclid", "routes", "tin", cwd=tmp_path, HF_HUB_OFFLINE="1").returncode == 2
