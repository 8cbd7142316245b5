"""Tables: what stands in their cells."""

import math

import pandas as pd
import pytest

from salt_jax.reporting import tables
from salt_jax.reporting.comparison import FLOPS, SECONDS, STEPS, Matched
from salt_jax.reporting.runs import FLOPS_PARTS, QUALITY, read_folders


def test_final_table(tmp_path, folders):
    runs = read_folders(folders.experiment(tmp_path)).runs
    table = tables.final_table(runs)
    cells = dict(zip(table.columns, table.rows[3], strict=True))
    assert cells["arm"] == "salt"
    assert cells["steps"] == "750"
    assert cells["log-perplexity"] == tables.format_nats(runs[3].final["log_perplexity"])
    assert cells["next-token accuracy"].endswith("%")
    assert cells["train FLOPs"].endswith("× 10¹³")
    assert cells["tokens"] == "3,072,000"
    assert cells["skipped updates"] == "0"
    assert table.note == ""


def test_final_table_says_which_runs_go_on(tmp_path, folders):
    runs = read_folders([folders.run(tmp_path / "going", [folders.training(5)])]).runs
    table = tables.final_table(runs)
    assert "going" in table.note
    assert table.rows[0][:3] == ("going", "5", tables.NOTHING)


def test_matched_table_marks_what_was_interpolated():
    columns = ["step", *QUALITY, "train_flops", "seconds", "interpolated", *FLOPS_PARTS]
    nan = math.nan
    readings = {
        "baseline": [200, 3.6, 0.34, 2e13, 40.0, 0, nan, nan, nan, 0],
        "salt": [150.0, 3.5, 0.351, 2e13, 30.0, 1, 1.9e13, 0.1e13, 0, 0],
        "late": [nan] * 10,
    }
    found = Matched(FLOPS, 2e13, pd.DataFrame.from_dict(readings, "index", columns=columns))
    table = tables.matched_table(found)
    assert "2.000 × 10¹³" in table.title
    assert table.rows == (
        ("baseline", "3.600", "34.00%", "200", "2.000 × 10¹³", "–", "40.0 s"),
        ("salt", "3.500", "35.10%", "≈ 150", "2.000 × 10¹³", "95.0 + 5.0 + 0.0", "30.0 s"),
        ("late", *["–"] * 6),
    )
    assert "student + teacher + scoring (%)" in table.columns
    assert "interpolated linearly" in table.note


def test_subset_table_puts_the_largest_subset_first(tmp_path, folders):
    runs = read_folders(folders.experiment(tmp_path)).runs
    table = tables.subset_table(runs)
    assert table.columns[2:] == ("slm", "baseline", "rkd", "salt", "salt_ds")
    assert [row[:2] for row in table.rows] == [
        ("Github", "22,000"),
        ("Wikipedia (en)", "9,000"),
        ("PubMed Abstracts", "4,000"),
    ]
    assert "%" in table.rows[0][2]


def test_no_subset_table_for_one_subset(tmp_path, folders):
    result = {"log_perplexity": 4.0, "next_token_accuracy": 0.3, "tokens": 9}
    lines = [folders.evaluation(1, by_subset={"all": result})]
    assert tables.subset_table(read_folders([folders.run(tmp_path / "run", lines)]).runs) is None


def test_scores_and_selections(tmp_path, folders):
    scores = folders.scores(tmp_path / "scores", rows=970)
    folders.selection(tmp_path / "selected", scores, rows=100)
    material = read_folders([tmp_path / "scores", tmp_path / "selected"])
    assert tables.scores_table(material.scores).rows[0][:3] == ("scores", "970", "10")
    row = tables.selections_table(material.selections).rows[0]
    assert row[:2] == ("selected", "100")
    assert row[2] == f"{material.selections[0].cut:.3f}"
    assert "TopRows" in row[3]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (tables.format_seconds(59.96), "60.0 s"),
        (tables.format_seconds(1200), "20.0 min"),
        (tables.format_seconds(9e5), "250.0 h"),
        (tables.format_power(1.2345e-3), "1.234 × 10⁻³"),
        (tables.format_power(0.0), "0"),
        (tables.format_share(0.5899), "58.99%"),
        (tables.format_nats(math.nan), "not finite"),
        (tables.format_cost(STEPS, 1234), "1,234"),
        (tables.format_cost(SECONDS, 30), "30.0 s"),
    ],
)
def test_formats(shown, expected):
    assert shown == expected


def test_a_row_has_a_cell_for_each_column():
    with pytest.raises(ValueError, match="2 cells under 1 heads"):
        tables.Table("T", ("a",), (("1", "2"),))
