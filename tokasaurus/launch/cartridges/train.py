"""``toka-cartridge train``: a cartridge that answers questions about a document.

The engine of a program asks and answers questions with the document in sight. Then it is closed,
and transformers trains the cartridge, because the engine's own model computes no gradients.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.config.engine import ENGINE, EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.config.slices import WorkerConfig
from tokasaurus.errors import ConfigError, EngineError, ModelError
from tokasaurus.launch.cartridges.create import read_text, target_path
from tokasaurus.launch.cartridges.files import sizes

if TYPE_CHECKING:
    from tokasaurus.cartridge_training.distillation import Losses, TrainableCartridge

__all__ = ["SCHEMA", "TrainConfig", "run"]

_FILES, _STUDY, _TRAINING = "Cartridge", "Questions and answers", "Training"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineConfig):
    """The document, the file to write, the training, and the flags of the engine that asks."""

    text: str = flag(group=_FILES, help="The document: a text file in UTF-8.")
    out: str = flag(group=_FILES, help="The file to write; one that is there is replaced.")
    plot: str | None = flag(
        None,
        group=_FILES,
        help="Where to draw the losses, as a PNG.",
        usually="beside the cartridge",
    )
    num_tokens: int = flag(
        512, group=_FILES, minimum=2, help="Positions of the cartridge, at most those of the text."
    )
    num_conversations: int = flag(
        2048, group=_STUDY, minimum=2, help="Questions that the model asks about the document."
    )
    excerpt_tokens: int = flag(
        4096,
        group=_STUDY,
        minimum=1,
        help="A document that is longer, or longer than the model's context holds, is shown in "
        "excerpts, each question at another one.",
    )
    answer_tokens: int = flag(256, group=_STUDY, minimum=1, help="The longest answer.")
    num_steps: int = flag(500, group=_TRAINING, minimum=1, help="Updates of the cartridge.")
    batch_size: int = flag(32, group=_TRAINING, minimum=1, help="Conversations in an update.")
    learning_rate: float = flag(
        0.02,
        group=_TRAINING,
        minimum=0.0,
        maximum=10.0,
        help="The highest; it falls to zero during the training. Small models take up to 0.1.",
    )
    num_frozen: int = flag(
        1,
        group=_TRAINING,
        minimum=0,
        help="Positions at the beginning that are not trained: models need a first token to attend "
        "to.",
    )
    seed: int = flag(
        0, group=_TRAINING, minimum=0, help="Of the questions, the answers and the training."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if self.num_frozen >= self.num_tokens:
            raise ConfigError(
                f"num_frozen={self.num_frozen}: it must be less than num_tokens={self.num_tokens}"
            )

    @property
    def plot_path(self) -> Path:
        """Of the picture of the losses."""
        return Path(self.plot or Path(self.out).with_suffix(".png")).expanduser()


SCHEMA = Schema(
    target=TrainConfig,
    program="toka-cartridge train",
    summary="Train a cartridge that stands for a document.\n\n"
    "The model asks and answers questions about the document, and the cartridge is trained until\n"
    "the model behind it answers as if it saw the document. The flags are those of the engine,\n"
    "which asks and answers in this process before the training begins.",
    shortcuts=ENGINE.shortcuts,
    retired=ENGINE.retired,
    foreign=ENGINE.foreign,
    reads_files=True,
    examples=(
        "toka-cartridge train --text manual.txt model=Qwen/Qwen3-4B out=manual.safetensors",
        "toka-cartridge train text=notes.txt out=notes.safetensors num_tokens=64",
    ),
)


def run(config: TrainConfig) -> None:
    """Trains, and writes the cartridge and a picture of its losses.

    Raises:
        ConfigError: flags or the document do not fit, or there is too little to train on.
        ModelError: the model cannot be run.
        EngineError: a file cannot be written.
    """
    from tokasaurus.cartridge_training.distillation import Settings, TrainableCartridge, train
    from tokasaurus.launch.assemble import assemble
    from tokasaurus.launch.cartridges.study import ask

    if config.rope_scaling is not None:
        raise ConfigError("rope_scaling: training takes the model's own; write it into config.json")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("drawing the losses needs matplotlib: pip install 'tokasaurus[train]'")
    text, out = read_text(config.text), target_path(config.out)
    if not config.plot_path.parent.is_dir():
        raise ConfigError(
            f"plot={config.plot_path}: there is no directory {config.plot_path.parent}"
        )
    slices = assemble(config)
    worker = slices.replicas[0].workers[0]
    study = ask(config, text)
    model = _model(worker)
    first_ids = study.document_ids[: config.num_tokens]
    cartridge = TrainableCartridge.of_text(model, first_ids, config.num_frozen)
    settings = Settings(config.num_steps, config.batch_size, config.learning_rate, config.seed)
    with _bar(config.num_steps) as report:
        losses = train(model, cartridge, study.conversations, settings, report)
    metadata = _save(cartridge, out, worker, config.model or "", study.tokenizer)
    _draw(losses, config.plot_path)
    first, best = losses.validation[0], min(losses.validation.values())
    print(
        f"{config.out} is a cartridge of {sizes(metadata)}; digest {metadata.digest}\n"
        f"trained on {len(study.conversations)} conversations; held-out answers diverge by "
        f"{best:.3f} nats a token, before the training by {first:.3f} ({config.plot_path})"
    )


def _model(worker: WorkerConfig) -> Any:
    """The model with gradients. On a CPU in single precision, which costs little there."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if worker.device == "cpu" else getattr(torch, worker.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(worker.model_path, dtype=dtype)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"transformers cannot load {worker.model_path}: {error}") from error
    return model.to(worker.device).eval()


def _save(
    cartridge: TrainableCartridge, out: Path, worker: WorkerConfig, model: str, tokenizer: str
) -> CartridgeMetadata:
    """Writes the cartridge in the dtype that the engine would have."""
    import torch

    from tokasaurus.launch.cartridges.tensors import save_tensors
    from tokasaurus.model.facts import model_shape

    shape = model_shape(worker.model_path, model, worker.rope_scaling)
    dtype = getattr(torch, worker.dtype)
    keys, values = ([each[0].to(dtype) for each in tensors] for tensors in cartridge.whole())
    return save_tensors(
        out,
        keys,
        values,
        num_frozen=cartridge.num_frozen,
        model=shape.name,
        rope=shape.rope,
        tokenizer=tokenizer,
    )


def _draw(losses: Losses, path: Path) -> None:
    """The divergence in training, and on conversations that are not trained on, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses.training) + 1), losses.training, linewidth=0.8, label="training")
    axes.plot(list(losses.validation), list(losses.validation.values()), label="held-out answers")
    axes.set(xlabel="step", ylabel="KL divergence, nats a token", yscale="log")
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise EngineError(f"plot={path} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)


@contextlib.contextmanager
def _bar(num_steps: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar on standard error."""
    from tqdm.auto import tqdm

    with tqdm(total=num_steps, desc="training", unit="step", dynamic_ncols=True) as bar:

        def report(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step - bar.n)

        yield report
