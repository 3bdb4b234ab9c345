"""Every option: what it refuses, its default, its text, and where a user reads of it."""

import inspect
import math
import pydoc
import types
from dataclasses import MISSING
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from hf_noneuclid import NonEuclideanDescent, create_optimizer
from hf_noneuclid.methods import method_options, parse_options
from hf_noneuclid.options import MethodOptions, Options, ParameterOptions, fields

KINDS = (Options, ParameterOptions, MethodOptions)
EVERY = [(kind, name) for kind in KINDS for name in fields(kind)]
OF_EACH = pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{k.__name__}-{n}" for k, n in EVERY])

NONSENSE = ["no such value", "", math.nan, math.inf, -math.inf, {}, 1j]
"""What no option takes."""

FRACTION = ([0, 0.0, 0.5, 0.999], [1, 1.0, -0.1, True])
POSITIVE = ([1, 0.5, 1e-30, 1e30], [0, 0.0, -1, True])
NOT_NEGATIVE = ([0, 0.0, 1, 0.5, 1e30], [-1, -1e-30, True])
COUNT = ([1, 5, 10**6], [0, -1, 1.0, 2.5, True])
BOOLEAN = ([True, False], [0, 1, "true", None])
LIMITS = {
    "first_step": POSITIVE,
    "loss_lower_bound": ([0.0, -3, 1e9], [True, None]),
    "momentum": FRACTION,
    "beta2": FRACTION,
    "eps": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "spectral_scale": POSITIVE,
    "polar_steps": COUNT,
    "reuse_gradients": BOOLEAN,
    "workspace": POSITIVE,
    "foreach": ([True, False, None], [0, 1, "true"]),
    "lr_scale": POSITIVE,
    "flatten": BOOLEAN,
    "matrix_lr_scale": POSITIVE,
}
"""Values at the limits of what an option takes, and values just beyond them."""


def construct(kind, name, value):
    """Makes an optimizer with an option, in the way in which a user gives options of this kind."""
    descent = {"descent": "constrained", "product_norm": "linf"}
    if kind is MethodOptions:
        model = torch.nn.Linear(2, 2)
        return create_optimizer(
            model, "noneuclid", lr=0.1, **{**descent, "vector_norm": "linf", name: value}
        ).param_groups[0]
    group = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "norm": "linf"}
    if kind is ParameterOptions:
        group[name] = value
    else:
        descent[name] = value
    return NonEuclideanDescent([group], 0.1, **descent).param_groups[0]


def rule_of(kind, name):
    return fields(kind)[name].metadata["rule"]


def names_of(hint):
    """The names that an option of this type takes."""
    if get_origin(hint) in (Union, types.UnionType):
        return [name for part in get_args(hint) for name in names_of(part)]
    return list(get_args(hint)) if get_origin(hint) is Literal else []


def types_of(hint):
    """The Python types of the values of an option of this type."""
    if get_origin(hint) in (Union, types.UnionType):
        return {x for part in get_args(hint) for x in types_of(part)}
    return {type(name) for name in get_args(hint)} if get_origin(hint) is Literal else {hint}


def accepted(kind, name):
    """Values that the option takes: at its limits, its names, and its default."""
    default = fields(kind)[name].default
    limits = LIMITS[name][0] if name in LIMITS else []
    return [*limits, *names_of(get_type_hints(kind)[name]), *([] if default is MISSING else [default])]


# -------------------------------------------------------------------- values


@OF_EACH
def test_nonsense_is_refused_in_the_words_of_the_option(kind, name):
    words = rule_of(kind, name).words
    for value in NONSENSE:
        with pytest.raises(ValueError, match=f"{name} must be ") as error:
            construct(kind, name, value)
        assert f"{name} must be {words}, not {value!r}." in str(error.value)


@OF_EACH
def test_an_option_takes_what_is_within_its_limits_and_nothing_beyond(kind, name):
    for value in accepted(kind, name):
        assert construct(kind, name, value)
    for value in LIMITS[name][1] if name in LIMITS else []:
        with pytest.raises(ValueError, match=f"{name} must be "):
            construct(kind, name, value)


@OF_EACH
def test_the_names_that_an_option_takes_are_in_its_words(kind, name):
    words = rule_of(kind, name).words
    assert all(choice in words for choice in names_of(get_type_hints(kind)[name]))


@OF_EACH
def test_a_default_satisfies_its_own_rule_and_is_what_the_optimizer_has(kind, name):
    default = fields(kind)[name].default
    if default is MISSING:
        assert name in ("descent", "product_norm", "norm", "vector_norm")
        return
    assert rule_of(kind, name).holds(default)
    if kind is not MethodOptions:
        group = NonEuclideanDescent(
            [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "norm": "linf"}],
            0.1,
            descent="constrained",
            product_norm="linf",
        ).param_groups[0]
        assert group[name] == default


