"""The published example comes out exactly, and any placement keeps what balancing promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.parallel import eplb

# https://github.com/deepseek-ai/EPLB, README: 16 replicas, 4 groups, 2 nodes, 8 GPUs
LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]
EXPERTS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]]


def place(load_LE, n_slots, n_devices, **sizes):
    return eplb.balance(np.array(load_LE), n_slots, n_devices, **sizes)


def test_public_example_comes_out_exactly():
    placement = place(LOAD, 16, 8, n_groups=4, n_nodes=2)
    assert placement.hierarchical
    assert placement.expert_LP.tolist() == EXPERTS
    assert placement.count_LE.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]]
    loads = eplb.device_loads(np.array(LOAD), placement, 8)
    assert loads.tolist() == [[121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]]
    assert loads.max() / loads.mean() == pytest.approx(1.208, abs=5e-4)


def test_layers_are_placed_each_for_itself():
    other = [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]
    both = place([LOAD[0], other], 16, 8, n_groups=4, n_nodes=2)
    assert both.expert_LP[0].tolist() == EXPERTS[0]
    alone = place([other], 16, 8, n_groups=4, n_nodes=2)
    np.testing.assert_array_equal(both.expert_LP[1], alone.expert_LP[0])


def test_global_balances_better_than_groups_kept_on_nodes_allow():
    load = np.array([[100, 100, 100, 100, 1, 1, 1, 1]])
    kept = place(load, 8, 4, n_groups=2, n_nodes=2)
    free = place(load, 8, 4, n_groups=3, n_nodes=2)
    assert kept.hierarchical and not free.hierarchical
    assert eplb.device_loads(load, kept, 4).max() == 200
    assert eplb.device_loads(load, free, 4).max() == 101


def test_one_replica_a_device_stays_in_order():
    placement = place([[1, 5, 3, 2]], 4, 4)
    assert placement.expert_LP.tolist() == [[0, 1, 2, 3]]


def test_ties_go_to_the_lower_index():
    weights = np.arange(64, dtype=np.float32) % 2
    packed = eplb._pack(weights[None], 32).reshape(32, 2)
    assert packed.tolist() == [[2 * pack + 1, 2 * pack] for pack in range(32)]


@st.composite
def problems(draw):
    """(load_LE, slots, devices, groups, nodes)"""
    nodes = draw(st.sampled_from([1, 2, 3]))
    groups = nodes * draw(st.integers(1, 3)) if draw(st.booleans()) else draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 4))
    devices = nodes * draw(st.integers(1, 3))
    slots = devices * (-(-experts // devices) + draw(st.integers(0, 2)))
    load = draw(
        st.lists(
            st.lists(st.integers(0, 1000), min_size=experts, max_size=experts),
            min_size=1,
            max_size=3,
        )
    )
    return np.array(load), slots, devices, groups, nodes


@settings(max_examples=150, deadline=None)
@given(problems())
def test_placement_keeps_what_it_promises(problem):
    load, slots, devices, groups, nodes = problem
    n_layers, experts = load.shape
    found = eplb.balance(load, slots, devices, n_groups=groups, n_nodes=nodes)
    assert found.hierarchical == (groups % nodes == 0)
    assert found.expert_LP.shape == (n_layers, slots)
    assert found.count_LE.min() >= 1 and (found.count_LE.sum(1) == slots).all()
    for layer in range(n_layers):
        np.testing.assert_array_equal(
            np.bincount(found.expert_LP[layer], minlength=experts), found.count_LE[layer]
        )
        for expert, own in enumerate(found.slots_LEX[layer]):
            count = found.count_LE[layer, expert]
            assert (own[:count] >= 0).all() and (own[count:] == -1).all()
            assert len(set(own[:count])) == count
            assert (found.expert_LP[layer, own[:count]] == expert).all()
    assert found.slots_LEX.shape[2] == found.count_LE.max()
    loads = eplb.device_loads(load, found, devices)
    np.testing.assert_allclose(loads.sum(1), load.sum(1), rtol=1e-12)
    used = nodes if found.hierarchical else 1
    replica = np.take_along_axis(load / found.count_LE, found.expert_LP, 1)
    by_node, heaviest = loads.reshape(n_layers, used, -1), replica.reshape(n_layers, used, -1)
    # Within a node no device has more than another by more than the heaviest replica there.
    room = heaviest.max(2) * (1 + 1e-4) + 1e-3  # loads are added in float32
    assert (by_node.max(2) - by_node.min(2) <= room).all()
    if found.hierarchical:
        group = found.expert_LP // (experts // groups)
        node = np.broadcast_to(np.arange(slots) // (slots // nodes), group.shape)
        for layer in range(n_layers):
            homes = {(int(g), int(n)) for g, n in zip(group[layer], node[layer], strict=True)}
            assert len(homes) == groups  # a group is on one node
            assert {len([g for g, n in homes if n == at]) for at in range(nodes)} == {
                groups // nodes
            }


@pytest.mark.parametrize("seed", range(4))
def test_replicas_make_the_heaviest_as_light_as_can_be(seed):
    load = np.random.default_rng(seed).integers(1, 100, (1, 4))
    placement = eplb.balance(load, 8, 1)
    counts = (c for c in itertools.product(range(1, 6), repeat=4) if sum(c) == 8)
    best = min(float((load[0] / np.array(count)).max()) for count in counts)
    assert float((load / placement.count_LE).max()) == best


def test_no_load_at_all_is_placed():
    placement = place([[0, 0, 0, 0]], 8, 2, n_groups=2, n_nodes=2)
    assert placement.count_LE.sum() == 8 and placement.count_LE.min() >= 1


@pytest.mark.parametrize(
    ("load", "sizes", "message"),
    [
        (LOAD, (15, 8, 4, 2), r"n_slots=15 does not divide over n_devices=8; use 16"),
        (LOAD, (8, 8, 4, 2), r"n_slots=8 is fewer than the 12 experts; each needs at least one"),
        (
            LOAD,
            (16, 8, 8, 2),
            r"12 experts do not divide into n_groups=8; give the router's groups",
        ),
        (LOAD, (15, 5, 4, 2), r"n_devices=5 does not divide over n_nodes=2; give nodes of equal"),
        (LOAD, (16, 0, 4, 0), r"n_devices=0 must be at least 1; n_nodes=0 must be at least 1"),
        ([[1.0, -1.0]], (2, 1, 1, 1), r"loads must be finite and not negative"),
        ([[1.0, float("nan")]], (2, 1, 1, 1), r"loads must be finite and not negative"),
        ([1.0, 2.0], (2, 1, 1, 1), r"shape \(2,\); give \[layers, experts\]"),
        ([[]], (2, 1, 1, 1), r"shape \(1, 0\); give \[layers, experts\]"),
        (
            LOAD,
            (9, 8, 8, 2),
            r"fewer than.*does not divide over n_devices=8; use 16.*into n_groups=8",
        ),
    ],
)
def test_balance_refuses(load, sizes, message):
    slots, devices, groups, nodes = sizes
    with pytest.raises(ValueError, match=message):
        place(load, slots, devices, n_groups=groups, n_nodes=nodes)
