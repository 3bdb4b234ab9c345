"""What must hold on the Hub before anything is trained for it."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.publishing.hub import (
    Repository,
    connect,
    read_origin,
    reason,
    remote_files,
    remote_origin,
)
from hf_noneuclid.experiments.training.options import RecipeArguments

NO_CONTENT = {".gitattributes", ".gitignore", "README.md", "LICENSE"}  # what makes no repository a model's
WRITERS = ("admin", "write", "contributor")


def check_hub(args: RecipeArguments) -> None:
    """See whether a run with --push_to_hub will be able to push; completes `args.hub_model_id`.

    Asks the Hub on the first process alone, and writes nothing.

    Raises:
        InputError: no token, no right to the repository, another model in it, or no Hub.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    folder = Path(args.output_dir)
    name = args.hub_model_id or folder.absolute().name
    repository = check_repository(
        Repository(name, private=args.hub_private_repo, revision=args.hub_revision),
        None if args.resume_from_checkpoint is None else read_origin(folder),
        args.overwrite_hub_model,
    )
    args.hub_model_id = repository.repo_id


def check_repository(repository: Repository, origin: str | None, overwrite: bool) -> Repository:
    """See whether the user may push to a repository; returns it with its namespace.

    Args:
        repository: may lack a namespace, which then is the user's.
        origin: tells what will be pushed from anything else (`hub.write_origin`); None for something new.
        overwrite: push to it whatever it holds.

    Raises:
        InputError: no token, no right to the repository, other content in it, or no Hub.
    """
    api = connect()
    user = _user(api)
    name = repository.repo_id
    repo_id = name if "/" in name else f"{user['name']}/{name}"
    repository = Repository(repo_id, repository.kind, repository.private, repository.revision)
    try:
        validate_repo_id(repo_id)
        if _may_write(api, repository, user):
            _check_content(api, repository, origin, overwrite)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {name}: {error}") from error
    except InputError:
        raise
    except Exception as error:  # the Hub and the network
        raise InputError(_unreachable(api, error)) from error
    return repository


def _user(api: HfApi) -> dict[str, Any]:
    """Return who the token belongs to."""
    if constants.is_offline_mode():
        raise InputError("pushing needs the Hub, and HF_HUB_OFFLINE is set: unset it, or push later")
    if not api.token:
        raise InputError(
            "pushing needs a token and there is none: log in with `hf auth login`, set HF_TOKEN, or give "
            "--hub_token"
        )
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(
                f"the Hub does not accept the token ({reason(error)}): log in with `hf auth login`"
            ) from error
        raise InputError(_unreachable(api, error)) from error
    except Exception as error:  # the network has exceptions of its own
        raise InputError(_unreachable(api, error)) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError("the token may read only: pushing needs one with the role `write`")
    return user


def _unreachable(api: HfApi, error: BaseException) -> str:
    return (
        f"{api.endpoint} cannot be asked: {reason(error)}. Try again, or train without --push_to_hub and "
        "push later with publish.py"
    )


def _may_write(api: HfApi, repository: Repository, user: dict[str, Any]) -> bool:
    """Return whether the repository is there.

    Raises:
        InputError: the user may not write to it, or not make it, or it is public and should be private.
    """
    where = {"repo_id": repository.repo_id, "repo_type": repository.kind}
    try:
        info = api.repo_info(**where)
    except RepositoryNotFoundError:
        organisations = user.get("orgs", [])
        own = {org["name"] for org in organisations if org.get("roleInOrg", "write") in WRITERS}
        namespace = repository.repo_id.partition("/")[0]
        if namespace not in {user["name"], *own}:
            raise InputError(
                f"{user['name']} may not make {repository.repo_id}: the namespace must be one of "
                f"{', '.join([user['name'], *sorted(own)])}"
            ) from None
        return False
    try:
        api.auth_check(**where, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        raise InputError(
            f"{user['name']} has no right to write to {repository.repo_id} ({reason(error)}): give another "
            "--hub_model_id"
        ) from error
    if repository.private and info.private is False:
        raise InputError(
            f"{repository.repo_id} is public, and --hub_private_repo is for a repository that is made: make "
            "it private in its settings, give another --hub_model_id, or leave --hub_private_repo out"
        )
    return True


def _check_content(api: HfApi, repository: Repository, origin: str | None, overwrite: bool) -> None:
    content = set(remote_files(api, repository)) - NO_CONTENT
    if not content or overwrite:
        return
    if origin is None or remote_origin(api, repository) != origin:
        raise InputError(
            f"{repository.repo_id} holds something else already ({min(content)}, ...): replace it with "
            "--overwrite_hub_model, or give another --hub_model_id or --hub_revision"
        )
