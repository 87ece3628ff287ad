"""What takes a kernel, neighbours, an audit or a result takes the node of a store that holds it."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import lkarray as lk
from lkarray import errors, plots, store
from lkarray.kernels.kinds import INFLUENCE_OPERATOR

N, M, T = 12, 10, 5


def results():
    """Of each kind of result one, in memory, by name."""
    rng = np.random.default_rng(0)
    label = np.arange(N) % 4
    losses = xr.DataArray(
        rng.normal(size=(3, 20, N)),
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(N) + 3, "label": ("sample", label)},
        name="loss",
    )
    G = xr.DataArray(
        rng.normal(size=(T, M, 14)),
        dims=("time", "example", "param"),
        name="gradient",
        coords={
            "time": np.arange(T) * 2,
            "example": np.arange(M),
            "label": ("example", np.arange(M) % 2),
            "learning_rate": ("time", np.full(T, 0.1)),
        },
    )
    last = G.isel(time=-1)
    R, near = lk.correlation(losses), lk.neighbors(losses, 3)
    points = xr.DataArray(
        rng.normal(size=(N, 2)),
        dims=("sample", "component"),
        name="embedding",
        coords={"sample": losses["sample"], "label": losses["label"]},
    )
    audit = xr.Dataset(
        {
            "influence": (
                ("example", "audit", "layer", "epoch"),
                rng.normal(size=(M, 4, 2, 3)),
                {"kernel": INFLUENCE_OPERATOR, "units": "nat"},
            ),
            "reconstruction": (("epoch", "audit"), rng.normal(size=(3, 4))),
            "epoch_change": (("epoch", "audit"), rng.normal(size=(3, 4))),
        },
        coords={
            "example": np.arange(M),
            "audit": np.arange(4),
            "layer": ["a", "b"],
            "epoch": np.arange(3),
        },
    )
    ips, modes = lk.ips(G), lk.modes(last, 4).compute()
    coefficients = lk.mode_coefficients(modes, last)
    K, audit_modes = lk.plgk(G), lk.audit_modes(lk.plgk(G), 3, scale=1.0)
    tree = taxonomy()
    temporal = lk.temporal_kernel(G)
    panel = xr.DataArray(
        rng.normal(size=(T, 6)),
        dims=("time", "example"),
        name="panel",
        coords={"time": np.arange(T), "kind": ("example", ["a", "b"] * 3)},
    )
    inputs = {
        "kernel": R,
        "near": near,
        "points": points,
        "the_audit": audit,
        "ips": ips,
        "modes": modes,
        "coefficients": coefficients,
        "moved": (coefficients * 1.5 + 0.1).rename("moved"),
        "felt": abs(coefficients),
        "plgk": K,
        "audit_modes": audit_modes,
        "temporal": temporal,
        "temporal_modes": lk.temporal_modes(temporal),
        "cross": lk.plgk(G, G),
        "panel": panel,
        "hidden": last.rename("hidden").rename(param="unit"),
        "shifts": lk.mode_shifts(modes, coefficients, coefficients * 1.5 + 0.1),
        "scores": lk.ips_scores(ips, np.arange(M) % 2, np.arange(M) % 2).drop_attrs(),
        "completeness": lk.completeness(audit),
        "top": lk.most_influential(audit, 3),
        "share": lk.concentration(audit),
        "curve": panel.isel(example=0, drop=True).rename("curve"),
        "by_map": lk.similarity_by_distance(R.compute(), points, bins=3),
        "lift": lk.taxonomic_lift(near, tree, replicates=3),
        "by_distance": lk.correlation_by_distance(losses, tree, replicates=3),
        "attribute": lk.attribute_lift(near, "label"),
        "row": R[2].rename("row"),
        "last": last,
        "gross": xr.DataArray(
            rng.uniform(size=(3, 4)),
            dims=("position", "epoch"),
            name="gross",
            coords={"position": [0.0, 0.5, 1.0], "epoch": np.arange(4)},
        ),
        "total": xr.DataArray(
            [1.0, 2.0, 3.0], dims="position", name="total", coords={"position": [0.0, 0.5, 1.0]}
        ),
        "activations": G.rename("activations").rename(param="unit").drop_vars("learning_rate"),
    }
    return {name: value.compute() for name, value in inputs.items()}


def taxonomy():
    return lk.Taxonomy.from_parents({0: "a", 1: "a", 2: "b", 3: "b", "a": "r", "b": "r"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each result in memory, and the node of a store that holds it."""
    path = tmp_path_factory.mktemp("nodes") / "run.zarr"
    inputs = results()
    lk.save(inputs["kernel"].chunk(), path)
    for name, value in inputs.items():
        store.put(path, name, value)
    tree = lk.open(path)
    return inputs, {name: tree[f"derived/{name}"] for name in inputs}


