"""What the pages say of the comparisons, in their own sentences, is so."""

import importlib
import json
import re

import numpy as np
import pytest

from experiments.book import RESULTS
from experiments.tables import PAGE

NETWORKS = ("lenet300", "lenet5", "resnet20", "vgg16", "vit_ti4")


def book_of(network):
    path = RESULTS / f"compare_fashion_mnist_{network}.json"
    return json.loads(path.read_text())


def rows_of(network):
    """Return (method, target) -> row, the denser target first."""
    return {(r["method"], r["target"]): r for r in book_of(network)["summary"]}


def leads(network):
    """Return (method, target) -> by how many points SCL is ahead on the test set.

    And the larger of the two standard deviations; of what reached its sparsity.
    """
    rows = {key: row for key, row in rows_of(network).items() if row["reached"]}

    def lead(row):
        own = rows["scl", row["target"]]
        ahead = own["accuracy"] - row["accuracy"]
        return 100 * ahead, 100 * max(own["accuracy_std"], row["accuracy_std"])

    others = [key for key in rows if key[0] not in ("scl", "scl_macs", "dense")]
    return {key: lead(rows[key]) for key in others}


@pytest.mark.parametrize("network", NETWORKS)
def test_scl_is_nowhere_farther_behind_than_is_said(network):
    found = leads(network)
    assert found
    assert min(ahead for ahead, _ in found.values()) > -0.4


@pytest.mark.parametrize("network", ["lenet300", "lenet5"])
def test_the_best_of_many_that_are_alike_is_flattered_by_a_tenth_of_a_point(network):
    rows = [row for (m, _), row in rows_of(network).items() if m == "scl"]
    others = len({method for method, _ in leads(network)})
    drawn = np.random.default_rng(0).normal(size=(20_000, others)).max(1).mean()
    of_a_mean = [row["accuracy_std"] / len(row["seeds"]) ** 0.5 for row in rows]
    assert round(100 * np.mean(of_a_mean) * drawn, 1) == 0.1


def test_what_is_said_of_lenet300_is_so():
    found = leads("lenet300")
    at = {t: {m: v for (m, u), v in found.items() if u == t} for _, t in found}
    assert len({method for method, _ in found}) == 8  # and dense
    assert all(ahead > 0 for ahead, _ in at[0.9].values())
    assert all(ahead > std for ahead, std in at[0.995].values())
    assert {m for m, (ahead, _) in at[0.99].items() if ahead < 0} == {"autoprune"}
    assert at[0.99]["autoprune"][0] > -0.1
    for target in (0.95, 0.98):
        for method in ("autoprune", "st3"):
            assert -0.35 < at[target][method][0] < -0.05
    assert all(abs(at[t]["gmp"][0]) < 0.1 for t in (0.9, 0.95, 0.98))
    assert ("dst", 0.98) in found
    dst = {t: row for (m, t), row in rows_of("lenet300").items() if m == "dst"}
    assert [t for t in dst if not dst[t]["reached"]] == [0.99, 0.995]
    assert max(round(row["sparsity"], 3) for row in dst.values()) == 0.988
    behind = [at[t]["str"][0] for t in at]
    assert (round(min(behind), 1), round(max(behind), 1)) == (1.9, 6.7)


def test_what_is_said_of_lenet5_is_so():
    found = leads("lenet5")
    others = {method for method, _ in found}
    six = {"autoprune", "gmp", "gmp_uniform", "magnitude_ste", "rigl", "st3"}
    assert others == six | {"str"}  # and DST, which is near its targets at most
    targets = (0.9, 0.95, 0.98, 0.99, 0.995)
    told = [round(found["autoprune", t][0], 2) for t in targets]
    assert told == [0.26, -0.05, 0.02, -0.11, -0.26]
    at = {t: {m: v for (m, u), v in found.items() if u == t} for t in targets}
    best = [min(at[t], key=lambda m: at[t][m][0]) for t in targets]
    assert [best[i] for i in (1, 3)] == ["autoprune", "autoprune"]
    for target in targets[:4]:
        for method in ("st3", "magnitude_ste"):
            assert abs(found[method, target][0]) < 0.105
    assert round(found["st3", 0.995][0], 2) == -0.33
    behind = [found["gmp", t][0] for t in targets]
    assert (round(min(behind), 1), round(max(behind), 1)) == (0.1, 0.9)
    rows = rows_of("lenet5")
    total = rows["dense", 0.0]["macs_remaining"]
    own = rows["scl", 0.99]
    assert round(100 * own["accuracy"], 1) == 90.6
    assert round(total / own["macs_remaining"]) == 8
    dst = [round(100 * rows["dst", t]["sparsity"], 1) for t in targets]
    assert dst == [90.1, 94.9, 97.5, 97.5, 97.5]
    assert round(100 * rows["dst", 0.9]["accuracy"], 2) == 90.96
    astray = [
        (1 - run["nnz"] / run["weights"], run["accuracy"])
        for run in book_of("lenet5")["runs"].values()
        if (run["method"], run["stage"]) == ("dst", "test")
        and run["settings"]["penalty"] == 0.002488
    ]
    assert [round(100 * one, 2) for one in np.mean(astray, 0)] == [82.38, 89.63]
    sparser = rows["scl", 0.995], rows["scl_macs", 0.99]
    for own, part in ((rows["str", 0.9], 17), *zip(sparser, (8, 1), strict=True)):
        assert round(100 * own["macs_remaining"] / total) == part
    told = [rows["str", 0.9], *sparser]
    assert [round(100 * row["accuracy"], 1) for row in told] == [88.9, 89.9, 89.9]


