"""The report of a study: what it measures, what it says of it, and that it always says the same."""

import json
import math
import shutil
from dataclasses import asdict, replace

import optuna
import pytest

from hf_noneuclid.experiments import report as command
from hf_noneuclid.experiments.common import InputError, recipes_folder
from hf_noneuclid.experiments.reporting import curves, figures, measures, panels
from hf_noneuclid.experiments.reporting.report import report, report_tasks
from hf_noneuclid.experiments.reporting.summary import summarise
from hf_noneuclid.experiments.reporting.tables import setting_names
from hf_noneuclid.experiments.reporting.tasks import excess
from hf_noneuclid.experiments.reporting.text import markdown, paper_section
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study
from hf_noneuclid.experiments.sweeping.suite import Result, Suite

INF = math.inf
RATES = [1e-3, 1e-2, 1e-1, 1.0]
PNG = b"\x89PNG"


def make_suite(*blocks, seeds=(0,), settings=None):
    return Suite(
        name="tiny",
        about="A comparison for the tests.",
        recipe="pretrain",
        options={"max_steps": 10},
        grid=[{"method_options": {}, "options": {}, **block} for block in blocks],
        per_method={},
        seeds=list(seeds),
        more_seeds={"seeds": [], "within_decades": 0.0},
        report=settings or {},
        launch={"processes": 1, "accelerate_config": None, "threads": 1},
    )


def history(loss, rate, seconds=20.0):
    rows = [
        {
            "step": step,
            "loss": loss + 1 / step,
            "learning_rate": rate,
            "step_size": min(rate, 0.02),
        }
        for step in (2, 4, 6, 8, 10)
    ]
    evaluations = [{"step": step, "eval_loss": loss + (10 - step) / 10} for step in (5, 10)]
    return [*rows, *evaluations, {"step": 10, "train_runtime": seconds}]


def ended(run, loss):
    """A run that ended with this loss, or that diverged."""
    metrics = {
        "steps": 10,
        "tokens": 640,
        "versions": {"torch": "2.0"},
        "hardware": {"cpu": "a processor", "gpu": None, "threads": 1, "processes": 2},
        "corpus": {"name": "words", "train_sha256": "abc"},
        "command": ["--output_dir", "/somewhere/else", "--seed", "0"],
    }
    if math.isinf(loss):
        log = [*history(9.0, run.learning_rate)[:2], {"step": 5, "loss": math.nan}]
        return Result(run, "diverged", None, 5, 10.0, {"reason": "NaN"}, log)
    return Result(run, "done", loss, None, 36.0, metrics, history(loss, run.learning_rate))


def all_ended(suite, loss):
    return [ended(run, loss(run)) for run in suite.runs()]


def bowl(run):
    """A loss with its minimum at 1e-2, flatter above it with Momo; without, 1.0 diverges."""
    offset = math.log10(run.learning_rate) + 2
    momo = run.method.endswith("_momo")
    if not momo and offset > 1.5:
        return INF
    return 4 + 0.01 * run.seed + (offset**2 if offset < 0 or not momo else 0.1 * offset**2)


def written(suite, results, folder):
    report(suite, results, folder)
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), (
        folder / "report.md"
    ).read_text(encoding="utf-8")


def only(summary):
    """What is said of the setting of a suite that has one."""
    (setting,) = summary["settings"]
    return setting


