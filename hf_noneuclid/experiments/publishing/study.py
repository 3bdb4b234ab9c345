"""Publish a finished suite: the best checkpoint of each method, and all runs as a dataset, linked."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from huggingface_hub import constants

from hf_noneuclid.experiments.common import InputError, PushError
from hf_noneuclid.experiments.publishing.checks import check_repository
from hf_noneuclid.experiments.publishing.facts import has_model
from hf_noneuclid.experiments.publishing.hub import (
    Repository,
    connect,
    create,
    push_later,
    read_origin,
    upload,
    write_origin,
)
from hf_noneuclid.experiments.publishing.model import push_folder
from hf_noneuclid.experiments.publishing.study_dataset import write_dataset
from hf_noneuclid.experiments.report import report
from hf_noneuclid.experiments.reporting.curves import Curve
from hf_noneuclid.experiments.reporting.report_comparisons import paper_section
from hf_noneuclid.experiments.reporting.report_format import band, number, rate, table
from hf_noneuclid.experiments.reporting.summary import summarise
from hf_noneuclid.experiments.sweeping.execution import as_arguments, recipe_flags
from hf_noneuclid.experiments.sweeping.study import Result, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Suite
from hf_noneuclid.experiments.sweeping.sweep_folder import run_folder

RECIPES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Publication:
    """A study, and where its parts go on the Hub.

    Attributes:
        folder: output folder of sweep.py.
        suite: of the study.
        summary: the numbers of its report.
        best: the run with the lowest loss of each method.
        models: the repository of each method's model.
        dataset: the repository of all runs.
    """

    folder: Path
    suite: Suite
    summary: Mapping[str, Any]
    best: Mapping[str, Result]
    models: Mapping[str, Repository]
    dataset: Repository


def publish_study(
    study: optuna.Study,
    folder: Path,
    template: Repository,
    overwrite: bool,
    license_name: str | None,
    later: str,
) -> list[str]:
    """Push a study.

    Args:
        study: finished, its models kept.
        folder: output folder of sweep.py.
        template: `repo_id` is the namespace; the rest holds for every repository.
        overwrite: replace whatever the repositories hold.
        license_name: of the weights, as the Hub writes it.
        later: the command that pushes what is missing after a failure.

    Returns:
        The addresses of the commits.

    Raises:
        InputError: nothing has ended, models are missing, or a repository may not be pushed to.
        PushError: the Hub or the network failed.
    """
    suite, found = suite_of(study), results(study)
    report(suite, found, folder / "report")
    summary, curves = summarise(suite, found)
    plan = _plan(folder, suite, summary, best_results(curves), template)
    _check_models(plan)
    identity = study.user_attrs.get("id", study.study_name)
    _check_hub(plan, identity, overwrite)
    _write_origins(plan, identity)
    staged = write_dataset(
        folder, suite, summary, found, plan.dataset, _model_table(plan), paper_section(summary), license_name
    )
    write_origin(staged, f"{identity} runs")
    pushed = [
        push_folder(
            _folder(plan, method), repository, overwrite, license_name, _comparison(plan, method), later
        )
        for method, repository in plan.models.items()
    ]
    try:
        api = connect()
        create(api, plan.dataset)
        return [*pushed, upload(api, staged, plan.dataset, "Push all runs", replace=overwrite)]
    except (InputError, PushError) as error:
        raise push_later(error, folder, later) from error


def best_results(curves: Sequence[Curve]) -> dict[str, Result]:
    """Return the run with the lowest final loss of each method, among those at its best learning rate."""
    best: dict[str, Result] = {}
    for curve in sorted((curve for curve in curves if curve.best), key=lambda curve: curve.best.loss):
        best.setdefault(curve.method, min(curve.best.done, key=lambda result: result.loss))
    return best


def _plan(
    folder: Path, suite: Suite, summary: Mapping[str, Any], best: Mapping[str, Result], template: Repository
) -> Publication:
    name = f"{template.repo_id}/{suite.name}"
    models = {method: replace(template, repo_id=f"{name}-{method}") for method in best}
    dataset = replace(template, repo_id=f"{name}-runs", kind="dataset")
    return Publication(folder, suite, summary, best, models, dataset)


def _check_models(plan: Publication) -> None:
    """Refuse a study without its models: sweep.py deletes them unless told otherwise."""
    if not plan.best:
        raise InputError(f"suite {plan.suite.name}: no run has ended with a model")
    missing = [method for method in plan.best if not has_model(_folder(plan, method))]
    if missing:
        commands = "\n".join(f"  {_command(plan, method)}" for method in missing)
        raise InputError(
            f"the models of {', '.join(missing)} are not there: sweep.py deletes weights unless "
            f"--keep_models. Make the best ones again:\n{commands}"
        )


def _command(plan: Publication, method: str) -> str:
    """Return the command that repeats the best run of a method in its folder."""
    flags = recipe_flags(plan.suite, plan.best[method].run, 1)
    script = os.path.relpath(RECIPES / f"{plan.suite.recipe}.py")
    target = [f"--output_dir={_folder(plan, method)}", "--overwrite_output_dir=true"]
    return shlex.join(["python", script, *as_arguments(flags), *target])


def _check_hub(plan: Publication, identity: str, overwrite: bool) -> None:
    """See that everything may be pushed before anything is."""
    for method, repository in plan.models.items():
        origin = read_origin(_folder(plan, method)) or f"{identity} {method}"
        check_repository(repository, origin, overwrite)
    check_repository(plan.dataset, f"{identity} runs", overwrite)


def _write_origins(plan: Publication, identity: str) -> None:
    """Write into the folders of the models that they belong to this study."""
    for method in plan.models:
        write_origin(_folder(plan, method), f"{identity} {method}")


def _folder(plan: Publication, method: str) -> Path:
    return run_folder(plan.folder, plan.best[method].run)


# ------------------------------------------------------------------------------------ text for cards


def _comparison(plan: Publication, method: str) -> str:
    """Say where a model stands in its suite."""
    run, missing = plan.best[method], plan.summary["ran"]["missing"]
    texts = [
        f"## In the suite {plan.suite.name}",
        plan.suite.about,
        f"This is the best run of `{method}`: learning rate {rate(run.run.learning_rate)}, seed "
        f"{run.run.seed}, final loss {run.loss:.4f} nats. All runs: {_link(plan.dataset)}.",
        f"**The suite is unfinished: {missing} runs are missing.**" if missing else "",
        _model_table(plan),
        paper_section(plan.summary).replace("## ", "### "),
    ]
    return "\n\n".join(filter(None, texts))


def _model_table(plan: Publication) -> str:
    """Return the best curve of each method, with a link to its model, lowest loss first."""
    rows = []
    curves = [row for setting in plan.summary["settings"] for row in setting["curves"] if row["best"]]
    for method, repository in plan.models.items():
        points = (row["best"] for row in curves if row["method"] == method)
        best = min(points, key=lambda point: point["loss"])
        loss = band(best["loss"], best["std"])
        rows.append((_link(repository, method), loss, number(best["seeds"]), rate(best["learning_rate"])))
    return table(("method", "best final loss, mean over seeds", "seeds", "learning rate"), rows)


def _link(repository: Repository, text: str | None = None) -> str:
    kind = "datasets/" if repository.kind == "dataset" else ""
    return f"[{text or repository.repo_id}]({constants.ENDPOINT}/{kind}{repository.repo_id})"
