"""Models of images learn from scratch as torch's do: loss after loss, and with the same running statistics behind.

The same weights to start from, the same images in the same order. Fashion-MNIST where ../shared has it, else noise
whose mean tells its class.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxsft import hub, make_step, models, optim, sharding, train, tree
from jaxsft.hub import names
from jaxsft.types import Sums

from .images import torch, transformers

pytestmark = pytest.mark.parity

CLASSES, BATCH = 10, 32
FASHION = Path(__file__).parents[3] / "shared" / "data" / "img_fashion_mnist"
MODELS = {
    "resnet": (
        "ResNet",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "layer_type": "basic",
            "num_labels": CLASSES,
        },
    ),
    "vit": (
        "ViT",
        {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
            "num_labels": CLASSES,
        },
    ),
}


def read(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28, 3], each channel the same, and their classes, in an order of their own."""
    if FASHION.is_dir():
        files = sorted((FASHION / part).glob("*/*.png"))
        grey = np.stack([np.asarray(Image.open(file).convert("L"), np.float32) for file in files])
        labels = np.array([int(file.parent.name) for file in files])
    else:
        draw = np.random.default_rng(part == "test")
        labels = np.arange(500) % CLASSES
        grey = draw.uniform(0, 255, (500, 28, 28)).astype(np.float32) / 4 + 19 * labels[:, None, None]
    order = np.random.default_rng(0).permutation(len(labels))
    return np.repeat((grey[order, ..., None] / 255 - 0.3) / 0.35, 3, axis=-1).astype(np.float32), labels[order]


def batches(images: np.ndarray, steps: int, seed: int = 0):
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        yield draw.permutation(len(images))[:BATCH]


def make_torch(kind: str, seed: int):
    name, keys = MODELS[kind]
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**keys))


def learn_torch(model, images, labels, order, rate: float) -> list[float]:
    tx, found = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), []
    model.train()
    for rows in order:
        loss = model(torch.tensor(images[rows].transpose(0, 3, 1, 2)), labels=torch.tensor(labels[rows])).loss
        tx.zero_grad()
        loss.backward()
        tx.step()
        found.append(loss.item())
    model.eval()
    return found


def learn(folder, images, labels, order, rate: float):
    """(model, variables, losses) of the same, from the checkpoint in a folder."""
    model, variables = hub.load_variables(str(folder), full_precision="params/.*")

    def objective(variables, batch, key):
        features, drift = model.learn(variables, batch[0], dropout=key)
        scores = models.logits(model, variables, features)[:, 0]
        total = optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).sum()
        weight = jnp.float32(len(batch[1]))
        return Sums(total + drift * weight, weight, {})

    tx, _ = optim.build(optim.Config(learning_rate=rate, schedule="constant", clip=0.0), len(order))
    state, found = train.init(variables, tx, jax.random.key(0)), []
    step = make_step(objective, tx)
    for rows in order:
        state, metrics = step(state, {}, (images[rows], labels[rows]))
        found.append(float(metrics["loss"]))
    return model, state.trainable, found


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_steps_from_scratch_are_those_of_torch(kind, tmp_path, difference):
    images, labels = read("train")
    order = list(batches(images, 12))
    reference = make_torch(kind, 0)
    reference.save_pretrained(tmp_path)
    model, variables, got = learn(tmp_path, images, labels, order, 1e-3)
    expected = learn_torch(reference, images, labels, order, 1e-3)
    assert expected[-1] < expected[0] - 0.1
    assert difference(f"images, losses of 12 steps from scratch, {kind}", got, expected) < 1e-3
    if kind == "resnet":
        family = hub.read_config(tmp_path)[0]
        buffers = dict(reference.named_buffers())
        for path, leaf in tree.flat(variables["params"]).items():
            if "running" in path:
                here, _ = names.leaf_names(family, path, leaf.shape)
                theirs = np.stack([buffers[name].numpy() for name in here.flat]).reshape(leaf.shape)
                assert (
                    difference("images, running statistics after 12 steps, relative", leaf, theirs, relative=True)
                    < 1e-3
                )
    seen = read("test")[0][:50]
    scores = models.logits(model, variables, model.features(variables, seen))[:, 0]
    with torch.no_grad():
        wanted = reference(torch.tensor(seen.transpose(0, 3, 1, 2))).logits.numpy()
    assert difference(f"images, scores after 12 steps from scratch, {kind}", scores, wanted) < 1e-3


def test_devices_that_share_a_batch_share_its_statistics(tmp_path):
    make_torch("resnet", 0).save_pretrained(tmp_path)
    images, found = read("train")[0][:16], []
    for mesh in (None, sharding.mesh(4, 2, 1)):
        model, variables = hub.load_variables(str(tmp_path), mesh, full_precision="params/.*")
        seen = images if mesh is None else jax.device_put(images, sharding.rows(mesh))

        def objective(variables, seen, model=model):
            features, drift = model.learn(variables, seen, dropout=jax.random.key(0))
            return drift + features.sum() / len(images)

        found.append(tree.flat(jax.device_get(jax.jit(jax.grad(objective))(variables, seen))))
    for path, leaf in found[0].items():
        if "running" in path:
            np.testing.assert_allclose(found[1][path], leaf, atol=1e-4, err_msg=path)
    assert max(np.abs(leaf).max() for path, leaf in found[0].items() if "running_mean" in path) > 0.1
