"""Which rank owns which matrix, what moves where, and what is refused, all in one process."""

from itertools import accumulate, pairwise
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.buckets import MatrixBucket, Motion, Remembered, Workplace
from hf_noneuclid.distributed import LocalShard, ProcessGrid, fsdp2, zero
from hf_noneuclid.distributed.agreement import gather_intervals
from hf_noneuclid.distributed.exchange import Exchange
from hf_noneuclid.distributed.ownership import assign, find_home, make_blocks, own_matrices
from hf_noneuclid.distributed.shards import overlap
from hf_noneuclid.norms import Spectral
from hf_noneuclid.nuclear_norms import ExactNuclearNorm, Measured, Polar
from hf_noneuclid.parameters import LocalParameter
from hf_noneuclid.plan import bucket_matrices, polar_batches
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
    matrix = (start, start + size)
    sizes = [overlap(matrix, interval) for interval in pairwise(cuts)]
    holders = [(held, shard) for shard, held in enumerate(pairwise(cuts)) if held[1] > held[0]]
    expected = sizes.index(max(sizes)) if max(sizes) >= 0.9 * size else None
    assert find_home(matrix, holders) == expected


@pytest.mark.parametrize("replicas", [1, 2])
def test_matrices_stay_where_they_are_held_unless_replicas_hold_them_all(replicas):
    """Shard 0 holds the last four of eight matrices, and shard 1 the first four."""
    held = [[[(16, 32), (0, 16)]]]
    (owners,) = own_matrices([(8, 2, 2)], held[0], replicas, 2, polar_steps=5)
    if replicas == 1:
        assert owners == [(0, 1)] * 4 + [(0, 0)] * 4
    assert all(owners.count(owner) == 8 // (2 * replicas) for owner in owners)


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
    """One of several ranks in this process, with the collectives of ProcessGrid.

    Every rank runs until it waits for what others have not sent, and then again from the beginning.
    """

    device = CPU

    def __init__(self, replicas, shards, coordinate, posted):
        self.replicas, self.shards, self.coordinate, self._posted = replicas, shards, coordinate, posted
        self.replica, self.shard = coordinate
        self._calls = 0

    def _post(self, message, ranks):
        """Leaves a message with the call that it belongs to, and returns those of the others."""
        call, self._calls = self._calls, self._calls + 1
        self._posted[call, self.coordinate] = message
        if any((call, rank) not in self._posted for rank in ranks):
            raise Waiting
        return [self._posted[call, rank] for rank in ranks]

    def all_to_all(self, x, sends, receives):
        assert x.shape == (sum(sends),)
        row = [(self.replica, shard) for shard in range(self.shards)]
        parts = [sent[self.shard] for sent in self._post(torch.split(x, list(sends)), row)]
        assert [len(part) for part in parts] == list(receives)
        return torch.cat(parts)

    def all_gather(self, x, sizes):
        column = [(replica, self.shard) for replica in range(self.replicas)]
        gathered = self._post(x, column)
        assert [len(part) for part in gathered] == list(sizes)
        return gathered


def on_all_ranks(replicas, shards, work):
    """The results of a function of a grid on every rank, by coordinate."""
    waiting = [(replica, shard) for replica in range(replicas) for shard in range(shards)]
    posted, results = {}, {}
    for _ in range(3 * len(waiting)):
        for coordinate in waiting:
            try:
                results[coordinate] = work(Simulated(replicas, shards, coordinate, posted))
            except Waiting:
                continue
    assert results.keys() == set(waiting), "a rank waits for ever"
    return results


@st.composite
def buckets(draw):
    """Stacks, the elements of them that each shard holds, and the owner of every matrix of each."""
    size = st.integers(1, 4)
    replicas, shards = draw(st.integers(1, 3)), draw(size)
    stacks = draw(st.lists(st.tuples(st.integers(1, 3), size, size), min_size=1, max_size=4))
    cuts = []
    for stack in stacks:
        inner = st.lists(st.integers(0, prod(stack)), min_size=shards - 1, max_size=shards - 1)
        cuts.append([0, *sorted(draw(inner)), prod(stack)])
    held = [[(cut[shard], cut[shard + 1]) for cut in cuts] for shard in range(shards)]
    rank = st.tuples(st.integers(0, replicas - 1), st.integers(0, shards - 1))
    owners = [draw(st.lists(rank, min_size=count, max_size=count)) for count, _, _ in stacks]
    return replicas, shards, stacks, held, owners


def values_of(stacks):
    """The parameters of a bucket; no two of their entries are equal."""
    sizes = [prod(stack) for stack in stacks]
    numbers = torch.split(torch.arange(1.0, sum(sizes) + 1), sizes)
    return [x.view(stack) for x, stack in zip(numbers, stacks, strict=True)]


def parts_of(values, intervals):
    return [x.flatten()[slice(*interval)] for x, interval in zip(values, intervals, strict=True)]


@given(buckets())
def test_gather_gives_the_owners_their_matrices_and_nobody_else(bucket):
    replicas, shards, stacks, held, owners = bucket
    values = values_of(stacks)
    blocks = make_blocks(stacks, owners)

    def gather(grid):
        exchange = Exchange(blocks, held, grid, torch.float32)
        gathered = exchange.gather(parts_of(values, held[grid.shard]))
        return dict(zip(exchange.owned, gathered, strict=True))

    matrices = [matrix for stack in values for matrix in stack]
    flat_owners = [owner for its in owners for owner in its]
    received = []
    for rank, gathered in on_all_ranks(replicas, shards, gather).items():
        for block, tensor in gathered.items():
            for unit, matrix in zip(block.units, tensor, strict=True):
                assert flat_owners[unit] == rank
                assert torch.equal(matrix, matrices[unit])
                received.append(unit)
    assert sorted(received) == list(range(len(matrices)))


@given(buckets())
def test_scatter_gives_every_rank_its_part_of_what_the_owners_computed(bucket):
    replicas, shards, stacks, held, owners = bucket
    values = values_of(stacks)
    blocks = make_blocks(stacks, owners)

    def scatter(grid):
        exchange = Exchange(blocks, held, grid, torch.float32)
        factors = [-values[b.parameter].flatten()[slice(*b.interval)].view(b.shape) for b in exchange.owned]
        return exchange.scatter(factors)

    for (_, shard), directions in on_all_ranks(replicas, shards, scatter).items():
        for direction, part in zip(directions, parts_of(values, held[shard]), strict=True):
            assert torch.equal(direction.flatten(), -part)


@given(buckets())
def test_directions_travel_in_the_dtype_of_the_exchange(bucket):
    replicas, shards, stacks, held, owners = bucket
    blocks = make_blocks(stacks, owners)

    def scatter(grid):
        exchange = Exchange(blocks, held, grid, torch.bfloat16)
        return exchange.scatter([torch.ones(block.shape) for block in exchange.owned])

    for directions in on_all_ranks(replicas, shards, scatter).values():
        assert {x.dtype for x in directions} == {torch.bfloat16}


@given(buckets())
def test_blocks_are_the_matrices_in_order_and_as_few_as_possible(bucket):
    _, _, stacks, _, owners = bucket
    blocks = make_blocks(stacks, owners)
    flat_owners = [owner for its in owners for owner in its]
    assert [block.owner for block in blocks for _ in block.units] == flat_owners
    assert [unit for block in blocks for unit in block.units] == list(range(len(flat_owners)))
    for one, two in pairwise(blocks):
        same_parameter = one.parameter == two.parameter
        assert two.interval[0] == (one.interval[1] if same_parameter else 0)
        assert not (same_parameter and one.owner == two.owner)


intervals = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: tuple(sorted(pair)))


