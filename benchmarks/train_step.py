"""The train step: tokens/s and MFU, stage 1 over stage 2, stage 2 over a plain run.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --gates TeacherAhead TruthInTop Confidence
    python benchmarks/train_step.py --embed_dim 2048 --layers 20 --mlp_dim 6144 --heads 16 \\
        --batch 16 --length 1280 --dtype bfloat16 --remat full --optimizer adamw

The defaults are the fixed small shape: width 256, 4 layers, 4 heads of 64, gated MLP of 1,024,
32,000 ids tied, 8 × 512 tokens, float32, Adafactor; the teacher is half as wide, SALT's loss with
ω 2/3 and τ 1/4. The programs are those that `salt train` compiles, and each step continues from the
state of the previous one. Stage 1 should cost what its FLOPs say ("arithmetic", for model FLOPs and
for hardware FLOPs with rematerialisation), stage 2 the same as a run without a teacher, and stage 1
with a gate the same as without.
"""

import argparse
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import measurement

from salt_jax.distill import gates, losses
from salt_jax.models import decoder
from salt_jax.training import flops, partitioning
from salt_jax.training.learning_rates import WarmupConstant
from salt_jax.training.optimizers import Adafactor, AdamW, Muon
from salt_jax.training.train_state import make_layout
from salt_jax.training.train_step import compile_programs

GATES = ("TeacherAhead", "TruthInTop", "Confidence")
OPTIMIZERS = {"adafactor": Adafactor, "adamw": AdamW, "muon": Muon}


def models(flags: argparse.Namespace) -> tuple[decoder.DecoderConfig, decoder.DecoderConfig]:
    """Student and teacher."""

    def model(width: int, layers: int, heads: int, mlp: int) -> decoder.DecoderConfig:
        return decoder.DecoderConfig(
            embed_dim=width,
            num_layers=layers,
            num_heads=heads,
            mlp_dim=mlp,
            vocab_size=flags.vocab,
            max_length=flags.length,
            dtype=flags.dtype,
            remat=flags.remat,
            scan_layers=not flags.unroll,
            attention_backend=flags.attention,
        )

    student = model(flags.embed_dim, flags.layers, flags.heads, flags.mlp_dim)
    teacher = model(
        flags.teacher_embed_dim or flags.embed_dim // 2,
        flags.teacher_layers or flags.layers,
        flags.teacher_heads or flags.heads // 2,
        flags.teacher_mlp_dim or flags.mlp_dim // 2,
    )
    return student, teacher


