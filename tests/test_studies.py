"""Studies: every run is a valid command of a method, the queue resumes, cards are the runs', figures draw."""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from common.errors import UserError
from eval.decoder import Constants
from eval.finetune.recipe import Recipe
from methods.autoencoder.config import PRESETS
from studies import STUDIES, autoencoder, decoder, first, label_free, projector
from studies.__main__ import main
from studies.cards import Cards, read_cards, write_cards
from studies.dropout.verdict import NAMES
from studies.measure import measure
from studies.page import page, publish, tables_text, with_borrowed, write_results
from studies.study import (
    STOPPING,
    Queue,
    Run,
    Study,
    Table,
    card_of,
    collect,
    commands,
    differing,
    directory_name,
    items,
    locked,
)
from tests.processes import LIMIT, Command, run_command

TINY = {"epochs": 1, "limit": 128, "knn_every": 0}


def tiny_study(**more) -> Study:
    runs = (Run("one", "simclr", TINY, "smoke", baselines=True), Run("two", "simclr", {**TINY, "hue": 0.0}, "smoke"))
    given = dict(draw=STUDIES["augmentation"].draw, tables=lambda cards: [Table(("run",), [(r.name,) for r in runs])])
    given["protocols"] = ("knn", "metrics")
    about = dict(name="tiny", title="Tiny", question="Does the queue work?")
    return Study(**{**about, **given, "runs": runs, "seeds": (0, 1), **more})


def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("name", STUDIES)
def test_runs_are_valid_commands(name):
    """Each run's flags, parsed as the command line would, give the config that the study says; names are unique."""
    import importlib

    from common.cli import parse

    study = STUDIES[name]
    assert study.name == name and len({run.name for run in study.runs}) == len(study.runs)
    for run in study.runs:
        module, *flags = run.flags(3)
        presets = importlib.import_module(module.replace(".train", ".config")).PRESETS
        preset, config = parse(presets, module, flags)
        assert preset == run.preset and asdict(config) == asdict(run.config(3)), run.name
        assert run.fields, "a run differs from its preset, in size at least"
    assert not study.runs or not study.protocols or any(run.baselines for run in study.runs)


def test_unknown_fields_are_named():
    with pytest.raises(UserError, match="simclr has no field tau"):
        Run("x", "simclr", {"tau": 1}).config(0)
    with pytest.raises(UserError, match="run x: there is no methods/simclir"):
        Run("x", "simclir").config(0)
    with pytest.raises(UserError, match="run x: simclr has no preset fast"):
        Run("x", "simclr", preset="fast").config(0)


def test_items_go_seed_by_seed():
    assert [(r.name, s) for r, s in items(tiny_study())] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert len(items(tiny_study(), 1)) == 2


