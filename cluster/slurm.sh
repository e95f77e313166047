#!/bin/bash
# sbatch cluster/slurm.sh [CONFIG.yaml] run.storage=/shared/runs run.name=first ...
# Whole nodes, one Ray node on each; this directory and run.storage are on a file system that all of them share.
# The default: two nodes. Others: sbatch --nodes=16 --gpus-per-node=8 cluster/slurm.sh ...
#SBATCH --job-name=vae_dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

# The job's own token, which nobody else can read; it goes with the job.
umask 077
state=$(mktemp -d "${VAE_DIST_STATE:-$HOME}/.vae_dist.XXXXXX")
trap 'rm -rf "$state"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$state/token"
umask 022
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/token
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# An address, for a name may mean loopback on the node that bears it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | awk '{print $1}')

# shellcheck disable=SC2016 # the driver's shell expands it
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
  --dashboard-host 127.0.0.1 --disable-usage-stats -- \
  env RAY_ADDRESS="$address:6379" bash -c 'echo "$$" >"$0/driver"; exec python -u -m vae_dist.train "$@"' "$state" "$@" &
step=$!

# The first node has both this script and the driver, which saves when it is told to stop. Five minutes before the time
# limit Slurm sends USR1, and the job goes back to the queue to resume; `scancel --batch --signal=TERM JOB` ends it.
requeue=no
# shellcheck disable=SC2329 # by the traps
stop() { kill -TERM "$(cat "$state/driver" 2>/dev/null || echo "$step")"; }
trap 'stop' TERM
trap 'requeue=yes; stop' USR1

# A trapped signal ends `wait`, not the step.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done
if [ "$requeue" = yes ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
