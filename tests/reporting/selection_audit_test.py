"""The audit of a selection on the page: what it holds, drawn and written as it is."""

import html.parser
import json

import numpy as np
import pytest

from salt_jax.data.row_scores import RowScores, Selection
from salt_jax.distill import audit as audits
from salt_jax.main import main
from salt_jax.reporting import page, selection_audit
from salt_jax.reporting.runs import read_folders
from salt_jax.reporting.sections import compose
from salt_jax.reporting.tables import NOTHING
from salt_jax.terminal import print_table

NAMES = ("<b>Github</b>", "Wikipedia (en)")
HOSTILE = "</pre><script>alert('x')</script>"


def write_audit(chosen, scores, overlaps=(), stratified=False):
    """As `salt select` does, with made-up texts and subsets."""
    rows = scores.rows
    facts = audits.RowFacts(
        subset_names=NAMES,
        subsets=np.arange(rows) % 2,
        scores=scores.column("median_drop_k10"),
        losses=np.linspace(1, 2, rows),
        learnable=np.full(rows, 0.25),
        hashes=np.arange(rows, dtype=np.uint64) // 2,
    )
    ids = chosen.row_ids
    examples = {
        name: [
            {
                "row_id": row_id,
                "subset": NAMES[row_id % 2],
                "score": float(facts.scores[np.array([row_id])][0]),
                "learnable": 0.25,
                "text": f"text of {row_id} {HOSTILE}",
            }
            for row_id in row_ids
        ]
        for name, row_ids in audits.rows_to_show(facts, ids, True, stratified).items()
    }
    audit = {
        "cut": chosen.manifest["cut"],
        "stratified": stratified,
        "score": chosen.manifest["score"],
        **audits.by_subset(facts, ids),
        "duplicates": audits.duplicates(facts.hashes, ids),
        "overlaps": list(overlaps),
        "examples": examples,
    }
    (chosen.path / "audit.json").write_text(json.dumps(audit))
    return audit


@pytest.fixture
def audited(tmp_path, folders):
    scores = folders.scores(tmp_path / "scores", rows=400)
    chosen = folders.selection(tmp_path / "selected", scores, rows=100)
    return scores, chosen


def test_the_page_shows_the_audit(tmp_path, audited):
    scores, chosen = audited
    overlap = {
        "selection": "runs/k5",
        "how": {"rule": "TopRows"},
        "score": {"k": 5, "statistic": "median"},
        "scorer": {"step": 94},
        **audits.overlap(chosen.row_ids, np.arange(50), 400),
    }
    audit = write_audit(chosen, scores, [overlap])
    report = compose(read_folders([tmp_path / "scores", chosen.path]))
    text = page.render("Runs", report, [], "now")
    assert "Audit of selected" in text
    assert "&lt;b&gt;Github&lt;/b&gt;" in text
    best = audit["examples"]["highest"][0]
    assert f"text of {best['row_id']} &lt;/pre&gt;&lt;script&gt;" in text
    assert f"row {best['row_id']}, " in text
    assert "<script" not in text
    assert text.count("text of") == 20 + 20 + 10 + 10 + 20
    assert "k5" in text


def test_tables_and_plots_have_the_audits_numbers(tmp_path, audited):
    scores, chosen = audited
    audit = write_audit(chosen, scores)
    report = compose(read_folders([chosen.path]))
    (section,) = [one for one in report.sections if one.title == "Audit of selected"]
    (table,) = section.tables
    whole = dict(zip(table.columns, table.rows[-1], strict=True))
    assert [row[0] for row in table.rows] == [*NAMES, "all rows"]
    assert (whole["rows"], whole["selected"]) == ("400", "100")
    assert (whole["share of its rows"], whole["learnable"]) == ("25.00%", "25.00%")
    assert "exact copies of an earlier one, and 200 of all rows" in table.note
    assert "tell them apart" not in table.note
    (tied,) = selection_audit.audit_tables("x", {**audit, "ties": {"rows": 9, "kept": 4}})
    assert "5 rows that were left out have exactly the score of the cut, as have 4" in tied.note
    share, histogram = section.plots
    assert [plot.name for plot in section.plots] == ["selected_share", "selected_scores"]
    widths = sorted(bar.get_width() for bar in share.figure.axes[0].patches)
    parts = audit["by_subset"].values()
    assert widths == pytest.approx(sorted(100 * part["kept_share"] for part in parts))
    panels = [panel for panel in histogram.figure.axes if panel.get_visible()]
    assert [panel.get_title("left") for panel in panels] == ["all rows", *NAMES]
    ticks = [label.get_text() for panel in panels for label in panel.get_yticklabels()]
    assert {"0", "1", "10"} <= {*ticks}
    assert all(tick.replace(",", "").isdigit() for tick in ticks)
    drawn = [panel.patches[1].get_data().values.sum() for panel in panels]
    assert drawn == [100, *(part["kept"] for part in parts)]
    assert panels[0].lines[0].get_xdata()[0] == pytest.approx(chosen.manifest["cut"])


def test_each_subset_of_a_stratified_selection_has_its_own_cut(audited):
    scores, chosen = audited
    audit = write_audit(chosen, scores, stratified=True)
    cuts = [part["lowest_kept"] for part in audit["by_subset"].values()]
    assert cuts[0] != cuts[1]
    (table,) = selection_audit.audit_tables("selected", audit)
    column = table.columns.index("cut")
    assert [row[column] for row in table.rows] == [*(f"{cut:.3f}" for cut in cuts), NOTHING]
    _, histogram = selection_audit.audit_plots("selected", audit)
    lines = [panel.lines for panel in histogram.figure.axes if panel.get_visible()]
    assert [[line.get_xdata()[0] for line in own] for own in lines] == [[], *([c] for c in cuts)]
    for name, cut in zip(NAMES, cuts, strict=True):
        assert f"{name} {cut:.3f}" in histogram.caption


