"""Pushes the folder of a run: model, tokenizer, results, and a card."""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainingArguments

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.publishing.card import write_card
from hf_noneuclid.experiments.publishing.checks import make_ready, target_of
from hf_noneuclid.experiments.publishing.facts import RunFacts
from hf_noneuclid.experiments.publishing.hub import Target, upload


def push(folder: Path, args: TrainingArguments) -> None:
    """Pushes a run that has just ended, on the first process; does nothing without ``--push_to_hub``.

    Call it when everything is written and no other process waits for this one: an upload takes long. A run
    that diverged is not pushed, and a message says so.

    Raises:
        PushError: The Hub or the network failed. The message has the command for later.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    try:
        push_run(folder, target_of(args))
    except InputError as error:  # the run diverged
        print(error, file=sys.stderr)


def publish_folder(folder: Path, target: Target) -> None:
    """Pushes the folder of a run that ended some time ago.

    Raises:
        InputError: The folder holds no finished run, or an adapter that nobody else could load, or may not
            be pushed there.
    """
    facts = RunFacts.read(folder)
    if facts.is_adapter and facts.hub_base is None:
        raise InputError(
            f"{folder} holds an adapter whose base model is not on the Hub, so nobody else could load it. "
            "Train with --lora_merge true, which writes the whole model"
        )
    push_run(folder, make_ready(target, folder))


def push_run(folder: Path, target: Target, comparison: str = "", later: Sequence[str] | None = None) -> None:
    """Writes the card of a run, and pushes its folder to a repository that is there already.

    ``comparison`` is Markdown to add to the card. ``later`` are the arguments of ``noneuclid`` that push it
    another time; by default those for this folder.

    Raises:
        InputError: The folder holds no finished run, or the run diverged.
    """
    write_card(folder, target, comparison)
    flags = {
        "hub_model_id": target.repo_id,
        "hub_revision": target.revision,
        "hub_private_repo": None if target.private is None else str(target.private).lower(),
        "hub_license": target.license,
    }
    given = [part for name, value in flags.items() if value is not None for part in (f"--{name}", value)]
    given += ["--overwrite_hub_model"] if target.overwrite else []
    later = later or ["publish", "--folder", str(folder), *given]
    upload(folder, target, "Push the model and its results", later)
