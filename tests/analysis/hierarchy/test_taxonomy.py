"""Taxonomies: against networkx-free brute force, WordNet through nltk, and known facts."""

import pickle

import numpy as np
import pytest
from dask.base import tokenize
from hypothesis import given

import lkarray as lk
from lkarray.errors import MissingCorpusError
from tests.helpers.hierarchies import dags, whole

ANIMALS = {
    "dog": ["mammal", "pet"],
    "cat": ["mammal", "pet"],
    "trout": ["fish"],
    "mammal": ["animal"],
    "fish": ["animal"],
    "pet": ["animal"],
}


def climbs(parents, node):
    """Every upward path from a node, as lists of nodes."""
    if not parents[node]:
        return [[node]]
    return [[node, *rest] for parent in parents[node] for rest in climbs(parents, parent)]


@given(dags())
def test_taxonomy__agrees_with_all_paths(parents):
    taxonomy = whole(parents)
    paths = {node: climbs(parents, node) for node in parents}
    for a in parents:
        lengths = [len(path) - 1 for path in paths[a]]
        assert taxonomy.depth(a) == min(lengths)
        assert taxonomy.depth(a, "longest") == max(lengths)
        assert taxonomy.depth(a, "first_path") == len(paths[a][0]) - 1
        assert set(taxonomy.ancestors(a)) == {node for path in paths[a] for node in path}
    far = lk.taxonomy_distance(taxonomy)
    for a in parents:
        for b in parents:
            steps = [
                p.index(c) + q.index(c) for p in paths[a] for q in paths[b] for c in p if c in q
            ]
            expected = min(steps, default=np.inf)
            assert taxonomy.distance(a, b) == far.sel(label=a, label_2=b) == expected
            common = {c for p in paths[a] for c in p} & {c for q in paths[b] for c in q}
            lowest = {c for c in common if not any(c in p[1:] for d in common for p in paths[d])}
            assert set(taxonomy.lowest_common_ancestors(a, b)) == lowest


@given(dags())
def test_order__keeps_those_below_a_node_together(parents):
    order = whole(parents).order()
    assert sorted(order) == sorted(parents)
    below = {node: {n for n in parents if node in main_line(parents, n)} for node in parents}
    for nodes in below.values():
        places = sorted(order.index(n) for n in nodes)
        assert places == list(range(places[0], places[0] + len(places)))


def main_line(parents, node):
    """Upward along the parent with the longest path to a root."""
    if not parents[node]:
        return [node]
    above = max(parents[node], key=lambda p: max(map(len, climbs(parents, p))))
    return [node, *main_line(parents, above)]


def test_taxonomy__asks():
    taxonomy = lk.Taxonomy.from_parents(ANIMALS)
    assert taxonomy.labels == ("dog", "cat", "trout")
    assert taxonomy.roots == ("animal",)
    assert taxonomy.ancestors("dog") == ("animal", "mammal", "pet", "dog")
    assert taxonomy.ancestors("dog", 1) == ("mammal", "pet")
    assert set(taxonomy.lowest_common_ancestors("dog", "cat")) == {"mammal", "pet"}
    assert taxonomy.descendants("mammal") == ("dog", "cat")
    assert taxonomy.children("animal") == ("mammal", "fish", "pet")
    assert list(taxonomy.hues().values()) == [0.0, 0.45, 0.9]
    assert len(taxonomy) == 3
    assert "pet" in taxonomy
    assert "3 labels, 7 nodes, 1 root, depth 2" in repr(taxonomy)


def test_taxonomy__cannot_be_changed():
    taxonomy = lk.Taxonomy.from_parents(ANIMALS)
    with pytest.raises(AttributeError, match="cannot be changed"):
        taxonomy.labels = ()
    with pytest.raises(ValueError, match="read-only"):
        taxonomy.depths()[0] = 3


def test_taxonomy__travels_to_workers():
    taxonomy = lk.Taxonomy.from_parents(ANIMALS, {7: "dog", 3: "trout"})
    taxonomy.depths()
    again = pickle.loads(pickle.dumps(taxonomy))
    assert again.labels == (7, 3)
    assert again.distance(7, 3) == 4
    assert tokenize(again) == tokenize(taxonomy)
    with pytest.raises(AttributeError, match="cannot be changed"):
        again.nodes = ()


def test_constructors__agree(tmp_path):
    import networkx

    expected = lk.Taxonomy.from_parents(ANIMALS)
    edges = [(parent, child) for child, above in ANIMALS.items() for parent in above]
    table = tmp_path / "edges.csv"
    table.write_text("parent,child\n" + "".join(f"{a},{b}\n" for a, b in edges))
    plain = tmp_path / "plain.json"
    plain.write_text(
        '{"dog": ["mammal", "pet"], "cat": ["mammal", "pet"], "trout": "fish",'
        '"mammal": "animal", "fish": "animal", "pet": "animal"}'
    )
    expected.to_json(tmp_path / "own.json")
    for taxonomy in (
        lk.Taxonomy.from_edges(edges),
        lk.Taxonomy.from_networkx(networkx.DiGraph(edges)),
        lk.Taxonomy.from_csv(table),
        lk.Taxonomy.from_json(plain),
        lk.Taxonomy.from_json(tmp_path / "own.json"),
        lk.Taxonomy(ANIMALS),
    ):
        assert set(taxonomy.labels) == set(expected.labels)
        for label in expected.nodes:
            assert set(taxonomy.ancestors(label)) == set(expected.ancestors(label))