def test_an_audit_without_scores_has_a_table_and_texts_alone(capsys):
    part = {"rows": 9, "kept": 3, "kept_share": 1 / 3, "share_of_kept": 1.0}
    row = {"row_id": 4, "subset": "code", "score": None, "learnable": None, "text": "x"}
    audit = {
        "cut": None,
        "whole": part,
        "by_subset": {"code": part},
        "duplicates": {"kept": 0},
        "overlaps": [],
        "examples": {"sample": [row]},
    }
    (table,) = selection_audit.audit_tables("control", audit)
    assert len(table.columns) == 5
    print_table(table)
    assert "33.33%" in capsys.readouterr().out
    assert selection_audit.audit_plots("control", audit) == []
    (rows,) = selection_audit.audit_excerpts(audit).values()
    assert rows == [("row 4, code", "x")]


def test_selections_by_several_scores_are_each_drawn_over_their_own(tmp_path, audited, folders):
    scores, chosen = audited
    zero = folders.selection(tmp_path / "zero", scores, rows=50, unlearnable="zero")
    (plot,) = compose(read_folders([scores.path, chosen.path])).plots.values()
    assert "selected: 100 rows" in plot.caption
    both = [scores.path, chosen.path, zero.path]
    captions = [plot.caption for plot in compose(read_folders(both)).plots.values()]
    assert "median_drop_k10" in captions[0]
    assert "selected: 100 rows" in captions[0]
    assert "median_zero_k10" in captions[1]
    assert "zero: 50 rows" in captions[1]
    assert "zero" not in captions[0]


# Out of an attribute, out of a text; matplotlib's own markup; what is no Unicode; a terminal's.
MARKUP = "\"'></td></pre><script>&$\\frac{$\ud800\x1b[2J"
# What the files' format fixes.
FIXED = {"kind", "verb", "split", "digest"}


def poisoned(value, key=""):
    """A JSON value with markup in all its texts, and in the names of subsets and libraries."""
    if isinstance(value, str):
        return value if key in FIXED else value + MARKUP
    if isinstance(value, list):
        return [poisoned(item, key) for item in value]
    if isinstance(value, dict):
        named = key in ("by_subset", "versions", "how")
        return {k + MARKUP * named: poisoned(item, k) for k, item in value.items()}
    return value


class Tags(html.parser.HTMLParser):
    """Notes the tags and attributes that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.filterwarnings("error::UserWarning")
def test_no_text_of_any_file_comes_out_raw(tmp_path, folders, capsys):
    paths = folders.experiment(tmp_path / "a<b>&")
    scores, chosen = paths[-2:]
    overlap = {
        "selection": "runs/k5",
        "how": {"rule": "TopRows"},
        "score": {"k": 5, "statistic": "median"},
        "scorer": {"step": 94, "path": "slm"},
        **audits.overlap(np.arange(50), np.arange(50), 400),
    }
    write_audit(Selection.open(chosen), RowScores.open(scores), [overlap])
    before = main(["report", *map(str, paths), f"--output_dir={tmp_path / 'plain'}"])
    assert before == 0
    poisoned_files = 0
    for folder in paths:
        for name in ("summary.json", "run.json", "audit.json", "metrics.jsonl"):
            if not (folder / name).exists():
                continue
            texts = (folder / name).read_text()
            lines = texts.splitlines() if name.endswith("l") else [texts]
            made = [json.dumps(poisoned(json.loads(line))) for line in lines]
            assert made != lines
            (folder / name).write_text("\n".join(made) + "\n")
            poisoned_files += 1
        (folder / "config.gin").write_text(f"# {MARKUP[:20]}\n")
    assert poisoned_files == 5 * 3 + 3
    capsys.readouterr()
    assert main(["report", *map(str, paths), f"--output_dir={tmp_path / 'page'}"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    plain, text = ((tmp_path / name / "index.html").read_text() for name in ("plain", "page"))
    assert "<script" not in text
    assert "\x1b" not in text
    escaped = "&#34;&#39;&gt;&lt;/td&gt;&lt;/pre&gt;&lt;script&gt;&amp;"
    assert text.count(escaped) > 100
    for shown in ("salt_ds", "Github", "jax", "0123456789abcdef", "text of "):
        assert shown in text
    before, after = Tags(plain), Tags(text)
    assert (after.tags, after.attributes) == (before.tags, before.attributes)


@pytest.mark.filterwarnings("error::UserWarning")
def test_long_names_leave_room_for_the_plots(audited):
    scores, chosen = audited
    audit = write_audit(chosen, scores)
    parts = audit["by_subset"].values()
    audit["by_subset"] = {str(n) * 10_000: part for n, part in enumerate(parts)}
    share, histogram = selection_audit.audit_plots("selected", audit)
    names = [label.get_text() for label in share.figure.axes[0].get_yticklabels()]
    names += [panel.get_title("left") for panel in histogram.figure.axes]
    assert {f"{n}" * 15 + "…" + f"{n}" * 15 for n in range(len(parts))} <= set(names)
    assert max(map(len, names)) == 31
