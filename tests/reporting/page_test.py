"""The page: self-contained, escaped, and shown by a real browser where there is one."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from salt_jax.errors import InputError
from salt_jax.evaluation.paired_comparison import Tokens, differences, differences_to_json
from salt_jax.reporting import page
from salt_jax.reporting.runs import read_folders
from salt_jax.reporting.sections import compose

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "nav", "footer"),
    *("h1", "h2", "p", "a", "div", "span", "code", "pre", "details", "summary", "dl", "dt", "dd"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption"),
}
HOSTILE = "<script>alert('x')</script>"


def rendered(paths, title="Runs"):
    material = read_folders(paths)
    report = compose(material)
    return page.render(title, report, [(run.label, run.origin) for run in material.runs], "now")


def test_the_page_needs_nothing_from_outside(tmp_path, folders):
    text = rendered(folders.experiment(tmp_path))
    sources = re.findall(r'src="(.{22})', text)
    assert len(sources) == 8
    assert set(sources) == {"data:image/png;base64,"}
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    for forbidden in ("<script", "<link", "@import", "url(", "http://", "https://"):
        assert forbidden not in text
    assert "default-src 'none'" in text


def test_the_page_shows_every_part(tmp_path, folders):
    text = rendered(folders.experiment(tmp_path), title="Four arms")
    for part in (
        *("<h1>Four arms</h1>", "At equal steps: 750", "At equal train FLOPs", "By subset"),
        *("At equal training time", "Results at the end of each run", "one seed per arm"),
        *("salt_ds", "PubMed Abstracts", "interpolated linearly", "config.gin"),
        *("config.TrainConfig.steps = 750", "0123456789abcdef", "jax 0.10.1", "Scores of rows"),
    ):
        assert part in text, part
    assert not re.search(r"\b(best|better than|beats|wins|outperforms)\b", text)


def test_one_seed_is_said_to_be_one_seed(tmp_path, folders):
    slm = folders.arm(tmp_path / "slm", "baseline", floor=3.9, parameters=1000)
    paths = [folders.arm(tmp_path / arm, arm, floor=3.7) for arm in ("baseline", "salt")]
    text = rendered([slm, *paths])
    assert "one seed per arm (seed 0)" in text
    assert "nothing about which arm is better" in text
    again = folders.arm(tmp_path / "again", "salt", floor=3.7, seed=1)
    assert "Each arm was run with 1 to 2 seeds" in rendered([*paths, again])


def test_runs_of_another_size_are_not_in_the_matched_tables(tmp_path, folders):
    report = compose(read_folders(folders.experiment(tmp_path)))
    matched = [table for table in report.printed if table.title.startswith("At equal")]
    assert len(matched) == 3
    for table in matched:
        assert [row[0] for row in table.rows] == ["baseline", "rkd", "salt", "salt_ds"]


def test_two_sizes_with_several_arms_each_have_their_own_parts(tmp_path, folders):
    paths = [
        folders.arm(tmp_path / f"{arm}_{size}", arm, floor=3.7, parameters=size)
        for size in (1000, 2000)
        for arm in ("baseline", "salt")
    ]
    report = compose(read_folders(paths))
    titles = [section.title for section in report.sections]
    assert "Against steps (1,000 parameters)" in titles
    assert "Against steps (2,000 parameters)" in titles
    assert len(report.plots) == 14
    assert {"accuracy_by_steps_1", "accuracy_by_steps_2"} <= report.plots.keys()


def test_one_run_alone_is_shown_without_matched_tables(tmp_path, folders):
    report = compose(read_folders([folders.arm(tmp_path / "salt", "salt", floor=3.7)]))
    assert len(report.plots) == 7
    assert not [table for table in report.printed if table.title.startswith("At equal")]


def test_folders_whose_names_are_no_unicode_make_a_page(tmp_path, folders):
    run = folders.run(tmp_path / "run\udcff", [folders.evaluation(10), folders.training(10)])
    scores = folders.scores(tmp_path / "scores\udcff", rows=1000)
    selected = folders.selection(tmp_path / "selected\udcff", scores, rows=100)
    text = rendered([run, scores.path, selected.path])
    for name in ("run", "scores", "selected"):
        assert rf"{name}\udcff" in text


def test_scores_alone_make_a_page(tmp_path, folders):
    folders.scores(tmp_path / "scores", rows=100)
    assert "Scores of rows" in rendered([tmp_path / "scores"])


def test_a_paired_comparison_is_drawn(tmp_path, folders):
    tokens = Tokens(
        np.random.default_rng(0).gamma(2.0, size=(2, 80)).astype(np.float32),
        *(np.repeat(np.arange(10), 8), np.repeat([0, 1], 40), np.tile(np.arange(8), 10)),
    )
    masks = {"all": {"all": tokens.pieces >= 0}, "by_subset": {"prose": tokens.subsets == 0}}
    found = differences_to_json(differences(tokens, masks))
    (tmp_path / "run.json").write_text('{"verb": "evaluate"}')
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"comparison": {"title": "a compared with b", **found}}))
    page = rendered([tmp_path])
    for shown in ("a compared with b", "subset: prose", f"{found['all']['all']['mean']:+.4f}"):
        assert shown in page
    summary.write_text(json.dumps({"comparison": {"all": {"all": {"mean": "x"}}}}))
    with pytest.raises(InputError, match="malformed"):
        read_folders([tmp_path])


def test_a_selection_is_drawn_in_its_own_scores_only(tmp_path, folders):
    scores = folders.scores(tmp_path / "scores", rows=1000)
    folders.selection(tmp_path / "selected", scores, rows=100)
    folders.scores(tmp_path / "others", rows=2000)
    both = [tmp_path / name for name in ("scores", "others", "selected")]
    captions = [plot.caption for plot in compose(read_folders(both)).plots.values()]
    assert "selected: 100 rows" in captions[0]
    assert "no selection was given" in captions[1]
    assert "were not given: selected" in rendered(both[1:])


def test_every_text_is_escaped(tmp_path, folders):
    result = {"log_perplexity": 4.0, "next_token_accuracy": 0.3, "tokens": 9}
    lines = [folders.evaluation(10, by_subset={HOSTILE: result, '"><img src=x>': result})]
    path = folders.run(tmp_path / 'a"<b>&', lines, folders.summary_of(HOSTILE, lines[0]))
    (path / "config.gin").write_text(f"# {HOSTILE}\n</pre>{HOSTILE}")
    (path / "run.json").write_text(
        '{"verb": "train", "command_line": ["salt", "<script>"], "git_commit": "<script>",'
        ' "started": "<script>", "versions": {"<script>": "<script>"}}'
    )
    other = folders.run(tmp_path / "other", lines, folders.summary_of("x<script>", lines[0]))
    text = rendered([path, other], title=HOSTILE)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert set(re.findall(r"<([a-z0-9]+)", text)) <= TAGS


@pytest.fixture
def browse(tmp_path):
    """Runs headless Chromium; gives what it prints."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")

    def run(*arguments):
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            # So that all images are drawn on a slow machine, too.
            *("--virtual-time-budget=10000", "--run-all-compositor-stages-before-draw"),
            "--disable-checker-imaging",
            *("--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}", *arguments),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return result.stdout

    return run


