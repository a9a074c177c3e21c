"""U-Net, text encoder and VAE decoder as Core ML programs, named as Apple's Swift package wants.

Attention is ``SPLIT_EINSUM_V2`` (each head apart, queries in chunks of 512, axes as the Neural
Engine wants them; Apple's ml-stable-diffusion), weights are palettised to 6 bits.  Running a
program takes a Mac, so it is read back by its parts: names, shapes, operations, and every
palettised weight, decoded from the file's bytes and put into the model that answers.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bksdm_tune.diffusion import tokenise
from bksdm_tune.errors import DataError
from bksdm_tune.files.answers import PROMPT, TIMESTEPS, Answers, latents, question
from bksdm_tune.files.optional import check_installed

BITS, CHUNK = 6, 512
PALETTE = "constexpr_lut_to_dense"
BLOB_HEADER = 64  # bytes before each tensor in coremltools' weight file


class SplitEinsum:
    """An attention processor: tokens in the last axis, one head and one chunk at a time."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.to_q(hidden_states).transpose(1, 2).unsqueeze(2)  # N, C, 1, tokens
        k = attn.to_k(context).unsqueeze(2)  # N, tokens, 1, C
        v = attn.to_v(context).transpose(1, 2).unsqueeze(2)
        size = q.shape[1] // attn.heads
        heads = zip(pieces(q, 1, size), pieces(k, 3, size), pieces(v, 1, size), strict=True)
        found = [self.head(*parts, attn.scale) for parts in heads]
        return attn.to_out[0](torch.cat(found, 1).squeeze(2).transpose(1, 2))

    @staticmethod
    def head(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows = []
        for some in pieces(q, 3, CHUNK):
            share = (torch.einsum("bchq,bkhc->bkhq", some, k) * scale).softmax(1)
            rows.append(torch.einsum("bkhq,bchk->bchq", share, v))
        return rows[0] if len(rows) == 1 else torch.cat(rows, 3)


def pieces(x: Tensor, axis: int, size: int) -> list[Tensor]:
    """Of ``size`` along ``axis``; the converter knows no split into one."""
    return [x] if x.shape[axis] <= size else list(x.split(size, axis))


class Unet(nn.Module):
    """Prompt embeddings come as N, C, 1, tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.set_attn_processor(SplitEinsum())

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        embeds = encoder_hidden_states.squeeze(2).transpose(1, 2)
        return self.model(sample, timestep, embeds, return_dict=False)[0]


class TextEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(input_ids.long(), return_dict=False)[:2]


class VAEDecoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode(z, return_dict=False)[0]


class Program(NamedTuple):
    """A module, its inputs by name and its outputs' names."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def programs(models: dict[str, Any], tokenizer: Any) -> dict[str, Program]:
    """By the package each goes into; float32 inputs of fixed shapes, as the Swift package gives."""
    unet, text, vae = models["unet"], models["text_encoder"], models["vae"]
    noisy, timesteps = question(unet.config)
    ids = tokenise(tokenizer, [PROMPT])
    embeds = torch.zeros(len(noisy), unet.config["cross_attention_dim"], 1, ids.shape[1])
    unet_inputs = {"sample": noisy, "timestep": timesteps.float(), "encoder_hidden_states": embeds}
    text_outputs = ("last_hidden_state", "pooled_outputs")
    return {
        "Unet": Program(Unet(unet), unet_inputs, ("noise_pred",)),
        "TextEncoder": Program(TextEncoder(text), {"input_ids": ids.float()}, text_outputs),
        "VAEDecoder": Program(VAEDecoder(vae), {"z": latents(unet.config)[:1]}, ("image",)),
    }


def write(models: dict[str, Any], tokenizer: Any, target: Path) -> None:
    check_installed("coremltools", "sklearn", extra="coreml")
    made = programs(models, tokenizer)
    for name, program in tqdm(made.items(), "Core ML", disable=not sys.stderr.isatty()):
        convert(program, target / f"{name}.mlpackage")
    write_tokenizer(tokenizer, target)


def write_tokenizer(tokenizer: Any, target: Path) -> None:
    """``vocab.json`` and ``merges.txt``, which newer tokenizer folders keep in one file."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")


def convert(program: Program, path: Path) -> None:
    """By torch.export; half precision, for iOS 16 and macOS 13."""
    ct = _coremltools()
    import coremltools.optimize.coreml as optimise

    with warnings.catch_warnings(), torch.no_grad(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        inputs = tuple(program.inputs.values())
        exported = torch.export.export(program.module.eval(), inputs).run_decompositions({})
        drop_aliases(exported.graph_module.graph)
        model = ct.convert(
            exported,
            inputs=[ct.TensorType(n, x.shape, np.float32) for n, x in program.inputs.items()],
            outputs=[ct.TensorType(name, dtype=np.float32) for name in program.outputs],
            minimum_deployment_target=ct.target.iOS16,
            compute_units=ct.ComputeUnit.CPU_AND_NE,
            skip_model_load=True,
        )
        palette = optimise.OpPalettizerConfig(mode="kmeans", nbits=BITS)
        config = optimise.OptimizationConfig(global_config=palette)
        own = own_weights(program.module)
        for name in optimise.get_weights_metadata(model):
            if weight_name(name) not in own:  # masks, positions
                config.set_op_name(name, None)
        optimise.palettize_weights(model, config).save(str(path))


def drop_aliases(graph: torch.fx.Graph) -> None:
    """Slices that take everything; the converter does not know them."""
    for node in list(graph.nodes):
        if node.target == torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def read(models: dict[str, Any], tokenizer: Any, target: Path) -> Answers:
    """The question put to the models with the weights that stand in the packages.

    Raises:
        DataError: a package has other names, shapes, operations or weights than it should.
    """
    made = programs(models, tokenizer)
    for name, program in made.items():
        spec = _coremltools().utils.load_spec(str(target / f"{name}.mlpackage"))
        check_signature(name, spec, program)
        put_weights(name, program.module, decoded(spec, target / f"{name}.mlpackage"))
    return answers(made, models, tokenizer)


@torch.inference_mode()
def answers(made: dict[str, Program], models: dict[str, Any], tokenizer: Any) -> Answers:
    embeds = made["TextEncoder"].module(tokenise(tokenizer, [PROMPT]).float())[0]
    embeds = embeds.expand(len(TIMESTEPS), -1, -1)
    noisy, timesteps = question(models["unet"].config)
    said = made["Unet"].module(noisy, timesteps.float(), embeds.transpose(1, 2).unsqueeze(2))
    pixels = made["VAEDecoder"].module(latents(models["unet"].config))
    return {"text encoder": embeds, "U-Net": said, "VAE decoder": pixels}


def summary(target: Path) -> str:
    """Sizes, and what was not tried."""
    packages = sorted(target.glob("*.mlpackage"))
    size = {p.stem: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in packages}
    sizes = ", ".join(f"{name} {bytes_ / 1e6:.1f} MB" for name, bytes_ in size.items())
    return (
        f"{BITS}-bit palettes: {sizes}. The answers are those of the weights in the packages; "
        "the programs themselves were not executed, which takes a Mac."
    )


def check_signature(name: str, spec: Any, program: Program) -> None:
    described = spec.description
    found = {i.name: tuple(i.type.multiArrayType.shape) for i in described.input}
    wanted = {n: tuple(x.shape) for n, x in program.inputs.items()}
    outputs = tuple(o.name for o in described.output)
    if found != wanted or set(outputs) != set(program.outputs):
        raise DataError(f"{name} has inputs {found} and outputs {outputs}; nothing was written.")
    kinds = {operation.type for operation in operations(spec)}
    if name == "Unet" and ("einsum" not in kinds or "scaled_dot_product_attention" in kinds):
        raise DataError("The U-Net's attention was not split; nothing was written.")
    if PALETTE not in kinds:
        raise DataError(f"{name} has no palettised weights; nothing was written.")


def operations(spec: Any) -> Iterator[Any]:
    for block in spec.mlProgram.functions["main"].block_specializations.values():
        yield from block.operations


def decoded(spec: Any, package: Path) -> dict[str, Tensor]:
    """The palettised weights by the name they have in the program, dots as underscores."""
    blob = next(package.rglob("weight.bin")).read_bytes()
    found = {}
    for operation in operations(spec):
        if operation.type != PALETTE:
            continue
        attributes = operation.attributes
        palette = np.frombuffer(_stored(attributes["lut"], blob), np.float16)
        shape = np.frombuffer(attributes["shape"].immediateValue.tensor.bytes.values, np.uint32)
        bits = np.unpackbits(
            np.frombuffer(_stored(attributes["indices"], blob), np.uint8), bitorder="little"
        )
        each = bits[: int(shape.prod()) * BITS].reshape(-1, BITS) @ (1 << np.arange(BITS))
        if len(palette) > 2**BITS:
            raise DataError(f"A palette has {len(palette)} entries; nothing was written.")
        found[weight_name(operation.outputs[0].name)] = torch.from_numpy(
            palette[each].astype(np.float32).reshape(shape)
        )
    return found


def _stored(attribute: Any, blob: bytes) -> bytes:
    """The bytes a tensor has in the weight file: behind a header that says where and how many."""
    start = attribute.blobFileValue.offset
    header = blob[start : start + BLOB_HEADER]
    size, offset = np.frombuffer(header[8:24], np.uint64)
    return blob[int(offset) : int(offset + size)]


def put_weights(name: str, module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises DataError: one of them is not the module's, or not of its shape."""
    own = own_weights(module)
    for key, value in weights.items():
        if key not in own or own[key].shape != value.shape:
            raise DataError(
                f"{name} has a weight {key} that was not exported; nothing was written."
            )
        own[key].copy_(value)


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """By the names they have in a program."""
    return {key.replace(".", "_"): value.data for key, value in module.named_parameters()}


def weight_name(name: str) -> str:
    """Of the weight that an operation of a program gives."""
    return name.partition("_to_fp16")[0].removeprefix("p_")


def _coremltools() -> Any:
    """Its remarks about parts that need a Mac are kept back."""
    with redirect_stderr(StringIO()):
        import coremltools

    return coremltools