def table_of(text, section, setting=None, skip=0):
    """The rows of a table of a section, each as a dictionary."""
    part = text.split(f"## {section}")[1].split("\n## ")[0]
    part = part.split(f"### {setting}\n")[1].split("\n### ")[0] if setting else part
    tables = [block for block in map(str.strip, part.split("\n\n")) if block.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in tables[skip].splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture
def pair():
    """muon with and without Momo, three seeds, all ended."""
    suite = make_suite({"method": ["muon", "muon_momo"], "learning_rate": RATES}, seeds=(0, 1, 2))
    return suite, all_ended(suite, bowl)


# ---------------------------------------------------------------- tasks

GRID = [
    {"method": ["muon", "scion"], "learning_rate": [1e-3, 1e-2, 1e-1], "column": "tuned"},
    {
        "method": ["muon", "scion"],
        "learning_rate": [1.0],
        "method_options": {"step_size": ["slope"]},
        "column": "rule",
    },
    {"method": ["adamw_torch"], "learning_rate": [1e-2], "column": "AdamW"},
]


def task(name, place, losses, tuned=4.0):
    """A task: tuned methods are best at 1e-2, and the others end at the given losses, by method."""

    def loss(run):
        if run.method == "adamw_torch":
            return losses.get("AdamW", 4.1) + run.seed
        if "step_size" in run.method_options:
            return losses.get(run.method, 5.0)
        return tuned + 0.1 * abs(math.log10(run.learning_rate) + 2) + 0.5 * run.seed

    suite = replace(make_suite(*GRID, settings={"place": place}), name=f"tiny/{name}", seeds=[0])
    more = replace(suite, more_seeds={"seeds": [1], "within_decades": 0.0})
    return more, [
        ended(run, loss(run)) for run in (*suite.runs(), *(r for r in more.possible_runs() if r.seed))
    ]


def test_tasks_stand_in_one_table_in_the_order_of_the_suite(tmp_path):
    found = [task("late", 1, {"muon": 4.02, "scion": INF}), task("early", 0, {"muon": 4.4, "AdamW": 3.9})]
    report_tasks(found, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = table_of(text, "muon")
    assert [row["task"] for row in rows] == ["early", "late"]
    # The tuned mean is over both seeds, 4.0 and 4.5; the rule has 4.4 and 4.4, 3.5 % more over them.
    assert [row["tuned"] for row in rows] == ["4.2500 at 0.01", "4.2500 at 0.01"]
    assert [row["rule"] for row in rows] == ["4.4000 (+3.5 %)", "4.0200 (-5.4 %)"]
    assert [row["AdamW"] for row in rows] == ["4.4000 (+3.5 %)", "4.6000 (+8.2 %)"]
    counts = {row["of 2 tasks"]: row for row in table_of(text, "muon", skip=1)}
    assert (counts["rule"]["within 1 % of tuned"], counts["rule"]["worse than 3 %"]) == ("1", "1")
    assert (counts["rule"]["ahead of AdamW"], counts["rule"]["over 1 % behind it"]) == ("1", "0")
    late = table_of(text, "scion")[1]
    assert late["rule"] == "diverged"
    assert table_of(text, "scion", skip=1)[1]["worse than 3 %"] == "2"
    assert (tmp_path / "excess.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"0": 4.2, "1": 9.0}, {"0": 4.0}, 5.0),  # over the seeds of both
        ({"0": 0.003}, {"0": 0.002}, 1.0),  # of 0.1 nats
        ({"0": 4.0}, {"1": 4.0}, None),
        (None, {"0": 4.0}, INF),
        ({"0": 4.0}, None, -INF),
        (None, None, None),
    ],
)
def test_the_excess_over_another_loss(ours, theirs, expected):
    entries = [{"losses": losses or {}, "diverged": losses is None} for losses in (ours, theirs)]
    assert excess(*entries) == (None if expected is None else pytest.approx(expected))


def test_a_best_learning_rate_at_an_end_is_marked_and_what_is_missing_is_said(tmp_path):
    suite, results = task("one", 0, {"muon": 4.0})
    few = [result for result in results if result.run.learning_rate != 1e-1 and result.run.seed == 0]
    report_tasks([(suite, few[:2])], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**Unfinished: " in text
    (row,) = table_of(text, "muon")
    assert (row["tuned"], row["rule"]) == ("4.0000 at 0.01", "-")
    lowest = [replace(result, loss=1.0) if result.run.learning_rate == 1e-3 else result for result in results]
    report_tasks([(suite, lowest)], tmp_path)
    assert table_of((tmp_path / "report.md").read_text(encoding="utf-8"), "muon")[0]["tuned"].endswith("*")


def test_tasks_and_columns_without_a_run_are_reported_and_refused_tasks_left_out(tmp_path, capsys):
    """A task that the sweep refused has a study, and no suite in it."""
    (begun, found), (waiting, _) = task("begun", 1, {}), task("waiting", 0, {})
    store(tmp_path / "begun", begun, [result for result in found if result.run.method != "adamw_torch"])
    store(tmp_path / "waiting", waiting, [])
    open_study(default_storage(tmp_path / "refused"), "tiny/refused", suite=waiting)
    command.main([f"--study={tmp_path}"])
    assert "left out: study tiny/refused holds no suite" in capsys.readouterr().err
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    rows = table_of(text, "muon")
    assert [row["task"] for row in rows] == ["waiting", "begun"]
    assert {rows[0][name] for name in ("tuned", "rule", "AdamW")} == {rows[1]["AdamW"]} == {"-"}
    counts = table_of(text, "muon", skip=1)[0]
    assert (counts["within 1 % of tuned"], counts["ahead of AdamW"]) == ("1", "-")
    assert table_of(text, "What was run")[0]["parameters"] == "-"


def test_tasks_without_any_result_are_an_error(tmp_path):
    with pytest.raises(InputError, match="no run has ended yet"):
        report_tasks([(task("one", 0, {})[0], [])], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_report_of_tasks_is_written_again_from_its_results(tmp_path, capsys):
    commit = {"commit": {"id": "0123abc", "clean": True}}
    suite, results = task("one", 0, {"muon": 4.0, "scion": INF})
    results = [replace(result, metrics={**result.metrics, **commit}) for result in results]
    report_tasks([(suite, results), task("two", 1, {})], tmp_path / "first")
    stored = json.loads((tmp_path / "first" / "results.json").read_text(encoding="utf-8"))
    assert {row["commit"]["id"] for row in stored["tasks"][0]["runs"]} == {"0123abc"}
    text = (tmp_path / "first" / "report.md").read_text(encoding="utf-8")
    assert "- Commits: clean True, id 0123abc" in text
    command.main([f"--results={tmp_path / 'first'}", f"--output_dir={tmp_path / 'again'}"])
    for name in ("report.md", "results.json", "excess.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


# ---------------------------------------------------------------- basin width


@pytest.mark.parametrize(
    ("losses", "width", "at_least"),
    [
        ([6.0, 4.0, 4.0, 6.0], 2.0, False),  # half a decade on each side of the middle one
        ([4.0, 4.0, 4.0, 4.0], 3.0, True),
        ([4.0, 6.0, 6.0, 6.0], 0.5, True),
        ([6.0, 6.0, 6.0, 6.0], 0.0, False),
        ([6.0, 4.0, INF, INF], 0.5, False),  # up to the last good grid point, and no further
        ([INF, 4.0, INF, INF], 0.0, False),
        ([6.0, 4.0, None, 6.0], 0.5, True),  # behind a hole it may go on
        ([4.0, 6.0, 6.0, 4.0], 1.0, True),  # two intervals
        ([6.0, 5.0, 6.0, 6.0], 0.0, False),  # touches the threshold in one point
        ([5.0, 4.0, 8.0, 8.0], 1.25, True),  # a quarter of the way from 4 to 8
    ],
)
def test_basin_width_by_hand(losses, width, at_least):
    found = measures.basin(RATES, losses, threshold=5.0)
    assert found.width == pytest.approx(width)
    assert found.at_least is at_least


def test_disjoint_basins_add_up_and_are_named():
    found = measures.basin([1e-4, *RATES], [6.0, 4.0, 6.0, 4.0, 6.0], threshold=5.0)
    assert found.width == pytest.approx(2.0)
    assert [pytest.approx(ends, rel=1e-4) for ends in found.intervals] == [
        (10**-3.5, 10**-2.5),
        (10**-1.5, 10**-0.5),
    ]
    assert not found.at_least


def test_a_basin_ends_exactly_at_a_grid_point_beside_a_diverged_run():
    assert measures.basin(RATES, [6.0, 4.0, 4.0, INF], 5.0).intervals[0][1] == 0.1


def test_the_basin_of_every_method_is_measured_from_the_best_of_all():
    suite = make_suite({"method": ["muon", "scion"], "learning_rate": RATES})
    summary, _ = summarise(suite, all_ended(suite, lambda run: bowl(run) + (run.method == "scion")))
    muon, scion = only(summary)["curves"]
    assert muon["basins"]["10%"]["threshold"] == scion["basins"]["10%"]["threshold"] == pytest.approx(4.4)
    assert scion["basins"]["10%"]["decades"] == 0  # its best, 5, is further away than that
    assert muon["basins"]["10%"]["decades"] == pytest.approx(0.8)  # 0.4 of a decade each side


# ---------------------------------------------------------------- regret and robustness


def test_regret_is_zero_at_the_best_and_infinite_where_a_run_diverged():
    assert measures.regret([5.0, 4.0, INF, None], 1) == [1.0, 0.0, INF, None]
    assert measures.regret([None, INF], None) == [None, None]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5.0, 4.0, 4.5, 9.0], (1.0, False)),
        ([4.0, 4.5, 9.0, 9.0], (0.5, True)),  # nobody looked below the best
        ([5.0, 4.0, None, 9.0], (1.0, True)),
        ([5.0, 4.0, INF, 9.0], (INF, False)),
        ([None, INF, INF, INF], (None, False)),
    ],
)
def test_robustness_is_the_largest_regret_within_a_decade(losses, expected):
    assert measures.robustness(RATES, losses, measures.best_index(losses)) == expected


