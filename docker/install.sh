#!/usr/bin/env bash
# Install roll_r3 and its dependencies into a virtual environment. Used by the Makefile, CI and the Dockerfiles.
#
#   docker/install.sh cpu|gpu VENV_DIR
#
# Environment:
#   PYTHON          interpreter for the new environment, 3.11 or later (default: python3)
#   TORCH_PIP_ARGS  pip options for torch only, e.g. "--index-url https://download.pytorch.org/whl/cpu". Default on a
#                   CPU: the +cpu build from the configured package index, else from download.pytorch.org. A plain
#                   `pip install torch` would install several GB of CUDA packages.
#
# Does nothing if this script, the constraints and pyproject.toml have not changed.
set -euo pipefail

usage="usage: docker/install.sh cpu|gpu VENV_DIR"
kind=${1:?$usage}
venv=$(realpath -m "${2:?$usage}")
cd "$(dirname "$0")/.."
constraints=docker/constraints-cpu.txt
torch_version=2.13.0
stamp=$venv/.roll_r3-installed

say() { printf '[install] %s\n' "$*"; }

[[ $kind == cpu || $kind == gpu ]] || { echo "$usage" >&2; exit 2; }
wanted="$kind $(cat docker/install.sh "$constraints" pyproject.toml | sha256sum | cut -d' ' -f1) $PWD"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "$venv is up to date"
    exit 0
fi

if [[ ! -x $venv/bin/python ]]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "[install] $("$python" --version) is too old: name Python 3.11 or later in PYTHON" >&2; exit 1; }
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
quiet=(install -qq --no-input)  # errors only

say "pip and setuptools"
"${pip[@]}" "${quiet[@]}" --upgrade pip 'setuptools>=77'

install_cpu() {
    say "torch $torch_version, the CPU build"
    if [[ -n ${TORCH_PIP_ARGS:-} ]]; then
        # shellcheck disable=SC2086  # several options in one variable
        "${pip[@]}" "${quiet[@]}" --no-deps $TORCH_PIP_ARGS "torch==$torch_version"
    elif ! "${pip[@]}" "${quiet[@]}" --no-deps "torch==$torch_version+cpu"; then
        say "the configured package index has no torch $torch_version+cpu: trying download.pytorch.org"
        "${pip[@]}" "${quiet[@]}" --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu"
    fi
    # The list is complete and installed without a resolver: sglang's metadata requires another torch and a CUDA stack.
    say "$(grep -c == "$constraints") packages of $constraints (a few minutes the first time)"
    "${pip[@]}" "${quiet[@]}" --no-deps -r "$constraints"
}

# Not yet run by the project: it needs GPUs, CUDA 13 with nvcc (transformer-engine compiles its extension), and cuDNN.
install_gpu() {
    say "torch $torch_version"
    # shellcheck disable=SC2086
    "${pip[@]}" "${quiet[@]}" ${TORCH_PIP_ARGS:-} "torch==$torch_version"
    say "the trainer: megatron-core, transformer-engine, Ray"
    "${pip[@]}" "${quiet[@]}" --no-build-isolation '.[gpu,dev]'
    say "SGLang, in $venv-sglang because it pins another torch"
    "$venv/bin/python" -m venv "$venv-sglang"
    "$venv-sglang/bin/python" -m pip "${quiet[@]}" "$(sed -n 's/^sglang = \["\(.*\)"\]$/\1/p' pyproject.toml)"
    say "write actor_infer.strategy_args.strategy_config.python: $venv-sglang/bin/python"
}

"install_$kind"
say "roll_r3 itself, editable"
PYTHONWARNINGS=ignore "${pip[@]}" "${quiet[@]}" --no-deps --no-build-isolation --editable .
"$venv/bin/python" -m roll_r3.run --help > /dev/null
echo "$wanted" > "$stamp"
say "done: $venv"
