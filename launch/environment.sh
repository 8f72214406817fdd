# Sourced by launch/quickstart.sh, tests/run.sh and .ci/run: makes or reuses the virtual environment.
#
# FASTSSKD_VENV   where it is; default .venv in the checkout
# FASTSSKD_DALI   which DALI wheel: cuda13 (default; also right without a GPU) or cuda12 (V100)
# PYTHON          the interpreter that makes it; default python3
#
# The environment is complete when it holds a stamp of setup.py; another setup.py installs anew into it.

FASTSSKD_HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
FASTSSKD_VENV="${FASTSSKD_VENV:-$FASTSSKD_HOME/.venv}"
_stamp="$FASTSSKD_VENV/fastsskd-installed"
_wanted="$(cat "$FASTSSKD_HOME/setup.py" <(echo "$FASTSSKD_HOME ${FASTSSKD_DALI:-cuda13}") | cksum)"

if [ ! -x "$FASTSSKD_VENV/bin/python" ]; then
    echo "making the environment in $FASTSSKD_VENV" >&2
    "${PYTHON:-python3}" -m venv "$FASTSSKD_VENV" || {
        echo "error: '${PYTHON:-python3} -m venv $FASTSSKD_VENV' failed; it needs Python 3.10-3.12 with the venv module (Debian: python3-venv)" >&2
        return 1
    }
fi
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    echo "installing fastsskd and what it needs (about 6 GB, some minutes)" >&2
    "$FASTSSKD_VENV/bin/python" -m pip install --quiet --upgrade pip "setuptools>=77,<83" wheel &&
        "$FASTSSKD_VENV/bin/python" -m pip install --quiet --no-build-isolation -e "$FASTSSKD_HOME[${FASTSSKD_DALI:-cuda13},test]" || {
        echo "error: the installation failed; see pip's message above" >&2
        return 1
    }
    echo "$_wanted" >"$_stamp"
fi
export PATH="$FASTSSKD_VENV/bin:$PATH"
