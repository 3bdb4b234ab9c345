"""Push the folder of a run: model, tokenizer, results, and a card."""

import sys
from pathlib import Path

from hf_noneuclid.experiments.common import InputError, PushError
from hf_noneuclid.experiments.publishing.card import write_card
from hf_noneuclid.experiments.publishing.facts import RunFacts
from hf_noneuclid.experiments.publishing.hub import (
    Repository,
    connect,
    create,
    push_command,
    push_later,
    read_origin,
    remote_origin,
    upload,
    write_origin,
)
from hf_noneuclid.experiments.training.options import RecipeArguments


def push(folder: Path, args: RecipeArguments) -> None:
    """Push a run as its options say, on the first process: nothing without --push_to_hub, or if it diverged.

    To be called after everything is written, and by no process that others wait for: an upload takes long.

    Args:
        folder: with the model, metrics.json and curves.png.
        args: of the run, after `check_hub`.

    Raises:
        PushError: the Hub or the network failed; says how to push later.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    repository = Repository(args.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision)
    try:
        RunFacts.read(folder)
    except InputError as error:  # of a run that diverged
        print(f"{error}{_left_there(folder, repository)}", file=sys.stderr)
        return
    push_folder(folder, repository, args.overwrite_hub_model, args.hub_license)


def push_folder(
    folder: Path,
    repository: Repository,
    overwrite: bool = False,
    license_name: str | None = None,
    comparison: str = "",
    later: str | None = None,
) -> str:
    """Write the card of a run, and push its folder.

    Args:
        folder: with the model and metrics.json.
        repository: where to; is made if there is none.
        overwrite: replace whatever the repository holds.
        license_name: of the weights, as the Hub writes it.
        comparison: Markdown for the card: the run among others.
        later: the command that pushes it another time, where it is not that of the folder alone.

    Returns:
        The address of the commit.

    Raises:
        PushError: the Hub or the network failed; says how to push later.
    """
    later = later or push_command("--folder", str(folder), *_flags(repository, overwrite, license_name))
    try:
        write_origin(folder)
        write_card(folder, repository, license_name, comparison)
        api = connect()
        create(api, repository)
        return upload(api, folder, repository, "Push the model and its results", replace=overwrite)
    except (InputError, PushError) as error:
        raise push_later(error, folder, later) from error


def _left_there(folder: Path, repository: Repository) -> str:
    """Say whether a checkpoint of a run that is not pushed was pushed while it trained."""
    origin = read_origin(folder)
    if origin is None:
        return ""
    try:
        found = "holds" if remote_origin(connect(), repository) == origin else None
    except Exception:  # the Hub and the network
        found = "may hold"
    return f"; {repository.repo_id} {found} a checkpoint that was pushed while it trained" if found else ""


def _flags(repository: Repository, overwrite: bool, license_name: str | None) -> list[str]:
    values = {
        "hub_model_id": repository.repo_id,
        "hub_revision": repository.revision,
        "hub_private_repo": None if repository.private is None else str(repository.private).lower(),
        "hub_license": license_name,
    }
    flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
    return [*flags, "--overwrite_hub_model"] if overwrite else flags
