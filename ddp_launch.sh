#!/usr/bin/env bash
# Runs a method file on every GPU: of this machine, of several machines, or of a Slurm allocation.
usage() {
    cat <<'TEXT'
usage: bash ddp_launch.sh [options] tad.py --model dream --data problems.jsonl ...

  --gpus N           processes per node (default: the GPUs of this machine; without any, 2)
  --nodes N          machines that take part (default 1; under Slurm, those of the allocation)
  --rdzv HOST:PORT   where they meet, the same on every machine; HOST is one of them
  --max-restarts N   start all processes again this often when one dies (default 3)
  --help

one machine        bash ddp_launch.sh tad.py --model llada --data problems.jsonl
two machines       on both:  bash ddp_launch.sh --nodes 2 --rdzv node0:29400 tad.py ...
Slurm              sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --exclusive --requeue \
                       --open-mode append --wrap "srun --cpu-bind=none bash ddp_launch.sh tad.py ..."

A run continues where it stopped: on a restart by --max-restarts, when a preempted job is requeued, and when
the same command is given again, with any number of processes. --out (and the trajectories) must be on a disk
that all machines share. On SIGTERM a run finishes its step and saves a checkpoint; torchrun kills it after
30 s, which a large checkpoint may not meet: the one before then counts. An error of the settings is repeated
by every restart.
TEXT
}

value() { [ $# -gt 1 ] || { echo "error: $1 needs a value; see --help" >&2; exit 2; }; }

gpus="" nodes="${SLURM_JOB_NUM_NODES:-1}" rdzv="" restarts=3
while [ $# -gt 0 ]; do
    case "$1" in
        --gpus) value "$@"; gpus="$2"; shift 2 ;;
        --nodes) value "$@"; nodes="$2"; shift 2 ;;
        --rdzv) value "$@"; rdzv="$2"; shift 2 ;;
        --max-restarts) value "$@"; restarts="$2"; shift 2 ;;
        --help|-h) usage; exit 0 ;;
        *.py) break ;;
        *) echo "error: unknown option $1 before the script; see --help" >&2; exit 2 ;;
    esac
done
[ $# -gt 0 ] || { echo "error: no script: bash ddp_launch.sh tad.py ...; see --help" >&2; exit 2; }

if [ -z "$gpus" ]; then
    gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
    [ "$gpus" -gt 0 ] || gpus=2
fi
if [ "$nodes" -gt 1 ]; then
    if [ -z "$rdzv" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        rdzv="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
    fi
    [ -n "$rdzv" ] || { echo "error: --nodes $nodes needs --rdzv HOST:PORT; see --help" >&2; exit 2; }
    meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$rdzv" --rdzv-id "${SLURM_JOB_ID:-nanotraj}")
else
    meet=(--standalone)
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # shared, restarted processes may meet at a stale address
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + gpus - 1) / gpus ))}"
exec "${PYTHON:-python}" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$gpus" \
    --max-restarts "$restarts" "$@"
