# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Makes the Auto classes of Transformers know our models, without importing the models.

Transformers' own models cost nothing until they are used: its tables hold names of classes. What others register are
classes, and importing ours means importing `transformers.modeling_utils`, hence torchvision and torch._dynamo, which
takes twice as long as torch. So we register, by the public `register`, where the class is to be found
(`ClassToImport`), and the table of registered classes imports it when it is read (`ClassesWhenRead`).

Configurations are the keys of these tables and cheap: they are imported at once. The module of `AutoImageProcessor`
is not: importing it means importing all of the above. Its table is filled when somebody else imports it.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForUniversalSegmentation,
)

from ..model.configuration_segmentation_sparsepath_vit import (
    SparsePathViTAdapterConfig,
    SparsePathViTUniversalSegmentationConfig,
)
from ..model.configuration_sparsepath_vit import SparsePathViTConfig

IMAGE_PROCESSOR_MODULE = "transformers.models.auto.image_processing_auto"


@dataclass(frozen=True)
class ClassToImport:
    """A class of the model, by name.

    Attributes:
        module: in the package's folder `model`.
        name: of the class.
    """

    module: str
    name: str

    def load(self) -> type:
        """The class itself."""
        model_package = f"{__package__.rpartition('.')[0]}.model"
        return getattr(importlib.import_module(f"{model_package}.{self.module}"), self.name)


class ClassesWhenRead(UserDict):
    """Registered classes of an Auto class; one that is registered as `ClassToImport` is imported when it is read.

    A `UserDict`, whose `get`, `values` and `items` and whose copies all read through `__getitem__`: nobody ever sees
    a `ClassToImport`.
    """

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, ClassToImport):
            value = self.data[key] = value.load()
        return value


MODELS = (
    (AutoModel, SparsePathViTConfig, ClassToImport("modeling_sparsepath_vit", "SparsePathViTModel")),
    (
        AutoModelForImageClassification,
        SparsePathViTConfig,
        ClassToImport("modeling_sparsepath_vit", "SparsePathViTForImageClassification"),
    ),
    (AutoBackbone, SparsePathViTConfig, ClassToImport("modeling_sparsepath_vit", "SparsePathViTBackbone")),
    (
        AutoBackbone,
        SparsePathViTAdapterConfig,
        ClassToImport("adapter_sparsepath_vit", "SparsePathViTAdapterBackbone"),
    ),
    (
        AutoModelForUniversalSegmentation,
        SparsePathViTUniversalSegmentationConfig,
        ClassToImport("segmentation_sparsepath_vit", "SparsePathViTForUniversalSegmentation"),
    ),
)


def register_auto_classes() -> None:
    """Registers the configurations, and all models and image processors by name."""
    for config_class in (SparsePathViTConfig, SparsePathViTAdapterConfig, SparsePathViTUniversalSegmentationConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, config_class, model_class in MODELS:
        mapping = auto_class._model_mapping
        if not isinstance(mapping._extra_content, ClassesWhenRead):
            mapping._extra_content = ClassesWhenRead(mapping._extra_content)
        auto_class.register(config_class, model_class, exist_ok=True)
    after_import(IMAGE_PROCESSOR_MODULE, _register_image_processors)


def _register_image_processors(module: ModuleType) -> None:
    """As `AutoImageProcessor.register`, which would import the classes in order to look at them."""
    processors = ClassesWhenRead(
        torchvision=ClassToImport("image_processing_sparsepath_vit", "SparsePathViTImageProcessor"),
        pil=ClassToImport("image_processing_sparsepath_vit", "SparsePathViTImageProcessorPil"),
    )
    module.IMAGE_PROCESSOR_MAPPING.register(SparsePathViTConfig, processors, exist_ok=True)


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action(module)` now if the module is imported, else as soon as it has been."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ImportWatcher(name, action))


class _ImportWatcher(importlib.abc.MetaPathFinder):
    """Leaves the import of one module to the other finders, and acts once the module has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for every module but the one that is waited for."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_then_act
        return spec
