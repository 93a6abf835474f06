"""`mixloader mixtures` and `mixloader fit`: the files of RegMix and Olmix in, mixtures and predictions out."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mixloader.cli import main
from mixloader.errors import TableError
from mixloader.fitters import fit, propose, spearman
from mixloader.fitters.exponential import Exponential
from mixloader.fitters.runs import (
    match,
    read_losses,
    read_mixtures,
    read_weights,
    write_table,
    write_weights,
)

DOMAINS = ("web", "books", "code")
LAW = Exponential(np.array([1.0, 0.5]), np.array([[-1.0, 0.5, 0.3], [0.8, 0.4, -2.0]]))
PRIOR = {"web": 0.6, "books": 0.3, "code": 0.1}
DATA = Path(os.environ.get("MIXLOADER_REGMIX") or Path(__file__).parents[2] / "shared" / "data" / "regmix")
"""RegMix's runs: the CSV files of github.com/sail-sg/regmix, data/."""


def run_cli(*argv):
    return main([str(argument) for argument in argv])


@pytest.fixture
def swarm(tmp_path):
    """Runs as RegMix writes them, a prior, and mixtures to predict."""
    rng = np.random.default_rng(0)
    x, fresh = rng.dirichlet(np.ones(3), 40), rng.dirichlet(np.ones(3), 10)
    write_table(tmp_path / "mixtures.csv", "index", range(1, 41), DOMAINS, x)
    write_table(tmp_path / "losses.csv", "index", range(1, 41), ("web_loss", "code_loss"), LAW.predict(x))
    write_table(tmp_path / "test.csv", "index", range(1, 11), DOMAINS, fresh)
    write_table(tmp_path / "truth.csv", "index", range(1, 11), ("web_loss", "code_loss"), LAW.predict(fresh))
    (tmp_path / "prior.json").write_text(json.dumps(PRIOR))
    return tmp_path


def runs_of(folder):
    return "--mixtures", folder / "mixtures.csv", "--losses", folder / "losses.csv"


def test_predictions_are_a_file_like_the_losses(swarm, capsys):
    out = swarm / "out.csv"
    predict = ("--predict", swarm / "test.csv", "--out", out, "--score", swarm / "truth.csv")
    assert run_cli("fit", "--method", "olmix", *runs_of(swarm), *predict) == 0
    found = read_losses(out)
    assert (found.run_column, found.columns, found.runs) == (
        "index",
        ("web_loss", "code_loss"),
        (*tuple("123456789"), "10"),
    )
    np.testing.assert_allclose(found.values, LAW.predict(read_mixtures(swarm / "test.csv").values), atol=1e-3)
    printed = capsys.readouterr().out
    assert "40 runs, 3 domains, 2 losses" in printed
    assert "Spearman 1.0000  mean" in printed


def test_a_proposal_is_a_mixture_that_a_policy_takes(swarm, capsys):
    out = swarm / "weights.json"
    (swarm / "tokens.json").write_text('{"web": 1e6, "books": 1e9, "code": 1e9}')
    limits = ("--tokens", swarm / "tokens.json", "--target_tokens", "1e7", "--repetition", "2", "--floor", "0.05")
    target = ("--target", "web_loss=3", "--target", "code_loss", "--kl", "0.01")
    propose_to = ("--propose", out, "--prior", swarm / "prior.json")
    assert run_cli("fit", "--method", "olmix", *runs_of(swarm), *propose_to, *target, *limits) == 0
    weights = json.loads(out.read_text())
    assert list(weights) == list(DOMAINS)
    expected = propose(LAW, list(PRIOR.values()), [3, 1], kl=0.01, cap=[0.2, 1, 1], floor=0.05)
    np.testing.assert_allclose(list(weights.values()), expected, atol=1e-3)
    assert weights["web"] <= 0.2
    assert "predicted loss" in capsys.readouterr().out


