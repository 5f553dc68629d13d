# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What Transformers tests for its own models: saving, loading, precision, devices, compiling, pipelines."""

import copy

import PIL.Image
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file
from small_models import random_mask, random_pixels, small_config, small_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

from sparsepath_vit import (
    SparsePathViTBackbone,
    SparsePathViTConfig,
    SparsePathViTForImageClassification,
    SparsePathViTImageProcessor,
    SparsePathViTModel,
)

MODELS = [SparsePathViTModel, SparsePathViTForImageClassification, SparsePathViTBackbone]
PRUNED = {"prune_ratio": 0.5, "num_labels": 3}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def main_output(model, **inputs):
    outputs = model(**inputs)
    return outputs.feature_maps[0] if isinstance(model, SparsePathViTBackbone) else outputs[0]


class TestSaving:
    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_saved_model_gives_bitwise_the_same(self, model_class, dtype, tmp_path):
        model = small_model(model_class, **PRUNED).to(dtype)
        model.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
        loaded, report = model_class.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.dtype == dtype and not loaded.training
        pixels = random_pixels(2, 5, 6)
        assert torch.equal(main_output(loaded, pixel_values=pixels), main_output(model, pixel_values=pixels))

    @torch.no_grad()
    def test_base_model_classifier_and_backbone_load_each_others_weights(self, tmp_path):
        classifier = small_model(SparsePathViTForImageClassification, num_labels=3)
        classifier.save_pretrained(tmp_path / "classifier")
        base = SparsePathViTModel.from_pretrained(tmp_path / "classifier")
        base.save_pretrained(tmp_path / "base")
        backbone = SparsePathViTBackbone.from_pretrained(tmp_path / "base")
        again, report = SparsePathViTForImageClassification.from_pretrained(
            tmp_path / "base", num_labels=3, output_loading_info=True
        )
        assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        pixels = random_pixels(1, 5, 6)
        expected = classifier.sparsepath_vit(pixels)
        for model in (base, again.sparsepath_vit):
            assert torch.equal(model(pixels)[0], expected[0])
        assert torch.equal(backbone(pixels).feature_maps[0], expected.to_dense_map())

    @torch.no_grad()
    def test_the_installed_package_is_found_by_the_auto_classes(self, tmp_path):
        small_model(SparsePathViTForImageClassification, num_labels=3).save_pretrained(tmp_path)
        assert isinstance(AutoConfig.from_pretrained(tmp_path), SparsePathViTConfig)
        assert isinstance(AutoModel.from_pretrained(tmp_path), SparsePathViTModel)
        classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert isinstance(classifier, SparsePathViTForImageClassification)
        assert isinstance(AutoBackbone.from_config(classifier.config), SparsePathViTBackbone)

    def test_method_settings_can_be_changed_when_loading(self, tmp_path):
        small_model(SparsePathViTModel).save_pretrained(tmp_path)
        model = SparsePathViTModel.from_pretrained(tmp_path, window_size=None, prune_ratio=0.6, prune_after_layer=1)
        config = model.config
        assert (config.window_size, config.prune_ratio, config.prune_after_layer) == (None, 0.6, 1)

    def test_a_missing_parameter_is_initialised_and_reported(self, tmp_path):
        model = small_model(SparsePathViTModel)
        state = model.state_dict()
        del state["encoder.layers.1.layer_scale1.lambda1"], state["embeddings.register_tokens"]
        model.save_pretrained(tmp_path, state_dict=state)
        loaded, report = SparsePathViTModel.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == {"encoder.layers.1.layer_scale1.lambda1", "embeddings.register_tokens"}
        assert torch.equal(loaded.encoder.layers[1].layer_scale1.lambda1, torch.ones(32))
        assert 0 < loaded.embeddings.register_tokens.abs().max() < 0.1  # five standard deviations


