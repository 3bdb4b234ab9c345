"""Pushes a finished study: the best model of each method, and all runs as a dataset, linked."""

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, constants

from hf_noneuclid.experiments.common import InputError, finite, markdown_table, recipes_folder
from hf_noneuclid.experiments.publishing.card import CITATIONS, HERE, PAPERS
from hf_noneuclid.experiments.publishing.checks import make_ready
from hf_noneuclid.experiments.publishing.facts import has_model
from hf_noneuclid.experiments.publishing.hub import Target, upload
from hf_noneuclid.experiments.publishing.model import push_run
from hf_noneuclid.experiments.reporting.report import report
from hf_noneuclid.experiments.reporting.summary import summarise
from hf_noneuclid.experiments.reporting.tables import band, rate
from hf_noneuclid.experiments.reporting.text import paper_section
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.sweeping.execution import run_folder
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Result, Suite

Best = Mapping[str, tuple[Result, Mapping[str, Any]]]
"""The best run of each method, and the losses of its learning rate as in results.json."""


def publish_study(
    folder: Path, namespace: Target, later: Sequence[str], storage: str | None = None, name: str | None = None
) -> None:
    """Pushes the best model of each method as ``<suite>-<method>``, and all runs as ``<suite>-runs``.

    Args:
        folder: Output folder of the sweep, with the models.
        namespace: Names the user or organisation; the rest holds for every repository.
        later: Arguments of ``noneuclid`` that push what is missing after a failure.
        storage: Where the trials are; by default in the folder.
        name: Name of the study, if the storage holds several.

    Raises:
        InputError: No run has ended, models are missing, or a repository may not be pushed to.
        PushError: The Hub or the network failed. The message has the command for later.
    """
    study = open_study(storage or default_storage(folder), name)
    suite, found = suite_of(study), results(study)
    report(suite, found, folder / "report")
    summary, curves = summarise(suite, found)
    best = _best_runs(summary, found)
    folders = {method: run_folder(folder, result.run) for method, (result, _) in best.items()}
    _check_models(suite, best, folders)

    prefix = f"{namespace.repo_id}/{suite.name.replace('/', '-')}"
    targets = {method: replace(namespace, repo_id=f"{prefix}-{method}") for method in best}
    dataset = replace(namespace, repo_id=f"{prefix}-runs", kind="dataset")
    text = {
        "about": suite.about,
        "models": _model_table(best, targets),
        "verdict": paper_section(suite.report, curves),
    }
    staged = folder / "hub"
    _write_runs(staged, folder, summary, found)
    _write_card(staged, dataset, suite, text)

    for method, target in targets.items():  # check all of them before the first is pushed
        make_ready(target, folders[method])
    make_ready(dataset, staged)
    for method, target in targets.items():
        comparison = _comparison(summary, best[method][0], dataset, text)
        push_run(folders[method], target, comparison, later)
    upload(staged, dataset, "Push all runs", later)


def _best_runs(summary: Mapping[str, Any], found: Sequence[Result]) -> Best:
    """The run with the lowest loss at the best learning rate of each method, the best method first."""
    curves = [curve for setting in summary["settings"] for curve in setting["curves"] if curve["best"]]
    best: dict[str, tuple[Result, Mapping[str, Any]]] = {}
    for curve in sorted(curves, key=lambda curve: curve["best"]["loss"]):
        method, point = curve["method"], curve["best"]
        wanted = method, point["learning_rate"], point["lowest"]
        runs = (one for one in found if (one.run.method, one.run.learning_rate, one.loss) == wanted)
        best.setdefault(method, (next(runs), point))
    return best


