"""MLX and compressed-tensors: bytes against decoders written here, exact sizes; their own programs are nightly."""

from __future__ import annotations

import json
from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytecap
from bytecap.errors import CheckpointError, OutputError, UsageError
from bytecap.format.ledger import total
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.quantized_copy import load_values
from bytecap.pipeline.fit_directory import write_directory
from bytecap.runtimes.blocks.encode import encode, prepare
from bytecap.runtimes.blocks.stream import pack_words, unpack_words
from bytecap.runtimes.directory import FAMILIES, family
from bytecap.runtimes.directory.contents import compact, contents_of, ledger, ledger_of, read_units, shared_inputs
from bytecap.runtimes.directory.tensors import read
from bytecap.system.directories import replacing_directory
from conftest import SMALL

MLX, CT = family("mlx"), family("compressed-tensors")
BUDGETS = {"mlx": 26_000, "compressed-tensors": 45_000}
EXTREMES = [("mlx", "w4g32"), ("mlx", "w8g64"), *(("compressed-tensors", s) for s in ("w4g32a", "w4c", "w8ca"))]
WORDS = [(n, s) for n in FAMILIES for s in family(n).schemes() if not family(n).scheme(s).floating]


@pytest.fixture(scope="module")
def made(model_directory, texts, tmp_path_factory):
    """Function: fitted directory of a family for a tiny model, and its path."""
    known = {}

    def get(name):
        if name not in known:
            path = tmp_path_factory.mktemp(name) / "model"
            known[name] = path, bytecap.fit(
                model_directory("rotary"), BUDGETS[name], format=name, calibration=texts["calib"],
                evaluation=texts["val"], output=path, **SMALL,
            )  # fmt: skip
        return known[name]

    return get


@pytest.fixture(scope="module")
def written(model_directory, tmp_path_factory):
    """Function: (model, contents, schemes, path) of a tiny model in which every scheme that fits is used."""

    def get(name, kind="rotary", names=None, **changes):
        model, fam = load_checkpoint(model_directory(kind, **changes)), family(name)
        contents, _ = contents_of(model, fam, names, pure=False)
        turn = cycle(names or fam.schemes())
        by_group: dict[str, str] = {}
        for p in contents.places:
            group = contents.groups.get(p.name, p.name)
            while group not in by_group:
                scheme = next(turn)
                if contents.layout(scheme, p.cols) is not None:
                    by_group[group] = scheme
        schemes = {p.name: by_group[contents.groups.get(p.name, p.name)] for p in contents.places}
        codes = {}
        for p in contents.places:
            weight = model.module.get_parameter(p.name).numpy()
            codes[p.name] = encode(weight, prepare(torch.eye(p.cols)), contents.layout(schemes[p.name], p.cols))
        path = tmp_path_factory.mktemp("written") / "model"
        write_directory(contents, schemes, codes, path)
        return model, contents, schemes, codes, path

    return get


def numbers(words, bits: int, count: int) -> np.ndarray:
    """Integers of rows of 32-bit words, bit by bit: an own decoder, slow and plain."""
    found = np.zeros((len(words), count), np.int64)
    for r, row in enumerate(words):
        whole = sum(int(w) % 2**32 << 32 * i for i, w in enumerate(row))
        for k in range(count):
            found[r, k] = whole >> bits * k & (1 << bits) - 1
    return found


def decoded(name: str, scheme: str, arrays, cols: int) -> np.ndarray:
    """Values by the formats' own definitions, in float32."""
    bits = int(scheme[1])
    if name == "mlx":
        words, scales, biases = arrays
        group = cols // scales.shape[1]
        return np.repeat(scales, group, 1) * numbers(words, bits, cols).astype(np.float32) + np.repeat(biases, group, 1)
    words, scales, shape, *zeros = arrays
    group = cols // scales.shape[1]
    code = numbers(words, bits, int(shape[1])) - 2 ** (bits - 1)
    if zeros:
        code -= np.repeat(numbers(zeros[0].T, bits, int(shape[0])).T - 2 ** (bits - 1), group, 1)
    return np.repeat(scales, group, 1) * code.astype(np.float32)