def make_batch(shape: tuple[int, int], vocab: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Random tokens, one document per row, with loss weight everywhere."""
    tokens = jax.random.randint(jax.random.key(1), (shape[0], shape[1] + 1), 0, vocab)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": jnp.ones(shape, jnp.float32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
    }
    return partitioning.to_device(jax.device_get(batch), mesh)


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's results."""
    student, teacher = models(flags)
    mesh = partitioning.MeshConfig().make()
    rate = WarmupConstant(peak=1e-3, warmup_steps=10)
    optimizer = OPTIMIZERS[flags.optimizer](rate)
    layout = make_layout(student, optimizer.make(1000, student), mesh)
    taught = make_layout(teacher, Adafactor(rate).make(1000, teacher), mesh)
    teacher_params = taught.create(seed=1).params
    if flags.dtype == "bfloat16":
        teacher_params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), teacher_params)
    shape = (flags.batch, flags.length)
    loss = losses.LossConfig(chunk_tokens=flags.chunk_tokens)
    salt = compile_programs(
        layout,
        loss,
        shape,
        teacher_config=teacher,
        teacher_params=teacher_params,
        microbatches=flags.microbatches,
    )
    plain = compile_programs(layout, loss, shape, microbatches=flags.microbatches)
    assert salt.distill is not None, "a teacher was given"
    gated = {
        gate: compile_programs(
            layout,
            dataclasses.replace(loss, gate=getattr(gates, gate)()),
            shape,
            teacher_config=teacher,
            teacher_params=teacher_params,
            microbatches=flags.microbatches,
        ).distill
        for gate in flags.gates
    }
    batch, omega = make_batch(shape, flags.vocab, mesh), jnp.float32(2 / 3)
    state = layout.create(seed=0)

    def step(program: Any, *teaching: Any) -> Any:
        def run() -> jax.Array:
            nonlocal state
            state, metrics = program(state, batch, *teaching)
            return metrics["loss"]

        return run

    sides = {
        "stage1": step(salt.distill, teacher_params, omega),
        "stage2": step(salt.plain),
        "plain": step(plain.plain),
        **{gate: step(program, teacher_params, omega) for gate, program in gated.items()},
    }
    if flags.only:
        sides = {name: sides[name] for name in flags.only}
    seconds = measurement.rounds(sides, flags.rounds)
    results: dict[str, Any] = {
        "student_parameters": student.num_parameters,
        "teacher_parameters": teacher.num_parameters,
        "tokens_per_step": flags.batch * flags.length,
        "seconds": measurement.medians(seconds),
        "tokens_per_second": {
            name: flags.batch * flags.length / median
            for name, median in measurement.medians(seconds).items()
        },
        "all_seconds": seconds,
        "mfu": mfu(student, teacher, flags, measurement.medians(seconds)),
        "temporary_gib": {
            "stage1": salt.distill.memory_analysis().temp_size_in_bytes / 2**30,
            "stage2": salt.plain.memory_analysis().temp_size_in_bytes / 2**30,
            **{
                gate: program.memory_analysis().temp_size_in_bytes / 2**30
                for gate, program in gated.items()
            },
        },
        "peak_gib": peak_gib(),
    }
    compared = [(gate, "stage1") for gate in gated if {gate, "stage1"} <= sides.keys()]
    compared += itertools.pairwise(name for name in sides if name not in gated)
    for first, last in compared:
        results[f"{first}_over_{last}"] = measurement.ratio(seconds[first], seconds[last])
    results["arithmetic"] = arithmetic(student, teacher, flags.length)
    return results


def arithmetic(
    student: decoder.DecoderConfig, teacher: decoder.DecoderConfig, length: int
) -> dict[str, float]:
    """The expected ratio of stage 1 over stage 2, by model and by hardware FLOPs."""
    forward = flops.forward_flops_per_token(teacher, length)
    return {
        "model_flops": 1 + forward / flops.train_flops_per_token(student, length),
        "hardware_flops": 1 + forward / flops.hardware_train_flops_per_token(student, length),
    }


def mfu(
    student: decoder.DecoderConfig,
    teacher: decoder.DecoderConfig,
    flags: argparse.Namespace,
    seconds: dict[str, float],
) -> dict[str, float] | None:
    """Model FLOPs over the devices' peak; None if that is unknown."""
    peak = flops.device_peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    tokens = flags.batch * flags.length / jax.device_count()
    plain = flops.train_flops_per_token(student, flags.length)
    taught = plain + flops.forward_flops_per_token(teacher, flags.length)
    return {
        name: tokens * (plain if name in ("stage2", "plain") else taught) / median / peak
        for name, median in seconds.items()
    }


def peak_gib() -> float | None:
    """The device's peak memory by its own statistics, GiB; None if it has none."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else None


def main() -> None:
    """Measures and prints."""
    parser = measurement.parser(__doc__)
    for name, default in {
        **{"embed_dim": 256, "layers": 4, "heads": 4, "mlp_dim": 1024, "vocab": 32_000},
        **{"batch": 8, "length": 512, "chunk_tokens": 128, "microbatches": 1},
        **{"teacher_embed_dim": 0, "teacher_layers": 0, "teacher_heads": 0, "teacher_mlp_dim": 0},
    }.items():
        text = "half the student's by default" if name.startswith("teacher") else None
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="xla")
    parser.add_argument("--optimizer", default="adafactor", choices=OPTIMIZERS)
    parser.add_argument("--unroll", action="store_true", help="no scan over layers")
    parser.add_argument("--only", nargs="+", choices=("stage1", "stage2", "plain", *GATES))
    parser.add_argument("--gates", nargs="+", choices=GATES, default=[], help="over stage 1")
    flags = parser.parse_args()
    measurement.report("train_step", {"settings": vars(flags), **measure(flags)})


if __name__ == "__main__":
    main()