def _check_models(suite: Suite, best: Best, folders: Mapping[str, Path]) -> None:
    """Raises InputError with the commands that make the best models, if the sweep has deleted them."""
    if not best:
        raise InputError(f"suite {suite.name}: no run has ended with a model")
    missing = [method for method in best if not has_model(folders[method])]
    if missing:
        script = os.path.relpath(recipes_folder() / f"{suite.recipe}.py")
        own = ("--overwrite_output_dir=", "--resume_from_checkpoint=")
        flags = [best[method][0].metrics["command"] for method in missing]
        commands = [["python", script, *(flag for flag in one if not flag.startswith(own))] for one in flags]
        text = "\n  ".join(shlex.join([*command, "--overwrite_output_dir=true"]) for command in commands)
        raise InputError(
            f"the models of {', '.join(missing)} are not there: a sweep deletes weights unless it runs with "
            f"--keep_models. Make the best ones again:\n  {text}"
        )


def _write_runs(staged: Path, study: Path, summary: Mapping[str, Any], found: Sequence[Result]) -> None:
    """Writes all runs, with their logs and the report, into an empty folder."""
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(study / "report", staged / "report")
    rows, logs = [], []
    keys = dict.fromkeys(key for result in found for entry in result.history for key in entry)
    for result, row in zip(found, summary["runs"], strict=True):
        name = run_folder(study, result.run).name
        # What has other keys in other runs becomes text, so that every column has one type.
        values = {**row, "metrics": scrub(result.metrics)}
        texts = {key: json.dumps(value) for key, value in values.items() if isinstance(value, dict)}
        rows.append({"run": name, **values, **texts})
        logs += [{"run": name, **{key: entry.get(key) for key in keys}} for entry in result.history]
    _write_rows(staged / "runs.jsonl", rows)
    _write_rows(staged / "history.jsonl", logs)


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(finite(scrub(row)), allow_nan=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _write_card(staged: Path, target: Target, suite: Suite, text: Mapping[str, str]) -> None:
    files: list[dict[str, Any]] = [
        {"config_name": "runs", "data_files": "runs.jsonl", "default": True},
        {"config_name": "history", "data_files": "history.jsonl"},
    ]
    card = DatasetCard.from_template(
        DatasetCardData(
            pretty_name=f"All runs of the suite {suite.name}",
            license=target.license,
            tags=["hf_noneuclid", *PAPERS],
            configs=files,
        ),
        template_path=str(HERE / "dataset_card.md"),
        suite=suite.name,
        figures=sorted(path.name for path in (staged / "report").glob("*.png")),
        repo_id=target.repo_id,
        definition=yaml.safe_dump(scrub(asdict(suite)), sort_keys=False).strip(),
        citations=CITATIONS,
        **text,
    )
    card.save(staged / "README.md")


def _comparison(summary: Mapping[str, Any], result: Result, dataset: Target, text: Mapping[str, str]) -> str:
    """Markdown that compares a model with the others of its suite."""
    missing, run = summary["ran"]["missing"], result.run
    parts = [
        f"## In the suite {summary['suite']['name']}",
        text["about"],
        f"This is the best run of `{run.method}`: learning rate {rate(run.learning_rate)}, seed {run.seed}, "
        f"final loss {result.loss:.4f} nats. All runs: {_link(dataset, dataset.repo_id)}.",
        f"**The suite is unfinished: {missing} runs are missing.**" if missing else "",
        text["models"],
        text["verdict"].replace("## ", "### "),
    ]
    return "\n\n".join(filter(None, parts))


def _model_table(best: Best, targets: Mapping[str, Target]) -> str:
    """The best learning rate of each method, with a link to its model."""
    rows = []
    for method, (_, point) in best.items():
        loss, seeds = band(point["loss"], point["std"]), str(point["seeds"])
        rows.append([_link(targets[method], method), loss, seeds, rate(point["learning_rate"])])
    return markdown_table(["method", "best final loss, mean over seeds", "seeds", "learning rate"], rows)


def _link(target: Target, text: str) -> str:
    kind = "datasets/" if target.kind == "dataset" else ""
    return f"[{text}]({constants.ENDPOINT}/{kind}{target.repo_id})"
