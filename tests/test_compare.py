"""Comparison of result cards: aggregation, refusal to mix, anchors, README markers, broken cards."""

import copy
import importlib
import io
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import UserError
from eval import compare
from eval.card import load_cards, make_scores

ROOT = Path(__file__).parents[1]
END = ["seeds", "images/s"]  # of a table's head


def make_row(protocol, value, metric="top-1", target="label", settings=None, baselines=None):
    return {
        "protocol": protocol,
        "target": target,
        "metric": metric,
        "value": value,
        "settings": {"k": 20} if settings is None else settings,
        "text": f"Sentence about {protocol}.",
        "baselines": {"raw pixels": 30.0, "random init": 10.0} if baselines is None else baselines,
    }


def make_card(method="simclr", seed=0, value=70.0, *, preset="cifar10-cpu", rows=None, published=(), **changes):
    card = {
        "format": 1,
        "method": method,
        "preset": preset,
        "git_commit": "abc",
        "seed": seed,
        "data": {
            "name": "cifar10",
            "label_name": "label",
            "fingerprint": "ff00",
            "train_images": 50000,
            "test_images": 10000,
            "image_size": 32,
        },
        "backbone": "resnet18",
        "parameters": 1,
        "epochs": 30.0,
        "steps": 5850,
        "batch_size": 256,
        "images_seen": 30 * 195 * 256,
        "images_per_second": 700.0,
        "wall_time_s": 1.0,
        "peak_memory_bytes": 1,
        "device": "cpu",
        "precision": "no",
        "environment": {},
        "published": list(published),
        "evaluations": rows if rows is not None else [make_row("knn-20-0.07", value)],
        "config": {"seed": seed, "temperature": 0.2},
    }
    for key, change in changes.items():
        card[key] = {**card[key], **change} if isinstance(change, dict) else change
    return card


def save(folder, *cards):
    folder.mkdir(exist_ok=True)
    paths = []
    for i, card in enumerate(cards):
        paths.append(folder / f"card{i}.json")
        paths[-1].write_text(json.dumps(card))
    return paths


def made(folder, *cards, metric=(), target="label"):
    loaded = load_cards(save(folder, *cards))
    return compare.build(compare.comparable(compare.select(loaded, metric, target)))


def blocks(tables):
    """The rows of each block: those that are compared."""
    return [block.entries[: len(block.lines)] for table in tables for block in table.blocks]


def column(table, name):
    return [row[table.head.index(name)] for row in table.rows]


def test_seeds_are_aggregated_as_by_hand(tmp_path):
    values = [70.0, 71.5, 73.9]
    cards = [make_card(seed=i, value=v, images_per_second=600.0 + 100 * i) for i, v in enumerate(values)]
    baselines = {"raw pixels": 30.0, "random init": 12.0}
    cards[0]["evaluations"] = [make_row("knn-20-0.07", 70.0, baselines=baselines)]
    (table,) = made(tmp_path, *cards, make_card("byol", value=80.0), make_card("dino", value=60.0))
    assert column(table, "method") == ["byol", "simclr", "dino"]  # best first
    mean, std = sum(values) / 3, statistics.stdev(values)
    assert std == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    assert column(table, "knn-20-0.07") == ["80.00", f"{mean:.2f} ± {std:.2f}", "60.00"]  # one seed has no spread
    assert column(table, "seeds") == ["1", "3", "1"] and column(table, "images/s")[1] == "700"
    assert [entry.cells[:2] for entry in table.baselines] == [
        ["raw pixels", "30.00"],
        ["random init", "10.00 to 12.00"],
    ]
    assert table.title == "cifar10, 32 px, cifar10-cpu, 30 epochs: top-1 on label (%)"  # what all rows have


def test_a_copy_of_a_card_counts_once_and_other_configs_stand_apart(tmp_path):
    card = make_card()
    (table,) = made(tmp_path, card, copy.deepcopy(card), make_card(value=50.0, config={"temperature": 0.5}))
    assert column(table, "seeds") == ["1", "1"]
    assert column(table, "preset") == ["cifar10-cpu (temperature=0.2)", "cifar10-cpu (temperature=0.5)"]


