"""What ``noneuclid plan`` predicts is what the engines' ranks send and keep."""

import json
from pathlib import Path

import pytest
from launching import torchrun

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("plan_worker.py")
SHARDED_OR_NOT = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
NUCLEAR_NORMS = ("exact", "stale")


def measure(nuclear_norm, ranks, *options):
    """The rows that the worker prints, one for each engine and rank."""
    log = torchrun(WORKER, "--nuclear_norm", nuclear_norm, *options, ranks=ranks, timeout=100)
    return [json.loads(line) for line in log.splitlines() if line.startswith('{"engine"')]


@pytest.fixture(scope="module", params=NUCLEAR_NORMS)
def rows(request):
    """All engines that two ranks can have, in one launch."""
    return measure(request.param, 2, "--engine", *SHARDED_OR_NOT)


@pytest.mark.parametrize("engine", SHARDED_OR_NOT)
def test_two_ranks_send_and_keep_what_is_predicted(rows, engine):
    mine = [row for row in rows if row["engine"] == engine]
    assert [row["rank"] for row in mine] == [0, 1]
    for row in mine:
        assert row["measured"] == row["predicted"]
        assert row["measured"]["all_gather" if engine == "ddp" else "all_to_all"] > 0


@pytest.mark.parametrize("nuclear_norm", NUCLEAR_NORMS)
def test_two_by_two_ranks_of_hsdp_do_too(nuclear_norm):
    rows = measure(nuclear_norm, 4, "--engine", "hsdp", "--gpus_per_node", "2")
    assert len(rows) == 4
    for row in rows:
        assert row["measured"] == row["predicted"]
        assert row["measured"]["all_gather"] > 0
        assert row["measured"]["all_to_all"] > 0
