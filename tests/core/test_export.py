"""`posttrain export`: the folder holds the run's weights and tokenizer, for this project and for plain transformers."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
import yaml
from integration import small
from posttrain import cli
from posttrain.errors import InputError
from posttrain.export import digest, export
from posttrain.protocols import LoadRequest
from posttrain.registry import discover
from posttrain.run import opened
from posttrain.tokenizers import Bytes, Characters, TokenizersJSON

torch = pytest.importorskip("torch")

IDS = [[4, 12, 5, 13, 9], [2, 3, 12, 6, 13]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with checkpoints at 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("runs") / "sums"
    posttrain.train(small.config(directory), output="quiet")
    return directory


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export(run, run.parent / "exported")


def logits(learner: Any) -> np.ndarray:
    """[10, vocabulary] of a native decoder, one sequence after the other."""
    from posttrain_backends._torch.layout import Layout

    with torch.no_grad():
        hidden = learner.model.hidden(torch.tensor(IDS).flatten(), Layout.from_offsets(np.array([0, 5, 10])))
        return np.asarray(hidden @ learner.model.output_weight.T)


def native(folder: Path) -> Any:
    policy = discover().create("backend", "torch", weights=str(folder), device="cpu")
    return policy.load(LoadRequest(vocab_size=Characters("0123456789+=").load().vocab_size))


def test_the_folder_gives_the_same_parameters_and_logits_here(run: Path, exported: Path) -> None:
    _, parts = opened(run, ())
    learner = native(exported)
    ours, theirs = dict(parts.policy.params()), dict(learner.params())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    np.testing.assert_array_equal(logits(parts.policy), logits(learner))


def test_plain_transformers_loads_it_with_equal_logits(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits.flatten(0, 1).numpy()
    np.testing.assert_allclose(theirs, logits(native(exported)), atol=1e-5)
    assert theirs.std() > 0.1
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    assert model.generation_config.max_new_tokens == 4 and model.config.bos_token_id is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_every_family_of_native_models_is_exported_and_left_in_the_run_as_itself(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    given = small.config(tmp_path / "run", steps=4)
    posttrain.train({**given, "policy": {**given["policy"], "family": family, "layers": 4}}, output="quiet")
    for folder in (tmp_path / "run" / "policy", export(tmp_path / "run", tmp_path / "out")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor(IDS)).logits.flatten(0, 1).numpy()
        assert model.config.model_type == family
        np.testing.assert_allclose(theirs, logits(native(folder)), atol=1e-5)


def test_another_step_has_other_weights(run: Path, exported: Path, tmp_path: Path) -> None:
    earlier = dict(native(export(run, tmp_path / "earlier", step=2)).params())
    assert any(not torch.equal(earlier[name], p) for name, p in native(exported).params())
    assert "step 2" in (tmp_path / "earlier" / "README.md").read_text()


def test_the_card_says_where_the_model_comes_from(run: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["posttrain", "grpo"]}
    assert "# license: yours to choose" in text, "the licence is the user's to say"
    for path in (small.DATA / "rows.jsonl", small.DATA / "held_out.jsonl", run / "config.yaml"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    measured = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/reward/mean"] for line in measured if "eval/reward/mean" in line]
    row = re.search(r"\| held-out reward \| (\S+) \(step 0\) \| (\S+) \(step 6\) \|", text)
    assert row and [float(row[1]), float(row[2])] == pytest.approx([held_out[0], held_out[-1]], rel=1e-3)
    assert "seed 7" in text and posttrain.__version__ in text and str(small.DATA.parent) not in text


def test_nothing_is_overwritten_and_nothing_is_left_behind(run: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="overwrites nothing"):
        export(run, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert cli.main(["export", str(run), "--output", str(tmp_path / "empty")]) == 0
    assert "wrote" in capsys.readouterr().out and (tmp_path / "empty" / "model.safetensors").is_file()
    with pytest.raises(InputError, match="cannot write"):
        export(run, tmp_path / "full" / "mine.txt" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"


def test_errors_say_what_there_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint of step 3(.|\n)*steps with one: 2, 4, 6"):
        export(run, tmp_path / "a", step=3)
    with pytest.raises(InputError, match="is not a run directory"):
        export(tmp_path / "nowhere")


def test_default_place_is_inside_the_run(run: Path) -> None:
    assert export(run) == run / "exports" / "step-000006"


def test_a_folder_has_a_digest_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = digest(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert digest(tmp_path / "a") != before != digest(tmp_path / "a" / "y")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", [Characters, Bytes])
def test_a_saved_tokenizer_gives_equal_ids(kind: Any, bos: bool, tmp_path: Path) -> None:
    """In the tokenizers library by itself, in transformers, and in our own `json` tokenizer."""
    transformers = pytest.importorskip("transformers")
    template = "{{ bos_token }}" * bos + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    messages = [{"role": "user", "content": "1 + 2 = ?\n"}, {"role": "assistant", "content": "3"}]
    ours = kind(bos=bos, template=template).load()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = TokenizersJSON(path=str(tmp_path), eos="<eos>", pad="<pad>", bos="<bos>" if bos else "",
                           chat_template_file=str(tmp_path / "chat_template.jinja")).load()
    texts = ["0123+=", "a  b\n\tc" if kind is Bytes else "a  b\nc", "x" * 300] + ["é漢😀"] * (kind is Bytes)
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == again.encode(text) == ids
        assert theirs.decode(ids) == again.decode(ids) == ours.decode([*ids, ours.eos]) == text
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert theirs.encode(rendered, add_special_tokens=False) == again.chat(messages) == ours.chat(messages)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (ours.pad, ours.bos, ours.eos)
    assert len(theirs) == again.vocab_size == ours.vocab_size


@pytest.mark.parametrize("tokenizer", [Characters(), Bytes()])
def test_default_templates_in_jinja_equal_those_in_python(tokenizer: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    ours = tokenizer.load()
    ours.save(tmp_path)
    rendered = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert ours.encode(rendered) == ours.chat(messages)


def test_a_saved_file_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    Bytes().load().save(first)
    loaded = TokenizersJSON(path=str(first), eos="<eos>", chat_template="{{ messages[0].content }}").load()
    loaded.save(second)
    theirs = transformers.AutoTokenizer.from_pretrained(second)
    assert theirs.encode("1+2", add_special_tokens=False) == loaded.encode("1+2")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (257, 257, None)
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize("adapter", [None, {"use": "lora", "rank": 2}])
def test_a_run_of_the_hf_backend_exports_whole_weights(adapter: Any, tmp_path: Path) -> None:
    """An adapter is merged, and transformers' own files of model and tokenizer are kept."""
    transformers = pytest.importorskip("transformers")
    if adapter:
        pytest.importorskip("peft")
    base = tmp_path / "base"
    base.mkdir()
    Bytes().load().save(base)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=257, pad_token_id=256,
        bos_token_id=None)).save_pretrained(base)
    run = tmp_path / "run"
    posttrain.train(small.config(
        run, steps=4, checkpoint={"every": 0}, evaluate={"every": 0}, tokenizer={"use": "hf", "weights": str(base)},
        policy={"use": "hf", "weights": str(base), "device": "cpu", **({"adapter": adapter} if adapter else {})}),
        output="quiet")
    folder = export(run)
    _, parts = opened(run, ())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        theirs, untrained = (m(torch.tensor(IDS)).logits.flatten(0, 1).numpy() for m in (model, before))
    np.testing.assert_allclose(theirs, logits(parts.policy), atol=1e-5)
    assert not np.allclose(theirs, untrained, atol=1e-4), "the run trained something"
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("1+2", add_special_tokens=False) == [49, 43, 50] and ours.eos_token_id == 257
    assert model.generation_config.eos_token_id == 257
    assert digest(base) in (folder / "README.md").read_text()