def test_two_results_of_one_seed_are_no_two_seeds(tmp_path):
    (table,) = made(tmp_path / "a", make_card(), make_card(seed=1, value=72.0), make_card(value=71.0, git_commit="def"))
    assert column(table, "seeds") == ["2", "1"] or column(table, "seeds") == ["1", "2"]
    assert sorted(column(table, "preset")) == ["cifar10-cpu (commit abc)", "cifar10-cpu (commit def)"]
    (table,) = made(tmp_path / "b", make_card(), make_card(value=71.0))
    assert column(table, "seeds") == ["1", "1"] and all("card" in text for text in column(table, "preset"))


@pytest.mark.parametrize(
    "field, change",
    [
        ("data fingerprint", {"data": {"fingerprint": "0bad"}}),
        ("image size", {"data": {"image_size": 64}}),
        ("data", {"data": {"name": "cifar100"}}),
        ("test images", {"data": {"test_images": 99}}),
        ("backbone", {"backbone": "resnet50"}),
        ("epochs", {"epochs": 31.0}),
        ("images seen", {"images_seen": 1000}),
        ("settings.k", {"evaluations": [make_row("knn-20-0.07", 70.0, settings={"k": 21})]}),
        ("settings.crop", {"evaluations": [make_row("knn-20-0.07", 70.0, settings={"k": 20, "crop": 0.9})]}),
        ("target", {"evaluations": [make_row("knn-20-0.07", 70.0, target="hue")]}),
    ],
)
def test_refuses_to_mix_and_names_the_difference(tmp_path, field, change):
    cards = [make_card(), make_card("byol", **change)]
    assert [len(rows) for rows in blocks(made(tmp_path, *cards, target="all"))] == [1, 1] or field == "target"
    loaded = load_cards(save(tmp_path, *cards))
    with pytest.raises(UserError) as error:
        compare.one_table(compare.select(loaded, target="all"))
    assert len(compare.comparable(compare.select(loaded, target="all"))) == 2
    message = str(error.value)
    assert f"\n  {field}:\n" in message and "card0.json" in message and "card1.json" in message
    apart = compare.differences(compare.select(loaded, target="all"))
    assert field in apart and len(apart[field]) == 2
    assert all(value in message for value in apart[field])


def test_same_name_under_other_conditions_is_pointed_out(tmp_path):
    first, second = made(tmp_path, make_card(), make_card("byol", data={"fingerprint": "0bad"}))
    assert not any("Not mixed" in note for note in first.notes)
    assert second.notes[-1] in (
        "Not mixed with table 1: data fingerprint 0bad against ff00",
        "Not mixed with table 1: data fingerprint ff00 against 0bad",
    )


def test_an_incomplete_batch_is_no_other_budget(tmp_path):
    other = make_card("byol", value=60.0, batch_size=512, images_seen=30 * 97 * 512)  # 49664 of 50000 images an epoch
    assert [len(rows) for rows in blocks(made(tmp_path, make_card(), other))] == [2]
    cut = make_card("byol", value=60.0, batch_size=512, images_seen=29 * 97 * 512)
    (table,) = made(tmp_path, make_card(), cut)
    assert [block.title for block in table.blocks] == ["30 epochs", "30 epochs, 1,440,256 images seen"]


def test_one_table_of_two_protocols_asks_for_one(tmp_path):
    rows = [make_row("knn-20-0.07", 70.0), make_row("linear", 80.0, settings={})]
    loaded = load_cards(save(tmp_path, make_card(rows=rows)))
    with pytest.raises(UserError, match="--metric"):
        compare.one_table(compare.select(loaded))
    assert len(compare.one_table(compare.select(loaded, ["linear"]))) == 1


def test_anchors_stand_only_beside_their_own_protocol(tmp_path):
    rows = [make_row("knn-20-0.07", 85.5), make_row("knn-200-0.1", 84.0), make_row("knn-200-0.1", 33.0, target="hue")]
    anchors = [
        {"value": 84.8, "metric": "top-1", "protocol": "knn-200-0.1", "source": "A peer", "note": "best epoch"},
        {"value": 91.0, "metric": "top-1", "protocol": "linear-online", "source": "B paper", "note": ""},
    ]
    cards = load_cards(save(tmp_path, make_card(rows=rows, published=anchors)))
    groups = compare.comparable(compare.select(cards, target="all"))
    (table,) = compare.build(groups)
    assert table.head == ["method", "knn-20-0.07", "knn-200-0.1", "published", "knn-200-0.1 hue", *END]
    assert column(table, "published") == ["84.80 [1], ours -0.80"] and table.notes[-1] == "[1] A peer; best epoch"
    left = compare.unmatched_published(cards, groups)
    assert left == ["simclr cifar10-cpu: 91.0 by protocol linear-online (B paper)"]
    only = compare.comparable(compare.select(cards, ["knn-20-0.07"]))
    assert "84.80" not in compare.markdown(compare.build(only), [])


