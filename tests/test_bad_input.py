"""Bad input through the command line: exit code 2 and one clear line that names file, tensor and number."""

import json
import os
import re
import resource
import signal
import struct
import sys
import zlib

import pytest
import torch

from bytecap.errors import OutputError
from bytecap.format import container
from bytecap.system.atomic import write_atomically
from conftest import BUDGET


def rewrite(path, edit):
    """Apply `edit(header, payload)` to a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header, payload = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    header, payload = edit(header, payload) or (header, payload)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


class TestBadModels:
    def test_missing_path(self, refused, job, tmp_path):
        assert str(tmp_path / "none") in refused(*job(tmp_path / "none"))

    def test_a_hub_id_without_a_hub(self, refused, job, monkeypatch):
        import huggingface_hub

        def unreachable(*_args, **_options):
            raise ConnectionError

        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
        assert "nobody/nothing" in refused(*job("nobody/nothing"))

    def test_directory_without_config(self, refused, job, copied):
        (copied / "config.json").unlink()
        message = refused(*job(copied))
        assert "config.json" in message
        assert str(copied) in message

    def test_config_that_is_not_json(self, refused, job, copied):
        (copied / "config.json").write_text("{", "utf-8")
        assert "config.json is not valid JSON" in refused(*job(copied))

    @pytest.mark.parametrize("content", ["[]", "3", "null", '"x"'])
    def test_config_that_is_not_an_object(self, refused, job, copied, content):
        (copied / "config.json").write_text(content, "utf-8")
        assert "config.json" in refused(*job(copied))

    def test_config_of_an_unknown_kind_of_model(self, refused, job, copied, edited_config):
        edited_config(copied, model_type="no-such-kind", architectures=[])
        said = refused(*job(copied))
        assert f"{copied}/config.json: transformers" in said
        assert "does not know the model type 'no-such-kind'; update transformers" in said

    def test_config_without_a_kind_of_model(self, refused, job, copied, edited_config):
        edited_config(copied, model_type=None)
        assert f"{copied}/config.json has no model_type: name one" in refused(*job(copied))

    @pytest.mark.parametrize(
        ("kind", "what"),
        [
            ("modernbert", "is an encoder"),
            ("smolvlm", "is a multimodal model"),
            ("vit", "is a model of images"),
            ("clap", "names no causal language model"),
        ],
    )
    def test_config_of_a_kind_without_causal_language_model(self, refused, job, copied, edited_config, kind, what):
        edited_config(copied, model_type=kind, architectures=[])
        said = refused(*job(copied))
        assert f"{copied}/config.json: model_type {kind!r} {what}, AutoModelForCausalLM has no class" in said
        assert "fit it as a module with a loss of your own" in said

    def test_directory_without_weights(self, refused, job, copied):
        (copied / "model.safetensors").unlink()
        assert "safetensors" in refused(*job(copied))

    def test_truncated_safetensors_name_the_tensor(self, refused, job, copied):
        path, last = copied / "model.safetensors", []

        def edit(header, _payload):
            header.pop("__metadata__", None)
            last.append(max(header, key=lambda n: header[n]["data_offsets"]))

        rewrite(path, edit)
        path.write_bytes(path.read_bytes()[:-20])
        message = refused(*job(copied))
        assert str(path) in message
        assert f"tensor {last[0]} needs bytes" in message

    @pytest.mark.parametrize("keep", [0, 5, 8, 40])
    def test_safetensors_cut_in_the_header(self, refused, job, copied, keep):
        path = copied / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert str(path) in refused(*job(copied))

    def test_corrupt_safetensors_header(self, refused, job, copied):
        path = copied / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[20:30] = b"\xff" * 10
        path.write_bytes(raw)
        assert str(path) in refused(*job(copied))

    def test_offsets_that_do_not_fit_the_shape_name_the_tensor(self, refused, job, copied):
        def edit(header, _payload):
            header["model.norm.weight"]["shape"] = [31]

        rewrite(copied / "model.safetensors", edit)
        assert "model.norm.weight" in refused(*job(copied))

    def test_a_missing_tensor_is_named(self, refused, job, copied):
        def edit(header, payload):
            start, stop = header.pop("model.norm.weight")["data_offsets"]
            del payload[start:stop]
            for entry in (v for k, v in header.items() if k != "__metadata__"):
                entry["data_offsets"] = [x - (stop - start) * (x >= stop) for x in entry["data_offsets"]]

        rewrite(copied / "model.safetensors", edit)
        assert "model.norm.weight" in refused(*job(copied))

    def test_a_tensor_of_another_shape_is_named(self, refused, job, copied, edited_config):
        edited_config(copied, intermediate_size=48)
        assert "mlp" in refused(*job(copied))

    @pytest.mark.parametrize(("value", "bits", "said"), [("nan", 0x7FC0, "nan"), ("inf", 0xFF80, "-inf")])
    def test_weights_that_are_not_finite_name_tensor_and_index(self, refused, job, copied, value, bits, said):
        del value

        def edit(header, payload):
            entry = header["model.layers.1.mlp.up_proj.weight"]
            assert (entry["dtype"], entry["shape"]) == ("BF16", [64, 32])
            struct.pack_into("<H", payload, entry["data_offsets"][0] + 2 * (5 * 32 + 7), bits)

        rewrite(copied / "model.safetensors", edit)
        message = refused(*job(copied))
        assert "tensor model.layers.1.mlp.up_proj.weight" in message
        assert "[5, 7]" in message
        assert said in message

    def test_pickles_are_refused_with_advice(self, refused, job, copied):
        (copied / "model.safetensors").unlink()
        torch.save({}, copied / "pytorch_model.bin")
        for model in (copied, copied / "pytorch_model.bin"):
            message = refused(*job(model))
            assert "pytorch_model.bin" in message
            assert "pickle" in message
            assert "safetensors" in message

    def test_tokenizer_missing(self, refused, job, copied):
        (copied / "tokenizer.json").unlink()
        assert "tokenizer.json" in refused(*job(copied))

    def test_tokenizer_broken(self, refused, job, copied):
        (copied / "tokenizer.json").write_text('{"model": 3}', "utf-8")
        assert "tokenizer.json" in refused(*job(copied))

    def test_tokenizer_of_another_model(self, refused, job, model_directory, tmp_path):
        import shutil

        directory = shutil.copytree(model_directory("rotary", vocab_size=200), tmp_path / "small")
        message = refused(*job(directory))
        assert "200" in message
        assert "token" in message

    def test_a_missing_shard_is_named(self, refused, job, copied):
        (copied / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001.safetensors", "b": "model.safetensors"}}), "utf-8"
        )
        assert "model-00001.safetensors" in refused(*job(copied))


class TestBadTexts:
    @pytest.mark.parametrize("which", ["calib", "evaluation"])
    def test_missing(self, refused, job, tmp_path, which):
        assert "none.txt" in refused(*job(**{which: tmp_path / "none.txt"}))

    @pytest.mark.parametrize("which", ["calib", "evaluation"])
    @pytest.mark.parametrize("content", [b"", b" \n\f\f "])
    def test_empty(self, refused, job, tmp_path, which, content):
        path = tmp_path / "empty.txt"
        path.write_bytes(content)
        assert f"{path} is empty" in refused(*job(**{which: path}))

    @pytest.mark.parametrize("which", ["calib", "evaluation"])
    def test_not_utf8_names_the_byte(self, refused, job, tmp_path, which):
        path = tmp_path / "latin.txt"
        path.write_bytes(b"plain words, then " + "é".encode("latin-1") + b" and more")
        message = refused(*job(**{which: path}))
        assert str(path) in message
        assert "UTF-8" in message
        assert "18" in message

    @pytest.mark.slow
    @pytest.mark.parametrize("content", ["a", "just a few words"])
    def test_too_short(self, refused, job, tmp_path, content):
        path = tmp_path / "short.txt"
        path.write_text(content, "utf-8")
        assert "short" in refused(*job(calib=path))

    def test_calibration_that_is_the_evaluation(self, refused, job, texts):
        message = refused(*job(calib=texts["val"], evaluation=texts["val"]), "--eval-tokens", "1000000")
        assert "too short" in message
        assert re.search(r"\d+ windows", message)

    def test_a_directory_is_no_text(self, refused, job, tmp_path):
        assert str(tmp_path) in refused(*job(calib=tmp_path))


class TestBadBudgets:
    @pytest.mark.parametrize("budget", ["0", "0MB", "three", "3 megs", "-5", "-3MB", "", "nan", "1e6", "3XB"])
    def test_not_a_size(self, refused, model_directory, texts, tmp_path, budget):
        message = refused(
            "fit", model_directory("rotary"), f"--budget={budget}", "-o", tmp_path / "out.bcap", "--calib",
            texts["calib"], "--eval", texts["val"],
        )  # fmt: skip
        assert "budget" in message or "size" in message
        assert list(tmp_path.iterdir()) == []

    def test_below_the_floor(self, refused, job, tmp_path):
        message = refused(*job(budget="500"))
        assert "500" in message
        assert re.search(r"floor of [\d,]+", message)
        assert "model.embed_tokens.weight" in message
        assert not (tmp_path / "out.bcap").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["bytecap", "golf", "uniform"])
    def test_above_the_floor_but_out_of_reach(self, run, job, tmp_path, method):
        """Between the floor and what a method needs there is either a file under the cap or a one-line refusal."""
        code, out, err = run(*job(budget="1500"), "--method", method, "--json")
        if code:
            assert (code, out) == (2, "")
            assert err.count("\n") == 1
            assert "1500" in err or "1,500" in err
            assert list(tmp_path.iterdir()) == []
        else:
            assert (tmp_path / "out.bcap").stat().st_size <= 1500

    def test_no_budget_at_all(self, refused, model_directory, tmp_path):
        assert "--budget" in refused("fit", model_directory("rotary"), "-o", tmp_path / "out.bcap")


class TestBadArguments:
    def test_method(self, refused, job):
        assert "'unifrom', did you mean uniform?" in refused(*job(), "--method", "unifrom")

    def test_device(self, refused, job):
        assert "'gpu'" in refused(*job(), "--device", "gpu")

    @pytest.mark.slow
    def test_dtype(self, refused, fitted, tmp_path):
        assert "'int3'" in refused("unpack", fitted("rotary")[1], "-o", tmp_path / "out", "--dtype", "int3")

    def test_no_output(self, refused, model_directory):
        assert "-o" in refused("fit", model_directory("rotary"), "--budget", BUDGET)

    @pytest.mark.parametrize("command", [["fit"], ["check"], ["nonsense"], ["fit", "demo", "--budget", "3MB", "--x"]])
    def test_usage(self, refused, command):
        refused(*command)

    @pytest.mark.parametrize("option", ["--tokens", "--eval-tokens"])
    @pytest.mark.parametrize("value", ["0", "-5"])
    def test_counts_that_make_no_sense(self, refused, job, option, value):
        assert option in refused(*job(), option, value)

    @pytest.mark.parametrize("option", ["--tokens", "--window"])
    def test_eval_counts_that_make_no_sense(self, refused, fitted, texts, option):
        refused("eval", fitted("rotary")[1], "--text", texts["val"], option, "0")


class TestBadOutputs:
    def test_directory_missing(self, refused, job, tmp_path):
        assert str(tmp_path / "none") in refused(*job(output=tmp_path / "none" / "out.bcap"))

    def test_a_directory(self, refused, job, tmp_path):
        assert "is a directory" in refused(*job(output=tmp_path))

    def test_a_pipe_is_not_replaced(self, refused, job, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        assert "not a file" in refused(*job(output=tmp_path / "pipe"))
        with pytest.raises(OutputError, match="not a file"):
            write_atomically(b"x", tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo()

    @pytest.mark.parametrize(
        "command", [("curves", "demo", "--budget", "600kB"), ("compare", "demo"), ("thesis", "demo")]
    )
    def test_a_page_is_refused_before_the_work(self, refused, tmp_path, command):
        page = tmp_path / "none" / "page.html"
        assert str(page.parent) in refused(*command, "-o", tmp_path / "out", "--report", page)
        assert not (tmp_path / "out").exists()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_directory_not_writable(self, refused, job, tmp_path):
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        assert "not writable" in refused(*job(output=closed / "out.bcap"))

    def test_denied_by_the_system(self, refused, job, tmp_path, monkeypatch):
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and real(path, mode))
        assert str(tmp_path / "out.bcap") in refused(*job())

    @pytest.mark.parametrize("before", [None, b"the old file"])
    def test_disk_full_leaves_nothing_behind_and_the_old_file_intact(self, refused, job, tmp_path, monkeypatch, before):
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep the first bytes of it, for everyone
        output = tmp_path / "out.bcap"
        if before is not None:
            output.write_bytes(before)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            message = refused(*job())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert str(output) in message
        assert [p.name for p in tmp_path.iterdir()] == (["out.bcap"] if before else [])
        assert before is None or output.read_bytes() == before

    def test_unpacking_onto_a_file(self, refused, fitted, tmp_path):
        (tmp_path / "out").write_bytes(b"")
        assert str(tmp_path / "out") in refused("unpack", fitted("rotary")[1], "-o", tmp_path / "out")


class TestBadArtifacts:
    COMMANDS = ("check", "ledger", "eval", "unpack", "generate")

    @pytest.fixture(params=COMMANDS)
    def reads(self, request, refused, texts, tmp_path):
        """Function: the refusal of a command that reads an artifact."""
        more = {
            "eval": ("--text", texts["val"]), "unpack": ("-o", tmp_path / "unpacked"), "generate": ("--prompt", "x"),
        }  # fmt: skip

        def call(content):
            path = tmp_path / "bad.bcap"
            path.write_bytes(content)
            message = refused(request.param, path, *more.get(request.param, ()))
            assert str(path) in message
            assert not (tmp_path / "unpacked").exists()
            return message

        return call

    def test_truncated(self, reads, fitted):
        data = fitted("rotary")[0].data
        for size in (9, 31, 200, len(data) - 1):
            message = reads(data[:size])
            assert "truncated" in message or "damaged" in message

    def test_bit_flipped(self, reads, fitted):
        data = fitted("rotary")[0].data
        for at in (9, 14, 21, 30, 60, len(data) // 2, len(data) - 1):
            bad = bytearray(data)
            bad[at] ^= 4
            message = reads(bytes(bad))
            assert "damaged" in message or "checksum" in message or "version" in message

    def test_newer_version(self, reads, fitted):
        data = bytearray(fitted("rotary")[0].data)
        data[8] = container.VERSION[0] + 1
        (length,) = struct.unpack_from("<I", data, 12)
        size = container.HEADER_SIZE
        struct.pack_into("<I", data, size - 4, zlib.crc32(data[: size - 4] + data[size : size + length]))
        message = reads(bytes(data))
        assert f"version {container.VERSION[0] + 1}" in message

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", b"\x89BCA"])
    def test_not_an_artifact(self, reads, content):
        assert "not a bytecap artifact" in reads(content)

    @pytest.mark.parametrize("command", ["check", "ledger"])
    def test_missing(self, refused, tmp_path, command):
        assert str(tmp_path / "none.bcap") in refused(command, tmp_path / "none.bcap")

    def test_a_directory(self, refused, tmp_path):
        assert str(tmp_path) in refused("check", tmp_path)

    @pytest.mark.slow
    def test_an_artifact_without_tokenizer_or_config(self, run, refused, job, texts, tmp_path):
        code, _, _ = run(*job(), "--no-tokenizer", "--no-config", "--json")
        assert code == 0
        assert run("check", tmp_path / "out.bcap")[0] == 0
        assert "config.json" in refused("eval", tmp_path / "out.bcap", "--text", texts["val"])
        assert "config.json" in refused("generate", tmp_path / "out.bcap", "--prompt", "x")
