"""Suite files: which runs they stand for, and what is refused before anything runs."""

import math
from dataclasses import asdict, replace

import pytest
import yaml

from hf_noneuclid.experiments.common import InputError, recipes_folder
from hf_noneuclid.experiments.sweeping import suite_checks
from hf_noneuclid.experiments.sweeping.commands import (
    Launch,
    accumulation,
    as_arguments,
    command_of,
    recipe_flags,
)
from hf_noneuclid.experiments.sweeping.suite import Result, Run, Suite, load_suites

NAMES = sorted(path.stem for path in (recipes_folder() / "suites").glob("*.yaml"))
BASE = {
    "about": "Two methods.",
    "recipe": "pretrain",
    "options": {"max_steps": 3},
    "grid": [{"method": ["muon", "muon_momo"], "learning_rate": [1e-3, 1e-2, 1e-1]}],
}


def load_suite(*arguments):
    (suite,) = load_suites(*arguments)
    return suite


def write(folder, **changes):
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}), encoding="utf-8")
    return path


def load(folder, **changes):
    return load_suite(write(folder, **changes))


def ended(run, loss):
    return Result(run, "done" if math.isfinite(loss) else "diverged", loss if math.isfinite(loss) else None)


# ---------------------------------------------------------------- runs


def test_the_runs_are_the_union_of_the_products_of_the_blocks(tmp_path):
    grid = [
        {"method": "muon", "learning_rate": ["1e-3", 0.01]},
        {"method": ["muon", "muonmax_momo"], "learning_rate": 0.01, "options": {"max_steps": [4, 5]}},
        {"method": ["muon"], "learning_rate": [0.01, 0.1]},
    ]
    runs = load(tmp_path, grid=grid, seeds=[0, 7]).runs()
    points = {(run.method, run.learning_rate, tuple(run.options.items()), run.seed) for run in runs}
    plain = {("muon", rate, (), seed) for rate in (0.001, 0.01, 0.1) for seed in (0, 7)}
    cut = {
        (method, 0.01, (("max_steps", steps),), seed)
        for method in ("muon", "muonmax_momo")
        for steps in (4, 5)
        for seed in (0, 7)
    }
    assert points == plain | cut
    assert len(runs) == len(points)


def test_a_key_is_the_run_whatever_the_order_of_its_options():
    one = Run("muon", 0.1, 3, {"momentum": 0.9, "beta2": 0.8}, {"max_steps": 2})
    same = Run("muon", 0.1, 3, {"beta2": 0.8, "momentum": 0.9}, {"max_steps": 2})
    assert one.key == same.key
    assert hash(one) == hash(same)
    assert Run.from_key(one.key) == one
    for other in (replace(one, seed=4), replace(one, learning_rate=0.2)):
        assert other.key != one.key
        assert other.curve == one.curve
    assert replace(one, method_options={"momentum": 0.9}).curve != one.curve


def test_a_label_names_what_varies():
    run = Run("muon_momo", 0.1, 3, {"loss_lower_bound": 2.0}, {"bf16": True})
    assert run.label == "muon_momo, loss_lower_bound=2.0, bf16=true"


def test_a_suite_survives_being_stored(tmp_path):
    suite = load(tmp_path, more_seeds={"seeds": [1]}, report={"target_losses": [4.0]})
    assert Suite(**yaml.safe_load(yaml.safe_dump(asdict(suite)))) == suite


@pytest.mark.parametrize("name", NAMES)
def test_the_suites_can_be_run(name):
    overrides = {"train_files": str(recipes_folder() / "pretrain.py")} if name == "gpu" else {}
    for suite in load_suites(name, overrides):
        suite_checks.check_suite(suite, suite.launch["processes"] or 1)


