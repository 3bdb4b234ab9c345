"""Collects these tests only with ``-m clients``: importing what they train with takes half a minute."""

import pytest

pytest.register_assert_rewrite("common")


def pytest_ignore_collect(config):
    chosen = config.option.markexpr
    return True if chosen and "clients" not in chosen.replace("not clients", "") else None
