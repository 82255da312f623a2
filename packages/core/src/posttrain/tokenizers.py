"""Tokenizers that core brings: characters, bytes, and tokenizer files in JSON, each with a chat template.

A component (`Characters`, `Bytes`, `TokenizersJSON`) is configuration; its `load()` gives the tokenizer. `encode` adds
no special token and `decode` skips them. Knows text and ids alone: no model, no data set.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from posttrain.data import Prompt
from posttrain.errors import ConfigError, DataError, PluginError, Problem, did_you_mean
from posttrain.protocols import Tokenizer

__all__ = ["Bytes", "Characters", "TokenizersJSON", "prompt_ids"]
"""What authors of plugins may import; the rest is for the loop."""

Messages = Sequence[Mapping[str, str]]
ChatTemplate = Callable[[Messages], str]

BOS, EOS = "\ufdd0", "\ufdd1"
"""What a template of `Characters` and `Bytes` gets as `bos_token` and `eos_token`: Unicode noncharacters, which are
reserved for use inside a program and therefore never part of a text."""

NAMES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>"}
"""How the special tokens of `Characters` and `Bytes` are spelled in the files that `save` writes."""
_CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"
_LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
"""Their default chat templates in Jinja, for those files."""


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt up to where the answer begins; a text gets the tokenizer's bos in front, where it has one.

    >>> prompt_ids(Prompt(text="1+"), Characters("+1", bos=True).load())
    [1, 4, 3]
    """
    if prompt.tokens is not None:
        return list(prompt.tokens)
    if prompt.messages is not None:
        return tokenizer.chat(prompt.messages)
    return [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(prompt.text or "")]


@final
@dataclass(frozen=True, slots=True)
class Characters:
    """One token per character. Ids: pad 0, bos 1 (where asked for), eos, then the alphabet in order.

    >>> tokenizer = Characters("0123456789+=").load()
    >>> tokenizer.encode("1+2")
    [3, 12, 4]
    >>> tokenizer.decode([3, 12, 4, tokenizer.eos])
    '1+2'
    """

    alphabet: str = string.digits + string.ascii_letters + string.punctuation + " \n"
    """The characters, each once; the default is printable ASCII."""
    bos: bool = False
    """Whether text prompts begin with a bos token."""
    template: str = ""
    """Chat template (Jinja); empty: the messages' contents one after the other, roles not marked."""

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise ValueError("alphabet is empty; list the characters that prompts and answers are made of")
        if twice := next((c for i, c in enumerate(self.alphabet) if c in self.alphabet[:i]), None):
            raise ValueError(f"alphabet holds {twice!r} twice; each character stands for one id")

    def load(self) -> Tokenizer:
        first = 3 if self.bos else 2
        return _CharacterTokenizer(
            alphabet=self.alphabet, ids={c: first + i for i, c in enumerate(self.alphabet)}, pad=0,
            bos=1 if self.bos else None, eos=first - 1, vocab_size=first + len(self.alphabet),
            template=_template(self.template, _contents), source=self.template or _CONTENTS)


@final
@dataclass(frozen=True, slots=True)
class Bytes:
    """The bytes of UTF-8 as ids 0 to 255, then pad 256, eos 257 and, where asked for, bos 258. Encodes every text.

    >>> tokenizer = Bytes().load()
    >>> tokenizer.encode("é"), tokenizer.eos, tokenizer.vocab_size
    ([195, 169], 257, 258)
    """

    bos: bool = False
    """Whether text prompts begin with a bos token."""
    template: str = ""
    """Chat template (Jinja); empty: a line `role: content` for each message, then `assistant: `."""

    def load(self) -> Tokenizer:
        return _ByteTokenizer(pad=256, eos=257, bos=258 if self.bos else None, vocab_size=258 + self.bos,
                              template=_template(self.template, _lines), source=self.template or _LINES)


