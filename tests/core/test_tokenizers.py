"""Tokenizers: ids, round trips, special tokens, chat templates, and what each refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.data import Prompt
from posttrain.errors import ConfigError, DataError, PluginError
from posttrain.tokenizers import BOS, EOS, Bytes, Characters, TokenizersJSON, prompt_ids

USER = [{"role": "user", "content": "1+2="}]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer file with special tokens, truncation and padding that must not act."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "user", "assistant"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_token="<pad>")
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@given(text)
def test_bytes_encode_every_text(sample: str) -> None:
    tokenizer = Bytes().load()
    ids = tokenizer.encode(sample)
    assert ids == list(sample.encode())
    assert tokenizer.decode([*ids, tokenizer.eos, tokenizer.pad]) == sample


@given(st.text("0123456789+=", max_size=50), st.booleans())
def test_characters_round_trip(sample: str, bos: bool) -> None:
    tokenizer = Characters("0123456789+=", bos=bos).load()
    ids = tokenizer.encode(sample)
    special = {tokenizer.pad, tokenizer.eos} | ({tokenizer.bos} if bos else set())
    assert len(ids) == len(sample) and not special & set(ids) and all(i < tokenizer.vocab_size for i in ids)
    beyond = tokenizer.vocab_size  # of a model with more embeddings than tokens
    assert tokenizer.decode([tokenizer.pad, *ids, beyond, tokenizer.eos]) == sample


def test_ids_of_characters() -> None:
    plain, started = Characters("ab").load(), Characters("ab", bos=True).load()
    assert (plain.pad, plain.bos, plain.eos, plain.encode("ab"), plain.vocab_size) == (0, None, 1, [2, 3], 4)
    assert (started.pad, started.bos, started.eos, started.encode("ab"), started.vocab_size) == (0, 1, 2, [3, 4], 5)


def test_ids_of_bytes() -> None:
    plain, started = Bytes().load(), Bytes(bos=True).load()
    assert (plain.pad, plain.eos, plain.bos, plain.vocab_size) == (256, 257, None, 258)
    assert (started.pad, started.eos, started.bos, started.vocab_size) == (256, 257, 258, 259)


def test_cut_utf8_decodes_to_a_replacement_character() -> None:
    tokenizer = Bytes().load()
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(DataError, match=r"character 'x' at position 2 of '12x3'.*tokenizer\.alphabet"):
        Characters("123").load().encode("12x3")


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(DataError, match="position 1"):
        Bytes().load().encode("a\ud800")


@pytest.mark.parametrize(("alphabet", "message"), [("", "empty"), ("aba", "'a' twice")])
def test_alphabets_that_make_no_sense(alphabet: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Characters(alphabet)


def test_the_default_alphabet_is_printable_ascii() -> None:
    assert sorted(Characters().alphabet) == sorted([*map(chr, range(32, 127)), "\n"])


def test_prompt_ids_of_each_kind_of_prompt() -> None:
    tokenizer = Characters("12+=", bos=True).load()
    assert prompt_ids(Prompt(text="1+"), tokenizer) == [1, 3, 5]
    assert prompt_ids(Prompt(tokens=(7, 8)), tokenizer) == [7, 8]
    assert prompt_ids(Prompt(messages=tuple(USER)), tokenizer) == tokenizer.chat(USER) == tokenizer.encode("1+2=")


def test_default_chat_of_bytes_marks_roles() -> None:
    tokenizer = Bytes().load()
    assert tokenizer.decode(tokenizer.chat(USER)) == "user: 1+2=\nassistant: "


@pytest.mark.needs("jinja2")
@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens_in_a_template_become_ids(bos: bool) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Bytes(bos=bos, template=template).load()
    start = [tokenizer.bos] if bos else []
    assert tokenizer.chat([*USER, *USER]) == [*start, *b"1+2=", tokenizer.eos, *b"1+2=", tokenizer.eos]


@pytest.mark.parametrize("marker", [BOS, EOS])
def test_a_message_cannot_forge_a_special_token(marker: str) -> None:
    with pytest.raises(DataError, match="noncharacter"):
        Bytes().load().chat([{"role": "user", "content": f"a{marker}"}])


@pytest.mark.needs("jinja2")
def test_template_conventions_of_hugging_face() -> None:
    source = ("{% for m in messages %}\n  {% if m.role == 'tool' %}{{ raise_exception('no tool first') }}{% endif %}\n"
              "{{ m | tojson }}{% break %}\n{% endfor %}{{ strftime_now is defined }}")
    tokenizer = Bytes(template=source).load()
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "é"}])) == (
        '{"role": "user", "content": "é"}False')
    with pytest.raises(DataError, match="no tool first"):
        tokenizer.chat([{"role": "tool", "content": ""}])


@pytest.mark.needs("jinja2")
def test_templates_are_sandboxed() -> None:
    tokenizer = Bytes(template="{{ messages.__class__.__mro__ }}").load()
    with pytest.raises(DataError, match="unsafe"):
        tokenizer.chat(USER)


@pytest.mark.needs("jinja2")
def test_a_template_that_does_not_compile_is_found_at_load() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        Bytes(template="{% for %}").load()


def test_file_tokenizer_encodes_without_special_tokens_truncation_or_padding(words: Path) -> None:
    tokenizer = TokenizersJSON(path=str(words), eos="</s>", pad="<pad>", bos="<s>").load()
    assert tokenizer.encode("a b c b a") == [4, 5, 6, 5, 4]
    assert (tokenizer.eos, tokenizer.pad, tokenizer.bos, tokenizer.vocab_size) == (2, 0, 1, 11)
    assert tokenizer.decode([1, 4, 5, tokenizer.eos]) == "a b"
    assert prompt_ids(Prompt(text="a"), tokenizer) == [1, 4]


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_file_tokenizer_round_trip(words: Path, sample: list[str]) -> None:
    tokenizer = TokenizersJSON(path=str(words / "tokenizer.json"), eos="</s>").load()
    assert tokenizer.decode(tokenizer.encode(" ".join(sample))) == " ".join(sample)
    assert tokenizer.pad == tokenizer.eos and tokenizer.bos is None


@pytest.mark.needs("jinja2")
@pytest.mark.parametrize("in_file", [False, True])
def test_file_tokenizer_chat(words: Path, tmp_path: Path, in_file: bool) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    template = {"chat_template_file": str(tmp_path / "chat.jinja")} if in_file else {"chat_template": CHATML}
    tokenizer = TokenizersJSON(path=str(words), eos="<|im_end|>", **template).load()
    start, end = 9, tokenizer.eos
    assert tokenizer.chat([{"role": "user", "content": "a b"}]) == [start, 7, 4, 5, end, start, 8]


@pytest.mark.needs("jinja2")
def test_messages_need_a_template(words: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.chat_template"):
        TokenizersJSON(path=str(words), eos="</s>").load().chat(USER)


@pytest.mark.needs("jinja2")
@pytest.mark.parametrize(("fields", "message"), [
    ({"eos": "</s"}, r"tokenizer\.eos is '</s', which is not in the vocabulary; did you mean '</s>'"),
    ({"eos": "</s>", "pad": "[PAD]"}, r"tokenizer\.pad is '\[PAD\]'"),
    ({"eos": "</s>", "bos": "<bos>"}, r"tokenizer\.bos is '<bos>'"),
    ({"eos": "</s>", "chat_template_file": "absent.jinja"}, r"chat template file cannot be read.*absent\.jinja"),
])
def test_file_tokenizer_refuses(words: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizersJSON(path=str(words), **fields).load()


@pytest.mark.needs("tokenizers")
@pytest.mark.parametrize("content", ["", "{}", json.dumps({"model": {"type": "none"}})])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"not a tokenizer file.*tokenizer\.json"):
        TokenizersJSON(path=str(tmp_path), eos="</s>").load()


@pytest.mark.needs("tokenizers")
def test_a_missing_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        TokenizersJSON(path=str(tmp_path / "absent.json"), eos="</s>").load()


@pytest.mark.parametrize("fields", [{}, {"path": "x"}, {"eos": "x"},
                                    {"path": "x", "eos": "x", "chat_template": "a", "chat_template_file": "b"}])
def test_file_tokenizer_fields(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="path|chat_template"):
        TokenizersJSON(**fields)


@pytest.mark.parametrize(("library", "component"), [
    ("tokenizers", TokenizersJSON(path="x", eos="y")), ("jinja2", Bytes(template="{{ messages }}"))])
def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, library: str,
                                                component: TokenizersJSON | Bytes) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PluginError, match=rf"needs {library}.*pip install 'posttrain-core\[tokenizers\]'"):
        component.load()
