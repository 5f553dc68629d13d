# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Training: gradients, checkpointing, regularisation, and whether a tiny batch can be learnt."""

import pytest
import torch
from small_models import random_pixels, small_config, small_model

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel

PRUNED = {"prune_ratio": 0.5, "num_labels": 3}


class TestGradients:
    def loss(self, model, seed=0):
        torch.manual_seed(seed)
        return model(random_pixels(2, 9, 7), labels=torch.tensor([0, 2]), image_sizes=[(36, 28), (28, 28)]).loss

    def gradients(self, model, seed=0):
        model.zero_grad()
        self.loss(model, seed).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("implementation", ["block_sparse", "eager", "sdpa"])
    @pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
    def test_they_reach_every_parameter(self, implementation, pooling):
        model = small_model(
            SparsePathViTForImageClassification, pooling=pooling, num_prefix_position_embeddings=3, **PRUNED
        )
        model.set_attn_implementation(implementation)
        gradients = self.gradients(model.train())
        assert not [name for name, gradient in gradients.items() if not gradient.any() or not gradient.isfinite().all()]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, use_reentrant):
        settings = {"hidden_dropout": 0.1, "attention_dropout": 0.2, "drop_path_rate": 0.3, **PRUNED}
        model = small_model(SparsePathViTForImageClassification, **settings).train()
        expected = self.gradients(model)
        calls = []
        model.sparsepath_vit.encoder.layers[1].norm1.register_forward_pre_hook(lambda *arguments: calls.append(1))
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for name, gradient in self.gradients(model).items():
            assert torch.equal(gradient, expected[name]), name
        assert len(calls) == 2  # once in the forward, once recomputed
        model.gradient_checkpointing_disable()
        self.gradients(model)
        assert len(calls) == 3

    def test_adapters_can_ask_for_gradients_of_the_inputs(self):
        """What PEFT needs to train adapters with checkpointing while all base weights are frozen."""
        model = small_model(SparsePathViTForImageClassification, **PRUNED).train()
        model.requires_grad_(False)
        model.enable_input_require_grads()
        assert model.get_input_embeddings() is model.sparsepath_vit.embeddings.patch_embeddings
        adapter = model.sparsepath_vit.encoder.layers[0].mlp.fc2
        adapter.requires_grad_(True)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        self.loss(model).backward()
        assert adapter.weight.grad.any()


class TestTraining:
    PROBLEMS = [
        ("single_label_classification", torch.tensor([0, 1, 2, 1])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]])),
        ("regression", torch.tensor([[0.5, -1, 0], [1, 0.3, -0.2], [-1, 0, 1], [0.2, 0.8, -0.5]])),
    ]

    @pytest.mark.parametrize("problem_type, labels", PROBLEMS)
    def test_a_tiny_batch_can_be_learnt(self, problem_type, labels):
        torch.manual_seed(0)
        config = small_config(
            num_hidden_layers=2, prune_ratio=0.5, prune_after_layer=1, num_labels=3, problem_type=problem_type
        )
        model = SparsePathViTForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        pixels, losses = random_pixels(4, 5, 5), []
        for _ in range(60):
            loss = model(pixels, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 * losses[0]

    @pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout", "drop_path_rate"])
    @pytest.mark.parametrize("is_ragged", [False, True])
    def test_regularisation_acts_in_training_only_and_follows_the_seed(self, name, is_ragged):
        model, plain = small_model(SparsePathViTModel, **{name: 0.4}), small_model(SparsePathViTModel)
        pixels, sizes = random_pixels(2, 5, 6), [(20, 24), (12, 24) if is_ragged else (20, 24)]

        def run(seed):
            torch.manual_seed(seed)
            return model(pixels, image_sizes=sizes)[0]

        assert torch.equal(run(0), plain(pixels, image_sizes=sizes)[0])
        model.train()
        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))

    @torch.no_grad()
    def test_drop_path_drops_whole_images_and_keeps_the_mean(self):
        model = small_model(SparsePathViTModel, drop_path_rate=0.5, num_hidden_layers=2).train()
        layer = model.encoder.layers[1]  # the rate grows with the depth: 0 in the first layer, 0.5 in the last
        assert [one.drop_path.drop_prob for one in model.encoder.layers] == [0.0, 0.5]
        pixels = random_pixels(1, 4, 4).repeat(400, 1, 1, 1)
        grid = model.embeddings.token_grid(pixels, None, [(16, 16)] * 399 + [(16, 12)])
        branch = torch.ones(1, grid.num_tokens, 32)
        images = layer.drop_path(branch, grid).split([19] * 399 + [15], dim=1)
        factors = torch.stack([image.unique() for image in images]).flatten()  # one number per image
        assert set(factors.tolist()) == {0.0, 2.0}
        assert factors.mean().item() == pytest.approx(1.0, abs=0.15)


def test_large_weights_leave_nothing_at_its_initial_value():
    """Other tests rely on it: tiny initial weights would make attention uniform and hide a wrong scale."""
    model = small_model(SparsePathViTForImageClassification, num_labels=8, num_prefix_position_embeddings=3)
    assert all(parameter.std() > 0.1 for parameter in model.parameters())
