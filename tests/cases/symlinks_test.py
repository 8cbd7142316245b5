"""A link into its own folder has no file read twice."""

from salt_jax.preparation.text_files import TextFiles


def test_a_link_into_its_own_folder(case, capsys):
    folder = case("symlinks")
    (folder / "loop/v1/self").symlink_to(".")
    files = TextFiles(train=f"{folder}/loop/**/*.jsonl").files("train")
    assert files == [folder / "loop/v1/a.jsonl"]
    assert "names left out: 1, such as" in capsys.readouterr().out
    (folder / "second").symlink_to("loop")
    both = TextFiles(train=(f"{folder}/loop/v1/*.jsonl", f"{folder}/second/v1/*.jsonl"))
    assert both.files("train") == [folder / "loop/v1/a.jsonl"]
