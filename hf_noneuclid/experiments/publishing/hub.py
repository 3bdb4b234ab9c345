"""The Hub: where something is pushed, and the upload of a folder."""

import glob
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_noneuclid.experiments.common import PushError
from hf_noneuclid.experiments.secrets import scrub

# The Trainer pushes checkpoints itself, as --hub_strategy says. run.json is a note of the sweep to itself.
NOT_PUSHED = ["checkpoint-*", "_*", ".*", "run.json"]
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")  # what from_pretrained loads
# An older push may have left these under other names, and they would be mixed with the new ones.
REPLACED = (*WEIGHTS, "model.safetensors.index.json", "adapter_*")


@dataclass(frozen=True)
class Target:
    """A repository on the Hub, and how it is pushed to."""

    repo_id: str
    """``namespace/name``; without a namespace the user's own."""
    kind: str = "model"  # or "dataset"
    private: bool | None = None
    """Whether a repository that the push makes is private; None for the namespace's default."""
    revision: str | None = None
    """A branch, made if there is none; None for main."""
    overwrite: bool = False  # whatever the repository holds
    license: str | None = None
    """Licence of what is pushed, as the Hub writes it."""

    @property
    def where(self) -> dict[str, Any]:
        """The repository as the Hub's client takes it."""
        return {"repo_id": self.repo_id, "repo_type": self.kind}


def connect() -> HfApi:
    """The Hub's client with the user's token, which is sent even where implicit tokens are turned off."""
    return HfApi(token=get_token(), library_name="hf_noneuclid")


def reason(error: BaseException) -> str:
    """The first line of what a failed request says, without secrets."""
    server = error.server_message if isinstance(error, HfHubHTTPError) else None
    text = server or str(error).strip() or "no message"
    return str(scrub(f"{type(error).__name__}: {text.splitlines()[0]}"))


def upload(folder: Path, target: Target, message: str, later: Sequence[str]) -> None:
    """Pushes a folder, and deletes the weights that its repository holds under other names.

    The repository must be there already, and files that it has are not sent again. Checkpoints and files that
    begin with ``.`` or ``_`` are left out. ``later`` are arguments of ``noneuclid`` that push another time.

    Raises:
        PushError: The Hub or the network failed. The message has the command for later.
    """
    print(f"Pushing {folder} to {target.repo_id}", file=sys.stderr)
    api = connect()
    try:
        present = api.list_repo_files(**target.where, revision=target.revision)
        commit = api.upload_folder(
            **target.where,
            revision=target.revision,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=NOT_PUSHED,
            delete_patterns=[glob.escape(name) for name in present if _is_stale(name, target)] or None,
        )
    except Exception as error:  # the Hub, the network and the transfer raise many kinds
        raise PushError(
            f"the push to {target.repo_id} failed: {reason(error)}. Nothing is lost: the results are in "
            f"{folder}. Push later with:\n  {shlex.join(['noneuclid', *later])}"
        ) from error
    print(f"Pushed: {commit.commit_url}", file=sys.stderr)


def _is_stale(name: str, target: Target) -> bool:
    """Whether a push that does not write this file deletes it. Checkpoints always stay."""
    is_checkpoint = name.startswith(("checkpoint-", "last-checkpoint/"))
    return not is_checkpoint and (target.overwrite or any(fnmatch(name, pattern) for pattern in REPLACED))
