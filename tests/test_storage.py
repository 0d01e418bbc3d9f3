"""Tensors of every type and any size, in files and in memory, held once and copied in pieces."""

import hashlib

import pytest
import safetensors.torch
import torch
from torch import nn

from koi import CheckpointError, Koi, memory, storage
from toys import InTurn, assert_same

GIB = 2**30

KINDS = [
    torch.complex128,
    torch.complex64,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),  # since torch 2.7
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]

LAYOUTS = {
    "a matrix": lambda: torch.randn(5, 7),
    "transposed": lambda: torch.randn(5, 7).t(),
    "every third": lambda: torch.randn(50)[::3],
    "from the middle": lambda: torch.randn(50)[13:],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 3).expand(9, 3),
    "conjugated": lambda: torch.randn(9, dtype=torch.complex64).conj(),
    "conjugated, wide": lambda: torch.randn(9, dtype=torch.complex128).conj(),
    "negated": lambda: torch.randn(9, dtype=torch.complex128).conj().imag,
    "of no dimension": lambda: torch.tensor(1 + 2j, dtype=torch.complex128),
    "empty": lambda: torch.zeros(3, 0, dtype=torch.complex128),
}


class Waves(nn.Module):
    """A parameter and a buffer that are complex."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=dtype))
        self.register_buffer("phase", torch.randn(2, dtype=dtype))


class Match:
    def loss(self, model):
        return (model.weight - 1j).abs().square().sum()


class Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError


def round_trips(tensor, path):
    """Return it from a file and from memory."""
    data = {"odd": torch.tensor([True]), "t": tensor}
    storage.write(path, data)
    return storage.read(path)["t"], storage.unpack(storage.pack(data), path)["t"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type(kind, tmp_path):
    values = torch.arange(48, dtype=torch.uint8) % 2
    expected = values if kind == torch.uint8 else values.view(kind)
    for found in round_trips(expected, tmp_path / "file"):
        assert found.dtype == kind
        assert torch.equal(found.view(torch.uint8), values)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="needs torch 2.8")
def test_two_values_in_a_byte_are_refused(tmp_path):
    tensor = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(CheckpointError, match=r"of type torch\.float4_e2m1fn_x2 tensor"):
        storage.write(tmp_path / "file", {"t": tensor})


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("piece", [1, 24, 2**24])
def test_every_layout_in_pieces_of_any_size(make, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PIECE", piece)
    tensor = make()
    for found in round_trips(tensor, tmp_path / "file"):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_and_buffers(dtype, tmp_path):
    koi = Koi(Waves(dtype), step_size=0.1, num_steps=2, num_iterations=3, vectorize=False, seed=0)
    koi.train(InTurn(Match()), checkpoint_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    assert_same(Koi.load(path, Waves(dtype)).model, koi.model)


def test_wide_complex_numbers_are_pairs_to_other_programs(tmp_path):
    tensor = torch.randn(2, 3, dtype=torch.complex128)
    storage.write(tmp_path / "file", {"t": tensor})
    found = safetensors.torch.load_file(tmp_path / "file")
    assert torch.equal(found["t"], torch.view_as_real(tensor))


def test_tensor_without_memory_is_refused_and_not_read_from_address_0(tmp_path):
    with pytest.raises(CheckpointError, match="cannot hold t, of type"):
        storage.write(tmp_path / "file", {"t": Wrapper(torch.ones(3))})


def test_packed_in_memory():
    data = {"a": [torch.randn(3), 1.5], "b": torch.tensor(1j, dtype=torch.complex128)}
    found = storage.unpack(storage.pack(data), "of rank 0")
    assert torch.equal(found["a"][0], data["a"][0])
    assert found["b"] == data["b"]
    with pytest.raises(CheckpointError, match="of rank 0 is damaged"):
        storage.unpack(storage.pack(data)[:-1], "of rank 0")


def test_what_is_read_is_on_the_cpu(tmp_path):
    data = {"full": torch.ones(2), "empty": torch.ones(0), "wide": torch.tensor(1j).cdouble()}
    storage.write(tmp_path / "file", data)
    content = storage.pack(data)
    with torch.device("meta"):
        found = [storage.read(tmp_path / "file"), storage.unpack(content, "of rank 0")]
    assert {tensor.device.type for each in found for tensor in each.values()} == {"cpu"}


def test_what_is_read_is_memory_of_its_own(tmp_path):
    """A copy of one tensor then does not copy the whole file, nor keep it alive."""
    storage.write(tmp_path / "file", {"a": torch.ones(1000), "b": torch.ones(2)})
    assert storage.read(tmp_path / "file")["b"].untyped_storage().nbytes() == 8


def test_each_tensor_is_gone_through_once(tmp_path, monkeypatch):
    """Going through one means copying it, where it lies on another device."""
    seen = []
    original = memory.pieces_of

    def counting(tensor):
        seen.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(memory, "pieces_of", counting)
    storage.write(tmp_path / "file", {"a": torch.ones(2), "b": torch.ones(3)})
    assert sorted(seen) == [(2,), (3,)]


def test_a_forged_file_is_refused_even_with_the_right_checksum(tmp_path):
    content = storage.pack({"t": torch.ones(2)})
    place = content.index(b'"sha256":"') + len('"sha256":"')
    forged = bytearray(content.replace(b'"data_offsets":[0,8]', b'"data_offsets":[8,0]'))
    forged[place : place + 64] = b"0" * 64
    forged[place : place + 64] = hashlib.sha256(forged).hexdigest().encode()
    (tmp_path / "file").write_bytes(forged)
    for read in (storage.read, lambda path: storage.unpack(path.read_bytes(), path)):
        with pytest.raises(CheckpointError, match="file cannot be understood"):
            read(tmp_path / "file")


def test_pieces_are_the_tensors_own_memory(monkeypatch):
    monkeypatch.setattr(memory, "PIECE", 8)
    tensor = torch.zeros(5)
    for piece in memory.pieces_of(tensor):
        piece[0] = 1
    assert tensor.view(torch.int32).tolist() == [1, 0, 1, 0, 1]


def sparse(path, size):
    """Return a tensor whose values lie in a file with a hole; the first and the last are 7."""
    with path.open("wb") as file:
        file.truncate(size)
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    tensor[0] = tensor[-1] = 7
    return tensor


@pytest.mark.parametrize("size", [2 * GIB, 4 * GIB + 5])
def test_pieces_of_a_large_tensor(size, tmp_path):
    """Two pages of it are in memory: what C's int cannot count is counted all the same."""
    counted, ends = 0, []
    for piece in memory.pieces_of(sparse(tmp_path / "values", size)):
        counted += len(piece)
        assert len(piece) <= memory.PIECE
        if counted in (memory.PIECE, size):
            ends.append((piece[0], piece[-1]))
    assert counted == size
    assert ends == [(7, 0), (0, 7)]


@pytest.mark.slow
def test_a_large_tensor_is_saved_and_loaded(tmp_path):
    """In as much memory as it takes itself; on the disk too, its zeros written out."""
    size = 4 * GIB + 5
    tensor = sparse(tmp_path / "values", size)
    storage.write(tmp_path / "file", {"before": torch.ones(3), "t": tensor})
    found = storage.read(tmp_path / "file")
    assert found["before"].tolist() == [1, 1, 1]
    assert found["t"].shape == (size,)
    assert (found["t"][0], found["t"][-1], int(found["t"][1:-1].max())) == (7, 7, 0)
