"""The report: every section is there, numbers are the card's, text is escaped, nothing is loaded from outside."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from common.sources import spread
from eval import report

SECTIONS = (
    "Training",
    "Evaluation",
    "What the model sees",
    "Nearest neighbors",
    "Map of the features",
    "Invariance",
    "Signs of collapse",
    "Settings",
)
VOID = {"meta", "img", "br"}


def make_row(protocol, value, metric="top-1", target="label", **more):
    return {
        "protocol": protocol,
        "target": target,
        "metric": metric,
        "value": value,
        "settings": {"k": 20},
        "text": f"Sentence about {protocol}.",
        "baselines": {"raw pixels": 31.257, "random init": 14.125},
        **more,
    }


def make_card(name="shapes"):
    return {
        "format": 1,
        "method": "simclr",
        "preset": "quickstart",
        "git_commit": "0123456789ab",
        "seed": 3,
        "data": {
            "name": name,
            "label_name": "shape",
            "fingerprint": "fedcba9876543210",
            "train_images": 1000,
            "test_images": 60,
            "image_size": 16,
        },
        "backbone": "resnet18",
        "parameters": 123456,
        "epochs": 4.0,
        "steps": 40,
        "batch_size": 100,
        "images_seen": 4000,
        "images_per_second": 741.5,
        "wall_time_s": 125.0,
        "peak_memory_bytes": 2**30,
        "device": "a processor",
        "precision": "no",
        "environment": {"torch": "2.x"},
        "evaluations": [
            make_row("knn-20-0.07", 71.2375),
            make_row("knn-200-0.1", 68.911),
            make_row("linear", 78.4567, chosen={"learning_rate": 0.3}),
            make_row("label-free", 31.4159, "RankMe", "features"),
            make_row("factor-linear", 0.6543, "R2", "hue"),
            make_row("factor-linear", -0.0214, "R2", "x"),
            make_row("invariance", 0.1234, "relative distance", "hue"),
        ],
        "published": [
            {"value": 84.8, "metric": "top-1", "protocol": "knn-200-0.1", "source": "A paper", "note": "best epoch"},
            {"value": 91.9, "metric": "top-1", "protocol": "linear-online", "source": "B paper", "note": ""},
        ],
        "config": {"temperature": 0.2, "crop_scale": [0.3, 1.0]},
    }


def make_metrics(lines=40):
    metrics = [
        {
            "step": i + 1,
            "epoch": (i + 1) / 10,
            "loss": 5 / (i + 1),
            "lr": 0.1,
            "feature_std": 0.5,
            "images_per_second": 700.0,
            "seconds": float(i),
        }
        for i in range(lines)
    ]
    return metrics + [{"step": lines, "kind": "online_knn", "knn-20-0.07": 55.5}]


def images(*shape, seed=0):
    return torch.randint(0, 256, (*shape,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def arguments(**changes):
    labels = torch.arange(60) % 5
    g = torch.Generator().manual_seed(1)
    features = torch.eye(5, 16)[labels] + 0.1 * torch.randn(60, 16, generator=g)
    return {
        "card": make_card(),
        "metrics": make_metrics(),
        "test_images": images(60, 3, 16, 16),
        "test_features": features,
        "test_labels": labels,
        "class_names": ["ant", "bee", "cow", "dog", "elk"],
        "views": images(4, 2, 3, 16, 16),
        "originals": images(4, 3, 16, 16),
        **changes,
    }


class Page(HTMLParser):
    """Checks that tags close in order and collects what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.headings, self.text, self.rows = [], [], [], [], []
        self.feed(text)
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if "style" in self.stack:
            return
        self.text.append(data)
        if self.stack and self.stack[-1] == "h2":
            self.headings.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())


def write(tmp_path, **changes):
    path = report.write_report(tmp_path, **arguments(**changes))
    assert path == tmp_path / "report.html" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def pictures(page):
    return [attrs for tag, attrs in page.tags if tag == "img"]


def test_every_section_and_fact(tmp_path):
    text, page = write(
        tmp_path,
        extra_sections=[("Attention <maps>", "<p>own html</p>")],
        notes=["watch out"],
        view_text="view 1: crop",
        references={"loss": (5.5, "ln 245")},
        signals={"lr": "the rate's story"},
    )
    assert page.headings == [*SECTIONS[:6], "Attention <maps>", *SECTIONS[6:]]
    for fact in (
        "simclr · quickstart",
        "0123456789ab",
        "a processor",
        "2 min",
        "resnet18",
        "123,456",
        "shapes, 1000 train",
        "own html",
        "watch out",
        "view 1: crop",
        "ln 245",
        "the rate's story",
        "temperature",
        "[0.3, 1.0]",
    ):
        assert fact in page.said, fact
    assert len(text) < 300_000