def test_a_grid_with_nothing_near_a_decade_away_bounds_robustness_from_below():
    assert measures.robustness([1e-3, 1e-2, 1.0], [5.0, 4.0, 4.2], 1) == (1.0, True)


def test_a_learning_rate_that_is_nearly_a_decade_away_counts_as_one():
    assert measures.robustness([1.1e-3, 1e-2, 9e-2], [5.0, 4.0, 4.2], 1) == (1.0, False)


# ---------------------------------------------------------------- means over seeds


def test_best_loss_is_the_lowest_mean_over_seeds(pair):
    summary, _ = summarise(*pair)
    best = only(summary)["curves"][0]["best"]
    assert (best["learning_rate"], best["seeds"]) == (1e-2, 3)
    assert best["loss"] == pytest.approx(4.01)
    assert best["std"] == pytest.approx(0.01)  # of 4.00, 4.01, 4.02: the sample's


def test_the_best_has_as_many_seeds_as_any_learning_rate():
    """A single lucky seed far from the best would else be called the best."""
    suite = make_suite({"method": ["muon"], "learning_rate": [1e-3, 1e-2, 1e-1]}, seeds=(0, 1))
    losses = {(1e-3, 0): 4.5, (1e-2, 0): 4.1, (1e-2, 1): 4.3, (1e-1, 0): 4.4, (1e-1, 1): 4.6}
    runs = [run for run in suite.runs() if (run.learning_rate, run.seed) in losses]
    known = [ended(run, losses[run.learning_rate, run.seed]) for run in runs]
    known[0] = replace(known[0], loss=4.0)
    (curve,) = curves.build_curves(suite.runs(), known)
    assert (curve.best.learning_rate, curve.best.loss) == (1e-2, pytest.approx(4.2))
    assert curve.points[0].loss == 4.0


