#!/usr/bin/env bash
# Fresh machine to a trained, evaluated model.
#
#   bash launch/quickstart.sh [--data DIR] [--out DIR] [train.py options, such as --set run.seed=1]
#
# Without --data it generates a set of sound events. DIR may be any folder `class/clip.ext`, or ESC-50's layout.
set -euo pipefail

data="" out="" more=()
while [ $# -gt 0 ]; do
    case "$1" in
    --data | --out)
        [ $# -gt 1 ] || { echo "error: $1 needs a folder" >&2; exit 2; }
        if [ "$1" = --data ]; then data="$2"; else out="$2"; fi
        shift 2
        ;;
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        more+=("$1")
        shift
        ;;
    esac
done
if [ -n "$data" ] && [ ! -e "$data" ]; then
    echo "error: --data $data: no such folder" >&2
    exit 1
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ -z "$out" ]; then # a new folder each time: an earlier run is never touched
    out="runs/quickstart"
    number=2
    while [ -e "$out" ]; do
        out="runs/quickstart-$number"
        number=$((number + 1))
    done
elif [ -d "$out" ] && [ -n "$(ls -A "$out")" ] && [[ " ${more[*]-} " != *" --resume "* ]]; then
    echo "error: --out $out: already holds files; choose another folder, or add --resume to continue the run in it" >&2
    exit 1
fi
if [ -z "$data" ]; then
    data="runs/sound-events"
    python -m fastsskd.sound_events --out "$data"
fi
mkdir -p "$(dirname "$out")"
manifest="$out.manifest"
fastsskd index "$data" --out "$manifest"

here="$(dirname "${BASH_SOURCE[0]}")"
port=$((20000 + RANDOM % 20000)) # so that two runs on one machine do not meet
deepspeed --master_port "$port" "$here/train.py" --ds_config "$here/ds_config.json" --config "$here/configs/quickstart.toml" \
    --set "data.manifest=$manifest" --set "run.out=$out" ${more[@]+"${more[@]}"}
# The launcher's own exit code does not tell success; the result does.
python - "$out/result.json" <<'PYTHON'
import json, sys
try:
    status = json.load(open(sys.argv[1]))["status"]
except (OSError, ValueError, KeyError):
    sys.exit(f"error: {sys.argv[1]} was not written; see the messages above")
sys.exit(0 if status == "complete" else f"error: the run ended as {status!r}; see {sys.argv[1]}")
PYTHON