def test_a_rewritten_report_is_the_one_that_training_would_have_written(tmp_path):
    """With the rows of a later evaluation, byte for byte; signals and sections of the method stay."""
    card, names = make_card(), ["disc", "square", "star"]
    others = dict(signals={"lr": "the rate's story"}, extra_sections=[("Own", "<p>html</p>")], class_names=names)
    rows = card["evaluations"]
    for kept in (rows[:1], [row for row in rows if row["protocol"] not in ("label-free", "invariance")]):
        write(tmp_path, card={**card, "evaluations": kept}, **others)
        assert report.rewrite_report(tmp_path, card, names) == tmp_path / "report.html"
        rewritten = (tmp_path / "report.html").read_text()
        text, page = write(tmp_path, card=card, **others)
        assert rewritten == text and "the rate's story" in page.said

    assert report.rewrite_report(tmp_path / "elsewhere", card) is None
    earlier = text.replace("<!-- headline of the card -->", "")
    (tmp_path / "report.html").write_text(earlier)
    assert report.rewrite_report(tmp_path, card) is None and (tmp_path / "report.html").read_text() == earlier


def test_loads_nothing_from_outside(tmp_path):
    text, page = write(tmp_path)
    assert "http://" not in text and "https://" not in text
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_table_numbers_are_the_cards(tmp_path):
    _, page = write(tmp_path)
    rows = [row for row in page.rows if len(row) == 6]
    assert rows[0] == ["target", "metric", "this run", "raw pixels", "random init", "published"]
    assert [row[2:] for row in rows[1:]] == [
        ["71.24", "31.26", "14.12", ""],
        ["68.91", "31.26", "14.12", "84.80 [1]"],
        ["78.46", "31.26", "14.12", ""],
        ["31.42", "31.26", "14.12", ""],
        ["0.654", "31.26", "14.12", ""],
        ["-0.021", "31.26", "14.12", ""],
        ["0.123", "31.26", "14.12", ""],
    ]
    assert rows[1][0] == "label (shape)" and rows[5][0] == "hue"
    assert ["91.90", "top-1", "linear-online", "B paper", "no row of this protocol"] in page.rows
    assert "71.24 % top-1 on shape, knn-20-0.07" in page.said
    assert "39.98 points above raw pixels, 57.11 points above random init." in page.said
    assert "[1] A paper; best epoch" in page.said and "Chosen on training data: learning_rate = 0.3" in page.said
    assert "Sentence about linear." in page.said and "k = 20" in page.said


def test_confusion_is_a_table_with_the_names_of_the_classes(tmp_path):
    card = make_card()
    matrix = [[9, 3, 0, 0, 0], [1, 11, 0, 0, 0], [0, 0, 12, 0, 0], [0, 0, 0, 12, 0], [6, 0, 0, 0, 6]]
    card["evaluations"][0]["details"] = {"confusion": [[0] * 5] * 5}  # of kNN: the linear probe's is shown
    row = next(row for row in card["evaluations"] if row["protocol"] == "linear")
    row["details"] = {"confusion": matrix}
    evil = '<b>"&'
    text, page = write(tmp_path, card=card, class_names=["ant", "bee", "cow", "dog", evil])
    assert 'Most often: <b>"& for ant (50 %), ant for bee (25 %), bee for ant (8 %).' in page.said
    start = next(i for i, cells in enumerate(page.rows) if cells[1:] == ["ant", "bee", "cow", "dog", evil])
    assert page.rows[start + 1 : start + 6] == [
        ["ant", "75", "25", "", "", ""],
        ["bee", "8", "92", "", "", ""],
        ["cow", "", "", "100", "", ""],
        ["dog", "", "", "", "100", ""],
        [evil, "50", "", "", "", "50"],
    ]
    scopes = [attrs["scope"] for tag, attrs in page.tags if tag == "th" and "scope" in attrs]
    assert scopes.count("col") >= 5 and scopes.count("row") >= 5
    assert '<div class="scroll" tabindex="0"><table class="confusion"><caption>' in text
    assert "What is taken for what" not in write(tmp_path, card=make_card())[1].said


def test_below_a_baseline_is_said(tmp_path):
    card = make_card()
    card["evaluations"] = [make_row("linear", 20.0)]
    _, page = write(tmp_path, card=card)
    assert "11.26 points below raw pixels, 5.88 points above random init." in page.said


