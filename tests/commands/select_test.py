"""`salt select` from scores on disk: which score, what is refused, and the audit."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from salt_jax.data.features import make_row
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.row_scores import RowScores, Selection, targets_hash
from salt_jax.main import main
from tests.written_cache import write_rows

ROWS = 48
TOP = ("--gin_file=methods/top_rows.gin", "--gin.ROWS=12")


@pytest.fixture(scope="module")
def columns(cache: PackedCache) -> dict[str, np.ndarray]:
    """Columns that are each in an order of its own."""
    rng = np.random.default_rng(0)
    rows = cache.split("train").__getitems__(range(ROWS))
    names = ("median_drop_k3", "median_zero_k3", "mean_k3", "median_drop_k5", "log_perplexity")
    hashes = [targets_hash(row["targets"], row["segment_ids"]) for row in rows]
    return {
        **{name: rng.permutation(ROWS).astype(np.float32) / 10 for name in names},
        "learnable_k3": np.linspace(0, 1, ROWS, dtype=np.float32),
        "subset": np.array([row["subset"] for row in rows], np.uint16),
        "targets_hash": np.array(hashes, np.uint64),
    }


@pytest.fixture
def made(
    cache: PackedCache,
    columns: dict[str, np.ndarray],
    write_scores: Callable[..., RowScores],
    tmp_path: pathlib.Path,
) -> Callable[..., pathlib.Path]:
    def write(name: str = "scores", **changes: Any) -> pathlib.Path:
        settings = {"cache_digest": cache.digest, "ks": (3, 5), "columns": columns, **changes}
        return write_scores(tmp_path / name, np.zeros(ROWS), **settings).path

    return write


@pytest.fixture
def select(cache: PackedCache, tmp_path: pathlib.Path) -> Callable[..., int]:
    def run(*flags: str, name: str = "out") -> int:
        output = f"--output_dir={tmp_path / name}"
        return main(["select", f"--cache={cache.path}", *flags, output])

    return run


def highest(scores: np.ndarray, m: int = 12) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:m].tolist())


@pytest.mark.parametrize(
    ("flags", "column"),
    [
        (["--k=3"], "median_drop_k3"),
        (["--k=5"], "median_drop_k5"),
        (["--k=3", "--unlearnable=zero"], "median_zero_k3"),
        (["--k=3", "--statistic=mean"], "mean_k3"),
        (["--k=5", "--statistic=perplexity"], "log_perplexity"),
        (["--k=5", "--statistic=mean_k3"], "mean_k3"),
    ],
)
def test_the_score_asked_for(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    flags: list[str],
    column: str,
) -> None:
    scores = made(cost={"flops": 7.0, "tokens": 9})
    assert select(*TOP, f"--scores={scores}", *flags) == 0
    chosen = Selection.open(tmp_path / "out")
    assert chosen.row_ids.tolist() == highest(columns[column])
    assert chosen.manifest["cut"] == pytest.approx(columns[column][chosen.row_ids].min())
    assert chosen.manifest["scoring_cost"]["flops"] == 7.0
    assert chosen.manifest["how"] == {"rule": "TopRows", "m": 12}
    assert chosen.manifest["score"]["k"] == int(flags[0][-1])


def test_what_a_scorer_has_learned_since(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    early = made("early", cost={"flops": 7.0, "tokens": 9})
    now = {**columns, "median_drop_k3": np.linspace(3, 0, ROWS, dtype=np.float32)}
    now["median_drop_k3"][5] = -np.inf
    later = made("later", columns=now, cost={"flops": 8.0, "tokens": 9})
    flags = (*TOP, f"--scores={early}", f"--later_scores={later}", "--k=3")
    assert select(*flags) == 0
    chosen = Selection.open(tmp_path / "out")
    learned = columns["median_drop_k3"] - now["median_drop_k3"]
    learned[5] = -np.inf
    assert chosen.row_ids.tolist() == highest(learned)
    assert chosen.manifest["scoring_cost"]["flops"] == 15.0
    assert chosen.manifest["how"]["later_scores"] == RowScores.open(later).digest[:12]

    of_k3 = {name: values for name, values in columns.items() if not name.endswith("k5")}
    other = made("other", ks=(3,), columns=of_k3)
    assert select(*flags[:-1], "--k=5", f"--later_scores={other}") == 2
    assert "k is 5" in capfd.readouterr().err
    rows = ("--gin_file=methods/random_rows.gin", "--gin.ROWS=3", f"--later_scores={later}")
    assert select(*rows, name="random") == 2
    assert "later_scores is" in capfd.readouterr().err
    assert not (tmp_path / "random").exists()


def test_of_near_duplicates_the_best_is_selected(
    cache: PackedCache,
    write_scores: Callable[..., RowScores],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """24 rows, then the same with another token at the end, of which every second is better."""
    rng, ones = np.random.default_rng(0), np.ones(64)
    tokens = rng.integers(3, 250, (24, 64))
    changed = np.pad(tokens[:, :-1], ((0, 0), (0, 1)), constant_values=2)
    rows = [make_row(row, ones, ones, 0, i) for i, row in enumerate([*tokens, *changed])]
    write_rows(
        tmp_path / "twice",
        {"train": rows},
        vocabulary=cache.vocabulary,
        sequence_length=64,
        subsets=cache.subsets,
    )
    twice = PackedCache.open(tmp_path / "twice")
    first, better = rng.permutation(24) / 10, np.arange(24) % 2 * 0.1 - 0.05
    scores_N = np.concatenate([first, first + better])
    scores = write_scores(tmp_path / "scores", scores_N, cache_digest=twice.digest).path
    flags = ("select", f"--cache={twice.path}", f"--output_dir={tmp_path / 'out'}")
    near = "--near_duplicates=0.6"
    assert main([*flags, *TOP, f"--scores={scores}", near]) == 0
    chosen = Selection.open(tmp_path / "out")
    best = np.where(better > 0, np.arange(24, 48), np.arange(24))
    assert chosen.row_ids.tolist() == sorted(best[np.argsort(-first)[:12]])
    assert chosen.manifest["how"]["near_duplicates"] == 0.6
    assert "24 of 48 rows have a near-duplicate" in capfd.readouterr().out
    whole = [f"--scores={scores}", "--gin.ROWS=25", f"--output_dir={tmp_path / 'more'}", near]
    assert main([*flags[:2], *TOP[:1], *whole]) == 2
    assert "only 24 of 48 rows" in capfd.readouterr().err


def test_rows_with_few_learnable_tokens_are_not_selected(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
) -> None:
    assert select(*TOP, f"--scores={made()}", "--k=3", "--min_learnable_fraction=0.5") == 0
    scores = np.where(columns["learnable_k3"] < 0.5, -np.inf, columns["median_drop_k3"])
    assert Selection.open(tmp_path / "out").row_ids.tolist() == highest(scores)


def test_bad_input_is_named(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    make_cache: Callable[..., PackedCache],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = f"--scores={made()}"
    other = make_cache(seed=3)
    stranger = selection_of(tmp_path / "stranger", other.digest)
    others = made("others", cache_digest="e" * 64)
    for flags, words in (
        ((*TOP, scores), "The scores are of k = 3, 5: add --k"),
        ((*TOP, scores, "--k=4"), "k is 4, and the scores are of k = 3, 5"),
        ((*TOP, scores, "--k=3", "--statistic=mode"), "statistic is 'mode'"),
        ((*TOP, f"--scores={others}", "--k=3"), "belong to the cache"),
        ((*TOP, scores, "--k=3", f"--compare={stranger}"), "belong to the cache"),
        ((*TOP,), "The rule TopRows needs scores: add --scores=FOLDER"),
        (
            ("--gin_file=methods/random_rows.gin", "--gin.ROWS=5", "--gin.STRATIFIED=True"),
            "scores say of which subset each row is: add --scores=FOLDER",
        ),
        (("--gin_file=methods/random_like.gin", f"--gin.LIKE='{stranger}'"), "belong to the cache"),
    ):
        assert select(*flags) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_audit_of_a_stratified_selection_shows_each_subsets_cut(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    cache: PackedCache,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert select(*TOP, f"--scores={made()}", "--k=3", "--gin.STRATIFIED=True") == 0
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    ids = Selection.open(tmp_path / "out").row_ids
    assert audit["stratified"]
    printed = capsys.readouterr().out
    for index, name in enumerate(cache.subsets):
        own = columns["median_drop_k3"][ids[columns["subset"][ids] == index]]
        assert audit["by_subset"][name]["lowest_kept"] == pytest.approx(own.min())
        assert f"{own.min():.3f}" in printed
        for group in ("cut_kept", "cut_left_out"):
            assert name in [row["subset"] for row in audit["examples"][group]]


def selection_of(folder: pathlib.Path, cache_digest: str) -> pathlib.Path:
    return Selection.write(
        folder, np.arange(3), cache_digest=cache_digest, split="train", how={"rule": "x"}
    ).path


def test_nan_scores_are_counted_and_refused_unless_they_are_allowed(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = columns["mean_k3"].copy()
    broken[[4, 9]] = np.nan
    broken[5] = 99.0
    scores = f"--scores={made(columns={**columns, 'mean_k3': broken})}"
    flags = (*TOP, scores, "--k=3", "--statistic=mean")
    assert select(*flags) == 2
    assert "2 of the 48 rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert select(*flags, "--allow_nan=True") == 0
    ids = Selection.open(tmp_path / "out").row_ids.tolist()
    assert 5 in ids
    assert not {4, 9} & {*ids}


def test_strata_and_a_random_control_of_the_same_size(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
) -> None:
    scores = f"--scores={made()}"
    fraction = ("--gin_file=methods/top_fraction.gin", "--gin.FRACTION=0.25", "--k=3", scores)
    assert select(*fraction, "--gin.STRATIFIED=True") == 0
    chosen = Selection.open(tmp_path / "out")
    counts = np.bincount(columns["subset"])
    taken = np.bincount(columns["subset"][chosen.row_ids])
    assert chosen.manifest["rows"] == 12
    assert abs(taken - counts / 4).max() < 1
    like = ("--gin_file=methods/random_like.gin", f"--gin.LIKE='{tmp_path / 'out'}'")
    assert select(*like, name="control") == 0
    assert select(*like, scores, "--k=3", name="audited") == 0
    control, audited = (Selection.open(tmp_path / name) for name in ("control", "audited"))
    assert control.row_ids.tolist() == audited.row_ids.tolist() != chosen.row_ids.tolist()
    for one in (control, audited):
        assert one.manifest["rows"] == 12
        assert one.manifest["scores_digest"] is one.manifest["score"] is None
        assert one.manifest["scoring_cost"]["flops"] == 0
        assert one.manifest["how"]["rule"] == "RandomRows"
        assert one.manifest["cut"] is None


def test_the_audit_says_what_was_taken(
    cache: PackedCache,
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = f"--scores={made()}"
    assert select(*TOP, scores, "--k=5", name="other_k") == 0
    assert select(*TOP, scores, "--k=3", f"--compare={tmp_path / 'other_k'}") == 0
    text = capsys.readouterr().out
    for word in ("prose", "code", "all rows", "25.00%", "Jaccard", "other_k"):
        assert word in text
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    ids = highest(columns["median_drop_k3"])
    for index, name in enumerate(cache.subsets):
        part, mine = audit["by_subset"][name], np.array(columns["subset"][ids]) == index
        assert part["kept"] == mine.sum()
        assert part["rows"] == (columns["subset"] == index).sum()
        expected = columns["log_perplexity"][ids][mine].mean()
        assert part["log_perplexity_kept"] == pytest.approx(expected, rel=1e-6)
    assert audit["whole"]["learnable_kept"] == pytest.approx(columns["learnable_k3"][ids].mean())
    shared = len({*ids} & {*highest(columns["median_drop_k5"])})
    assert audit["overlaps"][0]["jaccard"] == pytest.approx(shared / (24 - shared))
    assert audit["overlaps"][0]["score"]["k"] == 5
    hashes = columns["targets_hash"]
    assert audit["duplicates"]["all"] == ROWS - len({*hashes.tolist()})
    assert audit["ties"] == {"rows": 1, "kept": 1}
    assert audit["duplicates"]["kept"] == 12 - len({*hashes[ids].tolist()})
    best = audit["examples"]["highest"][0]
    row = int(np.argmax(columns["median_drop_k3"]))
    assert (best["row_id"], best["score"]) == (row, pytest.approx(4.7))
    assert best["subset"] == cache.subsets[columns["subset"][row]]
    assert cache.vocabulary.decode(cache.split("train")[row]["targets"][-4:]) in best["text"]
    lengths = {name: len(rows) for name, rows in audit["examples"].items()}
    expected_lengths = {"highest": 12, "lowest_kept": 12, "cut_kept": 10, "cut_left_out": 10}
    assert lengths == {**expected_lengths, "lowest": 20}
    assert audit["examples"]["cut_kept"][0]["row_id"] == min(
        ids, key=lambda i: columns["median_drop_k3"][i]
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(summary["by_subset"].values()) == 12


def test_a_random_control_without_scores_is_audited_from_its_rows(
    select: Callable[..., int],
    columns: dict[str, np.ndarray],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    control = ("--gin_file=methods/random_rows.gin", "--gin.ROWS=30")
    assert select(*control) == 0
    ids = Selection.open(tmp_path / "out").row_ids
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["by_subset"]["code"]["kept"] == (columns["subset"][ids] == 1).sum()
    assert audit["by_subset"]["code"]["rows"] == (columns["subset"] == 1).sum()
    hashes = columns["targets_hash"][ids]
    assert audit["duplicates"] == {"kept": 30 - len({*hashes.tolist()})}
    assert len(audit["examples"]["sample"]) == 20
    monkeypatch.setattr("salt_jax.commands.select._MOST_ROWS_READ", 29)
    assert select(*control, name="many") == 0
    assert "Figures by subset are unknown" in capsys.readouterr().out
    assert json.loads((tmp_path / "many" / "audit.json").read_text())["by_subset"] == {}


def test_selecting_again_gives_the_same_bytes(
    made: Callable[..., pathlib.Path], select: Callable[..., int], tmp_path: pathlib.Path
) -> None:
    scores = f"--scores={made()}"
    for name in ("a", "b"):
        assert select(*TOP, scores, "--k=3", name=name) == 0
    for file in ("row_ids.npy", "manifest.json", "audit.json", "COMPLETED"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_selection_of_a_version_with_fewer_settings_is_made_again(
    made: Callable[..., pathlib.Path],
    select: Callable[..., int],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = (*TOP, f"--scores={made()}", "--k=3")
    assert select(*flags) == 0
    config = tmp_path / "out" / "config.gin"
    new = re.compile("most_of_subset|later_scores|near_dupl", re.IGNORECASE)
    older = [line for line in config.read_text().splitlines() if not new.search(line)]
    assert len(older) == len(config.read_text().splitlines()) - 4
    config.write_text("\n".join(older) + "\n")
    assert select(*flags) == 0
    config.write_text("\n".join(older) + "\n")
    assert select(*flags, "--gin.MOST_OF_SUBSET=0.9") == 2
    assert "MOST_OF_SUBSET was unset and is now 0.9" in capfd.readouterr().err
