"""Result cards: what is written is read back, broken cards are named, published numbers keep to their protocol."""

import copy
import json

import pytest

from common.errors import UserError
from eval.card import card_text, load_cards, merge_rows, published_for, read_card, save_card
from tests.test_compare import make_card, make_row, save


def test_a_card_is_read_as_it_was_written(tmp_path):
    card = make_card(published=[{"value": 1.0, "protocol": "linear", "source": 'a "paper"'}], warnings=[])
    card["measurements"] = [{"step": 1, "V": 0.25}, {"step": 2, "V": None}]
    save_card(tmp_path / "result.json", card)
    assert read_card(tmp_path / "result.json") == card
    assert list(read_card(tmp_path / "result.json")) == list(card)
    lines = card_text(card).splitlines()  # what changes is one line
    assert '  "temperature": 0.2' in lines and sum('"protocol": "knn-20-0.07"' in line for line in lines) == 1
    with pytest.raises(UserError, match="does not exist: the run is not finished"):
        read_card(tmp_path / "none.json")
    for text in ("[1]", "{"):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"result\.json (holds list|is damaged)"):
            read_card(tmp_path / "result.json")


def test_settings_that_a_protocols_rows_share_may_be_in_the_file_once(tmp_path):
    rows = [
        make_row("linear", 1.0, settings={"epochs": 30, "rate": None}),
        make_row("factor", 2.0, target="hue", settings={"epochs": 30, "kind": "circular", "size": None}),
        make_row("factor", 3.0, target="x", settings={"epochs": 30, "kind": "continuous"}),
    ]
    card = make_card(rows=rows)
    written = json.loads(card_text(card, shared=True))
    assert written["settings"] == {"linear": {"epochs": 30, "rate": None}, "factor": {"epochs": 30}}
    assert [row["settings"] for row in written["evaluations"]] == [
        {},
        {"kind": "circular", "size": None},
        {"kind": "continuous"},
    ]
    save_card(tmp_path / "result.json", card, shared=True)
    assert json.loads((tmp_path / "result.json").read_text()) == written
    assert read_card(tmp_path / "result.json") == load_cards([tmp_path / "result.json"])[0][1] == card
    assert card_text(written, shared=True) == card_text(card, shared=True)


def test_merge_rows_replaces_and_appends():
    old, new = [make_row("a", 1), make_row("b", 2)], [make_row("b", 3), make_row("c", 4)]
    assert merge_rows(old, new) == [make_row("a", 1), make_row("b", 3), make_row("c", 4)]


def test_broken_cards_are_named_with_what_is_missing(tmp_path):
    good, cut, no_keys, bad_row, future = save(tmp_path, *(make_card() for _ in range(5)))
    cut.write_text(cut.read_text()[:-20])
    card = make_card()
    del card["seed"], card["data"]["fingerprint"]
    no_keys.write_text(json.dumps(card))
    bad_row.write_text(json.dumps(make_card(rows=[{"protocol": "linear", "value": "high"}])))
    future.write_text(json.dumps({**make_card(), "format": 7}))
    with pytest.raises(UserError) as error:
        load_cards([good, cut, no_keys, bad_row, future])
    lines = str(error.value).split("\n  ")
    assert lines[0].startswith("4 broken result cards") and str(good) not in str(error.value)
    assert lines[1].startswith(f"{cut} is damaged, not readable as JSON")
    assert lines[2] == f"{no_keys}: seed is missing; data.fingerprint is missing"
    assert "evaluations[0].settings is missing" in lines[3] and "'high', not a number" in lines[3]
    assert lines[4] == f"{future}: format is 7, this version reads 1"


def test_published_numbers_belong_to_one_protocol():
    anchors = [{"value": 84.8, "metric": "top-1", "protocol": "knn-200-0.1", "source": "A paper", "note": "best epoch"}]
    rows = [make_row("knn-20-0.07", 71.2), make_row("knn-200-0.1", 68.9), make_row("label-free", 31.4, "RankMe")]
    card = make_card(rows=rows, published=anchors)
    assert [published_for(row, card) for row in rows] == [[], anchors, []]
    row = copy.deepcopy(rows[1])
    row["target"] = "hue"
    assert published_for(row, card) == []
    card["published"][0]["not_compared"] = "epochs 1, not 1000"
    assert published_for(rows[1], card) == []
