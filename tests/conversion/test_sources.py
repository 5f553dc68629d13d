# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
import os

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from sparsepath_vit.conversion import sources
from sparsepath_vit.conversion.architectures import architecture
from sparsepath_vit.conversion.sources import open_source

STATE = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(4)}


def assert_is_state(source):
    assert source.shapes == {"a": (2, 3), "b.c": (4,)}
    assert torch.equal(source.tensors["a"], STATE["a"])


@pytest.mark.parametrize("suffix", ["bin", "pth", "pt"])
def test_pickled_state_dict(tmp_path, suffix):
    torch.save(STATE, tmp_path / f"weights.{suffix}")
    assert_is_state(open_source(tmp_path / f"weights.{suffix}"))


def test_pickle_of_the_old_format(tmp_path):
    torch.save(STATE, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert_is_state(open_source(tmp_path / "weights.pth"))


def test_safetensors_and_the_files_beside_it(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    source = open_source(tmp_path)
    assert_is_state(source)
    assert source.config == {"num_attention_heads": 2}
    assert source.preprocessor["image_mean"] == [0.1, 0.2, 0.3]
    assert source.label == tmp_path.name


@pytest.mark.parametrize("container", ["model", "state_dict", "teacher", "backbone"])
def test_nested_state_dict(tmp_path, container):
    torch.save({container: STATE, "epoch": 3, "student": {"x": torch.ones(1)}}, tmp_path / "weights.pth")
    assert_is_state(open_source(tmp_path / "weights.pth"))


def test_doubly_nested_state_dict(tmp_path):
    torch.save({"state_dict": {"teacher": STATE}, "step": torch.tensor(3)}, tmp_path / "weights.pth")
    assert_is_state(open_source(tmp_path / "weights.pth"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{part}-of-00002.{kind}" for part in (1, 2)]
    for name, tensor in zip(names, STATE, strict=True):
        (save_file if kind == "safetensors" else torch.save)({tensor: STATE[tensor]}, tmp_path / name)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    assert_is_state(open_source(tmp_path))
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=f"{names[1]} is missing"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"index.json beside the weights holds a JSON list, not an object"),
        ({"weight_map": ["model.safetensors"]}, r"index.json has no weight_map \(tensor name -> file name\)"),
        ({"weight_map": {"a": 3}}, r"index.json has no weight_map"),
        ({"weight_map": {}}, r"index.json has no weight_map"),
        (
            {"weight_map": dict.fromkeys((*STATE, "blocks.1.a"), "shard.safetensors")},
            r"index.json names 1 tensors that no shard holds: blocks.1.a. .*download them together",
        ),
    ],
)
def test_index_that_is_none_or_of_another_version(tmp_path, content, message):
    """Regression: a layer that the index names and no shard holds was left out in silence."""
    save_file(STATE, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_index_that_points_outside_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    save_file(STATE, tmp_path / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(STATE, "../shard.safetensors")}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard.safetensors is missing"):
        open_source(tmp_path / "in")


def test_safetensors_is_preferred_to_a_pickle(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert_is_state(open_source(tmp_path))


def test_folder_without_weights_names_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no weights.*model.safetensors.*pytorch_model.bin.*Found: notes.txt"):
        open_source(tmp_path)


def test_folder_with_several_weight_files_asks_which(tmp_path):
    for name in ("first.pth", "second.pth"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(ValueError, match=r"first.pth, second.pth. Pass the file itself"):
        open_source(tmp_path)


def test_known_model_says_which_file_of_a_folder(tmp_path):
    torch.save(STATE, tmp_path / "teacher_checkpoint_load.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "teacher_checkpoint.pth")
    assert_is_state(open_source(tmp_path, architecture("openmidnight")))


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch {}".format(os.environ["SPARSEPATH_TEST_MARKER"]),)


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickle_that_wants_to_run_code_is_refused(tmp_path, monkeypatch, zip_format):
    marker = tmp_path / "it-ran"
    monkeypatch.setenv("SPARSEPATH_TEST_MARKER", str(marker))
    path = tmp_path / "weights.pth"
    torch.save({"a": STATE["a"], "b": RunsCode()}, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=r"weights.pth was refused.*would run code.*posix.system.*safetensors"):
        open_source(path)
    assert not marker.exists()


def test_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole_model.pt")
    with pytest.raises(ValueError, match=r"whole_model.pt was refused"):
        open_source(tmp_path / "whole_model.pt")


@pytest.mark.parametrize("keep", [4, 40, -8])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth", "old.pth"])
def test_truncated_file(tmp_path, name, keep):
    state = {"a": torch.randn(50, 50)}
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "old.pth")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"truncated or damaged \([\d,]+ bytes.*download it again"):
        open_source(path).tensors["a"]


def test_file_that_only_looks_like_a_pickle_by_its_name(tmp_path):
    """Regression: a downloaded error page was said to want to run code."""
    (tmp_path / "weights.pth").write_text("<!DOCTYPE html><html>404: not found</html>")
    with pytest.raises(ValueError, match=r"weights.pth is no PyTorch file: it begins with b'<!DOCTYPE html><'"):
        open_source(tmp_path / "weights.pth")
    save_file(STATE, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no PyTorch file.*let its name end in .safetensors"):
        open_source(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(("name", "content"), [("notes.txt", b"hello\n"), ("region.png", b"\x89PNG\r\n\x1a\n\0\0")])
def test_any_other_file_is_named(tmp_path, name, content):
    """Regression: text ended in a traceback of the unpickler, and an image was said to want to run code."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is no PyTorch file: it begins with b'"):
        open_source(tmp_path / name)


def test_what_only_begins_like_a_pickle_is_damaged(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02hello\n")
    with pytest.raises(ValueError, match=r"weights\.pth is truncated or damaged"):
        open_source(tmp_path / "weights.pth")


def test_damaged_file_is_not_read_with_torchs_own_advice(tmp_path):
    """Regression: the message went on with torch's, which may advise weights_only=False."""
    torch.save(STATE, tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"truncated or damaged \(900 bytes; [^.;]*\)\. Compare"):
        open_source(tmp_path / "weights.pth")


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
        open_source(tmp_path)


def test_pickle_without_tensors(tmp_path):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"holds no state dict: its keys are epoch, loss"):
        open_source(tmp_path / "weights.pth")
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        open_source(tmp_path / "weights.pth")


def test_config_that_is_no_json(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"config.json beside the weights is not valid JSON"):
        open_source(tmp_path)
    for content in ("null", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json beside the weights holds a JSON \w+, not an object"):
            open_source(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "missing.safetensors", "folder/missing.pth", "word"])
def test_source_that_is_nothing(source):
    with pytest.raises(ValueError, match="no such file or folder, and it is neither a Hub id"):
        open_source(source)


def raising(error):
    def download(*_, **__):
        raise error

    return download


class Response:
    """As much of an HTTP answer as the Hub's errors read."""

    headers: dict = {}
    request = None
    status_code = 403


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), r"MahmoodLab/UNI2-h is not in the local cache.*hf auth login.*HF_TOKEN"),
        (GatedRepoError("gated", response=Response()), r"MahmoodLab/UNI2-h is gated.*accept its terms.*hf auth login"),
        (
            RepositoryNotFoundError("401", response=Response()),
            r"does not exist on the Hub or is private.*auth login",
        ),
    ],
)
@pytest.mark.parametrize("source", ["MahmoodLab/UNI2-h", "uni2-h"])
def test_hub_that_refuses(monkeypatch, source, error, message):
    monkeypatch.setattr(sources, "hf_hub_download", raising(error))
    with pytest.raises(OSError, match=message):
        open_source(source)


def test_hub_repository_without_weights(monkeypatch):
    monkeypatch.setattr(sources, "hf_hub_download", raising(EntryNotFoundError("404")))
    with pytest.raises(ValueError, match=r"someone/something holds no weights under a known name.*model.safetensors"):
        open_source("someone/something")


def test_hub_download_takes_the_file_the_table_names(monkeypatch, tmp_path):
    torch.save(STATE, tmp_path / "GPFM.pth")
    asked = []

    def download(hub_id, name, local_files_only):
        asked.append(name)
        if not (tmp_path / name).exists():
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    source = open_source("majiabo/GPFM")
    assert_is_state(source)
    assert source.known == architecture("gpfm")
    assert source.label == "majiabo/GPFM"
    assert asked == ["GPFM.pth", "config.json", "preprocessor_config.json"]


def test_offline_hub_is_asked_once_and_the_cache_for_every_name(monkeypatch, tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    asked = []

    def download(hub_id, name, local_files_only):
        asked.append(local_files_only)
        if name != "pytorch_model.bin":
            raise LocalEntryNotFoundError("not cached")
        return str(tmp_path / name)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    assert_is_state(open_source("someone/something"))
    assert asked == [False, True, True, True, True]
