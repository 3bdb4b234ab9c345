"""Push to the Hub what is on disk: the folder of a run, or a finished suite.

    python recipes/publish.py --folder outputs/pretrain --hub_model_id me/pretrain
    python recipes/publish.py --study outputs/mini --namespace me

The first does later what --push_to_hub of the recipes does at once. The second pushes the best checkpoint
of each method as <suite>-<method> and all runs with the report as the dataset <suite>-runs, linked to one
another; it needs the models, which sweep.py keeps with --keep_models. Started again after a failure, both
send what is missing alone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hf_noneuclid.experiments.common import ExitCode, InputError, PushError
from hf_noneuclid.experiments.publishing.checks import check_repository
from hf_noneuclid.experiments.publishing.facts import RunFacts
from hf_noneuclid.experiments.publishing.hub import Repository, push_command, read_origin
from hf_noneuclid.experiments.publishing.model import push_folder
from hf_noneuclid.experiments.secrets import redact_arguments, scrub


class _Parser(argparse.ArgumentParser):
    """Argparse would print what it does not know, and an option with a typing error may hold a token."""

    def error(self, message: str) -> NoReturn:
        super().error(scrub(message))


def main(argv: Sequence[str] | None = None) -> None:
    """Publish; exits with 2 for bad input, 4 if the Hub or the network failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(argv)
    if args.hub_token:
        os.environ["HF_TOKEN"] = args.hub_token
    try:
        if args.folder is not None:
            publish_folder(args)
        else:
            publish_study(args, push_command(*redact_arguments(argv)))
    except InputError as error:
        _stop(error, ExitCode.BAD_INPUT)
    except PushError as error:
        _stop(error, ExitCode.NOT_PUSHED)


def publish_folder(args: argparse.Namespace) -> None:
    """Push the folder of a run.

    Raises:
        InputError: it holds no finished run, or an adapter that nobody else could load, or may not be pushed
            there.
        PushError: the Hub or the network failed.
    """
    folder: Path = args.folder
    facts = RunFacts.read(folder)
    if facts.adapter and facts.hub_base is None:
        raise InputError(
            f"{folder} holds an adapter whose model is not on the Hub: nobody else could load it. Train with "
            "--lora_merge true"
        )
    repository = Repository(
        args.hub_model_id or folder.absolute().name, private=args.hub_private_repo, revision=args.hub_revision
    )
    repository = check_repository(repository, read_origin(folder), args.overwrite_hub_model)
    push_folder(folder, repository, args.overwrite_hub_model, args.hub_license)


def publish_study(args: argparse.Namespace, later: str) -> None:
    """Push a finished suite.

    Raises:
        InputError: the study or its models are not there, or may not be pushed there.
        PushError: the Hub or the network failed.
    """
    from hf_noneuclid.experiments.publishing import (
        study,  # imports optuna, which the push of a folder does not need
    )
    from hf_noneuclid.experiments.sweeping.study import default_storage, open_study

    template = Repository(args.namespace, private=args.hub_private_repo, revision=args.hub_revision)
    opened = open_study(args.storage or default_storage(args.study), args.study_name)
    study.publish_study(opened, args.study, template, args.overwrite_hub_model, args.hub_license, later)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="publish.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--folder", type=Path, help="of a run: with the model and metrics.json")
    what.add_argument("--study", type=Path, help="output folder of sweep.py")
    parser.add_argument("--hub_model_id", help="repository for --folder; by default the folder's name")
    parser.add_argument("--namespace", help="user or organisation for --study")
    parser.add_argument("--storage", help="where the trials are, if sweep.py was told so")
    parser.add_argument("--study_name", help="of the study, if the storage holds several")
    parser.add_argument("--hub_revision", help="branch to push to; by default main")
    parser.add_argument("--hub_private_repo", type=_boolean, metavar="true|false", help="of what is made")
    parser.add_argument("--hub_token", help="by default that of `hf auth login`, or HF_TOKEN")
    parser.add_argument("--hub_license", help="licence of the weights: apache-2.0, mit, ...")
    parser.add_argument(
        "--overwrite_hub_model", action="store_true", help="replace whatever the repository holds"
    )
    args = parser.parse_args(argv)
    if args.study is not None and args.namespace is None:
        parser.error("--study needs --namespace, the user or organisation to push to")
    return args


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}") from None


def _stop(error: Exception, code: ExitCode) -> None:
    print(f"publish.py: error: {scrub(str(error))}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