def hessian(cols: int) -> torch.Tensor:
    x = torch.randn(4 * cols, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x += x.roll(1, 1) * 0.7
    return x.T @ x / len(x)


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), count=st.integers(1, 130), seed=st.integers(0, 99))
def test_streams_of_words(bits, count, seed) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (3, count), dtype=np.uint8)
    words = pack_words(values, bits)
    assert np.array_equal(numbers(words, bits, count), values)
    assert np.array_equal(unpack_words(words, bits, count), values)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
@pytest.mark.parametrize(("name", "scheme"), WORDS)
def test_what_is_stored_decodes_bit_for_bit(name, scheme, kind) -> None:
    fam, rows, cols = family(name), 37, 256
    weight = np.random.default_rng(1).standard_normal((rows, cols)).astype(np.float32)
    form = fam.layout(scheme, cols, kind)
    codes = encode(weight, prepare(hessian(cols)), form)
    arrays, specs = fam.arrays(codes), fam.specs(form, rows, cols)
    assert [a.shape for a in arrays] == [s.shape for s in specs]
    assert np.array_equal(decoded(name, scheme, arrays, cols), codes.values())
    assert np.array_equal(fam.codes(form, arrays).values(), codes.values())
    if kind == "BF16":
        assert not (codes.scale.astype(np.float32).view(np.uint32) & 0xFFFF).any()
    error = np.abs(codes.values() - weight).mean()
    assert error < 2.0 ** (2.5 - int(scheme[1])), error


@pytest.mark.parametrize(("name", "scheme"), [("mlx", "w3g64"), ("compressed-tensors", "w4g128a")])
def test_feedback_and_descent_pay(name, scheme) -> None:
    h, weight = hessian(256), np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    form = family(name).layout(scheme, 256, "BF16")

    def loss(metric, sweeps):
        error = torch.from_numpy(encode(weight, prepare(metric), form, sweeps=sweeps).values() - weight).double()
        return float(((error @ h) * error).sum())

    plain, fed, swept = loss(torch.diag(h.diagonal()), 0), loss(h, 0), loss(h, 2)
    assert fed < 0.9 * plain
    assert swept < 0.99 * fed


@pytest.mark.parametrize(("name", "scheme"), EXTREMES)
@pytest.mark.parametrize("kind", ["BF16", "F16"])
@given(
    shape=st.sampled_from(["zero", "equal", "outlier", "positive", "negative", "mixed"]),
    scale=st.sampled_from([1.0, -1.0, 1e-3, 1e-30, 1e-42, 6e4]), seed=st.integers(0, 999),
)  # fmt: skip
def test_extreme_blocks(name, scheme, kind, shape, scale, seed) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 128))
    if shape in {"zero", "equal"}:
        x[:] = shape == "equal"
    elif shape == "outlier":
        x *= 1e-6
        x[:, seed % 128] = 1
    elif shape == "mixed":
        x[:, :64] *= 1e-12
    else:
        x = (np.abs(x) + 5) * (1 if shape == "positive" else -1)
    weight = (x * scale).astype(np.float32)
    fam = family(name)
    codes = encode(weight, prepare(torch.eye(128)), fam.layout(scheme, 128, kind))
    values = codes.values()
    assert np.isfinite(values).all()
    assert np.array_equal(decoded(name, scheme, fam.arrays(codes), 128), values)
    peak = float(np.abs(weight).max())
    if peak >= 1e-3 and (
        peak < 6e4 or kind == "BF16"
    ):  # zero points put zero into the range, which costs one-sided blocks a bit
        assert np.abs(values - weight).max() <= 0.2 * peak


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_comes_back_from_its_files(written, name) -> None:
    model, contents, schemes, codes, path = written(name, num_hidden_layers=6, hidden_size=64)
    assert len(set(schemes.values())) >= 8
    found = read_units(contents.family, path, model.units)
    for unit in model.units:
        wanted = codes[unit.name].values() if unit.name in codes else model.tensor(unit).numpy()
        assert np.array_equal(found[unit.name], wanted), unit.name
    assert contents.size(schemes) == sum(f.stat().st_size for f in path.iterdir()) == total(ledger_of(path))
    config = json.loads((path / "config.json").read_text())
    assert contents.family.read(config) == {n.removesuffix(".weight"): s for n, s in schemes.items()}
    assert config["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fit_keeps_its_cap_and_says_what_it_did(made, name) -> None:
    path, found = made(name)
    report = found.report
    size = sum(f.stat().st_size for f in path.iterdir())
    assert size == report["file_bytes"] == total(found.ledger()) == total(ledger(family(name), path))
    assert 0 <= report["slack_bytes"] == BUDGETS[name] - size
    assert report["slack_bytes"] <= max(report["allowed_slack_bytes"], 64)
    assert 0 < report["kl_nats"] < 0.5
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in path.iterdir()}
    assert report["checked"]
    tensors = read(path / "model.safetensors")
    assert all(t.dtype in {"BF16", "U32", "I32", "I64"} for t in tensors.values())


