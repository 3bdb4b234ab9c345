"""The model card: what was trained, how, with which result, and how to load it.

Everything in it comes from the run folder; a template says where it stands.
"""

import os
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_noneuclid.experiments.publishing.facts import RunFacts
from hf_noneuclid.experiments.publishing.hub import Repository
from hf_noneuclid.experiments.common import markdown_table as table
from hf_noneuclid.experiments.secrets import redact_arguments, scrub

HERE = Path(__file__).parent
# Results for the head of the card; its table shows what stands deeper in metrics.json, too.
METRICS = {
    "eval_loss": "loss",
    "loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
}
LOADERS = {"text-generation": "CausalLM", "text-classification": "SequenceClassification"}


def write_card(
    folder: Path, repository: Repository, license_name: str | None = None, comparison: str = ""
) -> ModelCard:
    """Write README.md, the card of a run, into its folder.

    Args:
        folder: of the run.
        repository: where it will stand.
        license_name: of the weights, as the Hub writes it; None if nobody has chosen one.
        comparison: Markdown: the run among others.

    Raises:
        InputError: the folder holds no finished run.
    """
    facts = RunFacts.read(folder)
    card = ModelCard.from_template(
        metadata(facts, repository, license_name),
        template_path=str(HERE / "model_card.md"),
        title=repository.repo_id.rpartition("/")[2],
        summary=_summary(facts),
        results=_results(facts),
        comparison=comparison,
        method=_method(facts),
        loading=_loading(facts, repository),
        data=_data(facts),
        command=command(facts.metrics),
        config=_config(facts),
        environment=_environment(facts),
        options=_options(facts),
        licence=_licence(facts, license_name),
        citations=(HERE / "citations.bib").read_text(encoding="utf-8").strip(),
    )
    card = ModelCard(scrub(str(card)))  # and its metadata is read again, which validates it
    card.save(folder / "README.md")
    return card


def metadata(facts: RunFacts, repository: Repository, license_name: str | None) -> ModelCardData:
    """Return the head of the card, which the Hub's search and its result tables read."""
    dataset = facts.options.get("dataset_name")
    return ModelCardData(
        model_name=repository.repo_id.rpartition("/")[2],
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=facts.task,
        tags=["hf_noneuclid", facts.optimizer, "arxiv:2510.09827", "arxiv:2305.07583"],
        base_model=facts.hub_base,
        datasets=[dataset] if _is_hub_name(dataset) else None,
        license=license_name,
        eval_results=_eval_results(facts) or None,
    )


def command(metrics: dict[str, Any]) -> str:
    """Return the command of a run, without secrets."""
    arguments = redact_arguments(metrics.get("command") or [])
    return shlex.join(["python", f"recipes/{metrics.get('recipe', 'pretrain.py')}", *arguments])


def _eval_results(facts: RunFacts) -> list[EvalResult]:
    dataset = facts.options.get("dataset_name")
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type=dataset if _is_hub_name(dataset) else _slug(facts.data_name),
            dataset_name=f"{facts.data_name} (validation part)",
            metric_type=METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in facts.results().items()
        if name in METRICS
    ]


def _summary(facts: RunFacts) -> str:
    metrics = facts.metrics
    kind = {"text-generation": "A causal language model", "text-classification": "A text classifier"}
    adapter = " (an adapter)" if facts.adapter else ""
    parts = [f"{kind[facts.task]}{adapter}, {_beginning(facts)} with `{facts.optimizer}`"]
    if metrics.get("parameters"):
        parts.append(f"{metrics['parameters']:,} parameters")
    if metrics.get("steps"):
        parts.append(f"{metrics['steps']:,} steps")
    if metrics.get("tokens"):
        parts.append(f"{metrics['tokens']:,} tokens")
    return ", ".join(parts) + "."


