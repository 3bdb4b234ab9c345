"""Who owns which matrix, what moves where, and what is refused: layouts, without any process but this one."""

from itertools import pairwise
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.elementwise import MIB
from hf_noneuclid.layouts import dtensor, zero
from hf_noneuclid.layouts.exchange import Exchange, make_blocks, overlap
from hf_noneuclid.layouts.ownership import assign, home
from hf_noneuclid.layouts.pieces import Holding, Piece
from hf_noneuclid.layouts.plan import make_plan
from hf_noneuclid.layouts.ranks import Ranks
from hf_noneuclid.polar import polar_factor, polar_flops

CPU = torch.device("cpu")
TOLERANCE = 1.05  # of an even share

# -------------------------------------------------------------------- ownership

costs_and_workers = st.tuples(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))


def loads_of(costs, owners, workers):
    loads = [0] * workers
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


@given(costs_and_workers, st.data())
def test_no_worker_computes_more_than_its_share_and_one_matrix(drawn, data):
    costs, workers = drawn
    at = st.one_of(st.none(), st.integers(0, workers - 1))
    homes = data.draw(st.lists(at, min_size=len(costs), max_size=len(costs)))
    loads = loads_of(costs, assign(costs, workers, homes), workers)
    assert max(loads) <= TOLERANCE * sum(costs) / workers + max(costs, default=0)


@given(costs_and_workers, st.data())
def test_every_matrix_stays_at_home_if_the_homes_are_balanced(drawn, data):
    costs, workers = drawn
    homes = data.draw(st.permutations([i % workers for i in range(workers * len(costs))]))
    assume(homes)
    assert assign([7] * len(homes), workers, homes) == homes


def test_a_matrix_leaves_a_home_that_has_its_share():
    owners = assign([5, 5, 5, 5], 2, [0, 0, 0, 0])
    assert sorted(owners) == [0, 0, 1, 1]


@pytest.mark.parametrize("at", [None, 0, 4])
def test_one_matrix_has_one_owner_among_many_workers(at):
    assert assign([3], 5, [at]) == [at or 0]


@given(st.integers(1, 9), st.integers(0, 60))
def test_equal_matrices_are_dealt_out_evenly(workers, matrices):
    loads = loads_of([1] * matrices, assign([1] * matrices, workers, [None] * matrices), workers)
    assert max(loads) - min(loads) <= 1


@given(st.integers(1, 20), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 20))
def test_the_home_is_the_shard_that_holds_nearly_all_of_a_matrix(size, cuts, start):
    cuts = [0, *sorted(cuts), 40]
    unit = (start, start + size)
    sizes = [overlap(unit, run) for run in pairwise(cuts)]
    holders = [(run, shard) for shard, run in enumerate(pairwise(cuts)) if run[1] > run[0]]
    expected = sizes.index(max(sizes)) if max(sizes) >= 0.9 * size else None
    assert home(unit, holders) == expected


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_operations_of_a_polar_factor_are_those_that_it_takes(shape, steps):
    with FlopCounterMode(display=False) as counter:
        polar_factor(torch.randn(1, *shape), steps=steps)
    assert polar_flops(*shape, steps) == counter.get_total_flops()


def test_a_matrix_of_one_row_or_column_costs_next_to_nothing():
    assert polar_flops(1, 64) == polar_flops(64, 1) < polar_flops(2, 64) / 10


# -------------------------------------------------------------------- exchange


class Waiting(Exception):  # noqa: N818 - no error: the others have not posted yet
    pass


class Simulated:
    """One of several ranks in this process, with the collectives of Ranks.

    Every rank runs until it waits for what others have not sent, and then again from the beginning.
    """

    device = CPU

    def __init__(self, replicas, shards, place, posted):
        self.replicas, self.shards, self.place, self._posted = replicas, shards, place, posted
        self.replica, self.shard = place
        self._calls = 0

    def _post(self, message, places):
        """Leaves a message with the call that it belongs to, and returns those of the others."""
        call, self._calls = self._calls, self._calls + 1
        self._posted[call, self.place] = message
        if any((call, place) not in self._posted for place in places):
            raise Waiting
        return [self._posted[call, place] for place in places]

    def all_to_all(self, x, sends, receives):
        assert x.shape == (sum(sends),)
        row = [(self.replica, shard) for shard in range(self.shards)]
        pieces = [sent[self.shard] for sent in self._post(torch.split(x, list(sends)), row)]
        assert [len(piece) for piece in pieces] == list(receives)
        return torch.cat(pieces)

    def all_gather(self, x, sizes):
        column = [(replica, self.shard) for replica in range(self.replicas)]
        gathered = self._post(x, column)
        assert [len(piece) for piece in gathered] == list(sizes)
        return gathered


