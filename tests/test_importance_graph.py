"""Neighbours and the graph of a log: against networkx and scikit-learn, by hand, and what is refused."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ecom_importance.importance import Evidence, find, score, score_new
from ecom_importance.importance.estimators import example_evidence
from ecom_importance.importance.graph import follow_paths, louvain, walk_with_restart
from ecom_importance.samples import DataError

nx = pytest.importorskip("networkx", reason="networkx is an extra of the tests: peers")


def random_graph(n, edges, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, n, (2, edges))
    dense = np.zeros((n, n))
    dense[a, b] = dense[b, a] = 1
    np.fill_diagonal(dense, 0)
    return sparse.csr_array(dense)


def again(made, **how):
    return Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}, settings=how)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(3, 40), edges=st.integers(1, 120), seed=st.integers(0, 999))
def test_paths_are_networkx_s(n, edges, seed):
    "Also where the graph falls apart, and where nodes have no edges."
    adjacency = random_graph(n, edges, seed)
    theirs, found = nx.from_scipy_sparse_array(adjacency), follow_paths(adjacency, np.arange(n))
    np.testing.assert_allclose(found.closeness, list(nx.closeness_centrality(theirs).values()), atol=1e-9)
    np.testing.assert_allclose(found.betweenness, list(nx.betweenness_centrality(theirs).values()), atol=1e-9)
    assert found.exact and not follow_paths(adjacency, np.arange(n - 1)).exact


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 40), edges=st.integers(1, 120), restart=st.floats(0.05, 0.9), seed=st.integers(0, 999))
def test_walks_are_networkx_s(n, edges, restart, seed):
    adjacency, start = random_graph(n, edges, seed), np.random.default_rng(seed).random(n)
    start /= start.sum()
    found = walk_with_restart(adjacency, start, restart)
    named = dict(enumerate(start))
    theirs = nx.pagerank(nx.from_scipy_sparse_array(adjacency), alpha=1 - restart, personalization=named, dangling=named, tol=1e-13, max_iter=2000)
    np.testing.assert_allclose(found, list(theirs.values()), atol=1e-8)
    assert found.sum() == pytest.approx(1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_communities_are_as_good_as_networkx_s(seed):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(4), 12)
    dense = np.triu(rng.random((48, 48)) < np.where(group[:, None] == group, 0.5, 0.05), 1)
    adjacency = sparse.csr_array((dense | dense.T).astype(float))
    theirs = nx.from_scipy_sparse_array(adjacency)
    member = louvain(adjacency)
    ours = nx.community.modularity(theirs, [set(np.flatnonzero(member == one)) for one in np.unique(member)])
    assert ours > nx.community.modularity(theirs, nx.community.louvain_communities(theirs, seed=0)) - 0.03


def test_estimators_read_the_nodes_of_a_row():
    made, _ = example_evidence(300, 40, d=4)
    drawn, nodes = find(made, "interaction_graph"), find(made, "row_nodes")
    theirs, n = nx.from_scipy_sparse_array(drawn.adjacency), drawn.adjacency.shape[0]
    assert nodes.shape == (300, 3) and (nodes >= 0).all() and all(drawn.adjacency[a, b] == 1 and drawn.adjacency[b, c] == 1 and drawn.adjacency[a, c] == 1 for a, b, c in nodes[:50])
    assert n == sum(len(np.unique(made.train[name])) for name in ("query_id", "item_id", "user_id")) and drawn.adjacency.max() == 1
    table = score(made, ["degree", "pagerank", "closeness", "betweenness"])
    for name, values in (("degree", nx.degree_centrality(theirs)), ("pagerank", nx.pagerank(theirs, tol=1e-12, max_iter=500)), ("closeness", nx.closeness_centrality(theirs)), ("betweenness", nx.betweenness_centrality(theirs))):
        np.testing.assert_allclose(table[name], np.array([values[node] for node in range(n)])[nodes].mean(axis=1), atol=1e-8)


def test_without_users_the_graph_has_two_kinds_of_nodes():
    made, _ = example_evidence(200, 40, d=4)
    train, valid = dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()}
    del train["user_id"], valid["user_id"]
    bare = Evidence(train, valid)
    assert find(bare, "row_nodes").shape == (200, 2) and np.isfinite(score(bare, ["degree", "path_importance", "subgraph_importance"])).all(axis=None)
    bipartite = nx.from_scipy_sparse_array(find(bare, "interaction_graph").adjacency)
    assert nx.is_bipartite(bipartite)


def test_new_names_are_nodes_without_edges():
    made, _ = example_evidence(200, 40, d=4)
    import pandas as pd

    new = pd.DataFrame({name: column[:2] for name, column in made.train.items() if name not in ("x", "y")}).assign(sample_id=[9001, 9002], query_id=[-5, -6], item_id=[-5, -6], user_id=[-5, -6], gain=[0.0, 1.0])
    table = score_new(made, new, made.train["x"][:2], ["degree", "pagerank", "closeness", "betweenness", "path_importance", "subgraph_importance"])
    assert (table == 0).all(axis=None)
    half = new.assign(item_id=made.train["item_id"][:2])
    assert (score_new(made, half, made.train["x"][:2], "degree")["degree"] > 0).all()


def test_paths_begin_at_trusted_positives_only():
    made, _ = example_evidence(200, 40, d=4)
    none = Evidence(dict(made.train), {name.removesuffix("_valid"): column for name, column in made.valid.items()} | {"y": np.zeros(40)})
    assert (score(none, "path_importance")["path_importance"] == 0).all() and score(made, "path_importance")["path_importance"].max() > 0
    both = score(made, "path_importance", settings={"path_importance": {"net": False}})["path_importance"]
    assert (both >= score(made, "path_importance")["path_importance"]).all()


def test_neighbours_are_of_other_folds_and_the_nearest():
    from sklearn.neighbors import NearestNeighbors

    made, _ = example_evidence(400, 40, d=5)
    asked, x, fold = (find(again(made, neighbourhood={"k": 7}), name) for name in ("neighbourhood", "x", "fold"))
    found = asked.find(x, fold)
    assert (asked.fold[found] != fold[:, None]).all()
    for row in range(0, 400, 37):
        others = np.flatnonzero(asked.fold != fold[row])
        theirs = others[NearestNeighbors(n_neighbors=7, algorithm="brute").fit(asked.x[others]).kneighbors(x[row : row + 1], return_distance=False)[0]]
        assert set(theirs) == set(found[row])
    values = score(again(made, neighbourhood={"k": 7}), "neighbour_agreement")["neighbour_agreement"]
    np.testing.assert_allclose(values, 1 - np.abs(made.train["y"] - asked.gain[found].mean(axis=1)))


def test_a_whole_query_that_is_wrong_does_not_vouch_for_itself():
    "Ten identical rows of one query, all wrong, among right ones at the same place."
    rng = np.random.default_rng(0)
    x = np.r_[np.zeros((10, 2)), rng.normal(size=(90, 2)) * 0.1].astype(np.float32)
    y = np.r_[np.zeros(10), np.ones(90)]
    made = Evidence({"sample_id": np.arange(100), "query_id": np.arange(100) // 10, "x": x, "y": y}, {}, settings={"neighbourhood": {"k": 10}})
    values = score(made, "neighbour_agreement")["neighbour_agreement"]
    assert values.iloc[:10].max() < 0.1 and values.iloc[10:].mean() > 0.8


def test_passing_labels_on_reaches_further():
    made, wrong = example_evidence(800, 40, d=12)
    from sklearn.metrics import roc_auc_score

    one, two = (score(again(made, neighbourhood={"k": 10, "steps": steps}), "neighbour_agreement")["neighbour_agreement"] for steps in (0, 3))
    assert roc_auc_score(wrong, -two) > roc_auc_score(wrong, -one)


def test_fewer_voters_are_chosen_by_name():
    made, _ = example_evidence(400, 40, d=5)
    few = again(made, neighbourhood={"voters": 100})
    assert len(find(few, "neighbourhood").x) == 100
    order = np.random.default_rng(0).permutation(400)
    other = Evidence({name: column[order] for name, column in made.train.items()}, {}, settings={"neighbourhood": {"voters": 100}})
    np.testing.assert_array_equal(np.sort(find(other, "neighbourhood").x, axis=0), np.sort(find(few, "neighbourhood").x, axis=0))


@pytest.mark.parametrize("part, how", [("neighbourhood", {"k": 0}), ("neighbourhood", {"steps": -1}), ("neighbourhood", {"keep": 2}), ("neighbourhood", {"voters": 1}), ("shortest_paths", {"sources": 0}), ("trusted_walk", {"restart": 0.0})])
def test_bad_settings_are_named(part, how):
    made, _ = example_evidence(60, 16, d=3)
    with pytest.raises(ValueError, match=f"{next(iter(how))} is {next(iter(how.values()))}"):
        find(again(made, **{part: how}), part)


def test_one_query_is_refused():
    made, _ = example_evidence(60, 16, d=3)
    one = Evidence(dict(made.train) | {"query_id": np.zeros(60, int), "query": np.array(["杯"] * 60)}, {})
    with pytest.raises(DataError, match="no row has neighbours of another fold"):
        score(one, "neighbour_agreement")
