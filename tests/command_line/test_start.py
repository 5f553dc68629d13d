# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What is imported, and when: help comes at once, and importing the package imports no model."""

import ast
import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bare_python import run_bare
from places import ROOT

import sparsepath.app
import sparsepath_vit

HEAVY = {"torchvision", "torch._dynamo", "transformers.modeling_utils", "accelerate"}
COMMANDS = [command.callback.__name__ for command in sparsepath.app.app.registered_commands]
PACKAGES = sorted(
    ".".join(file.parent.relative_to(ROOT / "modeling").parts)
    for file in (ROOT / "modeling/sparsepath_vit").rglob("__init__.py")
    if "lazy_names" in file.read_text()
)


def run_python(code, *arguments, given=None, split=None):
    """What a fresh process prints, in words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, input=given, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.split(split)


# In one process, since a command that imports too much is seen where it was the first to: what is there only grows.
RUN_COMMANDS = """
import sys
from sparsepath.app import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["sparsepath", *line.split()]
    try:
        main()
    except SystemExit as ending:
        assert not ending.code, (line, ending.code)
    found = {"torch", "transformers", "numpy", "huggingface_hub", "sparsepath_vit"} & set(sys.modules)
    assert not found, (line, found)
"""


def test_help_and_version_import_neither_torch_nor_the_library():
    assert len(COMMANDS) == 13 and version("sparsepath-vit") == sparsepath_vit.__version__
    lines = "\n".join(["--version", "--help", *(f"{command} --help" for command in COMMANDS)])
    said = run_python(RUN_COMMANDS, given=lines)
    assert said[:2] == ["sparsepath-vit", sparsepath_vit.__version__] and said.count("Usage:") == 1 + len(COMMANDS)


# In one process, the lightest first: what is not among the modules after many imports was not after the first.
IMPORTS = {
    "Auto classes": "import torch; from transformers import AutoBackbone, AutoConfig, AutoModel, Mask2FormerConfig",
    "package": "import sparsepath_vit",
    "slides to look at": "import sparsepath_vit.slides.reader, sparsepath_vit.slides.token_values",
    "attention on a CPU": "grid = sparsepath_vit.TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2); "
    "sparsepath_vit.block_attention(*[torch.randn(1, 1, 5, 16)] * 3, grid)",
    "slides and commands": "import sparsepath_vit.slides.embed, sparsepath.app",
    "segmenting": "import sparsepath_vit.tasks.segmentation.regions",
}


@pytest.fixture(scope="module")
def modules_after():
    """The modules that there are after each of `IMPORTS` and those before it, in a fresh process."""
    program = ["import sys", *(f"{statements}\nprint('|', *sys.modules)" for statements in IMPORTS.values())]
    return dict(
        zip(IMPORTS, [set(part.split()) for part in run_python("\n".join(program), split="|")[1:]], strict=True)
    )


def test_importing_the_package_imports_no_model(modules_after):
    """Nothing heavy but what the configurations and Auto classes of Transformers import: 5.17's torch._dynamo."""
    modules = modules_after["package"]
    assert "torchvision" not in modules
    assert not modules & HEAVY - modules_after["Auto classes"]
    own = {name for name in modules if name.startswith("sparsepath_vit.")}
    assert not [name for name in own if "modeling_" in name or "attention" in name or "image_processing" in name]


def test_reading_slides_and_looking_at_them_imports_no_model(modules_after):
    """The page of a slide took 260 MB more since what tells the free memory imported the model's layers."""
    assert "sparsepath_vit.slides.token_values" in modules_after["slides to look at"]
    assert not modules_after["slides to look at"] & HEAVY - {"accelerate"} - modules_after["Auto classes"]


def test_without_a_gpu_the_kernels_are_not_imported(modules_after):
    """With Triton that takes a second, and most commands run no kernel."""
    assert "sparsepath_vit.model.attention_sdpa_tiles" in modules_after["attention on a CPU"]
    assert torch.cuda.is_available() or not modules_after["attention on a CPU"] & {
        "sparsepath_vit.model.attention_triton_launch"
    }


def test_the_library_and_its_commands_import_no_plugin(modules_after):
    assert {"sparsepath_vit.slides.embed", "sparsepath.app"} < modules_after["slides and commands"]
    assert not [name for name in modules_after["slides and commands"] if name.startswith("sparsepath_vit.plugins")]


def test_segmenting_imports_no_trainer(modules_after):
    """It needs the model and no training code."""
    assert "sparsepath_vit.tasks.segmentation.regions" in modules_after["segmenting"]
    assert not {"transformers.trainer", "sparsepath_vit.tasks.segmentation.training"} & modules_after["segmenting"]


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


def test_an_image_processor_is_found_without_its_model_and_a_pipeline_finds_both(tmp_path):
    code = """
import sys
import sparsepath_vit
from transformers import AutoImageProcessor
print(type(AutoImageProcessor.from_pretrained(sys.argv[1])).__module__)
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
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
    module, model, processor, _ = run_python(code, str(tmp_path))
    assert module == "sparsepath_vit.model.image_processing_sparsepath_vit"
    assert (model, processor) == ("SparsePathViTForImageClassification", "SparsePathViTImageProcessor")


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
# One process, in which what cannot be imported cannot be imported by any of them.
WITHOUT_EXTRAS = """
import sys, traceback
sys.stderr = sys.stdout
from sparsepath.app import main
for line in sys.argv[1].splitlines():
    sys.argv = ["sparsepath", *line.split("|")]
    print("== command")
    try:
        main()
    except SystemExit as ending:
        print(ending.code)
    except BaseException:
        traceback.print_exc()
"""
COMMANDS_WITHOUT_EXTRAS = {
    "embed|{slide}|--model|{model}|--out|out|--device|cpu": "slides",
    "heatmap|{slide}|{slide}": "slides",
    "estimate|{slide}|--model|{model}|--device|cpu": "slides",
    "demo|--out|out|--size|56|--device|cpu": "slides",
    "segment|{slide}|--model|{model}|--out|out": "train",
}


def test_without_its_extra_a_command_ends_with_the_line_that_installs_it(model_folder, small_slide, tmp_path):
    for file in (sparsepath.app.__file__, sparsepath_vit.__file__):
        folder = Path(file).parent
        (tmp_path / folder.name).symlink_to(folder)
    lines = "\n".join(COMMANDS_WITHOUT_EXTRAS).format(slide=small_slide, model=model_folder)
    said = run_bare(WITHOUT_EXTRAS, [lines], tmp_path, ("sparsepath", "__editable__", *EXTRAS)).split("== command")[1:]
    for (command, extra), lines in zip(COMMANDS_WITHOUT_EXTRAS.items(), said, strict=True):
        assert f'pip install "sparsepath-vit[{extra}]"' in lines.replace("\n", " "), command
        assert "Traceback" not in lines
