"""MNIST and CIFAR-10 as NumPy arrays: prepared once as tensorflow-datasets (without TensorFlow), then read in seconds.

Its modules import NumPy and the standard library alone; the other libraries are imported where they are used.
"""

from rbf_jax.data.download import download
from rbf_jax.data.embedded import load_embedded
from rbf_jax.data.preparation import prepare
from rbf_jax.data.prepared import Split, as_float, default_data_dir, is_prepared, load

__all__ = [
    "Split",
    "as_float",
    "default_data_dir",
    "download",
    "is_prepared",
    "load",
    "load_embedded",
    "prepare",
]