LABELS, GUESS = np.arange(M) % 2, np.arange(M)[::-1] % 2
IMAGES = np.random.default_rng(1).uniform(size=(N, 3, 3))

#: Each public function and figure that takes results, of these by name.
TAKE = {
    "chord_distance": lambda t: lk.chord_distance(t["kernel"]),
    "angle_distance": lambda t: lk.angle_distance(t["ips"]),
    "embed": lambda t: lk.embed(t["near"]),
    "embed a kernel": lambda t: lk.embed(t["kernel"], k=4),
    "similarity_by_distance": lambda t: lk.similarity_by_distance(t["kernel"], t["points"], bins=3),
    "taxonomic_lift": lambda t: lk.taxonomic_lift(t["near"], taxonomy(), replicates=3),
    "attribute_lift": lambda t: lk.attribute_lift(t["near"], "label"),
    "audit_modes": lambda t: lk.audit_modes(t["plgk"], 3, scale=1.0),
    "extend_audit": lambda t: lk.extend_audit(t["audit_modes"], t["cross"]),
    "cancellation_ratio": lambda t: lk.cancellation_ratio(t["modes"], t["coefficients"]),
    "mode_coefficients": lambda t: lk.mode_coefficients(t["modes"], t["last"]),
    "mode_shifts": lambda t: lk.mode_shifts(t["modes"], t["coefficients"], t["moved"], t["felt"]),
    "temporal_modes": lambda t: lk.temporal_modes(t["temporal"]),
    "ips_scores": lambda t: lk.ips_scores(t["ips"], LABELS, GUESS),
    "hidden_similarity": lambda t: lk.hidden_similarity(
        t["hidden"], t["hidden"], LABELS, GUESS, k=2
    ),
    "difficulty_table": lambda t: lk.difficulty_table(t["scores"], LABELS == 1, GUESS).sortby(
        "score"
    ),
    "activation_overlap": lambda t: lk.activation_overlap(t["activations"]),
    "participation_ratio": lambda t: lk.participation_ratio(t["modes"]),
    "energy_rank": lambda t: lk.energy_rank(t["modes"]),
    "gram": lambda t: lk.gram(t["hidden"], t["hidden"], over="unit"),
    "svd": lambda t: lk.svd(t["hidden"], 2, over="unit"),
    "eigh": lambda t: lk.eigh(t["hidden"], over="unit"),
    "completeness": lambda t: lk.completeness(t["the_audit"]),
    "net_influence": lambda t: lk.net_influence(t["the_audit"]),
    "gross_influence": lambda t: lk.gross_influence(t["the_audit"], cumulative=True),
    "most_influential": lambda t: lk.most_influential(t["the_audit"], 3),
    "concentration": lambda t: lk.concentration(t["the_audit"]),
    "plots.neighbor_map": lambda t: plots.neighbor_map(t["points"], by="label"),
    "plots.kernel_matrix": lambda t: plots.kernel_matrix(t["kernel"], by="label"),
    "plots.top_correlated": lambda t: plots.top_correlated(t["near"], IMAGES, [3, 5], by="label"),
    "plots.completeness": lambda t: plots.completeness(t["the_audit"]),
    "plots.completeness of itself": lambda t: plots.completeness(t["completeness"]),
    "plots.decision": lambda t: plots.decision(t["the_audit"], 2),
    "plots.influential_images": lambda t: plots.influential_images(t["the_audit"], IMAGES, 2, 3),
    "plots.influential_images of a table": lambda t: plots.influential_images(
        t["top"], IMAGES, 2, 3
    ),
    "plots.concentration": lambda t: plots.concentration(t["the_audit"]),
    "plots.concentration of itself": lambda t: plots.concentration(t["share"]),
    "plots.layer_epoch": lambda t: plots.layer_epoch(t["the_audit"]),
    "plots.groups_along": lambda t: plots.groups_along(
        {"a": t["panel"]}, by="kind", along="time", ylabel=""
    ),
    "plots.regime": lambda t: plots.regime(
        {"m": t["curve"]}, {"a": t["panel"]}, by="kind", labels=np.arange(T), ylabels=[""]
    ),
    "plots.mode_scatter": lambda t: plots.mode_scatter(t["shifts"], other=t["shifts"]),
    "plots.influence_along_path": lambda t: plots.influence_along_path(
        t["gross"], {"a": t["total"]}
    ),
    "plots.lift_by_depth": lambda t: plots.lift_by_depth(t["lift"], least=1),
    "plots.lift_curves": lambda t: plots.lift_curves({"a": t["lift"]}, least=1),
    "plots.hierarchy_matrices": lambda t: plots.hierarchy_matrices(t["by_distance"]),
    "plots.correlation_against_distance": lambda t: plots.correlation_against_distance(
        {"a": t["by_distance"]}
    ),
    "plots.transitions": lambda t: plots.transitions({"a": t["attribute"]}),
    "plots.temporal_structure": lambda t: plots.temporal_structure(
        t["temporal"], t["temporal_modes"]
    ),
    "plots.over_training": lambda t: plots.over_training({"a": t["curve"]}, ylabel="", title=""),
    "plots.similarity_to_target": lambda t: plots.similarity_to_target(t["points"], t["row"], 2),
    "plots.similarity_against_distance": lambda t: plots.similarity_against_distance(
        t["points"], t["row"], 2, t["by_map"]
    ),
    "plots.axis_extremes": lambda t: plots.axis_extremes(t["points"], IMAGES, rows=2),
}


