#!/usr/bin/env bash
# A reproduction on a TPU slice, spot and resumable, on all its workers.
#
#   BUCKET=gs://my-bucket ZONE=europe-west4-b experiments/launch/tpu.sh [SET] [PROFILE]
#
# BUCKET/data holds the prepared data (`make data`, then `gcloud storage cp -r`); BUCKET/runs keeps the run. When the slice
# is taken back, the same command makes a new one and goes on. DRY_RUN=1 only shows what would be done.
set -euo pipefail

: "${BUCKET:?must name a bucket, gs://NAME}" "${ZONE:?must name a zone that has the slice, see gcloud compute tpus locations list}"
NAME=${NAME:-rbf-jax} TYPE=${TYPE:-v5litepod-8} IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}
SET=${1:-mnist} PROFILE=${2:-gpu}

say_and_do() {
    echo "+ $*"
    [[ -n ${DRY_RUN:-} ]] || "$@"
}

on_all_workers() {
    say_and_do gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

# A slice that is there is used; one that was taken back is made anew.
if [[ -n ${DRY_RUN:-} ]] || ! gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null | grep -q READY; then
    say_and_do gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet || true
    say_and_do gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$IMAGE" --spot
fi

# The commit that is checked out here, with its history: results say which one they are of.
say_and_do git bundle create --quiet /tmp/rbf_jax.bundle HEAD
say_and_do gcloud compute tpus tpu-vm scp /tmp/rbf_jax.bundle "$NAME:" --zone="$ZONE" --worker=all
on_all_workers "rm -rf rbf_jax && git clone --quiet rbf_jax.bundle rbf_jax && cd rbf_jax &&
    python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.11 .venv &&
    python3 -m uv pip install --quiet --editable '.[tpu,cloud]'"

on_all_workers "cd rbf_jax && .venv/bin/python -m experiments.reproduce --config=experiments/configs/$SET.py:$PROFILE --workdir=$BUCKET/runs/$SET-$PROFILE --data_dir=$BUCKET/data --distributed"

echo "the slice costs until it is deleted: gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE"
