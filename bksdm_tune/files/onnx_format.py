"""U-Net, text encoder and VAE as ONNX, in the folders and with the names that Optimum uses.

Batches of any size; the native resolution.  Read back by onnxruntime.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bksdm_tune.diffusion import tokenise
from bksdm_tune.files.answers import PROMPT, TIMESTEPS, Answers, latents, question
from bksdm_tune.files.optional import check_installed
from bksdm_tune.resolve import INDEX, Parts

FILE, LARGE = "model.onnx", 1.5e9  # bytes; above, weights lie beside the graph (protobuf ends at 2)


class Graph(NamedTuple):
    """A model as a function of tensors, with its inputs' and outputs' names."""

    apply: Callable[..., Any]
    model: Any
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def graphs(models: dict[str, Any], tokenizer: Any) -> dict[str, Graph]:
    """By the folder each goes into."""
    unet, text, vae = models["unet"], models["text_encoder"], models["vae"]
    noisy, timesteps = question(unet.config)
    ids = tokenise(tokenizer, [PROMPT] * len(TIMESTEPS))
    width = unet.config["cross_attention_dim"]
    embeds = torch.zeros(len(noisy), ids.shape[1], width)
    small = latents(unet.config)
    pixels = torch.zeros(len(small), 3, *(side * vae_factor(vae) for side in small.shape[2:]))
    return {
        "unet": Graph(
            lambda *x: unet(*x, return_dict=False)[0],
            unet,
            {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": embeds},
            ("out_sample",),
        ),
        "text_encoder": Graph(
            lambda ids: text(ids, return_dict=False)[:2],
            text,
            {"input_ids": ids},
            ("last_hidden_state", "pooler_output"),
        ),
        "vae_decoder": Graph(
            lambda z: vae.decode(z, return_dict=False)[0],
            vae,
            {"latent_sample": small},
            ("sample",),
        ),
        "vae_encoder": Graph(
            lambda x: vae.encode(x).latent_dist.mean, vae, {"sample": pixels}, ("latent_sample",)
        ),
    }


def vae_factor(vae: Any) -> int:
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


class Called(nn.Module):
    """A graph's function as a module, so that the exporter finds its weights."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.model, self.apply_to = graph.model, graph.apply

    def forward(self, *inputs: Tensor) -> Any:
        return self.apply_to(*inputs)


def write(models: dict[str, Any], tokenizer: Any, parts: Parts, target: Path) -> None:
    check_installed("onnx", "onnxscript", "onnxruntime", extra="onnx")
    made = graphs(models, tokenizer)
    for name, graph in made.items():
        (target / name).mkdir()
        export_graph(graph, target / name / FILE)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(parts.root / part, target / part)
    index = {
        "_class_name": "OnnxStableDiffusionPipeline",
        **{name: ["diffusers", "OnnxRuntimeModel"] for name in made},
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": json.loads((parts.root / INDEX).read_text())["scheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def export_graph(graph: Graph, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    weights = sum(p.numel() * p.element_size() for p in graph.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Called(graph).eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(tuple({0: batch} for _ in graph.inputs),),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=weights > LARGE)


def read(tokenizer: Any, unet_config: Any, target: Path) -> Answers:
    """The same question put to onnxruntime."""
    ids = tokenise(tokenizer, [PROMPT] * len(TIMESTEPS))
    embeds = run(target / "text_encoder", input_ids=ids)[0]
    noisy, timesteps = question(unet_config)
    said = run(target / "unet", sample=noisy, timestep=timesteps, encoder_hidden_states=embeds)[0]
    pixels = run(target / "vae_decoder", latent_sample=latents(unet_config))[0]
    means = run(target / "vae_encoder", sample=pixels)[0]
    return {
        "text encoder": embeds,
        "U-Net": said,
        "VAE decoder": pixels,
        "VAE encoder": means,
    }


def run(folder: Path, **inputs: Tensor) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        folder / FILE, options, providers=["CPUExecutionProvider"]
    )
    feed = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
    return [torch.from_numpy(value) for value in session.run(None, feed)]
