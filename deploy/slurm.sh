#!/bin/bash
# An engine on several nodes of a SLURM cluster, with one replica on each GPU.
#
#   sbatch --export=ALL,MODEL=/shared/models/Llama-3.1-8B-Instruct deploy/slurm.sh
#
# TOKASAURUS_API_KEY in the environment of sbatch is the key that clients send. The first lines of
# the log say where the engine listens. Every node needs the model and the environment at the same
# paths. https://slurm.schedmd.com/sbatch.html describes the options.
#
#SBATCH --job-name=tokasaurus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
# A drain begins so many seconds before the end of the time.
#SBATCH --signal=TERM@120
#SBATCH --output=tokasaurus-%j.log

set -euo pipefail

: "${MODEL:?set MODEL to the directory of the model, as above}"
: "${TOKASAURUS_API_KEY:?set a key: other machines reach the engine}"
# The environment that has tokasaurus, if it is not the one of the command sbatch.
if [[ -n "${TOKASAURUS_VENV:-}" ]]; then
    # shellcheck source=/dev/null
    source "$TOKASAURUS_VENV/bin/activate"
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# Two jobs may share a node.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
echo "The engine will listen at http://$MASTER_ADDR:10210/v1"

# With --kill-on-bad-exit=0 the engine survives the loss of a node other than the first.
exec srun --kill-on-bad-exit=0 python -m tokasaurus.launch.torchrun \
    model="$MODEL" dp_size="$SLURM_NTASKS" host=0.0.0.0 shutdown_timeout_s=60
