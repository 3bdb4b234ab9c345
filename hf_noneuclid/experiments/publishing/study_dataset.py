"""All runs of a study as the files of a dataset repository."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from hf_noneuclid.experiments.common import finite
from hf_noneuclid.experiments.publishing.hub import ORIGIN_FILE, Repository
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.sweeping.study import Result
from hf_noneuclid.experiments.sweeping.suite import Suite
from hf_noneuclid.experiments.sweeping.sweep_folder import run_folder
from hf_noneuclid.experiments.training.results import write_metrics

HERE = Path(__file__).parent
FOLDER = "hub"  # of the study: what is pushed as the dataset


def write_dataset(
    study: Path,
    suite: Suite,
    summary: Mapping[str, Any],
    found: Sequence[Result],
    repository: Repository,
    models: str,
    verdict: str,
    license_name: str | None,
) -> Path:
    """Write the files of the dataset repository; returns their folder.

    Args:
        study: output folder of sweep.py, with a report.
        suite: of the study.
        summary: the numbers of its report.
        found: a result for each run.
        repository: where the dataset will stand.
        models: Markdown: the best models, with links.
        verdict: Markdown: the runs beside the paper's; empty where the suite is none of the paper's.
        license_name: as the Hub writes it.
    """
    folder = study / FOLDER
    _clear(folder)
    shutil.copytree(study / "report", folder / "report")
    rows = [_row(study, result, run) for result, run in zip(found, summary["runs"], strict=True)]
    _write_rows(folder / "runs.jsonl", rows)
    _write_rows(folder / "history.jsonl", _history(study, found))
    for result in found:
        _write_run(run_folder(study, result.run), folder / "runs", result)
    _write_card(folder, suite, repository, models, verdict, license_name)
    return folder


def _clear(folder: Path) -> None:
    """Empty the folder of an earlier publication, but for what tells it from others."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != ORIGIN_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _row(study: Path, result: Result, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as a row; what differs in shape from run to run as JSON, so that columns have one type."""
    row = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in run.items()}
    return {
        "run": run_folder(study, result.run).name,
        **row,
        "metrics": json.dumps(scrub(dict(result.metrics))),
    }


def _history(study: Path, found: Iterable[Result]) -> Iterable[dict[str, Any]]:
    names = list(dict.fromkeys(key for result in found for row in result.history for key in row))
    for result in found:
        for row in result.history:
            yield {"run": run_folder(study, result.run).name, **{name: row.get(name) for name in names}}


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(finite(scrub(dict(row))), allow_nan=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _write_run(source: Path, target: Path, result: Result) -> None:
    target = target / source.name
    target.mkdir(parents=True)
    write_metrics(target / "metrics.json", dict(result.metrics))
    write_metrics(target / "history.json", result.history)
    if (source / "curves.png").is_file():
        shutil.copy(source / "curves.png", target)


def _write_card(
    folder: Path, suite: Suite, repository: Repository, models: str, verdict: str, license_name: str | None
) -> None:
    figures = sorted(path.relative_to(folder).as_posix() for path in (folder / "report").glob("*.png"))
    data = DatasetCardData(
        pretty_name=f"All runs of the suite {suite.name}",
        license=license_name,
        tags=["hf_noneuclid", "arxiv:2510.09827", "arxiv:2305.07583"],
        configs=[
            {"config_name": "runs", "data_files": "runs.jsonl", "default": True},
            {"config_name": "history", "data_files": "history.jsonl"},
        ],
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(HERE / "dataset_card.md"),
        suite=suite.name,
        about=suite.about,
        verdict=verdict,
        figures="\n\n".join(f"![{Path(name).stem}]({name})" for name in figures),
        models=models,
        repo_id=repository.repo_id,
        definition=yaml.safe_dump(suite.to_dict(), sort_keys=False).strip(),
        citations=(HERE / "citations.bib").read_text(encoding="utf-8").strip(),
    )
    DatasetCard(scrub(str(card))).save(folder / "README.md")