def contents(answer):
    """What an answer says: its numbers, or those that a figure draws."""
    if not isinstance(answer, Figure):
        return answer
    parts = []
    for axes in answer.axes:
        parts += [line.get_xydata() for line in axes.lines]
        parts += [image.get_array() for image in axes.images]
        parts += [dots.get_offsets() for dots in axes.collections]
        parts += [patch.get_extents().get_points() for patch in axes.patches]
    return parts


@pytest.mark.parametrize("name", TAKE)
def test_nodes__give_the_answer_of_what_they_hold(made, name, monkeypatch):
    # UMAP itself takes a minute to compile: what it is given is compared.
    monkeypatch.setattr("lkarray.embedding._umap", lambda index, distance, *_: distance[:, :2])
    inputs, nodes = made
    expected = contents(TAKE[name](inputs))
    sets = {
        key: x if isinstance(x, xr.Dataset) else x.to_dataset(promote_attrs=False)
        for key, x in inputs.items()
    }
    for given in (nodes, sets):
        answer = contents(TAKE[name](given))
        if isinstance(expected, list):
            assert len(answer) == len(expected) > 0
            for a, b in zip(answer, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        else:
            xr.testing.assert_allclose(answer.compute(), expected.compute(), rtol=1e-5, atol=1e-6)


def test_nodes__every_figure_is_among_these():
    others = {"gain_against_loss", "influence_against", "image_rows"}  # of losses, of arrays
    drawn = {name.split()[0].removeprefix("plots.") for name in TAKE if name.startswith("plots.")}
    assert drawn | others == set(plots.__all__)


def test_nodes__losses_save_and_plan(made, tmp_path):
    inputs, nodes = made
    again = lk.save(nodes["kernel"], tmp_path / "copy.zarr")
    np.testing.assert_array_equal(again, inputs["kernel"])
    assert again.name == "correlation"
    with pytest.raises(ValueError, match="holds no tiles"):
        lk.plan(nodes["kernel"])
    lazy = lk.neighbors(things_losses(), 3)
    assert str(lk.plan(xr.DataTree(lazy)))[:20] == str(lk.plan(lazy))[:20]


def things_losses():
    values = np.random.default_rng(2).normal(size=(2, 9, 7))
    return xr.DataArray(values, dims=("chain", "draw", "sample"))


def test_nodes__of_groups_or_of_several_variables_are_refused(made):
    _, nodes = made
    with pytest.raises(errors.SchemaError, match="holds no variables, only the groups"):
        plots.kernel_matrix(next(iter(nodes.values())).parent, by="label")
    with pytest.raises(errors.SchemaError, match=r"\['constant', 'neighbor', 'similarity'\]"):
        plots.kernel_matrix(nodes["near"], by="label")
    with pytest.raises(TypeError, match="kernel must be an xarray.DataArray.* not ndarray"):
        plots.kernel_matrix(np.eye(3), by="label")


def test_small_tables__of_an_audit_on_dask_are_computed(made):
    audit = made[1]["the_audit"].to_dataset().chunk({"example": 4})
    for table in (
        lk.most_influential(audit, 2),
        lk.most_influential(audit, 2, by=LABELS),
        lk.completeness(audit.chunk()),
        lk.concentration(audit),
        lk.net_influence(audit),
        lk.gross_influence(audit, cumulative=True),
    ):
        assert table.chunks is None or not table.chunks
        assert "dask" not in repr(table)