def test_labels__may_be_called_otherwise_than_nodes(tmp_path):
    taxonomy = lk.Taxonomy.from_parents(ANIMALS, {7: "dog", np.int64(3): "trout"})
    assert taxonomy.labels == (7, 3)
    assert taxonomy.distance(7, np.int64(3)) == 4
    assert taxonomy.node(7) == "dog"
    taxonomy.to_json(tmp_path / "t.json")
    assert lk.Taxonomy.from_json(tmp_path / "t.json").labels == (7, 3)
    assert taxonomy.subset([3]).labels == (3,)


def test_bad_input__is_named(tmp_path):
    with pytest.raises(ValueError, match="must not have cycles, but there is .*a -> .*"):
        lk.Taxonomy.from_edges([("a", "b"), ("b", "c"), ("c", "a")])
    with pytest.raises(ValueError, match="label 'x' has no path to a root"):
        lk.Taxonomy.from_parents(ANIMALS | {"x": None})
    assert "x" in lk.Taxonomy.from_parents(ANIMALS | {"x": None}, roots=["animal", "x"])
    with pytest.raises(ValueError, match="label 'dog' has no path to a root"):
        lk.Taxonomy.from_parents(ANIMALS, roots=["thing"])
    with pytest.raises(ValueError, match="'wolf' named as labels, but not in the taxonomy"):
        lk.Taxonomy.from_parents(ANIMALS, ["dog", "wolf"])
    with pytest.raises(ValueError, match="'wolf', 3 not in the taxonomy"):
        lk.Taxonomy.from_parents(ANIMALS).positions(["dog", "wolf", 3])
    with pytest.raises(ValueError, match="depth must be one of"):
        lk.Taxonomy.from_parents(ANIMALS).depth("dog", "mean")
    with pytest.raises(ValueError, match="edge 1 is 'ab'"):
        lk.Taxonomy.from_edges([("a", "b"), "ab"])
    (tmp_path / "t.csv").write_text("from,to\na,b\n")
    with pytest.raises(ValueError, match="lacks \\['child', 'parent'\\]"):
        lk.Taxonomy.from_csv(tmp_path / "t.csv")


def test_imagenet__is_wordnets_own(wordnet):
    taxonomy = lk.Taxonomy.imagenet()
    rebuilt = lk.Taxonomy.wordnet(taxonomy.labels)
    assert len(taxonomy) == 1000
    for label in taxonomy.labels:
        synset = wordnet.synset_from_pos_and_offset("n", int(label[1:]))
        above = {s.name() for path in synset.hypernym_paths() for s in path}
        assert set(taxonomy.ancestors(label)) == set(rebuilt.ancestors(label)) == above
        assert taxonomy.depth(label) == synset.min_depth()
        assert taxonomy.depth(label, "longest") == synset.max_depth()
    rng = np.random.default_rng(0)
    far = lk.taxonomy_distance(taxonomy)
    for i, j in rng.integers(0, 1000, (50, 2)):
        a, b = (
            wordnet.synset_from_pos_and_offset("n", int(taxonomy.labels[at][1:])) for at in (i, j)
        )
        assert far[i, j] == a.shortest_path_distance(b)


def test_imagenet__is_in_torchvisions_order():
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    taxonomy = lk.Taxonomy.imagenet()
    assert list(taxonomy.labels) == sorted(taxonomy.labels)  # the challenge numbers wnids in order
    titles = [taxonomy.title(number).lower() for number in range(1000)]
    same = sum(
        a.replace("-", " ") == b.lower().replace("-", " ")
        for a, b in zip(titles, _IMAGENET_CATEGORIES, strict=True)
    )
    assert same > 900  # the others are called by another of the synset's words


def test_imagenet__known_facts():
    taxonomy = lk.Taxonomy.imagenet()
    assert taxonomy.node(151) == taxonomy.node("n02085620") == "chihuahua.n.03"
    assert taxonomy.depth(151) == 10  # by way of domestic animals; 13 by way of carnivores
    assert taxonomy.depth(151, "longest") == 13 + 2
    husky, pug = "n02110185", "n02110958"
    assert taxonomy.lowest_common_ancestors(husky, pug) == ("dog.n.01",)
    assert len(taxonomy.descendants("dog.n.01")) == 118
    assert len(taxonomy.descendants("animal.n.01")) == 398
    assert len(taxonomy.descendants("artifact.n.01")) == 522
    order = taxonomy.order()
    places = sorted(order.index(label) for label in taxonomy.descendants("dog.n.01"))
    assert places[-1] - places[0] == 117


def test_wordnet__takes_wnids_names_and_labels(wordnet):
    assert lk.Taxonomy.wordnet(["n02084071", "cat.n.01"]).labels == ("n02084071", "cat.n.01")
    taxonomy = lk.Taxonomy.wordnet({0: "jersey.n.03", 1: "n02084071"})
    assert taxonomy.node(1) == "dog.n.01"
    assert taxonomy.depth(1) == wordnet.synset("dog.n.01").min_depth()
    with pytest.raises(ValueError, match="not in WordNet 3.0: 'dgo.n.01', 'n00000001'"):
        lk.Taxonomy.wordnet(["dog.n.01", "dgo.n.01", "n00000001"])


def test_wordnet__missing_corpus_says_the_command(monkeypatch, tmp_path):
    class Missing:
        def ensure_loaded(self):
            raise LookupError

    monkeypatch.setattr("nltk.corpus.wordnet", Missing())
    with pytest.raises(MissingCorpusError, match="python -m nltk.downloader wordnet"):
        lk.Taxonomy.wordnet(["dog.n.01"])