def _beginning(facts: RunFacts) -> str:
    base = facts.base_model
    if base is None:
        return "trained from scratch"
    if base["on_hub"]:
        branch = base["revision"] or "main"
        model = f"`{base['name']}`" + ("" if branch == "main" else f" at revision `{branch}`")
    elif base["package"]:
        model = f"the model in the Python package `{base['package']}`"
    else:  # where it was says nothing to others
        model = f"the local model `{os.path.basename(os.path.abspath(base['name']))}`"
    file = f" (`{base['gguf_file']}`)" if base["gguf_file"] else ""
    return f"fine-tuned from {model}{file}"


def _results(facts: RunFacts) -> str:
    head, results = ("result", "value"), facts.results()
    rows = [(name, _number(value)) for name, value in results.items()]
    if facts.before:  # where eval_loss is called loss
        head = ("result", "before", "after")
        before = (_number(facts.before.get(name.removeprefix("eval_"))) for name in results)
        rows = [(name, first, after) for (name, after), first in zip(rows, before, strict=True)]
    unit = "nats per token" if facts.task == "text-generation" else "nats"
    return f"Losses are in {unit}.\n\n{table(head, rows)}"


def _method(facts: RunFacts) -> str:
    values = facts.method()
    if not values:
        return f"`{facts.optimizer}` of the Trainer; its options are listed below."
    values["learning_rate"] = facts.options.get("learning_rate")
    rows = [(f"`{name}`", _cell(value)) for name, value in values.items()]
    return table(("setting", "value"), rows)


def _loading(facts: RunFacts, repository: Repository) -> str:
    loader = ("AutoPeftModelFor" if facts.adapter else "AutoModelFor") + LOADERS[facts.task]
    revision = f", revision={repository.revision!r}" if repository.revision else ""
    imports = f"from transformers import {loader}, AutoTokenizer"
    if facts.adapter:
        imports = f"from peft import {loader}\nfrom transformers import AutoTokenizer"
    name = f"{repository.repo_id!r}{revision}".replace("'", '"')
    classes = facts.metrics.get("classes")  # which an adapter does not bring along
    labels = f", num_labels={len(classes)}" if facts.adapter and classes else ""
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    return "\n".join([imports, "", tokenizer, f"model = {loader}.from_pretrained({name}{labels})"])


def _data(facts: RunFacts) -> str:
    rows = [(key.replace("_", " "), _cell(value)) for key, value in facts.corpus.items() if key != "license"]
    shown = facts.options.get("data_license") or facts.corpus.get("license")
    rows.append(("licence", _cell(shown) if shown else "not stated by the run: see the source of the data"))
    return table(("data", ""), rows)


def _config(facts: RunFacts) -> str:
    values = facts.metrics.get("config")
    return yaml.safe_dump(scrub(values)).strip() if values else ""


def _environment(facts: RunFacts) -> str:
    metrics = facts.metrics
    hardware = {key: value for key, value in metrics.get("hardware", {}).items() if value is not None}
    rows = [*hardware.items(), *metrics.get("versions", {}).items()]
    if metrics.get("seconds") is not None:
        rows.append(("seconds of training and evaluation", metrics["seconds"]))
    return table(("hardware and versions", ""), [(name, _cell(value)) for name, value in dict(rows).items()])


def _options(facts: RunFacts) -> str:
    rows = sorted(
        (name, value) for name, value in scrub(dict(facts.options)).items() if value not in (None, "", [])
    )
    return table(("option", "value"), [(f"`{name}`", _cell(value)) for name, value in rows])


def _licence(facts: RunFacts, license_name: str | None) -> str:
    chosen = f"The weights: {license_name}." if license_name else "No licence was chosen for the weights."
    return f"{chosen} The data: see above. The package hf_noneuclid: Apache-2.0."


def _is_hub_name(name: str | None) -> bool:
    """Say whether a name is a repository's, and not that of a folder here."""
    if not name or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _slug(name: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return "-".join(words)[:96] or "corpus"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _cell(value: Any) -> str:
    """Write a value so that it stays in its cell of a Markdown table."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
