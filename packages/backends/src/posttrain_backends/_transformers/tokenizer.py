"""A tokenizer of transformers as a `Tokenizer`: adds no special token by itself, and knows what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from posttrain.errors import ConfigError, DataError, did_you_mean
from transformers import AutoTokenizer

from posttrain_backends.hf import source_of, unreachable

if TYPE_CHECKING:
    from posttrain_backends.hf import HFTokenizer

_FILES = ("tokenizer*", "vocab*", "*.model")
"""A folder with a tokenizer has one of them at least."""


@final
@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """See `posttrain.protocols.Tokenizer`."""

    library: Any
    pad: int
    bos: int | None
    eos: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.library.encode(text, add_special_tokens=False)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.library.decode([int(t) for t in tokens], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises `DataError` where there is no template, or the template refuses the messages."""
        if not self.library.chat_template:
            raise DataError(["the prompt is made of messages, but the tokenizer has no chat template; set "
                             "tokenizer.chat_template"])
        try:
            text: str = self.library.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise whatever Jinja or their author raises
            raise DataError([f"the chat template refuses the messages: {error}"]) from error
        return self.encode(text)

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files and its chat template."""
        self.library.save_pretrained(directory)


def load(spec: HFTokenizer) -> LoadedTokenizer:
    """See `HFTokenizer.load`."""
    library = read(spec.weights, spec.model, spec.revision, trust_remote_code=spec.trust_remote_code)
    if spec.chat_template:
        library.chat_template = spec.chat_template
    eos = _id(library, spec.eos or library.eos_token, "eos")
    pad = _id(library, spec.pad or library.pad_token or spec.eos or library.eos_token, "pad")
    bos = _id(library, spec.bos, "bos") if spec.bos else _own_bos(library)
    library.eos_token, library.pad_token = library.convert_ids_to_tokens([eos, pad])
    return LoadedTokenizer(library, pad, bos, eos, max(library.get_vocab().values()) + 1)


def read(weights: str, model: str = "", revision: str = "", *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or a repository, as transformers has it. Raises `ConfigError` where it cannot be
    read."""
    name, arguments = source_of(weights, model, revision)
    if weights and "gguf_file" not in arguments and not any(any(Path(weights).glob(pattern)) for pattern in _FILES):
        raise ConfigError([f"{weights} cannot be loaded: it holds no tokenizer (none of {', '.join(_FILES)})"],
                          next_step="Name a folder that holds one; posttrain export RUN writes the model of a run "
                                    "with its tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise unreachable(weights or model, error) from error


def _id(library: Any, token: str | None, name: str) -> int:
    vocabulary: Mapping[str, int] = library.get_vocab()
    if not token:
        raise ConfigError([f"the tokenizer names no {name} token; set tokenizer.{name} to one of its tokens"])
    if token not in vocabulary:
        raise ConfigError([f"tokenizer.{name} is {token!r}, which is not in the vocabulary"
                           f"{did_you_mean(token, vocabulary)}"])
    return vocabulary[token]


def _own_bos(library: Any) -> int | None:
    """The bos token where the tokenizer itself puts it in front of a text."""
    ids = library.encode("a")
    return library.bos_token_id if ids and ids[0] == library.bos_token_id else None
