"""Tables of hierarchies as people have them: missing parents, blanks, byte order marks."""

import json

import numpy as np
import pandas as pd
import pytest

from lkarray import Taxonomy

#: animal -> (mammal -> dog, cat), fish
DEPTH = {"animal": 0, "mammal": 1, "fish": 1, "dog": 2, "cat": 2}
EDGES = [("animal", "mammal"), ("animal", "fish"), ("mammal", "dog"), ("mammal", "cat")]


def check(taxonomy):
    assert set(taxonomy.nodes) == set(DEPTH)
    assert taxonomy.roots == ("animal",)
    assert set(taxonomy.labels) == {"dog", "cat", "fish"}
    assert {node: taxonomy.depth(node) for node in taxonomy.nodes} == DEPTH
    assert taxonomy.distance("dog", "fish") == 3


@pytest.mark.parametrize(
    "none", [None, np.nan, float("nan"), pd.NA, pd.NaT, "", "  ", "\u00a0", "NaN", "nan", "None"]
)
def test_from_edges__a_missing_parent_names_a_root(none):
    check(Taxonomy.from_edges([(none, "animal"), *EDGES]))
    check(Taxonomy.from_edges([*EDGES, (none, "animal"), (none, "animal")]))


def test_from_edges__a_table_of_pandas():
    table = pd.DataFrame(
        {"parent": [np.nan, *(a for a, _ in EDGES)], "child": ["animal", *(b for _, b in EDGES)]}
    )
    check(Taxonomy.from_edges(table.itertuples(index=False)))
    check(Taxonomy.from_parents(dict(zip(table["child"], table["parent"], strict=True))))


@pytest.mark.parametrize("none", [None, np.nan, "", " ", [], [None], [""], [np.nan]])
def test_from_parents__a_missing_parent_is_that_of_a_root(none):
    parents = {child: parent for parent, child in EDGES}
    check(Taxonomy.from_parents({"animal": none} | parents))
    if isinstance(none, list):
        check(Taxonomy({"animal": none} | {child: [p] for child, p in parents.items()}))


def test_taxonomy__blanks_around_names_do_not_count():
    taxonomy = Taxonomy.from_edges([(f" {a}\t", f"{b}\u00a0") for a, b in EDGES])
    check(taxonomy)
    assert taxonomy.node(" dog ") == "dog"
    assert "dog\n" in taxonomy
    assert taxonomy.subset(["dog ", " fish"]).labels == ("dog", "fish")
    named = Taxonomy({"dog ": [" animal"]}, {" 1 ": "dog"}, aliases={"hund ": " dog"})
    assert (named.labels, named.node("1"), named.node("hund")) == (("1",), "dog", "dog")
    assert Taxonomy.from_edges([(1, 2), (1, 3)]).depth(np.int64(3)) == 1


TABLE = "parent,child\n,animal\nanimal,mammal\nanimal,fish\nmammal,dog\nmammal,cat\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace(",", " , ") + " , \n,,\n\n",
        TABLE.replace("\n,animal", "\nNaN,animal"),
        TABLE.replace("parent,child", ' "parent", "child" ').replace("dog", '"dog "'),
        "\n".join(f"{i},{row},x" for i, row in enumerate(TABLE.splitlines())),
        TABLE.replace("\n,animal\n", "\n"),
    ],
    ids=["plain", "mark", "lines", "blanks", "NaN", "quoted", "columns", "no row"],
)
def test_from_csv__as_programs_write_it(tmp_path, text):
    path = tmp_path / "t.csv"
    if text.startswith("0,"):  # further columns
        lines = text.splitlines()
        text = "\n".join(["id,parent,child,note", *lines[1:]])
    path.write_bytes(text.encode())
    check(Taxonomy.from_csv(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("animal,dog\n,dog", r"'dog' has no parent by .*t.csv, line 3, and one, 'animal', by .* 2"),
        ("animal,dog\nanimal,", r"line 3: the edge from 'animal' has no child"),
        ("animal,dog\nanimal", r"line 3: the edge from 'animal' has no child"),
        ("dog,dog", r"cycles"),
    ],
)
def test_from_csv__contradictory_rows_are_named(tmp_path, rows, message):
    (tmp_path / "t.csv").write_text("parent,child\n" + rows)
    with pytest.raises(ValueError, match=message):
        Taxonomy.from_csv(tmp_path / "t.csv")


def test_from_csv__refuses_other_encodings(tmp_path):
    (tmp_path / "t.csv").write_bytes(TABLE.replace("dog", "chien bébé").encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        Taxonomy.from_csv(tmp_path / "t.csv")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("root", [None, "", [], [None], " "])
def test_from_json__missing_parents_and_marks(tmp_path, mark, root):
    parents = {"animal": root} | {f" {child}": parent for parent, child in EDGES}
    (tmp_path / "t.json").write_text(mark + json.dumps(parents), "utf8")
    taxonomy = Taxonomy.from_json(tmp_path / "t.json")
    check(taxonomy)
    taxonomy.to_json(tmp_path / "again.json")
    check(Taxonomy.from_json(tmp_path / "again.json"))


def test_taxonomy__contradictions_are_refused():
    with pytest.raises(ValueError, match="edge 1: the edge from 'a' has no child"):
        Taxonomy.from_edges([("a", "b"), ("a", None)])
    with pytest.raises(ValueError, match="'b' has no parent by edge 0, and one, 'a', by edge 1"):
        Taxonomy.from_edges([(None, "b"), ("a", "b")])
    with pytest.raises(ValueError, match="'b' has a parent, 'a', and one that is missing"):
        Taxonomy.from_parents({"b": ["a", None]})
    with pytest.raises(ValueError, match="'b' is there twice"):
        Taxonomy({"b": ["a"], "b ": ["c"]})
    with pytest.raises(ValueError, match="a node has no name"):
        Taxonomy({np.nan: ["a"]})
    with pytest.raises(ValueError, match="labels: two are the same"):
        Taxonomy({"b": ["a"]}, {"x": "b", "x ": "b"})


def test_from_edges__a_name_with_a_row_of_its_own_is_a_name():
    """Namibia is NA, and a node may be called None as long as a row says where it belongs."""
    taxonomy = Taxonomy.from_edges(
        [("world", "NA"), ("NA", "Windhoek"), ("None", "x"), ("r", "None")]
    )
    assert taxonomy.parents("Windhoek") == ("NA",)
    assert taxonomy.depth("x") == 2


def test_from_edges__empty_text_above_several_is_the_root_of_words():
    words = [(word[:-1], word) for word in ("0", "1", "00", "01", "10")]
    assert Taxonomy.from_edges(words).distance("00", "10") == 4
    assert Taxonomy.from_edges(words).roots == ("",)


def test_from_csv__empty_cells_are_so_many_roots(tmp_path):
    (tmp_path / "t.csv").write_text("parent,child\n,animal\n,plant\nanimal,dog\nplant,oak\n")
    taxonomy = Taxonomy.from_csv(tmp_path / "t.csv")
    assert taxonomy.roots == ("animal", "plant")
    assert taxonomy.depth("dog") == taxonomy.depth("oak") == 1
    two = Taxonomy.from_edges([(None, "animal"), (None, "plant"), ("animal", "dog")], ["dog"])
    assert two.roots == ("animal", "plant")