@given(intervals, intervals)
def test_the_overlap_of_intervals_is_how_many_elements_they_share(a, b):
    assert overlap(a, b) == len(set(range(*a)) & set(range(*b)))


# -------------------------------------------------------------------- which elements a rank holds


@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 8))
def test_fsdp2_holds_the_rows_that_torch_chunk_gives(shape, shards):
    x = torch.arange(prod(shape)).view(shape)
    chunks = list(torch.chunk(x if shape else x.view(1), shards))
    chunks += [x.flatten()[:0]] * (shards - len(chunks))
    for shard, chunk in enumerate(chunks):
        held = x.flatten()[slice(*fsdp2.row_interval(tuple(shape), shard, shards))]
        assert torch.equal(held, chunk.flatten())


@given(st.integers(0, 40), st.integers(1, 8))
def test_zero3_holds_equal_intervals_and_the_last_may_be_short_or_empty(elements, shards):
    partition = -(-elements // shards)
    x = torch.arange(elements)
    padded = torch.nn.functional.pad(x, (0, shards * partition - elements), value=-1)
    for shard in range(shards):
        mine = padded[shard * partition : (shard + 1) * partition]
        assert torch.equal(x[slice(*zero.flat_interval(elements, partition, shard))], mine[mine >= 0])


def matrices_of(stack, interval=None, flat=None, tensor=None):
    """A spectral parameter, with an interval of its elements on this rank."""
    interval = interval or (0, prod(stack))
    tensor = torch.zeros(interval[1] - interval[0]) if tensor is None else tensor
    return LocalParameter("w", LocalShard(tensor, stack, interval, flat), "spectral", 0.0, 1.0, stack)


class OnesFromOwners:
    """An exchange that brings directions of ones."""

    owned = ()

    def __init__(self, parameters):
        self.parameters = parameters

    def scatter(self, factors):
        return [torch.ones(x.shard.size) for x in self.parameters]


def move_along_ones(parameters, coefficients):
    """Moves the parameters of a bucket along directions of ones, every matrix by its coefficient."""
    states = [{"momentum": torch.zeros_like(x.shard.tensor)} for x in parameters if x.shard.size]
    bucket = MatrixBucket(
        parameters,
        0,
        Remembered(states, [], slope=False),
        Workplace(torch.zeros(()), chunk=1024, foreach=False, replica=0),
        norm=ExactNuclearNorm(),
        spectral=Spectral(),
        exchange=OnesFromOwners(parameters),
        polar_batches=[],
        reuse_gradients=False,
    )
    zeros = torch.zeros(bucket.units)
    motion = Motion(coefficients, coefficients, decay_rate=torch.zeros(()), ok=torch.tensor(True))
    bucket.apply(Measured(zeros, Polar([], zeros)), zeros, motion)


stacks = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


def coefficients_of(stacks):
    """A number for every matrix, and the same numbers at every element of the parameters."""
    by_unit = torch.arange(1.0, sum(count for count, _, _ in stacks) + 1)
    by_stack = torch.split(by_unit, [count for count, _, _ in stacks])
    return by_unit, [c.view(-1, 1, 1).expand(stack) for c, stack in zip(by_stack, stacks, strict=True)]


@given(st.lists(stacks, min_size=1, max_size=3), st.data())
def test_numbers_of_the_matrices_reach_every_element_of_a_flat_partition(stacks, data):
    held = [tuple(sorted(data.draw(st.tuples(*[st.integers(0, prod(x))] * 2)))) for x in stacks]
    ends = [0, *accumulate(stop - start for start, stop in held)]
    assume(ends[-1])
    partition = torch.zeros(ends[-1])
    parameters = [
        matrices_of(stack, interval, slice(*place), partition)
        for stack, interval, place in zip(stacks, held, pairwise(ends), strict=True)
    ]
    by_unit, everywhere = coefficients_of(stacks)
    move_along_ones(parameters, by_unit)
    expected = parts_of(everywhere, held)
    assert torch.equal(partition, torch.cat(expected))
    for x, mine in zip(parameters, expected, strict=True):
        assert x.unit_sizes() == [int((mine == c).sum()) for c in everywhere[parameters.index(x)][:, 0, 0]]


@given(st.lists(stacks, min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_numbers_of_the_matrices_reach_every_row_of_a_shard(stacks, shards, data):
    shard = data.draw(st.integers(0, shards - 1))
    held = [fsdp2.row_interval(stack, shard, shards) for stack in stacks]
    rows = [torch.zeros(x).flatten()[slice(*i)].view(-1, *x[1:]) for x, i in zip(stacks, held, strict=True)]
    assume(any(x.numel() for x in rows))
    parameters = [
        matrices_of(stack, interval, tensor=tensor)
        for stack, interval, tensor in zip(stacks, held, rows, strict=True)
    ]
    by_unit, everywhere = coefficients_of(stacks)
    move_along_ones(parameters, by_unit)
    for x, of_unit in zip(parameters, everywhere, strict=True):
        chunks = [*torch.chunk(of_unit, shards), *[of_unit[:0]] * shards]
        assert torch.equal(x.shard.tensor, chunks[shard])
        assert x.unit_sizes() == [int((chunks[shard] == c).sum()) for c in of_unit[:, 0, 0]]


# -------------------------------------------------------------------- which matrices are worked on together


@given(st.lists(stacks, min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 400))
def test_a_rank_receives_no_more_than_the_workspace_for_a_bucket(stacks, shards, workspace):
    """A single parameter may be larger."""
    parameters = [matrices_of(stack) for stack in stacks]
    held = {x: [fsdp2.row_interval(x.stack, s, shards) for s in range(shards)] for x in parameters}
    made = bucket_matrices(parameters, held, 1, shards, polar_steps=5, workspace=workspace)
    assert sorted(map(id, parameters)) == sorted(id(x) for bucket, _ in made for x in bucket)
    for bucket, blocks in made:
        assert len(bucket) == 1 or sum(4 * x.elements // shards for x in bucket) <= workspace
        assert sum(len(block.units) for block in blocks) == sum(x.units for x in bucket)


@given(buckets(), st.integers(1, 200))
def test_polar_factors_are_computed_by_shape_in_batches_of_a_limited_size(bucket, limit):
    _, _, stacks, _, owners = bucket
    blocks = make_blocks(stacks, owners)
    made = polar_batches(blocks, limit)
    assert sorted(i for batch in made for i in batch) == list(range(len(blocks)))
    for batch in made:
        assert len({blocks[i].shape[1:] for i in batch}) == 1
        assert len(batch) == 1 or sum(4 * prod(blocks[i].shape) for i in batch) <= limit


# -------------------------------------------------------------------- what all ranks must agree on


class Told(ProcessGrid):
    """A grid whose other ranks hold what they are told: (coordinate, parameters, checksum)."""

    def gather_objects(self, mine):
        return [mine, *self.others]


def two_ranks(others, replicas=1, shards=1):
    grid = Told(CPU, replicas=replicas, shards=shards)
    object.__setattr__(grid, "others", others)
    return grid


def agree(grid, shape=(10,), interval=(0, 10)):
    """The elements of w that each shard holds. This rank holds an interval, all ones."""
    shard = LocalShard(torch.ones(interval[1] - interval[0]), shape, interval)
    (held,) = gather_intervals(["w"], [shard], grid)
    return held


def test_elements_that_no_rank_holds_are_refused():
    with pytest.raises(RuntimeError, match="of the 10 elements of w: elements are missing"):
        agree(ProcessGrid(CPU), interval=(0, 6))


@pytest.mark.parametrize("theirs", [(7, 10), (5, 10), (0, 6)], ids=["gap", "twice", "the same"])
def test_shards_that_do_not_fit_together_are_refused(theirs):
    grid = two_ranks([((0, 1), [("w", (10,), theirs)], 0.0)], shards=2)
    with pytest.raises(RuntimeError, match=r"hold \[\(0, 6\), .* elements are missing, held twice"):
        agree(grid, interval=(0, 6))


def test_shards_that_fit_together_are_known_to_every_rank():
    """Otherwise the tests above would pass if everything were refused."""
    grid = two_ranks([((0, 1), [("w", (10,), (6, 10))], 0.0)], shards=2)
    assert agree(grid, interval=(0, 6)) == [(0, 6), (6, 10)]


@pytest.mark.parametrize("theirs", [[], [("x", (10,), (0, 10))], [("w", (9,), (0, 9))]])
def test_a_rank_that_steps_other_parameters_is_refused(theirs):
    grid = two_ranks([((1, 0), theirs, 0.0)], replicas=2)
    with pytest.raises(RuntimeError, match=r"rank \(1, 0\) .* step different parameters"):
        agree(grid)


def test_copies_that_differ_are_refused_and_equal_ones_are_not():
    held = [("w", (10,), (0, 10))]
    assert agree(two_ranks([((1, 0), held, 10.0)], replicas=2)) == [(0, 10)]
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        agree(two_ranks([((1, 0), held, 10.1)], replicas=2))


# -------------------------------------------------------------------- what an engine may do


def state_after_steps(*, replace, nuclear_norm):
    """The whole state after four steps. All of its tensors may be replaced after each, as offloading does."""
    matrix, vector = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [matrix], "norm": "spectral"}, {"params": [vector], "norm": "ada_l2"}]
    options = {"descent": "regularized", "product_norm": "hybrid"}
    options |= {"step_size": "momo+slope"}
    optimizer = NonEuclideanDescent(groups, 0.1, nuclear_norm=nuclear_norm, **options)
    for step in range(4):
        matrix.grad, vector.grad = torch.eye(3, 2) + step, torch.ones(2) / (step + 1)
        optimizer.step(loss=5.0 - step)
        if replace:
            for its in optimizer.state.values():
                its.update({key: x.clone() for key, x in its.items()})
    return [x.tolist() for its in optimizer.state.values() for x in its.values()]


@pytest.mark.parametrize("nuclear_norm", ["exact", "stale"])
def test_an_engine_may_replace_the_tensors_of_the_state_between_steps(nuclear_norm):
    kept = state_after_steps(replace=False, nuclear_norm=nuclear_norm)
    assert state_after_steps(replace=True, nuclear_norm=nuclear_norm) == kept


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
    with pytest.raises(RuntimeError, match="given 1 parameters, and an engine has replaced them by 2"):
        optimizer.step()


def test_groups_that_deepspeed_would_step_apart_are_refused():
    with pytest.raises(RuntimeError, match=r"DeepSpeed steps the 2 groups .*one_group"):
        optimizer_of(parameter(_hp_mapping=None), parameter(_hp_mapping=None)).step()


def fragment(start, offset, size):
    """The addresses that DeepSpeed stores with a parameter."""
    address = SimpleNamespace
    return SimpleNamespace(
        lp_fragment_address=address(start=start, numel=size),
        hp_fragment_address=address(start=offset, numel=size),
    )


def test_a_fragment_is_found_where_deepspeed_says_that_it_is():
    param = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    flat = torch.tensor([9.0, 1.0, 2.0, 3.0])
    param._hp_mapping = fragment(start=1, offset=1, size=3)
    (shard,) = zero.shard([flat], [param], ["w"])
    assert (shard.shape, shard.interval, shard.flat) == ((2, 3), (1, 4), slice(1, 4))
    param._hp_mapping = fragment(start=1, offset=0, size=3)
    with pytest.raises(RuntimeError, match=r'does not hold w where .* "round_robin_gradients": false'):
        zero.shard([flat], [param], ["w"])


def test_a_group_of_several_partitions_is_refused():
    with pytest.raises(RuntimeError, match="put 2 tensors into a group in place of 1 parameters"):
        zero.shard([torch.zeros(2)] * 2, [parameter()], ["w"])


def test_sub_groups_of_zero3_are_refused_with_the_size_that_is_needed():
    params = [parameter(ds_id=i, partition_numel=lambda: 2) for i in range(3)]
    params[0]._z3_optimizer = SimpleNamespace(fp16_groups=[params[:2], params[2:]])
    with pytest.raises(RuntimeError, match=r'in 2 sub-groups.* "sub_group_size" to 6 or more'):
        zero.shard([torch.zeros(4)], params, ["a", "b", "c"])
