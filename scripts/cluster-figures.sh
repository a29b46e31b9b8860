#!/usr/bin/env bash
# The figures of docs/performance.md, "The cluster on shaped NICs": two hours, root, GlusterFS.
#
#   scripts/cluster-figures.sh DIR     JSON, HTML and SVG files go there
#
# Nothing else may run on the machine meanwhile.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?expected a directory for the results: scripts/cluster-figures.sh DIR}
python=$("$root/scripts/setup.sh")
mkdir -p "$out"

# figures NAME ARGUMENTS...
figures() {
  local name=$1
  shift
  "$python" -m vllm_dualpath.cli bench cluster "$@" \
    --json "$out/$name.json" --html "$out/$name.html" --plots "$out/$name-plots" --log-dir "$out/$name-logs"
}

ours=prefill_only,dual,split
figures baselines --topology 1P1D --modes $ours,nixl_lmcache,nixl_mooncake,nixl --repeats 1 --turns 3
figures 1p1d --topology 1P1D --modes $ours --repeats 3 --turns 3
figures 1p2d --topology 1P2D --modes $ours --repeats 3 --turns 3
figures 2p1d --topology 2P1D --modes $ours --repeats 2 --turns 5 --agents 12
figures 1p3d --topology 1P3D --modes prefill_only,split,pool --repeats 1 --turns 2 --agents 4
figures unlimited --topology 1P1D --modes $ours --storage-nic unlimited --compute-nic unlimited --turns 4
figures prefix-caching --topology 1P1D --modes $ours --repeats 1 --turns 3 --prefix-caching
