"""The restricted reader of pickles: what it reads, and that it runs nothing."""

import os
import pickle
import sys

import numpy as np
import pytest

from structlin_nn.data._pickle import load_plain

IMAGES = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_every_protocol_of_python_3(protocol):
    content = {"data": IMAGES, "labels": [3, 4], "batch_label": "one", "filenames": [b"a", b"\xff"]}
    read = load_plain(pickle.dumps(content, protocol=protocol))
    assert read.keys() == content.keys()
    assert read["data"].dtype == np.uint8
    np.testing.assert_array_equal(read["data"], IMAGES)
    assert read["labels"] == [3, 4]
    assert read["filenames"] == [b"a", b"\xff"]


def test_reads_a_pickle_of_python_2(python2_pickle):
    content = {"data": IMAGES, "labels": [3, 4], "filenames": [b"a.png", b"\xe9.png"]}
    raw = python2_pickle(content)
    # The oracle is the ordinary unpickler, on bytes written here.
    ordinary = pickle.loads(raw, encoding="bytes")
    np.testing.assert_array_equal(ordinary[b"data"], IMAGES)
    read = load_plain(raw)
    np.testing.assert_array_equal(read["data"], IMAGES)
    assert read["labels"] == [3, 4]
    assert read["filenames"] == [b"a.png", b"\xe9.png"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_column_major_arrays_keep_their_values(protocol):
    array = np.asfortranarray(IMAGES)
    read = load_plain(pickle.dumps({"data": array}, protocol=protocol))
    np.testing.assert_array_equal(read["data"], IMAGES)


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "value", "key", "list"])
def test_a_call_in_a_pickle_is_refused_and_not_run(tmp_path, protocol, place):
    marker = tmp_path / "was_run"
    call = Runs(os.mkdir, str(marker))
    content = {"whole": call, "value": {"data": call}, "key": {call: 1}, "list": {"labels": [call]}}[place]
    raw = pickle.dumps(content, protocol=protocol)
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir, which no image file needs"):
        load_plain(raw)
    assert not marker.exists()
    if place != "key":
        pickle.loads(raw)
        assert marker.exists(), "the pickle of this test does run in the ordinary unpickler"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "decode"),
        ("functools", "partial"),
        ("somewhere_else", "dtype"),
    ],
)
def test_other_names_are_refused(module, name):
    with pytest.raises(ValueError, match="which no image file needs"):
        load_plain(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b".")
    as_protocol_4 = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    as_protocol_4 += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(ValueError, match="which no image file needs"):
        load_plain(as_protocol_4)


def test_a_refused_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile_module_of_a_pickle.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="hostile_module_of_a_pickle"):
        load_plain(b"\x80\x02chostile_module_of_a_pickle\nrun\n.")
    assert "hostile_module_of_a_pickle" not in sys.modules


def test_old_opcodes_and_persistent_ids_are_refused():
    with pytest.raises(ValueError, match=r"asks for os\.system"):
        load_plain(b"(S'true'\nios\nsystem\n.")
    with pytest.raises(ValueError, match=r"asks for os\.system"):
        load_plain(b"(cos\nsystem\nS'true'\no.")
    with pytest.raises(ValueError, match="damaged"):
        load_plain(b"Pthing\n.")


def test_a_pickle_cannot_leave_anything_behind():
    function = b"cnumpy.core.multiarray\n_reconstruct\n"
    build = b"(N}X\x0c\x00\x00\x00__defaults__(K\x01K\x02K\x03tstb"
    # BUILD gives the function that the name stands for three default arguments; it can then be called with none.
    with pytest.raises(ValueError, match="no array"):
        load_plain(b"\x80\x02" + function + build + b")R.")
    with pytest.raises(ValueError, match="missing 3 required positional arguments"):
        load_plain(b"\x80\x02" + function + b")R.")


def test_a_stand_in_is_no_value():
    with pytest.raises(ValueError, match="no data under b'data'"):
        load_plain(b"\x80\x02}(U\x04datacnumpy\ndtype\nu.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dictionary"),
        ({1: 2}, "has the key 1, expected text"),
        ({"data": np.zeros(3)}, "dtype 'f8', expected uint8"),
        ({"data": np.array([None])}, "dtype 'O8', expected uint8"),
    ],
)
def test_other_content_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        load_plain(pickle.dumps(content, protocol=2))


def test_an_array_whose_bytes_do_not_fit_its_shape_is_refused(python2_pickle):
    raw = python2_pickle({"data": IMAGES})
    two, three = (b"J" + n.to_bytes(4, "little") for n in (2, 3))
    assert raw.count(two + three) == 1
    with pytest.raises(ValueError, match=r"shape \(3, 3\) with 6 bytes"):
        load_plain(raw.replace(two + three, three + three))
    with pytest.raises(ValueError, match=r"shape \(-2, -3\)"):
        load_plain(raw.replace(two + three, b"J\xfe\xff\xff\xffJ\xfd\xff\xff\xff"))


def test_a_bare_reconstruction_is_refused():
    raw = b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btRu."
    with pytest.raises(ValueError, match="array without content"):
        load_plain(raw)
    with pytest.raises(ValueError, match="no array"):
        load_plain(raw.replace(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"))


def test_every_truncation_is_an_error_and_no_flipped_byte_escapes():
    raw = pickle.dumps({"data": IMAGES, "labels": [3, 4]}, protocol=2)
    for length in range(len(raw)):
        with pytest.raises(ValueError, match="pickle"):
            load_plain(raw[:length])
    rng = np.random.default_rng(0)
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= int(rng.integers(1, 256))
        try:
            load_plain(bytes(damaged))
        except ValueError:
            continue