def test_queue_runs_skips_refuses_and_writes(tmp_path):
    study = tiny_study(seeds=(0,))
    queue = Queue(study, tmp_path, quiet(), jobs=2)
    queue.run(limit=1)
    assert card_of(study, *items(study)[0], tmp_path) and not card_of(study, *items(study)[1], tmp_path)
    first = (tmp_path / "one-seed0" / "result.json").stat().st_mtime_ns
    queue.run()
    assert (tmp_path / "one-seed0" / "result.json").stat().st_mtime_ns == first, "a finished card is kept"
    cards = collect(study, tmp_path)
    assert len(cards) == 2 and set(cards.baselines("knn-20-0.07")) == {"raw pixels", "random init"}
    assert cards.of("two")[0]["config"]["hue"] == 0.0
    protocols = {row["protocol"] for row in cards.of("two")[0]["evaluations"]}
    assert protocols == {"knn-20-0.07", "knn-128-0.1", "label-free"}  # of 128 images
    assert not any(row["baselines"] for row in cards.of("two")[0]["evaluations"])

    write_cards(tmp_path / "cards.jsonl", cards)
    again = read_cards(tmp_path / "cards.jsonl")
    for name in ("one", "two"):
        assert again.values(name, "knn-20-0.07") == pytest.approx(cards.values(name, "knn-20-0.07"), rel=1e-5)
    assert again.baselines("knn-20-0.07") == pytest.approx(cards.baselines("knn-20-0.07"), rel=1e-5)
    assert str(tmp_path) not in (tmp_path / "cards.jsonl").read_text()

    more = replace(study, runs=study.runs[1:], protocols=("knn", "metrics", "linear"))
    assert len(collect(more, tmp_path)) == 0  # scored by less than the study asks for
    Queue(more, tmp_path, quiet()).run()
    rescored = collect(more, tmp_path)
    assert len(rescored.values("two", "linear")) == 1
    assert rescored.values("two", "knn-20-0.07") == cards.values("two", "knn-20-0.07")
    assert (tmp_path / "two-seed0.log").read_text().count("step 2/2") == 1  # nothing is trained again

    other = replace(study, runs=(Run("one", "simclr", {**TINY, "temperature": 0.3}, "smoke"), study.runs[1]))
    with pytest.raises(
        UserError, match="has other settings .temperature 0.2, not 0.3.*remove it, or give another --out"
    ):
        collect(other, tmp_path)
    path = tmp_path / "one-seed0" / "result.json"
    card = json.loads(path.read_text())
    del card["config"]["norm"], card["config"]["temperature"]  # as if these fields were younger than the card
    path.write_text(json.dumps(card))
    assert len(collect(replace(study, runs=study.runs[1:]), tmp_path)) == 1
    with pytest.raises(UserError, match=r"\(temperature 0.5, not 0.2\)"):  # the preset's is not the default
        collect(study, tmp_path)


def test_a_failing_run_stops_the_queue_and_says_why(tmp_path):
    bad = Run("bad", "simclr", {**TINY, "batch_size": 256}, "smoke")
    with pytest.raises(UserError, match=r"bad-seed0 stopped with status 2: error: .*256"):
        Queue(tiny_study(runs=(bad, *tiny_study().runs)), tmp_path, quiet(), jobs=1).run()
    assert not (tmp_path / "one-seed0").exists()


def test_divergence_is_an_answer_where_a_study_says_so(tmp_path):
    wild = Run("wild", "simclr", {**TINY, "optimizer": "sgd", "base_lr": 1e30, "warmup_epochs": 0.0}, "smoke")
    study = tiny_study(runs=(wild,), seeds=(0,), may_diverge=True)
    Queue(study, tmp_path, quiet(), jobs=1).run()
    (card,) = collect(study, tmp_path).of("wild")
    assert card["diverged"].startswith("the loss is ") and card["evaluations"] == []
    with pytest.raises(UserError, match="the loss is"):
        Queue(replace(study, may_diverge=False), tmp_path / "b", quiet(), jobs=1).run()


def listen() -> None:
    for number in STOPPING:  # a shell may have started the tests with one of them ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def ignore_hangup() -> None:
    listen()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does


def started(out: Path, before=listen) -> tuple[Command, int]:
    """The command itself, on a real study, and the process of its first run."""
    arguments = ("augmentation", "--out", out, "--jobs", 1, "--limit", 1)
    command = Command("studies", *arguments, log=out / "log", before=before)
    deadline = time.monotonic() + LIMIT
    while not (found := children(command.child.pid, "methods.simclr.train")):
        assert command.child.is_alive() and time.monotonic() < deadline, command.output()
        time.sleep(0.01)
    return command, found[0]


def children(pid: int, word: str) -> list[int]:
    """Processes that `pid` has started, with `word` on their command line: not a copy of `pid` that has yet to become
    the command, nor what a library starts in passing."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = status(path)
            if int(parent) == pid and state != "Z" and word in path.with_name("cmdline").read_text().split("\0"):
                found.append(int(path.parent.name))
    return found


def status(path: Path) -> list[str]:
    """State and parent of a process, from its /proc/PID/stat."""
    return path.read_text().rpartition(")")[2].split()[:2]


def becomes(pid: int, states: str) -> bool:
    """Whether the process is in one of the states, or has ended, within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if status(Path(f"/proc/{pid}/stat"))[0] in states:
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def ends(pid: int) -> bool:
    return becomes(pid, "Z")  # Z: of a parent that was killed, and nobody has waited yet


