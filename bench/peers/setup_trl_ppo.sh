#!/usr/bin/env bash
# The environment of trl_ppo.py: TRL 1.9.2, the last release with a PPO trainer (trl.experimental.ppo). The project's own
# environment has a newer TRL without one. Everything but TRL is the project's, read from its folder of packages, so that both
# sides run the same torch and transformers, whatever these are.
#
#   PYTHON=.venv/bin/python bench/peers/setup_trl_ppo.sh [FOLDER]      default: bench/peers/.venv-trl-ppo (git-ignored)
#
# Says nothing and changes nothing when the folder is already as asked.
set -euo pipefail

TRL=trl==1.9.2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/.venv-trl-ppo}
python=${PYTHON:-python3}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
stamp=$folder/.trl-ppo
wanted="$TRL $packages"

[[ -f $stamp && $(< "$stamp") == "$wanted" ]] && exit 0
rm -rf "$folder"
"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$TRL"
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$packages" > "$own/project.pth" # after its own packages, so that its TRL comes first
TRL_EXPERIMENTAL_SILENCE=1 "$folder/bin/python" -c "from trl.experimental.ppo import PPOTrainer"
printf '%s\n' "$wanted" > "$stamp"
