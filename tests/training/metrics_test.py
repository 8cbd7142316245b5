"""Records in metrics.jsonl, whole and cut short."""

import json
import pathlib

from salt_jax.training.metrics import MetricWriter, recorded


def test_the_newest_record_of_a_step_is_found(tmp_path: pathlib.Path) -> None:
    assert recorded(tmp_path, "eval", 4) is None
    with MetricWriter(tmp_path) as writer:
        for kind, step, value in (("eval", 4, 1.0), ("train", 4, 2.0), ("eval", 4, 3.0)):
            writer.write({"kind": kind, "step": step, "value": value, "by_subset": {"a": {}}})
        writer.write({"kind": "eval", "step": 40, "value": 5.0})
    assert recorded(tmp_path, "eval", 4) == {
        **{"kind": "eval", "step": 4, "value": 3.0, "by_subset": {"a": {}}}
    }
    assert recorded(tmp_path, "train", 40) is None


def test_a_record_that_was_cut_short_is_none(tmp_path: pathlib.Path) -> None:
    """Also where what is left of it ends in a brace."""
    whole = json.dumps({"kind": "eval", "step": 1, "by_subset": {"a": {"tokens": 3}}})
    for cut in (whole[:-1], whole[:-3], whole[:20]):
        (tmp_path / "metrics.jsonl").write_text(f"{whole}\n{cut}")
        assert recorded(tmp_path, "eval", 1) == json.loads(whole)
        (tmp_path / "metrics.jsonl").write_text(cut)
        assert recorded(tmp_path, "eval", 1) is None
