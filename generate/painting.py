"""Painting with a diffusion pipeline: opening a folder of one, what fits its denoiser, and pictures from seeds.

Any text-to-image pipeline of diffusers will do, and our own `PicturePipeline`. Importing this needs torch.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..hub.adapter import Adapter, LazyModules
from ..hub.bases import from_shapes
from ..hub.errors import BadOption, FormatError, IncompatibleAdapters, UnsafeFile

if TYPE_CHECKING:
    from PIL.Image import Image

DENOISERS = ("transformer", "unet")
AT_ONCE = 8  # pictures in one batch
OURS = "PicturePipeline"

_WORD = re.compile(r"<.+>|bundle_emb\..+|emb_params")  # embeddings that some files bring for words of their own

Progress = Callable[[int, int | None], None]
Layers = Mapping[str, tuple[int, int]]  # path in the denoiser -> outputs, inputs (channels times kernel)


@dataclass(frozen=True)
class Painter:
    """A pipeline that is ready to paint.

    component: the denoiser's name in it, with which the modules of adapters for it begin. layers: what can carry an
    adapter there. base: the base's name and, as `base_from`, who says so; None where nobody does.
    """

    pipeline: Any
    component: str
    layers: Layers
    folder: Path
    base: str | None
    base_from: str | None

    @property
    def denoiser(self) -> nn.Module:
        model = getattr(self.pipeline, self.component)
        assert isinstance(model, nn.Module)
        return model

    @property
    def wordless(self) -> str:
        """Which half of a guided batch has no words: "first" in diffusers' pipelines, "second" in our own."""
        return "second" if type(self.pipeline).__name__ == OURS else "first"

    def paint(
        self,
        prompt: str,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
    ) -> list[Image]:
        """A picture for every seed, in batches where the pipeline takes a generator for each picture.

        steps, guidance: None for the pipeline's own. A seed's noise does not depend on the other seeds. `progress` is
        told of every run of the denoiser. Raises BadOption for what the pipeline cannot be told.
        """
        given = self._settings(steps, guidance)
        size = AT_ONCE if self._takes_generators() else 1
        batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
        runs = len(batches) * (self.steps(steps) or 0)
        pictures: list[Image] = []
        with _counted(self.denoiser, progress, runs or None):
            for batch in batches:
                chances = [torch.Generator().manual_seed(seed) for seed in batch]
                several: dict[str, Any] = {"prompt": [prompt] * len(batch), "generator": chances}
                one: dict[str, Any] = {"prompt": prompt, "generator": chances[0]}
                pictures += self.pipeline(**(several if len(batch) > 1 else one), **given).images
        return pictures

    def steps(self, asked: int | None) -> int | None:
        """How many steps a picture takes: as asked, or the pipeline's own number, if it has one."""
        return asked if asked is not None else self._default("num_inference_steps")

    def guidance(self, asked: float | None) -> float | None:
        """How strong guidance is: as asked, or the pipeline's own."""
        return asked if asked is not None else self._default("guidance_scale")

    def _settings(self, steps: int | None, guidance: float | None) -> dict[str, Any]:
        wanted = {"num_inference_steps": steps, "guidance_scale": guidance}
        given = {name: value for name, value in wanted.items() if value is not None}
        for name in ("prompt", "generator", *given):
            if name not in self._parameters():
                raise BadOption(
                    f"{type(self.pipeline).__name__} takes no {name}: "
                    + ("leave that option out" if name in given else "lorahub paints with pipelines from text only")
                )
        return {**given, **({"output_type": "pil"} if "output_type" in self._parameters() else {})}

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.pipeline.__call__).parameters

    def _default(self, name: str) -> Any:
        parameter = self._parameters().get(name)
        return None if parameter is None or parameter.default is parameter.empty else parameter.default

    def _takes_generators(self) -> bool:
        """Whether the pipeline declares that it takes one generator for each picture."""
        return "ist[" in str(self._parameters()["generator"].annotation)


def open_painter(
    folder: Path,
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> Painter:
    """The pipeline in a folder that `save_pretrained` wrote. Nothing is fetched, and no code in the folder is run.

    base: the user's word for which base it is. dtype: of weights and arithmetic, None for float32. Raises FormatError
    for what is no pipeline, UnsafeFile for one that brings code or, without consent, pickles; BadOption for a device
    that is not there.
    """
    index = _checked_index(folder)
    with _quiet():
        pipeline = _load(folder, index, dtype, allow_pickle)
        _move(pipeline, device)
        pipeline.set_progress_bar_config(disable=True)
    component = next((name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)), None)
    if component is None:
        raise FormatError(f"{folder}: a {type(pipeline).__name__} has no {' or '.join(DENOISERS)} that adapters fit")
    layers = dict(_layers(getattr(pipeline, component)))
    named = _base(folder, index, component, layers, base)
    return Painter(pipeline, component, layers, folder, *named)


def original_denoiser(painter: Painter) -> nn.Module:
    """The denoiser as its file has it, in float32: the form in which bases are told apart."""
    if next(painter.denoiser.parameters()).dtype == torch.float32:
        return painter.denoiser
    kind: Any = type(painter.denoiser)
    with _quiet():
        model = kind.from_pretrained(painter.folder / painter.component, local_files_only=True)
    assert isinstance(model, nn.Module)
    return model


