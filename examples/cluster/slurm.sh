#!/bin/bash
# Koi under Slurm: sbatch slurm.sh. Each node runs one torchrun, which starts a rank for each GPU.
#SBATCH --job-name=koi
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM two minutes before the time is up, to let the ranks save themselves.
#SBATCH --signal=TERM@120

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# train.py calls koi.train(…, checkpoint_dir=…, resume=True) in a folder that all nodes see.
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29400" \
    train.py
