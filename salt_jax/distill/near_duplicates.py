"""Near-duplicates among rows, by MinHash (Broder 1997) and locality-sensitive hashing.

The similarity s of two rows is the Jaccard index of their sets of SHINGLE successive tokens. A
row's signature has, for each of HASHES hash functions, 16 bits of the lowest hash in its set (b-bit
minwise hashing, Li and König 2010). The share of equal values estimates s with a standard error of
√(s (1 − s) / HASHES), 0.05 at 0.8. Rows are compared if a band of four values is equal, which
misses a pair with probability (1 − s⁴)^BANDS: 0.02% at 0.8, 1% at 0.7, 36% at 0.5.
"""

import numpy as np

from salt_jax.distill.selection import RowValues

HASHES, BANDS, SHINGLE = 64, 16, 5

_BLOCK_PAIRS = 1 << 18
_PLACES, _FACTORS, _OFFSETS = np.split(
    np.random.Generator(np.random.Philox(key=0)).integers(
        1 << 64, size=SHINGLE + 2 * HASHES, dtype=np.uint64
    ),
    [SHINGLE, SHINGLE + HASHES],
)
_HIGHEST = np.uint64(2**64 - 1)


def signatures(targets_BxL: np.ndarray, segment_ids_BxL: np.ndarray) -> np.ndarray:
    """MinHash signatures of rows, uint64 [B, BANDS], each band four values of 16 bits.

    Args:
      targets_BxL: Token ids.
      segment_ids_BxL: 0 for padding, where no set of tokens begins.
    """
    rows, length = targets_BxL.shape
    tokens_BxL = np.where(segment_ids_BxL > 0, targets_BxL.astype(np.uint64) + 1, 0)
    sets_BxL = np.zeros_like(tokens_BxL)
    for place, factor in enumerate(_PLACES):
        sets_BxL[:, : length - place] += tokens_BxL[:, place:] * (factor | 1)
    # A product's low bits depend on low bits alone.
    sets_BxL = (sets_BxL ^ (sets_BxL >> 32)) * (_FACTORS[0] | 1)
    sets_BxL ^= sets_BxL >> 32
    lowest_BxH = np.empty((rows, HASHES), np.uint16)
    for number, (factor, offset) in enumerate(zip(_FACTORS, _OFFSETS, strict=True)):
        hashes_BxL = np.where(tokens_BxL > 0, sets_BxL * (factor | 1) + offset, _HIGHEST)
        lowest_BxH[:, number] = hashes_BxL.min(axis=1)
    return lowest_BxH.view(np.uint64)


def find_near_duplicates(
    scores_N: RowValues, signatures_NxK: np.ndarray, similarity: float
) -> np.ndarray:
    """Whether each row has a near-duplicate of a higher score, bool [N].

    Of equal scores the lower row id is the higher. Rows with the same values in a band are ordered
    by score and compared with their predecessors, so that a text repeated a million times costs no
    more than as many different ones. Memory: 40 bytes a row beside the signatures.

    Args:
      scores_N: Scores; −inf and NaN are the lowest.
      signatures_NxK: `signatures` of all rows.
      similarity: The estimated similarity from which on rows are near-duplicates.
    """
    found_N = np.zeros(len(signatures_NxK), bool)
    descending_N = -scores_N[: len(found_N)]
    for band_N in signatures_NxK.T:
        order_N = np.lexsort((descending_N, band_N))
        pairs = np.flatnonzero(band_N[order_N[1:]] == band_N[order_N[:-1]])
        for first in range(0, len(pairs), _BLOCK_PAIRS):
            block = pairs[first : first + _BLOCK_PAIRS]
            better, worse = order_N[block], order_N[block + 1]
            differ_nxK = signatures_NxK[better] ^ signatures_NxK[worse]
            equal_nxH = differ_nxK.view(np.uint16) == 0
            found_N[worse] |= equal_nxH.mean(axis=1) >= similarity
    return found_N