def test_protocols_are_columns_and_the_best_of_each_block_is_marked(tmp_path):
    def card(method, knn, linear, **changes):
        return make_card(method, rows=[make_row("knn-20-0.07", knn), make_row("linear", linear)], **changes)

    only_knn = make_card("dino", value=99.0, epochs=5.0, images_seen=5 * 50000)
    (table,) = made(tmp_path, card("a", 70.0, 60.0), card("b", 50.0, 80.0), card("b", 52.0, 80.0, seed=1), only_knn)
    assert table.head == ["method", "knn-20-0.07", "linear", *END]
    assert [block.title for block in table.blocks] == ["5 epochs", "30 epochs"]
    assert [entry.cells[:3] for entry in table.blocks[1].entries] == [
        ["a", "70.00", "60.00"],
        ["b", "51.00 ± 1.41", "80.00 ± 0.00"],
    ]
    assert [entry.best for entry in table.blocks[1].entries] == [{1}, {2}]
    assert column(table, "linear")[0] == "–" and table.blocks[0].entries[0].best == set()  # nothing to compare with
    assert [note.split(":")[0] for note in table.notes[:2]] == ["knn-20-0.07", "linear"]
    text, web = compare.markdown([table], []), compare.html([table], [])
    assert " **70.00** |" in text and "**99.00**" not in text and "| **30 epochs** |" in text
    assert max(map(len, (line for line in text.splitlines() if line.startswith("|")))) <= 80
    assert text.count("Sentence about linear") == 1 and "<td class=ours>70.00</td>" in web


def test_another_network_has_its_own_block_and_baselines(tmp_path):
    small = make_row("knn-20-0.07", 40.0, baselines={"random init": 5.0})
    (table,) = made(tmp_path, make_card(), make_card("byol", rows=[small], backbone="vit_tiny, 4 MMAC at 32 px"))
    assert [block.title for block in table.blocks] == ["30 epochs, resnet18", "30 epochs, vit_tiny"]
    assert [[e.cells[0] for e in b.entries] for b in table.blocks] == [
        ["simclr", "raw pixels", "random init"],
        ["byol", "random init"],
    ]
    assert any("Networks: resnet18: resnet18; vit_tiny: vit_tiny, 4 MMAC at 32 px." in note for note in table.notes)


def test_metrics_are_chosen_by_name(tmp_path):
    rows = [
        make_row("knn-20-0.07", 70.0),
        make_row("label-free", 12.5, "RankMe", "features", {}),
        make_row("label-free", 1.2, "alpha-ReQ", "features", {}),
        make_row("factor-linear", 0.8, "R2", "hue", {}),
    ]
    assert len(made(tmp_path, make_card(rows=rows))) == 1
    (table,) = made(tmp_path, make_card(rows=rows), metric=["label-free/RankMe"])
    assert column(table, "label-free RankMe") == ["12.50"]
    (table,) = made(tmp_path, make_card(rows=rows), metric=["label-free"])
    assert table.head[1:3] == ["label-free RankMe", "label-free alpha-ReQ"]
    (table,) = made(tmp_path, make_card(rows=rows), metric=["factor-linear"], target="hue")
    assert column(table, "factor-linear hue R2") == ["0.800"]
    (table,) = made(tmp_path, make_card(rows=rows), metric=["all"], target="all")
    assert len(table.measures) == 4
    many = [make_row(f"p{i}", float(i), target="hue") for i in range(compare.MOST_COLUMNS + 1)]
    assert [len(t.measures) for t in made(tmp_path, make_card(rows=many), target="hue")] == [compare.MOST_COLUMNS, 1]
    with pytest.raises(UserError, match="knn-20-0.07"):
        made(tmp_path, make_card(rows=rows), metric=["knn-7"])
    with pytest.raises(UserError, match="no card has the protocol knn-7"):
        made(tmp_path, make_card(rows=rows), metric=["knn-20-0.07", "knn-7"])


