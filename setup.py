"""Packaging of fastsskd.

The folder ``kernels/`` installs as ``fastsskd_kernels``: the name ``kernels`` belongs to another project on PyPI.
``tests``, ``launch`` and ``benchmarks`` are run from the checkout and never installed.
"""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

setup(
    name="fastsskd",
    version=VERSION,
    description="Audio self-supervision and distillation (ACM-SSKD) around a loader that never makes a GPU wait",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    package_dir={"fastsskd": "fastsskd", "fastsskd_kernels": "kernels"},
    packages=[*find_packages(include=["fastsskd", "fastsskd.*"]), "fastsskd_kernels"],
    install_requires=[
        # Exact: the three belong together. torchaudio 2.11.1 does not load with torch 2.11.0, and says nothing of it.
        "torch==2.11.0",
        "torchaudio==2.11.0",
        "torchvision==0.26.0",
        "timm>=1.0.24,<1.1",
        "numba>=0.65,<0.70",
        "numpy>=2.0,<2.6",
        # Exact: the shm-comm switch in launch/train.py and the checkpoint layout lean on private names of this version.
        "deepspeed==0.19.8",
        "scikit-image>=0.25,<0.27",
        "scikit-learn>=1.6,<2",
        "pyarrow>=18,<27",
        "soundfile>=0.13,<0.15",
        "safetensors>=0.5,<1",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.10,<4",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        # Choose exactly one: the wheels share one import name. V100 (sm_70) needs cuda12, newer cards cuda13.
        "cuda13": ["nvidia-dali-cuda130>=2.4,<2.5"],
        "cuda12": ["nvidia-dali-cuda120>=1.50,<2.5"],
        # For `fastsskd pack`: m4a, mp4, webm, mkv, wma, ... Its wheels bring FFmpeg with them.
        "formats": ["av>=16,<19"],
        # For `fastsskd export --onnx`; onnxruntime checks what was written.
        "onnx": ["onnx>=1.18,<2", "onnxscript>=0.5,<1", "onnxruntime>=1.20,<2"],
        "test": [
            "pytest>=8,<10",
            "hypothesis>=6.100,<7",
            "ruff>=0.14,<0.18",
            "av>=16,<19",
            "webdataset>=0.2.100,<2",
            "transformers>=5,<6",
            "jsonschema>=4.20,<5",
            "mypy>=1.15,<3",
            "onnx>=1.18,<2",
            "onnxscript>=0.5,<1",
            "onnxruntime>=1.20,<2",
        ],
    },
    entry_points={"console_scripts": ["fastsskd=fastsskd.cli:main"]},
)