def test_a_block_whose_column_names_an_option_is_a_block_for_each_value(tmp_path):
    """A study that was made with the blocks written out is of the same suite."""
    rest = {"method": ["muon", "scion"], "learning_rate": [1.0]}
    momentum = {"momentum": [0.9]}
    one = [
        {**rest, "column": "first_step", "method_options": {**momentum, "first_step": ["1e-8", "1e-2"]}},
        {**rest, "column": "max_steps", "options": {"max_steps": [4, 5]}},
        {**rest, "column": "anything", "method_options": momentum},
    ]
    several = [
        {**rest, "column": "1e-8", "method_options": {**momentum, "first_step": [1e-8]}},
        {**rest, "column": "1e-2", "method_options": {**momentum, "first_step": [1e-2]}},
        {**rest, "column": "4", "options": {"max_steps": [4]}},
        {**rest, "column": "5", "options": {"max_steps": [5]}},
        one[2],
    ]
    short, written_out = load(tmp_path, grid=one), load(tmp_path, grid=several)
    assert short == written_out
    assert [run.key for run in short.runs()] == [run.key for run in written_out.runs()]


def test_the_first_steps_stand_in_columns_as_they_are_written():
    for suite in load_suites("step_size_start"):
        runs = [run for run in suite.runs() if "first_step" in run.method_options]
        found = [(suite.block_of(run)["column"], run.method_options["first_step"]) for run in runs]
        assert list(dict.fromkeys(found)) == [(f"1e-{i}", float(f"1e-{i}")) for i in range(8, 1, -1)]


def test_the_variants_are_all_36_combinations():
    runs = load_suite("variants").runs()
    assert len({run.curve for run in runs}) == 36
    assert {len(run.method_options) for run in runs} == {4}


def test_the_batch_sizes_see_the_same_number_of_tokens():
    suite = load_suite("batch_size")
    tokens = {
        run.options["per_device_train_batch_size"] * run.options["max_steps"] * suite.options["block_size"]
        for run in suite.runs()
    }
    assert tokens == {307_200}


@pytest.mark.parametrize("name", ["paper_fineweb_124m", "paper_slimpajama_774m"])
@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_the_papers_batch_is_the_same_on_any_number_of_gpus(name, processes):
    suite = load_suite(name)
    flags = recipe_flags(suite, suite.runs()[0], processes)
    sequences = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"] * processes
    assert sequences * flags["block_size"] == 524_288


def test_the_step_size_is_chosen_on_five_tasks_and_judged_on_fifteen_others():
    dev, test = load_suites("step_size_dev"), load_suites("step_size_test")
    assert (len(dev), len(test)) == (5, 15)
    identities = [yaml.safe_dump([suite.recipe, suite.options, suite.start]) for suite in [*dev, *test]]
    assert len(set(identities)) == 20
    for suite in [*dev, *test]:
        columns = {block["column"] for block in suite.grid}
        assert {"tuned", "rule", "F* = 0", "AdamW"} <= columns
        for block in suite.grid:
            tuned = block["column"] in ("tuned", "AdamW")
            assert not tuned or len(block["learning_rate"]) == 4
            assert block.get("more_seeds", True) or not (tuned or block["column"] == "rule and Momo")
        flags = {run.method: recipe_flags(suite, run, 1) for run in suite.runs()[::-1]}
        assert {flags[method]["warmup_steps"] for method in ("scion", "muonmax")} == {0.1}


# ---------------------------------------------------------------- tasks

TASKS = {
    "grid": [
        {"method": ["muon", "scion"], "column": "tuned", "flags": {"warmup_steps": 0.1}},
        {"method": "prodigy", "learning_rate": 1.0, "column": "Prodigy", "more_seeds": False},
    ],
    "more_seeds": {"seeds": [1], "within_decades": 0},
    "tasks": {
        "short": {"learning_rate": {"muon": [1e-3, 1e-2], "scion": 0.1}},
        "words": {
            "about": "Told apart.",
            "recipe": "classify",
            "learning_rate": {"muon": 0.3, "scion": 0.3},
            "options": {"block_size": 8},
            "start": {"optim": "muon", "max_steps": 2},
        },
    },
}


