#!/usr/bin/env bash
# safetensors 0.8.0: `save_file` writes files with mode 600 whatever the umask says, so weights that
# transformers or huggingface_hub save can be read by their owner alone, while the config.json beside
# them has the usual mode. A server that runs as another user then reads the folder but not the
# weights. Before 0.8 the file had the usual mode.
#
# Output seen:
#   safetensors 0.7.0: umask 022 -> 644
#   safetensors 0.8.0: umask 022 -> 600
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/save.py" <<'PYTHON'
import os
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)
save_file({"weight": np.zeros(4, np.float32)}, sys.argv[1])
mode = os.stat(sys.argv[1]).st_mode & 0o777
print(f"safetensors {version('safetensors')}: umask 022 -> {mode:o}")
sys.exit(mode != int(sys.argv[2], 8))
PYTHON

for pair in 0.7.0:644 0.8.0:600; do
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet "safetensors==${pair%:*}" numpy==2.3.5
    "$folder/venv/bin/python" "$folder/save.py" "$folder/${pair%:*}.safetensors" "${pair#*:}"
    rm -rf "$folder/venv"
done
