#!/usr/bin/env bash
# Everything that only a GPU can tell, within ten minutes (every stage has its limit) and without a network: build for
# the card that is there, run the kernels' tests on it, time them beside their peers, and look for bad accesses and races.
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
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$python must be Python 3.11 or later"; exit 1; }

card() {
    "$python" - <<'PY'
import datetime, json, platform, shutil, subprocess, torch
driver = None
if shutil.which("nvidia-smi"):
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True).stdout.split("\n")[0] or None
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "card": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "memory_bytes": p.total_memory, "torch": torch.__version__, "torch_cuda": torch.version.cuda,
    "python": platform.python_version(), "driver": driver, "date": datetime.date.today().isoformat(),
}))
PY
}

build() {
    local arch
    echo '{"failed": true}' >"$out/build.json"
    arch=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability(0))') || return 1
    "$python" -c 'import pybind11' || { echo "pybind11 is missing: $python -m pip install pybind11"; return 1; }
    PROSOCIAL_CUDA=on PROSOCIAL_CUDA_ARCHS=$arch timeout 120 "$python" setup.py --quiet build --build-base build/gpu \
        --build-lib "$site" || return 1
    "$python" -m prosocial_ext.cli env --json >"$out/build.tmp" && mv "$out/build.tmp" "$out/build.json"
}

# pytest on the card, at most so many seconds, under the command that PREFIX holds; what it counted until then goes to
# OUT/<name>.json whether or not all passed. What a torch of another version warns of is no failure here.
prefix=()
on_card() {
    local name=$1 seconds=$2 code
    shift 2
    rm -f "$out/$name.xml"
    echo '{"failed": true}' >"$out/$name.json"
    "$python" -c 'import pytest, hypothesis' || { echo "missing: $python -m pip install pytest hypothesis"; return 1; }
    # Interrupted, pytest still writes down what it has seen.
    timeout -s INT -k 10 "$seconds" "${prefix[@]}" "$python" -m pytest "$@" -q -m 'not slow' -W default \
        -p no:cacheprovider -o pythonpath="$site ." --junitxml="$out/$name.xml"
    code=$?
    "$python" -c '
import json, os, sys, xml.etree.ElementTree as tree
path, code = sys.argv[1], int(sys.argv[2])
suite = next(tree.parse(path).iter("testsuite")).attrib if os.path.exists(path) else {}
found = {key: suite[key] for key in ("tests", "failures", "errors", "skipped", "time") if key in suite}
json.dump({"exit": code, "timed_out": code in (124, 137), **found}, open(sys.argv[3], "w"))
' "$out/$name.xml" "$code" "$out/$name.json"
    return $code
}

# The ops against the ops on the CPU, then all cases of tests/simt, with copies of their tensors on the card.
tests() {
    local status=0
    on_card test 100 tests/gpu || status=1
    PROSOCIAL_TEST_KERNELS=gpu on_card cases 70 tests/simt || status=1
    return $status
}

bench() {
    rm -f "$out/bench.json"
    timeout 170 "$python" -m benchmarks.gpu --json "$out/bench.json"
}

# Every fifth of the small tests, which is some of each family, under each tool: OUT/sanitize-<tool>.json. What a tool finds
# is a failure, and so is a test that fails under it; one that refuses the device, or runs out of time, is recorded. torch
# asks for memory tensor by tensor, so that an access beyond one is seen.
sanitize() {
    local tool status=0 log found
    rm -f "$out"/sanitize*
    command -v compute-sanitizer >/dev/null || { echo '{"sanitizer": "not found"}' >"$out/sanitize.json"; return 0; }
    for tool in memcheck racecheck initcheck; do
        log=$out/sanitize-$tool.log
        prefix=(compute-sanitizer --tool "$tool" --error-exitcode 99 --log-file "$log")
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 PROSOCIAL_GPU_TESTS_EVERY=5 \
            on_card "sanitize-$tool" 35 tests/gpu -k 'small and not hundred' >"$out/sanitize-$tool.txt" 2>&1
        found=$(grep -v SUMMARY "$log" 2>/dev/null | grep -E '========= .*(Invalid|Race|hazard|Uninitialized|Barrier)' |
            head -n 1)
        "$python" -c '
import json, sys
path, found, log = sys.argv[1:]
result = {"exit": 1, "timed_out": False, **json.load(open(path))}
refused = any(words in log for words in ("not supported", "privileges", "ERR_NVGPUCTRPERM"))
broken = int(result.get("failures", 0)) + int(result.get("errors", 0)) > 0
result["failed"] = bool(found) or broken or (result["exit"] != 0 and not result["timed_out"] and not refused)
if found or result["exit"]:
    result["says"] = found or log
json.dump(result, open(path, "w"))
sys.exit(result["failed"])
' "$out/sanitize-$tool.json" "$found" "$(tail -n 3 "$log" 2>/dev/null)" || status=1
        cat "$out/sanitize-$tool.json" && echo
    done
    prefix=()
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
