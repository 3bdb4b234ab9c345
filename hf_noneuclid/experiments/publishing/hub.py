"""The Hub: who we are there, what a repository holds, and the upload of a folder."""

import fnmatch
import glob
import json
import os
import shlex
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars, logging

from hf_noneuclid.experiments.common import InputError, PushError, write_whole
from hf_noneuclid.experiments.secrets import known_secrets, scrub

ORIGIN_FILE = "hub_origin.json"
# Checkpoints go as --hub_strategy says; the rest is of this machine.
NOT_PUSHED = ("checkpoint-*", "_*", ".*", "run.json")
WEIGHTS = ("model*.safetensors*", "adapter_*")  # two kinds of them in one repository would be mixed
NOT_SEARCHED = (".safetensors", ".png")  # weights and pictures, which no text gets into
PUBLISH = Path(__file__).parents[1] / "publish.py"


@dataclass(frozen=True)
class Repository:
    """Where something is pushed to.

    Attributes:
        repo_id: namespace/name.
        kind: `model` or `dataset`.
        private: of a repository that is made; None for the namespace's default.
        revision: branch, made if there is none; None for main.
    """

    repo_id: str
    kind: str = "model"
    private: bool | None = None
    revision: str | None = None


def connect() -> HfApi:
    """Return the Hub's client with the user's token, which is sent even where implicit tokens are off."""
    return HfApi(token=get_token(), library_name="hf_noneuclid")


def reason(error: BaseException) -> str:
    """Return what a failed request says, in a line and without secrets."""
    server = error.server_message if isinstance(error, HfHubHTTPError) else None
    text = server or str(error).strip() or "no message"
    return scrub(f"{type(error).__name__}: {text.splitlines()[0]}")


def create(api: HfApi, repository: Repository) -> None:
    """Make the repository and its branch unless they are there; a branch that is made is empty.

    Raises:
        InputError: it may not be made, or the Hub cannot be reached.
    """
    where = {"repo_id": repository.repo_id, "repo_type": repository.kind}
    try:
        api.create_repo(**where, private=repository.private, exist_ok=True)
        if repository.revision and not repository.revision.startswith("refs/"):
            _create_branch(api, repository)
    except Exception as error:  # the Hub, the network, and the client's own checks
        message = f"cannot make the repository {repository.repo_id}: {reason(error)}"
        if isinstance(error, HfHubHTTPError):
            message += ". Give a --hub_model_id in a namespace that your token may write to"
        raise InputError(message) from error


def _create_branch(api: HfApi, repository: Repository) -> None:
    where = {"repo_id": repository.repo_id, "repo_type": repository.kind}
    if _branch_files(api, repository) is not None:
        return
    api.create_branch(**where, branch=repository.revision, exist_ok=True)
    # It begins as a copy of main, and the model of main would be mixed with the one that is pushed.
    copied = [name for name in remote_files(api, repository) if name != ".gitattributes"]
    if copied:
        message = f"Begin {repository.revision} without the files of main"
        deletions = [CommitOperationDelete(name) for name in copied]
        api.create_commit(**where, operations=deletions, commit_message=message, revision=repository.revision)


def read_origin(folder: Path) -> str | None:
    """Return what tells this folder's content from another's on the Hub; None if nothing says so yet."""
    path = folder / ORIGIN_FILE
    return json.loads(path.read_text(encoding="utf-8"))["origin"] if path.is_file() else None


