#!/usr/bin/env bash
# The environment of trl_ppo.py: TRL 1.9.2, the last release with a PPO trainer (trl.experimental.ppo). The project's own
# environment has a newer TRL without one. Everything but TRL has the project's versions, so that both sides run the
# same torch and transformers.
#
#   bench/peers/setup_trl_ppo.sh [FOLDER]      default: bench/peers/.venv-trl-ppo (git-ignored); PYTHON picks the python
#
# Says nothing and changes nothing when the folder is already as asked. For torch's CPU build where pip would give the
# CUDA one, point pip at it (PIP_INDEX_URL or PIP_FIND_LINKS) before the first call.
set -euo pipefail

TORCH=torch==2.13.0
PINS=(trl==1.9.2 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 datasets==5.2.0 pandas==3.1.1)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/.venv-trl-ppo}
lock=$here/../../requirements.lock
stamp=$folder/.trl-ppo
wanted="$TORCH ${PINS[*]} lock $(cksum < "$lock")"

[[ -f $stamp && $(< "$stamp") == "$wanted" ]] && exit 0
[[ -x $folder/bin/python ]] || "${PYTHON:-python3}" -m venv "$folder"
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# what the pins draw in is the project's version too; torch goes first, for then the others find one installed
grep -v '^trl==' "$lock" > "$constraints"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints")
"${pip[@]}" "$TORCH"
"${pip[@]}" "$TORCH" "${PINS[@]}"
TRL_EXPERIMENTAL_SILENCE=1 "$folder/bin/python" -c "from trl.experimental.ppo import PPOTrainer"
printf '%s\n' "$wanted" > "$stamp"
