#!/usr/bin/env bash
# Everything that only a GPU can tell, within ten minutes and without a network: build for the card that is there, run
# the kernels' tests on it, time them beside their peers, and look for bad accesses and races.
#
#   benchmarks/gpu_check.sh [build|test|bench|sanitize|all] [OUT]
#
# Uses the python3 (3.11 or later, PYTHON=...), torch, CMake and nvcc that are there. Each stage writes OUT/<stage>.json
# as it goes (default OUT: runs/gpu) and can be repeated alone; a stage that fails does not keep the next from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

stage=${1:-all}
out=$(mkdir -p "${2:-runs/gpu}" && cd "${2:-runs/gpu}" && pwd) || exit 1
python=${PYTHON:-python3}
site=$PWD/build/gpu/site
# PYTHONSAFEPATH: python -m would else find the source tree first, which has no compiled module.
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # compute-sanitizer lies beside nvcc
failed=()

card() {
    "$python" - <<'PY'
import json, platform, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "card": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "memory_bytes": p.total_memory, "torch": torch.__version__, "torch_cuda": torch.version.cuda,
    "python": platform.python_version(),
}))
PY
}

build() {
    local arch
    arch=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability(0))') || return 1
    "$python" -c 'import pybind11' || { echo "pybind11 is missing: $python -m pip install pybind11"; return 1; }
    PROSOCIAL_CUDA=on PROSOCIAL_CUDA_ARCHS=$arch "$python" setup.py --quiet build --build-base build/gpu \
        --build-lib "$site" || return 1
    "$python" -m prosocial_ext.cli env --json >"$out/build.json"
}

# The kernels against the ops on the CPU, which need no GPU for their own tests. What a torch of another version warns of
# is no failure here.
tests() {
    "$python" -m pytest tests/gpu -q -m 'not slow' -W default -p no:cacheprovider -o pythonpath="$site ." \
        --junitxml="$out/test.xml" && "$python" -c '
import json, sys, xml.etree.ElementTree as tree
suite = next(tree.parse(sys.argv[1]).iter("testsuite")).attrib
json.dump({name: suite[name] for name in ("tests", "failures", "errors", "skipped", "time")}, open(sys.argv[2], "w"))
' "$out/test.xml" "$out/test.json"
}

bench() {
    "$python" -m benchmarks.gpu --json "$out/bench.json"
}

# A sanitizer that refuses the device is recorded; only what it finds is a failure.
sanitize() {
    local tool code status=0 results=()
    command -v compute-sanitizer >/dev/null || { echo '{"sanitizer": "not found"}' >"$out/sanitize.json"; return 0; }
    for tool in memcheck racecheck initcheck; do
        timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 99 --log-file "$out/sanitize-$tool.log" \
            "$python" -m pytest tests/gpu -q -k small -W default -p no:cacheprovider -o pythonpath="$site ." >/dev/null 2>&1
        code=$?
        if grep -qi 'device not supported' "$out/sanitize-$tool.log" 2>/dev/null; then
            results+=("\"$tool\": \"device not supported\"")
        else
            results+=("\"$tool\": $code")
            [ $code -eq 99 ] && status=1
        fi
    done
    (IFS=,; printf '{%s}\n' "${results[*]}") >"$out/sanitize.json"
    return $status
}

run() {
    local name=$1 start=$SECONDS
    shift
    printf '\n==== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '==== %s: %d s\n' "$name" $((SECONDS - start))
}

card >"$out/card.json" || { echo "no GPU that torch can use"; exit 1; }
case $stage in
    build) run build build ;;
    test) run test tests ;;
    bench) run bench bench ;;
    sanitize) run sanitize sanitize ;;
    all)
        run build build
        run test tests
        run bench bench
        run sanitize sanitize # last: it is the slowest, and prints little below the table
        ;;
    *) echo "usage: $0 [build|test|bench|sanitize|all] [OUT]"; exit 2 ;;
esac
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
