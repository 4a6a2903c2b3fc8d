# Sourced by quickstart.sh and tests/run.sh: a virtual environment .venv with vqscale in it, made once, activated.
#
#   environment [EXTRA]         e.g. environment test; installs again only when pyproject.toml or EXTRA changed
#   quoted TEXT                 a path as the value of key=value, whatever signs it has
#   start PROGRAM [word ...]    on $processes processes, of which nothing listens to the network

environment() {
    local extra=${1:-} python=${PYTHON:-python3} stamp
    "$python" - <<'CHECK' || return 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: vqscale needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: "
             "set PYTHON to a newer one, e.g. PYTHON=python3.11")
CHECK
    stamp="$(cksum <pyproject.toml) $extra"
    if [ ! -x .venv/bin/python ]; then
        echo "making the virtual environment .venv"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    if ! grep -qxF "$stamp" .venv/installed 2>/dev/null; then
        echo "installing vqscale${extra:+[$extra]} into .venv (a few minutes the first time)"
        python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
        echo "$stamp" >>.venv/installed
    fi
}

start() {
    if [ "$processes" = 1 ]; then python "$@"; else python -m vqscale.parallel.local "$processes" "$@"; fi
}

quoted() { printf "'%s'" "${1//\'/\'\'}"; }