def test_one_seed_has_no_deviation(tmp_path):
    suite = make_suite({"method": ["muon"], "learning_rate": RATES})
    _, text = written(suite, all_ended(suite, bowl), tmp_path)
    assert "4.0000 ± -" in text


def test_a_learning_rate_with_a_diverged_seed_is_never_the_best(pair):
    suite, results = pair
    worst = next(r for r in results if r.run.method == "muon" and r.run.learning_rate == 1e-2)
    results[results.index(worst)] = ended(worst.run, INF)
    summary, _ = summarise(suite, results)
    muon = only(summary)["curves"][0]
    assert muon["best"]["learning_rate"] != 1e-2
    assert muon["points"][1]["loss"] is None
    assert muon["points"][1]["diverged"] == 1
    assert muon["points"][1]["diverged_at"] == [5]


def test_options_that_do_not_vary_are_not_in_the_label():
    block = {
        "method": ["muon"],
        "learning_rate": [1e-2],
        "method_options": {"eps": [1e-8], "beta2": [0.9, 0.95]},
    }
    suite = make_suite(block, {"method": ["adamw_torch"], "learning_rate": [1e-3]})
    found = curves.build_curves(suite.runs(), [])
    assert [curve.label for curve in found] == ["muon, beta2=0.9", "muon, beta2=0.95", "adamw_torch"]


# ---------------------------------------------------------------- targets


def test_steps_and_seconds_to_a_target(pair):
    suite, results = pair
    suite = make_suite(*suite.grid, seeds=(0, 1, 2), settings={"target_losses": [4.505, 4.0, 1.0]})
    summary, _ = summarise(suite, results)
    early, late, never = (target["curves"][0] for target in only(summary)["targets"])
    # Evaluations at step 5 are 0.5 above the final losses 4.00, 4.01 and 4.02.
    assert (early["reached"], early["steps"], early["seconds"]) == (
        3,
        pytest.approx(25 / 3),
        pytest.approx(50 / 3),
    )
    assert (late["reached"], late["steps"], late["seconds"]) == (1, 10, 20)
    assert (never["reached"], never["steps"], never["seconds"]) == (0, None, None)