def test_regmix_is_chosen_by_cross_validation_and_simulated(swarm, capsys):
    pytest.importorskip("lightgbm")
    out = swarm / "weights.csv"
    quick = (
        "--set",
        "rounds=60",
        "--set",
        "rate=1e-1",
        "--set",
        "bags=1",
        "--cv",
        "2",
        "--draws",
        "500",
        "--best",
        "20",
    )
    where = ("--propose", out, "--prior", swarm / "prior.json", "--target", "code_loss")
    assert run_cli("fit", "--method", "regmix", *runs_of(swarm), *quick, *where) == 0
    printed = capsys.readouterr().out
    assert "Spearman out of fold (2 folds, mean of 1 losses)" in printed
    assert printed.count('"rounds": 60') == 6
    weights = read_weights(out)
    assert abs(sum(weights.values()) - 1) < 1e-9
    assert weights["code"] > 0.4  # the loss that is wanted falls with it; the prior gives it 0.1


def test_olmix_files_are_matched_by_run_and_keep_their_conventions(tmp_path):
    """ratios.csv and metrics.csv in different orders, with name, index and an unnamed column; priors as YAML."""
    x = np.random.default_rng(1).dirichlet(np.ones(3), 12)
    y = LAW.predict(x)
    names = [f"run-{i:02d}" for i in range(12)]
    with (tmp_path / "ratios.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("", "run", "name", "index", *DOMAINS))
        writer.writerows([i, names[i], f"swarm {i}", i, *x[i]] for i in range(12))
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run_id", "name", "bpb/web", "bpb/code"))
        writer.writerows([names[i], f"swarm {i}", *y[i]] for i in range(11, 1, -1))
    ratios, metrics = read_mixtures(tmp_path / "ratios.csv"), read_losses(tmp_path / "metrics.csv")
    assert (ratios.columns, metrics.columns) == (DOMAINS, ("bpb/web", "bpb/code"))
    mixtures, losses, runs = match(ratios, metrics)
    assert runs == tuple(names[2:])
    np.testing.assert_allclose(losses, LAW.predict(mixtures))
    priors = {"priors": {"relative_sizes": PRIOR, "token_counts": dict.fromkeys(DOMAINS, 100)}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(priors))
    swarm = ("--mixtures", tmp_path / "ratios.csv", "--losses", tmp_path / "metrics.csv")
    where = ("--propose", tmp_path / "out.json", "--prior", tmp_path / "fit.yaml", "--target_tokens", "1000")
    assert run_cli("fit", "--method", "linear", *swarm, *where, "--repetition", "4") == 0
    assert max(json.loads((tmp_path / "out.json").read_text()).values()) <= 0.4 + 1e-12


def test_mixtures_are_sampled_and_read_back(swarm):
    out = swarm / "runs.csv"
    assert run_cli("mixtures", out, "-n", "30", "--prior", swarm / "prior.json", "--grid", "0.01", "--seed", "3") == 0
    table = read_mixtures(out)
    assert (table.run_column, table.columns, len(table.runs)) == ("run", DOMAINS, 30)
    first = out.read_bytes()
    run_cli("mixtures", out, "-n", "30", "--prior", swarm / "prior.json", "--grid", "0.01", "--seed", "3")
    assert out.read_bytes() == first


def test_a_mixture_is_used_again_when_a_domain_is_added(swarm):
    """web and books keep their 2 : 1 in the runs that are sampled, in the fit and in the proposal."""
    (swarm / "old.json").write_text('{"web": 2, "books": 1}')
    reuse = ("--prior", swarm / "prior.json", "--reuse", swarm / "old.json")
    assert run_cli("mixtures", swarm / "mixtures.csv", "-n", "25", *reuse) == 0
    table = read_mixtures(swarm / "mixtures.csv")
    np.testing.assert_allclose(table.values[:, 0], 2 * table.values[:, 1])
    write_table(swarm / "losses.csv", "run", table.runs, ("a", "b"), LAW.predict(table.values))
    fitted = ("fit", "--method", "olmix", "--mixtures", swarm / "mixtures.csv", "--losses", swarm / "losses.csv")
    predict = ("--predict", swarm / "mixtures.csv", "--out", swarm / "out.csv")
    assert run_cli(*fitted, *reuse, "--propose", swarm / "new.json", *predict) == 0
    weights = json.loads((swarm / "new.json").read_text())
    assert weights["web"] == pytest.approx(2 * weights["books"])
    assert sum(weights.values()) == pytest.approx(1)
    np.testing.assert_allclose(read_losses(swarm / "out.csv").values, LAW.predict(table.values), atol=1e-3)
    # The same runs with the two as one column, as Olmix's own files have them.
    one = np.column_stack((table.values[:, :2].sum(axis=1), table.values[:, 2]))
    write_table(swarm / "mixtures.csv", "run", table.runs, ("existing", "code"), one)
    assert run_cli(*fitted, *reuse, "--propose", swarm / "again.json") == 0
    assert json.loads((swarm / "again.json").read_text()) == pytest.approx(weights, abs=1e-6)


def test_a_manifest_gives_prior_and_tokens(swarm):
    """Files of 3,000, 1,500 and 500 tokens; a run of 10,000 that reads each at most 4 times caps the last at 0.2."""
    (swarm / "data").mkdir()
    for name, tokens in zip(DOMAINS, (3000, 1500, 500), strict=True):
        np.arange(tokens, dtype=np.uint16).tofile(swarm / "data" / f"{name}.bin")
    where = ("--data", swarm / "data", "--target_tokens", "10000")
    assert run_cli("mixtures", swarm / "runs.csv", "-n", "50", *where) == 0
    assert read_mixtures(swarm / "runs.csv").select(["code"]).max() <= 0.2
    fitted = ("fit", "--method", "olmix", *runs_of(swarm), "--target", "code_loss", "--kl", "0")
    assert run_cli(*fitted, "--propose", swarm / "w.json", *where) == 0
    assert json.loads((swarm / "w.json").read_text())["code"] == pytest.approx(0.2)
    assert run_cli(*fitted, "--propose", swarm / "w.json", "--data", swarm / "data", "--kl", "1e5") == 0
    assert json.loads((swarm / "w.json").read_text()) == pytest.approx(PRIOR, abs=1e-3)


def test_mixmin_reads_log_probabilities(tmp_path):
    (tmp_path / "probs.csv").write_text("length,field,web,code\n1,a,-1,-9\n1,a,-9,-1\n2,b,-2,-18\n2,b,-2,-18\n")
    (tmp_path / "prior.json").write_text('{"web": 1, "code": 1}')
    where = (
        "--log_probs",
        tmp_path / "probs.csv",
        "--prior",
        tmp_path / "prior.json",
        "--propose",
        tmp_path / "w.json",
    )
    assert run_cli("fit", "--method", "mixmin", *where, "--target", "a") == 0
    assert json.loads((tmp_path / "w.json").read_text()) == pytest.approx({"web": 0.5, "code": 0.5}, abs=1e-4)
    assert run_cli("fit", "--method", "mixmin", *where, "--target", "b") == 0
    assert json.loads((tmp_path / "w.json").read_text())["web"] > 0.999


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to do with the law"),
        (("--predict", "test.csv"), "--predict MIXTURES and --out FILE go together"),
        (("--propose", "w.json"), "give --prior FILE, or --data MANIFEST"),
        (("--propose", "w.txt", "--prior", "prior.json"), "ends in .json or .csv"),
        (("--propose", "w.json", "--prior", "prior.json", "--target", "maths"), "the losses are web_loss, code_loss"),
        (("--propose", "w.json", "--prior", "prior.json", "--target", "web_loss=x"), "'x' is no number"),
        (("--propose", "w.json", "--prior", "prior.json", "--target_tokens", "9"), "--tokens FILE or --data MANIFEST"),
        (("--propose", "w.json", "--prior", "bad.json"), "the prior says nothing of domain 'books'"),
        (("--propose", "w.json", "--prior", "list.json"), "expected {domain: number}"),
        (("--cv", "--set", "delta"), "expected KEY=VALUE"),
        (("--cv", "--log_probs", "x.csv"), "is fitted to --mixtures and --losses"),
    ],
)
def test_mistakes_are_sentences(swarm, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(swarm)
    (swarm / "bad.json").write_text('{"web": 1}')
    (swarm / "list.json").write_text("[1]")
    assert run_cli("fit", "--method", "linear", *runs_of(swarm), *argv) == 2
    assert message in capsys.readouterr().err


def test_a_missing_lightgbm_is_a_sentence(swarm, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    where = ("--predict", swarm / "test.csv", "--out", swarm / "out.csv")
    assert run_cli("fit", "--method", "regmix", *runs_of(swarm), *where) == 2
    assert "mixloader[fit]" in capsys.readouterr().err


# Files.


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2), min_size=1))
def test_numbers_survive_a_file(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    columns = ('odd, "name"', "täsk")
    write_table(path, "run", range(len(rows)), columns, np.array(rows))
    table = read_losses(path)
    assert table.columns == columns
    np.testing.assert_array_equal(table.values, np.array(rows))
    weights = dict(zip(columns, rows[0], strict=True))
    write_weights(path, weights)
    assert read_weights(path) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv is empty"),
        ("index,a,b\n", "2 columns of numbers and 0 runs"),
        ("a,b\n0.5,0.5\n", "line 1: no column names the runs"),
        ("index,a,a\n1,0.5,0.5\n", "line 1: the column 'a' stands there twice"),
        ("index,a,b\n1,0.5,0.5\n2,0.5\n", "line 3: 2 cells under 3 columns"),
        ("index,a,b\n1,0.5,0.5\n\n2,half,0.5\n", "line 4, column 'a': 'half' is no finite number"),
        ("index,a,b\n1,0.5,\n", "line 2, column 'b': '' is no finite number"),
        ("index,a,b\n1,0.5,nan\n", "line 2, column 'b': 'nan' is no finite number"),
        ("index,a,b\n1,-0.5,1.5\n", "line 2, column 'a': a weight is -0.5"),
        ("index,a,b\n1,0.5,0.5\n1,0.4,0.6\n", "line 3, column 'index': run '1' stood in line 2 too"),
        ("index,a,b\n1,0.5,0.7\n", r"line 2: the weights sum to 1.2; expected 1 within 0.01"),
    ],
)
def test_malformed_files_are_sentences(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TableError, match=message):
        read_mixtures(path)


