"""The file that ``rankernel train`` reads: YAML, checked key by key before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
    create_model,
)

from rankernel.listwise import KINDS
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.first import FirstSettings
from rankernel.run_files import FileError
from rankernel.training.data import Order

OURS = frozenset(
    (
        # What the run promises.
        "data_seed", "disable_tqdm", "do_eval", "do_predict", "do_train", "eval_delay", "eval_on_start",
        "eval_strategy", "greater_is_better", "ignore_data_skip", "load_best_model_at_end", "logging_nan_inf_filter",
        "logging_strategy", "metric_for_best_model", "output_dir", "push_to_hub", "remove_unused_columns",
        "report_to", "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "save_only_model",
        "save_strategy", "save_total_limit", "seed", "train_sampling_strategy",
        # What the section loss says.
        "importance_weighted", "language_model_weight", "ranking_loss", "ranking_parameters", "ranking_weight", "score",
        "teacher_loss", "teacher_parameters", "teacher_weight", "temperature",
    )
)  # fmt: skip
"""Training arguments that ``rankernel train`` sets itself, from the other sections or to keep its promises."""


METHOD_SETTINGS: dict[str, type] = {"blockrank": BlockRankSettings, "first": FirstSettings}


class Section(BaseModel):
    """A mapping of the file; a key that it does not know is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def _beside_config(path: Path, info: ValidationInfo) -> Path:
    context: Any = info.context
    return Path(context["folder"], path)


def _beside_config_or_named(model: str, info: ValidationInfo) -> str:
    beside = _beside_config(Path(model), info)
    return str(beside) if beside.is_dir() else model


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, got {kind!r}")
    return kind


File = Annotated[Path, AfterValidator(_beside_config)]
"""Relative to the folder of the config file."""

LossKind = Annotated[str, AfterValidator(_known_kind)]
"""Of :func:`rankernel.listwise_loss`."""


class TaskFiles(Section):
    """The files of a retrieval task."""

    queries: File
    documents: File
    qrels: File
    run: File


class TrainTask(TaskFiles):
    """Lists drawn anew every epoch; see :class:`rankernel.training.RankingDataset`."""

    documents_per_list: Annotated[int, Field(ge=2)] = 20
    hard_negatives: Annotated[float, Field(ge=0, le=1)] = 1.0
    order: Order = "shuffled"
    teacher: File | None = None
    shuffle: bool = True


class TrainLists(Section):
    """Lists that are ready; see :func:`rankernel.training.data.read_lists`."""

    lists: File
    shuffle: bool = True


class ValidationSection(TaskFiles):
    """What is ranked on a schedule: the first stage's best ``depth``, of ``limit`` judged queries or all."""

    depth: PositiveInt = 50
    limit: PositiveInt | None = None


class LossSection(Section):
    """Parts of the loss; what is not given is the method's published value."""

    language_model: NonNegativeFloat | None = None
    ranking: LossKind | None = None
    ranking_weight: NonNegativeFloat | None = None
    temperature: PositiveFloat | None = None
    score: Literal["share", "log_share"] | None = None
    parameters: dict[str, Any] | None = None
    teacher: LossKind | None = None
    teacher_weight: NonNegativeFloat | None = None
    teacher_parameters: dict[str, Any] | None = None
    importance_weighted: bool | None = None


def _kind_of_lists(section: Any) -> str:
    ready = "lists" in section if isinstance(section, Mapping) else isinstance(section, TrainLists)
    return "(lists)" if ready else "(files)"


class Config(Section):
    """A whole training run.

    Attributes:
        model: directory, relative to the config file, or name on the Hugging Face Hub.
        dtype: of the weights; with float32, ``training.bf16`` computes in bfloat16 and keeps small steps.
        method: how the model ranks.
        output: directory that the run makes.
        seed: of everything random.
        settings: fields of the method's settings that are given; others come from the model's ``rankernel.json``.
        lora: fields of ``peft.LoraConfig`` that are given, or None for training all weights.
        training: fields of the training arguments that are given.
    """

    model: Annotated[str, AfterValidator(_beside_config_or_named)]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    method: Literal["blockrank", "first"] = "blockrank"
    output: File
    seed: NonNegativeInt = 0
    settings: dict[str, Any] = {}
    train: Annotated[
        Annotated[TrainTask, Tag("(files)")] | Annotated[TrainLists, Tag("(lists)")], Discriminator(_kind_of_lists)
    ]
    validation: ValidationSection
    loss: LossSection = LossSection()
    lora: dict[str, Any] | None = None
    training: dict[str, Any] = {}


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-4`` is a number, and a key that is there twice is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a point in every float.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: str | Path) -> Config:
    """Reads and checks a config file.

    Raises:
        FileError: the file cannot be read, is not YAML, or has an unknown or unfit key: ``path:key: what is wrong``.
        ImportError: Transformers or, with a ``lora`` section, PEFT is not installed.
    """
    from rankernel.training.trainer import RankingArguments

    path = Path(path)
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise FileError(path, None, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise FileError(path, None, "expected UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise FileError(path, line, error.problem or "expected YAML") from None
    except yaml.YAMLError as error:
        raise FileError(path, None, str(error).splitlines()[0]) from None
    config: Config = _checked(path, "", Config, entries)
    arguments: dict[str, type] = {"settings": METHOD_SETTINGS[config.method], "training": RankingArguments}
    if config.lora is not None:
        from peft import LoraConfig

        arguments["lora"] = LoraConfig
    return config.model_copy(
        update={name: _given(path, name, fields, getattr(config, name)) for name, fields in arguments.items()}
    )


def _given(path: Path, section: str, arguments: type, entries: dict[str, Any]) -> dict[str, Any]:
    """The entries, each checked against the field of the dataclass ``arguments`` that has its name."""
    hints = get_type_hints(arguments)
    for name in entries:
        if name in OURS and name in hints:
            raise FileError(f"{path}:{section}.{name}", None, "rankernel train sets this itself")
    fields: dict[str, Any] = {field.name: (hints[field.name], None) for field in dataclasses.fields(arguments)}
    model = create_model(arguments.__name__, __base__=Section, **fields)
    checked = _checked(path, section, model, entries)
    return {name: getattr(checked, name) for name in entries}


def _checked(path: Path, section: str, model: type[Section], entries: Any) -> Any:
    try:
        return model.model_validate(entries, context={"folder": path.parent})
    except ValidationError as error:
        first = error.errors()[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith("(")]
    key = ".".join([section, *place] if section else place)
    if first["type"] == "extra_forbidden":
        fault = "no such key"
    elif first["type"] == "missing":
        fault = "expected, but not there"
    elif first["type"] == "value_error":
        fault = str(first["ctx"]["error"])
    else:
        fault = f"{first['msg'].replace('Input should be', 'expected')}, got {first['input']!r}"
    raise FileError(f"{path}:{key}" if key else path, None, fault)
