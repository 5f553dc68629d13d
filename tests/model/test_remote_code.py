# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
from peft import LoraConfig
from small_models import small_config, small_model
from small_segmentation import segmentation_config
from transformers import image_processing_base, modeling_utils

from sparsepath_vit import (
    SparsePathViTAdapterConfig,
    SparsePathViTConfig,
    SparsePathViTForImageClassification,
    SparsePathViTImageProcessor,
    SparsePathViTModel,
)
from sparsepath_vit import SparsePathViTUniversalSegmentationConfig as SegmentationConfig
from sparsepath_vit.model import remote_code
from sparsepath_vit.model.remote_code import remote_code_files, write_remote_code

PLAIN, PROCESSOR = SparsePathViTConfig.own_auto_map, SparsePathViTImageProcessor.own_auto_map
ADAPTER, SEGMENTATION = SparsePathViTAdapterConfig.own_auto_map, SegmentationConfig.own_auto_map


def test_files_are_the_flat_model_files():
    names = {file.name for file in remote_code_files()}
    assert {
        "configuration_sparsepath_vit.py",
        "modeling_sparsepath_vit.py",
        "image_processing_sparsepath_vit.py",
        "token_grid.py",
        "embeddings.py",
        "attention_operator.py",
        "attention_specification.py",
        "attention_sdpa_tiles.py",
        "token_pruning.py",
    } <= names
    assert not names & {"__init__.py", "cli.py", "version.py"}


def names_of(auto_map):
    return {file.stem for file in remote_code_files(auto_map)}


def test_a_checkpoint_carries_the_files_it_needs_and_no_others():
    dense = {"adapter_sparsepath_vit", "deformable_attention", "segmentation_inputs"}
    heads = {"mask2former_parts", "query_segmentation_sparsepath_vit", "segmentation_postprocessing"}
    processing = {
        "image_processing_sparsepath_vit",
        "image_inputs",
        "image_settings",
        "patch_presence",
        "pillow_images",
    }
    assert names_of(PROCESSOR) == processing | {"pixel_normalisation", "remote_code"}
    assert "modeling_sparsepath_vit" in names_of(PLAIN)
    assert not {name for name in names_of(PLAIN) if "segmentation" in name} | names_of(PLAIN) & (dense | processing)
    of_the_encoder = {"modeling_sparsepath_vit", "modeling_outputs_sparsepath_vit", "image_lists"}
    assert names_of(ADAPTER) >= names_of(PLAIN) - of_the_encoder | dense
    assert not names_of(ADAPTER) & (heads | processing)
    assert names_of(SEGMENTATION) >= names_of(ADAPTER) | heads
    assert not names_of(SEGMENTATION) & processing
    assert names_of(None) == names_of(SEGMENTATION) | names_of(PROCESSOR)


@pytest.mark.parametrize("auto_map", [PLAIN, ADAPTER, SEGMENTATION, PROCESSOR])
def test_every_reference_is_a_class_in_its_file(auto_map):
    for value in auto_map.values():
        for reference in value.values() if isinstance(value, dict) else [value]:
            module, name = reference.split(".")
            assert f"\nclass {name}(" in (Path(remote_code.__file__).parent / f"{module}.py").read_text()


def test_export_needs_an_existing_folder(tmp_path):
    with pytest.raises(ValueError, match="output_dir='missing' is no folder"):
        write_remote_code(tmp_path / "missing", PLAIN)


