"""Keeps tokens out of everything that a run writes, prints or uploads."""

import os
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import get_token

HIDDEN = "***"
SHORTEST = 12  # characters of a secret: a shorter one would also be found in ordinary words
_SECRET_NAME = re.compile(r"(^|[_-])(token|password|secret|api[_-]?key)$", re.IGNORECASE)
_TEXT_TOKEN = re.compile(r"(bos|eos|pad|unk|sep|cls|mask)[_-]token$")  # tokens of a vocabulary
# In a URL: the password after the user, up to the last @, and parameters.
_URL_PASSWORD = re.compile(r"(://[^\s/:@\"']*:)[^\s\"']+(?=@)")
_URL_PARAMETER = re.compile(
    r"([?&](?:\w+[_-])?(?:token|password|secret|api[_-]?key)=)[^\s&\"']+", re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")


def keep_token(args: Any) -> None:
    """Moves the token of the Trainer's arguments to HF_TOKEN, where the Hub's client looks for it.

    The Trainer pickles its arguments into training_args.bin, with any token among them.
    """
    if args.hub_token:
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None


def redact_arguments(argv: Sequence[str]) -> list[str]:
    """A command line without options such as --hub_token: it can be run where HF_TOKEN is set."""
    shown, is_value = [], False
    for argument in argv:
        name, sign, _ = argument.partition("=")
        is_secret = name.startswith("-") and _names_secret(name)
        if not (is_secret or is_value):
            shown.append(argument)
        is_value = is_secret and not sign
    return list(scrub(shown))


def scrub(value: Any) -> Any:
    """The value with ``***`` for every secret in its texts and URLs, and under keys that name one."""
    return _scrub(value, known_secrets())


def holds_secret(name: str, value: Any) -> bool:
    """Whether an option is a secret, by its name, or has a known one in its value."""
    return _names_secret(name) or scrub([value]) != [value]  # in lists NaN is equal to itself


def known_secrets() -> list[str]:
    """The secrets that this process can know: the Hub's token, and those of the environment."""
    named = [value for name, value in os.environ.items() if _names_secret(name)]
    return sorted({secret for secret in (get_token(), *named) if secret and len(secret) >= SHORTEST})


def _names_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and _TEXT_TOKEN.search(name) is None


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and _names_secret(key)


def _scrub(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if _is_secret(key, item) else _scrub(item, secrets) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_scrub(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    for pattern in (_URL_PASSWORD, _URL_PARAMETER):
        value = pattern.sub(rf"\1{HIDDEN}", value)
    return _HUB_TOKEN.sub(HIDDEN, value)