def on_all_ranks(replicas, shards, work):
    """What a function of a rank returns on each, by place."""
    waiting = [(replica, shard) for replica in range(replicas) for shard in range(shards)]
    posted, results = {}, {}
    for _ in range(3 * len(waiting)):
        for place in waiting:
            try:
                results[place] = work(Simulated(replicas, shards, place, posted))
            except Waiting:
                continue
    assert results.keys() == set(waiting), "a rank waits for ever"
    return results


@st.composite
def batches(draw):
    """Stacks, the runs of them that each shard holds, and owners."""
    size = st.integers(1, 4)
    replicas, shards = draw(st.integers(1, 3)), draw(size)
    stacks = draw(st.lists(st.tuples(st.integers(1, 3), size, size), min_size=1, max_size=4))
    cuts = []
    for stack in stacks:
        inner = st.lists(st.integers(0, prod(stack)), min_size=shards - 1, max_size=shards - 1)
        cuts.append([0, *sorted(draw(inner)), prod(stack)])
    held = [[(cut[shard], cut[shard + 1]) for cut in cuts] for shard in range(shards)]
    place = st.tuples(st.integers(0, replicas - 1), st.integers(0, shards - 1))
    units = sum(count for count, _, _ in stacks)
    return replicas, shards, stacks, held, draw(st.lists(place, min_size=units, max_size=units))


def values_of(stacks):
    """The parameters of a batch; no two of their entries are equal."""
    sizes = [prod(stack) for stack in stacks]
    numbers = torch.split(torch.arange(1.0, sum(sizes) + 1), sizes)
    return [x.view(stack) for x, stack in zip(numbers, stacks, strict=True)]


def parts_of(values, runs):
    return [x.flatten()[slice(*run)] for x, run in zip(values, runs, strict=True)]


@given(batches())
def test_gather_gives_the_owners_their_matrices_and_nobody_else(batch):
    replicas, shards, stacks, held, owners = batch
    values = values_of(stacks)
    blocks = make_blocks(stacks, owners)

    def gather(ranks):
        exchange = Exchange(blocks, held, ranks)
        gathered = exchange.gather(parts_of(values, held[ranks.shard]))
        return dict(zip(exchange.owned, gathered, strict=True))

    matrices = [matrix for stack in values for matrix in stack]
    received = []
    for place, gathered in on_all_ranks(replicas, shards, gather).items():
        for block, tensor in gathered.items():
            for unit, matrix in zip(block.units, tensor, strict=True):
                assert owners[unit] == place
                assert torch.equal(matrix, matrices[unit])
                received.append(unit)
    assert sorted(received) == list(range(len(owners)))


@given(batches())
def test_scatter_gives_every_rank_its_part_of_what_the_owners_computed(batch):
    replicas, shards, stacks, held, owners = batch
    values = values_of(stacks)
    blocks = make_blocks(stacks, owners)

    def scatter(ranks):
        exchange = Exchange(blocks, held, ranks)
        factors = [-values[b.piece].flatten()[slice(*b.run)].view(b.shape) for b in exchange.owned]
        return exchange.scatter(factors, torch.float32)

    for (_, shard), directions in on_all_ranks(replicas, shards, scatter).items():
        for direction, part in zip(directions, parts_of(values, held[shard]), strict=True):
            assert torch.equal(direction.flatten(), -part)


@given(batches())
def test_blocks_are_the_matrices_in_order_and_as_few_as_possible(batch):
    _, _, stacks, _, owners = batch
    blocks = make_blocks(stacks, owners)
    assert [block.owner for block in blocks for _ in block.units] == owners
    assert [unit for block in blocks for unit in block.units] == list(range(len(owners)))
    for one, two in pairwise(blocks):
        same_piece = one.piece == two.piece
        assert two.run[0] == (one.run[1] if same_piece else 0)
        assert not (same_piece and one.owner == two.owner)


