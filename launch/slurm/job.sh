# Sourced by train.sbatch and array.sbatch: one program as one job step, with requeueing.
#
#   run SCRIPT PROGRAM [word ...]    torchrun PROGRAM word ... on every node of the job; exits with what the job, which
#                                    was submitted as SCRIPT, has to exit with
#
# SLURM's USR1 (time is nearly up, see --signal) or TERM (preemption) reaches every process of the step; the ranks agree,
# save, and leave with status 75, which requeues the job: the same command goes on where it was. A job that somebody
# cancels saves too, and is not requeued. A program that does not listen is left alone until its time is up. Settings, by
# environment:
#
#   VQSCALE_PROCESSES       processes per node (the GPUs of a node, or 1)
#   VQSCALE_MAX_RESTARTS    requeues before the job gives up (100)

say() { echo "$(date +%FT%T) [job ${SLURM_JOB_ID} start ${SLURM_RESTART_COUNT:-0}] $*"; }

from_scontrol() { # from_scontrol KEY show ...: the value of KEY=value in what scontrol says
    local key=$1
    shift
    scontrol "$@" | tr ' ' '\n' | sed -n "s/^$key=//p" | head -n 1
}

# What every node runs. torchrun's agent sleeps through the signals, which its workers hear themselves: it would kill them
# half a minute after, or die of USR1 at once. Names of nodes need not resolve, so addresses are asked of SLURM, and who
# is the meeting place is said: torchrun would look up its own name to find out.
on_every_node() {
    local host=false
    [ "${SLURM_NODEID:-0}" != 0 ] || host=true
    trap '' USR1 USR2 TERM
    exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$VQSCALE_PROCESSES" --signals-to-handle=SIGINT \
        --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$VQSCALE_ENDPOINT" \
        --rdzv-conf="is_host=$host" \
        --local-addr="$(from_scontrol NodeAddr show node "$SLURMD_NODENAME")" launch/slurm/rank.py "$@"
}

run() {
    local script=$1 first step status asked
    shift
    [ -f "$1" ] || { say "there is no $1 in $PWD: submit from the repository"; exit 2; }
    # shellcheck disable=SC1091
    [ ! -f .venv/bin/activate ] || source .venv/bin/activate
    first=$(from_scontrol NodeAddr show node "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
    export VQSCALE_ENDPOINT="$first:$((20000 + SLURM_JOB_ID % 20000))"
    export VQSCALE_PROCESSES=${VQSCALE_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-1} + VQSCALE_PROCESSES - 1) / VQSCALE_PROCESSES))}
    # Where every node sees them: this script as it was submitted, and the status that torchrun does not pass on.
    export VQSCALE_SUBMIT_SCRIPT="$PWD/runs/slurm/$SLURM_JOB_ID.sbatch" VQSCALE_STATUS_FILE="$PWD/runs/slurm/$SLURM_JOB_ID.status"
    mkdir -p runs/slurm
    cp "$script" "$VQSCALE_SUBMIT_SCRIPT"
    rm -f "$VQSCALE_STATUS_FILE"

    say "$SLURM_JOB_NUM_NODES nodes x $VQSCALE_PROCESSES processes, $VQSCALE_ENDPOINT: $*"
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash -c 'source launch/slurm/job.sh; on_every_node "$@"' bash "$@" &
    step=$!
    trap 'say "USR1: asking it to save and leave"; kill -USR1 "$step"' USR1
    trap 'say "TERM: asking it to save and leave"; kill -TERM "$step"' TERM
    while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done # a signal ends `wait` before the step ends
    wait "$step"
    status=$?
    asked=$(cat "$VQSCALE_STATUS_FILE" 2>/dev/null)
    rm -f "$VQSCALE_STATUS_FILE"
    say "the step ended with status $status, rank 0 with ${asked:-none}"
    [ "$asked" = 75 ] || exit "$status"
    if [ "$(from_scontrol JobState show job "$SLURM_JOB_ID")" != RUNNING ]; then
        say "not requeued: the job is being cancelled; submit it again to go on"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${VQSCALE_MAX_RESTARTS:-100}" ]; then
        say "not requeued: VQSCALE_MAX_RESTARTS ${VQSCALE_MAX_RESTARTS:-100} are used up; submit it again to go on"
    else
        say "requeue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 0
}
