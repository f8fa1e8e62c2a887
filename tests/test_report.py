import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from flawmap.errors import FlawmapError
from flawmap.imaging.geometry import Geometry
from flawmap.judging.calibration import Calibration
from flawmap.judging.evaluation import Scored, evaluate
from flawmap.judging.inspection import Inspection
from flawmap.report.charts import ScoreRow, score_histograms
from flawmap.report.evaluation_page import worth_showing, write_evaluation_page
from flawmap.report.overlays import HeatScale
from flawmap.report.pictures import Picture, take_picture
from flawmap.report.training_page import AtypicalPicture, Learnt, LeftOut, write_training_page

VOID = {"meta", "img", "br", "hr", "link", "input"}
SCALE = HeatScale(1.0, 3.0)
SETTINGS = {
    "method": "toy", "backbone": "net_a", "image_size": [64, 96], "engine": "torch", "full_resolution": False,
    "training_images": 77, "seed": 5, "threshold": 2.0, "max_false_reject": 0.01, "guarantee": "marginal",
    "data": "parts <A&B>", "keep_aspect": True,
}  # fmt: skip


class Page(HTMLParser):
    """The text of each section by its id, and all elements; fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.elements, self.texts = [], [], {}
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "style" not in tags:
            for name in {"page", *(a["id"] for tag, a in self.open if tag == "section")}:
                self.texts.setdefault(name, []).append(data)

    def __getitem__(self, section):
        return " ".join(" ".join(self.texts[section]).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def rows(self, section):
        """The cells of each table row of a section."""
        part = re.search(rf'<section id="{section}">.*?</section>', self.source, re.DOTALL)[0]
        rows = re.findall(r"<tr.*?</tr>", part, re.DOTALL)
        cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in rows]
        return [[" ".join(re.sub(r"<.*?>", "", cell).split()) for cell in row] for row in cells]


def images(maps=True, masks=True, threshold=1.95, shift=0.0):
    """30 good images, one of them above 1.95, 20 defective ones, and one that could not be judged."""
    random = np.random.default_rng(0)
    scores = np.append(
        random.permutation([*np.linspace(0.2, 1.8, 29), 2.1]), random.permutation(np.linspace(1.2, 3.6, 20))
    )
    for number, score in enumerate(scores):
        defective = number >= 30
        kind = ("scratch", "dent")[number % 2] if defective else "good"
        score = float(np.float32(score + shift * defective))
        mask = np.zeros((16, 24), bool)
        mask[2:6, 3:9] = defective
        heat = (random.random((16, 24)) + mask).astype(np.float32) if maps else None
        verdict = "defect" if score >= threshold else "good"
        mask = mask if defective and masks and maps else None
        path = Path("root", "test", kind, f"{number:03d}.png")
        yield Scored(kind, defective, score, verdict, heat, mask, 4.0, None, path, (number + 1) / 61)
    path = Path("root/test/dent/bad.png")
    yield Scored("dent", True, None, "error", None, None, 0.0, f"{path}: is empty (0 bytes); copy it again", path)


def calibration(mode="holdout", maps=True):
    scores = np.append(np.linspace(0.1, 1.9, 98), 1.9499).astype(np.float32)
    return Calibration(scores, scores if maps else np.empty(0, np.float32), mode)


def picture(shade=90, maps=True):
    pixels = np.full((40, 60, 3), shade, np.uint8)
    return Picture(pixels, pixels + np.uint8(9) if maps else None, np.eye(40, 60, dtype=bool))


def page(path, report, *, good=None, pictures=None, maps=True, **options):
    good = good or calibration(maps=maps)
    threshold = options.pop("threshold", good.threshold(0.01))
    shown = {i: picture(maps=maps) for i in worth_showing(report)} if pictures is None else pictures
    heat = {"scale": SCALE, "pixel_threshold": 2.0} if maps else {"scale": None, "pixel_threshold": None}
    write_evaluation_page(path, report, good, threshold, shown, **heat, **options)
    return Page(path)


@pytest.fixture(scope="module")
def report():
    return evaluate(images(), SETTINGS)


@pytest.fixture(scope="module")
def parsed(report, tmp_path_factory):
    """The page of `report`."""
    return page(tmp_path_factory.mktemp("page") / "page.html", report)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "page.html"


def percent(value):
    return f"{100 * value:.1f} %"


def test_the_figures_are_the_reports(report, parsed):
    rows = {row[0]: row[1:3] for row in parsed.rows("verdict")}
    titles = {
        "image_auroc": "Image AUROC", "image_ap": "Image AP", "image_f1_max": "Image F1-max (oracle)",
        "pixel_auroc": "Pixel AUROC", "pixel_ap": "Pixel AP", "pixel_f1_max": "Pixel F1-max (oracle)",
        "aupro": "AUPRO (limit 0.3)",
    }  # fmt: skip
    for share in ("0.1", "1", "5"):
        name = f"caught_at_overkill_{float(share) / 100:g}_oracle"
        assert rows[f"Caught at {share} % overkill (oracle)"][0] == percent(report.figures[name])
    assert rows["Best escape rate (oracle)"][0] == percent(report.escape_rate_oracle)
    for name, title in titles.items():
        low, high = report.intervals[name]
        assert rows[title] == [f"{report.figures[name]:.3f}", f"{low:.3f} to {high:.3f}"]
    assert rows["Escape rate"][0] == percent(report.escape_rate)
    assert rows["Overkill rate"][0] == "3.33 %"
    assert rows["Escape rate"][1] == " to ".join(map(percent, report.intervals["escape_rate"]))


def test_the_verdicts_stand_first_in_plain_words(report, parsed):
    text = parsed["verdict"]
    escaped = sum(r.defective and r.verdict == "good" for r in report.results)
    assert 1 < escaped < 20
    assert f"{escaped} of 20 defective images were called good." in text
    assert "1 of 30 good images was called defects." not in text
    assert "1 of 30 good images was called a defect." in text
    assert text.index("called good") < text.index("AUROC")


def test_what_was_asked_is_said(report, out):
    text = page(out, report, config={"share": 0.25, "levels": ["a", "b"], "flag": False})["page"]
    for part in (
        "parts <A&B>", "toy", "net_a", "64 × 96 pixels", "torch", "77", "1.00 %", "share = 0.25", "levels = a, b",
        "flag = no", "at the model's image size", "51 test images: 30 good and 20 defective, and 1 that could not",
        "Keep aspect yes",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("mode", "guarantee", "said"),
    [
        ("holdout", "marginal", "at most 1.00 % are rejected on average"),
        ("folder", "confidence", "With 95 % confidence, at most 2.98 % of good parts"),
        ("crossfit", "marginal", "not a promise"),
        ("holdout", "tail", "About 1.00 % of good parts like the 99 calibration images are rejected, and with 95 %"),
        ("holdout", None, "You chose this threshold. 10.1 % of the 99 calibration images reach it."),
    ],
)
def test_the_promise_is_that_of_the_threshold(report, out, mode, guarantee, said):
    good = calibration(mode=mode)
    threshold = good.threshold(0.01, guarantee) if guarantee else good.threshold_at(1.75)
    text = page(out, report, good=good, threshold=threshold)["promise"]
    assert threshold.describe() in text
    assert said in text
    assert "It says nothing about defects." in text


def test_a_tail_is_contradicted_by_more_than_its_interval(out):
    drifted = evaluate(images(maps=False, threshold=1.2), SETTINGS)
    low, _ = drifted.intervals["overkill_rate"]
    good = calibration(maps=False)
    tail = good.threshold(0.01, "tail")
    for highest, said in ((low - 0.01, True), (low + 0.01, False)):
        threshold = replace(tail, interval=(0.0, highest))
        text = page(out, drifted, good=good, threshold=threshold, maps=False)["promise"]
        assert ("They are not like the calibration images" in text) == said


def test_unsure_images_have_a_column_where_there_are_any(out):
    def unsure(image):
        return replace(image, verdict="unsure") if image.score is not None and 1.7 < image.score < 2.0 else image

    report = evaluate(map(unsure, images()), SETTINGS)
    parsed = page(out, report)
    head, *rows = parsed.rows("kinds")
    assert head[:6] == ["Kind", "Images", "Rejected", "Escaped", "Unsure", "Not judged"]
    for kind, total, rejected, escaped, between, errors, right, _ in rows:
        counts = report.kinds[kind]
        assert int(between) == counts["unsure"]
        assert int(total) == counts["images"] + int(errors)
        if kind != "good":
            assert int(rejected) + int(escaped) + int(between) == counts["images"]
            assert float(right.rstrip(" %")) == pytest.approx(100 * counts["rejected"] / counts["images"], abs=0.1)
    assert report.unsure > 2
    assert "second threshold" in parsed["scores"]


def test_test_images_unlike_the_calibration_are_pointed_out(parsed, out):
    assert "They are not like" not in parsed["promise"]
    drifted = evaluate(images(maps=False, threshold=0.5), SETTINGS)
    assert drifted.intervals["overkill_rate"][0] > 0.5
    assert "They are not like the calibration images" in page(out, drifted, maps=False)["promise"]


def test_defects_caught_in_the_wrong_place_come_first_and_are_called_so(out):
    def placed(image):
        return replace(image, on_defect=image.score > 2.5) if image.defective and image.verdict == "defect" else image

    report = evaluate(map(placed, images()), SETTINGS)
    parsed = page(out, report, each=3, pictures={i: picture() for i in worth_showing(report, 3)})
    elsewhere = sorted((-r.score, r.path) for r in report.results if r.on_defect is False)
    assert len(elsewhere) >= 3
    assert captions(parsed, "hits") == ["/".join(path.parts[-2:]) for _, path in elsewhere[:3]]
    assert parsed["hits"].count("caught in the wrong place") == 3
    right, caught = report.counted("on_defect"), report.counted("located")
    assert f"{right} of {caught} in the right place" in parsed["hits"]
    column = parsed.rows("kinds")[0].index("On the defect")
    for row in parsed.rows("kinds")[1:-1]:
        counts = report.kinds[row[0]]
        assert row[column] == f"{counts['on_defect']} of {counts['located']}"


def test_refused_images_have_a_column_where_there_are_any(out):
    def refused(image):
        return replace(image, verdict="error", error="blurred") if (image.score or 0) > 2.8 else image

    report = evaluate(map(refused, images()), SETTINGS)
    parsed = page(out, report)
    column = parsed.rows("kinds")[0].index("Refused")
    for row in parsed.rows("kinds")[1:]:
        assert int(row[column]) == report.kinds[row[0]]["refused"]
    assert report.counted("refused") > 1
    assert "have a score, which counts above" in parsed["unjudged"]


def test_each_kind_has_its_row_and_the_worst_comes_first(report, parsed):
    head, *rows = parsed.rows("kinds")
    assert head == ["Kind", "Images", "Rejected", "Escaped", "Not judged", "Right verdicts", "Image AUROC"]
    good = [r for r in report.results if not r.defective]
    caught = []
    for kind, total, rejected, escaped, errors, right, auroc in rows[:-1]:
        of_kind = [r for r in report.results if r.kind == kind]
        judged = [r for r in of_kind if r.score is not None]
        counts = report.kinds[kind]
        assert (int(rejected), int(errors)) == (counts["rejected"], counts["errors"])
        assert (int(total), int(escaped)) == (len(of_kind), counts["images"] - counts["rejected"])
        labels = [0] * len(good) + [1] * len(judged)
        assert float(auroc) == pytest.approx(roc_auc_score(labels, [r.score for r in good + judged]), abs=6e-4)
        caught.append(float(right.rstrip(" %")))
    assert caught == sorted(caught)
    assert rows[-1] == ["good", "30", "1", "–", "0", "96.7 %", "–"]


def captions(parsed, section):
    return re.findall(r"(\S+/\S+\.png)", parsed[section])


def test_the_worst_come_first_with_their_pictures(report, out):
    parsed = page(out, report, each=3, pictures={i: picture() for i in worth_showing(report, 3)})
    missed = sorted((r.score, r.path) for r in report.results if r.defective and r.verdict == "good")
    assert captions(parsed, "misses") == ["/".join(path.parts[-2:]) for _, path in missed[:3]]
    assert f"lowest scores first: 3 of {len(missed)}." in parsed["misses"]
    (alarm,) = [r for r in report.results if not r.defective and r.verdict == "defect"]
    assert captions(parsed, "alarms") == ["/".join(alarm.path.parts[-2:])]
    assert f"score {alarm.score:.5g} · p-value {percent(alarm.p_value)}" in parsed["alarms"]
    caught = sorted((-r.score, r.path) for r in report.results if r.defective and r.verdict == "defect")
    assert captions(parsed, "hits") == ["/".join(path.parts[-2:]) for _, path in caught[:3]]
    shown = {path for _, path in (*missed[:3], *caught[:3])}
    expected = {i for i, r in enumerate(report.results) if r == alarm or r.path in shown}
    assert worth_showing(report, 3) == sorted(expected)
    assert len([a for a in parsed.of("img") if a["alt"].endswith("ground truth outlined")]) == 7
    assert len([a for a in parsed.of("img") if a["alt"].startswith("Heatmap")]) == 7


def test_without_wrong_verdicts_the_nearest_are_shown(out):
    report = evaluate(images(maps=False, threshold=2.2, shift=4), SETTINGS)
    assert (report.escape_rate, report.overkill_rate) == (0, 0)
    parsed = page(out, report, maps=False)
    assert "No defect was called good. These came nearest" in parsed["misses"]
    assert "No good image was called a defect. These came nearest" in parsed["alarms"]
    highest = sorted((r for r in report.results if not r.defective), key=lambda r: -r.score)[:8]
    assert captions(parsed, "alarms") == [f"good/{r.path.name}" for r in highest]
    assert "0 of 20 defective images were called good." in parsed["verdict"]


def test_what_could_not_be_judged_is_listed_with_its_reason(parsed, out):
    assert parsed.rows("unjudged")[1:] == [["dent/bad.png", "is empty (0 bytes); copy it again"]]
    assert (
        "None: every test image was judged." in page(out, evaluate(list(images(maps=False))[:-1], SETTINGS))["unjudged"]
    )


def test_the_file_stands_alone(parsed):
    assert re.findall(r"(?:https?:|ftp:|file:)?//[\w.]", re.sub(r"base64,[\w+/=]*", "", parsed.source)) == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/jpeg;base64,", "#")), (tag, attributes)
    assert set(re.findall(r"url\((.)", parsed.source)) == {"#"}
    assert "@import" not in parsed.source
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', parsed.source)
    assert used
    assert set(used) <= set(ids)


def test_the_same_input_gives_the_same_bytes(report, tmp_path, monkeypatch):
    first, second = tmp_path / "1.html", tmp_path / "2.html"
    page(first, report)
    for name, value in {"text.color": "red", "font.size": 33, "svg.hashsalt": "x", "axes.grid": True}.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    page(second, evaluate(images(), SETTINGS))
    assert first.read_bytes() == second.read_bytes()
    assert matplotlib.rcParams["font.size"] == 33


def test_names_are_text_and_nothing_else(out):
    name = "<img src=x>.png"
    bad = Scored("<b>kind</b>", True, 1.0, "good", None, None, 1.0, None, Path("a&b") / name, 0.5)
    odd = Scored("good", False, 2.5, "defect", None, None, 1.0, None, Path("good/\udcff.png"), 0.5)
    error = Scored("good", False, None, "error", None, None, 0.0, "<script>alert(1)</script>", Path(name))
    report = evaluate([bad, odd, error], SETTINGS | {"data": "</title><script>", "seed": "<i>"})
    parsed = page(out, report, maps=False, config={"<u>": "<s>"})
    assert f"a&b/{name}" in parsed["misses"]
    assert "<b>kind</b>" in parsed["kinds"]
    assert "<script>alert(1)</script>" in parsed["unjudged"]
    assert "good/?.png" in parsed["alarms"]
    assert "</title><script>" in parsed["page"]
    assert {"x"}.isdisjoint(a.get("src") for a in parsed.of("img"))
    assert not {"script", "b", "u", "s"} & {tag for tag, _ in parsed.elements}


def test_a_method_without_maps(out):
    report = evaluate(images(maps=False), SETTINGS)
    parsed = page(out, report, maps=False)
    assert "Pixel" not in parsed["page"]
    assert "judges whole images and gives no map" in parsed["verdict"]
    assert "PRO curve" not in parsed["curves"]
    assert "legend" not in parsed.texts
    assert not [a for a in parsed.of("img") if a["alt"].startswith("Heatmap")]
    assert len(captions(parsed, "misses")) > 1


def test_without_masks(out):
    parsed = page(out, evaluate(images(masks=False), SETTINGS))
    assert "because no defective image has a mask" in parsed["verdict"]
    assert "PRO curve" not in parsed["curves"]
    assert "How to read the heatmaps" in parsed["legend"]
    some = [*images(), *list(images(masks=False))[30:32]]
    assert "2 defective images have no mask and are left out" in page(out, evaluate(some, SETTINGS))["verdict"]


def test_missing_classes(out):
    only_good = page(out, evaluate(list(images())[:30], SETTINGS))
    assert "The test images hold no defective ones" in only_good["verdict"]
    assert "There are no defective test images." in only_good["misses"]
    assert "curves" not in only_good.texts
    assert dict(row[:2] for row in only_good.rows("verdict"))["Image AUROC"] == "–"
    nothing = page(out, evaluate(list(images())[-1:], SETTINGS))
    assert "There are no good test images." in nothing["alarms"]
    assert nothing.rows("kinds")[1] == ["dent", "1", "0", "0", "1", "–", "–"]


def test_a_missing_picture_is_said(report, out):
    parsed = page(out, report, pictures={})
    assert parsed["misses"].count("no picture") == len(captions(parsed, "misses")) > 1


def decoded(attributes):
    image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
    assert image.format == "JPEG"
    return np.asarray(image).astype(int)


def test_pictures_are_small_and_the_truth_is_outlined(out):
    pixels = np.full((600, 1200), 100, np.uint8)
    heat = np.zeros((32, 32), np.float32)
    heat[24:, 24:] = 4
    mask = np.zeros((600, 1200), bool)
    mask[100:102, 200:600] = True  # a hairline, thinner than a pixel of the small picture
    inspection = Inspection(
        None,
        "defect",
        4.0,
        0.01,
        2.0,
        2.0,
        (600, 1200),
        maps=heat[None],
        placement=Geometry().place((600, 1200), heat.shape),
    )
    taken = take_picture(pixels, inspection, SCALE, mask)
    assert taken.original.shape == taken.overlay.shape == (180, 360, 3)
    assert taken.mask.shape == (180, 360)
    assert take_picture(pixels, inspection, None).overlay is None
    image = next(iter(images()))
    image = Scored("dent", True, image.score, "good", None, None, 1.0, None, Path("dent/0.png"), 0.5)
    original, overlaid = (decoded(a) for a in page(out, evaluate([image]), pictures={0: taken}).of("img")[1:])
    magenta = (original[..., 0] - original[..., 1] > 120) & (original[..., 2] - original[..., 1] > 100)
    rows, columns = np.nonzero(magenta)
    assert (rows.min(), rows.max()) == pytest.approx((27, 33), abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((57, 182), abs=1)
    np.testing.assert_allclose(original[30, 70:170], 100, atol=25)  # the defect itself is not painted over
    np.testing.assert_allclose(original[60:], 100, atol=3)
    np.testing.assert_allclose(overlaid[:100, :200], 100, atol=3)
    assert overlaid[170, 350, 0] - overlaid[170, 350, 1] > 50


def test_the_legend_shows_the_scale(parsed):
    strip = decoded(next(a for a in parsed.of("img") if a["alt"].startswith("The heat colours")))
    np.testing.assert_allclose(strip[:, :4].mean((0, 1)), 150, atol=4)  # no colour at the low end
    assert strip[:, -4:].mean((0, 1)) == pytest.approx(np.array([128, 0, 38]) * 0.65 + 150 * 0.35, abs=4)
    for value in ("1 No colour", "2 Outlined", "3 The last colour"):
        assert value in parsed["legend"]


def test_bars_count_the_scores_and_the_threshold_parts_them():
    good = ScoreRow("good", np.array([0.0, 0.1, 1.0, 5.0]), False)
    defective = ScoreRow("bad", np.array([0.5, 0.5, 0.5, 1.0, 1e9]), True)
    chart = score_histograms([good, defective], 1.0, width=500)
    shapes = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: var\(--(good|bad)\)"/>', chart)
    corners = [(np.array(re.findall(r"-?[\d.]+", d), float).reshape(-1, 2), colour) for d, colour in shapes]
    heights = [(round(float(np.ptp(points[:, 1])), 2), colour) for points, colour in corners]
    unit = min(height for height, _ in heights)  # one image of three; the row above has at most two in a bar
    assert [(round(2 * height / unit), colour) for height, colour in heights] == [
        (6, "good"), (3, "bad"), (3, "bad"), (2, "good"), (2, "good"), (6, "bad"),
    ]  # fmt: skip
    assert "the last bar" in chart
    assert score_histograms([ScoreRow("alike", np.full(5, 7.0), False)], 7.0, width=400).startswith("<svg")


def test_a_page_that_cannot_be_written_says_so(report, tmp_path):
    with pytest.raises(FlawmapError, match=r"missing.page\.html: the folder .* does not exist"):
        page(tmp_path / "missing" / "page.html", report)


def training_page(path, learnt, *, maps=True):
    good = calibration(mode="crossfit", maps=maps)
    heat = {"scale": SCALE, "pixel_threshold": 2.0} if maps else {"scale": None, "pixel_threshold": None}
    write_training_page(path, SETTINGS, learnt, good, good.threshold(0.01), **heat, config={"k": 3})
    return Page(path), good


def test_a_training_page_with_nothing_to_complain_of(out):
    parsed, good = training_page(out, Learnt([(40, 60)] * 77))
    assert "Learnt from 77 good images of 60 × 40 pixels" in parsed["page"]
    assert good.threshold(0.01).describe() in parsed["promise"]
    assert "Good images (99)" in parsed["scores"]
    for section, line in {
        "atypical": "None are listed.",
        "duplicates": "None were found.",
        "leaks": "No image was found in both.",
        "left-out": "None: every training file was learnt from.",
    }.items():
        assert parsed[section].endswith(line), section


def test_a_training_page_with_findings(out, tmp_path):
    paths = []
    for number in range(5):
        paths.append(tmp_path / "good" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((50, 70), 40 * number, np.uint8)).save(paths[-1])
    gone = tmp_path / "test" / "gone <1>.png"
    learnt = Learnt(
        [(40, 60), (50, 80)],
        left_out=[LeftOut(gone, f"{gone}: is empty; copy it again"), LeftOut(paths[0], "another part")],
        atypical=[AtypicalPicture(paths[3], 9.5, 0.01, picture()), AtypicalPicture(paths[4], 1.25, 0.5)],
        near_duplicates=[paths[:2], paths[2:5]],
        in_train_and_test=[(paths[0], gone)],
    )
    parsed, good = training_page(out, learnt)
    assert "Learnt from 2 good images of 2 different sizes, 60 to 80 pixels wide and 40 to 50" in parsed["page"]
    assert parsed.rows("left-out")[1:] == [
        ["test/gone &lt;1&gt;.png", "is empty; copy it again"],
        ["good/0.png", "another part"],
    ]
    assert captions(parsed, "atypical") == ["good/3.png", "good/4.png"]
    assert good.threshold(0.01).value < 9.5
    assert "score 9.5 · p-value 1.00 % would be rejected" in parsed["atypical"]
    assert parsed["atypical"].count("would be rejected") == 1
    assert "2 groups of training images." in parsed["duplicates"]
    assert captions(parsed, "duplicates") == [f"good/{number}.png" for number in range(5)]
    assert "1 pair: a training image" in parsed["leaks"]
    assert parsed["leaks"].endswith("test/gone <1>.png")
    shown = {
        a["alt"]: decoded(a)
        for a in parsed.of("img")
        if a["alt"].startswith("good/") and a["alt"] != "good/3.png, ground truth outlined"
    }
    assert set(shown) == {f"good/{number}.png" for number in range(5)}
    np.testing.assert_allclose(shown["good/2.png"], 80, atol=3)


def test_a_training_page_of_many_copies_stays_small(out, tmp_path):
    path = tmp_path / "part.png"
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(path)
    parsed, _ = training_page(out, Learnt([(30, 30)], near_duplicates=[[path] * 9] * 40), maps=False)
    assert parsed["duplicates"].count("part.png") == 360
    assert len(parsed.of("img")) == 72