runs = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: tuple(sorted(pair)))


@given(runs, runs)
def test_the_overlap_of_runs_is_how_many_elements_they_share(a, b):
    assert overlap(a, b) == len(set(range(*a)) & set(range(*b)))


# -------------------------------------------------------------------- which part a rank holds


@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 8))
def test_fsdp2_holds_the_rows_that_torch_chunk_gives(shape, shards):
    x = torch.arange(prod(shape)).view(shape)
    chunks = list(torch.chunk(x if shape else x.view(1), shards))
    chunks += [x.flatten()[:0]] * (shards - len(chunks))
    for shard, chunk in enumerate(chunks):
        assert torch.equal(x.flatten()[slice(*dtensor.row_run(tuple(shape), shard, shards))], chunk.flatten())


@given(st.integers(0, 40), st.integers(1, 8))
def test_zero3_holds_equal_runs_of_which_the_last_may_be_short_or_empty(elements, shards):
    partition = -(-elements // shards)
    x = torch.arange(elements)
    padded = torch.nn.functional.pad(x, (0, shards * partition - elements), value=-1)
    for shard in range(shards):
        mine = padded[shard * partition : (shard + 1) * partition]
        assert torch.equal(x[slice(*zero.flat_run(elements, partition, shard))], mine[mine >= 0])


def piece(shape, run=None, name="w", stack=None, flat=None, tensor=None):
    run = (0, prod(shape)) if run is None else run
    tensor = torch.zeros(run[1] - run[0], requires_grad=True) if tensor is None else tensor
    norm = "spectral" if stack else "linf"
    return Piece(Holding(tensor, tuple(shape), run, flat), name, norm, 0.0, 1.0, stack)


@given(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), st.data())
def test_numbers_of_the_matrices_reach_every_element_of_a_flat_part(stack, data):
    run = tuple(sorted(data.draw(st.tuples(*[st.integers(0, prod(stack))] * 2))))
    flat = slice(0, run[1] - run[0])
    its = piece(stack, run, stack=stack, flat=flat)
    by_unit = torch.arange(1.0, stack[0] + 1)
    everywhere = by_unit.view(-1, 1, 1).expand(stack).flatten()[slice(*run)]
    assume(run[1] > run[0])
    assert torch.equal(its.spread(by_unit).expand(run[1] - run[0]), everywhere)
    assert its.unit_sizes() == [int((everywhere == x).sum()) for x in by_unit]


@given(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)), st.integers(1, 4), st.data())
def test_numbers_of_the_matrices_reach_every_row_of_a_shard(stack, shards, data):
    shard = data.draw(st.integers(0, shards - 1))
    run = dtensor.row_run(stack, shard, shards)
    assume(run[1] > run[0])
    its = piece(stack, run, stack=stack)
    by_unit = torch.arange(1.0, stack[0] + 1)
    local = torch.chunk(torch.zeros(stack), shards)[shard]
    expected = torch.chunk(by_unit.view(-1, 1, 1).expand(stack), shards)[shard]
    assert torch.equal(local + its.spread(by_unit), expected)
    assert its.unit_sizes() == [int((expected == x).sum()) for x in by_unit]


# -------------------------------------------------------------------- what a plan refuses


class Told(Ranks):
    """Ranks of which the others have said what they hold: (place, parameters, checksum)."""

    def agree(self, mine):
        return [mine, *self.others]


def two_ranks(said, replicas=1, shards=1):
    ranks = Told(CPU, replicas=replicas, shards=shards)
    object.__setattr__(ranks, "others", said)
    return ranks


def test_a_part_that_no_rank_holds_is_refused():
    with pytest.raises(RuntimeError, match="of the 10 elements of w: parts are missing"):
        make_plan([piece((10,), run=(0, 6))], Ranks(CPU), 5, MIB)


@pytest.mark.parametrize("run", [(7, 10), (5, 10), (0, 6)], ids=["gap", "twice", "the same"])
def test_parts_that_do_not_fit_together_are_refused(run):
    ranks = two_ranks([((0, 1), [("w", (10,), run)], 0.0)], shards=2)
    with pytest.raises(RuntimeError, match=r"hold \[\(0, 6\), .* parts are missing, twice there"):
        make_plan([piece((10,), run=(0, 6))], ranks, 5, MIB)


