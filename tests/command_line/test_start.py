# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What is imported, and when: help comes at once, and importing the package imports no model."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from bare_python import run_bare
from places import ROOT

import sparsepath.app
import sparsepath_vit

HEAVY = {"torchvision", "torch._dynamo", "transformers.modeling_utils", "accelerate"}
COMMANDS = ("demo", "convert", "models", "doctor", "estimate", "embed", "heatmap", "segment", "view")
PACKAGES = sorted(
    ".".join(file.parent.relative_to(ROOT / "modeling").parts)
    for file in (ROOT / "modeling/sparsepath_vit").rglob("__init__.py")
    if "lazy_names" in file.read_text()
)


def run_python(code, *arguments):
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.split()


RUN_COMMAND = """
import sys
from sparsepath.app import main
try:
    main()
except SystemExit as ending:
    assert not ending.code, ending.code
print("-- modules", *sys.modules)
"""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), *((command, "--help") for command in COMMANDS)])
def test_help_and_version_import_neither_torch_nor_the_library(arguments):
    said = run_python(RUN_COMMAND, *arguments)
    modules = set(said[said.index("--") + 1 :])
    assert "sparsepath.app" in modules
    assert not {"torch", "transformers", "numpy", "huggingface_hub", "sparsepath_vit"} & modules


def test_version_is_the_packages():
    assert version("sparsepath-vit") == sparsepath_vit.__version__
    assert sparsepath_vit.__version__ in run_python(RUN_COMMAND, "--version")


AUTO_CLASSES_ALONE = """
import sys
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel, Mask2FormerConfig
print(*sys.modules)
"""


def test_importing_the_package_imports_no_model():
    """Nothing heavy but what the configurations and Auto classes of Transformers import: 5.17's torch._dynamo."""
    modules = set(run_python("import sys, sparsepath_vit; print(*sys.modules)"))
    assert "torchvision" not in modules
    assert not modules & HEAVY - set(run_python(AUTO_CLASSES_ALONE))
    own = {name for name in modules if name.startswith("sparsepath_vit.")}
    assert not [name for name in own if "modeling_" in name or "attention" in name or "image_processing" in name]


AUTO_CLASSES = """
import sys
{first}
{second}
from transformers import (
    AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForUniversalSegmentation,
    AutoImageProcessor,
)
config = AutoConfig.for_model("sparsepath_vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
for auto_class in (AutoModel, AutoModelForImageClassification, AutoBackbone):
    print(type(auto_class.from_config(config)).__name__)
adapter = AutoConfig.for_model("sparsepath_vit_adapter", hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
print(type(AutoBackbone.from_config(adapter)).__name__)
from transformers import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
segmentation = type(AutoConfig.for_model("sparsepath_vit_segmentation"))
print(MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING[segmentation].__name__)
import sparsepath_vit
for backend in (None, "torchvision", "pil"):
    print(type(AutoImageProcessor.from_pretrained(sparsepath_vit.tiny_checkpoint(), backend=backend)).__name__)
print(type(AutoModel.from_pretrained(sparsepath_vit.tiny_checkpoint())).__name__)
assert AutoModel._model_mapping[sparsepath_vit.SparsePathViTConfig] is sparsepath_vit.SparsePathViTModel
assert sum(finder.__class__.__name__ == "_ImportWatcher" for finder in sys.meta_path) == 0
"""
MODELS = ["SparsePathViTModel", "SparsePathViTForImageClassification", "SparsePathViTBackbone"]
MODELS += ["SparsePathViTAdapterBackbone", "SparsePathViTForUniversalSegmentation"]
PROCESSORS = ["SparsePathViTImageProcessor", "SparsePathViTImageProcessor", "SparsePathViTImageProcessorPil"]


@pytest.mark.parametrize(
    "order", [("import sparsepath_vit", ""), ("import transformers.pipelines", "import sparsepath_vit")]
)
def test_the_auto_classes_know_the_models_after_a_bare_import(order):
    """Before and after the module of AutoImageProcessor is imported."""
    said = run_python(AUTO_CLASSES.format(first=order[0], second=order[1]))
    assert said == [*MODELS, *PROCESSORS, "SparsePathViTModel"]


