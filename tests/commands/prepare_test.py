"""`salt prepare`: the cache holds the text, splits stay apart, bad input leaves no cache behind."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from salt_jax.commands import prepare as prepare_verb
from salt_jax.data.packed_cache import PackedCache
from salt_jax.data.vocabularies import ByteVocabulary, HuggingFaceVocabulary
from salt_jax.errors import InputError
from salt_jax.main import main
from salt_jax.preparation import text_files
from salt_jax.preparation.file_patterns import names_of
from salt_jax.preparation.own_text import own_text
from salt_jax.preparation.pile import pile_files
from salt_jax.preparation.registered_task import RegisteredTask
from salt_jax.preparation.text_files import TextFiles
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary
from salt_jax.storage.manifests import COMPLETED_FILE, MANIFEST_FILE
from salt_jax.storage.run_folder import RunFolder
from tests.run_settings import prepare_settings

MINIPILE = pathlib.Path(__file__).parents[2].joinpath("../shared/data/minipile").resolve()
TEXTS = [f"def f{number}(x):\n\treturn x + {number}  # né\n" * 3 for number in range(80)]


def prepare(run, **settings):
    """`salt prepare` with flat settings."""
    prepare_verb.prepare(run, **prepare_settings(**settings))


@dataclasses.dataclass
class _Corpus:
    folder: pathlib.Path

    @property
    def files(self) -> TextFiles:
        return TextFiles(train=f"{self.folder}/*.jsonl", validation_fraction=0.2, test_fraction=0.1)

    def add(self, line: str) -> None:
        with open(self.folder / "0.jsonl", "a") as file:
            file.write(line + "\n")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus = _Corpus(folder)
    for number, text in enumerate(TEXTS):
        corpus.add(json.dumps({"text": text, "subset": ["code", "prose"][number % 2]}))
    return corpus


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "cache", "prepare")


def _text_of(cache, split):
    """All the text of a split cut at document ends, from rows in any order (whole documents)."""
    texts = []
    for row in cache.split(split):
        for segment in range(1, row["segment_ids"].max() + 1):
            ids = row["targets"][row["segment_ids"] == segment]
            assert ids[-1] == cache.vocabulary.eos_id
            texts.append(cache.vocabulary.decode(ids))
    return texts


@pytest.mark.parametrize(
    "vocabulary", [ByteVocabulary(reserved=2), TrainedVocabulary(size=320, reserved=2)]
)
def test_the_cache_holds_the_text(corpus, run, vocabulary, capsys):
    prepare(
        run,
        task=corpus.files,
        vocabulary=vocabulary,
        sequence_length=512,
        packing="whole_documents",
        shards=2,
    )
    cache = PackedCache.open(run.path)
    cache.verify()
    texts = {split: _text_of(cache, split) for split in cache.split_names}
    assert sorted(text for part in texts.values() for text in part) == sorted(TEXTS)
    for split in cache.split_names:
        expected = [document.text for document in corpus.files.documents(split)]
        assert sorted(texts[split]) == sorted(expected)
        info = cache.manifest["splits"][split]
        assert info["documents"] == len(expected)
        assert info["bytes"] == sum(len(text.encode()) for text in expected)
    assert len(cache.vocabulary.reserved_ids) == 2
    assert cache.subsets == ("code", "prose")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["digest"] == cache.digest
    assert summary["splits"]["train"]["tokens"] == cache.manifest["splits"]["train"]["tokens"]
    assert "train" in (printed := capsys.readouterr().out)
    assert "prose" in printed


def test_concatenated_rows_hold_every_token(corpus, run):
    prepare(run, task=corpus.files, vocabulary=ByteVocabulary(), sequence_length=64)
    cache = PackedCache.open(run.path)
    rows = list(cache.split("train"))
    tokens = np.concatenate([row["targets"][row["segment_ids"] > 0] for row in rows])
    documents = [document.text for document in corpus.files.documents("train")]
    expected = [i for text in documents for i in [*cache.vocabulary.encode(text), 1]]
    assert sorted(tokens) == sorted(expected)
    assert cache.manifest["splits"]["train"]["tokens"] == len(tokens) - len(rows)


def test_the_same_input_and_seed_give_the_same_bytes(corpus, tmp_path):
    digests = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(
            RunFolder(tmp_path / name, "prepare"),
            task=corpus.files,
            vocabulary=TrainedVocabulary(size=320),
            seed=seed,
        )
        digests[name] = PackedCache.open(tmp_path / name).digest
    assert digests["a"] == digests["b"] != digests["c"]
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def _files(folder):
    names = {"run.json", "summary.json"}  # these hold times
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_finished_cache_is_not_made_again_but_shown(corpus, run, capsys):
    settings = {"task": corpus.files, "vocabulary": ByteVocabulary()}
    prepare(run, **settings)
    written = (run.path / MANIFEST_FILE).stat().st_mtime_ns
    prepare(run, **settings)
    assert "nothing was prepared" in capsys.readouterr().out
    prepare(run, show=2)
    printed = capsys.readouterr().out
    assert "train row 1" in printed
    assert "return x" in printed
    assert "subset: code" in printed
    assert (run.path / MANIFEST_FILE).stat().st_mtime_ns == written
    corpus.add(json.dumps({"text": "changed"}))
    with pytest.raises(InputError, match=r"made when 0\.jsonl was another file"):
        prepare(run, **settings)


@pytest.fixture
def looked(monkeypatch):
    """The patterns that were looked up."""
    patterns = []

    def counted(pattern, left_out):
        patterns.append(pattern)
        return names_of(pattern, left_out)

    monkeypatch.setattr(text_files, "names_of", counted)
    return patterns


@pytest.mark.parametrize("place", ["the disk", "gs", "s3"])
def test_a_pattern_is_looked_up_once(place, corpus, run, bucket, looked):
    """In a bucket that is a call for every thousand files, whatever the splits."""
    task = dataclasses.replace(corpus.files, skip_broken_lines=True)
    if place != "the disk":
        pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[place])
        bucket.store("bucket/text/0.jsonl", (corpus.folder / "0.jsonl").read_bytes())
        task = dataclasses.replace(task, train=f"{place}://bucket/text/*.jsonl")
    prepare(run, task=task, vocabulary=TrainedVocabulary(size=300), workers=1)
    assert looked == list(task.train)
    assert bucket.asked["list"] == (place != "the disk")
    looked.clear()
    prepare(run, task=task, vocabulary=TrainedVocabulary(size=300), workers=1)
    assert looked == list(task.train)


def test_own_text_is_looked_up_once(tmp_path, run, looked, monkeypatch):
    (tmp_path / "a.md").write_text("".join(f"# {number}\n" for number in range(3000)))
    monkeypatch.setenv("SALT_TEXT", f"{tmp_path}/*.md")
    task = own_text(skip_broken_lines=True)
    prepare(run, task=task, vocabulary=ByteVocabulary(), workers=1)
    assert len(looked) == 1


def test_broken_lines_are_refused_or_counted(corpus, run):
    corpus.add('{"text": ')
    settings = {"task": corpus.files, "vocabulary": ByteVocabulary()}
    with pytest.raises(InputError, match=r"0\.jsonl, line 81: this is not JSON"):
        prepare(run, **settings)
    assert not (run.path / MANIFEST_FILE).exists()
    prepare(run, **settings, skip_broken_lines=True)
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["broken_lines"] == {"0.jsonl": 1}


def test_splits_of_separate_files_share_no_text(corpus, run, tmp_path, capsys):
    held_out = {"validation": [TEXTS[0], TEXTS[1], "new"], "test": [TEXTS[1], "newer"]}
    for split, texts in held_out.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    corpus.add(json.dumps({"text": TEXTS[0]}))
    patterns = {split: f"{tmp_path}/{split}.jsonl" for split in held_out}
    files = TextFiles(train=f"{corpus.folder}/*", **patterns)
    settings = {"vocabulary": ByteVocabulary(), "sequence_length": 512}
    prepare(run, task=files, packing="whole_documents", **settings)
    cache = PackedCache.open(run.path)
    assert sorted(_text_of(cache, "test")) == sorted(held_out["test"])
    assert sorted(_text_of(cache, "validation")) == sorted([TEXTS[0], "new"])
    assert sorted(_text_of(cache, "train")) == sorted(TEXTS[2:])
    summary = json.loads((run.path / "summary.json").read_text())
    shared = {split: info["shared_documents"] for split, info in summary["splits"].items()}
    assert shared == {"train": 3, "validation": 1, "test": 0}
    assert summary["splits"]["train"]["documents"] == 78
    assert "Left 3 documents out of train" in capsys.readouterr().out
    everything = TextFiles(train=f"{tmp_path}/test.jsonl", test=f"{corpus.folder}/*")
    corpus.add(json.dumps({"text": "newer"}))
    with pytest.raises(InputError, match="Every text of the train split"):
        prepare(RunFolder(tmp_path / "b", "prepare"), task=everything, **settings)


def _bad_row(corpus):
    corpus.add('{"content": "no text"}')
    return {}


def _empty_corpus(corpus):
    (corpus.folder / "0.jsonl").write_text("")
    return {}


def _truncated(corpus):
    data = zstandard.ZstdCompressor().compress((corpus.folder / "0.jsonl").read_bytes())
    (corpus.folder / "1.jsonl.zst").write_bytes(data[:-20])
    return {"task": TextFiles(train=f"{corpus.folder}/*")}


def _unknown_subset(corpus):
    return {"task": dataclasses.replace(corpus.files, subsets=("Github", "ArXiv"))}


BAD_INPUT = {
    "no such file": (lambda _: {"task": TextFiles(train="none/*.zst")}, "No file matches"),
    "empty corpus": (_empty_corpus, "no text to train on"),
    "no text": (_bad_row, r"0\.jsonl, line 81: this row has no `text`"),
    "truncated": (_truncated, r"1\.jsonl\.zst is cut short"),
    "unknown subset": (_unknown_subset, "line 1: the subset name 'code', expected one of the 2"),
    "no task": (lambda _: {"task": None}, "No task was given"),
    "no vocabulary": (lambda _: {"vocabulary": None}, "No vocabulary was given"),
    "packing": (lambda _: {"packing": "tight"}, "packing is 'tight', expected one of concat"),
    "length": (lambda _: {"sequence_length": 1}, "sequence_length is 1 and must be at least 2"),
    "shards": (lambda _: {"shards": 0}, "shards is 0"),
    "show": (lambda _: {"show": -1}, "show is -1"),
    "broken line": (lambda c: c.add("{") or {}, r"0\.jsonl, line 81: this is not JSON"),
    "unknown task": (lambda _: {"task": RegisteredTask("none"), "vocabulary": None}, "no task"),
    "runner": (lambda _: {"runner": "cloud"}, "runner is 'cloud', expected one of local"),
    "workers": (lambda _: {"workers": 0}, "workers is 0"),
    "verify": (lambda _: {"verify": True}, "cache does not exist"),
    "little text": (lambda _: {"vocabulary": TrainedVocabulary()}, "too little for a vocabulary"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(corpus, run, what):
    spoil, words = BAD_INPUT[what]
    settings = {"task": corpus.files, "vocabulary": ByteVocabulary(), **spoil(corpus)}
    with pytest.raises(InputError, match=words) as caught:
        prepare(run, **settings)
    assert "\n" not in str(caught.value)
    assert not run.path.exists()


def _tree(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("verb", [None, "train", "damaged"])
def test_a_folder_of_something_else_is_left_as_it_is(corpus, tmp_path, verb):
    for name in ("train/00.jsonl.zst", "validation/notes", "test/a", "vocabulary/words"):
        (tmp_path / "pile" / name).parent.mkdir(parents=True)
        (tmp_path / "pile" / name).write_text(name)
    if verb is not None:
        text = "{" if verb == "damaged" else json.dumps({"verb": verb})
        (tmp_path / "pile" / "run.json").write_text(text)
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="is not empty and holds no run of `salt prepare`"):
        prepare(
            RunFolder(tmp_path / "pile", "prepare"),
            task=corpus.files,
            vocabulary=ByteVocabulary(),
        )
    assert _tree(tmp_path) == before


def test_the_text_is_never_in_the_output_folder(corpus, run):
    prepare(run, task=corpus.files, vocabulary=ByteVocabulary())
    (run.path / COMPLETED_FILE).unlink()
    (run.path / "train" / "mine.jsonl").write_text(json.dumps({"text": "mine"}))
    before = _tree(run.path)
    files = TextFiles(train=(f"{corpus.folder}/*", f"{run.path}/train/*.jsonl"))
    with pytest.raises(InputError, match=r"mine\.jsonl is text to prepare and lies in the output"):
        prepare(run, task=files, vocabulary=ByteVocabulary())
    assert _tree(run.path) == before


def test_an_output_folder_that_is_a_file_is_refused_before_reading(corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    corpus.add("{")  # reading would fail
    with pytest.raises(InputError, match="file is a file"):
        prepare(
            RunFolder(tmp_path / "file" / "cache", "prepare"),
            task=corpus.files,
            vocabulary=ByteVocabulary(),
        )


def test_a_half_written_cache_is_made_again_with_other_settings(corpus, tmp_path):
    run = RunFolder(tmp_path / "cache", "prepare", config=lambda: "prepare.prepare.seed = 0\n")
    prepare(run, task=corpus.files, vocabulary=ByteVocabulary())
    (run.path / COMPLETED_FILE).unlink()
    again = dataclasses.replace(run, config=lambda: "prepare.prepare.seed = 1\n")
    prepare(again, task=corpus.files, vocabulary=ByteVocabulary(), seed=1)
    assert PackedCache.open(run.path).manifest["seed"] == 1
    assert "seed = 1" in (run.path / "config.gin").read_text()


def test_a_summary_that_was_never_written_is_made_up_for(corpus, run):
    corpus.add("{")
    settings = {"task": corpus.files, "vocabulary": ByteVocabulary(), "skip_broken_lines": True}
    prepare(run, **settings)
    expected = json.loads((run.path / "summary.json").read_text())
    (run.path / "summary.json").unlink()
    prepare(run, **settings)
    assert json.loads((run.path / "summary.json").read_text()) == {
        **expected,
        "seconds": None,
        "tokens_per_second": None,
    }


def test_a_finished_cache_is_verified(corpus, run, capsys):
    prepare(run, task=corpus.files, vocabulary=ByteVocabulary())
    prepare(run, verify=True)
    assert "every shard has the digest" in capsys.readouterr().out
    shard = next(run.path.glob("train/*.array_record"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="rows-00000-of-00001"):
        prepare(run, verify=True)


def test_two_files_of_one_name_are_no_change(corpus, run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.jsonl").write_text(json.dumps({"text": "held out"}))
    files = TextFiles(train=f"{corpus.folder}/*", validation=f"{tmp_path}/other/*")
    for _ in range(2):
        prepare(run, task=files, vocabulary=ByteVocabulary())
    corpus.add(json.dumps({"text": "changed"}))
    with pytest.raises(InputError, match=r"made when 0\.jsonl was another file"):
        prepare(run, task=files, vocabulary=ByteVocabulary())


WITHOUT_THE_EXTRA = """
import importlib.abc, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {"tensorflow", "seqio", "tensorflow_datasets", "pyarrow", "zstandard"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from salt_jax.commands.prepare import prepare
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.errors import InputError
from salt_jax.preparation import own_text, pile, readers, registered_task
from salt_jax.preparation.runners import JobRunner
from salt_jax.preparation.text_files import TextFiles
from salt_jax.storage.run_folder import RunFolder

prepare(RunFolder(pathlib.Path(sys.argv[1]), "prepare"), show=1, verify=True)
new = pathlib.Path(sys.argv[2])
tasks = [TextFiles(train=pattern) for pattern in sys.argv[3:]]
for task in [*tasks, registered_task.RegisteredTask("pile", module="salt_jax.tasks.pile")]:
    vocabulary = ByteVocabulary() if isinstance(task, TextFiles) else None
    try:
        run, jobs = RunFolder(new, "prepare"), JobRunner(workers=1)
        prepare(run, task=task, vocabulary=vocabulary, jobs=jobs)
        print("prepared")
        (new / "COMPLETED").unlink()
    except InputError as error:
        print(error)
"""


def test_text_and_finished_caches_need_no_extra(cache, corpus, tmp_path):
    (corpus.folder / "1.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    patterns = [f"{corpus.folder}/{name}" for name in ("*.jsonl", "*.zst")]
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA, str(cache.path), str(tmp_path / "new")]
    result = subprocess.run([*command, *patterns], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train row 0" in result.stdout
    assert "prepared" in result.stdout
    for library in ("zstandard", "seqio"):
        words = f"library {library}, which is not installed: pip install 'salt_jax[prepare]'"
        assert words in result.stdout
    assert result.stdout.count("prepared") == 1 + result.stdout.count("nothing was prepared")


@pytest.mark.parametrize("text", ["lines", "one line"])
def test_very_little_text_fills_every_split(run, tmp_path, monkeypatch, text):
    (tmp_path / "notes").mkdir()
    for number in range(5):
        body = "\n".join(f"{number} and {line}: " + "words " * line for line in range(80))
        if text == "one line":
            body = f"note {number}"
        (tmp_path / "notes" / f"{number}.md").write_text(body)
    monkeypatch.setenv("SALT_TEXT", f"{tmp_path}/notes/*.md")
    prepare(
        run,
        task=own_text(),
        vocabulary=ByteVocabulary(),
        packing="whole_documents",
        sequence_length=4096,
    )
    cache = PackedCache.open(run.path)
    assert cache.split_names == ("train", "validation", "test")
    texts = {split: set(_text_of(cache, split)) for split in cache.split_names}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert len(texts["train"]) >= 3


def test_a_full_disk_is_noticed_before_writing(corpus, run, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="choose another --output_dir, or make room"):
        prepare(run, task=corpus.files, vocabulary=ByteVocabulary())
    assert not (run.path / COMPLETED_FILE).exists()


def test_a_registered_task_has_its_vocabulary(corpus, run, monkeypatch, tmp_path):
    monkeypatch.setenv("SALT_TEXT", f"{corpus.folder}/*.jsonl")
    monkeypatch.delenv("SALT_VOCABULARY", raising=False)
    module = tmp_path / "a_module_of_tasks.py"
    module.write_text(
        "from salt_jax.preparation.own_text import own_text\n"
        "from salt_jax.t5x.text_tasks import register_text_task\n"
        "from salt_jax.data.vocabularies import ByteVocabulary\n"
        "register_text_task('a_task', own_text(validation_fraction=0.2), ByteVocabulary())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = RegisteredTask("a_task", module="a_module_of_tasks")
    with pytest.raises(InputError, match="has its own"):
        prepare(run, task=task, vocabulary=TrainedVocabulary())
    with pytest.raises(InputError, match="leave vocabulary unset"):
        prepare(run, task=task, vocabulary=ByteVocabulary(reserved=3))
    prepare(run, task=task)
    cache = PackedCache.open(run.path)
    assert cache.vocabulary == ByteVocabulary()
    assert cache.manifest["splits"]["train"]["documents"] > 40
    assert cache.subsets == ("code", "prose")


@pytest.mark.skipif(not MINIPILE.exists(), reason="the minipile corpus is not beside this checkout")
def test_the_minipile(run):
    prepare(
        run,
        task=pile_files(str(MINIPILE), max_documents=60),
        vocabulary=TrainedVocabulary(size=1024),
        sequence_length=128,
    )
    cache = PackedCache.open(run.path)
    assert cache.split_names == ("train", "validation", "test")
    assert len(cache.subsets) == 22
    assert set(cache.manifest["splits"]["train"]["by_subset"]) <= {
        "Github",
        "Gutenberg (PG-19)",
        "Wikipedia (en)",
    }
    info = cache.manifest["splits"]["validation"]
    assert 1.5 < info["bytes"] / info["tokens"] < 4


def test_a_tokenizer_json_whose_end_is_id_zero(corpus, run, tmp_path):
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=400, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = HuggingFaceVocabulary(tmp_path / "tokenizer.json")
    prepare(
        run,
        task=corpus.files,
        vocabulary=vocabulary,
        sequence_length=256,
        packing="whole_documents",
    )
    cache = PackedCache.open(run.path)
    assert (cache.vocabulary.eos_id, cache.vocabulary.pad_id) == (0, 0)
    # The end of each document is trained on though its id is that of padding.
    row = cache.split("train")[0]
    ends_L = (row["targets"] == 0) & (row["segment_ids"] > 0)
    assert np.all(row["loss_weights"][ends_L] == 1)
    assert sorted(_text_of(cache, "train")) == sorted(
        document.text for document in corpus.files.documents("train")
    )


# What `salt prepare` recorded before its settings were grouped.
OLD_FORM = """\
from __gin__ import dynamic_registration
from salt_jax.commands import prepare
from salt_jax.preparation import templates
from salt_jax.preparation import text_files
from salt_jax.preparation import trained_vocabulary

SEQUENCE_LENGTH = 128
TEXT = '{text}'
VOCABULARY_SIZE = 300

prepare.prepare.beam_options = ()
prepare.prepare.drop_duplicates = False
prepare.prepare.drop_unknown = False
prepare.prepare.long_documents = 'split'
prepare.prepare.packing = 'concatenate_and_split'
prepare.prepare.parse_special = True
prepare.prepare.runner = 'local'
prepare.prepare.seed = {seed}
prepare.prepare.sequence_length = %SEQUENCE_LENGTH
prepare.prepare.shards = 1
prepare.prepare.show = 0
prepare.prepare.skip_broken_lines = {skip}
prepare.prepare.task = @text_files.TextFiles()
prepare.prepare.verify = False
prepare.prepare.vocabulary = @trained_vocabulary.TrainedVocabulary()
prepare.prepare.workers = 4

templates.Template.chat = None
templates.Template.parse_special = True
templates.Template.prompt = ''
templates.Template.response = '{{text}}'

text_files.TextFiles.default_subset = 'text'
text_files.TextFiles.exclude = ()
text_files.TextFiles.max_bytes = 0
text_files.TextFiles.max_documents = 0
text_files.TextFiles.numbered = False
text_files.TextFiles.piece_bytes = 0
text_files.TextFiles.shards = 0
text_files.TextFiles.skip_broken_lines = False
text_files.TextFiles.subsets = ()
text_files.TextFiles.template = @templates.Template()
text_files.TextFiles.test = ()
text_files.TextFiles.test_fraction = 0.02
text_files.TextFiles.train = %TEXT
text_files.TextFiles.validation = ()
text_files.TextFiles.validation_fraction = 0.02

trained_vocabulary.TrainedVocabulary.character_coverage = 0.9995
trained_vocabulary.TrainedVocabulary.model_type = 'bpe'
trained_vocabulary.TrainedVocabulary.reserved = 0
trained_vocabulary.TrainedVocabulary.sample_bytes = 10000000
trained_vocabulary.TrainedVocabulary.size = %VOCABULARY_SIZE
"""


@pytest.mark.parametrize("broken", [False, True])
def test_a_cache_that_an_older_version_recorded_is_recognised(corpus, tmp_path, capsys, broken):
    text = f"{corpus.folder}/*.jsonl"
    flags = ["prepare", "--gin_file=data/text.gin", f"--gin.TEXT='{text}'", "--workers=1"]
    flags += ["--gin.VOCABULARY_SIZE=300", f"--output_dir={tmp_path}/cache"]
    if broken:
        corpus.add("{")
        flags.append("--skip_broken_lines=True")
    assert main(flags) == 0
    written = (tmp_path / "cache" / MANIFEST_FILE).read_bytes()
    for seed, code in ((1, 2), (0, 0)):
        old = OLD_FORM.format(text=text, seed=seed, skip=broken)
        (tmp_path / "cache" / "config.gin").write_text(old)
        capsys.readouterr()
        assert main(flags) == code
        printed = capsys.readouterr()
        assert ("packing.Packing.seed was 1 and is now 0" in printed.err) == (code == 2)
        assert ("nothing was prepared" in printed.out) == (code == 0)
    assert main([*flags, "--sequence_length=64"]) == 2
    assert "packing.Packing.sequence_length was" in capsys.readouterr().err
    if broken:
        assert main(flags[:-1]) == 2
        assert "skip_broken_lines was True and is now False" in capsys.readouterr().err
    assert (tmp_path / "cache" / MANIFEST_FILE).read_bytes() == written


def test_flags_alone_say_all(corpus, tmp_path, capsys):
    flags = ["prepare", f"--train={corpus.folder}/*", f"--output_dir={tmp_path}/cache"]
    assert main(flags) == 2
    assert "No vocabulary was given: set --size" in capsys.readouterr().err
    assert main([*flags, "--size=300", "--test_fraction=0.2", "--shards=2", "--workers=1"]) == 0
    cache = PackedCache.open(tmp_path / "cache")
    assert cache.split_names == ("train", "test")
    assert cache.vocabulary_size == 300
    assert len(cache.split("train").info["shards"]) == 2


def test_a_template_of_an_older_version_is_recognised(tmp_path):
    """Prompts whose special tokens were to be text, by a flag that was the verb's own."""
    recorded = {"prepare.prepare.parse_special": False, "templates.Template.parse_special": True}
    assert prepare_verb._with_current_names(recorded) == {"templates.Template.parse_special": False}