def test_parts_that_fit_together_are_planned():
    """Else the tests above could be met by refusing everything."""
    ranks = two_ranks([((0, 1), [("w", (10,), (6, 10))], 0.0)], shards=2)
    assert make_plan([piece((10,), run=(0, 6))], ranks, 5, MIB).pieces


@pytest.mark.parametrize("theirs", [[], [("x", (10,), (0, 10))], [("w", (9,), (0, 9))]])
def test_a_rank_that_steps_other_parameters_is_refused(theirs):
    ranks = two_ranks([((1, 0), theirs, 0.0)], replicas=2)
    with pytest.raises(RuntimeError, match=r"rank \(1, 0\) .* step different parameters"):
        make_plan([piece((10,))], ranks, 5, MIB)


def test_copies_that_differ_are_refused_and_equal_ones_are_not():
    here, held = piece((4,), tensor=torch.ones(4)), [("w", (4,), (0, 4))]
    assert make_plan([here], two_ranks([((1, 0), held, 4.0)], replicas=2), 5, MIB).pieces
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        make_plan([here], two_ranks([((1, 0), held, 4.1)], replicas=2), 5, MIB)


# -------------------------------------------------------------------- what an engine must not do


def optimizer_of(*params):
    groups = [{"params": [(f"w{i}", param)], "norm": "linf"} for i, param in enumerate(params)]
    return NonEuclideanDescent(groups, 0.1, descent="constrained", product_norm="linf")


def parameter(**attributes):
    param = torch.nn.Parameter(torch.ones(4))
    param.__dict__.update(attributes)
    return param


def test_a_flat_parameter_of_fsdp1_is_refused():
    with pytest.raises(RuntimeError, match=r"w0 is a flat parameter .*fsdp_version: 2"):
        optimizer_of(parameter(_is_flat_param=True)).step()


def test_parameters_merged_by_an_unknown_engine_are_refused():
    optimizer = optimizer_of(parameter())
    optimizer.param_groups[0]["params"] = [parameter(), parameter()]
    with pytest.raises(RuntimeError, match="given 1 parameters, and 2 stand in their place"):
        optimizer.step()


def test_groups_that_deepspeed_would_step_apart_are_refused():
    with pytest.raises(RuntimeError, match=r"DeepSpeed steps the 2 groups .*one_group"):
        optimizer_of(parameter(_hp_mapping=None), parameter(_hp_mapping=None)).step()


def fragment(start, offset, size):
    """What DeepSpeed notes at a parameter."""
    address = SimpleNamespace
    return SimpleNamespace(
        lp_fragment_address=address(start=start, numel=size),
        hp_fragment_address=address(start=offset, numel=size),
    )


def test_a_fragment_is_found_where_deepspeed_says_that_it_is():
    param = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    flat = torch.tensor([9.0, 1.0, 2.0, 3.0])
    param._hp_mapping = fragment(start=1, offset=1, size=3)
    (holding,) = zero.hold([flat], [param], ["w"])
    assert (holding.shape, holding.run, holding.flat) == ((2, 3), (1, 4), slice(1, 4))
    param._hp_mapping = fragment(start=1, offset=0, size=3)
    with pytest.raises(RuntimeError, match=r'does not hold w where .* "round_robin_gradients": false'):
        zero.hold([flat], [param], ["w"])


def test_a_group_of_several_partitions_is_refused():
    with pytest.raises(RuntimeError, match="put 2 tensors into a group in place of 1 parameters"):
        zero.hold([torch.zeros(2)] * 2, [parameter()], ["w"])


def test_sub_groups_of_zero3_are_refused_with_the_size_that_is_needed():
    params = [parameter(ds_id=i, partition_numel=lambda: 2) for i in range(3)]
    params[0]._z3_optimizer = SimpleNamespace(fp16_groups=[params[:2], params[2:]])
    with pytest.raises(RuntimeError, match=r'in 2 sub-groups.* "sub_group_size" to 6 or more'):
        zero.hold([torch.zeros(4)], params, ["a", "b", "c"])