def test_what_is_said_of_budgets_of_macs_is_so():
    rows = rows_of("lenet5")
    total = rows["dense", 0.0]["macs_remaining"]
    ahead = []
    for (method, target), own in rows.items():
        if method == "scl_macs":
            assert total * (1 - target) * 0.98 < own["macs_remaining"]
            assert own["macs_remaining"] <= total * (1 - target)
            uniform = rows["gmp_uniform", target]
            ahead.append(round(100 * (own["accuracy"] - uniform["accuracy"]), 1))
            # Nobody with as few MACs, or a quarter more, is as accurate.
            for other in rows.values():
                if other["macs_remaining"] < 1.25 * own["macs_remaining"]:
                    assert other is own or other["accuracy"] < own["accuracy"]
    assert ahead == [0.4, 0.7, 1.7, 3.0, 4.4]
    told = [
        round(100 * rows[method, target]["accuracy"], 1)
        for target in (0.9, 0.99)
        for method in ("scl_macs", "gmp_uniform")
    ]
    assert told == [91.5, 91.1, 89.9, 87.0]
    rows = rows_of("resnet20")
    ahead = []
    for target in (0.9, 0.95, 0.98, 0.99):
        own, uniform = rows["scl_macs", target], rows["gmp_uniform", target]
        assert own["macs_remaining"] < 1.01 * uniform["macs_remaining"]
        ahead.append(round(100 * (own["accuracy"] - uniform["accuracy"]), 1))
    assert ahead == [0.1, 0.4, 0.7, 24.0]
    asked = ("scl_macs", 0.98), ("gmp_uniform", 0.98), ("scl_macs", 0.99)
    told = [round(100 * rows[one]["accuracy"], 1) for one in asked]
    assert told == [92.3, 91.6, 91.0]


def test_what_is_said_of_str_and_macs_is_so():
    def points(network, method):
        """Return (% of the MACs, accuracy in %), the most MACs first."""
        rows = rows_of(network)
        total = rows["dense", 0.0]["macs_remaining"]
        return [
            (100 * row["macs_remaining"] / total, 100 * row["accuracy"])
            for (name, _), row in rows.items()
            if name == method
        ]

    def told(network, method):
        return [(round(m, 1), round(a, 1)) for m, a in points(network, method)]

    of_str = [(9.3, 93.7), (4.3, 93.0), (1.4, 91.2), (0.6, 89.1)]
    assert told("resnet20", "str") == of_str
    assert told("resnet20", "scl")[1:3] == [(9.0, 93.6), (4.2, 92.8)]
    asked = [(10.0, 93.7), (5.0, 93.3), (2.0, 92.3), (1.0, 91.0)]
    assert told("resnet20", "scl_macs") == asked
    macs, accuracies = np.transpose(points("resnet20", "str")[::-1])
    fewer = [
        m < np.exp(np.interp(a, accuracies, np.log(macs)))
        for m, a in points("resnet20", "scl_macs")
    ]
    assert fewer == [False, True, True, True]
    _, own = np.transpose(points("resnet20", "scl"))
    np.testing.assert_array_equal(
        np.round(own - accuracies[::-1], 1), [0.1, 0.6, 1.6, 2.6]
    )
    on_vgg = [(round(m), round(a, 2)) for m, a in points("vgg16", "scl_macs")]
    assert on_vgg == [(5, 93.75), (2, 93.66)]


