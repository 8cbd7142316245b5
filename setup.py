"""Installs salt_jax: `pip install .` trains; .[prepare] reads all text, .[plan] plans."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "salt_jax/__init__.py").read_text(encoding="utf-8")
)

PREPARE = [
    "seqio>=0.0.20",
    "tensorflow>=2.20",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources>=6",  # which tensorflow-datasets imports and doesn't ask for
    "pyarrow>=18",
    "zstandard>=0.23",
]
# Apart from the others: it holds protobuf back, with which SeqIO's import of sentencepiece fails.
BEAM = ["apache-beam>=2.77", "pyarrow>=18", "zstandard>=0.23"]
# libtpu, the compiler for TPUs, in the version that jax needs; other systems have none.
PLAN = ["jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'"]
# XLA's compiler for NVIDIA GPUs that are not there: the plugin alone, without CUDA's libraries. It
# is apart from PLAN because with it JAX looks for a GPU in every command.
PLAN_GPU = ["jax[cuda13-local]; sys_platform == 'linux'"]
# Few-shot tasks through lm-evaluation-harness, and ROUGE.
EVAL = ["lm-eval>=0.4.13", "rouge-score>=0.1.2"]
# Folders in buckets, through fsspec: gs:// and s3://.
GCS, S3 = ["gcsfs>=2026.10"], ["s3fs>=2025.3"]
# Models of the Hugging Face Hub by name, and GGUF files.
HUB, GGUF = ["huggingface_hub>=1.0"], ["gguf>=0.19"]
# Metrics in Weights & Biases, too.
WANDB = ["wandb>=0.18"]
TEST = [
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "scipy>=1.14",
    "setuptools>=77",
    # What converted models are compared with; accelerate is lm-eval's, for its own backend.
    "accelerate>=1.0",
    "torch>=2.6",
    "transformers>=4.57",
]

setuptools.setup(
    name="salt_jax",
    version=VERSION[1] if VERSION else "",
    description="SALT, small-model aided large-model training, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The salt_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    url="https://arxiv.org/abs/2410.18779",
    project_urls={"Paper": "https://arxiv.org/abs/2410.18779"},
    keywords=["language models", "distillation", "data selection", "pre-training", "JAX", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    # gin/ and tasks/ are linked into the package as configs/ and tasks/, so that a clone, an
    # editable install and a plain one all find them under one import name.
    packages=["salt_jax", "salt_jax.configs"]
    + [f"salt_jax.{name}" for name in setuptools.find_packages("salt_jax")],
    package_data={
        "salt_jax": ["py.typed"],
        "salt_jax.reporting": ["page.html"],
        "salt_jax.configs": ["**/*.gin"],
        "salt_jax.evaluation.tasks": ["*.yaml", "*.yml"],
    },
    install_requires=[
        "array-record>=0.8",
        "filelock>=4.2",
        "flax>=0.12",
        "fsspec>=2025.3",
        "gin-config>=0.5",
        "grain>=0.2.10",
        "jax>=0.10,<0.13",
        "jinja2>=3.1.6",  # older ones let a chat template out of the sandbox
        "matplotlib>=3.10",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pandas>=3",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
    ],
    extras_require={
        "beam": BEAM,
        "eval": EVAL,
        "gcs": GCS,
        "gguf": GGUF,
        "hub": HUB,
        "plan": PLAN,
        "plan_gpu": PLAN_GPU,
        "prepare": PREPARE,
        "s3": S3,
        "wandb": WANDB,
        "test": TEST + EVAL + GCS + GGUF + HUB + PLAN + PREPARE + S3,
    },
    entry_points={"console_scripts": ["salt = salt_jax.__main__:run"]},
)