class TestInitialisation:
    def test_weights_follow_the_config(self):
        model = SparsePathViTModel(small_config(initializer_range=0.1, layerscale_value=1e-4))
        for name, parameter in model.named_parameters():
            if "lambda1" in name:
                assert torch.equal(parameter, torch.full_like(parameter, 1e-4))
            elif "norm" in name:
                assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
            elif name.endswith("bias"):
                assert not parameter.any()
            else:
                assert parameter.std().item() == pytest.approx(0.1, rel=0.35), name

    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_model_made_on_the_meta_device_initialises_the_same(self, model_class):
        torch.manual_seed(3)
        expected = model_class(small_config()).state_dict()
        torch.manual_seed(3)
        loaded = model_class.from_pretrained(None, config=small_config(), state_dict={}).state_dict()
        assert expected.keys() == loaded.keys()
        for name, parameter in expected.items():
            is_constant = parameter.unique().numel() == 1
            assert torch.equal(loaded[name], parameter) if is_constant else loaded[name].std() > 0, name

    def test_every_tensor_is_a_parameter(self):
        model = SparsePathViTForImageClassification(small_config())
        assert not list(model.buffers())
        for module in model.modules():
            assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


class TestOutputs:
    @torch.no_grad()
    @pytest.mark.parametrize("model_class", MODELS)
    def test_a_tuple_holds_the_same_as_the_output_object(self, model_class):
        model = small_model(model_class, **PRUNED)
        model.set_attn_implementation("eager")
        inputs = {"pixel_values": random_pixels(2, 5, 6), "output_hidden_states": True, "output_attentions": True}
        as_object, as_tuple = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        flat = [as_object[name] for name in as_object]
        assert len(flat) == len(as_tuple)
        for value, other in zip(flat, as_tuple, strict=True):
            pairs = zip(value, other, strict=True) if isinstance(value, tuple) else [(value, other)]
            assert all(torch.equal(a, b) for a, b in pairs)

    @torch.no_grad()
    @pytest.mark.parametrize("model_class", MODELS)
    def test_the_config_can_ask_for_hidden_states_and_attentions(self, model_class):
        pixels = random_pixels(1, 5, 6)
        model = small_model(model_class, attn_implementation="eager")
        outputs = model(pixels)
        assert outputs.hidden_states is None and outputs.attentions is None
        model.config.output_hidden_states = model.config.output_attentions = True
        outputs = model(pixels)
        assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
        assert outputs.attentions[0].shape == (1, 2, 33, 33)
        outputs = model(pixels, output_hidden_states=False, output_attentions=False)
        assert outputs.hidden_states is None and outputs.attentions is None

    @torch.no_grad()
    @pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (10, 2), (6, 6), (13, 7)])
    @pytest.mark.parametrize("prune_ratio", [0.0, 0.6])
    def test_any_size_of_at_least_one_patch(self, rows, columns, prune_ratio):
        model = small_model(SparsePathViTModel, prune_ratio=prune_ratio)
        outputs = model(random_pixels(1, rows, columns))
        kept = rows * columns - int(prune_ratio * rows * columns)
        assert outputs.last_hidden_state.shape == (1, 3 + kept, 32)
        assert outputs.last_hidden_state.isfinite().all()
        assert outputs.to_dense_map().shape == (1, 32, rows, columns)

    def test_a_second_run_is_bitwise_the_same(self):
        model = small_model(SparsePathViTModel, prune_ratio=0.5)
        pixels = random_pixels(2, 9, 7)
        assert torch.equal(model(pixels)[0], model(pixels)[0])


