"""Evaluation: models and attacks over data sets, and what the counts say."""

from rbf_jax.evaluate.batched import predict as predict
from rbf_jax.evaluate.batched import run_attack as run_attack
from rbf_jax.evaluate.statistics import wilson_interval as wilson_interval
