"""Pushes to the Hub what is on disk: the folder of a run, or a finished study.

    noneuclid publish --folder outputs/pretrain --hub_model_id me/pretrain
    noneuclid publish --study outputs/mini --namespace me

The first does later what --push_to_hub of the recipes does at once. The second pushes the best model of
each method as <suite>-<method> and all runs as the dataset <suite>-runs. It needs the models: a sweep keeps
them with --keep_models. After a failure, start the same command again: it sends only what is missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers.hf_argparser import string_to_bool

from hf_noneuclid.experiments.common import ExitCode, InputError, PushError
from hf_noneuclid.experiments.publishing.checks import target_of
from hf_noneuclid.experiments.publishing.model import publish_folder
from hf_noneuclid.experiments.secrets import redact_arguments, scrub


class _Parser(argparse.ArgumentParser):
    """Hides secrets in its messages: argparse prints a mistyped option with its value."""

    def error(self, message: str) -> NoReturn:
        super().error(scrub(message))


def main(argv: Sequence[str] | None = None) -> None:
    """Pushes; exits with 2 for bad input, with 4 if the Hub or the network failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(argv)
    args.hub_model_id = args.namespace if args.study else args.hub_model_id
    try:
        if args.study:
            from hf_noneuclid.experiments.publishing.study import publish_study  # imports optuna

            later = ["publish", *redact_arguments(argv)]
            publish_study(args.study, target_of(args), later, args.storage, args.study_name)
        else:
            publish_folder(args.output_dir, target_of(args))
    except (InputError, PushError) as error:
        print(f"noneuclid publish: error: {scrub(str(error))}", file=sys.stderr)
        code = ExitCode.BAD_INPUT if isinstance(error, InputError) else ExitCode.NOT_PUSHED
        raise SystemExit(code) from None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser("noneuclid publish", description=__doc__, formatter_class=layout, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--folder", dest="output_dir", type=Path, help="folder of a finished run")
    what.add_argument("--study", type=Path, help="output folder of a sweep")
    parser.add_argument("--hub_model_id", help="repository for --folder; default: the folder's name")
    parser.add_argument("--namespace", help="user or organisation for --study")
    parser.add_argument("--storage", help="storage of the study, if the sweep was given one")
    parser.add_argument("--study_name", help="name of the study, if the storage holds several")
    parser.add_argument("--hub_revision", help="branch to push to; default: main")
    parser.add_argument("--hub_private_repo", type=string_to_bool, help="make new repositories private")
    parser.add_argument("--hub_license", help="licence of the weights: apache-2.0, mit, ...")
    parser.add_argument("--overwrite_hub_model", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    if args.study is not None and args.namespace is None:
        parser.error("--study needs --namespace, the user or organisation to push to")
    return args
