#!/usr/bin/env bash
# From nothing to a checked answer: sets up an environment, then starts a tiny cluster on this host
# and compares every answer with plain vLLM's. No GPU, no model hub. Exit code 0 only if all agree.
#
#   examples/quickstart.sh [--json FILE]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/scripts/setup.sh")
exec "$python" "$root/examples/quickstart.py" "$@"
