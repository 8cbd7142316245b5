import pytest

from salt_jax.data.shared_pieces import shared_pieces
from salt_jax.data.vocabularies import ByteVocabulary
from salt_jax.preparation.trained_vocabulary import TrainedVocabulary

TEXT = ["the then there and sand hand\n in the land\t of thin things, é è"] * 9


@pytest.fixture(scope="module")
def small():
    return TrainedVocabulary(size=300, reserved=2).train(TEXT)


@pytest.fixture(scope="module")
def large():
    return TrainedVocabulary(size=330).train(TEXT)


def test_equal_vocabularies_share_every_id_that_text_has(small):
    ids, shared = shared_pieces(small, small)
    used = small.encode("".join(TEXT))
    assert shared[used].all()
    assert (ids[used] == used).all()
    assert not shared[small.base_size :].any()
    assert (ids[small.base_size :] == -1).all()


def test_shared_ids_stand_for_the_same_text_once(small, large):
    ids, shared = shared_pieces(large, small)
    assert 0 < shared.sum() < large.size
    for token_id, other in enumerate(ids):
        piece = large.pieces[token_id]
        if token_id in (large.eos_id, large.start_id, large.pad_id):
            continue
        if shared[token_id]:
            assert small.pieces[other] == piece != b""
        elif piece:
            assert piece.endswith(small.pieces[other]), "is read as the end of it"
    assert len({*ids[shared]}) == shared.sum(), "no probability counts twice"


def test_a_piece_without_its_like_is_read_as_its_longest_end(small, large):
    ids, _ = shared_pieces(large, small)
    known = {*small.pieces}
    for token_id, piece in enumerate(large.pieces):
        if piece:
            longest = next(piece[i:] for i in range(len(piece)) if piece[i:] in known)
            assert small.pieces[ids[token_id]] == longest


def test_special_ids_agree(large):
    other = ByteVocabulary()
    ids, shared = shared_pieces(large, other)
    assert ids[large.eos_id] == other.eos_id
    assert shared[large.eos_id]
    assert ids[large.start_id] == other.start_id
    assert not shared[large.start_id]