def test_an_image_processor_is_found_without_its_model():
    code = """
import sys
import sparsepath_vit
from transformers import AutoImageProcessor
print(type(AutoImageProcessor.from_pretrained(sys.argv[1])).__module__)
"""
    found = run_python(code, str(sparsepath_vit.tiny_checkpoint()))
    assert found == ["sparsepath_vit.model.image_processing_sparsepath_vit"]


def test_a_pipeline_finds_model_and_processor(tmp_path):
    code = """
import sys
import sparsepath_vit
from PIL import Image
from transformers import AutoModelForImageClassification, AutoImageProcessor, pipeline
classifier = pipeline("image-classification", model=sys.argv[1], device="cpu")
print(type(classifier.model).__name__, type(classifier.image_processor).__name__)
print(len(classifier(Image.new("RGB", (56, 56)))))
"""
    sparsepath_vit.SparsePathViTForImageClassification(
        sparsepath_vit.SparsePathViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, prune_after_layer=1, num_labels=3
        )
    ).save_pretrained(tmp_path)
    sparsepath_vit.SparsePathViTImageProcessor().save_pretrained(tmp_path)
    assert run_python(code, str(tmp_path))[:2] == ["SparsePathViTForImageClassification", "SparsePathViTImageProcessor"]


def type_checking_imports(package):
    """Name -> module of the package, as type checkers see it."""
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body]
    return {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_those_that_type_checkers_see(package):
    module = importlib.import_module(package)
    seen = type_checking_imports(package)
    assert seen and seen.keys() == set(module.__all__) - {"__version__"}
    assert set(module.__all__) <= set(dir(module))
    for name, defined_in in seen.items():
        try:
            public = getattr(module, name)
        except ImportError as error:  # an adapter without the toolkit it is for
            assert package == "sparsepath_vit.plugins" and "is not installed, and this adapter is for" in str(error)
            continue
        assert public is getattr(importlib.import_module(defined_in), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


EXTRAS = ("h5py", "openslide", "tifffile", "imagecodecs", "skimage", "scikit_image", "scipy", "sklearn", "matplotlib")
WITHOUT_EXTRAS = """
import sys
from sparsepath.app import main
sys.argv = ["sparsepath", *sys.argv[1:]]
try:
    main()
except SystemExit as ending:
    print(ending.code)
"""


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("embed", "{slide}", "--model", "{model}", "--out", "out", "--device", "cpu"), "slides"),
        (("heatmap", "{slide}", "{slide}"), "slides"),
        (("estimate", "{slide}", "--model", "{model}", "--device", "cpu"), "slides"),
        (("demo", "--out", "out", "--size", "56", "--device", "cpu"), "slides"),
        (("segment", "{slide}", "--model", "{model}", "--out", "out"), "train"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_without_its_extra_a_command_ends_with_the_line_that_installs_it(
    command, extra, model_folder, small_slide, tmp_path
):
    for file in (sparsepath.app.__file__, sparsepath_vit.__file__):
        folder = Path(file).parent
        (tmp_path / folder.name).symlink_to(folder)
    arguments = [part.format(slide=small_slide, model=model_folder) for part in command]
    code = WITHOUT_EXTRAS.replace("import sys", "import sys\nsys.stderr = sys.stdout", 1)
    said = run_bare(code, arguments, tmp_path, ("sparsepath", "__editable__", *EXTRAS))
    assert f'pip install "sparsepath-vit[{extra}]"' in said.replace("\n", " ")
    assert "Traceback" not in said


def test_reading_slides_and_looking_at_them_imports_no_model():
    """The page of a slide took 260 MB more since what tells the free memory imported the model's layers."""
    code = "import sys, sparsepath_vit.slides.reader, sparsepath_vit.slides.token_values; print(*sys.modules)"
    assert not {"torchvision", "torch._dynamo", "transformers.modeling_utils"} & set(run_python(code))