def test_what_is_said_of_resnet20_is_so():
    found = leads("resnet20")
    others = {method for method, _ in found}
    six = {"autoprune", "gmp", "gmp_uniform", "magnitude_ste", "rigl", "st3"}
    assert others == six | {"str", "dst"}
    assert [t for m, t in found if m == "dst"] == [0.9, 0.95]  # and is near 0.98
    assert round(found["dst", 0.95][0], 2) == 0.16
    at = {t: {m: v for (m, u), v in found.items() if u == t} for _, t in found}
    ahead, std = at[0.99]["gmp"]
    assert round(ahead, 1) == 0.7
    assert ahead > 4 * std
    assert all(lead[0] >= ahead for lead in at[0.99].values())
    assert round(at[0.99]["rigl"][0]) == 8
    assert all(at[0.99][m][0] > 20 for m in ("st3", "magnitude_ste", "gmp_uniform"))
    ahead, std = at[0.98]["gmp"]
    assert round(ahead, 1) == 0.5
    assert ahead > std
    assert (round(at[0.98]["st3"][0], 2), round(at[0.95]["gmp"][0], 2)) == (0.05, -0.06)
    assert all(lead[0] > 0 for lead in at[0.98].values())
    assert abs(at[0.95]["st3"][0]) < 0.1
    worst = [min(lead[0] for lead in at[t].values()) for t in (0.9, 0.95)]
    autoprune = [at[t]["autoprune"][0] for t in (0.9, 0.95, 0.98)]
    assert worst == autoprune[:2]
    assert [round(lead, 2) for lead in autoprune] == [-0.35, -0.16, 0.56]
    rows = rows_of("resnet20")
    last, own = rows["autoprune", 0.99], rows["scl", 0.99]
    assert (last["reached"], round(100 * last["sparsity"], 2)) == (False, 99.01)
    assert round(100 * (own["accuracy"] - last["accuracy"]), 2) == 1.07
    tries = {}  # AutoPrune's that were tested: sparsity, accuracy
    runs = book_of("resnet20")["runs"].values()
    for run in runs:
        if (run["method"], run["stage"]) == ("autoprune", "test"):
            tried = tries.setdefault(run["settings"]["penalty"], [])
            tried.append((1 - run["nnz"] / run["weights"], run["accuracy"]))
    means = sorted(tuple(100 * np.mean(tried, 0)) for tried in tries.values())
    near = [(round(sparsity), round(accuracy, 2)) for sparsity, accuracy in means[:3]]
    assert near == [(72, 94.30), (90, 94.18), (92, 93.71)]
    diverged = [run["method"] for run in runs if "diverged" in run]
    assert diverged == 3 * ["dst"]
    least = {
        method: round(100 * row["least_density"], 2)
        for (method, target), row in rows.items()
        if target == 0.99
    }
    told = {"st3": 0.0, "magnitude_ste": 0.06, "gmp": 0.17, "scl": 0.31}
    assert {method: least[method] for method in told} == told


def test_what_is_said_of_dst_on_resnet20_is_so():
    tests = {}  # penalty -> what is left, accuracy, of each seed
    for run in book_of("resnet20")["runs"].values():
        if (run["method"], run["stage"]) == ("dst", "test"):
            tried = tests.setdefault(run["settings"]["penalty"], [])
            tried.append((run["nnz"] / run["weights"], run["accuracy"]))
    assert sum(len(tried) for tried in tests.values()) == 48
    accuracies = {penalty: np.transpose(tried)[1] for penalty, tried in tests.items()}
    low = [np.sum(found < found.max() - 0.07) for found in accuracies.values()]
    assert sum(low) == 13
    rows = rows_of("resnet20")
    settings = rows["dst", 0.9]["settings"]
    bad, worse, good = sorted(100 * accuracies[settings["penalty"]])
    assert (round(bad), round(worse), round(good, 1)) == (85, 85, 93.7)
    left, accuracy = 100 * np.mean(tests[3.306e-5], 0)
    assert (round(left, 1), round(accuracy, 1)) == (9.4, 93.7)
    for target in (0.98, 0.99):
        last = rows["dst", target]
        assert (last["reached"], round(100 * last["sparsity"], 2)) == (False, 97.9)
        assert round(100 * last["accuracy"], 1) == 92.4
    behind = rows["scl", 0.98]["accuracy"] - rows["dst", 0.98]["accuracy"]
    assert round(100 * behind, 1) == 0.4
    first = last["settings"]["penalty"]
    around = sorted(one for one in tests if 1 <= one / first < 1.05)
    assert round(100 * (around[-1] / first - 1), 1) == 4.4
    told = [round(100 * np.mean(tests[one], 0)[0], 2) for one in around]
    assert told == [2.10, 2.41, 2.14, 2.17, 3.12]


