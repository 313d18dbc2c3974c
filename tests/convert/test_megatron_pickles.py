"""Megatron-LM files that are hostile or damaged: nothing that a file says is run, and what is wrong is one line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.convert.megatron_files import (
    HIDDEN,
    VOCAB,
    arguments,
    assert_equal,
    replace_entry,
    state_dict,
    write,
)
from uniql_jax.convert.megatron import MegatronReader
from uniql_jax.errors import UserError

torch = pytest.importorskip("torch")


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def touch(marker) -> str:
    return f"touch '{marker}'"


def calls(marker) -> dict[str, object]:
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    return {
        "os.system": Call(os.system, touch(marker)),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "Popen": Call(subprocess.check_call, ["touch", str(marker)]),
        "loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch(marker)))),
        "nested": [{"deep": (Call(eval, code), {1: [Call(os.system, touch(marker))]})}],
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
    }


@pytest.mark.parametrize("name", sorted(calls("")))
def test_calls_in_a_file_do_not_run(tmp_path, rng, name):
    marker = tmp_path / "ran"
    payload = calls(marker)[name]
    if name != "getattr":
        pickle.loads(pickle.dumps(payload))  # it is a true danger: pickle itself runs it
        assert marker.exists()
        marker.unlink()
    state = state_dict(rng)
    # where nobody looks, in the arguments, in an entry that is dropped: the model is read all the same
    hidden = state | {"decoder.layers.0.mixer.in_proj._extra_state": payload}
    path = write(tmp_path / "a.pt", hidden, arguments(payload=payload, num_layers=payload), rng_state=payload)
    assert_equal(MegatronReader(path), state)
    # in the place of a tensor, of the model and of everything
    with pytest.raises(UserError, match=r"decoder\.final_norm\.weight"):
        MegatronReader(write(tmp_path / "b.pt", state | {"decoder.final_norm.weight": payload}, arguments()))
    with pytest.raises(UserError, match="no Megatron-LM model"):
        MegatronReader(write(tmp_path / "c.pt", payload, arguments()))
    torch.save(payload, tmp_path / "d.pt")
    with pytest.raises(UserError, match="no Megatron-LM model"):
        MegatronReader(tmp_path / "d.pt")
    assert not marker.exists()


def programs(command: bytes) -> dict[str, bytes]:
    """Pickles that call os.system(command) by each instruction that can, and some that should only confuse."""
    text, system = b"X" + len(command).to_bytes(4, "little") + command, b"cos\nsystem\n"

    def stack_global(module: bytes, name: bytes) -> bytes:
        return b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"

    return {
        "global": system + b"(S'" + command.replace(b"'", b'"') + b"'\ntR.",
        "stack_global": stack_global(b"os", b"system") + text + b"\x85R.",
        "dotted": stack_global(b"os", b"path.os.system") + text + b"\x85R.",
        "inst": b"(S'" + command.replace(b"'", b'"') + b"'\nios\nsystem\n.",
        "obj": b"(" + system + text + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n" + text + b"\x85\x81.",
        "newobj_ex": stack_global(b"subprocess", b"Popen") + text + b"\x85}\x92.",
        "build_on_class": b"\x80\x02" + system + text + b"b.",
        "build_on_storage": b"\x80\x02(X\x07\0\0\0storage" + system + b"X\x01\0\0\x000tQ}(X\x03\0\0\0key]ub.",
        "call_of_result": b"\x80\x02" + system + b")R" + text + b"\x85R.",
        "call_of_dict": b"\x80\x02ccollections\nOrderedDict\n" + system + b"\x85R.",
        "setitem_on_class": b"\x80\x02" + system + b"K\x01K\x02s.",
        "storage_of_a_call": b"\x80\x02(X\x07\0\0\0storage" + system + text + b"\x85RX\x01\0\0\x000tQ.",
        "persistent_text": b"Pos.system\n.",
        "huge_memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "extension": b"\x80\x02\x82\x01.",
        "out_of_band": b"\x80\x05\x97.",
        "short_number": b"\x80\x02J\x01",
        "empty": b"",
        "stop": b".",
    }


@pytest.mark.parametrize("name", sorted(programs(b"")))
def test_handwritten_pickles_do_not_run(tmp_path, rng, name):
    marker = tmp_path / "ran"
    program = programs(touch(marker).encode())[name]
    if name in ("global", "stack_global", "dotted", "inst", "obj"):
        pickle.loads(program)
        assert marker.exists()
        marker.unlink()
    path = replace_entry(write(tmp_path / "m.pt", state_dict(rng), arguments()), "data.pkl", program)
    with pytest.raises(UserError) as error:
        MegatronReader(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_no_module_is_imported_for_a_file(tmp_path, rng, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Thing:\n    pass\n")
    module = types.ModuleType("evil_module")
    thing = type("Thing", (), {"__module__": "evil_module", "__setstate__": lambda self, state: None})
    vars(module)["Thing"] = thing
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "evil_module", module)
        value = thing()
        vars(value)["attribute"] = 1
        path = write(tmp_path / "m.pt", state_dict(rng), arguments(thing=value, kind=thing))
    monkeypatch.syspath_prepend(tmp_path)
    MegatronReader(path)
    assert not (tmp_path / "ran").exists()
    assert "evil_module" not in sys.modules
    import evil_module  # noqa: F401  # pyright: ignore  (it would have been found)

    assert (tmp_path / "ran").exists()
    monkeypatch.delitem(sys.modules, "evil_module")


def test_random_damage_is_said_in_one_line(tmp_path, rng):
    """Whatever the pickle says, the reader refuses it with one line or reads tensors of the sizes it names."""
    good = write(tmp_path / "m.pt", state_dict(rng), arguments())
    with zipfile.ZipFile(good) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        program = archive.read(info)
    content = good.read_bytes()
    start = content.index(program)
    path = tmp_path / "damaged.pt"
    lines = []
    for _ in range(200):
        damaged = bytearray(content)
        for place in rng.integers(0, len(program), rng.integers(1, 4)):
            damaged[start + place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            reader = MegatronReader(path)
            reader.hf_config()
            for name, (dtype, shape) in reader.names().items():
                value = reader.read(name)
                assert (value.dtype, value.shape) == (dtype, shape)
        except UserError as error:
            lines.append(str(error))
    assert lines
    assert not any("\n" in line for line in lines)


# Damage


def test_bad_files_are_one_line(tmp_path, rng):
    path = write(tmp_path / "good.pt", state_dict(rng), arguments())
    good = path.read_bytes()
    torch.save({"model": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello", "world")
    cases = {f"cut{count}.pt": good[:count] for count in (1, 30, len(good) // 2, len(good) - 1)}
    cases |= {"empty.pt": b"", "text.pt": b"hello world, no model"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "other.pt"):
        with pytest.raises(UserError, match=f"{name} is truncated or no torch checkpoint") as error:
            MegatronReader(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"format before 1\.6"):
        MegatronReader(tmp_path / "old.pt")
    with pytest.raises(UserError, match="cannot read"):
        MegatronReader(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="cannot read"):
        MegatronReader(tmp_path)


def test_damaged_entries(tmp_path, rng):
    path = tmp_path / "m.pt"

    def fresh():
        return write(path, state_dict(rng), arguments())

    with pytest.raises(UserError, match=r"tensor 'embedding\.word_embeddings\.weight' reaches past the end"):
        MegatronReader(replace_entry(fresh(), "data/0", b"\0" * 100))
    with pytest.raises(UserError, match="truncated or no torch"):
        MegatronReader(replace_entry(fresh(), "data/0", None))
    with pytest.raises(UserError, match="does not compress"):
        MegatronReader(replace_entry(fresh(), "nothing", None, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="big-endian"):
        MegatronReader(replace_entry(fresh(), "byteorder", b"big"))
    assert MegatronReader(replace_entry(fresh(), "byteorder", None)).names()  # older files do not say
    with pytest.raises(UserError, match=r"does not hold one data\.pkl"):
        MegatronReader(replace_entry(fresh(), "data.pkl", None))
    state = state_dict(rng)
    state["output_layer.weight"] = torch.ones(1).expand(10**6, 10**6)  # four bytes that would become terabytes
    with pytest.raises(UserError, match=r"'output_layer\.weight' reaches past"):
        MegatronReader(write(path, state, arguments()))
    for value in (torch.ones(3, dtype=torch.complex64), torch.ones(3).to_sparse(), 3, "text", None):
        with pytest.raises(UserError, match="'odd' is"):
            MegatronReader(write(path, state_dict(rng) | {"odd": value}, arguments()))
    negated = torch.view_as_complex(torch.ones(4, 2)).conj().imag  # read with the sign turned
    with pytest.raises(UserError, match="'odd' is"):
        MegatronReader(write(path, state_dict(rng) | {"odd": negated}, arguments()))


def test_bfloat16_keeps_its_bits(tmp_path, rng):
    bits = rng.integers(0, 2**16, VOCAB * HIDDEN, dtype=np.uint16)
    state = state_dict(rng)
    state["output_layer.weight"] = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).reshape(VOCAB, HIDDEN)
    value = MegatronReader(write(tmp_path / "m.pt", state, arguments())).read("lm_head.weight")
    assert value.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(value.reshape(-1).view(np.uint16), bits)