def test_sigterm_saves_the_run_and_the_queue_continues_it(tmp_path):
    """Killed in its first run; until then a second queue is refused. One that ignores SIGHUP goes on after it."""
    command, run = started(tmp_path, before=ignore_hangup)
    with pytest.raises(UserError, match=f"in use by process {command.child.pid}, another queue"):
        main(["augmentation", "--out", str(tmp_path)])
    os.kill(command.child.pid, signal.SIGHUP)
    log, metrics = tmp_path / "flip-seed0.log", tmp_path / "flip-seed0" / "metrics.jsonl"
    command.kill_at(20, metrics, signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM and ends(run)
    assert "stopped by a signal; the same command continues" in command.output()
    assert "checkpoint saved" in log.read_text()
    assert list((tmp_path / "flip-seed0" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_stopped_queue_leaves_no_run(number, tmp_path):
    command, run = started(tmp_path)
    os.kill(command.child.pid, number)
    assert command.wait() == 128 + number and ends(run)
    with locked(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the parent's death is Linux's")
def test_a_killed_queue_leaves_no_run(tmp_path):
    command, run = started(tmp_path)
    os.kill(run, signal.SIGSTOP)  # a run that does not end at once keeps the folder locked
    assert becomes(run, "T")  # of signals that wait for a process the kernel delivers SIGTERM before SIGSTOP
    os.kill(command.child.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="or by runs that it has left"), locked(tmp_path):
        pass
    os.kill(run, signal.SIGCONT)
    assert ends(run)
    with locked(tmp_path):
        pass


def test_text_is_mean_and_sample_deviation():
    def card(value):
        row = {"protocol": "linear", "target": "label", "metric": "top-1", "value": value}
        return {"evaluations": [row]}

    cards = Cards({("a", 0): card(10.0), ("a", 1): card(20.0), ("b", 0): card(5.0), ("c", 0): {"evaluations": []}})
    assert cards.text("a", "linear") == f"{fmean((10, 20)):.1f} ± {stdev((10, 20)):.1f}" == "15.0 ± 7.1"
    assert cards.text("b", "linear") == "5.0" and cards.text("c", "linear") == "–"
    assert cards.text("d", "linear") == "not run"


@pytest.mark.parametrize("name", STUDIES)
def test_figures_and_tables_draw_from_any_part_of_the_cards(name, tmp_path):
    """A queue that is stopped early still leaves a figure: no card of some runs, one seed of others."""
    study = STUDIES[name]
    generator = torch.Generator().manual_seed(0)

    def card(run: Run, seed: int) -> dict:
        value = float(torch.rand((), generator=generator)) * 50
        config = asdict(run.config(seed))
        about = {"method": run.method, "preset": run.preset, "config": config, "warnings": []}
        kinds = [("linear", "label", "top-1"), ("knn-20-0.07", "label", "top-1"), ("rotation", "rotation", "top-1")]
        kinds += [("decoder", "pixels", "R2")]
        kinds += [("label-free", "features", m) for m in ("RankMe", "alpha-ReQ", "feature std")]
        rows = [
            {"protocol": p, "target": t, "metric": m, "value": value, "baselines": {"random init": value / 2}}
            for p, t, m in kinds
        ]
        lines = [{"kind": "held-out", "step": s, "epoch": s / 10, **dict.fromkeys(NAMES, value + s)} for s in (0, 10)]
        return {**about, "evaluations": rows, "measurements": lines}

    cards = {(run.name, seed): card(run, seed) for run in study.runs[::2] for seed in (0, 1)}
    for other in study.borrows:
        others = STUDIES[other].runs if other != "methods" else [Run(m, m) for m in decoder.METHODS]
        cards |= {(f"{other}/{run.name}", seed): card(run, seed) for run in others for seed in (0, 1)}
    cards = Cards(cards)
    study.draw(cards).savefig(tmp_path / "figure.webp")
    assert (tmp_path / "figure.webp").stat().st_size > 10_000
    text = tables_text(study, cards)
    assert text.count("\n") >= 3 and "| nan" not in text


def test_a_file_of_cards_has_what_they_share_once(tmp_path):
    def card(blur: float, value: float, *, baselines: dict) -> dict:
        rows = [
            {"protocol": "linear", "target": "label", "metric": "top-1", "value": value, "baselines": baselines},
            {"protocol": "linear", "target": "hue", "metric": "R2", "value": None},
        ]
        rows[1]["settings"] = rows[0]["settings"] = {"epochs": 30}
        config = {"blur": blur, "layers": [1, 1], "seed": 0, "stem": None}
        return {"method": "simclr", "config": config, "evaluations": rows, "measurements": [{"step": 0}, {"V": 0.5}]}

    cards = {("a", 0): card(0.0, 1.25, baselines={"raw pixels": 3.0}), ("b", 0): card(0.5, 2.0, baselines={})}
    cards["c", 1] = {"method": "simclr", "config": {"blur": 0.0}, "evaluations": [], "diverged": "the loss is nan"}
    write_cards(tmp_path / "cards.jsonl", Cards(cards))
    for line in ('{"shares":0,"run":"b","seed":0,"config":{"blur":0.5},', '{"shares":1,"run":"c","seed":1}'):
        assert line in (tmp_path / "cards.jsonl").read_text()
    for card in cards.values():
        for row in card["evaluations"]:
            del row["settings"]
    del cards["b", 0]["evaluations"][0]["baselines"]
    assert read_cards(tmp_path / "cards.jsonl").cards == {
        (run, seed): {"run": run, "seed": seed, **card} for (run, seed), card in cards.items()
    }


def test_publish_adds_to_what_is_committed(tmp_path, monkeypatch):
    """New cards go among the committed ones; those of other settings go; with no run here all is drawn again."""
    monkeypatch.setattr("studies.page.HERE", tmp_path)
    monkeypatch.setattr("studies.page.RESULTS", tmp_path / "results")
    study = replace(tiny_study(seeds=(0, 1)), tables=lambda c: [Table(("seeds",), [(len(c.of("one")),)])])
    row = {"protocol": "linear", "target": "label", "metric": "top-1", "value": 7.0, "baselines": {"raw pixels": 3.0}}

    def card(run: Run, seed: int) -> dict:
        return {"method": "simclr", "config": asdict(run.config(seed)), "evaluations": [row]}

    place = tmp_path / "results" / "tiny"
    place.mkdir(parents=True)
    (tmp_path / "README.md").write_text("Before\n\n<!-- studies:begin -->\nold\n<!-- studies:end -->\n\nAfter\n")
    old = Run("two", "simclr", {**TINY, "hue": 0.3}, "smoke")
    write_cards(place / "cards.jsonl", Cards({("one", 1): card(study.runs[0], 1), ("two", 0): card(old, 0)}))
    here = tmp_path / "runs" / "one-seed0"
    here.mkdir(parents=True)
    (here / "result.json").write_text(json.dumps(card(study.runs[0], 0)))
    study = replace(study, protocols=("linear",))
    for out in (tmp_path / "runs", tmp_path / "none"):
        publish(study, out)
        assert set(read_cards(place / "cards.jsonl").cards) == {("one", 0), ("one", 1)}
        drawn = (place / "table.md").read_text()
        assert "| 2 |" in drawn and "raw pixels: linear 3.0" in drawn
        assert (place / "figure.webp").exists()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before\n\n<!--") and text.endswith("-->\n\nAfter\n") and "\nold\n" not in text
    assert text.count("Not run yet: `make study NAME=") == len(STUDIES)  # nothing is committed in this folder


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(UserError, match="tiny has no card yet"):
        write_results(tiny_study(), tmp_path, Cards({}))
    with pytest.raises(UserError, match="not a study: choose from first"):
        main(["projektor"])


def test_borrowed_cards_carry_their_studys_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = STUDIES["scale"].runs[0]
    names = ("linear", "knn-20-0.07", "label-free", "factor-linear", "rotation")
    rows = [{"protocol": name, "target": "label", "metric": "top-1", "value": 7.0} for name in names]
    card = {"method": "simclr", "config": asdict(run.config(0)), "evaluations": rows}
    place = tmp_path / "runs" / "study-scale" / directory_name(run, 0)
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(card))
    study, name = tiny_study(borrows=("scale",)), f"scale/{run.name}"
    assert with_borrowed(study, Cards({}), local=True).values(name, "linear")[0] == 7.0
    assert with_borrowed(study, Cards({})).values(name, "linear")[0] > 20  # the committed one
    (place / "result.json").write_text(json.dumps({**card, "config": {**card["config"], "temperature": 9.0}}))
    with pytest.raises(UserError, match="temperature 9.0, not"):
        with_borrowed(study, Cards({}), local=True)
    own = with_borrowed(tiny_study(borrows=("methods",)), Cards({}))
    assert own.seeds == [0, 1, 2] and len(own.values("methods/simclr-quickstart", "linear")) == 3


def test_committed_results_are_of_these_studies():
    """Each committed card has the settings its study would run today, and the page is what they say."""
    from studies.page import HERE, RESULTS

    found = sorted(RESULTS.glob("*/cards.jsonl"))
    for path in found:
        study = STUDIES[path.parent.name]
        runs = {run.name: run for run in study.runs}
        for (name, seed), card in read_cards(path).cards.items():
            assert differing(runs[name], seed, card) == [] and card["seed"] == seed, (path, name)
        drawn = tables_text(study, with_borrowed(study, read_cards(path)))
        assert drawn == (path.parent / "table.md").read_text(), f"python -m studies {study.name} --publish again"
    if found:
        assert (HERE / "README.md").read_text() == page(STUDIES.values())


# ---- measures without labels -----------------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    def slow(x, y):
        """Pearson's correlation of the ranks; ties have their mean rank."""

        def places(v):
            return [sum(a < b for a in v) + (sum(a == b for a in v) - 1) / 2 for b in v]

        a, b = places(x), places(y)
        ma, mb = fmean(a), fmean(b)
        top = sum((i - ma) * (j - mb) for i, j in zip(a, b, strict=True))
        return top / (sum((i - ma) ** 2 for i in a) * sum((j - mb) ** 2 for j in b)) ** 0.5

    x, y = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0, 1.0]
    assert label_free.spearman(x, y) == pytest.approx(slow(x, y), abs=1e-12)
    assert label_free.spearman(x, [v**3 for v in x]) == pytest.approx(1.0)
    assert label_free.spearman(x, [-v for v in x]) == pytest.approx(-1.0)


def test_interval_of_the_correlation_draws_settings_not_seeds():
    """Three seeds of a setting are one draw: copies of each pair widen nothing and narrow nothing."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(30, 2, generator=generator)
    pairs = [(float(a), float(a + b)) for a, b in noise]
    once = label_free.bootstrapped([[p] for p in pairs], label_free.spearman)
    thrice = label_free.bootstrapped([[p] * 3 for p in pairs], label_free.spearman)
    assert thrice == pytest.approx(once, abs=1e-9)
    low, high = once
    assert low < label_free.spearman(*zip(*pairs, strict=True)) < high and high - low > 0.1


def test_a_run_of_two_studies_counts_once():
    row = ("rotation", "rotation", "top-1")
    kinds = [("linear", "label", "top-1"), *(r for r, *_ in label_free.MEASURES.values())]
    rows = [{"protocol": p, "target": t, "metric": m, "value": 30.0} for p, t, m in kinds]
    runs = {"scale/a": Run("a", "simclr"), "decoder/b": Run("b", "simclr"), "scale/c": Run("c", "simclr", {"hue": 0.0})}
    cards = {
        (name, seed): {"method": "simclr", "config": asdict(run.config(seed)), "evaluations": rows}
        for name, run in runs.items()
        for seed in (0, 1)
    }
    found = label_free.pairs_of(Cards(cards), row)
    assert {name: len(pairs) for name, pairs in found.items()} == {"decoder/b": 2, "scale/c": 2}
    assert set(label_free.pairs_of(Cards(cards), row, study="scale")) == {"scale/a", "scale/c"}
    cards["scale/c", 0]["evaluations"] = rows[:2]  # the linear probe and rotation only
    assert len(label_free.pairs_of(Cards(cards), row)["scale/c"]) == 1
    assert len(label_free.pairs_of(Cards(cards), row, study="scale")["scale/c"]) == 2


# ---- the projector's layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simclr", "barlow", "byol"])
def test_guillotine_reads_the_trained_projector(method, tmp_path):
    """The rebuilt projector gives what the method's own network gives, layer by layer, and its rows reach the card."""
    flags = ("--epochs", 1, "--limit", 128, "--eval-protocols", "knn", "--no-eval-baselines")
    code, text = run_command(
        f"methods.{method}.train", "smoke", *flags, "--out", tmp_path, "--name", "run", log=tmp_path / "log"
    )
    assert code == 0, text
    from common import checkpoint
    from common.backbones import load_backbone

    state = checkpoint.load_newest(tmp_path / "run" / "checkpoints")[1]["stateful"]
    backbone, _ = load_backbone(tmp_path / "run")
    backbone = backbone.train()
    match method:
        case "simclr":
            from methods.simclr.train import SimCLR

            model = SimCLR(backbone, 128, "batch")
            model.load_state_dict(state["model"])
            own = model.projector
        case "barlow":
            from methods.barlow.train import BarlowTwins

            model = BarlowTwins(backbone, (64, 128))
            model.load_state_dict(state["model"])
            own = model.projector
        case "byol":
            from methods.byol.train import Encoder, Online

            model = Online(Encoder(backbone, 256, 64), 256)
            model.load_state_dict(state["model"])
            own = model.encoder.projector
    rebuilt, x = projector.trained_projector(tmp_path / "run", method), torch.randn(16, 64)
    torch.testing.assert_close(rebuilt(x), own.eval()(x))
    names = [name for name, _ in projector.layers_of(rebuilt)]
    assert names == ["hidden 1", "output"]
    measure(STUDIES["projector"], tmp_path / "run")
    card = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = [(r["target"], r["metric"]) for r in card["evaluations"] if r["protocol"] == "guillotine"]
    assert rows == [(n, m) for n in names for m in ("top-1", "RankMe")] and card["measured"] == ["studies.projector"]


@pytest.mark.parametrize(
    ("method", "images"), [("simclr", "shapes-textured"), ("byol", "shapes"), ("simsiam", "pairs")]
)
def test_first_reads_the_checkpoints_of_a_run(method, images, tmp_path, monkeypatch):
    """The last epoch's row is the card's own linear probe; the first is of untrained weights."""
    monkeypatch.setattr(first, "EPOCHS", (0, 1, 2))
    flags = ["--epochs", first.EPOCHS[-1], "--limit", 64, "--save-every", 1, "--keep", first.EPOCHS[-1]]
    flags += ["--data", images, "--normalize", images, "--eval-protocols", "linear", "factors"]
    code, text = run_command(
        f"methods.{method}.train", "smoke", *flags, "--out", tmp_path, "--name", "run", log=tmp_path / "log"
    )
    assert code == 0, text
    measure(STUDIES["first"], tmp_path / "run")
    card = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = {(r["protocol"], r["target"], r["metric"]): r["value"] for r in card["evaluations"]}
    baselines = {r["target"]: r["baselines"]["random init"] for r in card["evaluations"] if r["protocol"] == "linear"}
    last = first.EPOCHS[-1]
    assert rows["first", first.KIND, f"top-1 after {last} epochs"] == rows["linear", "label", "top-1"]
    assert rows["first", first.KIND, "top-1 after 0 epochs"] == baselines["label"]
    background = rows["first", "background hue", f"R2 after {last} epochs"]
    assert background == pytest.approx(rows["factor-linear", "background_hue", "R2"], abs=1e-9)
    assert rows["first", "position", "R2 after 1 epochs"] != rows["first", "position", "R2 after 2 epochs"]
    assert {target for protocol, target, _ in rows if protocol == "first"} == {first.KIND, *first.FACTORS}


def test_targets_of_one_and_of_two_shapes():
    one = {"hue": torch.tensor([0.25]), "background_hue": torch.tensor([0.0]), "x": torch.tensor([0.2])}
    one |= {"y": torch.tensor([0.7]), "size": torch.tensor([0.4])}
    two = {f"{name}{i}": value for name, value in one.items() if name != "background_hue" for i in (1, 2)}
    two["background_hue"], two["hue2"] = one["background_hue"], torch.tensor([0.5])
    for factors, difference in ((one, [[0.0, 1.0]]), (two, [[0.0, 1.0, -1.0, 0.0]])):
        found = first.targets(factors)
        torch.testing.assert_close(found["hue difference"], torch.tensor(difference, dtype=torch.float64))
        shapes = len(difference[0]) // 2
        torch.testing.assert_close(found["position"], torch.tensor([[0.2, 0.7] * shapes]))
        assert found["size"].shape == (1, shapes)


def test_decoder_rows_pictures_and_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "CONSTANTS", Constants(train_images=128, epochs=1, min_steps=0))
    run, study = decoder.RUNS[0], STUDIES["decoder"]
    for seed in (0, 1):
        place = tmp_path / directory_name(run, seed)
        flags = ("--epochs", 1, "--limit", 128, "--eval-protocols", "knn", "--no-eval-baselines", "--seed", seed)
        code, text = run_command(
            "methods.simclr.train", "smoke", *flags, "--out", tmp_path, "--name", place.name, log=tmp_path / "log"
        )
        assert code == 0, text
        measure(study, place)
        card = json.loads((place / "result.json").read_text())
        rows = {row["protocol"]: row for row in card["evaluations"]}
        assert -0.5 < rows["decoder"]["value"] < 1 and rows["decoder"]["settings"] == {"dimensions": 64, "epochs": 1}
        assert card["measured"] == ["studies.decoder"]
        if seed:
            assert "untrained" not in rows and not rows["decoder"]["baselines"]
        else:
            assert 0 <= rows["untrained"]["value"] < 50 and rows["decoder"]["baselines"]["PCA of pixels"] > 0.5
    assert load_file(tmp_path / directory_name(run, 0) / decoder.FILE)["decoded"].shape == (decoder.SHOWN, 3, 32, 32)
    study.after(tmp_path, Cards({}))
    assert (tmp_path / "sheet.webp").stat().st_size > 10_000


def test_measure_is_the_queues_second_command(tmp_path):
    first, second = commands(STUDIES["projector"], projector.RUNS[0], 1, tmp_path)
    assert first[0] == "methods.simclr.train" and "--no-eval-baselines" in first
    code, text = run_command(*second, log=tmp_path / "log")
    assert code == 2 and f"{tmp_path / 'simclr-none-seed1' / 'result.json'} does not exist: the run is not" in text


def test_directory_names_hold_run_and_seed():
    assert directory_name(Run("a+b", "simclr"), 2) == "a+b-seed2"


def test_autoencoders_are_scored_with_few_labels_and_by_their_error(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "FEW", Recipe(labels=("20",), epochs=1, min_steps=1))
    for flags in ((), ("--no-eval-baselines",)):
        arguments = ("smoke", "--epochs", 1, "--eval-protocols", "knn", *flags, "--out", tmp_path)
        name = f"run{len(flags)}"
        code, text = run_command("methods.autoencoder.train", *arguments, "--name", name, log=tmp_path / "log")
        assert code == 0, text
        measure(STUDIES["autoencoder"], tmp_path / name)
        card = json.loads((tmp_path / name / "result.json").read_text())
        rows = {row["protocol"]: row for row in card["evaluations"]}
        assert set(rows["lowshot-20"]["baselines"]) == (set() if flags else {"random init", "random init, 3x epochs"})
        assert 0 < rows["reconstruction"]["value"] < 2 and card["measured"] == ["studies.autoencoder"]


def test_the_value_0_of_noise_and_masks_is_vanilla_at_the_presets_width():
    width, *others = autoencoder.AXES
    assert list(width.runs) == [4, 16, 64, 128, 512, 1024] and len(autoencoder.STUDY.runs) == 12
    preset = PRESETS["quickstart"][1]
    for axis in others:
        config = axis.runs[0].config(0)
        assert config.variant == "vanilla" and config.bottleneck == preset.bottleneck == 128
        assert axis.runs[0] in width.runs.values() and len(axis.runs) == 4