def test_what_is_said_of_vgg16_is_so():
    found = leads("vgg16")
    assert {method for method, _ in found} == {"gmp", "rigl", "str"}
    assert round(found["gmp", 0.95][0], 1) == 0.2
    assert all(abs(found["str", t][0]) < 0.1 for t in (0.95, 0.98))
    ahead, std = found["gmp", 0.98]
    assert (round(ahead, 1), ahead > -std) == (-0.1, True)
    rows = rows_of("vgg16")
    for (method, _), row in rows.items():
        most = 0.002 if method == "scl" else 0.01
        assert rows["dense", 0.0]["accuracy"] - row["accuracy"] < most
    total = rows["dense", 0.0]["macs_remaining"]
    asked = [(m, t) for m in ("str", "scl") for t in (0.95, 0.98)]
    told = [round(100 * rows[one]["macs_remaining"] / total, 1) for one in asked]
    assert told == [11.8, 6.1, 29.4, 14.9]
    told = [round(100 * rows[method, 0.98]["accuracy"], 1) for method in ("str", "scl")]
    assert told == [94.2, 94.1]
    decays = [rows["str", t]["settings"]["weight_decay"] for t in (0.95, 0.98)]
    assert [f"{one:.1e}" for one in decays] == ["8.1e-04", "1.2e-03"]


def test_what_is_said_of_vit_is_so():
    found = leads("vit_ti4")
    assert {method for method, _ in found} == {"gmp", "rigl", "str"}
    assert [round(found["gmp", t][0], 2) for t in (0.95, 0.98)] == [-0.17, 0.05]
    assert [round(found["gmp", t][1], 1) for t in (0.95, 0.98)] == [0.3, 0.3]
    assert [round(found["rigl", t][0], 1) for t in (0.95, 0.98)] == [2.2, 3.1]
    assert [round(found["str", t][0], 1) for t in (0.95, 0.98)] == [1.0, 1.3]
    rows = rows_of("vit_ti4")
    total = rows["dense", 0.0]["macs_remaining"]
    told = [
        (round(100 * row["macs_remaining"] / total), round(100 * row["accuracy"], 1))
        for row in (rows["scl", 0.98], rows["str", 0.95])
    ]
    assert told == [(2, 90.0), (5, 89.9)]


@pytest.mark.parametrize("network", ["resnet20", "vgg16", "vit_ti4"])
def test_distance_to_dense_in_the_lab_books_is_that_of_the_files(network):
    module = importlib.import_module(f"experiments.configs.fashion_mnist_{network}")
    text = re.search(r"SCL (?:is|with).*?dense.*?\.\n\n", module.__doc__, re.DOTALL)
    told = re.findall(r"\b\d\.\d\b", text[0])
    rows = rows_of(network)
    own = {t: row["accuracy"] for (m, t), row in rows.items() if m == "scl"}
    dense = rows["dense", 0.0]["accuracy"]
    assert told == [f"{100 * (dense - one):.1f}" for one in own.values()]
    kept = [round(100 * (1 - target)) for target in own]
    assert re.findall(r"(\d+) %", text[0]) == [f"{one}" for one in kept]


def test_what_the_lab_book_says_of_budgets_of_macs_is_so():
    path = RESULTS / "pareto" / "fashion_mnist_resnet20" / "pareto.json"
    told = {
        row["budget"]["weigh"]: f"{100 * row['accuracy']:.2f} %"
        for row in json.loads(path.read_text())["summary"]
        if row["target"] == 0.95 and row["budget"]["costs"] == "macs"
    }
    text = importlib.import_module("experiments.configs.fashion_mnist_resnet20").__doc__
    assert re.findall(r"93\.\d\d %", text) == [told[True], told[False]]


def test_what_is_said_of_estimators_is_so():
    book = json.loads((RESULTS / "estimators_fashion_mnist_resnet20.json").read_text())
    rows = {(row["ste"], row["start"]): row["accuracy"] for row in book["summary"]}
    asked = ("identity", 0.1), ("relu", 0.1), ("clipped", 1.5)
    assert [round(100 * rows[key], 1) for key in asked] == [93.7, 93.0, 87.2]
    assert book["config"]["sparsity"] == 0.95


def test_runs_are_as_many_as_are_told():
    told = dict(re.findall(r"(\S+), ([\d,]+)(?: runs,|[;.])", PAGE.read_text()))
    for name, network in {
        "LeNet-300-100": "lenet300",
        "LeNet-5": "lenet5",
        "ResNet-20": "resnet20",
        "VGG-16": "vgg16",
        "ViT-Ti/4": "vit_ti4",
    }.items():
        assert told[name] == f"{len(book_of(network)['runs']):,}"