class TestAttentionImplementations:
    def test_block_sparse_is_the_default_and_never_saved(self, tmp_path):
        model = small_model(SparsePathViTModel)
        assert model.config._attn_implementation == "block_sparse"
        model.set_attn_implementation("sdpa")
        model.save_pretrained(tmp_path)
        assert SparsePathViTModel.from_pretrained(tmp_path).config._attn_implementation == "block_sparse"
        eager = SparsePathViTModel.from_pretrained(tmp_path, attn_implementation="eager")
        assert eager.config._attn_implementation == "eager"

    @torch.no_grad()
    @pytest.mark.parametrize("is_ragged", [False, True])
    def test_all_agree_and_can_be_switched(self, is_ragged, block_attention_backend):
        model = small_model(SparsePathViTModel, prune_ratio=0.4)
        pixels = random_pixels(2, 13, 9)
        inputs = {"patch_mask": random_mask(2, 13, 9, 0.8), "image_sizes": [(52, 36), (36, 28)]} if is_ragged else {}
        expected = copy.deepcopy(model).double()(pixels.double(), **inputs)
        names = ["eager", "sdpa", "flex_attention", "block_sparse", "block_sparse"]
        for name, backend in zip(names, ["auto", "auto", "auto", "sdpa_tiles", "reference"], strict=True):
            model.set_attn_implementation(name)
            block_attention_backend(backend)
            with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes a minute on a CPU
                outputs = model(pixels, **inputs)
            assert torch.equal(outputs.patch_positions, expected.patch_positions), name
            assert relative_error(outputs.last_hidden_state, expected.last_hidden_state) < 2e-5, name

    def test_switching_reaches_the_attention(self):
        model = small_model(SparsePathViTForImageClassification)
        model.set_attn_implementation("eager")
        assert len(model(random_pixels(1, 3, 3), output_attentions=True).attentions) == 4
        model.set_attn_implementation("block_sparse")
        with pytest.raises(ValueError, match="output_attentions=True needs"):
            model(random_pixels(1, 3, 3), output_attentions=True)

    def test_an_unknown_name_is_refused(self):
        """Transformers' own message left out the default, and for flash attention asked to open a discussion."""
        with pytest.raises(ValueError, match="'dense_magic' is not supported: choose 'block_sparse'"):
            SparsePathViTModel._from_config(small_config(), attn_implementation="dense_magic")
        model = small_model(SparsePathViTModel)
        for name in ("dense_magic", "flash_attention_2"):
            with pytest.raises(ValueError, match=f"'{name}' is not supported: choose 'block_sparse'"):
                model.set_attn_implementation(name)
        assert model.config._attn_implementation == "block_sparse"


class TestPrecision:
    @torch.no_grad()
    @pytest.mark.parametrize("implementation", ["block_sparse", "eager", "sdpa"])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)])
    def test_lower_precision_is_close_to_float32(self, dtype, tolerance, implementation):
        model = small_model(SparsePathViTModel)
        pixels = random_pixels(2, 9, 7)
        expected = model(pixels).last_hidden_state
        model.set_attn_implementation(implementation)
        output = model.to(dtype)(pixels).last_hidden_state
        assert output.dtype == dtype and output.isfinite().all()
        assert relative_error(output, expected) < tolerance

    @torch.no_grad()
    def test_pruning_in_bfloat16_keeps_the_tokens_that_its_own_scores_name(self):
        model = small_model(SparsePathViTModel, prune_ratio=0.5).to(torch.bfloat16)
        outputs = model(random_pixels(1, 8, 8))
        assert outputs.prune_scores.dtype == torch.float32
        best = outputs.prune_scores[0].topk(32).indices.sort().values
        assert torch.equal(outputs.patch_positions[0] @ torch.tensor([8, 1]), best)

    def test_autocast_is_close_to_float32_forward_and_backward(self):
        model = small_model(SparsePathViTForImageClassification, num_labels=3).train()
        pixels, labels = random_pixels(2, 9, 7), torch.tensor([0, 2])
        losses, gradients = [], []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = model(pixels, labels=labels).loss
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert losses[1] == pytest.approx(losses[0], rel=0.1)
        assert torch.cosine_similarity(*gradients, dim=0) > 0.99


