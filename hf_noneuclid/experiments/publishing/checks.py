"""What must hold on the Hub before anything is trained for it or pushed to it."""

import hashlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import TrainingArguments

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.publishing.hub import WEIGHTS, Target, connect, reason

NO_CONTENT = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
"""A repository that holds only these is as good as empty."""


def check_hub(args: TrainingArguments) -> None:
    """Makes the repository of a run with ``--push_to_hub``, so that a run that cannot push does not begin.

    Only the first process asks the Hub. ``args.hub_model_id`` gets its namespace.

    Raises:
        InputError: There is no token, no right to the repository, another model in it, or no Hub.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    resumed = Path(args.output_dir) if args.resume_from_checkpoint else None
    args.hub_model_id = make_ready(target_of(args), resumed).repo_id


def target_of(args: TrainingArguments | Namespace) -> Target:
    """The repository that the arguments name; without a name it is called like the output folder."""
    return Target(
        args.hub_model_id or Path(args.output_dir).absolute().name,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        overwrite=args.overwrite_hub_model,
        license=args.hub_license,
    )


def make_ready(target: Target, folder: Path | None) -> Target:
    """Makes the repository and the branch unless they are there, and checks that they may be pushed to.

    A push replaces a model only if its weights are also in the folder that is pushed, as the model or in a
    checkpoint. It replaces a dataset only if the folder has a file of the same name for each of its files.

    Args:
        target: May lack the namespace.
        folder: What will be pushed; None for a run that begins anew, which may not replace anything.

    Returns:
        The target with its namespace.

    Raises:
        InputError: There is no token, no right to the repository, other content in it, or no Hub.
    """
    if get_token() is None:
        raise InputError("pushing needs a token: log in with `hf auth login`, or set HF_TOKEN")
    api = connect()
    try:
        made = api.create_repo(**target.where, private=target.private, exist_ok=True)
        target = replace(target, repo_id=made.repo_id)
        api.auth_check(**target.where, write=True)
        if target.revision and not target.revision.startswith("refs/"):
            # The first commit of a repository has no model that would be mixed with ours.
            first = api.list_repo_commits(**target.where)[-1].commit_id
            api.create_branch(**target.where, branch=target.revision, revision=first, exist_ok=True)
        info: Any = api.repo_info(**target.where, revision=target.revision, files_metadata=True)
    except Exception as error:  # the Hub, the network and the client raise many kinds
        raise InputError(
            f"cannot push to {target.repo_id} at {api.endpoint}: {reason(error)}. Check --hub_model_id, and "
            "that your token may write there (`hf auth login`). Or train without --push_to_hub and push "
            "later with `noneuclid publish`"
        ) from error
    if target.private and info.private is False:
        raise InputError(
            f"{target.repo_id} is public, and --hub_private_repo only makes new repositories private: change "
            "the repository's settings, give another --hub_model_id, or leave --hub_private_repo out"
        )
    content = {file.rfilename: file for file in info.siblings if file.rfilename not in NO_CONTENT}
    if content and not target.overwrite and not (folder and _is_held(content, folder, target.kind)):
        raise InputError(
            f"{target.repo_id} holds something else already ({min(content)}, ...): replace it with "
            "--overwrite_hub_model, or give another --hub_model_id or --hub_revision"
        )
    return target


def _is_held(content: Mapping[str, Any], folder: Path, kind: str) -> bool:
    """Whether a folder also holds what its push would replace."""
    if kind == "dataset":
        return all((folder / name).is_file() for name in content)
    weights = [file for name, file in content.items() if any(fnmatch(name, item) for item in WEIGHTS)]
    ours = {_sha256(path) for item in WEIGHTS for path in folder.glob(f"**/{item}")}
    return bool(weights) and all(file.lfs and file.lfs.sha256 in ours for file in weights)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