def test_hostile_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"><img src=x onerror=y>"
    card = json.loads(json.dumps(make_card()).replace("quickstart", "P").replace("A paper", "S"))
    card["preset"] = card["data"]["name"] = card["device"] = card["backbone"] = evil
    card["published"][0]["source"] = card["config"][evil] = card["environment"]["torch"] = evil
    card["warnings"] = [evil]
    for row in card["evaluations"]:
        row["text"] = row["settings"]["k"] = row["target"] = evil
        row["baselines"][evil] = 1.0
    card["evaluations"].append(make_row("invariance", 0.5, "relative distance", evil))
    metrics = [{"step": 1, "loss": 1.0, evil: 2.0}, {"step": 1, "kind": evil, "value": 1.0}]
    text, page = write(
        tmp_path,
        card=card,
        metrics=metrics,
        class_names=[evil] * 5,
        view_text=evil,
        notes=[evil],
        signals={"loss": evil},
        references={"loss": (1, evil)},
    )
    assert "<script" not in text and "<img src=x" not in text
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert page.said.count(evil) > 20


def test_images_carry_their_pixels(tmp_path):
    originals, views = images(4, 3, 16, 16, seed=5), images(4, 2, 3, 16, 16, seed=6)
    _, page = write(tmp_path, originals=originals, views=views)
    assert all(attrs["alt"] for attrs in pictures(page))
    shown = {}
    for attrs in pictures(page):
        data = base64.b64decode(attrs["src"].split(",")[1])
        shown[attrs["alt"]] = torch.tensor(list(Image.open(io.BytesIO(data)).convert("RGB").tobytes())).view(-1)
    for i in range(4):
        assert shown[f"image {i + 1}, original"].tolist() == originals[i].permute(1, 2, 0).flatten().tolist()
        for v in range(2):
            assert shown[f"image {i + 1}, view {v + 1}"].tolist() == views[i, v].permute(1, 2, 0).flatten().tolist()


def test_multi_crop_views_and_large_images(tmp_path):
    views = [images(3, 3, 224, 224), images(3, 3, 224, 224), *(images(3, 3, 96, 96) for _ in range(4))]
    text, page = write(tmp_path, views=views, originals=images(3, 3, 260, 200), test_images=images(60, 3, 224, 224))
    widths = [int(a["width"]) for a in pictures(page) if a["alt"].startswith("image 1, view")]
    assert widths == [76, 76, 36, 36, 36, 36] and "2 of 224 px, 4 of 96 px." in page.said
    assert len(text) < 1_500_000
    original = next(a for a in pictures(page) if a["alt"] == "image 1, original")
    assert Image.open(io.BytesIO(base64.b64decode(original["src"].split(",")[1]))).size == (96, 125)


def test_without_labels_views_and_invariance(tmp_path):
    card = make_card("photos")
    card["evaluations"] = [make_row("label-free", 31.4, "RankMe", "features")]
    card["data"]["label_name"] = None
    card["published"] = []
    _, page = write(tmp_path, card=card, test_labels=None, class_names=None, views=None, originals=None)
    assert page.headings == list(SECTIONS)
    assert all(text in page.said for text in ("No accuracy was measured", "photos has none", "no augmented views"))
    assert "✗" not in page.said and not any("wrong" in a.get("class", "") for _, a in page.tags)
    assert "Feature suppression" not in page.said


@pytest.mark.parametrize(
    "metrics, said",
    [
        ([{"step": 1, "loss": 2.5, "lr": 0.1}], "2.5"),
        ([], "No metrics were logged."),
        ([{"step": 1, "loss": math.nan}], "no finite value"),
        ([{"step": 1, "loss": math.inf}, {"step": 2, "loss": 1.25}], "1 non-finite values left out"),
    ],
)
def test_short_and_broken_metrics(tmp_path, metrics, said):
    text, page = write(tmp_path, metrics=metrics)
    assert said in page.said and page.headings == list(SECTIONS)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


def test_degenerate_runs(tmp_path):
    card = make_card()
    card["evaluations"] = []
    features = torch.ones(60, 16)
    features[0] = torch.nan
    _, page = write(tmp_path, card=card, test_features=features.clone())
    assert "1 of 60 test features are not finite" in page.said and "not evaluated" in page.said
    _, page = write(tmp_path, test_features=torch.ones(60, 16))
    assert "the representation has collapsed" in page.said
    two = {k: arguments()[k][:2] for k in ("test_images", "test_features", "test_labels")}
    _, page = write(tmp_path, **two)
    assert "Too few test images for a map" in page.said
    with pytest.raises(ValueError, match="different lengths"):
        write(tmp_path, test_features=torch.ones(3, 4))