class TestDevices:
    """Accelerate's placement of weights; on one CPU the weights still travel through the hooks."""

    INPUTS = {"pixel_values": random_pixels(2, 9, 7), "image_sizes": [(36, 28), (20, 28)]}

    @torch.no_grad()
    @pytest.mark.parametrize("model_class", MODELS)
    def test_device_map_auto(self, model_class, tmp_path):
        model = small_model(model_class, **PRUNED)
        model.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path, device_map="auto")
        expected = main_output(model, **self.INPUTS)
        assert torch.equal(main_output(loaded.to("cpu"), **self.INPUTS), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("model_class", MODELS)
    @pytest.mark.parametrize("place", ["cpu", "disk", "both"])
    def test_offloaded_weights_give_the_same(self, model_class, place, tmp_path):
        model = small_model(model_class, **PRUNED)
        expected = main_output(model, **self.INPUTS)
        if place == "cpu":
            cpu_offload(model, torch.device("cpu"))
        elif place == "disk":
            disk_offload(model, str(tmp_path), torch.device("cpu"))
        else:
            core = "sparsepath_vit." if model_class is SparsePathViTForImageClassification else ""
            device_map = {name: "cpu" for name, _ in model.named_children()}
            device_map.pop(core.removesuffix("."), None)
            device_map |= {f"{core}embeddings": "disk", f"{core}encoder": "disk", f"{core}norm": "cpu"}
            dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        if place != "cpu":
            assert next(model.parameters()).device.type == "meta"
        assert torch.equal(main_output(model, **self.INPUTS), expected)


class TestCompile:
    @torch.no_grad()
    @pytest.mark.parametrize("num_context_tokens", [0, 30])
    def test_one_graph_serves_images_of_many_sizes(self, num_context_tokens):
        """No graph break anywhere, and after the first size one recompilation with dynamic shapes for all others."""
        torch._dynamo.reset()
        settings = {"num_hidden_layers": 2, "prune_ratio": 0.5, "prune_after_layer": 1}
        model = small_model(SparsePathViTModel, num_context_tokens=num_context_tokens, **settings)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for rows, columns in [(9, 7), (12, 12), (5, 20), (16, 9), (33, 2)]:
            pixels = random_pixels(2, rows, columns)
            expected, outputs = model(pixels), compiled(pixels)
            assert torch.equal(outputs.patch_positions, expected.patch_positions)
            assert relative_error(outputs.last_hidden_state, expected.last_hidden_state) < 1e-5
        assert counter.frame_count <= 2

    @torch.no_grad()
    def test_images_of_several_sizes_on_one_canvas_compile(self):
        """Regression: the first sizes compiled, and other ones could not be traced."""
        torch._dynamo.reset()
        model = small_model(SparsePathViTModel, num_hidden_layers=2, prune_ratio=0.5, prune_after_layer=1)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for sizes in ([(36, 28), (20, 26)], [(48, 47), (48, 16)], [(20, 40), (20, 80)]):
            pixels = random_pixels(2, *(-(-max(sides) // 4) for sides in zip(*sizes, strict=True)))
            expected, outputs = model(pixels, image_sizes=sizes), compiled(pixels, image_sizes=sizes)
            assert torch.equal(outputs.patch_positions, expected.patch_positions)
            assert relative_error(outputs.last_hidden_state, expected.last_hidden_state) < 1e-5
        assert counter.frame_count <= 3

    def test_training_compiles_without_graph_breaks(self):
        torch._dynamo.reset()
        model = small_model(SparsePathViTForImageClassification, num_hidden_layers=2, num_labels=3).train()
        pixels, labels = random_pixels(2, 9, 7), torch.tensor([0, 2])
        gradients = []
        for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            forward(pixels, labels=labels).loss.backward()
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert relative_error(gradients[1][name], gradient) < 1e-4, name


class TestPipelines:
    @pytest.fixture
    def image(self):
        pixels = torch.randint(256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return PIL.Image.fromarray(pixels.numpy())

    @pytest.fixture
    def processor(self):
        return SparsePathViTImageProcessor(patch_size=4)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_image_feature_extraction(self, image, processor, dtype):
        model = small_model(SparsePathViTModel, prune_ratio=0.5).to(dtype)
        extract = pipeline("image-feature-extraction", model=model, image_processor=processor, dtype=dtype)
        outputs = model(**processor(image, return_tensors="pt"))
        assert torch.equal(extract(image, return_tensors=True), outputs.last_hidden_state)
        assert torch.equal(extract(image, pool=True, return_tensors=True), outputs.pooler_output)

    @torch.no_grad()
    def test_image_classification_of_several_images(self, image, processor):
        labels = {0: "benign", 1: "grade 3", 2: "grade 4"}
        model = small_model(SparsePathViTForImageClassification, id2label=labels, prune_ratio=0.5)
        classify = pipeline("image-classification", model=model, image_processor=processor)
        images = [image, image.rotate(90), image.crop((0, 0, 33, 20))]
        for one, results in zip(images, classify(images, top_k=3), strict=True):
            logits = model(**processor(one, return_tensors="pt")).logits[0]
            expected = {labels[index]: share for index, share in enumerate(logits.softmax(dim=0).tolist())}
            assert {result["label"]: result["score"] for result in results} == pytest.approx(expected, abs=1e-6)
