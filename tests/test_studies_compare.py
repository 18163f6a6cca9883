"""`python -m studies.compare`: methods, seeds and settings become runs; what comes out is their cards' table."""

import json

import pytest

from common.errors import UserError
from common.files import rounded
from eval.card import read_card, save_card
from studies.compare import Arguments, main, online_accuracy, publish, run, runs_of
from studies.study import items


def test_every_combination_is_a_run_and_fields_have_their_types():
    args = Arguments(("simclr", "byol"), "smoke", 2, ("temperature=.1,.2", "batch-size=32", "normalize=none,shapes"))
    study = runs_of(args)
    names = [
        "simclr-temperature.1-normalizenone",
        "simclr-temperature.1-normalizeshapes",
        "simclr-temperature.2-normalizenone",
        "simclr-temperature.2-normalizeshapes",
        "byol-normalizenone",
        "byol-normalizeshapes",
    ]
    assert [item.name for item in study.runs] == names
    assert study.runs[2].fields == {"temperature": 0.2, "batch_size": 32, "normalize": "none"}
    assert len(items(study)) == 12 and study.runs[2].config(1).temperature == 0.2
    data = runs_of(Arguments(("simclr",), "smoke", data="folder", data_name="mine"))
    assert data.runs[0].fields == {"data": "folder", "data_name": "mine"}


@pytest.mark.parametrize(
    ("args", "message"),
    (
        (Arguments(("simclr", "nope")), "there is no methods/nope"),
        (Arguments(("simclr",), "cifar100"), "simclr has no preset cifar100"),
        (Arguments(("simclr",), vary=("temprature=1",)), "--vary temprature: none of simclr has this field"),
        (Arguments(("simclr",), vary=("temperature",)), "write FIELD=VALUE,VALUE"),
        (Arguments(("simclr",), vary=("sync_bn=2",)), "--vary sync_bn: '2' is neither true nor false"),
        (Arguments(("simclr",), seeds=0), "--seeds is 0"),
    ),
)
def test_mistakes_are_named(args, message):
    with pytest.raises(UserError, match=message):
        runs_of(args)


@pytest.mark.parametrize("vary", ["temperature=hot", "norm=layer", "crop_scale=.2"])
def test_values_are_read_by_the_methods_command_line(vary, capsys):
    with pytest.raises(SystemExit) as end:
        runs_of(Arguments(("simclr",), "smoke", vary=(vary,)))
    assert end.value.code == 2 and f"--{vary.split('=')[0].replace('_', '-')}" in capsys.readouterr().err
    (run,) = runs_of(Arguments(("simclr",), "smoke", vary=("crop_scale=.2 1", "sync-bn=false"))).runs
    assert run.fields == {"crop_scale": (0.2, 1.0), "sync_bn": False} and "--no-sync-bn" in run.flags(0)


def test_runs_table_and_curves(tmp_path, capsys):
    words = ["--methods", "simclr", "barlow", "--preset", "smoke", "--out", str(tmp_path)]
    words += ["--vary", "epochs=2", "limit=64", "knn_every=1"]
    main([*words, "--plan"])
    plan = capsys.readouterr().out
    assert plan.count("python -m methods.") == 2 and "--knn-every 1" in plan and not list(tmp_path.iterdir())
    main(words)
    printed = capsys.readouterr().out
    cards = {m: json.loads((tmp_path / f"{m}-seed0" / "result.json").read_text()) for m in ("simclr", "barlow")}
    for method, card in cards.items():
        value = next(row["value"] for row in card["evaluations"] if row["protocol"] == "knn-20-0.07")
        assert any(method in line and f"{value:.1f}" in line for line in printed.splitlines())
    assert [epoch for epoch, _ in online_accuracy(tmp_path / "simclr-seed0")] == [1.0, 2.0]
    page = (tmp_path / "compare.html").read_text()
    assert "During training" in page and page.count("<img") >= 1 and (tmp_path / "curves.png").stat().st_size > 5000
    before = (tmp_path / "simclr-seed0" / "result.json").stat().st_mtime_ns
    run(Arguments(("simclr", "barlow"), "smoke", vary=("epochs=2", "limit=64", "knn_every=1"), out=tmp_path))
    assert "2 runs, 2 done" in capsys.readouterr().out
    assert (tmp_path / "simclr-seed0" / "result.json").stat().st_mtime_ns == before
    study = runs_of(Arguments(("simclr", "barlow"), "smoke", vary=("epochs=2", "limit=64", "knn_every=1")))
    for commit in ("0123456789ab", "0123456789ab+changes"):
        for method in cards:
            path = tmp_path / f"{method}-seed0" / "result.json"
            save_card(path, {**read_card(path), "git_commit": commit})
        if "+" not in commit:
            written = publish(study, tmp_path, tmp_path / "methods")
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        "methods/simclr/results/smoke-seed0.json",
        "methods/barlow/results/smoke-seed0.json",
    ]
    kept = read_card(written[0])
    assert [row["value"] for row in kept["evaluations"]] == rounded(
        [r["value"] for r in cards["simclr"]["evaluations"]]
    )
    with pytest.raises(UserError, match=r"simclr-seed0 is a run of 0123456789ab\+changes: commit the code"):
        publish(study, tmp_path, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
