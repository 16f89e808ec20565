#!/bin/bash
# Trains on several hosts under Slurm: sbatch docs/launch/slurm.sh configs/v2_lite.py --workdir /shared/v2_lite
#
# One process a GPU: under Slurm jax gives each task the one GPU of its local number. The processes
# find each other by Slurm's variables. --workdir lies on a file system that all nodes see.
#SBATCH --job-name=dsjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
# SIGTERM to every task five minutes before the end: the run is saved, and the next job goes on.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
source .venv/bin/activate

# One failed task ends the job, so that it can be started again whole.
srun --kill-on-bad-exit=1 python -u tools/train.py "$@"
