#!/bin/sh
# Proves the CUDA kernels on this machine's GPU in under nine minutes: tools/gpu_proof.sh PYTHON OUT. Installs nothing.
#
# Builds what this GPU and this processor run (into build/gpu-proof), then: the tests of the CUDA kernels, graph capture
# among them, a call of every op under compute-sanitizer, the benchmarks against the peers that import. Each stage has its
# own time limit; one that fails stops no other but the build. OUT gets a log of each stage, and a line about it in
# stages.jsonl and table.md as soon as it ends. Exit status 1 if any failed.
#
# MFX_PROOF_DEVICE=emulated tries the same where there is no GPU: tests and calls on the emulated device, the benchmarks
# in small on the CPU. The variables of a build (docs/build.md) hold as well.
set -eu
[ $# -eq 2 ] || { echo 'usage: tools/gpu_proof.sh PYTHON OUT' >&2; exit 2; }
python=$(command -v "$1") || { echo "gpu-proof: $1 is no program" >&2; exit 2; }
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
build=$PWD/build/gpu-proof
PATH="$(dirname "$python"):$PATH"
BENCHMARKS='benchmarks/ops/bench_stick_attention.py benchmarks/ops/bench_expert_ffn.py benchmarks/ops/bench_route_topk.py
benchmarks/ops/bench_stick_attention_decode.py benchmarks/ops/bench_grouped_gemm.py' # those that need no model, by weight
failed=0

# stage NAME SECONDS COMMAND...: runs it within its limit, and writes down how it went.
stage() {
  name=$1 limit=$2 start=$(date +%s) status=0
  shift 2
  echo "== $name, $limit s at most"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  seconds=$(($(date +%s) - start))
  printf '{"stage": "%s", "status": %d, "seconds": %d, "limit": %d}\n' "$name" $status $seconds "$limit" >>"$out/stages.jsonl"
  case $status in 0) verdict=passed ;; 124 | 137) verdict='out of time' ;; *) verdict="failed ($status)" ;; esac
  printf '| %s | %s | %d s | %s |\n' "$name" "$verdict" $seconds \
    "$(tail -n 1 "$out/$name.log" | tr '|' ' ')" | tee -a "$out/table.md"
  [ $status -eq 0 ] || failed=1
}

: >"$out/stages.jsonl"
{
  date -u '+%Y-%m-%d %H:%M UTC'
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi 2>/dev/null || true
  nvcc --version | tail -n 2
  "$python" -c 'import sys, torch; print("Python", sys.version); print("torch", torch.__version__, torch.version.cuda)'
} >"$out/machine.txt" 2>&1
printf '| stage | | time | last line |\n| --- | --- | --- | --- |\n' >"$out/table.md"

case ${MFX_PROOF_DEVICE:-cuda} in
  cuda)
    # Models need packages of their own, and are no part of this.
    jobs=$("$python" -c 'import importlib.util as i, os; print(min(8, os.cpu_count()) if i.find_spec("xdist") else 0)')
    MFX_NATIVE=${MFX_NATIVE-1} MFX_LINEINFO=${MFX_LINEINFO-1} MFX_CUDA=ON stage build 180 tools/build_flavour.sh "$python" "$build"
    [ $failed -eq 0 ] || exit 1
    export PYTHONPATH="$build/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    OMP_NUM_THREADS=2 stage tests 150 "$python" -m pytest -p no:cacheprovider @tests/cuda_tests.args \
      $([ "$jobs" -eq 0 ] || echo "-n $jobs") --junitxml "$out/tests.xml"
    stage sanitizer 90 tools/sanitize_gpu.sh "$python" --once
    stage benchmarks 120 "$python" -m benchmarks --device cuda --budget 100 --out "$out/benchmarks" $BENCHMARKS
    ;;
  emulated)
    stage build 1200 make -s extension PY="$python"
    [ $failed -eq 0 ] || exit 1
    stage tests 1200 tools/emulated.sh "$python" --junitxml "$out/tests.xml" tests/cuda/test_graph_capture_cuda.py
    stage sanitizer 300 tools/emulated.sh "$python" --run tests/cuda/steps.py cpu
    PYTHONPATH="$PWD/python" stage benchmarks 300 "$python" -m benchmarks --quick --out "$out/benchmarks" $BENCHMARKS
    ;;
  *)
    echo "gpu-proof: MFX_PROOF_DEVICE must be cuda or emulated, got '$MFX_PROOF_DEVICE'" >&2
    exit 2
    ;;
esac
exit $failed
