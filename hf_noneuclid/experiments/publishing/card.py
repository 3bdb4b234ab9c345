"""The model card: what was trained, how, with which result, and how to load it.

Everything in it comes from the folder of the run. The template ``model_card.md`` puts it in order.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_noneuclid.experiments.common import markdown_table
from hf_noneuclid.experiments.publishing.facts import RunFacts
from hf_noneuclid.experiments.publishing.hub import Target

HERE = Path(__file__).parent
CITATIONS = (HERE / "citations.bib").read_text(encoding="utf-8").strip()
PAPERS = ["arxiv:2510.09827", "arxiv:2305.07583"]
"""Tags by which the Hub links a repository to the papers."""

# The results in the head of the card, with the Hub's names. The card's table has all results.
METRICS = {name: name for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "f1")}
METRICS |= {"eval_loss": "loss", "macro_f1": "f1"}


def write_card(folder: Path, target: Target, comparison: str = "") -> None:
    """Writes README.md, the card of a run, into its folder; ``comparison`` is Markdown to add.

    Raises:
        InputError: The folder holds no finished run.
    """
    facts = RunFacts.read(folder)
    metrics, options = facts.metrics, dict(sorted(facts.options.items()))
    recipe, config = f"recipes/{metrics.get('recipe', 'pretrain.py')}", metrics.get("config")
    environment = {**metrics.get("hardware", {}), **metrics.get("versions", {})}
    environment["seconds of training and evaluation"] = metrics.get("seconds")
    card = ModelCard.from_template(
        _metadata(facts, target),
        template_path=str(HERE / "model_card.md"),
        repository=target,
        facts=facts,
        metrics=metrics,
        start=_start(metrics.get("base_model")),
        results=_results(facts),
        comparison=comparison,
        method=_table("setting", "value", facts.method(), code=True),
        data=_data(facts),
        command=shlex.join(["python", recipe, *metrics.get("command", [])]),
        config=yaml.safe_dump(config).strip() if config else "",
        environment=_table("hardware and versions", "", environment),
        options=_table("option", "value", options, code=True),
        citations=CITATIONS,
    )
    card.save(folder / "README.md")


def _metadata(facts: RunFacts, target: Target) -> ModelCardData:
    """The head of the card, which the Hub's search and its result tables read."""
    dataset = facts.options.get("dataset_name")
    datasets = [dataset] if dataset and not Path(dataset).exists() else None  # a folder is not on the Hub
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=datasets[0] if datasets else _data_name(facts),
            dataset_name=f"{_data_name(facts)} (validation part)",
            metric_type=METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in facts.results.items()
        if name in METRICS
    ]
    return ModelCardData(
        model_name=target.repo_id.rpartition("/")[2],
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=facts.task,
        tags=["hf_noneuclid", facts.optimizer, *PAPERS],
        base_model=facts.hub_base,
        datasets=datasets,
        license=target.license,
        eval_results=results or None,
    )


def _data_name(facts: RunFacts) -> str:
    """The name of the data; local files are named without their folders."""
    files = [Path(file).name for file in facts.options.get("train_files") or []]
    return ", ".join(files) or str(facts.metrics.get("corpus", {}).get("name", "the training corpus"))


def _start(base: Mapping[str, Any] | None) -> str:
    """What training started from, in words."""
    if base is None:
        return "trained from scratch"
    file = f" (`{base['gguf_file']}`)" if base["gguf_file"] else ""
    if base["package"]:
        return f"fine-tuned from the model in the Python package `{base['package']}`{file}"
    if not base["on_hub"]:  # only its name: the folders above it say nothing to others
        return f"fine-tuned from the local model `{os.path.basename(os.path.abspath(base['name']))}`{file}"
    revision = "" if base["revision"] in (None, "main") else f" at revision `{base['revision']}`"
    return f"fine-tuned from `{base['name']}`{revision}{file}"


def _results(facts: RunFacts) -> str:
    head, before = ["result", "value"], facts.metrics.get("before")
    rows = [[name, _number(value)] for name, value in facts.results.items()]
    if before:  # of a fine-tuning; there, eval_loss is called loss
        head = ["result", "before", "after"]
        rows = [[name, _number(before.get(name.removeprefix("eval_"))), after] for name, after in rows]
    return markdown_table(head, rows)


def _data(facts: RunFacts) -> str:
    corpus = dict(facts.metrics.get("corpus", {}))
    known = facts.options.get("data_license") or corpus.get("license")
    corpus["license"] = known or "not stated by the run: see the source of the data"
    return _table("data", "", {key.replace("_", " "): value for key, value in corpus.items()})


def _table(left: str, right: str, values: Mapping[str, Any], code: bool = False) -> str:
    """A Markdown table of names and values without empty ones; empty if nothing is left."""
    given = {name: value for name, value in values.items() if value not in (None, "", [])}
    rows = [[f"`{name}`" if code else name, _cell(value)] for name, value in given.items()]
    return markdown_table([left, right], rows) if rows else ""


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
