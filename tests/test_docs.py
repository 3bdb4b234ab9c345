"""The pages of documentation: their links, commands, options and Python code are those of the repository."""

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import hf_noneuclid
from hf_noneuclid import cli
from hf_noneuclid.methods import parse_options

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "recipes/README.md",
    "recipes/results/README.md",
    "accelerate_configs/README.md",
    ".github/CONTRIBUTING.md",
)
RECIPES = ("pretrain", "finetune", "classify", "digits")
COMMANDS = ("sweep", "report", "routes", "plan", "benchmark", "publish")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, *languages):
    return [body for language, body in BLOCK.findall(text_of(page)) if language in languages]


def table(page, first):
    """The rows of the table whose head begins with a cell, as lists of cells."""
    lines = text_of(page).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# ---------------------------------------------------------------- pages and links


def test_the_readme_has_at_most_ten_kilobytes():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def anchors(path):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^()\s]+)\)", BLOCK.sub("", text_of(page)))
    relative = [link for link in links if not link.startswith("https://")]
    assert relative
    for link in relative:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}, which has no such heading"


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\(([^()\s#]+)", text_of("README.md")))
    assert set(PAGES) - {"README.md"} <= linked


# ---------------------------------------------------------------- code


def test_the_python_code_of_the_readme_runs(tmp_path):
    code = blocks("README.md", "python")
    assert len(code) == 3
    (tmp_path / "readme.py").write_text("\n".join([*code, "print(optimizer.diagnostics()['steps'])"]))
    result = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "1"


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_job_scripts_are_well_formed(page):
    for body in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(body), dict)
    for body in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=body, text=True, check=True)


# ---------------------------------------------------------------- commands


def lines_of_commands(page):
    """Every command in the blocks of a page, as a list of words."""
    for body in blocks(page, "", "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def program(words):
    """What a command of this repository runs, such as ("noneuclid", "sweep"), and its arguments; or None."""
    for i, word in enumerate(words):
        if recipe := re.fullmatch(r"recipes/(\w+)\.py", word):
            return ("recipe", recipe[1]), words[i + 1 :]
        if word in ("noneuclid", "hf_noneuclid") and i + 1 < len(words):
            # What follows is somebody else's script if it is not a command.
            return (("noneuclid", words[i + 1]), words[i + 2 :]) if words[i + 1] in COMMANDS else None
    return None


@cache
def help_of(kind, name):
    """What --help_all of a recipe or --help of a command prints, in this process.

    Importing transformers again for each would take long.
    """
    script = str(ROOT / "recipes" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [script, "--help_all"])
        try:
            runpy.run_path(script, run_name="__main__") if kind == "recipe" else cli.main([name, "--help"])
        except SystemExit as end:
            assert end.code == 0  # noqa: PT017 (argparse ends the process after --help)
    return printed.getvalue()


def flags_of(kind, name):
    return set(re.findall(r"--\w+", help_of(kind, name)))


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_command_is_known_to_it(page):
    for words in lines_of_commands(page):
        found = program(words)
        if found is None:
            continue
        (kind, name), arguments = found
        flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert flags <= flags_of(kind, name), shlex.join(words)


def test_every_flag_in_the_text_is_known_somewhere():
    known = set().union(
        *(flags_of("recipe", name) for name in RECIPES), *(flags_of("noneuclid", name) for name in COMMANDS)
    )
    for page in PAGES:
        named = set(re.findall(r"`(--\w+)", BLOCK.sub("", text_of(page))))
        assert named <= known, page


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_recipe_named_exists(page):
    text = text_of(page)
    for name in re.findall(r"(?:^|`|exec |-m hf_)noneuclid ([a-z]+)\b(?!\.)", text, re.MULTILINE):
        assert name in ("run", *COMMANDS), f"{page} names the command noneuclid {name}"
    for name in re.findall(r"recipes/\w+\.py", text):
        assert (ROOT / name).is_file(), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_command_reads_exists(page):
    for words in lines_of_commands(page):
        for flag, value in pairwise(words):
            if flag in ("--config_file", "--config"):
                assert (ROOT / value).is_file(), shlex.join(words)
            if flag == "--suite":
                assert (ROOT / "recipes/suites" / f"{value}.yaml").is_file(), shlex.join(words)


def test_the_table_of_suites_names_every_suite():
    named = {
        name for first, *_ in table("recipes/README.md", "suite") for name in re.findall(r"`(\w+)`", first)
    }
    assert named == {path.stem for path in (ROOT / "recipes/suites").glob("*.yaml")}


# ---------------------------------------------------------------- options


OPTIONS = {
    name.strip("`"): (values, default.strip("`")) for name, values, default, _ in table("README.md", "option")
}
REQUIRED = [name for name, (_, default) in OPTIONS.items() if default == "required"]
CHOICES = {
    "descent": "regularized",
    "product_norm": "hybrid",
    "vector_norm": "ada_l2",
    "step_size": "momo+slope",  # it takes the options of both rules
}
SAMPLES = {  # values that a range holds, and values that it does not
    "[0, 1)": (["0", "0.99"], ["1", "-0.1"]),
    "> 0": (["1e-3", "1000"], ["0", "-1"]),
    "≥ 0": (["0", "1000"], ["-1"]),
    "≥ 1": (["1", "1.5", "1000"], ["0.5"]),
    "integer ≥ 1": (["1"], ["0", "1.5"]),
}


def samples(values):
    if values in SAMPLES:
        return SAMPLES[values]
    names = re.findall(r"`([\w+]+)`", values)
    return [*names, *(["-1.5"] if values.startswith("number") else [])], ["nothing"]


def settings(**options):
    """What the parameter groups of the free method hold, beside the parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = hf_noneuclid.create_optimizer(model, "noneuclid", lr=1e-2, **{**CHOICES, **options})
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def test_the_table_of_options_is_complete():
    with pytest.raises(ValueError, match="known are") as refusal:
        settings(nothing=1)
    known = re.search(r"known are ([\w, ]+)", str(refusal.value))[1]
    assert set(OPTIONS) == set(known.split(", "))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in CHOICES])
def test_the_documented_default_is_what_holds_without_the_option(name):
    _, default = OPTIONS[name]
    assert settings(**parse_options({name: default})) == settings()
    accepted = [parse_options({name: text}) for text in samples(OPTIONS[name][0])[0]]
    assert any(settings(**options) != settings() for options in accepted)  # the groups do hold the option


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_option_is_required(name):
    others = {key: value for key, value in CHOICES.items() if key != name}
    with pytest.raises(ValueError, match=f"missing {name}"):
        hf_noneuclid.create_optimizer(torch.nn.Linear(4, 8), "noneuclid", lr=1e-2, **others)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_takes_the_documented_values_and_no_others(name):
    accepted, refused = samples(OPTIONS[name][0])
    assert accepted
    for text in accepted:
        settings(**parse_options({name: text}))
    for text in refused:
        with pytest.raises(ValueError, match=name):
            settings(**parse_options({name: text}))


def test_the_table_of_methods_is_that_of_the_code():
    named = {}
    for row in table("README.md", "`--optim`"):
        name, *choices = [re.sub(r"`.*", "", cell.removeprefix("`")) for cell in row[:4]]
        named[name] = tuple(choices)
    methods = {
        name: (method.descent, method.product_norm, method.vector_norm)
        for name, method in hf_noneuclid.METHODS.items()
        if not method.momo
    }
    assert {name: named.get(name) for name in methods} == methods
