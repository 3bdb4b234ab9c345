"""Whether what --report_to names is there: the Trainer finds out when model and data are loaded already."""

from collections.abc import Sequence

from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import get_available_reporting_integrations

from hf_noneuclid.experiments.common import InputError

NEVER_LISTED = {"azure_ml", "flyte"}  # by transformers, though installed


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers are known and installed.

    Args:
        names: as in `TrainingArguments.report_to`.

    Raises:
        InputError: one is not.
    """
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise InputError(f"--report_to: {error}") from error
    missing = set(names) - {*get_available_reporting_integrations(), *NEVER_LISTED}
    if missing:
        raise InputError(f"--report_to {', '.join(sorted(missing))}: it is not installed, or too old")
