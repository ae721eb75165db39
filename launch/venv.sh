# Sourced by the other scripts: `source launch/venv.sh EXTRA` gives an active .venv with ringattn[EXTRA] in it.
# Nothing is installed twice: a stamp per extra remembers what pyproject.toml and constraints.txt were.
extra=$1
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ringattn needs Python 3.11 or newer; python3 is $(python3 --version)" >&2; exit 1; }
# Made anew if it is missing, half made, or its Python is gone.
{ .venv/bin/python -c "" && [ -e .venv/bin/activate ]; } 2>/dev/null || python3 -m venv --clear .venv
source .venv/bin/activate
stamp=".venv/installed-$extra"
if [ ! -e "$stamp" ] || ! cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then
    echo "installing ringattn[$extra] into .venv; torch is large, the first time may take some minutes" >&2
    pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extra]"
    cat pyproject.toml constraints.txt > "$stamp"
fi