@final
@dataclass(frozen=True, slots=True)
class TokenizersJSON:
    """A tokenizer file of the `tokenizers` library (`tokenizer.json`), with its special tokens named explicitly."""

    path: str = field(default="", metadata={"path": True})
    """The file, or a directory that holds a `tokenizer.json`."""
    eos: str = ""
    """Token that ends an answer, as the file spells it."""
    pad: str = ""
    """Empty: the eos token."""
    bos: str = ""
    """Token in front of text prompts; empty: none."""
    chat_template: str = ""
    """Chat template (Jinja). Without one, prompts made of messages are refused."""
    chat_template_file: str = field(default="", metadata={"path": True})
    """A file that holds the chat template."""

    def __post_init__(self) -> None:
        if not self.path or not self.eos:
            raise ValueError("give path (a tokenizer.json) and eos (the token that ends an answer, e.g. '<|im_end|>')")
        if self.chat_template and self.chat_template_file:
            raise ValueError("chat_template and chat_template_file say the same thing; keep one")

    def load(self) -> Tokenizer:
        library = _imported("tokenizers")
        path = Path(self.path)
        path = path / "tokenizer.json" if path.is_dir() else path
        text = _text(path, "tokenizer")
        try:
            loaded = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare `Exception`
            raise ConfigError([Problem(f"not a tokenizer file: {error}", str(path))]) from error
        loaded.no_truncation()
        loaded.no_padding()
        ids: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
        eos = _special(ids, self.eos, "eos", path)
        source = self.chat_template or (
            _text(Path(self.chat_template_file), "chat template") if self.chat_template_file else "")
        return _FileTokenizer(
            library=loaded, eos=eos, pad=_special(ids, self.pad, "pad", path) if self.pad else eos,
            bos=_special(ids, self.bos, "bos", path) if self.bos else None, vocab_size=max(ids.values()) + 1,
            template=_template(source, _refused, bos_token=self.bos, eos_token=self.eos), source=source)


@final
@dataclass(frozen=True, slots=True)
class _CharacterTokenizer:
    alphabet: str
    ids: Mapping[str, int]
    pad: int
    bos: int | None
    eos: int
    vocab_size: int
    template: ChatTemplate
    source: str
    """The chat template in Jinja; empty for none."""

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            raise DataError([f"character {c!r} at position {text.index(c)} of {_shortened(text)} is not in the "
                             "tokenizer's alphabet; add it to tokenizer.alphabet or change the text"]) from None

    def decode(self, tokens: Sequence[int]) -> str:
        first = self.vocab_size - len(self.alphabet)
        # models may have more embeddings than tokens: the rest reads as nothing, as in the library of tokenizers
        return "".join(self.alphabet[t - first] for t in tokens if first <= t < self.vocab_size)

    def chat(self, messages: Messages) -> list[int]:
        return _with_special_tokens(self, messages)

    def save(self, directory: Path) -> None:
        special = _named_specials(self)
        vocabulary = {**{token: getattr(self, name) for name, token in special.items()}, **self.ids}
        _write_files(directory, _library_file(
            self, special, model={"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
            pre_tokenizer={"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
            decoder={"type": "Fuse"}), special, self.source)


@final
@dataclass(frozen=True, slots=True)
class _ByteTokenizer:
    pad: int
    bos: int | None
    eos: int
    vocab_size: int
    template: ChatTemplate
    source: str
    """The chat template in Jinja; empty for none."""

    def encode(self, text: str) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise DataError([f"character {text[error.start]!r} at position {error.start} of {_shortened(text)} is half "
                             "of a surrogate pair, which is no text; mend the row"]) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    def chat(self, messages: Messages) -> list[int]:
        return _with_special_tokens(self, messages)

    def save(self, directory: Path) -> None:
        special = _named_specials(self)
        vocabulary = {**{_printable(byte): byte for byte in range(256)},
                      **{token: getattr(self, name) for name, token in special.items()}}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        _write_files(directory, _library_file(
            self, special, model={"type": "BPE", "vocab": vocabulary, "merges": []}, pre_tokenizer=level,
            decoder=level), special, self.source)


@final
@dataclass(frozen=True, slots=True)
class _FileTokenizer:
    library: Any
    pad: int
    bos: int | None
    eos: int
    vocab_size: int
    template: ChatTemplate
    source: str
    """The chat template in Jinja; empty for none."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.library.decode([int(t) for t in tokens], skip_special_tokens=True)
        return text

    def chat(self, messages: Messages) -> list[int]:
        return self.encode(self.template(messages))

    def save(self, directory: Path) -> None:
        ids = {"pad": self.pad, "bos": self.bos, "eos": self.eos}
        special = {name: str(self.library.id_to_token(i)) for name, i in ids.items() if i is not None}
        _write_files(directory, self.library.to_str(), special, self.source)


def _named_specials(tokenizer: _CharacterTokenizer | _ByteTokenizer) -> dict[str, str]:
    """pad, bos and eos with their spelling, those that the tokenizer has."""
    ids = {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos}
    return {name: token for name, token in NAMES.items() if ids[name] is not None}


def _library_file(tokenizer: _CharacterTokenizer | _ByteTokenizer, special: Mapping[str, str],
                  **parts: Mapping[str, Any]) -> str:
    """The `tokenizer.json` by which the `tokenizers` library gives the same ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {token: getattr(tokenizer, name) for name, token in special.items()}
    added = [{"id": i, "content": token, **flags} for token, i in sorted(ids.items(), key=lambda item: item[1])]
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                       "normalizer": None, "post_processor": None, **parts}, ensure_ascii=False, indent=1)