def test_shapes_explain_suppression_and_invariance(tmp_path):
    _, page = write(tmp_path)
    assert "shapes-textured" in page.said and "Feature suppression" in page.said
    _, page = write(tmp_path, views=arguments()["views"][:, :1])  # one view shares nothing with another
    assert "Feature suppression" not in page.said
    text, page = write(tmp_path)  # the card's rows, with their baselines
    assert "0.123" in page.said and "tick: raw pixels" in page.said
    assert "Movement of the features by factor: hue 0.123" in text
    _, page = write(tmp_path, card=make_card("shapes-textured"))
    assert "This run has it" in page.said


def test_every_logged_name_is_explained_by_the_method_first(tmp_path):
    metrics = [{"step": 1, "loss": 2.0, "lr": 0.1, "feature_std": 0.5, "alignment": 0.1, "seconds": 1.0}]
    metrics += [{"step": 1, "kind": "held-out", "a": 1.0, "b": 2.0}, {"step": 1, "kind": "online_knn", "accuracy": 9.0}]
    card = make_card()
    card["evaluations"].append(make_row("label-free", 0.4, "alignment", "features"))
    signals = {"loss": "the method's own words", "alignment": "of two views", "held-out": "on other records"}
    _, page = write(tmp_path, metrics=metrics, card=card, signals=signals)
    rows = [row for row in page.rows if len(row) == 2]
    logged, measured = (rows.index([head, "meaning"]) for head in ("logged as", "measured at the end"))
    assert dict(rows[logged + 1 : measured]) == {
        "loss": "the method's own words",
        "lr": report.LOGGED["lr"],
        "held-out: a": "on other records",
        "held-out: b": "on other records",
        "online knn: accuracy": report.LOGGED["online_knn"],
        "feature_std": report.UNEXPLAINED,
        "alignment": "of two views",
    }
    assert dict(rows[measured + 1 : measured + 3]) == {m: report.LABEL_FREE[m] for m in ("RankMe", "alignment")}


def test_wrong_neighbors_are_marked(tmp_path):
    labels = torch.arange(60) % 5
    features = torch.eye(5, 16)[labels]
    features[0] = torch.eye(5, 16)[1]  # the query "ant" now sits among the bees
    _, page = write(tmp_path, test_features=features, test_labels=labels)
    wrong = [a["alt"] for a in pictures(page) if "another class" in a["alt"]]
    assert wrong[:8] == ["neighbor of ant: bee, another class"] * 8
    # only bee's neighbors may include the stray ant
    assert all("of ant:" in alt or "of bee: ant" in alt for alt in wrong)


def test_images_without_a_label_are_never_wrong(tmp_path):
    labels = torch.arange(60) % 5
    labels[::2] = -1
    _, page = write(tmp_path, test_labels=labels, test_features=torch.ones(60, 16) + torch.eye(60, 16))
    assert "class -1" not in page.said and "Of 30 test images" in page.said
    found = [a["alt"] for a in pictures(page) if a["alt"].startswith("neighbor of")]
    assert any(alt.endswith(": unlabeled") for alt in found)
    assert not any("unlabeled, another class" in alt or "neighbor of unlabeled" in alt for alt in found)


def test_nearest_equals_the_slow_version():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(30, 7, generator=g)
    values, index = report.nearest(x, torch.tensor([3, 17]), 5)
    for row, query in enumerate((3, 17)):
        scores = sorted(
            ((torch.dot(x[query], x[i]) / x[query].norm() / x[i].norm()).item(), i) for i in range(30) if i != query
        )[::-1][:5]
        assert index[row].tolist() == [i for _, i in scores]
        torch.testing.assert_close(values[row], torch.tensor([s for s, _ in scores]))


def test_principal_components_equal_an_svd_and_leave_the_generator_alone():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, 24, generator=g) * torch.logspace(0, -2, 24)
    before = torch.get_rng_state()
    scores, share = report.principal_components(x, 3)
    assert torch.equal(before, torch.get_rng_state())
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    torch.testing.assert_close(share.double(), s[:3] ** 2 / (s**2).sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(scores.double().abs(), (u * s)[:, :3].abs(), rtol=1e-2, atol=1e-4)
    assert (scores.gather(0, scores.abs().argmax(0, keepdim=True)) > 0).all()
    scores, share = report.principal_components(torch.randn(5, 2, generator=g), 4)  # fewer directions than asked for
    assert scores.shape == (5, 4) and (scores[:, 2:] == 0).all() and share[2:].tolist() == [0, 0]


def test_images_of_the_report_are_spread_over_the_test_set():
    assert spread(5, 10) == [0, 1, 2, 3, 4] and spread(10, 4) == [0, 2, 5, 7] and spread(0, 4) == []
    classes = torch.arange(12).repeat_interleave(400)  # sorted by class
    assert set(classes[spread(4800, 2000)].bincount().tolist()) == {166, 167}
