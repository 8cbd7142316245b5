"""safetensors files: what is written is read, by the library too; hostile ones are refused."""

import hashlib
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_jax.errors import InputError
from salt_jax.huggingface.safetensors_files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsFolder,
    TensorInfo,
    write_shards,
)

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text("ab.é", min_size=1, max_size=6),
    st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))),
    min_size=1,
    max_size=6,
)


def infos(tensors: dict[str, tuple[tuple[int, ...], str]]) -> list[TensorInfo]:
    return [TensorInfo(name, dtype, shape) for name, (shape, dtype) in tensors.items()]


def random_values(tensors: list[TensorInfo]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {t.name: rng.standard_normal(t.shape).astype(DTYPES[t.dtype]) for t in tensors}


@settings(max_examples=60, deadline=None)
@given(tensors=TENSORS, max_shard_bytes=st.integers(1, 400), transposed=st.booleans())
def test_what_is_written_is_read(
    tensors: dict[str, tuple[tuple[int, ...], str]], max_shard_bytes: int, transposed: bool
) -> None:
    described = infos(tensors)
    expected = random_values(described)
    arrays = expected.values()
    if transposed:  # equal values in another order of memory
        arrays = [np.asfortranarray(array) for array in expected.values()]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        written = write_shards(folder, described, iter(arrays), max_shard_bytes)
        assert sorted(file.name for file in folder.iterdir()) == sorted(written)
        files = SafetensorsFolder(folder)
        assert files.tensors == {tensor.name: tensor for tensor in described}
        by_library: dict[str, np.ndarray] = {}
        for file in folder.glob("*.safetensors"):
            shard = safetensors.numpy.load_file(file)
            sizes = [array.nbytes for array in shard.values()]
            assert sum(sizes) <= max_shard_bytes or len(sizes) == 1
            by_library |= shard
        for tensor, array in expected.items():
            for read in (files.read(tensor), by_library[tensor]):
                assert read.dtype == array.dtype
                np.testing.assert_array_equal(read, array)
            np.testing.assert_array_equal(files.read(tensor, slice(1, None)), array[1:])
            np.testing.assert_array_equal(files.read(tensor, slice(0, 1)), array[:1])


def test_arrays_are_asked_for_one_at_a_time(tmp_path: pathlib.Path) -> None:
    described = [TensorInfo(name, "float32", (256,)) for name in "abcd"]
    before = []

    def arrays() -> Any:
        for number in range(4):
            before.append(len(list(tmp_path.glob("*.safetensors"))))
            yield np.full(256, number, np.float32)

    write_shards(tmp_path, described, arrays(), 1024)
    assert before == [0, 1, 2, 3]


def write(folder: pathlib.Path, header: bytes, values: bytes, length: int | None = None) -> None:
    size = (len(header) if length is None else length).to_bytes(8, "little")
    (folder / SINGLE_FILE).write_bytes(size + header + values)


def header(**tensors: tuple[str, list[int], list[int]]) -> bytes:
    keys = ("dtype", "shape", "data_offsets")
    entries = {name: dict(zip(keys, entry, strict=True)) for name, entry in tensors.items()}
    return json.dumps(entries).encode()


A = ("F32", [2], [0, 8])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[]", b""),
        (b"{}", b"more"),
        (header(a=A), b"1234567"),
        (header(a=A), b"123456789"),
        (header(a=A, b=("F32", [1], [4, 8])), b"12345678"),
        (header(a=A, b=("F32", [1], [12, 16])), b"1234567812345678"),
        (header(a=("F32", [3], [0, 8])), b"12345678"),
        (header(a=("F32", [2], [8, 0])), b"12345678"),
        (header(a=("F32", [-2], [0, 8])), b"12345678"),
        (header(a=("F32", [2**62, 8], [0, 8])), b"12345678"),
        (header(a=("F32", [2], [0, 2**70])), b"12345678"),
        (header(a=("Q9", [2], [0, 8])), b"12345678"),
        (b'{"a": ' * 10_000 + b"1" + b"}" * 10_000, b""),
        (header(a=A)[:-1] + b", " + header(a=A)[1:], b"12345678"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused(
    text: bytes, values: bytes, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, text, values)
    with pytest.raises(InputError, match=r"not a complete safetensors file \(.*download it again"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(length: int, tmp_path: pathlib.Path) -> None:
    write(tmp_path, header(a=A), b"12345678", length)
    with pytest.raises(InputError, match="not a complete safetensors file"):
        SafetensorsFolder(tmp_path)


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "", 3, None]),
        "shape": st.lists(st.integers(-2, 4), max_size=3) | st.just("2") | st.just([2.0]),
        "data_offsets": st.lists(st.integers(-4, 40), max_size=3) | st.integers(),
        "more": st.integers(),
    },
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "", "../c"]), ENTRIES | st.integers(), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(found=HEADERS, size=st.integers(0, 40), cut=st.integers(0, 60))
def test_any_header_is_read_or_refused(found: dict[str, Any], size: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, json.dumps(found).encode(), bytes(size))
        if cut < 8:
            whole = (folder / SINGLE_FILE).read_bytes()
            (folder / SINGLE_FILE).write_bytes(whole[: len(whole) - cut])
        try:
            files = SafetensorsFolder(folder)
        except InputError:
            return
        for tensor, info in files.tensors.items():
            if info.dtype in DTYPES and info.shape:
                assert files.read(tensor).shape == info.shape


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(place: int, byte: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        described = [TensorInfo("a", "float32", (2, 3)), TensorInfo("b", "bfloat16", (4,))]
        write_shards(folder, described, iter(random_values(described).values()), 1 << 20)
        whole = bytearray((folder / SINGLE_FILE).read_bytes())
        whole[place % len(whole)] = byte
        (folder / SINGLE_FILE).write_bytes(bytes(whole))
        try:
            files = SafetensorsFolder(folder)
        except InputError:
            return
        for tensor, info in files.tensors.items():
            if info.dtype in DTYPES:
                assert files.read(tensor).shape == info.shape


@settings(max_examples=60, deadline=None)
@given(tensors=TENSORS, kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(
    tensors: dict[str, tuple[tuple[int, ...], str]], kept: float
) -> None:
    described = infos(tensors)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_shards(folder, described, iter(random_values(described).values()), 1 << 20)
        whole = (folder / SINGLE_FILE).read_bytes()
        (folder / SINGLE_FILE).write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(InputError, match="not a complete safetensors file"):
            SafetensorsFolder(folder)


def test_inspection_shows_every_value_once_and_digests_the_files(tmp_path: pathlib.Path) -> None:
    """Also of a tensor of several parts, and of one that is not shown for its dtype."""
    shown: dict[str, list[np.ndarray]] = {}
    arrays = {
        "large": np.arange(5 << 20, dtype=np.float32).reshape(5, -1),
        "small": np.arange(3, dtype=np.float16),
        "empty": np.zeros((0, 2), np.float32),
        "ids": np.arange(3),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": dict.fromkeys(arrays, "model-1.safetensors")})
    )
    files = SafetensorsFolder(tmp_path)
    digest = files.inspect(lambda name, values: shown.setdefault(name, []).append(values))
    assert {name: len(parts) for name, parts in shown.items()} == {"large": 5, "small": 1}
    for name, parts in shown.items():
        np.testing.assert_array_equal(np.concatenate(parts), arrays[name].reshape(-1))
    of_file = hashlib.sha256((tmp_path / "model-1.safetensors").read_bytes()).digest()
    assert digest == hashlib.sha256(b"model-1.safetensors\0" + of_file).hexdigest()
    safetensors.numpy.save_file({}, tmp_path / SINGLE_FILE)  # a header alone
    of_file = hashlib.sha256((tmp_path / SINGLE_FILE).read_bytes()).digest()
    expected = hashlib.sha256(SINGLE_FILE.encode() + b"\0" + of_file).hexdigest()
    assert SafetensorsFolder(tmp_path).digest == expected


def test_a_digest_is_of_all_the_bytes(tmp_path: pathlib.Path) -> None:
    described = [TensorInfo(name, "float32", (256,)) for name in "ab"]
    digests = []
    for changed in (0, 0, 1):
        values = random_values(described)
        values["b"][-1] += changed
        write_shards(tmp_path, described, iter(values.values()), 1024)
        digests.append(SafetensorsFolder(tmp_path).digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": "../elsewhere.safetensors"}, r"a in '\.\./elsewhere\.safetensors', expected"),
        ({"a": "/etc/passwd"}, "expected the plain name"),
        ({"a": 3}, "expected the plain name"),
        ({"a": "model-3.safetensors"}, r"model-3\.safetensors is missing"),
        ({"a": "model-00002-of-00002.safetensors"}, "which lacks it"),
        ({"c": "model-00001-of-00002.safetensors"}, "the tensor c in"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_an_index_that_says_something_else_is_refused(
    weight_map: Any, expected: str, tmp_path: pathlib.Path
) -> None:
    described = [TensorInfo(name, "float32", (256,)) for name in "ab"]
    write_shards(tmp_path, described, iter(random_values(described).values()), 1024)
    assert set(SafetensorsFolder(tmp_path).tensors) == {"a", "b"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=expected):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: pathlib.Path) -> None:
    described = [TensorInfo(name, "float32", (256,)) for name in "ab"]
    write_shards(tmp_path, described, iter(random_values(described).values()), 1024)
    safetensors.numpy.save_file(
        {"a": np.zeros(1), "b": np.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(InputError, match=r"The tensor a is in .* and in .*download"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_never_read(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=rf"has {name}, a pickle.*save_pretrained"):
        SafetensorsFolder(tmp_path)


def test_a_folder_without_a_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        SafetensorsFolder(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        SafetensorsFolder(tmp_path / "none")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: pathlib.Path) -> None:
    described = [TensorInfo("a", "float32", (256,))]
    write_shards(tmp_path, described, iter(random_values(described).values()), 1024)
    files = SafetensorsFolder(tmp_path)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[:-4])
    with pytest.raises(InputError, match="has become shorter"):
        files.read("a")