def test_a_task_has_its_own_values_and_those_of_all(tmp_path):
    path = write(tmp_path, **TASKS)
    short, words = load_suites(path, {"bf16": True})
    assert (short.name, short.task, short.about, short.recipe) == (
        "toy/short",
        "short",
        BASE["about"],
        "pretrain",
    )
    assert (words.name, words.about, words.recipe) == ("toy/words", "Told apart.", "classify")
    assert short.options == {"max_steps": 3, "bf16": True}
    assert words.options == {"max_steps": 3, "block_size": 8, "bf16": True}
    assert (short.start, words.start) == ({}, {"optim": "muon", "max_steps": 2})
    rates = [(run.method, run.learning_rate) for run in short.runs()]
    assert rates == [("muon", 1e-3), ("muon", 1e-2), ("scion", 0.1), ("prodigy", 1.0)]
    assert load_suites(path, task="words")[0].runs()[0].learning_rate == 0.3
    with pytest.raises(InputError, match="there is no task 'long'; its tasks: short, words"):
        load_suites(path, task="long")


def test_a_block_gives_its_runs_flags_and_says_whether_they_get_further_seeds(tmp_path):
    suite = load_suites(write(tmp_path, **TASKS))[0]
    flags = [recipe_flags(suite, run, 1) for run in suite.runs()]
    assert [values.get("warmup_steps") for values in flags] == [0.1, 0.1, 0.1, None]
    assert [values.get("optim") for values in flags] == ["muon", "muon", "scion", None]
    assert flags[-1]["peer"] == "prodigy"
    wanted = suite.wanted([ended(run, 4.0 + run.learning_rate) for run in suite.runs()])
    assert [(run.method, run.learning_rate) for run in wanted if run.seed == 1] == [
        ("muon", 1e-3),
        ("scion", 0.1),
    ]
    assert suite.block_of(replace(suite.runs()[0], learning_rate=7.0))["column"] == "tuned"
    assert suite.block_of(replace(suite.runs()[0], method_options={"eps": 1e-6})) == {}


def test_a_suite_with_tasks_survives_being_stored(tmp_path):
    for suite in load_suites(write(tmp_path, **TASKS)):
        assert Suite(**yaml.safe_load(yaml.safe_dump(asdict(suite)))) == suite


# ---------------------------------------------------------------- further learning rates


@pytest.mark.parametrize(
    ("best", "added"),
    [
        (1e-4, [3e-4, 1e-4]),  # the last one allowed is at the end again
        (3e-4, [3e-4, 1e-4]),
        (1e-3, [3e-4]),
        (3e-3, []),
        (3e-2, [3e-2, 1e-1]),
    ],
)
def test_learning_rates_are_added_beyond_an_end_until_the_best_is_inside(tmp_path, best, added):
    grid = [{"method": "muon", "learning_rate": [1e-3, 3e-3, 1e-2]}]
    suite = load(tmp_path, grid=grid, more_rates=2, more_seeds={"seeds": [1], "within_decades": 0})
    found = []
    for _ in range(9):
        waiting = [run for run in suite.wanted(found) if run not in {result.run for result in found}]
        assert set(waiting) <= set(suite.possible_runs())
        found += [ended(run, 4 + abs(math.log10(run.learning_rate / best))) for run in waiting]
    first = suite.runs()
    later = [result.run for result in found if result.run not in first and result.run.seed == 0]
    assert [run.learning_rate for run in later] == pytest.approx(added)
    assert [run.learning_rate for run in suite.wanted(found) if run.seed == 1] == pytest.approx([best])


def test_two_learning_rates_are_no_grid_to_extend(tmp_path):
    suite = load(tmp_path, grid=[{"method": "muon", "learning_rate": [1e-3, 3e-3]}], more_rates=2)
    assert suite.wanted([ended(run, run.learning_rate) for run in suite.runs()]) == suite.runs()