# --- what fits ------------------------------------------------------------------------------------------------------


def addressed(painter: Painter, adapter: Adapter) -> Adapter:
    """The adapter with the denoiser's name before its modules, where it holds bare paths of layers that are there."""
    source = adapter.modules
    if not adapter.shapes or not set(adapter.shapes) <= set(painter.layers):
        return adapter
    prefix = f"{painter.component}."
    shapes = {prefix + path: shape for path, shape in adapter.shapes.items()}
    return replace(adapter, modules=LazyModules(shapes, lambda name: source[name.removeprefix(prefix)]))


def misfit(painter: Painter, adapter: Adapter) -> str | None:
    """Why an adapter cannot act on the denoiser, or None where it can. Looks at shapes only, reads no tensor."""
    rest = [name for name in adapter.extras if not _WORD.fullmatch(name)]
    if rest:
        return f"it also holds {_some(rest)}, which cannot be added at run time"
    prefix = f"{painter.component}."
    mine = {name.removeprefix(prefix): shape for name, shape in adapter.shapes.items() if name.startswith(prefix)}
    if not mine:
        return f"it changes {_some(parts(adapter)) or 'another kind of model'}, not the {painter.component}"
    absent = [path for path in mine if path not in painter.layers]
    if absent:
        return f"the {painter.component} has no {_some(absent)}: it is for another base"
    for path, shape in mine.items():
        if shape.embedding or (shape.outputs, shape.inputs) != painter.layers[path]:
            rows, columns = painter.layers[path]
            return f"{path} is {rows}x{columns} in the {painter.component}, {shape} in it: it is for another base"
    return None


def parts(adapter: Adapter) -> list[str]:
    """The components of a pipeline that an adapter changes: "unet", "text_encoder" ..."""
    return sorted({name.partition(".")[0] for name in adapter.shapes})


def aside(painter: Painter, adapter: Adapter) -> list[str]:
    """What an adapter changes besides the denoiser (other components, learnt words), which is not painted with."""
    return [part for part in parts(adapter) if part != painter.component] + sorted(adapter.extras)


def checked(painter: Painter, adapters: Sequence[Adapter]) -> None:
    """Raise IncompatibleAdapters for one that does not fit."""
    for adapter in adapters:
        reason = misfit(painter, adapter)
        if reason:
            raise IncompatibleAdapters(f"{adapter.name} does not fit {painter.folder}: {reason}")


def _layers(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            yield path, (layer.weight.shape[0], layer.weight[0].numel())


def _some(names: Sequence[str] | Mapping[str, Any], most: int = 2) -> str:
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _base(
    folder: Path, index: Mapping[str, Any], component: str, layers: Layers, told: str | None
) -> tuple[str | None, str | None]:
    """The base's name and who says so: the user, the folder's index, or the denoiser's shapes."""
    from .pictures import BASE, shipped

    if told:
        return told, "given"
    if folder.resolve() == shipped():
        return BASE, "the built-in base"
    origin = str(index.get("_name_or_path") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists():
        return origin, "model_index.json"
    return from_shapes((f"{component}.{path}", inputs, outputs) for path, (outputs, inputs) in layers.items())


# --- opening --------------------------------------------------------------------------------------------------------


def _checked_index(folder: Path) -> Mapping[str, Any]:
    """model_index.json of a pipeline that runs no code of its own."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise FormatError(
            f"{folder}: is no diffusers pipeline; expected a folder with model_index.json, as save_pretrained writes it"
        ) from None
    own = [
        f"{part}/{entry[0]}.py"
        for part, entry in index.items()
        if isinstance(entry, list) and entry and (folder / part / f"{entry[0]}.py").is_file()
    ]
    if not isinstance(kind, str) or own:
        what = own[0] if own else str(kind)
        raise UnsafeFile(f"{folder}: would run code of its own ({what}); expected a pipeline of diffusers' classes")
    return dict(index)


def _load(folder: Path, index: Mapping[str, Any], dtype: torch.dtype | None, allow_pickle: bool) -> Any:
    import diffusers

    from .pictures import PicturePipeline

    kind: Any = PicturePipeline if index["_class_name"] == OURS else diffusers.DiffusionPipeline
    given: dict[str, Any] = {"torch_dtype": dtype} if dtype else {}
    pickled = not allow_pickle and not any(folder.rglob("*.safetensors")) and any(folder.rglob("*.bin"))
    if pickled:
        raise UnsafeFile(f"{folder}: its weights are pickles; trust them first, then say --allow-pickle")
    try:
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=not allow_pickle or None, **given)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{folder}: diffusers cannot open this pipeline ({reason})") from None


def _move(pipeline: Any, device: str) -> None:
    try:
        pipeline.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0][:120]
        raise BadOption(f"device is {device!r}, which torch cannot use here ({reason}); expected cpu or cuda") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and transformers' own progress bars and remarks: stderr is for ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


@contextmanager
def _counted(denoiser: nn.Module, progress: Progress | None, total: int | None) -> Iterator[None]:
    """Tell `progress` whenever the denoiser has run; some samplers run it more often than there are steps."""
    if progress is None:
        yield
        return
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        progress(done if total is None else min(done, total), total)

    handle = denoiser.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
