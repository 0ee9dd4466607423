# Sourced by scripts/quickstart and scripts/test, from the top folder: a virtual environment with this checkout in it,
# everything at the versions of scripts/pins.txt. Needs Python 3.11 or newer and pip; PYTHON=… says which Python.

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1

# Prints the first Python that is new enough.
find_python() {
    local python
    for python in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found; name one, such as PYTHON=/usr/bin/python3.11" >&2
    return 1
}

# has_checkout VENV: whether this very checkout is what VENV imports (-P: the current folder does not count).
has_checkout() {
    "$1/bin/python" -P -c 'import dora_cli, pathlib, sys
sys.exit(pathlib.Path(dora_cli.__file__).resolve().parents[1] != pathlib.Path.cwd().resolve())' 2>/dev/null
}

# install VENV [EXTRA]: make VENV where it is missing, and bring it up to date; a repeated call takes seconds.
install() {
    local venv=$1 extra=${2:+[$2]} python
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "Making a virtual environment in $venv with $("$python" --version)."
        "$python" -m venv "$venv"
    fi
    echo "Installing PyTorch, then this package and what it needs."
    echo "The first time that takes some minutes, mostly of downloads."
    # PyTorch by itself first: its pin decides which build is taken, before anything else can ask for another.
    # setuptools too: with it in place, no build has to fetch an environment of its own.
    # --no-compile: of 15,000 files Python compiles the few thousand that it imports, when it does, and saves a minute.
    "$venv/bin/python" -m pip install --quiet --no-compile -c scripts/pins.txt torch setuptools
    "$venv/bin/python" -m pip install --quiet --no-compile -c scripts/pins.txt --no-build-isolation --editable ".$extra"
}
