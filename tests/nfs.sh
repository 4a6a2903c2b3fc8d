#!/usr/bin/env bash
# Drills on a real NFS: a server in user space and two hosts with kernels of their own, all on this machine and gone
# afterwards (tests/lib/nfs.py); what is done to locks and to a run: tests/lib/nfs_drills.py. Table and JSON go to
# tools/results/drills/, or to the folder given.
#
#   bash tests/nfs.sh [OUT]
#
# As root on Debian it installs what is missing; elsewhere it says why it does nothing. Half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*"; exit 0; }
[ "$(id -u)" = 0 ] || skip "hosts and their wires are made as root, and this is user $(id -un)"
needed=(linux.uml ganesha.nfsd rpcbind modprobe ip unshare)
missing() { local each; for each in "${needed[@]}"; do PATH="$PATH:/usr/sbin:/sbin" command -v "$each" >/dev/null || echo "$each"; done; }
if [ -n "$(missing)" ]; then
    command -v apt-get >/dev/null || skip "$(missing | tr '\n' ' ')is not here, nor apt-get to install it with"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        user-mode-linux nfs-ganesha nfs-ganesha-vfs rpcbind kmod iproute2 || skip "an NFS cannot be installed, see above"
fi
[ -c /dev/net/tun ] || skip "there is no /dev/net/tun for the wires of the hosts"
unshare --net --mount --pid --fork true || skip "no namespaces can be made here, see above"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    source launch/environment.sh
    environment test
fi
export PATH="$PATH:/usr/sbin:/sbin" PYTHONPATH="tests/lib:$PWD${PYTHONPATH:+:$PYTHONPATH}" OUT="${1:-tools/results/drills}"
unshare --net --mount --pid --fork --mount-proc --kill-child bash -c '
    mount -t tmpfs tmpfs /run && mkdir /run/ganesha /run/rpcbind
    exec python tests/lib/nfs_drills.py --out "$OUT"'
