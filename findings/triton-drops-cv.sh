#!/usr/bin/env bash
# triton 3.6.0: `tl.load(..., cache_modifier=".cv")` is accepted and documented (".cv stands for don't
# cache and fetch again"), and compiled for NVIDIA GPUs into a plain `ld.global`, without a word; .ca,
# .cg and volatile=True are kept. A kernel that relies on it reads memory of the host that another
# processor writes to out of the GPU's cache. Seen:
#   {'.ca': 'ld.global.ca.b32', '.cg': 'ld.global.cg.b32', '.cv': 'ld.global.b32',
#    'volatile': 'ld.volatile.global.b32'}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.6.0
cat > "$folder/modifiers.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy(source, target, modifier: tl.constexpr, volatile: tl.constexpr):
    tl.store(target, tl.load(source, cache_modifier=modifier, volatile=volatile))


def load_of(modifier, volatile):
    signature = {"source": "*i32", "target": "*i32", "modifier": "constexpr", "volatile": "constexpr"}
    constants = {"modifier": modifier, "volatile": volatile}
    compiled = triton.compile(ASTSource(copy, signature, constants), GPUTarget("cuda", 90, 32))
    return re.search(r"ld\.(?!param)[\w.]*global[\w.]*", compiled.asm["ptx"])[0]


found = {modifier: load_of(modifier, False) for modifier in (".ca", ".cg", ".cv")}
found["volatile"] = load_of("", True)
print(found)
assert found == {
    ".ca": "ld.global.ca.b32",
    ".cg": "ld.global.cg.b32",
    ".cv": "ld.global.b32",
    "volatile": "ld.volatile.global.b32",
}
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/modifiers.py"