@pytest.mark.parametrize(
    ("data", "short"),
    [
        (b'{\n  "a": {"b": 1.0, "c": [true, null]}\n}', b'{"a":{"b":1.0,"c":[true,null]}}'),
        (b'{"a": 1, "a": 2}', None),  # readers differ on which of them counts
        (b'{"a": "\\ud800"}', None),  # half of a character, which only an escape can say
        (b"\xff {", None),
        (b"[" * 100_000, None),
    ],
)
def test_json_beside_the_weights_is_compact_and_the_same(data, short) -> None:
    assert compact("tokenizer.json", data) == (data if short is None else short)
    assert compact("merges.txt", data) == data


def test_projections_that_vllm_joins_share_a_scheme(made, model_directory) -> None:
    groups = shared_inputs(load_checkpoint(model_directory("rotary")))
    one = {groups[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"}
    two = {groups[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")}
    assert len(one) == len(two) == 1
    assert len({*one, *two, groups["model.layers.1.self_attn.q_proj.weight"]}) == 3
    assert groups["model.layers.0.mlp.down_proj.weight"] == "model.layers.0.mlp.down_proj.weight"
    _, found = made("compressed-tensors")
    for name, group in groups.items():
        if name in found.types:
            assert found.types[name] == found.types[group]
    assert not any("embed" in n or "lm_head" in n for n in found.types)


def test_rows_that_do_not_fit_are_named(model_directory) -> None:
    model = load_checkpoint(model_directory("rotary"))
    narrow = next(p.cols for p in contents_of(model, MLX, None, pure=False)[0].places if p.cols % 128)
    _, notes = contents_of(model, MLX, ["w4g128"], pure=False)
    assert any(f"rows of {narrow} columns" in n and "w4g32" in n and "kept in bf16" in n for n in notes)
    with pytest.raises(UsageError, match="cannot be quantized"):
        contents_of(model, MLX, ["w4g128"], pure=True)
    contents_of(model, CT, ["w4c"], pure=True)  # tables are no matter of shapes
    with pytest.raises(UsageError, match="unknown mlx scheme w7g64"):
        contents_of(model, MLX, ["w7g64"], pure=False)


def test_transposed_matrices_stay_and_are_named(model_directory) -> None:
    model = load_checkpoint(model_directory("transposed"))
    contents, notes = contents_of(model, MLX, None, pure=False)
    assert not any("c_attn" in p.name for p in contents.places)
    assert any("c_attn" in n for n in notes)
    with pytest.raises(UsageError, match="linear maps"):
        contents_of(model, MLX, None, pure=True)


def test_directories_appear_whole(tmp_path) -> None:
    def fill(text, fail=False):
        with replacing_directory(tmp_path / "out") as made:
            (made / "config.json").write_text(text)
            if fail:
                raise CheckpointError("no")

    fill("one")
    with pytest.raises(CheckpointError):
        fill("two", fail=True)
    assert (tmp_path / "out" / "config.json").read_text() == "one"
    fill("three")
    assert (tmp_path / "out" / "config.json").read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("other", "holds other files"), ("file", "there is a file"), ("a/b", "does not exist")):
        with pytest.raises(OutputError, match=message), replacing_directory(tmp_path / name):
            pass


@pytest.mark.slow
def test_the_command_line(run, model_directory, texts, tmp_path) -> None:
    common = ("fit", model_directory("rotary"), "--calib", texts["calib"], "--eval", texts["val"], "--tokens", "2000")
    code, out, err = run(
        *common, "--budget", "9bpp", "--format", "mlx", "--types", "w4g32,w8g32", "--dry-run", "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    assert said["format"] == "mlx"
    assert set(said["types"].values()) <= {"w4g32", "w8g32"}
    code, _, err = run(*common, "--budget", "9bpp", "--format", "mlx", "--emit", tmp_path / "x", "-o", tmp_path / "m")
    assert code == 2
    assert "the option emit is not for the format mlx" in err


def logits_of_ours(model, fam, path, ids):
    load_values(model.module, read_units(fam, path, model.units))
    with torch.no_grad():
        return model.module(ids).logits[0].float().numpy()


def test_rotary_parameters_in_both_wordings() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    found = MLX.config({"rope_parameters": rope}, {}, [])
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert "rope_scaling" not in MLX.config({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, {}, [])


@pytest.mark.nightly
def test_models_that_mlx_lm_does_not_know_are_refused(written) -> None:
    pytest.importorskip("mlx_lm.utils")
    with pytest.raises(CheckpointError, match="mlx-lm cannot load this model: Model type opt not supported"):
        written("mlx", "offset")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["rotary", "biased"])
def test_mlx_lm_computes_our_logits(written, kind) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _, _, _, path = written("mlx", kind, num_hidden_layers=6)
    assert MLX.check(path) == "mlx-lm loads it"
    ids = torch.arange(3, 60)[None]
    ours = logits_of_ours(model, MLX, path, ids)
    theirs, _ = utils.load_model(path)
    theirs.set_dtype(mx.float32)
    assert np.abs(np.array(theirs(mx.array(ids.numpy())))[0] - ours).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["rotary", "biased", "offset"])
def test_transformers_computes_our_logits(written, kind) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    names = [s for s in CT.schemes() if not s.endswith("a") and s != "nvfp4"]
    model, _, _, _, path = written("compressed-tensors", kind, names, num_hidden_layers=6)
    assert CT.check(path) == "transformers loads it"
    ids = torch.arange(3, 60)[None]
    ours = logits_of_ours(model, CT, path, ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        assert np.abs(theirs(ids).logits[0].numpy() - ours).max() < 1e-5 * np.abs(ours).max()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_transformers_holds_our_weights_of_nvfp4(written) -> None:
    """Decompressed they are bfloat16 whatever type is asked for, which holds them without rounding."""
    pytest.importorskip("compressed_tensors")
    import transformers

    assert CT.check(written("compressed-tensors", names=["nvfp4", "w4g32"])[-1]) == "transformers loads it"
    model, _, _, _, path = written("compressed-tensors", names=["nvfp4"])
    assert CT.check(path) == "transformers loads it"
    ours = logits_of_ours(model, CT, path, torch.arange(3, 60)[None])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs(torch.arange(3, 60)[None])  # decompresses
        torch.nn.Module.float(theirs)
        logits = theirs(torch.arange(3, 60)[None]).logits[0].numpy()
    assert np.abs(logits - ours).max() < 1e-5 * np.abs(ours).max()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_unpacks_zero_points_as_we_do() -> None:
    base = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight = np.random.default_rng(0).standard_normal((37, 256)).astype(np.float32)
    for name in CT.schemes():
        form = CT.layout(name, 256, "BF16")
        codes = encode(weight, prepare(torch.eye(256)), form)
        args = CT.config({}, {"x": name}, [])["quantization_config"]["config_groups"]["group_0"]["weights"]
        scheme = quantization.QuantizationScheme(targets=["x"], weights=quantization.QuantizationArgs(**args))
        state = {s.suffix: torch.from_numpy(np.ascontiguousarray(a)) for s, a in
                 zip(CT.specs(form, 37, 256), CT.arrays(codes), strict=True)}  # fmt: skip
        tool = base.BaseCompressor.get_value_from_registry(
            "nvfp4-pack-quantized" if name == "nvfp4" else "pack-quantized"
        )
        if name == "nvfp4":
            state["weight_scale"] = state["weight_scale"].view(torch.float8_e4m3fn)
        assert np.array_equal(tool.decompress(state, scheme)["weight"].float().numpy(), codes.values()), name


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_mlx_unpacks_as_we_do() -> None:
    mx = pytest.importorskip("mlx.core")
    weight = np.random.default_rng(0).standard_normal((37, 256)).astype(np.float32)
    for name in MLX.schemes():
        codes = encode(weight, prepare(torch.eye(256)), MLX.layout(name, 256, "F16"))
        words, scales, biases = (mx.array(a) for a in MLX.arrays(codes))
        s = MLX.scheme(name)
        assert np.array_equal(np.array(mx.dequantize(words, scales, biases, s.group, s.bits)), codes.values()), name
