"""The map of an overlay's clusters, against a plain list."""

from hypothesis import given
from hypothesis import strategies as st

from pynbd.formats.cluster_map import MAX_PAGES, MAX_PAGES_LOOKED_AT, PAGE_CLUSTERS, ClusterMap, ClusterState

CLUSTERS = PAGE_CLUSTERS * 3 + 100

near_page_ends = st.sampled_from([page * PAGE_CLUSTERS + by for page in range(4) for by in (-2, -1, 0, 1, 2)])
positions = st.one_of(st.integers(0, CLUSTERS), near_page_ends).map(lambda n: max(0, min(n, CLUSTERS)))
ranges = st.tuples(positions, positions).map(sorted)
changes = st.lists(st.tuples(ranges, st.sampled_from([*ClusterState, None])), max_size=12)


@given(changes)
def test_against_a_list(steps: list[tuple[list[int], ClusterState | None]]) -> None:
    clusters, model = ClusterMap(), [int(ClusterState.BELOW)] * CLUSTERS
    for (first, last), state in steps:
        if state is None:
            data = [n for n in range(first, CLUSTERS) if model[n] == ClusterState.DATA]
            forgotten = clusters.forget(first)
            assert [n for run in forgotten for n in range(*run)] == data
            model[first:] = [ClusterState.BELOW] * (CLUSTERS - first)
            continue
        assert clusters.reserve(first, last)
        clusters.set(first, last, state)
        model[first:last] = [state] * (last - first)
    assert _states(clusters) == model
    for state in (ClusterState.DATA, ClusterState.ZERO):
        assert clusters.count(state) == model.count(state)


def _states(clusters: ClusterMap) -> list[int]:
    states: list[int] = []
    while len(states) < CLUSTERS:
        state, end = clusters.run(len(states), CLUSTERS)
        assert clusters.state(len(states)) == state
        assert len(states) < end <= CLUSTERS
        states += [state] * (end - len(states))
    return states


def test_memory_is_bounded() -> None:
    clusters = ClusterMap()
    assert not clusters.reserve(0, (MAX_PAGES + 1) * PAGE_CLUSTERS)
    assert clusters.reserve(0, MAX_PAGES * PAGE_CLUSTERS)
    assert clusters.reserve(5, 6)
    assert not clusters.reserve(MAX_PAGES * PAGE_CLUSTERS, MAX_PAGES * PAGE_CLUSTERS + 1)
    clusters.forget(PAGE_CLUSTERS)
    assert clusters.reserve(MAX_PAGES * PAGE_CLUSTERS, MAX_PAGES * PAGE_CLUSTERS + 1)


def test_reserved_is_still_below() -> None:
    clusters = ClusterMap()
    clusters.reserve(0, CLUSTERS)
    assert _states(clusters) == [ClusterState.BELOW] * CLUSTERS


def test_a_question_about_a_gap_takes_bounded_time() -> None:
    state, end = ClusterMap().run(7, 1 << 50)
    assert (state, end) == (ClusterState.BELOW, MAX_PAGES_LOOKED_AT * PAGE_CLUSTERS)


def test_runs_go_on_over_pages() -> None:
    clusters = ClusterMap()
    clusters.reserve(10, 3 * PAGE_CLUSTERS)
    clusters.set(10, 2 * PAGE_CLUSTERS + 5, ClusterState.ZERO)
    assert clusters.run(0, CLUSTERS) == (ClusterState.BELOW, 10)
    assert clusters.run(10, CLUSTERS) == (ClusterState.ZERO, 2 * PAGE_CLUSTERS + 5)
    assert clusters.run(11, 12) == (ClusterState.ZERO, 12)
