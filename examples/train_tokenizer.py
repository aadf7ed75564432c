"""A byte-level BPE tokenizer from text of your own, for `mole prepare --tokenizer`.

Run: python examples/train_tokenizer.py novels.jsonl.gz tokenizer/ --entries 8192
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lookup_experts.training.documents import read_documents
from lookup_experts.training.inputs import find_inputs

END_OF_DOCUMENT = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="+", help="files that `mole prepare` takes")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--entries", type=int, default=8192)
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="of text to look at")
    arguments = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.entries,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = read_texts(arguments.text, arguments.out, arguments.max_bytes)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT)
    fast.save_pretrained(arguments.out)
    print(f"{len(fast)} entries in {arguments.out}")


def read_texts(paths: list[Path], out: Path, max_bytes: int) -> Iterator[str]:
    for source in find_inputs([str(path) for path in paths], out):
        for chunk in read_documents(source, "text"):
            yield chunk.text
            max_bytes -= len(chunk.text.encode())
            if max_bytes <= 0:
                return


if __name__ == "__main__":
    main()