def _printable(byte: int) -> str:
    """The character that stands for a byte in byte-level vocabularies: itself where it prints, else the next free one
    from U+0100 on (Radford et al. 2019, the code of GPT-2).

    >>> _printable(65), _printable(32), _printable(10)
    ('A', 'Ġ', 'Ċ')
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in shown else chr(256 + sum(b not in shown for b in range(byte)))


def _write_files(directory: Path, library_file: str, special: Mapping[str, str], template: str) -> None:
    """What `AutoTokenizer` of transformers loads; the chat template stands where newer and where older readers look."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                "model_input_names": ["input_ids", "attention_mask"],
                                **{f"{name}_token": token for name, token in special.items()}}
    if template:
        settings["chat_template"] = template
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "tokenizer.json").write_text(library_file, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_special_tokens(tokenizer: _CharacterTokenizer | _ByteTokenizer, messages: Messages) -> list[int]:
    """Encode a rendered conversation in which `BOS` and `EOS` stand for their ids."""
    if forged := next((m for m in messages if BOS in m["content"] or EOS in m["content"]), None):
        raise DataError([f"the message {_shortened(forged['content'])} holds a Unicode noncharacter (U+FDD0 or "
                         "U+FDD1), which marks special tokens here; remove it"])
    special = {BOS: [] if tokenizer.bos is None else [tokenizer.bos], EOS: [tokenizer.eos]}
    parts = re.split(f"([{BOS}{EOS}])", tokenizer.template(messages))
    return [i for part in parts for i in (special[part] if part in special else tokenizer.encode(part))]


def _contents(messages: Messages) -> str:
    return "".join(m["content"] for m in messages)


def _lines(messages: Messages) -> str:
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def _refused(messages: Messages) -> str:
    raise DataError(["the prompt is made of messages, but the tokenizer has no chat template; set "
                     "tokenizer.chat_template or tokenizer.chat_template_file"])


def _template(source: str, default: ChatTemplate, bos_token: str = BOS, eos_token: str = EOS) -> ChatTemplate:
    """A chat template as Hugging Face's models ship them: Jinja, sandboxed, with `messages`, `add_generation_prompt`,
    `bos_token`, `eos_token` and `raise_exception`. `strftime_now` is left undefined, so that a run does not depend on
    the day (templates test for it). The template is compiled here: a wrong one is found before training.

    >>> _template("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}", _lines, "<s>")(
    ...     [{"role": "user", "content": "hi"}])
    '<s>[hi]'
    """
    if not source:
        return default
    jinja = _imported("jinja2")
    sandbox = _imported("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)

    def raise_exception(message: str) -> None:
        raise jinja.TemplateError(message)

    try:
        compiled = sandbox.from_string(source)
    except jinja.TemplateError as error:
        raise ConfigError([f"the chat template of the tokenizer does not compile: {error}"]) from error

    def render(messages: Messages) -> str:
        try:
            text: str = compiled.render(
                messages=[dict(m) for m in messages], add_generation_prompt=True, bos_token=bos_token,
                eos_token=eos_token, raise_exception=raise_exception)
        except (jinja.TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError([f"the chat template refuses the messages: {error}"]) from error
        return text

    return render


def _imported(module: str) -> Any:
    """A library of the extra `tokenizers`, or an error that says how to install it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise PluginError([f"the tokenizer needs {module.split('.')[0]}, which is not installed: "
                           "pip install 'posttrain-core[tokenizers]'"]) from error


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(f"the {what} file cannot be read: {error}", str(path))]) from error


def _special(ids: Mapping[str, int], token: str, name: str, path: Path) -> int:
    if token not in ids:
        message = f"tokenizer.{name} is {token!r}, which is not in the vocabulary{did_you_mean(token, ids)}"
        raise ConfigError([Problem(message, str(path))])
    return ids[token]


def _shortened(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
