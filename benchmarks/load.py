"""How long does loading take, and how much of the host's memory, beside safetensors' own loader for torch?

    python benchmarks/load.py                                       2 GB in bfloat16 onto 8 fake CPU devices
    python benchmarks/load.py --gigabytes=4 --devices=1 --dtype=float32 --cold

A random Llama is written in shards with an index, then loaded in turns by `load_lm` (which also hashes the files and
opens the tokenizer), by `load_params` alone, and by ``safetensors.torch.load_file`` with a copy of every tensor into
``--dtype`` (its result would otherwise be the mapped file). Each load has a process of its own; imports are not timed,
compilation is. Memory is the peak of the resident set above what was there after the imports, so mapped pages of the
files count.

Figures: docs/benchmarks/load.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MB = 1_000_000
LOADERS = ("load_lm", "load_params", "torch")
MESHES = ("fsdp", "tensor")
_PIECE = 1 << 24


def llama_fields(gigabytes: float, *, tied: bool = False) -> dict[str, Any]:
    """``config.json`` of a Llama whose bfloat16 file is the smallest of its width with at least `gigabytes`."""
    width, inner = (2048, 5632) if gigabytes >= 1 else (1024, 2816)
    fields: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    while 2 * sum(map(math.prod, tensor_shapes(fields).values())) < gigabytes * 1e9:
        fields["num_hidden_layers"] += 1
    return fields


def tensor_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Llama by transformers' name; a tied head is in the file too."""
    width, inner, vocabulary = (fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = (fields[name] * fields["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(fields["num_hidden_layers"]):
        kernels = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width)}
        kernels |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries)}
        kernels |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        kernels |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in kernels.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def random_pieces(name: str, size: int) -> Iterator[np.ndarray]:
    """`size` bfloat16 numbers of the tensor `name`, in pieces; a tied head repeats the embedding table."""
    rng = np.random.default_rng(len(name) if name.startswith("model.layers.") else 0)
    block = rng.standard_normal(_PIECE // 2, np.float32).astype(ml_dtypes.bfloat16)
    for start in range(0, size, block.size):
        yield block[: size - start]


def write_checkpoint(folder: Path, fields: Mapping[str, Any], shards: int) -> Path:
    """Writes a random Llama in bfloat16 as safetensors with an index, and a tokenizer of bytes; a piece at a time."""
    from spt_jax.models.random_lm import byte_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(fields)
    total = sum(map(math.prod, shapes.values()))
    weight_map, done = {}, 0
    for name, shape in shapes.items():
        weight_map[name] = f"model-{min(done * shards // total, shards - 1) + 1:05}-of-{shards:05}.safetensors"
        done += math.prod(shape)
    for file in sorted(set(weight_map.values())):
        _write_shard(folder / file, {name: shape for name, shape in shapes.items() if weight_map[name] == file})
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(fields)))
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in random_pieces(name, math.prod(shape)):
                stream.write(piece.view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())  # only clean pages can be dropped from the page cache


class PeakMemory:
    """The peak of this process's resident set while the block runs, in MB above its start.

    Attributes:
        total: Everything resident, mapped pages of files included: what a container's limit may see.
        anonymous: Without the mapped pages, by sampling every 2 ms.
    """

    total = 0.0
    anonymous = 0.0

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        self._start = _memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.anonymous = max(self.anonymous, _memory()["RssAnon"] - self._start["RssAnon"])

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.total = _memory()["VmHWM"] - self._start["VmRSS"]


def _memory() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 / MB for name in ("VmRSS", "VmHWM", "RssAnon")}


def measure(loader: str, folder: Path, dtype: str, mesh: Mapping[str, int], quantization: str) -> dict[str, float]:
    """Loads `folder` once in this process: seconds, peak MB, and the MB of the result and of the largest tensor."""
    load = _with_torch if loader == "torch" else partial(_with_ours, loader == "load_lm")
    call = load(folder, dtype, mesh, quantization)
    with PeakMemory() as peak:
        start = time.perf_counter()
        size = call()
        seconds = time.perf_counter() - start
    shapes = tensor_shapes(json.loads((folder / "config.json").read_text()))
    largest = 2 * max(map(math.prod, shapes.values())) / MB
    return {
        "seconds": round(seconds, 3),
        "result_mb": round(size / MB, 1),
        "largest_tensor_mb": round(largest, 1),
        "peak_mb": round(peak.total, 1),
        "peak_anonymous_mb": round(peak.anonymous, 1),
    }


def _with_ours(whole: bool, folder: Path, dtype: str, mesh: Mapping[str, int], quantization: str) -> Callable[[], int]:
    import jax

    from spt_jax.models.loading import load_lm, load_tokenizer, open_lm
    from spt_jax.models.quantized import tree_bytes
    from spt_jax.models.weights import load_params
    from spt_jax.parallel.mesh import make_mesh
    from spt_jax.parallel.rules import parameter_sharding

    load_tokenizer(str(folder))  # imports what it needs
    places = make_mesh(1, mesh.get("fsdp", 1), mesh.get("tensor", 1))
    sharding_for = partial(parameter_sharding, places)

    def load() -> int:
        if whole:
            params = load_lm(str(folder), dtype=dtype, quantization=quantization, sharding_for=sharding_for).params
        else:
            opened = open_lm(str(folder), dtype=dtype, quantization=quantization)
            assert opened.checkpoint is not None
            params = load_params(opened.config, opened.checkpoint, opened.table, sharding_for=sharding_for)
        return tree_bytes(jax.block_until_ready(params))

    return load


