"""Stored soft labels against the teacher that made them: bytes, speed, and error by K.

    python benchmarks/soft_labels.py --teacher SLM_RUN --student LLM_RUN --cache CACHE

For each K and encoding of log q: bytes per token on disk, records encoded and decoded per second,
and the error of the soft loss and its gradient against the online teacher on the same rows. The
loss's error is |mean soft - mean soft of the teacher| in nats; the gradient's, at ω = 1 and by all
of the student's parameters, is the norm of the difference over the norm. Bytes are also given for a
vocabulary of 256,256 ids.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax

from salt_jax.data import features
from salt_jax.data.label_format import ENCODINGS, LabelFormat, Labels
from salt_jax.data.packed_cache import PackedCache
from salt_jax.distill import chunked_loss, losses
from salt_jax.models import decoder
from salt_jax.training import partitioning
from salt_jax.training.checkpoints import SavedModel, find_model

PAPERS_VOCABULARY = 256_256


def soft_gradient(
    student: SavedModel, params: Any, batch: Any, loss: losses.LossConfig, **teacher: Any
) -> tuple[float, Any]:
    """Mean soft loss, and its gradient by the student's parameters."""

    def mean_soft(params: Any) -> tuple[jax.Array, jax.Array]:
        total, weight, metrics = chunked_loss.loss_sums(
            decoder.hidden_states(student.config, params, batch),
            decoder.head_kernel(params, student.config),
            batch["targets"],
            batch["loss_weights"],
            1.0,
            loss,
            student.config.vocab_size or 0,
            **teacher,
        )
        return total / weight, metrics["soft"] / weight

    gradient, soft = jax.jit(jax.grad(mean_soft, has_aux=True))(params)
    return float(soft), gradient


def timed(run: Any, rows: int) -> tuple[Any, float]:
    """The result, and rows per second, the best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, rows / min(times)


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The benchmark's results for each K and encoding."""
    cache = PackedCache.open(flags.cache)
    mesh = partitioning.MeshConfig(fsdp=1).make(jax.devices()[:1])
    teacher, student = (
        find_model(path, None, "model", cache) for path in (flags.teacher, flags.student)
    )
    taught, params = teacher.load_params(mesh), student.load_params(mesh)
    rows = cache.split("validation").__getitems__(list(range(flags.rows)))
    batch = {name: jnp.asarray(x) for name, x in features.make_batch(rows, cache.start_id).items()}
    vocab_size = cache.vocabulary_size
    loss = losses.LossConfig(teacher_temperature=flags.temperature)
    hidden = decoder.hidden_states(teacher.config, taught, batch)
    head = decoder.head_kernel(taught, teacher.config)
    online = {"teacher_hidden_BxLxD": hidden, "teacher_head_VxD": head}
    weighted = np.asarray(batch["loss_weights"]) > 0
    soft, gradient = soft_gradient(student, params, batch, loss, **online)
    norm = optax.global_norm(gradient)
    results = []
    for k in flags.k:
        top = chunked_loss.top_labels(
            *(hidden, head, batch["targets"], batch["loss_weights"], vocab_size),
            k=k,
            temperature=flags.temperature,
            chunk_tokens=512,
        )
        half = [np.asarray(x) for x in top]
        labels = Labels(half[0], *(x.astype(np.float16) for x in half[1:]))
        for encoding in ENCODINGS:
            form = LabelFormat(cache.sequence_length, vocab_size, k, encoding)
            records, encoded = timed(
                lambda form=form, labels=labels: form.encode(labels), flags.rows
            )
            stored, decoded = timed(
                lambda form=form, records=records: form.decode(records), flags.rows
            )
            given = losses.SoftLabels(*map(jnp.asarray, stored))
            kept_soft, kept_gradient = soft_gradient(
                student, params, batch, loss, soft_labels=given
            )
            difference = optax.global_norm(jax.tree.map(jnp.subtract, kept_gradient, gradient))
            larger = dataclasses.replace(form, vocab_size=PAPERS_VOCABULARY)
            results.append(
                {
                    "k": k,
                    "encoding": encoding,
                    "bytes_per_token": form.bytes_per_token,
                    f"bytes_per_token_of_{PAPERS_VOCABULARY}_ids": larger.bytes_per_token,
                    "mean_rest": float(np.exp(half[2])[weighted].mean()),
                    "soft_loss": soft,
                    "soft_loss_error": abs(kept_soft - soft),
                    "gradient_error": float(difference / norm),
                    "rows_encoded_per_second": encoded,
                    "rows_decoded_per_second": decoded,
                }
            )
    return results


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__)
    for name in ("teacher", "student", "cache"):
        parser.add_argument(f"--{name}", required=True, help="a folder")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--temperature", type=float, default=0.25)
    flags = parser.parse_args()
    measurement.report("soft_labels", {"settings": vars(flags), "by_k": measure(flags)})


if __name__ == "__main__":
    main()
