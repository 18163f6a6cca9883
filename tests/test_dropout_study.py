"""The dropout studies: intervals and verdicts by their rule, the report, and the queue on a table of records."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from common.errors import UserError
from common.rng import generator
from methods.dropout_ssl.config import ARMS
from studies import STUDIES
from studies.__main__ import main
from studies.cards import Cards, read_cards
from studies.dropout import OF_TABLES, report, study, verdict
from studies.page import RESULTS, markdown, publish, tables_text
from studies.study import Queue, Study, collect, items, with_data

TINY = {"steps": 40, "measured": 128, "masks": 3, "save_every": 20}


def test_intervals_are_students_and_one_seed_decides_nothing():
    mean, low, high = verdict.interval([1.0, 2.0, 3.0, 6.0])
    half = 3.182 * math.sqrt(14 / 3) / 2
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half))
    assert verdict.interval([5.0]) == (5, -math.inf, math.inf)
    low, high = verdict.bootstrap([1.0, 2.0, 3.0, 6.0])
    assert 1 <= low < 3 < high <= 6 and verdict.bootstrap([2.0, 2.0]) == (2, 2)
    up, down = (verdict.Condition("A1", "V", "A0", sign) for sign in "+-")
    same, no_more = (verdict.Condition("A6", "V", "A1", sign) for sign in ("=", "not +"))
    assert [verdict.judge(up, v) for v in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [1, -1, 0.5], [3.0], [])] == [
        "holds",
        "fails",
        "open",
        "open",
        "not run",
    ]
    assert [verdict.judge(down, v) for v in ([1, 1.1, 0.9], [-1, -1.1, -0.9])] == ["fails", "holds"]
    assert [verdict.judge(same, v) for v in ([1, -1, 0.5], [1, -1], [1, 1.1, 0.9], [-1, -1.1, -0.9])] == [
        "holds",
        "open",
        "fails",
        "fails",
    ]
    assert [verdict.judge(no_more, v) for v in ([-1, -1.1, -0.9], [1, 1.1, 0.9])] == ["holds", "fails"]


def made_up(difference: float, budgets=(250, 4000), seeds=4, fewest: float = 0.0) -> verdict.Results:
    """Cards in which A1 is `difference` better than A0 and A2 in everything, seeds scattered in common."""
    better = {
        "V": -1,
        "g_inst": 1,
        "g_cls": 1,
        "nt_xent_all_0.5": -1,
        "nt_xent_same_0.5": -1,
        "nt_xent_other_0.5": -1,
        "alignment": -1,
        "consistency": -1,
        "ce_geo": -1,
        "gradient_nt_xent": 1,
        "gradient_alignment": 1,
        "rank": 1,
    }
    cards = {}
    for arm in ("A0", "A1", "A2"):
        for labels in budgets:
            for seed in range(seeds):
                gain = difference * (arm == "A1")
                lines = []
                for step, share in ((0, 0.0), (10, 0.5), (20, 1.0)):
                    values = {m: 1 + 0.2 * seed + share * sign * gain * (1 + 0.01 * seed) for m, sign in better.items()}
                    lines.append({"step": step, "epoch": step / 5, "kind": "held-out", "accuracy": 50.0, **values})
                accuracy = 60 + seed + gain * (1 + (labels == budgets[0]) * fewest + 0.01 * seed)
                cards[arm, labels, seed] = {"measurements": lines, "evaluations": [{"value": accuracy}]}
    return verdict.Results("made up", ("A0", "A1", "A2"), budgets, cards, len(cards))


def test_verdicts_follow_the_rule():
    for difference, expected in ((0.5, "supported"), (-0.5, "refuted"), (0.0, "undecided")):
        found = made_up(difference)
        for name in ("weak", "strong", "H1"):
            assert verdict.verdict(found, name, 250)[0] == expected, (name, difference)
        assert verdict.verdict(found, "H3", 250)[0] == verdict.verdict(found, "H4", 250)[0] == "not run"
    assert verdict.verdict(made_up(0.5, seeds=1), "strong", 250)[0] == "undecided"
    gap = next(c for c in verdict.CONDITIONS["H5"][1] if c.other == verdict.FEWEST)
    assert made_up(0.5, fewest=1.0).pairs(gap, 250) == pytest.approx([0.5] * 4)
    assert made_up(0.5, budgets=(250,)).pairs(gap, 250) == []
    start = next(c for c in verdict.CONDITIONS["H1"][1] if c.other == verdict.START)
    assert made_up(0.5).pairs(start, 250) == pytest.approx([-0.5 * (1 + 0.01 * s) for s in range(4)])


def test_page_is_whole_and_escaped():
    found = replace(made_up(0.5), about="<b>made</b> up")
    text = report.write_page(found)
    assert text.count("supported") > 3 and "<b>made" not in text and "A2 next to A1" in text
    assert text[: text.index("</ol>")].count("<li>") == 5 and "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/png") == 2 * 8 + 1  # of two budgets, and their summary
    assert "No run is done" in report.write_page(replace(found, cards={}))
    assert "".join(map(markdown, report.tables(found))).count("\n| A1 | 4 |") == 2


def tiny() -> Study:
    return study("tiny", "tiny", "table", ("A0", "A1", "A2"), seeds=2, budgets=(200,), fields=TINY)


def test_the_queues_cards_are_read_and_others_refused(tmp_path):
    made = tiny()
    assert [run.name for run, _ in items(made)[:3]] == ["A0-n200", "A1-n200", "A2-n200"] and len(items(made)) == 6
    Queue(made, tmp_path, Console(quiet=True)).run(limit=1)
    ((name, seed),) = (found := collect(made, tmp_path)).cards
    card = found.cards[name, seed]
    assert (name, seed) == ("A0-n200", 0) and card["config"]["arm"] == "A0"
    assert {m["kind"] for m in card["measurements"]} == {"held-out", "train"}
    assert card["evaluations"][0]["protocol"] == "supervised" and card["evaluations"][0]["value"] > 30
    assert "1 of 6 runs" in made.report(found) and "| A0 | 1 |" in tables_text(made, found)
    path = tmp_path / "A0-n200-seed0" / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {**content["config"], "p": 0.9}}))
    with pytest.raises(UserError, match=r"has other settings \(p 0.9, not 0.2\)"):
        collect(made, tmp_path)


def test_published_cards_give_the_same_report(tmp_path, monkeypatch):
    """Cards are rounded when they are collected, so a report of the runs is the report of the committed cards."""
    monkeypatch.setattr("studies.page.HERE", tmp_path)
    monkeypatch.setattr("studies.page.RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text("<!-- studies:begin --><!-- studies:end -->")
    made = tiny()
    for (run, seed), card in zip(items(made), made_up(0.123456789, (200,), 2).cards.values(), strict=True):
        directory = tmp_path / "runs" / f"{run.name}-seed{seed}"
        directory.mkdir(parents=True)
        line = {"protocol": "supervised", "target": "label", "metric": "top-1", **card["evaluations"][0]}
        content = {"method": "dropout_ssl", "config": config(run, seed), "seed": seed, **card, "evaluations": [line]}
        (directory / "result.json").write_text(json.dumps(content))
    place = publish(made, tmp_path / "runs")
    committed, here = read_cards(place / "cards.jsonl"), collect(made, tmp_path / "runs")
    assert len(committed) == 6 and made.report(committed) == made.report(here)
    assert tables_text(made, committed) == (place / "table.md").read_text() and not list(place.glob("*.html"))


def test_abridged_cards_have_all_that_the_report_reads():
    made = study("tiny", "tiny", "table", OF_TABLES, seeds=1, budgets=(200,))
    stream, cards = generator("test"), {}
    for run, seed in items(made):
        names = [*verdict.NAMES, "s_same", "ece"]
        lines = []
        for step in (0, 10, 20, 40):
            for kind in ("held-out", "train", "own"):
                values = torch.rand(len(names), generator=stream).tolist()
                lines.append({"step": step, "kind": kind, **dict(zip(names, values, strict=True))})
        row = {"protocol": "supervised", "target": "label", "metric": "top-1", "value": 100 * lines[0]["V"]}
        about = {"config": config(run, seed), "epochs": 2.0, "steps": 40}
        cards[run.name, seed] = {**about, "measurements": lines, "evaluations": [row]}
    short = Cards({key: made.abridge(card) for key, card in cards.items()})
    assert made.report(short) == made.report(Cards(cards)) and "One pass (A10)" in made.report(short)
    assert tables_text(made, short) == tables_text(made, Cards(cards))
    assert {line["kind"] for line in short.of("A4-n200")[0]["measurements"]} == {"held-out", "own"}
    assert "train" not in json.dumps([card["measurements"] for card in short.cards.values()])


def test_committed_cards_make_the_report_without_a_run(tmp_path, monkeypatch):
    main(["dropout-shapes", "--from-cards", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (RESULTS / "dropout-shapes" / "table.md").read_text()
    assert "6 of 6 runs" in (tmp_path / "report.html").read_text() and not list(tmp_path.glob("*-seed*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun or accelerate launch"):
        main(["dropout-shapes", "--out", str(tmp_path)])


def config(run, seed: int) -> dict:
    return json.loads(json.dumps(vars(run.config(seed))))


def test_data_may_come_from_another_source_unless_they_are_generated():
    made = with_data(STUDIES["dropout-cifar10"], "/data/cifar", "CIFAR-10 (JPEG)")
    assert {run.config(0).data for run in made.runs} == {"/data/cifar"}
    assert made.runs[0].flags(0)[-4:] == ["--data", "/data/cifar", "--data-name", "CIFAR-10 (JPEG)"]
    for name in ("dropout-shapes", "augmentation", "label-free"):
        with pytest.raises(UserError, match=f"{name} generates its data"):
            with_data(STUDIES[name], "/data/cifar", "")


def test_every_study_has_the_controls_and_known_arms():
    found = [s for name, s in STUDIES.items() if name.startswith("dropout-")]
    assert len(found) == 6
    for made in found:
        arms = {run.config(0).arm for run in made.runs}
        assert {"A0", "A1", "A2"} <= arms <= set(ARMS)
    assert len(items(STUDIES["dropout-cifar10"])) == 4 * 3 * 2
    (zipped,) = (run for run in STUDIES["dropout-diamonds"].runs if run.name == "A6-K4-n250")
    assert zipped.config(1).copies == 4