def _with_torch(folder: Path, dtype: str, mesh: Mapping[str, int], quantization: str) -> Callable[[], int]:
    import torch
    from safetensors.torch import load_file

    def load() -> int:
        state = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            state |= {name: tensor.to(getattr(torch, dtype), copy=True) for name, tensor in tensors.items()}
        return sum(tensor.nbytes for tensor in state.values())

    return load


def run_apart(
    loader: str, folder: Path, *, dtype: str, mesh: Mapping[str, int], quantization: str = "none"
) -> dict[str, float]:
    """`measure` in a process of its own, with as many CPU devices as the mesh has places.

    Raises:
        RuntimeError: The process failed; with what it wrote.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={math.prod(mesh.values())}",
        "HF_HUB_OFFLINE": "1",
    }
    places = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    command = [sys.executable, __file__, f"--measure={loader}", f"--folder={folder}", f"--dtype={dtype}"]
    command += [f"--mesh={places}", f"--quantization={quantization}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def drop_page_cache(folder: Path) -> None:
    """Asks the kernel to forget the files of `folder`, so that the next read goes to the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(folder: Path, loaders: Sequence[str], options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every loader in turn, `options.rounds` times."""
    results: dict[str, list[dict[str, float]]] = {loader: [] for loader in loaders}
    for _ in range(options.rounds):
        for loader in loaders:
            if options.cold:
                drop_page_cache(folder)
            else:
                for file in folder.glob("*.safetensors"):
                    with file.open("rb") as stream:
                        while stream.read(_PIECE):
                            pass
            settings = {"dtype": options.dtype, "mesh": options.mesh, "quantization": options.quantization}
            results[loader].append(run_apart(loader, folder, **settings))
    return results


def table(results: Mapping[str, list[dict[str, float]]]) -> str:
    """Medians as text, a line a loader."""
    columns = ("seconds", "fastest", "slowest", "result MB", "peak MB", "anonymous")
    head = f"{'loader':<12} " + " ".join(f"{column:>10}" for column in columns)
    lines = [head, "-" * len(head)]
    for loader, rounds in results.items():
        seconds = [result["seconds"] for result in rounds]
        memory = (max(result[key] for result in rounds) for key in ("result_mb", "peak_mb", "peak_anonymous_mb"))
        result_mb, peak, anonymous = memory
        lines.append(
            f"{loader:<12} {np.median(seconds):>10.2f} {min(seconds):>10.2f} {max(seconds):>10.2f} "
            f"{result_mb:>10.0f} {peak:>10.0f} {anonymous:>10.0f}"
        )
    return "\n".join(lines)


def _mesh(text: str) -> dict[str, int]:
    mesh = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESHES or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not an axis with its devices, such as fsdp=8 or tensor=2")
        mesh[axis] = int(size)
    return mesh


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from arguments import positive

    parser = argparse.ArgumentParser(description="Times load_lm beside safetensors.torch, and measures host memory.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the random checkpoint in bfloat16")
    parser.add_argument("--shards", type=positive, default=4, help="files it is written in")
    parser.add_argument("--devices", type=positive, default=8, help="fake CPU devices, all along fsdp")
    parser.add_argument("--mesh", type=_mesh, help="other axes, such as fsdp=4,tensor=2; overrides --devices")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the result")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none", help="of ours alone")
    parser.add_argument("--rounds", type=positive, default=3, help="loads by each loader")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint; default: a temporary folder")
    parser.add_argument("--measure", choices=LOADERS, help="only load --folder once, in this process")
    options = parser.parse_args(arguments)
    options.mesh = options.mesh or {"fsdp": options.devices}
    if options.measure and options.folder is None:
        parser.error("--measure needs the --folder with the checkpoint")
    return options


def main(options: argparse.Namespace) -> None:
    """Writes the checkpoint, runs the loaders in turn, prints a table and one line of JSON."""
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.dtype, options.mesh, options.quantization)))
        return
    from machine import machine  # beside this program, whose functions are used elsewhere

    loaders = list(LOADERS)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed, so there is nothing to compare with: pip install torch", file=sys.stderr)
        loaders.remove("torch")
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="load-"))
    try:
        fields = llama_fields(options.gigabytes)
        write_checkpoint(folder, fields, options.shards)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        results = compare(folder, loaders, options)
    finally:
        shutil.rmtree(folder)
    settings = {name: getattr(options, name) for name in ("mesh", "dtype", "quantization", "rounds", "cold", "shards")}
    print(f"{size / MB:.0f} MB in {options.shards} files, {settings}")
    print(table(results))
    about = {"file_mb": round(size / MB, 1), **settings, **machine("safetensors", "torch")}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main(parse())
