"""Evaluation: models and attacks over data sets, the ledger of who survived, and what the counts say."""

from rbf_jax.evaluate.batched import predict as predict
from rbf_jax.evaluate.batched import run_attack as run_attack
from rbf_jax.evaluate.batched import survival as survival
from rbf_jax.evaluate.ledger import Outcomes as Outcomes
from rbf_jax.evaluate.ledger import Parts as Parts
from rbf_jax.evaluate.ledger import load_outcomes as load_outcomes
from rbf_jax.evaluate.ledger import save_outcomes as save_outcomes
from rbf_jax.evaluate.ledger import worst_case as worst_case
from rbf_jax.evaluate.statistics import paired_interval as paired_interval
from rbf_jax.evaluate.statistics import wilson_interval as wilson_interval
from rbf_jax.evaluate.suite import SuiteResult as SuiteResult
from rbf_jax.evaluate.suite import fitting_batch as fitting_batch
from rbf_jax.evaluate.suite import run_suite as run_suite
from rbf_jax.identity import fingerprint as fingerprint
