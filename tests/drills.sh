#!/usr/bin/env bash
# Drills on a real SLURM that is started here, on this machine, and gone afterwards: a run on two nodes is requeued,
# preempted, killed, cut off, ... (tests/lib/drills.py). Table and JSON go to tools/results/drills/, or to the folder given.
#
#   bash tests/drills.sh [OUT]
#
# As root on Debian it installs what is missing of SLURM; elsewhere it says why it does nothing. 4 to 15 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*"; exit 0; }
[ "$(id -u)" = 0 ] || skip "SLURM's daemons are started as root, and this is user $(id -un)"
needed=(slurmctld slurmd munged sbatch ip)
missing() { local each; for each in "${needed[@]}"; do PATH="$PATH:/usr/sbin:/sbin" command -v "$each" >/dev/null || echo "$each"; done; }
if [ -n "$(missing)" ]; then
    command -v apt-get >/dev/null || skip "$(missing | tr '\n' ' ')is not here, nor apt-get to install it with"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 || skip "SLURM cannot be installed, see above"
fi
if [ -z "${VIRTUAL_ENV:-}" ]; then
    source launch/environment.sh
    environment test
fi
PYTHONPATH="tests/lib:$PWD${PYTHONPATH:+:$PYTHONPATH}" python tests/lib/drills.py --out "${1:-tools/results/drills}"