def test_without_a_target_it_is_one_that_all_methods_reach(pair):
    summary, _ = summarise(*pair)
    (target,) = only(summary)["targets"]
    assert target["loss"] == pytest.approx(4.02, abs=0.0101)
    assert all(way["reached"] == way["seeds"] == 3 for way in target["curves"])


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("losses", "tolerance", "expected"),
    [
        ([3.50, 3.51, 3.52], 0.0, "reproduced"),
        ([3.60, 3.61, 3.62], 0.0, "not reproduced"),
        ([3.60, 3.61, 3.62], 0.1, "reproduced"),
        ([3.51, 3.51], 0.0, "not run"),
        ([], 0.0, "not run"),
    ],
)
def test_verdicts(losses, tolerance, expected):
    assert measures.verdict(losses, mean=3.51, std=0.01, tolerance=tolerance).word == expected


def test_two_standard_deviations_are_allowed_and_no_more():
    # The deviations 0.01 and 0.01 make 2 √2 · 0.01 = 0.0283.
    assert measures.verdict([3.50, 3.51, 3.52], 3.51 + 0.0282, 0.01).word == "reproduced"
    assert measures.verdict([3.50, 3.51, 3.52], 3.51 + 0.0284, 0.01).word == "not reproduced"


def test_the_paper_stands_beside_ours(pair, tmp_path):
    paper = {"muon": {"mean": 4.01, "std": 0.001}, "muon_momo": {"mean": 3.5, "std": 0.001}}
    settings = {"paper": {**paper, "muonmax": {"mean": 3.0, "std": 0.0}}, "tolerance": 0.002}
    suite = make_suite(*pair[0].grid, seeds=(0, 1, 2), settings=settings)
    _, text = written(suite, pair[1], tmp_path)
    rows = table_of(text, "Comparison with the paper")
    assert [row["verdict"] for row in rows] == ["**reproduced**", "**not reproduced**", "**not run**"]
    assert [row["difference"] for row in rows] == ["+0.0000", "+0.5100", "-"]
    assert (
        "| muon | 4.0100 ± 0.0100 | 3 | 0.01 | 4.0100 ± 0.0010 | +0.0000 | 0.0221 | **reproduced** |" in text
    )


def test_without_the_papers_figures_nothing_is_called_reproduced(pair, tmp_path):
    _, text = written(*pair, tmp_path)
    assert "reproduced" not in text


def test_figures_of_the_paper_need_a_mean_and_a_std(pair, tmp_path):
    suite = make_suite(*pair[0].grid, settings={"paper": {"muon": {"mean": 3.5}}})
    with pytest.raises(InputError, match=r"muon is .* needs a mean and a std"):
        report(suite, pair[1], tmp_path)


# ---------------------------------------------------------------- particular suites


@pytest.fixture
def variants_suite():
    choices = {
        "descent": ["constrained", "regularized"],
        "product_norm": ["linf", "l2", "hybrid"],
        "vector_norm": ["linf", "ada_linf", "ada_l2"],
        "step_size": ["rate", "momo"],
    }
    return make_suite({"method": ["noneuclid"], "learning_rate": RATES[1:], "method_options": choices})


def test_all_36_variants_are_in_the_heat_map(variants_suite, tmp_path):
    shift = {"rate": 0.0, "momo": 0.5}
    results = all_ended(variants_suite, lambda run: bowl(run) + shift[run.method_options["step_size"]])
    _, text = written(variants_suite, results, tmp_path)
    rows = table_of(text, "The 36 variants")
    assert len(rows) == 36
    assert {row["regret at the highest rate"] for row in rows} == {"diverged"}
    assert {(row["best loss"], row["step size"]) for row in rows} == {("4.0000", "rate"), ("4.5000", "momo")}
    assert (tmp_path / "variants.png").read_bytes().startswith(PNG)


def test_a_heat_map_has_gaps_where_runs_are_missing(variants_suite, tmp_path):
    results = all_ended(variants_suite, bowl)[:10]
    _, text = written(variants_suite, results, tmp_path)
    assert sum(row["best loss"] == "-" for row in table_of(text, "The 36 variants")) == 32
    assert (tmp_path / "variants.png").is_file()


