"""The sentence world: what an adapter changes, what it must not change, and the accuracies that the example ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lorahub.generate.sentences import SentenceModel, SentenceTask, load_tasks, packaged_model
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import FormatError, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank
from lorahub.hub.reading import read

EXAMPLE = Path(__file__).resolve().parents[1] / "cli" / "example"
QUERY = "encoder.layer.0.attention.self.query"
SENTENCES = ["cancel my card", "Où est la gare?", "a", "the quick brown fox jumps over the lazy dog " * 8]
TASK = SentenceTask("pets", "Tells cats from dogs.", ("cat", "dog"), ("it purrs", "it barks"), (0, 1), "made up", "CC0")


@pytest.fixture(scope="module")
def model() -> SentenceModel:
    return SentenceModel()


def adapter(name: str = QUERY, outputs: int = 384, strength: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, 384, generator=generator) / 20
    return Adapter({name: LowRank(down, strength * torch.randn(outputs, 4, generator=generator))})


def test_embeddings_are_those_of_sentence_transformers(model):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(packaged_model()), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(model.embed(SENTENCES), expected, atol=1e-5, rtol=0)


def test_order_and_company_do_not_matter(model):
    alone = torch.cat([model.embed([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(model.embed(SENTENCES), alone, atol=1e-5, rtol=0)


def test_no_sentences_give_no_vectors(model):
    assert model.embed([]).shape == (0, 384)


def test_a_zero_adapter_changes_nothing(model):
    zero = adapter(strength=0.0)
    assert torch.equal(model.embed(SENTENCES, zero), model.embed(SENTENCES))
    assert model.accuracy(zero, TASK) == model.accuracy(None, TASK)


def test_an_adapter_acts_and_leaves_the_model_as_it_was(model):
    before = model.embed(SENTENCES)
    assert (model.embed(SENTENCES, adapter()) - before).abs().max() > 1e-3
    assert torch.equal(model.embed(SENTENCES), before)


def test_the_delta_is_added_to_the_weight(model):
    expected = SentenceModel()
    with torch.no_grad():
        expected.encoder.get_submodule(QUERY).weight += adapter().modules[QUERY].dense()
    torch.testing.assert_close(model.embed(SENTENCES, adapter()), expected.embed(SENTENCES), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("foreign", "names"),
    [
        (adapter("encoder.layer.6.attention.self.query"), "encoder.layer.6.attention.self.query"),
        (adapter("embeddings.word_embeddings"), "embeddings.word_embeddings"),
        (adapter(outputs=768), r"\(768, 384\).*\(384, 384\)"),
        (Adapter({}, extras={"classifier.weight": torch.zeros(2, 384)}), "classifier.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, foreign, names):
    with pytest.raises(IncompatibleAdapters, match=names):
        model.accuracy(foreign, TASK)


def test_building_a_model_leaves_the_random_state_alone():
    torch.manual_seed(1)
    SentenceModel()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json"):
        SentenceModel(tmp_path)


@pytest.mark.parametrize("text", ["{", "[{}]", "3", '[{"name": "x"}]'])
def test_a_damaged_task_file_is_refused(tmp_path, text):
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"tasks\.json"):
        load_tasks(path)


def test_a_target_without_a_label_is_refused(tmp_path):
    words = dict.fromkeys(("name", "description", "source", "licence"), "x")
    record = words | {"labels": ["a"], "sentences": ["b"], "targets": [1]}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(FormatError, match="beyond its 1 labels"):
        load_tasks(path)


def test_every_example_task_is_complete():
    tasks = load_tasks(EXAMPLE / "tasks.json")
    assert len(tasks) >= 20
    for name, task in tasks.items():
        folder = EXAMPLE / name
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }
        assert task.description in (folder / "README.md").read_text(encoding="utf-8")
        assert len(task.queries) == 3
        assert task.description not in task.queries
        assert len(task.sentences) == len(set(task.sentences)) == 150
        assert set(task.targets) == set(range(len(task.labels)))
    folders = {path.name for path in EXAMPLE.iterdir() if path.is_dir()} - {"__pycache__", "pictures"}
    assert folders == set(tasks)


@pytest.mark.parametrize("name", ["clinc-banking", "trec-questions"])
def test_shipped_accuracies_are_reproduced(model, name):
    task = load_tasks(EXAMPLE / "tasks.json")[name]
    assert model.accuracy(None, task) == pytest.approx(task.base_accuracy, abs=0.02)
    assert model.accuracy(read(EXAMPLE / name), task) == pytest.approx(task.adapter_accuracy, abs=0.02)
    assert task.adapter_accuracy > task.base_accuracy + 0.1


def test_peft_applies_the_shipped_files_alike(model):
    peft = pytest.importorskip("peft")
    folder, sentences = EXAMPLE / "clinc-banking", SENTENCES[:3]
    host = SentenceModel()
    host.encoder = peft.PeftModel.from_pretrained(host.encoder, folder)
    ours = model.embed(sentences, read(folder))
    ids, mask = host.tokens(sentences)
    states = host.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.detach()
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(ours, torch.nn.functional.normalize(means, dim=1), atol=1e-5, rtol=0)
