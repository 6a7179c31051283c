#!/bin/bash
# One run on several hosts of a SLURM cluster, with a process for each GPU:
#
#   sbatch examples/cluster/slurm.sh my.toml --output /shared/runs/mine
#
# The model, the data and --output lie on a file system that all hosts share.
#SBATCH --job-name=jlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Two minutes before its time is up, or when it gives way to another job, every process
# gets SIGTERM: the run saves and ends with status 0.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

if [ $# -lt 3 ] || [ "$2" != --output ]; then
    echo "usage: sbatch $0 CONFIG.toml --output DIR [OPTION ...]" >&2
    exit 2
fi
config=$1 run=$3
shift 3

# A job that was requeued goes on from the last state that was saved.
if [ -d "$run/state" ]; then
    exec srun --kill-on-bad-exit=1 jlora train --resume "$run" --distributed auto
fi
exec srun --kill-on-bad-exit=1 \
    jlora train "$config" --output "$run" --overwrite --distributed auto "$@"