def test_batch_sizes(tmp_path):
    blocks = [
        {
            "method": ["muon", "scion"],
            "learning_rate": RATES,
            "options": {"per_device_train_batch_size": [size], "max_steps": [320 // size]},
        }
        for size in (8, 32)
    ]

    def loss(run):
        large = run.options["per_device_train_batch_size"] == 32
        return 4 + abs(math.log10(run.learning_rate) + (1 if large else 2))

    suite = make_suite(*blocks)
    _, text = written(suite, all_ended(suite, loss), tmp_path)
    for size, steps, best in ((8, 40, "0.01"), (32, 10, "0.1")):
        rows = table_of(text, "Best final loss", f"batch_size={size}, max_steps={steps}")
        assert [(row["method"], row["best final loss"]) for row in rows] == [
            ("muon", "4.0000 ± -"),
            ("scion", "4.0000 ± -"),
        ]
        assert {row["learning rate"] for row in rows} == {best}
    assert text.count("### batch_size=8, max_steps=40\n") == 4


# ---------------------------------------------------------------- settings


SIZES = ["n_layer=2,n_embd=64,n_head=4", "n_layer=4,n_embd=128,n_head=4"]
SMALL, LARGE = "n_layer=2, n_embd=64", "n_layer=4, n_embd=128"


@pytest.fixture
def two_sizes():
    """muon_momo and muonmax_momo with two momenta at two sizes, of which the large is better by 2."""
    block = {
        "method": ["muon_momo", "muonmax_momo"],
        "learning_rate": RATES,
        "method_options": {"momentum": [0.9, 0.5], "beta": [0.9]},
        "options": {"config_overrides": SIZES, "block_size": [128]},
    }
    return make_suite(block)


def by_size(run):
    """Larger, muonmax_momo and momentum 0.5 are worse; the large model is best at 1e-1, the small at 1e-2."""
    small = run.options["config_overrides"] == SIZES[0]
    rate = run.learning_rate if small else run.learning_rate / 10
    cost = 0.2 * (run.method == "muonmax_momo") + 0.4 * (run.method_options["momentum"] == 0.5)
    return bowl(replace(run, learning_rate=rate)) + cost + 2 * small


def test_settings_are_called_by_what_differs():
    sizes = [{"config_overrides": size} for size in SIZES]
    assert setting_names(sizes) == [SMALL, LARGE]
    assert setting_names(sizes[:1]) == [""]
    assert setting_names([{"max_steps": 5}, {}]) == ["max_steps=5", "common options"]
    ordered = [{"config_overrides": text} for text in ("a=1,b=2", "b=2,a=1")]
    assert setting_names(ordered) == ["a=1, b=2", "b=2, a=1"]
    batches = [{"max_steps": 600, "per_device_train_batch_size": 4}, {"per_device_train_batch_size": 8}]
    assert setting_names(batches) == ["batch_size=4, max_steps=600", "batch_size=8"]


def test_the_best_is_that_of_any_method_in_the_same_setting(two_sizes):
    summary, _ = summarise(two_sizes, all_ended(two_sizes, by_size))
    small, large = summary["settings"]
    assert (small["name"], large["name"]) == (SMALL, LARGE)
    assert small["options"] == {"config_overrides": SIZES[0]}
    assert (small["best_loss"], large["best_loss"]) == (pytest.approx(6.0), pytest.approx(4.0))
    for setting in (small, large):
        limits = [curve["basins"]["5%"]["threshold"] for curve in setting["curves"]]
        assert limits == pytest.approx([1.05 * setting["best_loss"]] * 4)
    assert small["curves"][0]["label"] == "muon_momo, momentum=0.9"
    assert small["curves"][0]["basins"]["5%"]["decades"] > 0  # its 6 is far from 4, the best of the suite


def test_the_target_of_a_setting_is_one_that_its_methods_reach(two_sizes):
    summary, _ = summarise(two_sizes, all_ended(two_sizes, by_size))
    assert [setting["targets"][0]["loss"] for setting in summary["settings"]] == [6.6, 4.6]


def test_every_setting_has_a_heading_and_a_table(two_sizes):
    text = markdown(*summarise(two_sizes, all_ended(two_sizes, by_size)), figures=[])
    for section in ("Best final loss", "Robustness to the learning rate", "Final loss at each learning rate"):
        part = text.split(f"## {section}\n")[1].split("\n## ")[0]
        headings = [line for line in part.splitlines() if line.startswith("### ")]
        assert headings == [f"### {SMALL}", f"### {LARGE}"]
        assert part.count("\n|---") == 2
    assert "| muon_momo, momentum=0.9 | 6.0000 ± - | 1 | 0.01 | - |" in text
    assert "Best of any method: 4.0000; 5% above it 4.2000, 10% above it 4.4000." in text
    tables = text.split("## What was run")[0]
    assert not any(word in tables for word in ("n_head", "block_size", "beta", "config_overrides"))


def test_one_setting_has_no_headings(pair, tmp_path):
    _, text = written(*pair, tmp_path)
    assert "###" not in text
    assert "settings" not in text


def test_an_option_that_belongs_to_a_method_makes_a_setting():
    blocks = [
        {"method": [method], "learning_rate": RATES, "options": {"max_steps": [steps]}}
        for method, steps in (("muon", 10), ("scion", 20))
    ]
    suite = make_suite(*blocks)
    summary, _ = summarise(suite, all_ended(suite, lambda run: bowl(run) + (run.method == "scion")))
    assert [setting["best_loss"] for setting in summary["settings"]] == [4.0, 5.0]


def test_a_setting_of_which_nothing_has_ended_is_reported(two_sizes, tmp_path):
    ended_runs = [
        result
        for result in all_ended(two_sizes, by_size)
        if result.run.options["config_overrides"] == SIZES[0]
    ]
    found, text = written(two_sizes, ended_runs, tmp_path)
    assert [setting["best_loss"] for setting in found["settings"]] == [pytest.approx(6.0), None]
    assert f"### {LARGE}\n\nNo run has ended with a finite loss." in text


def test_a_curve_without_an_ended_run_has_no_basin(pair, tmp_path):
    suite, results = pair
    found, text = written(suite, [r for r in results if r.run.method == "muon"], tmp_path)
    assert only(found)["curves"][1]["basins"]["5%"]["decades"] is None
    row = table_of(text, "Robustness to the learning rate")[1]
    assert list(row.values()) == ["muon_momo", "-", "-", "-"]


def test_each_choice_of_options_and_setting_has_a_panel(two_sizes):
    suite_curves = curves.build_curves(two_sizes.runs(), all_ended(two_sizes, by_size))
    drawn = figures.final_loss(suite_curves).axes
    assert [axes.get_title() for axes in drawn] == [
        f"{options}\n{size}" for size in (SMALL, LARGE) for options in ("momentum=0.9", "momentum=0.5")
    ]
    assert drawn[0].get_ylim() == drawn[1].get_ylim() != drawn[2].get_ylim()


def test_a_figure_near_zero_shows_most_losses():
    """The best may be a tiny part of all others; a loss far above is still left out."""
    suite = make_suite({"method": ["muon"], "learning_rate": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]})
    losses = dict(zip([run.key for run in suite.runs()], [1e-9, 0.01, 0.02, 0.03, 9.0], strict=True))
    known = [ended(run, losses[run.key]) for run in suite.runs()]
    low, top = panels.loss_range(curves.build_curves(suite.runs(), known))
    assert low < 0 < 0.03 < top < 0.05


# ---------------------------------------------------------------- the report as a whole


def test_a_report_of_several_settings_made_twice_is_the_same_to_the_byte(two_sizes, tmp_path):
    for name in ("first", "second"):
        report(two_sizes, all_ended(two_sizes, by_size), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "final_loss.png" in names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_report_made_twice_is_the_same_to_the_byte(pair, tmp_path):
    for name in ("first", "second"):
        report(*pair, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["final_loss.png", "report.md", "results.json", "step_size.png", "training.png"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_an_unfinished_study_says_what_is_missing(pair, tmp_path):
    suite, results = pair
    waiting = Result(results[0].run, "waiting")
    failed = Result(results[1].run, "failed", metrics={"reason": "disk | full\nafter step 3"})
    found, text = written(suite, [waiting, failed, *results[2:20]], tmp_path)
    assert found["ran"]["missing"] == 6
    assert "Unfinished: 6 of the 24 runs" in text
    assert "| muon | - | 0.01 | 0 | disk \\| full after step 3 |" in text
    assert found["ran"]["states"] == {"done": 15, "diverged": 3, "failed": 1, "waiting": 1}


def test_a_curve_has_a_hole_where_no_run_has_ended(pair):
    suite, results = pair
    kept = [result for result in results if result.run.learning_rate != 1e-2]
    muon, _ = curves.build_curves(suite.runs(), kept)
    assert muon.losses == [pytest.approx(5.01), None, pytest.approx(5.01), INF]
    assert [[point.learning_rate for point in piece] for piece in figures.pieces(muon.points)] == [
        [1e-3],
        [1e-1],
    ]


def test_a_finished_study_is_not_called_unfinished(pair, tmp_path):
    found, text = written(*pair, tmp_path)
    assert found["ran"]["missing"] == 0
    assert "Unfinished" not in text
    assert found["ran"]["hours"] == pytest.approx((21 * 36 + 3 * 10) / 3600)
    assert "a processor; threads 1, processes a run 2" in text
    assert "/somewhere/else" not in text


def test_the_report_names_the_flags_of_a_method(pair, tmp_path):
    suite = replace(pair[0], per_method={"muon": {"adam_beta2": 0.95}})
    _, text = written(suite, pair[1], tmp_path)
    assert "- Options of muon: adam_beta2 0.95" in text


def test_nothing_to_report_is_an_error(pair, tmp_path):
    suite, results = pair
    for found in ([], [Result(results[0].run, "running")]):
        with pytest.raises(InputError, match="no run has ended yet"):
            report(suite, found, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_suite_in_which_all_diverged_is_reported(tmp_path):
    suite = make_suite({"method": ["muon"], "learning_rate": RATES})
    found, text = written(suite, all_ended(suite, lambda run: INF), tmp_path)
    assert only(found)["best_loss"] is None
    assert "## Robustness" not in text
    assert "diverged at step 5" in text


def test_colours_belong_to_methods_not_to_places():
    def curve(method):
        return curves.Curve(method, {}, {}, ())

    few = panels.method_look([curve("muon_momo")])
    many = panels.method_look([curve("scion"), curve("muon"), curve("lion"), curve("muonmax")])
    for method in ("muon", "muonmax"):
        assert few(curve(method)) == many(curve(method))
    looks = [many(curve(method)) for method in ("muon", "muonmax", "scion", "lion")]
    assert len({(look["color"], look["marker"]) for look in looks}) == 4
    assert curve("muon_momo").family == curve("momo_muon").family == "muon"


# ---------------------------------------------------------------- from a study on the disk


def store(folder, suite, results):
    """Write a study as the sweep does."""
    study = open_study(default_storage(folder), suite.name, suite=suite)
    study.set_user_attr("suite", asdict(suite))
    for result in results:
        attributes = {
            "run": result.run.key,
            "metrics": dict(result.metrics),
            "seconds": result.seconds,
            "diverged_at": result.diverged_at,
            "history 0": [row for row in result.history if "loss" not in row or row["loss"] == row["loss"]],
        }
        value = result.loss if result.state == "done" else INF
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs=attributes))


def test_the_command_reads_the_study_of_a_folder(pair, tmp_path, capsys):
    store(tmp_path, *pair)
    command.main(["--study", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.md")
    stored = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    expected, _ = summarise(*pair)
    assert only(stored)["curves"][0]["best"] == only(expected)["curves"][0]["best"]
    assert stored["ran"]["missing"] == 0


@pytest.mark.parametrize("kind", ["study", "results"])
def test_a_folder_without_a_study_is_an_error(tmp_path, capsys, kind):
    with pytest.raises(SystemExit) as stopped:
        command.main([f"--{kind}", str(tmp_path / "nothing")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("noneuclid report: error: ")


def test_a_report_is_written_again_from_its_results(two_sizes, tmp_path, capsys):
    report(two_sizes, all_ended(two_sizes, by_size), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "again")
    (tmp_path / "again" / "report.md").unlink()
    (tmp_path / "again" / "final_loss.png").unlink()
    command.main(["--results", str(tmp_path / "again")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "again" / "report.md")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "training.png" in names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    "folder", sorted((recipes_folder() / "results").glob("*/")), ids=lambda path: path.name
)
def test_the_committed_reports_are_what_their_results_give(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / folder.name)
    command.main(["--results", str(again)])
    for name in ("report.md", "results.json"):
        assert (again / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8")


def test_an_output_folder_that_cannot_be_made_is_an_error(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        report(*pair, tmp_path / "file" / "report")


def test_a_method_option_in_the_paper_suite_picks_the_best_curve():
    block = {"method": ["muon"], "learning_rate": [1e-2], "method_options": {"eps": [1e-8, 1e-6]}}
    suite = make_suite(block, seeds=(0, 1, 2))
    results = [ended(run, 4.0 if run.method_options["eps"] == 1e-6 else 5.0) for run in suite.runs()]
    found = curves.build_curves(suite.runs(), results)
    text = paper_section({"paper": {"muon": {"mean": 4.0, "std": 0.01}}}, found)
    (row,) = table_of(text, "Comparison with the paper")
    assert row["ours"] == "4.0000 ± 0.0000"
    assert row["verdict"] == "**reproduced**"