def test_imports_from_outside_the_flat_folder_are_refused(monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.py").write_text("")
    (tmp_path / "modeling_sparsepath_vit.py").write_text("from .folder.inner import something\n")
    monkeypatch.setattr(remote_code, "__file__", str(tmp_path / "remote_code.py"))
    with pytest.raises(ValueError, match=r"a model file imports folder.inner, which does not lie in it"):
        remote_code_files()


def code_in(folder):
    return {file.stem for file in folder.glob("*.py")}


def auto_map_in(folder):
    return json.loads((folder / "config.json").read_text())["auto_map"]


class TestTheFolder:
    def test_holds_the_union_of_model_and_processor_in_either_order(self, tmp_path):
        model, processor = small_model(SparsePathViTModel), SparsePathViTImageProcessor(patch_size=4)
        for order in ([model, processor], [processor, model]):
            folder = tmp_path / type(order[0]).__name__
            for one in order:
                one.save_pretrained(folder)
            assert code_in(folder) == names_of(PLAIN) | names_of(PROCESSOR)

    def test_a_configuration_or_processor_alone_carries_its_own(self, tmp_path):
        segmentation_config("queries").save_pretrained(tmp_path / "config")
        SparsePathViTImageProcessor().save_pretrained(tmp_path / "processor")
        assert code_in(tmp_path / "config") == names_of(SEGMENTATION)
        assert code_in(tmp_path / "processor") == names_of(PROCESSOR)

    def test_saved_again_it_is_the_same_and_files_of_an_earlier_version_are_brought_along(self, tmp_path):
        """An old image processor beside a new model would import names that are no more."""
        SparsePathViTImageProcessor().save_pretrained(tmp_path)
        first_line = (tmp_path / "image_inputs.py").read_text().splitlines()[0]
        for name in ("image_inputs.py", "token_grid.py", "mask2former_parts.py"):
            (tmp_path / name).write_text(f"{first_line}\nfrom .another_version import something\n")
        (tmp_path / "modeling_sparsepath_vit.py").write_text("")  # what an interrupted copy leaves
        for _ in range(2):
            small_model(SparsePathViTModel).save_pretrained(tmp_path)
        assert code_in(tmp_path) == names_of(PLAIN) | names_of(PROCESSOR) | {"mask2former_parts"}
        for file in remote_code_files():
            if (tmp_path / file.name).exists():
                assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name

    def test_a_file_of_somebody_else_stays_and_the_model_is_saved(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(remote_code.logger, "propagate", True)
        monkeypatch.setattr(remote_code.logging.get_logger("transformers"), "propagate", True)
        (tmp_path / "embeddings.py").write_text("# my own\n")
        (tmp_path / "notes.py").write_text("# my own\n")
        small_model(SparsePathViTModel).save_pretrained(tmp_path)
        assert (tmp_path / "embeddings.py").read_text() == (tmp_path / "notes.py").read_text() == "# my own\n"
        assert (tmp_path / "model.safetensors").is_file()
        assert "embeddings.py was not written by SparsePathViT and stays as it is" in caplog.text
        assert "notes.py" not in caplog.text

    def test_a_failing_copy_leaves_the_old_file_and_no_part(self, tmp_path, monkeypatch):
        config = small_config()
        config.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert "modeling_sparsepath_vit.py" in before

        def half(source, target):
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise OSError("No space left on device")

        monkeypatch.setattr(remote_code.shutil, "copyfile", half)
        with pytest.raises(OSError, match="No space left"):
            config.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_the_source_folder_itself_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(remote_code.shutil, "copyfile", lambda *paths: pytest.fail("it must not be reached"))
        assert write_remote_code(Path(remote_code.__file__).parent, PLAIN) == ()

    def test_a_configuration_without_its_models_code_says_so(self, tmp_path, caplog, monkeypatch):
        """Loaded from a local checkpoint, a configuration lies in a folder without the model's files."""
        monkeypatch.setattr(remote_code.logging.get_logger("transformers"), "propagate", True)
        source, folder = tmp_path / "source", tmp_path / "checkpoint"
        for one in (source, folder):
            one.mkdir()
        for name in ("configuration_sparsepath_vit.py", "remote_code.py"):
            (source / name).write_bytes((Path(remote_code.__file__).parent / name).read_bytes())
        monkeypatch.setattr(remote_code, "__file__", str(source / "remote_code.py"))
        write_remote_code(folder, PLAIN)
        assert code_in(folder) == {"configuration_sparsepath_vit", "remote_code"}
        assert "modeling_sparsepath_vit.py is missing" in caplog.text
        caplog.clear()
        (folder / "modeling_sparsepath_vit.py").write_text("# Copyright 2026 The SparsePathViT authors.\n")
        write_remote_code(folder, PLAIN)
        assert "missing" not in caplog.text


class TestWhoWrites:
    def test_the_main_process_alone(self, tmp_path, monkeypatch):
        model = small_model(SparsePathViTModel)
        model.save_pretrained(tmp_path, is_main_process=False)
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(model, "should_save_on_this_rank", lambda is_main_process: False)
        model.save_pretrained(tmp_path)  # the first process of another machine
        assert not list(tmp_path.iterdir())

    def test_a_model_that_saves_its_adapters_alone_does_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.1")  # an older one will do for this
        model = small_model(SparsePathViTModel)
        model.add_adapter(LoraConfig(r=2, target_modules=["qkv"]))
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").is_file()
        assert not code_in(tmp_path)

    @pytest.mark.parametrize("kind", [SparsePathViTModel, SparsePathViTImageProcessor])
    def test_saving_with_push_to_hub_uploads_the_code_that_lay_there_before(self, kind, tmp_path, monkeypatch):
        """Transformers uploads what is newer than when it began, and the code is written before."""
        one = kind(small_config()) if kind is SparsePathViTModel else kind()
        uploaded = []
        for module in (modeling_utils, image_processing_base):
            monkeypatch.setattr(module, "hf_api", lambda: self)
        monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *args, **kwargs: self)

        def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
            uploaded.extend(path.stem for path in Path(working_dir).glob("*.py") if path.name not in files_timestamps)

        monkeypatch.setattr(kind, "_upload_modified_files", upload)
        for _ in range(2):
            uploaded.clear()
            one.save_pretrained(str(tmp_path), push_to_hub=True)
            assert set(uploaded) == names_of(PLAIN if kind is SparsePathViTModel else PROCESSOR)

    repo_id = "me/model"

    def create_repo(self, *args, **kwargs):
        return self

    def save(self, path):
        pass


class TestTheMap:
    """config.json points at the files beside it, whatever the configuration went through."""

    CONFIGS = {
        "plain": (small_config, PLAIN),
        "adapter": (lambda: SparsePathViTAdapterConfig.from_vit_config(small_config()), ADAPTER),
        "mask2former": (lambda: segmentation_config("mask2former"), SEGMENTATION),
        "queries": (lambda: segmentation_config("queries"), SEGMENTATION),
    }

    @pytest.mark.parametrize("kind", CONFIGS)
    @pytest.mark.parametrize("stored", ["from the hub", "of another class", None, "partial"])
    def test_is_the_full_map_of_its_class(self, kind, stored, tmp_path):
        make, own = self.CONFIGS[kind]
        config = make()
        config.auto_map = {
            "from the hub": {name: f"owner/name--{reference}" for name, reference in own.items()},
            "of another class": dict(SEGMENTATION if kind == "plain" else PLAIN),
            "partial": dict(list(own.items())[-1:]),
            None: None,
        }[stored]
        config.save_pretrained(tmp_path)
        assert auto_map_in(tmp_path) == own
        assert {f"{reference.split('.')[0]}.py" for reference in own.values()} <= {p.name for p in tmp_path.iterdir()}

    def test_entries_of_a_users_own_classes_stay(self, tmp_path):
        mine = {"AutoModel": "my_models.MyModel", "AutoTokenizer": ["owner/name--slow.Slow", None]}
        small_config(auto_map=mine).save_pretrained(tmp_path)
        assert auto_map_in(tmp_path) == {**PLAIN, **mine}

    def test_the_configuration_in_memory_still_says_where_its_code_is(self, tmp_path):
        config = small_config(auto_map={"AutoModel": "owner/name--modeling_sparsepath_vit.SparsePathViTModel"})
        config.save_pretrained(tmp_path)
        assert config.auto_map["AutoModel"].startswith("owner/name--")

    def test_of_a_classifier_offers_no_segmentation(self, tmp_path):
        model = small_model(SparsePathViTForImageClassification)
        model.config.auto_map |= SEGMENTATION
        model.save_pretrained(tmp_path)
        assert auto_map_in(tmp_path) == PLAIN