# ---------------------------------------------------------------- further seeds


def test_further_seeds_follow_when_a_curve_is_complete_and_near_its_best_only(tmp_path):
    suite = load(tmp_path, more_seeds={"seeds": [1, 2], "within_decades": 1.0})
    first = suite.runs()
    losses = {1e-3: 3.0, 1e-2: 4.0, 1e-1: math.inf}
    muon = [run for run in first if run.method == "muon"]
    found = [ended(run, losses[run.learning_rate]) for run in muon]
    assert suite.wanted([]) == first
    assert suite.wanted(found[:2]) == first
    waiting = [*found[:2], Result(muon[2], "running")]
    assert suite.wanted(waiting) == first

    added = [run for run in suite.wanted(found) if run not in first]
    assert {(run.method, run.learning_rate, run.seed) for run in added} == {
        ("muon", rate, seed) for rate in (1e-3, 1e-2) for seed in (1, 2)
    }
    # What the further seeds bring does not move the choice.
    later = [*found, *(ended(run, 0.1 if run.learning_rate == 1e-2 else 9.0) for run in added)]
    assert suite.wanted(later) == suite.wanted(found)


def test_a_failed_run_does_not_hold_up_the_seeds_of_its_curve(tmp_path):
    suite = load(tmp_path, more_seeds={"seeds": [1], "within_decades": 0})
    muon = [run for run in suite.runs() if run.method == "muon"]
    found = [Result(muon[0], "failed"), ended(muon[1], 4.0), ended(muon[2], 5.0)]
    assert replace(muon[1], seed=1) in suite.wanted(found)


def test_a_curve_that_always_diverges_gets_no_further_seeds(tmp_path):
    suite = load(tmp_path, more_seeds={"seeds": [1], "within_decades": 9})
    assert suite.wanted([ended(run, math.inf) for run in suite.runs()]) == suite.runs()


# ---------------------------------------------------------------- commands


def test_the_flags_of_a_run(tmp_path):
    grid = [{"method": "muon_momo", "learning_rate": 0.1, "method_options": {"loss_lower_bound": [2.0]}}]
    options = {
        "optim_args": "momentum=0.9",
        "bf16": False,
        "seed_of": None,
        "files": ["a", "b"],
        "extra": {"x": 1},
    }
    suite = load(tmp_path, grid=grid, options=options, per_method={"muon_momo": {"weight_decay": 0.1}})
    arguments = as_arguments(recipe_flags(suite, suite.runs()[0], 1))
    for expected in (
        "--optim=muon_momo",
        "--learning_rate=0.1",
        "--seed=0",
        "--bf16=false",
        "--weight_decay=0.1",
    ):
        assert expected in arguments
    assert "--optim_args=momentum=0.9,loss_lower_bound=2.0" in arguments
    assert arguments[arguments.index("--files") + 1 :][:2] == ["a", "b"]
    assert '--extra={"x": 1}' in arguments
    assert not any(argument.startswith("--seed_of") for argument in arguments)


def test_accelerate_starts_the_runs_that_need_more_than_one_process():
    assert "accelerate.commands.launch" not in command_of("pretrain", Launch(), {})
    command = command_of("pretrain", Launch(processes=4, gpus=("0", "1", "2", "3")), {})
    assert "--num_processes=4" in command
    assert command[-1].endswith("pretrain.py")
    with_file = command_of("pretrain", Launch(processes=2, accelerate_config="fsdp2.yaml"), {})
    assert "--config_file=fsdp2.yaml" in with_file