def write_origin(folder: Path, origin: str | None = None) -> None:
    """Write down what tells this folder's content from another's, unless that is written already.

    Args:
        folder: that will be pushed.
        origin: None for a random one.
    """
    if read_origin(folder) is None:
        text = json.dumps({"origin": origin or uuid.uuid4().hex}) + "\n"
        write_whole(folder / ORIGIN_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remote_files(api: HfApi, repository: Repository) -> list[str]:
    """Return the files of the repository; none where the branch is still to be made."""
    return _branch_files(api, repository) or []


def _branch_files(api: HfApi, repository: Repository) -> list[str] | None:
    """Return the files of the branch, None if there is no such branch."""
    where = {"repo_type": repository.kind, "revision": repository.revision}
    try:
        return api.list_repo_files(repository.repo_id, **where)
    except RevisionNotFoundError:
        return None


def remote_origin(api: HfApi, repository: Repository) -> str | None:
    """Return what `write_origin` wrote for the content of the repository; None if it is not ours."""
    where = {"repo_type": repository.kind, "revision": repository.revision}
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repository.repo_id, ORIGIN_FILE, **where, local_dir=folder)
        except RemoteEntryNotFoundError:  # not its base class, which a lost network raises, too
            return None
        return json.loads(Path(path).read_text(encoding="utf-8")).get("origin")


def upload(api: HfApi, folder: Path, repository: Repository, message: str, replace: bool = False) -> str:
    """Push a folder in place of the weights in its repository; what is there already is not sent again.

    Args:
        api: the Hub's client.
        folder: what to push, checkpoints left out.
        repository: there already.
        message: of the commit.
        replace: delete what the repository holds beside this folder and its checkpoints.

    Returns:
        The address of the commit.

    Raises:
        PushError: the Hub or the network failed, or a file holds a secret.
    """
    try:
        paths = _pushed(folder)
        size = sum(path.stat().st_size for path in paths)
        print(f"Pushing {len(paths)} files, {size / 1e6:,.1f} MB, to {repository.repo_id}", file=sys.stderr)
        _refuse_secrets(paths)
        with _progress():
            commit = _upload(api, folder, repository, message, replace, paths)
    except PushError:
        raise
    except Exception as error:  # whatever the Hub, the network or the transfer can raise
        raise PushError(f"the push to {repository.repo_id} failed: {reason(error)}") from error
    print(f"Pushed: {commit.commit_url}", file=sys.stderr)
    return str(commit.commit_url)


def push_later(error: Exception, folder: Path, command: str) -> PushError:
    """Return the error with where the results are, and the command that pushes them."""
    text = f"{error}. Nothing is lost: the results are in {folder}. Push later with:\n  {command}"
    return PushError(text)


def push_command(*arguments: str) -> str:
    """Return the command that pushes later, from the folder in which this process runs."""
    return shlex.join(["python", os.path.relpath(PUBLISH), *arguments])


def _upload(
    api: HfApi, folder: Path, repository: Repository, message: str, replace: bool, paths: Sequence[Path]
) -> CommitInfo:
    kept = [path.relative_to(folder).as_posix() for path in paths]
    others = [name for name in remote_files(api, repository) if name not in kept]
    stale = [name for name in others if _is_replaced(name, replace)]
    return api.upload_folder(
        repo_id=repository.repo_id,
        repo_type=repository.kind,
        revision=repository.revision,
        folder_path=folder,
        commit_message=message,
        allow_patterns=[glob.escape(name) for name in kept],
        delete_patterns=[glob.escape(name) for name in stale] or None,
    )


def _is_replaced(name: str, replace: bool) -> bool:
    if name.startswith(("checkpoint-", "last-checkpoint/")):
        return False
    return replace or _matches(name, WEIGHTS)


def _pushed(folder: Path) -> list[Path]:
    """Return the files of a folder that are pushed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not _matches(path.relative_to(folder).as_posix(), NOT_PUSHED)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _refuse_secrets(paths: Sequence[Path]) -> None:
    secrets = [secret.encode() for secret in known_secrets()]
    for path in paths:
        content = b"" if path.suffix in NOT_SEARCHED else path.read_bytes()
        if any(secret in content for secret in secrets):
            raise PushError(f"{path} holds a token or password of yours: remove it, nothing was pushed")


@contextmanager
def _progress() -> Iterator[None]:
    """Show progress: bars on a terminal, lines in a log; the Trainer may have turned it off."""
    before = logging.get_verbosity()
    if are_progress_bars_disabled():
        enable_progress_bars()
    logging.set_verbosity(min(before, logging.INFO))
    try:
        yield
    finally:
        logging.set_verbosity(before)