def test_files_that_do_not_fit_each_other(swarm, capsys):
    write_table(swarm / "other.csv", "run", ["x", "y"], ("a",), np.ones((2, 1)))
    with pytest.raises(TableError, match="no run in common: the first begins with '1', the second with 'x'"):
        match(read_mixtures(swarm / "mixtures.csv"), read_losses(swarm / "other.csv"))
    with pytest.raises(TableError, match="has no column 'maths'; its columns are web, books, code"):
        read_mixtures(swarm / "mixtures.csv").select(["maths"])
    (swarm / "latin.csv").write_bytes(b"index,a\n1,\xe9\n")
    with pytest.raises(TableError, match=r"cannot read .*latin\.csv"):
        read_losses(swarm / "latin.csv")
    with pytest.raises(TableError, match=r"cannot write"):
        write_weights(swarm / "no" / "w.csv", PRIOR)


# RegMix's own runs.


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no RegMix runs at {DATA}; set MIXLOADER_REGMIX to their folder")
@pytest.mark.parametrize(("method", "at_1m", "at_60m"), [("regmix", 0.989, 0.984), ("linear", 0.90, 0.89)])
def test_unseen_pile_mixtures_are_ranked(method, at_1m, at_60m):
    """Better than RegMix's table 2 (0.9845 and 0.9864; 0.9008 and 0.8926), with settings chosen without these runs."""
    if method == "regmix":
        pytest.importorskip("lightgbm")
    column = ["metric/the_pile_pile_cc_val_loss"]
    table = read_mixtures(DATA / "train_mixture_1m.csv")
    law = fit(method, table.values, read_losses(DATA / "train_pile_loss_1m.csv").select(column))
    for size, expected in (("1m", at_1m), ("60m", at_60m)):
        mixtures = read_mixtures(DATA / f"test_mixture_{size}.csv").select(table.columns)
        real = read_losses(DATA / f"test_pile_loss_{size}.csv").select(column)
        assert spearman(law.predict(mixtures)[:, 0], real[:, 0]) >= expected
