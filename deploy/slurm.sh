#!/usr/bin/env bash
# A sweep on several machines of a Slurm cluster; see docs/cluster.md.
#   sbatch deploy/slurm.sh sweeps/width_vs_depth.yaml llama31_8b
# Submit it from the top of the checkout, on storage that all machines share, with .venv installed.
#SBATCH --job-name=orchestrate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=orchestrate-%j.log
set -euo pipefail

sweep=${1:?give a sweep file}
profile=${2:-llama31_8b}
results=${RESULTS:-$PWD/results}
export PATH="$PWD/.venv/bin:$PATH"
export HF_HOME=${HF_HOME:-$results/huggingface}

# Others have jobs on this cluster: only who holds the token may talk to this Ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')
address=$ip:$((20000 + SLURM_JOB_ID % 10000))
dashboard=$((30000 + SLURM_JOB_ID % 2500)) # `ray start` gives up where the usual 8265 is taken
common="--num-cpus=$SLURM_CPUS_PER_TASK --num-gpus=${SLURM_GPUS_ON_NODE:-0} --disable-usage-stats
  --temp-dir=/tmp/ray-$SLURM_JOB_ID --block"

# shellcheck disable=SC2086  # `common` is several options
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$ip" --port="${address##*:}" \
  --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" $common &
if ((SLURM_NNODES > 1)); then
  sleep 20 # the others give up on a head that is not there yet
  # shellcheck disable=SC2086
  srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$address" $common &
fi

# Until all machines have joined there is no room for a trial, and the doctor says so.
for attempt in {1..10}; do
  orchestrate doctor "$sweep" --profile "$profile" --results "$results" --address "$address" && break
  ((attempt < 10)) || exit 1
  sleep 15
done

# Ten minutes before the time is up Slurm sends SIGTERM here: the trials save and stop.
orchestrate "$sweep" --profile "$profile" --results "$results" --address "$address" &
driver=$!
trap 'kill -TERM "$driver"' TERM
status=0
while kill -0 "$driver" 2>/dev/null; do
  if wait "$driver"; then status=0; else status=$?; fi
done
if ((status == 130)); then
  scontrol requeue "$SLURM_JOB_ID" # the same command goes on from there
fi
exit "$status"