def test_a_browser_shows_the_arms_and_the_plots(tmp_path, folders, browse):
    text = rendered(folders.experiment(tmp_path / "runs"))
    without_plots = re.sub(r'src="[^"]*"', "", text)
    colours = {"rkd": "#E69F00", "salt": "#0072B2", "salt_ds": "#009E73"}
    counts = []
    for name, content in (("page", text), ("bare", without_plots)):
        (tmp_path / f"{name}.html").write_text(content)
        screenshot = tmp_path / f"{name}.png"
        place = (tmp_path / f"{name}.html").as_uri()
        browse(f"--screenshot={screenshot}", "--window-size=1200,1600", place)
        pixels = imread(screenshot)[..., :3]
        assert pixels.shape[:2] == (1600, 1200)
        counts.append(
            {
                arm: int((np.abs(pixels - to_rgb(colour)).max(axis=-1) < 0.08).sum())
                for arm, colour in colours.items()
            }
        )
    shown, bare = counts
    for arm in colours:
        assert bare[arm] > 50, f"no dot of {arm} in the tables"
        assert shown[arm] > bare[arm] + 500, f"no curve of {arm} in the plots"


def test_a_browser_runs_no_script_from_a_name(tmp_path, folders, browse):
    lines = [folders.evaluation(10)]
    hostile = "<script>document.title = 'taken'</script>"
    run = folders.run(tmp_path / "run", lines, folders.summary_of(hostile, lines[0]))
    path = tmp_path / "index.html"
    path.write_text(rendered([run], title="as given"))
    shown = browse("--dump-dom", path.as_uri())
    assert "<title>as given</title>" in shown
    assert "taken" in shown
    assert "<script" not in shown