def test_undefined_values_are_shown_as_such(tmp_path):
    (table,) = made(tmp_path, make_card(rows=[make_row("knn-20-0.07", None)]), make_card("byol", value=60.0))
    assert column(table, "method") == ["byol", "simclr"] and column(table, "knn-20-0.07") == ["60.00", "nan"]


def test_cards_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no result card found"):
        compare.find_cards([])
    for place in ("runs/a", "runs/b", "methods/simclr/results", "empty"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("runs/a/result.json", "runs/b/result.json", "methods/simclr/results/x.json", "runs/a/config.json"):
        (tmp_path / place).write_text(json.dumps(make_card()))
    names = [p.as_posix() for p in compare.find_cards([])]
    assert names == ["methods/simclr/results/x.json", "runs/a/result.json", "runs/b/result.json"]
    assert [p.as_posix() for p in compare.find_cards(["runs/a", "runs", "methods/simclr/results/x.json"])] == [
        "runs/a/result.json",
        "runs/b/result.json",
        "methods/simclr/results/x.json",
    ]
    with pytest.raises(UserError, match="does not exist"):
        compare.find_cards(["nowhere"])
    with pytest.raises(UserError, match="holds no result card"):
        compare.find_cards(["empty"])


def scores(name, value, **changes):
    """A card of `python -m eval NAME --out FILE`: weights that no run of ours has made."""
    card = make_scores(
        name,
        None,
        data=make_card()["data"],
        backbone="resnet50, 4 GMAC",
        parameters=1,
        seed=0,
        device="cpu",
        evaluations=[make_row("knn-20-0.07", value), make_row("linear", value + 1)],
    )
    return {**card, **changes}


def test_scores_of_other_weights_stand_in_the_same_table(tmp_path):
    rows = [make_row("knn-20-0.07", 70.0), make_row("linear", 71.0)]
    elsewhere = {"fingerprint": "e1", "name": "pairs", "train_images": 10000, "label_name": "shape", "image_size": 32}
    run = make_card("byol", epochs=20.0, images_seen=20 * 39 * 256, data={**elsewhere, "test_images": 2000})
    about = dict(data=make_card()["data"], backbone="resnet18", parameters=1, seed=0, device="cpu")
    transfer = make_scores("byol-pairs", run, **about, evaluations=[make_row("knn-20-0.07", 40.0)])
    assert transfer["trained_on"] == {"name": "pairs", "fingerprint": "e1", "train_images": 10000}
    old = {"format": 1, "seed": 0, "backbone": "vit_tiny", "pretrained": True, "device": "cpu", "data": about["data"]}
    old["evaluations"] = [make_row("knn-20-0.07", 60.0)]  # of earlier versions
    cards = [make_card(rows=rows), scores("resnet50, pretrained", 80.0), scores("moco.pth", 75.0), transfer, old]
    (table,) = made(tmp_path, *cards)
    assert {block.title: [e.cells[0] for e in block.entries[: len(block.lines)]] for block in table.blocks} == {
        "20 epochs on pairs, resnet18": ["byol"],
        "30 epochs, resnet18": ["simclr"],
        "weights from elsewhere": ["resnet50, pretrained", "moco.pth", "vit_tiny, pretrained"],
    }
    best = [(e.cells[0], sorted(e.best)) for block in table.blocks for e in block.entries if e.best]
    assert best == [("resnet50, pretrained", [table.head.index("knn-20-0.07"), table.head.index("linear")])]
    assert any("their budgets, networks and images are not the same" in note for note in table.notes)
    text = compare.markdown([table], []) + compare.html([table], [])
    assert text.count("moco.pth") >= 2 and "nan" not in text
    assert len(made(tmp_path / "b", make_card(), scores("a", 1.0, data={**about["data"], "fingerprint": "x"}))) == 2


def test_top5_stands_beside_top1(tmp_path):
    plain = make_card(rows=[make_row("knn-20-0.07", 70.0), make_row("linear", 71.0)])
    both = [make_row(name, 60.0, metric) for name in ("knn-20-0.07", "linear") for metric in ("top-1", "top-5")]
    (table,) = made(tmp_path, plain, make_card("byol", rows=both))
    assert table.head == ["method", "knn-20-0.07", "knn-20-0.07 top-5", "linear", "linear top-5", *END]
    assert [row[1:5] for row in table.rows] == [["70.00", "–", "71.00", "–"], ["60.00"] * 4]
    assert sum("Sentence about linear." in note for note in table.notes) == 1


def test_broken_scores_are_refused(tmp_path):
    no_data = {k: v for k, v in scores("a", 1.0).items() if k != "data"}
    with pytest.raises(UserError, match="data is missing"):
        load_cards(save(tmp_path, no_data))


def test_a_terminal_of_80_columns_shows_everything(tmp_path):
    rows = [make_row(f"knn-{k}-0.07", 60.0 + k) for k in range(6)]
    cards = [make_card(seed=s, rows=[{**row, "value": row["value"] + s} for row in rows]) for s in range(2)]
    (table,) = made(tmp_path, *cards, make_card("byol", rows=rows))
    out = io.StringIO()
    compare.show([table], ["a paper"], Console(file=out, width=80, force_terminal=True, color_system="standard"))
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    for cell in [c for e in table.blocks[0].entries for c in e.cells]:
        assert cell in shown
    assert shown.count("simclr") == shown.count("byol") > 1  # the rows are named in every part
    assert "\x1b[1m60.50 ± 0.71" in out.getvalue() and "\x1b[1m60.00" not in out.getvalue()  # the best, in bold
    assert "a paper" in shown and "Sentence about knn-5-0.07." in shown


def test_readme_is_updated_between_its_markers_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{compare.BEGIN}\nold table\n{compare.END}\n\nrest\n")
    assert compare.update_between_markers(readme, "| new |\n")
    once = readme.read_text()
    assert once == f"# Title\n\n{compare.BEGIN}\n\n| new |\n\n{compare.END}\n\nrest\n"
    assert not compare.update_between_markers(readme, "| new |\n") and readme.read_text() == once
    for bad in ("no markers", f"{compare.END} {compare.BEGIN}", f"{compare.BEGIN}{compare.BEGIN}{compare.END}"):
        readme.write_text(bad)
        with pytest.raises(UserError, match="must contain"):
            compare.update_between_markers(readme, "x")
        assert readme.read_text() == bad
    with pytest.raises(UserError, match="does not exist"):
        compare.update_between_markers(tmp_path / "other.md", "x")


def test_data_sets_are_chosen_by_name(tmp_path, capsys):
    for name in ("pairs", "CIFAR-10 (JPEG)"):
        card = make_card()
        (tmp_path / f"{len(name)}.json").write_text(json.dumps({**card, "data": {**card["data"], "name": name}}))
    compare.main([str(tmp_path), "--data", "pairs"])
    shown = capsys.readouterr().out
    assert "pairs, 32 px" in shown and "CIFAR-10" not in shown
    with pytest.raises(UserError, match=r"no card is of cifar: these are of CIFAR-10 \(JPEG\), pairs"):
        compare.main([str(tmp_path), "--data", "pairs", "--data", "cifar"])


def test_hostile_names_stay_text(tmp_path):
    evil = f"<script>|`*x*`\n{compare.END}"
    tables = made(tmp_path, make_card(method=evil, preset=evil, device=evil, rows=[make_row("linear", 1.0)]))
    text, web = compare.markdown(tables, [evil]), compare.html(tables, [evil])
    assert "<script" not in text and "<script" not in web and compare.END not in text
    row = next(line for line in text.splitlines() if line.startswith("| &lt;script"))
    assert row.replace("\\|", "").count("|") == len(tables[0].head) + 1
    readme = tmp_path / "README.md"
    readme.write_text(compare.BEGIN + compare.END)
    for _ in range(2):  # the second update finds its markers again
        compare.update_between_markers(readme, text)
    assert readme.read_text().count(compare.END) == 1


def test_page_holds_every_value_and_loads_nothing(tmp_path):
    tables = made(tmp_path, make_card(value=71.23), make_card(seed=1, value=73.23), make_card("byol", value=65.4))
    web = compare.html(tables, [])
    assert "72.23 ± 1.41" in web and "65.40" in web and 'class="whisker"' in web
    assert "http://" not in web and "https://" not in web and "<script" not in web


def test_command_line(tmp_path, capsys, pytestconfig):
    a, b = save(tmp_path, make_card(value=71.23), make_card("byol", value=65.4, backbone="resnet50"))
    readme = tmp_path / "README.md"
    readme.write_text(compare.BEGIN + compare.END)
    page, text = tmp_path / "out" / "page.html", tmp_path / "out" / "tables.md"
    compare.main([str(a), str(b), "--out-md", str(text), "--out-html", str(page), "--update-readme", str(readme)])
    assert text.read_text() in capsys.readouterr().out and "71.23" in text.read_text() and "71.23" in page.read_text()
    assert "65.40" in readme.read_text()
    with pytest.raises(SystemExit) as stop:
        compare.main([str(a), "--metrics", "x"])
    assert stop.value.code == 2 and "--metrics" in capsys.readouterr().err
    refused = subprocess.run(
        [sys.executable, "-m", "eval.compare", str(a), str(b), "--one-table"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ") and "resnet50" in refused.stderr and str(b) in refused.stderr


MARKED = [ROOT / "README.md", *sorted(ROOT.glob("methods/*/README.md"))]
PAGES = [path for path in MARKED if "--update-readme" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_hold_what_their_commands_make(page, tmp_path, monkeypatch, capsys):
    """The command on a page, with the page's copy to update, changes nothing."""
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"`python -m eval\.compare ([^`]*--update-readme [^`]*)`", page.read_text())
    *words, named = shlex.split(command)
    assert ROOT / named == page
    paths = []
    for word in words:  # as a shell does
        before, brace, rest = word.partition("{")
        inside, _, after = rest.partition("}")
        paths += [f"{before}{name}{after}" for name in inside.split(",")] if brace else [word]
    copied = shutil.copy(page, tmp_path)
    compare.main([*paths, copied])
    assert capsys.readouterr().out.endswith("was up to date\n")


def test_overview_in_the_readme_is_what_the_cards_say():
    """Mean of kNN and linear probe over the committed seeds of `quickstart`; empty for methods without such a card."""
    _, _, rest = (ROOT / "README.md").read_text().partition("| method | idea | kNN | linear |")
    rows = re.findall(r"\]\(methods/(\w+)/README\.md\) \|[^|]*\|([^|]*)\|([^|]*)\|", rest)
    every = load_cards(ROOT.glob("methods/*/results/quickstart-seed*.json"))
    assert every and {card["method"] for _, card in every} <= {method for method, *_ in rows}
    for method, *cells in rows:
        cards = [card for path, card in every if path.parts[-3] == method]
        for protocol, cell in zip(("knn-20-0.07", "linear"), cells, strict=True):
            values = [row["value"] for card in cards for row in card["evaluations"] if row["protocol"] == protocol]
            value, _, seeds = cell.strip().partition(" ")
            assert seeds == (f"({len(values)} seeds)" if len(values) > 1 else ""), (method, protocol)
            assert bool(value) == bool(values), (method, protocol)
            if values:
                assert float(value) == pytest.approx(statistics.fmean(values), abs=0.051), (method, protocol)


def test_committed_cards_have_the_settings_of_a_preset():
    """Of today: what a page says of a preset is what its card shows. Data, length and seed may be others."""
    free = {"data", "normalize", "epochs", "seed"}
    for path, card in load_cards(sorted(ROOT.glob("methods/*/results/*.json"))):
        presets = importlib.import_module(f"methods.{card['method']}.config").PRESETS
        configs = [json.loads(json.dumps(asdict(config), default=str)) for _, config in presets.values()]
        differing = [{k for k, v in card["config"].items() if config.get(k) != v} - free for config in configs]
        assert set() in differing, (path, min(differing, key=len))


def test_runs_judged_on_other_data_stand_apart(tmp_path):
    judged = {"name": "pets", "fingerprint": "aa", "train_images": 72}
    cards = [make_card(seed=0), make_card(seed=1, data={"judged_on": judged})]
    cards.append(make_card(seed=2, data={"judged_on": {**judged, "fingerprint": "bb"}}))
    paths = [tmp_path / f"{i}.json" for i in range(len(cards))]
    for path, card in zip(paths, cards, strict=True):
        path.write_text(json.dumps(card))
    results = compare.select(load_cards(paths))
    assert len(compare.comparable(results)) == 3 and set(compare.differences(results)) == {"judged on"}
