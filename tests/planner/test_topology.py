"""Tests topologies: the resources that messages share, files written and read back, and errors for damaged ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringattn import PlanError, Topology, load_topology
from ringattn.planner.topology import PRESETS

SPEEDS = {"flops": 1e12, "link_latency": 1e-6, "bandwidth": 10e9}
MATRIX = Topology(
    "three",
    "matrix",
    1e12,
    world=3,
    latencies=((0, 1e-6, 2e-6), (3e-6, 0, 4e-6), (5e-6, 6e-6, 0)),
    bandwidths=((0, 1e9, 2e9), (3e9, 0, 4e9), (5e9, 6e9, 0)),
)


def keys(topology: Topology, src: int, dst: int) -> list[tuple[str, int, int]]:
    return [resource for resource, _ in topology.route(src, dst)]


def test_on_a_mesh_no_two_pairs_share_anything() -> None:
    mesh = Topology("m", "mesh", **SPEEDS)
    routes = [frozenset(keys(mesh, s, d)) for s in range(4) for d in range(4) if s != d]
    assert len(set().union(*routes)) == len(routes) == 12


def test_behind_a_switch_a_rank_has_one_port_out_and_one_in() -> None:
    switch = Topology("s", "switch", **SPEEDS)
    assert set(keys(switch, 0, 1)) & set(keys(switch, 0, 2)) == {("out", 0, 0)}
    assert set(keys(switch, 0, 2)) & set(keys(switch, 1, 2)) == {("in", 2, 0)}
    assert not set(keys(switch, 0, 1)) & set(keys(switch, 1, 0)), "full duplex"


def test_nodes_share_an_uplink_for_each_direction() -> None:
    nodes = Topology("n", "nodes", **SPEEDS, node_size=2, uplink_latency=9e-6, uplink_bandwidth=1e9)
    assert nodes.route(0, 1) == ((("out", 0, 0), 10e9), (("in", 1, 0), 10e9))
    assert nodes.route(0, 2) == nodes.route(1, 3) == ((("up", 0, 0), 1e9), (("down", 1, 0), 1e9))
    assert not set(keys(nodes, 0, 2)) & set(keys(nodes, 2, 0))
    assert (nodes.latency(0, 1), nodes.latency(1, 2)) == (1e-6, 9e-6)


def test_on_a_ring_a_message_takes_the_shorter_way() -> None:
    ring = Topology("r", "ring", **SPEEDS, world=6)
    assert keys(ring, 0, 2) == [("link", 0, 1), ("link", 1, 2)]
    assert keys(ring, 0, 5) == [("link", 0, 5)]
    assert keys(ring, 1, 5) == [("link", 1, 0), ("link", 0, 5)]
    assert keys(ring, 0, 3) == [("link", 0, 1), ("link", 1, 2), ("link", 2, 3)], "upwards where both are as long"
    assert ring.latency(0, 2) == 2e-6


def test_a_matrix_is_what_was_measured() -> None:
    assert MATRIX.route(2, 1) == ((("link", 2, 1), 6e9),)
    assert MATRIX.latency(1, 2) == 4e-6
    shared = replace(MATRIX, port=7e9)
    assert shared.route(0, 1) == ((("link", 0, 1), 1e9), (("out", 0, 0), 7e9), (("in", 1, 0), 7e9))


def test_presets_are_plausible_and_hashable() -> None:
    assert list(PRESETS) == ["pcie", "nvlink", "nvswitch", "infiniband", "ethernet", "hccs", "cpu", "rails"]
    for name, preset in PRESETS.items():
        assert preset.name == name and hash(preset) == hash(replace(preset))
        assert 1e-6 <= preset.link_latency <= 1e-3 and 1e8 <= preset.bandwidth <= 1e12 and 1e10 <= preset.flops <= 1e15
    assert PRESETS["infiniband"].uplink_bandwidth < PRESETS["infiniband"].bandwidth


@pytest.mark.parametrize(
    "topology", [*PRESETS.values(), MATRIX, replace(MATRIX, port=2.5e9)], ids=lambda t: f"{t.name}-{t.port}"
)
def test_what_is_saved_is_loaded(topology: Topology, tmp_path: Path) -> None:
    topology.save(tmp_path / "t.json")
    assert load_topology(tmp_path / "t.json") == topology


def stored(**changes: Any) -> str:
    """The JSON of MATRIX with some entries changed; None removes one."""
    data = {"format": "ringattn topology", "version": 1, "name": "x", "kind": "matrix", "flops": 1e12, "world": 3}
    data |= {"latencies": MATRIX.latencies, "bandwidths": MATRIX.bandwidths, **changes}
    return json.dumps({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1, 2]", "is not a topology file"),
        ('{"bandwidth": 3}', "is not a topology file"),
        (stored(version=2), "version 2 and this ringattn reads 1"),
        (stored(version=None), "version None"),
        (stored(speed=3), "unknown entries speed"),
        (stored(flops=None), "flops"),
        (stored(flops="fast"), "flops='fast'"),
        (stored(flops=float("nan")), "flops=nan"),
        (stored(kind="torus"), "kind='torus'; choose one of mesh, switch"),
        (stored(world=None), "world=None"),
        (stored(world=4), "4 rows of 4 numbers"),
        (stored(bandwidths=[[0, 1e9, 1e9], [1e9, 0, -1e9], [1e9, 1e9, 0]]), r"bandwidths\[1\]\[2\]=-1000000000.0"),
        (stored(latencies=[[0, 1], [1, 0]]), "latencies must have 3 rows"),
        (stored(latencies="soon"), "damaged"),
        (stored(port=-1), "port=-1"),
    ],
)
def test_a_damaged_file_raises_with_a_hint(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as error:
        load_topology(path)
    assert str(path) in str(error.value) and "probe --out" in str(error.value)


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "links.json").write_text(stored())
    assert replace(load_topology(tmp_path / "links.json"), name="three") == MATRIX


def test_a_missing_file_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json cannot be read"):
        load_topology(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mesh", "flops": 0.0, "bandwidth": 1e9}, "flops=0.0"),
        ({"kind": "switch", "flops": 1e9}, "bandwidth=0.0"),
        ({"kind": "mesh", "flops": 1e9, "bandwidth": 1e9, "link_latency": -1.0}, "link_latency=-1.0"),
        ({"kind": "nodes", "flops": 1e9, "bandwidth": 1e9, "uplink_bandwidth": 1e9}, "node_size=None"),
        ({"kind": "nodes", "flops": 1e9, "bandwidth": 1e9, "node_size": 8}, "uplink_bandwidth=0.0"),
        ({"kind": "ring", "flops": 1e9, "bandwidth": 1e9}, "world=None"),
    ],
)
def test_impossible_links_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Topology("odd", **arguments)