def test_runs_of_different_slots_take_different_gpus():
    launch = Launch(processes=2, gpus=("4", "5", "6", "7"))
    devices = [launch.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert devices == ["4,5", "6,7", "4,5"]


@pytest.mark.parametrize("processes", [3, 1024])
def test_a_global_batch_that_cannot_be_cut_is_refused(processes):
    with pytest.raises(InputError, match="not a multiple of 4"):
        accumulation({"global_batch_size": 512, "per_device_train_batch_size": 4}, processes)


# ---------------------------------------------------------------- bad input

MUON = {"method": "muon", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": []}, "unknown key 'grids'; known are about, recipe"),
        ({"grid": []}, "grid is missing or empty"),
        ({"about": ""}, "about is missing"),
        ({"recipe": "train"}, "unknown recipe 'train'; known are pretrain"),
        ({"grid": [{"method": "muon"}]}, "grid block 1: learning_rate is missing or empty"),
        ({"grid": [{**MUON, "lr": [1]}]}, "unknown key 'lr'; known are method, learning_rate"),
        ({"grid": [{**MUON, "learning_rate": [0.0]}]}, "expected a number above 0, found 0.0"),
        ({"grid": [{**MUON, "learning_rate": [True]}]}, "found True"),
        ({"grid": [{**MUON, "learning_rate": ["nan"]}]}, "found 'nan'"),
        ({"grid": [{**MUON, "options": {"max_steps": []}}]}, "max_steps is missing or empty"),
        ({"grid": ["muon"]}, "grid block 1: expected `key: value` lines, found 'muon'"),
        ({"options": {"seed": 3}}, "seed is set by the sweep"),
        ({"options": {"train_files": "REQUIRED"}}, "--option train_files="),
        ({"per_method": {"scion": {}}}, "scion is not in the grid; it has muon, muon_momo"),
        ({"seeds": ["a"]}, "expected a list of integers"),
        ({"more_seeds": {"seed": [1]}}, "unknown key 'seed'; known are seeds, within_decades"),
        ({"more_rates": -1}, "more_rates: expected an integer of at least 0, found -1"),
        ({"start": {"output_dir": "x"}}, "start: output_dir is set by the sweep"),
        ({"grid": [{**MUON, "flags": {"seed": 1}}]}, "seed is set by the sweep"),
        ({"grid": [{"method": "muon"}], "tasks": {"a": {}}}, "task a: learning_rate lacks muon"),
        ({"tasks": {"a": {"seeds": [1]}}}, "task a: unknown key 'seeds'; known are about, recipe"),
        ({"launch": {"threads": 0}}, "threads must be an integer of at least 1, not 0"),
    ],
)
def test_a_malformed_suite_is_refused_in_words(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        load(tmp_path, **changes)
    assert message in str(caught.value)
    assert "toy.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": [{**MUON, "method": "moun"}]}, "unknown method 'moun'; known are muon, scion"),
        (
            {"grid": [{**MUON, "method_options": {"momento": [1]}}]},
            "unknown option 'momento'; known are beta2",
        ),
        ({"grid": [{**MUON, "method_options": {"loss_lower_bound": [1]}}]}, "unknown option"),
        ({"grid": [{**MUON, "method_options": {"momentum": [1.5]}}]}, "momentum must be a number in [0, 1)"),
        ({"grid": [{**MUON, "method": "noneuclid"}]}, "missing descent"),
        ({"options": {"max_step": 3}}, "no option 'max_step'; similar ones are max_steps"),
        ({"options": {"max_steps": "many"}}, "invalid int value: 'many'"),
        ({"options": {"train_files": ["/nowhere/a.txt"]}}, "there is no file /nowhere/a.txt"),
    ],
)
def test_what_does_not_exist_is_refused_in_words(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        suite_checks.check_suite(load(tmp_path, **changes), 1)
    assert message in str(caught.value)


def test_an_unknown_suite_names_the_known_ones():
    with pytest.raises(
        InputError,
        match="unknown suite 'maxi': give one of batch_size, finetune_mini, gpu, mini",
    ):
        load_suite("maxi")


def test_a_suite_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("grid: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_suite(path)
    with pytest.raises(InputError, match=r"missing\.yaml"):
        load_suite(tmp_path / "missing.yaml")