# -------------------------------------------------------------------- text


@OF_EACH
def test_text_of_an_option_becomes_a_value_of_its_type(kind, name):
    hint, rule = get_type_hints(kind)[name], rule_of(kind, name)
    assert accepted(kind, name)
    for value in accepted(kind, name):
        parsed = rule.parse(str(value))
        assert parsed == value
        assert type(parsed) in types_of(hint)


@pytest.mark.parametrize("name", [name for name in method_options("noneuclid") if name in LIMITS])
def test_text_of_another_type_is_refused_in_the_words_of_the_option(name):
    (rule,) = {rule_of(kind, name) for kind in (Options, MethodOptions) if name in fields(kind)}
    with pytest.raises(ValueError, match=f"option {name} must be ") as error:
        parse_options({name: "no such value"})
    assert str(error.value) == f"option {name} must be {rule.words}, not 'no such value'."


# -------------------------------------------------------------------- what was removed


@pytest.mark.parametrize("rule", ["auto", "relative", "star"])
@pytest.mark.parametrize(
    "give",
    [
        lambda rule: construct(Options, "loss_lower_bound", rule),
        lambda rule: create_optimizer(torch.nn.Linear(2, 2), "muonmax_momo", lr=1.0, loss_lower_bound=rule),
        lambda rule: parse_options({"loss_lower_bound": rule}),
    ],
    ids=["optimizer", "method", "text"],
)
def test_a_rule_for_the_lower_bound_is_refused_with_what_to_use_now(give, rule):
    with pytest.raises(ValueError, match="loss_lower_bound must be a finite number") as error:
        give(rule)
    for part in (
        f"not '{rule}'",
        "auto, relative and star were removed",
        "step_size=momo+slope",
        "muonmax_momo",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["lower_bound_fraction", "lower_bound_horizon", "lower_bound_slack"])
def test_an_option_of_those_rules_is_unknown(name):
    with pytest.raises(TypeError, match=f"unknown option '{name}'; known are .*loss_lower_bound"):
        construct(Options, name, 0.5)
    with pytest.raises(ValueError, match=f"unknown option '{name}'; known are .*loss_lower_bound"):
        create_optimizer(torch.nn.Linear(2, 2), "muonmax_momo", lr=1.0, **{name: 0.5})


# -------------------------------------------------------------------- help and README


@OF_EACH
def test_help_names_every_option_with_what_it_means_and_takes(kind, name):
    field, text = fields(kind)[name], pydoc.plain(pydoc.render_doc(kind))
    (line,) = [line for line in text.splitlines() if line.strip(" |").startswith(f"{name}: ")]
    assert field.metadata["help"] in line
    assert field.metadata["rule"].words[1:] in line
    assert ("Default: " in line) == (field.default is not MISSING)
    assert field.default is MISSING or line.endswith(f"Default: {field.default}.")


def test_the_constructor_shows_every_option_as_a_keyword():
    parameters = inspect.signature(NonEuclideanDescent).parameters
    assert list(parameters) == ["params", "lr", *fields(Options)]
    for name, field in fields(Options).items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        expected = inspect.Parameter.empty if field.default is MISSING else field.default
        assert parameters[name].default == expected


ALL_OPTIONS = method_options("noneuclid", "momo+slope")
"""Of every method and both rules of the step size."""


def readme_rows():
    """The table of options in README: name to (values, default, meaning)."""
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| option | values | default | meaning |") + 2
    rows = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[name.strip("` ")] = cells
    return rows


def test_readme_has_a_row_for_every_option_of_a_method_and_no_other():
    assert sorted(readme_rows()) == sorted(ALL_OPTIONS)


@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_readme_says_what_an_option_takes_and_what_it_is_by_default(name):
    (kind,) = [kind for kind in (Options, MethodOptions) if name in fields(kind)]
    values, default, meaning = readme_rows()[name]
    hint, rule = get_type_hints(kind)[name], rule_of(kind, name)
    assert all(f"`{choice}`" in values for choice in names_of(hint))
    assert ("integer" in values) == (hint is int)
    assert meaning
    if fields(kind)[name].default is MISSING:
        assert default == "required"
    else:
        assert rule.parse(default.strip("`")) == fields(kind)[name].default


def test_a_method_with_momo_has_the_defaults_of_readme():
    group = create_optimizer(torch.nn.Linear(2, 2), "muonmax_momo", lr=1.0).param_groups[0]
    rows = readme_rows()
    assert f"`{group['step_size']}`" in rows.pop("step_size")[2]
    for name, (_, default, _) in rows.items():
        if name in fields(Options) and default != "required":
            assert group[name] == rule_of(Options, name).parse(default.strip("`")), name
